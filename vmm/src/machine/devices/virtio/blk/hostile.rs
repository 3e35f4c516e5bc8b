//! Disks that lie, and hosts that take things away.
#![allow(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    clippy::undocumented_unsafe_blocks,
    reason = "a test"
)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use imago::{FormatCreateBuilder, Storage, StorageCreateOptions};
use mce_relay::signal::{Signals, set_up};
use vm_memory::GuestAddress;

use super::*;
use crate::config::{DiskConfig, ImageType, MemoryZone};
use crate::machine::devices::virtio::queue::Segment;
use crate::machine::memory::guest_ram::GuestRam;

const MIB: u64 = 1 << 20;

fn create(path: &Path, len: u64) {
    let options = StorageCreateOptions::new().filename(path);
    let file = imago::file::File::create_open(options).unwrap();
    imago::qcow2::Qcow2::<_>::create_builder(file).size(len).create().unwrap();
}

fn config(path: &Path, image_type: ImageType) -> DiskConfig {
    DiskConfig {
        path: path.into(),
        readonly: false,
        direct: false,
        image_type: Some(image_type),
        id: None,
    }
}

/// What another process has after this one was killed: the file as it is.
fn as_it_is(path: &Path, len: usize) -> Vec<u8> {
    let copy = path.with_extension("copy");
    std::fs::copy(path, &copy).unwrap();
    let mut bytes = vec![0xee; len];
    disk::tests_only_open(&copy).read(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn what_was_flushed_is_in_a_new_qcow2_image() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    create(&path, 64 * MIB);
    let mut disk = Disk::open(&config(&path, ImageType::Qcow2)).unwrap();
    disk.write(0, &[0xa5; 8192]).unwrap();
    disk.flush().unwrap();
    let seen = as_it_is(&path, 8192);
    assert!(seen.iter().all(|byte| *byte == 0xa5), "flushed, and not there: {:?}", &seen[..4]);
}

#[test]
fn what_was_zeroed_and_flushed_is_zero_in_a_qcow2_image() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    create(&path, 64 * MIB);
    let mut disk = Disk::open(&config(&path, ImageType::Qcow2)).unwrap();
    disk.write(0, &vec![0xa5; MIB as usize]).unwrap();
    drop(disk);
    let mut disk = Disk::open(&config(&path, ImageType::Qcow2)).unwrap();
    disk.write_zeroes(0, MIB, true).unwrap();
    disk.flush().unwrap();
    assert_eq!(as_it_is(&path, 8192), vec![0; 8192], "zeroed and flushed");
}

#[test]
fn a_qcow2_image_that_was_cut_short_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    create(&path, 64 * MIB);
    let mut disk = Disk::open(&config(&path, ImageType::Qcow2)).unwrap();
    disk.write(0, &vec![0xa5; MIB as usize]).unwrap();
    disk.flush().unwrap();
    let len = std::fs::metadata(&path).unwrap().len();
    File::options().write(true).open(&path).unwrap().set_len(len - MIB / 2).unwrap();
    let mut bytes = vec![0xee; MIB as usize];
    let read = disk.read(0, &mut bytes);
    let wrong = bytes.iter().filter(|byte| **byte != 0xa5).count();
    assert!(read.is_err() || wrong == 0, "{wrong} wrong bytes, and no error");
}

/// As QEMU has an image open for writing: it takes read locks of single bytes (block/file-posix.c), and others look.
#[test]
fn an_image_that_qemu_writes_is_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![0; MIB as usize]).unwrap();
    let qemu = File::options().read(true).write(true).open(&path).unwrap();
    // consistent read, write; "no other may write".
    for at in [100, 101, 201, 203] {
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        (lock.l_type, lock.l_start, lock.l_len) = (libc::F_RDLCK as i16, at, 1);
        assert_eq!(unsafe { libc::fcntl(qemu.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }, 0);
    }
    assert!(Disk::open(&config(&path, ImageType::Raw)).is_err(), "for writing");
    let readonly = DiskConfig { readonly: true, ..config(&path, ImageType::Raw) };
    assert!(Disk::open(&readonly).is_err(), "what another one writes is read");
}

/// In a child, which may die of it; how it ended.
fn child(work: impl FnOnce() -> i32) -> i32 {
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            let limit = libc::rlimit { rlim_cur: 3 << 30, rlim_max: 3 << 30 };
            libc::setrlimit(libc::RLIMIT_AS, &raw const limit);
            libc::alarm(10);
            libc::_exit(work());
        }
        let mut status = 0;
        libc::waitpid(pid, &raw mut status, 0);
        status
    }
}

/// The guest names an address that was taken out of its memory when it started over.
#[test]
fn a_read_into_memory_that_was_taken_out_fails() {
    set_up(Signals::Install).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (path, image) = (dir.path().join("ram"), dir.path().join("disk"));
    std::fs::write(&path, vec![0_u8; 32 << 20]).unwrap();
    std::fs::write(&image, vec![7; MIB as usize]).unwrap();
    let zone = MemoryZone {
        file: Some(path.clone()),
        shared: true,
        lossy: true,
        ..MemoryZone::new(32 << 20)
    };
    let ram = GuestRam::new(&[zone]).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(31 << 20).unwrap();
    let gone = 31 << 20;
    assert_eq!(ram.heal(&[gone]).removed, [(gone, 0x1000)]);
    let disk = Disk::open(&config(&image, ImageType::Raw)).unwrap();
    let status = child(|| {
        let segment = Segment { addr: GuestAddress(gone), len: 512 };
        i32::from(disk.read_into(0, ram.memory(), &[segment], 512).is_ok())
    });
    assert_eq!(status, 0, "wait status: signal {}", status & 0x7f);
}

/// Headers and tables with random and extreme values.
#[test]
fn no_qcow2_image_ends_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let good = dir.path().join("good");
    create(&good, 8 * MIB);
    {
        let image = disk::tests_only_open(&good);
        image.write(&vec![0xa5; 2 * MIB as usize], 0).unwrap();
        image.flush().unwrap();
    }
    let bytes = std::fs::read(&good).unwrap();
    let path = dir.path().join("bad");
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut found = std::collections::BTreeMap::<String, (u32, String)>::new();
    for round in 0..1500 {
        let mut image = bytes.clone();
        let mut what = String::new();
        for _ in 0..=random() % 3 {
            // A field of the header, or of any table.
            let at = match random() % 4 {
                0 | 1 => 4 * (1 + random() % 27),
                2 => (random() % (bytes.len() as u64 / 65536)) * 65536 + 8 * (random() % 32),
                _ => 8 * (random() % (bytes.len() as u64 / 8)),
            };
            let wide = random() % 2 == 0;
            let value = match random() % 7 {
                0 => random(),
                1 => u64::MAX,
                2 => 1 << (random() % 64),
                3 => random() % 64,
                4 => (1 << 63) | (random() % 512) << 16,
                5 => (random() % 512) << 16,
                _ => u64::MAX << 9 >> 8,
            };
            let value = value.to_be_bytes();
            let some = if wide { &value[..] } else { &value[4..] };
            let at = at as usize;
            if at >= 4 && at + some.len() <= image.len() {
                image[at..at + some.len()].copy_from_slice(some);
                what += &format!("{at:#x}={some:x?} ");
            }
        }
        std::fs::write(&path, &image).unwrap();
        let status = child(|| {
            std::panic::set_hook(Box::new(|info| {
                let at = info.location().map_or(String::new(), |l| {
                    format!("{}:{}", l.file().rsplit("src/").next().unwrap_or(""), l.line())
                });
                let _ = std::fs::write("/tmp/w-break-panic", at);
            }));
            let opened = std::panic::catch_unwind(|| Disk::open(&config(&path, ImageType::Qcow2)));
            let mut disk = match opened {
                Err(_) => return 2,
                Ok(Err(_)) => return 0,
                Ok(Ok(disk)) => disk,
            };
            let work = std::panic::AssertUnwindSafe(|| {
                let end = disk.sectors() * 512;
                let mut some = vec![0; 128 << 10];
                for at in [0, MIB, end.saturating_sub(128 << 10) & !511] {
                    let _ = disk.read(at, &mut some);
                    let _ = disk.write(at, &some);
                    let _ = disk.flush();
                    let _ = disk.write_zeroes(at, 64 << 10, true);
                    let _ = disk.discard(at, 64 << 10);
                    let _ = disk.write(at + 512, &some[..4096]);
                }
                let _ = disk.write_zeroes(0, end.min(1 << 30), false);
                let _ = disk.flush();
            });
            let worked = std::panic::catch_unwind(work);
            let dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(disk)));
            match (worked, dropped) {
                (Ok(()), Ok(())) => 0,
                (Err(_), Ok(())) => 1,
                _ => 3,
            }
        });
        if status != 0 {
            let panic = std::fs::read_to_string("/tmp/w-break-panic").unwrap_or_default();
            let _ = std::fs::remove_file("/tmp/w-break-panic");
            let how = match (status & 0x7f, status >> 8) {
                (0, 1) => format!("panic in a request, {panic}"),
                (0, 2) => format!("panic at the start, {panic}"),
                (0, 3) => format!("panic at the drop, {panic}"),
                (0, 101) => format!("exit 101, {panic}"),
                (14, _) => "takes more than 10 s".to_owned(),
                (signal, code) => format!("signal {signal} code {code} {panic}"),
            };
            let entry = found.entry(how).or_insert((0, format!("round {round}: {what}")));
            entry.0 += 1;
        }
    }
    for (how, (count, first)) in &found {
        println!("{count} x {how}: {first}");
    }
    assert!(found.is_empty());
    let _ = File::open(&path).unwrap().read_at(&mut [0], 0);
}

/// What `no_qcow2_image_ends_the_process` finds in round 69: the table of reference counts lies far behind the end.
#[test]
fn a_table_of_reference_counts_that_is_not_there_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    create(&path, 8 * MIB);
    File::options().write(true).open(&path).unwrap().write_all_at(&[1, 0xbc, 0, 0], 0x34).unwrap();
    for at_start in [true, false] {
        let status = child(|| {
            let Ok(mut disk) = Disk::open(&config(&path, ImageType::Qcow2)) else { return 0 };
            if !at_start {
                let _ = disk.write(4 * MIB, &[1; 4096]);
                let _ = disk.flush();
            }
            std::mem::forget(disk);
            0
        });
        assert_eq!(status, 0, "opened only: {at_start}; signal {}", status & 0x7f);
    }
}

/// An image of 2^63 bytes, as a header says it: what the device does with its length.
#[test]
fn requests_are_bounded_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    create(&path, 1 << 40);
    let mut disk = Disk::open(&config(&path, ImageType::Qcow2)).unwrap();
    let start = std::time::Instant::now();
    for at in 0..16 {
        disk.write_zeroes(at << 30, 1 << 30, true).unwrap();
    }
    let zeroed = start.elapsed();
    let start = std::time::Instant::now();
    for at in 0..16 {
        disk.discard(at << 30, 1 << 30).unwrap();
    }
    println!(
        "16 x 1 GiB: zeroes {zeroed:?}, discard {:?}, file {} KiB",
        start.elapsed(),
        std::fs::metadata(&path).unwrap().len() >> 10
    );
    let mut unaligned = std::time::Duration::ZERO;
    for at in 0..4 {
        let start = std::time::Instant::now();
        disk.write_zeroes((at << 30) + 512, (1 << 30) - 512, false).unwrap();
        unaligned = unaligned.max(start.elapsed());
    }
    println!(
        "unaligned: {unaligned:?}, file {} KiB",
        std::fs::metadata(&path).unwrap().len() >> 10
    );
}

/// A file system without FALLOC_FL_ZERO_RANGE (tmpfs): zeros are written, of which one request can ask for 1 GiB.
#[test]
fn zeros_on_tmpfs_take_a_moment() {
    let path = Path::new("/dev/shm/w-break-disk");
    File::create(path).unwrap().set_len(1 << 30).unwrap();
    let mut disk = Disk::open(&config(path, ImageType::Raw)).unwrap();
    let start = std::time::Instant::now();
    let done = disk.write_zeroes(0, 1 << 30, false);
    let took = start.elapsed();
    std::fs::remove_file(path).unwrap();
    println!("1 GiB of zeros: {took:?} {done:?}; a full queue of 256: {:?}", took * 256);
    assert!(
        took * 256 < std::time::Duration::from_secs(1),
        "a reset, a pause and an end wait for a whole turn"
    );
}

/// qcow2 by direct I/O, and an image whose writes fail.
#[test]
fn a_full_file_system_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    create(&path, 64 * MIB);
    let status = child(|| {
        let limit = libc::rlimit { rlim_cur: 2 * MIB, rlim_max: 2 * MIB };
        unsafe {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit);
        }
        let mut disk = Disk::open(&config(&path, ImageType::Qcow2)).unwrap();
        let mut acknowledged = Vec::new();
        for at in 0..64 {
            if disk.write(at * MIB, &[0x11; 4096]).is_ok() {
                acknowledged.push(at);
            }
        }
        let flushed = disk.flush().is_ok();
        std::mem::forget(disk);
        let image = disk::tests_only_open(&path);
        let lost = acknowledged.iter().filter(|at| {
            let mut bytes = [0; 4096];
            image.read(&mut bytes[..], **at * MIB).is_err() || bytes != [0x11_u8; 4096]
        });
        let lost = lost.count();
        println!("{} acknowledged, flush {flushed}, lost {lost}", acknowledged.len());
        std::mem::forget(image);
        i32::from(flushed && lost > 0)
    });
    assert_eq!(status, 0);
}

#[test]
fn a_qcow2_image_works_by_direct_io() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    create(&path, 8 * MIB);
    let mut disk =
        Disk::open(&DiskConfig { direct: true, ..config(&path, ImageType::Qcow2) }).unwrap();
    let some: Vec<u8> = (0..512).map(|at| at as u8).collect();
    for at in [512, 70_000 / 512 * 512, 8 * MIB - 512] {
        disk.write(at, &some).unwrap();
        let mut back = vec![0; 1024];
        disk.read(at - 512, &mut back).unwrap();
        assert_eq!(&back[512..], some);
    }
    disk.write_zeroes(512, 512, false).unwrap();
    disk.discard(1024, 512).unwrap();
    disk.flush().unwrap();
}

/// The whole device under its filter, with an image that has to grow.
#[test]
fn a_new_qcow2_image_grows_under_the_filter() {
    use crate::machine::devices::virtio::testing::Driver;
    use vm_memory::Bytes;
    set_up(Signals::Install).unwrap();
    for (direct, name) in [(false, "a"), (true, "b")] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        create(&path, 1 << 40);
        let config = DiskConfig { direct, ..config(&path, ImageType::Qcow2) };
        let disk = Arc::new(Mutex::new(Disk::open(&config).unwrap()));
        let mut driver = Driver::ready(Box::new(Blk::new(&disk)), 1);
        let mut requests = 0;
        for n in 0..200_u64 {
            let kind = [1_u32, 1, 4, 13, 11, 0][(n % 6) as usize];
            driver.memory.write_obj(kind, GuestAddress(0x40000)).unwrap();
            driver.memory.write_obj(n * 8_000_000, GuestAddress(0x40008)).unwrap();
            driver.memory.write_obj(n * 8_000_000, GuestAddress(0x50000)).unwrap();
            driver.memory.write_obj(8_u32, GuestAddress(0x50008)).unwrap();
            driver.memory.write_obj(0_u32, GuestAddress(0x5000c)).unwrap();
            driver.memory.write_obj(0xee_u8, GuestAddress(0x60000)).unwrap();
            let data = match kind {
                4 => None,
                0 => Some((0x50000, 4096, true)),
                1 => Some((0x50000, 4096, false)),
                _ => Some((0x50000, 16, false)),
            };
            let mut buffers = vec![(0x40000, 16, false)];
            buffers.extend(data);
            buffers.push((0x60000, 1, true));
            driver.add(0, 0, &buffers);
            requests += 1;
            driver.wait_used(0, requests);
            let status: u8 = driver.memory.read_obj(GuestAddress(0x60000)).unwrap();
            assert_eq!(status, 0, "{n} {kind}");
        }
        assert!(!driver.needs_reset());
    }
}
