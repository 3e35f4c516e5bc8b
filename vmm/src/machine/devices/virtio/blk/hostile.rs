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
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{RwLock, RwLockReadGuard};

use imago::{FormatCreateBuilder, Storage, StorageCreateOptions};
use mce_relay::signal::{Signals, set_up};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS;
use vm_memory::{Bytes, GuestAddress};

use super::places::host_places;
use super::reader::read_now;
use super::tests::device_of;
use super::*;
use crate::config::{DiskConfig, ImageType, MemoryZone};
use crate::machine::devices::virtio::queue::Segment;
use crate::machine::devices::virtio::testing::{Driver, SIZE, eventually};
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
    let _apart = apart();
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

/// As Cloud Hypervisor has a disk that it writes: all of it.
#[test]
fn a_lock_of_the_whole_file_excludes() {
    let _apart = apart();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![0; MIB as usize]).unwrap();
    let other = File::options().read(true).write(true).open(&path).unwrap();
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as i16;
    assert_eq!(unsafe { libc::fcntl(other.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }, 0);
    for readonly in [true, false] {
        let config = DiskConfig { readonly, ..config(&path, ImageType::Raw) };
        assert!(matches!(Disk::open(&config), Err(DiskError::Locked { .. })));
    }
    drop(other);
    Disk::open(&config(&path, ImageType::Raw)).unwrap();
}

/// What this program writes QEMU does not: it asks by such locks.
#[test]
fn qemu_sees_who_writes() {
    let _apart = apart();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![0; MIB as usize]).unwrap();
    let others = File::options().read(true).write(true).open(&path).unwrap();
    let is_held = |at| {
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        (lock.l_type, lock.l_start, lock.l_len) = (libc::F_WRLCK as i16, at, 1);
        let asked = unsafe { libc::fcntl(others.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
        asked == 0 && lock.l_type != libc::F_UNLCK as i16
    };
    for (readonly, expected) in [(false, &[100, 101, 103, 201, 203][..]), (true, &[100, 201, 203])]
    {
        let config = DiskConfig { readonly, ..config(&path, ImageType::Raw) };
        let _disk = Disk::open(&config).unwrap();
        let held: Vec<i64> = (0..512).filter(|at| is_held(*at)).collect();
        assert_eq!(held, expected);
    }
}

/// Set in the process of one test alone.
const ALONE: &str = "MCE_RELAY_TEST_ALONE";

/// A new process has every open file of this one, and so its locks, until it runs its own program.
static SPAWNING: RwLock<()> = RwLock::new(());

/// For a test that closes a disk and opens it again: nobody else has it meanwhile.
pub(super) fn apart() -> RwLockReadGuard<'static, ()> {
    SPAWNING.read().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `test` of this file in a process of its own, as it forks: a child has the open files of all other tests, and so
/// their locks and sockets. True when that is done; false in that process.
fn runs_elsewhere(test: &str) -> bool {
    if std::env::var_os(ALONE).is_some() {
        return false;
    }
    let (_, module) = module_path!().split_once("::").unwrap();
    let program = std::env::current_exe().unwrap();
    let mut command = Command::new(program);
    command.args([&format!("{module}::{test}"), "--exact", "--nocapture"]).env(ALONE, "1");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let spawning = SPAWNING.write().unwrap_or_else(PoisonError::into_inner);
    // It returns when the new process runs its program.
    let child = command.spawn().unwrap();
    drop(spawning);
    let done = child.wait_with_output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    // Set off, as it is not one more test to be counted.
    let said: String = out.lines().chain(err.lines()).map(|line| format!("    {line}\n")).collect();
    assert!(done.status.success() && out.contains("1 passed"), "\n{said}");
    print!("{said}");
    true
}

/// In a child, which may die of it; how it ended.
fn child(work: impl FnOnce() -> i32) -> i32 {
    assert!(std::env::var_os(ALONE).is_some(), "see `runs_elsewhere`");
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            let limit = libc::rlimit { rlim_cur: 3 << 30, rlim_max: 3 << 30 };
            libc::setrlimit(libc::RLIMIT_AS, &raw const limit);
            libc::alarm(10);
            let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            libc::_exit(worked.unwrap_or(1));
        }
        let mut status = 0;
        libc::waitpid(pid, &raw mut status, 0);
        status
    }
}

/// The guest names an address that was taken out of its memory when it started over.
#[test]
fn a_read_into_memory_that_was_taken_out_fails() {
    if runs_elsewhere("a_read_into_memory_that_was_taken_out_fails") {
        return;
    }
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
    let status = child(|| {
        let disk = Disk::open(&config(&image, ImageType::Raw)).unwrap();
        let segment = Segment { addr: GuestAddress(gone), len: 512 };
        let places = host_places(ram.devices(), &[segment], 512).unwrap();
        let done = read_now(disk.copied_from().unwrap(), 0, &places);
        i32::from(request::found(done, &places).is_ok())
    });
    assert_eq!(status, 0, "wait status: signal {}", status & 0x7f);
}

/// Numbers that look random, the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Changes a few fields of `image`, of the header or of any table; which ones.
    fn spoil(&mut self, image: &mut [u8]) -> String {
        let mut what = String::new();
        for _ in 0..=self.next() % 3 {
            let len = image.len() as u64;
            let at = match self.next() % 4 {
                0 | 1 => 4 * (1 + self.next() % 27),
                2 => (self.next() % (len / 65536)) * 65536 + 8 * (self.next() % 32),
                _ => 8 * (self.next() % (len / 8)),
            };
            let wide = self.next().is_multiple_of(2);
            let value = match self.next() % 7 {
                0 => self.next(),
                1 => u64::MAX,
                2 => 1 << (self.next() % 64),
                3 => self.next() % 64,
                4 => (1 << 63) | (self.next() % 512) << 16,
                5 => (self.next() % 512) << 16,
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
        what
    }
}

/// Reads and writes here and there, and everything else that a guest can ask for.
fn exercise(disk: &mut Disk) {
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
    let _ = disk.write_zeroes(0, end.min(32 << 20), false);
    let _ = disk.flush();
}

/// An image of 8 MiB with 2 MiB of data.
fn good_image(path: &Path) -> Vec<u8> {
    create(path, 8 * MIB);
    let image = disk::tests_only_open(path);
    image.write(&vec![0xa5; 2 * MIB as usize], 0).unwrap();
    image.flush().unwrap();
    std::fs::read(path).unwrap()
}

/// Spoils an image time and again, each time for a child that does something with it, and lists how the children ended
/// that did not end well.
fn spoil_for_children(rounds: u32, work: impl Fn(&Path, &[u8])) {
    let dir = tempfile::tempdir().unwrap();
    let bytes = good_image(&dir.path().join("good"));
    let path = dir.path().join("bad");
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut found = std::collections::BTreeMap::<String, (u32, String)>::new();
    for round in 0..rounds {
        let mut image = bytes.clone();
        let what = random.spoil(&mut image);
        std::fs::write(&path, &bytes).unwrap();
        let status = child(|| {
            work(&path, &image);
            0
        });
        let how = match (status & 0x7f, status >> 8) {
            (0, 0) => continue,
            (0, 1) => "panics".to_owned(),
            (libc::SIGALRM, _) => "takes more than 10 s".to_owned(),
            (signal, code) => format!("signal {signal} code {code}"),
        };
        found.entry(how).or_insert((0, format!("round {round}: {what}"))).0 += 1;
    }
    assert!(found.is_empty(), "how many, and the first: {found:?}");
}

/// Headers and tables with random and extreme values.
#[test]
fn no_qcow2_image_ends_the_process() {
    if runs_elsewhere("no_qcow2_image_ends_the_process") {
        return;
    }
    spoil_for_children(1500, |path, image| {
        std::fs::write(path, image).unwrap();
        if let Ok(mut disk) = Disk::open(&config(path, ImageType::Qcow2)) {
            exercise(&mut disk);
        }
    });
}

/// The same, once it is open.
#[test]
fn no_qcow2_image_that_changes_ends_the_process() {
    if runs_elsewhere("no_qcow2_image_that_changes_ends_the_process") {
        return;
    }
    spoil_for_children(500, |path, image| {
        let mut disk = Disk::open(&config(path, ImageType::Qcow2)).unwrap();
        File::options().write(true).open(path).unwrap().write_all_at(image, 0).unwrap();
        exercise(&mut disk);
    });
}

fn be_u64(file: &File, at: u64) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, at).unwrap();
    u64::from_be_bytes(bytes)
}

/// What is wrong with an image is said by the field, its value, and what to do.
#[test]
fn each_fault_of_a_qcow2_image_is_named() {
    let _apart = apart();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let bytes = good_image(&path);
    let file = File::open(&path).unwrap();
    let (l1, counts) = (be_u64(&file, 40), be_u64(&file, 48));
    let l2 = be_u64(&file, l1) & 0x00ff_ffff_ffff_fe00;
    let block = be_u64(&file, counts);
    let data = be_u64(&file, l2) & 0x00ff_ffff_ffff_fe00;
    let own = 1_u64 << 63;
    let wide: &[(u64, u64, &str)] = &[
        (8, 200, "backing_file_offset is 0xc8; expected 0"),
        (24, 1 << 60, "size is 0x1000000000000000"),
        (40, l1 + 512, "l1_table_offset"),
        (40, 0, "l1_table_offset is 0x0"),
        (40, counts, "l1_table_offset"),
        (48, 0, "refcount_table_offset is 0x0"),
        (48, 1 << 40, "refcount_table_offset is 0x10000000000"),
        (72, 1, "incompatible_features is 0x1"),
        (72, 4, "incompatible_features is 0x4; expected 0"),
        (l1, own | counts, "L1 table's entry 0"),
        (l1, own | 1 << 40, "L1 table's entry 0 is 0x10000000000"),
        (l2, own | l2, "L2 entry of guest cluster 0"),
        (l2, own | 1 << 40, "L2 entry of guest cluster 0 is 0x10000000000"),
        (l2, own | (data + (1 << 16)), "reference count of cluster"),
        (l2, 1 << 62 | 1 << 40, "compressed data within"),
        (counts, 0, "reference count of cluster 0x0 is 0x0"),
        (counts, counts, "refcount table's entry 0"),
        (counts, 513, "refcount table's entry 0"),
        (block, 0, "reference count of cluster 0x0 is 0x0"),
        (block + data / 65536 * 2, 0, "reference count of cluster"),
    ];
    let narrow: &[(u64, u32, &str)] = &[
        (0, 0, "magic is 0x0"),
        (4, 4, "version is 0x4; expected 2 or 3"),
        (20, 64, "cluster_bits is 0x40; expected 9 to 21"),
        (32, 1, "crypt_method is 0x1; expected 0"),
        (36, u32::MAX, "l1_size is 0xffffffff"),
        (36, 0, "as l1_size is 0x0"),
        (56, 0, "refcount_table_clusters is 0x0"),
        (56, u32::MAX, "refcount_table_clusters is 0xffffffff"),
        (96, 7, "refcount_order is 0x7; expected 0 to 6"),
        (100, 8, "header_length is 0x8"),
    ];
    let wide = wide.iter().map(|(at, value, said)| (*at, value.to_be_bytes().to_vec(), *said));
    let narrow = narrow.iter().map(|(at, value, said)| (*at, value.to_be_bytes().to_vec(), *said));
    for (at, value, said) in wide.chain(narrow) {
        std::fs::write(&path, &bytes).unwrap();
        File::options().write(true).open(&path).unwrap().write_all_at(&value, at).unwrap();
        let error = Disk::open(&config(&path, ImageType::Qcow2)).unwrap_err().to_string();
        let advised = error.contains("qemu-img check -r all") || error.contains("qemu-img convert");
        let named = error.contains(said) && error.contains(&*path.to_string_lossy());
        assert!(named && advised, "{at:#x}={value:x?}: {error}");
    }
}

/// Wherever it is cut, no byte is read that was not written.
#[test]
fn a_qcow2_image_that_is_cut_short_is_not_opened() {
    let _apart = apart();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let bytes = good_image(&path);
    for readonly in [false, true] {
        let config = DiskConfig { readonly, ..config(&path, ImageType::Qcow2) };
        Disk::open(&config).unwrap();
        for len in (0..bytes.len()).step_by(32 << 10).chain([100, bytes.len() - 1]) {
            std::fs::write(&path, &bytes[..len]).unwrap();
            assert!(Disk::open(&config).is_err(), "{len} of {} bytes", bytes.len());
        }
        std::fs::write(&path, &bytes).unwrap();
    }
}

/// Images that qemu-img makes are sound, and sound for qemu-img after they were used.
#[test]
fn images_of_qemu_are_used() {
    if runs_elsewhere("images_of_qemu_are_used") {
        return;
    }
    let qemu = |program: &str, arguments: &[&str]| {
        let run = Command::new(program).args(arguments).output();
        let is_good = run.as_ref().is_ok_and(|run| run.status.success());
        assert!(is_good || run.is_err(), "{program} {arguments:?}: {run:?}");
        is_good
    };
    if !qemu("qemu-img", &["--version"]) || !qemu("qemu-io", &["--version"]) {
        println!("SKIPPED: needs qemu-img and qemu-io");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let name = path.to_str().unwrap();
    for (options, size, snapshot) in [
        ("compat=1.1", "64M", false),
        ("compat=0.10", "64M", false),
        ("cluster_size=512", "8M", false),
        ("cluster_size=2M", "64M", false),
        ("refcount_bits=1", "64M", false),
        ("refcount_bits=64", "64M", false),
        ("preallocation=metadata", "3146240", false),
        ("preallocation=full", "3146240", false),
        ("lazy_refcounts=on", "64M", false),
        ("compat=1.1", "64M", true),
    ] {
        let _ = std::fs::remove_file(&path);
        qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, name, size]);
        qemu("qemu-io", &["-c", "write -P 7 4096 512", "-c", "write -z 1M 128k", name]);
        if snapshot {
            qemu("qemu-img", &["snapshot", "-c", "one", name]);
        }
        for readonly in [true, false] {
            let config = DiskConfig { readonly, ..config(&path, ImageType::Qcow2) };
            let mut disk = Disk::open(&config).unwrap();
            let mut some = [0; 1024];
            disk.read(4096, &mut some).unwrap();
            assert_eq!((some[0], some[511], some[512]), (7, 7, 0), "{options}");
            if !readonly {
                disk.write(8192, &[9; 65536]).unwrap();
                exercise(&mut disk);
                disk.write(0, &[3; 4096]).unwrap();
                disk.flush().unwrap();
            }
        }
        qemu("qemu-img", &["check", name]);
        qemu("qemu-io", &["-r", "-c", "read -P 3 0 4096", name]);
    }
    let raw = dir.path().join("raw");
    std::fs::write(&raw, b"a line of text\n".repeat(100_000)).unwrap();
    qemu("qemu-img", &["convert", "-c", "-O", "qcow2", raw.to_str().unwrap(), name]);
    let mut disk = Disk::open(&config(&path, ImageType::Qcow2)).unwrap();
    let mut back = vec![0; 1_499_648];
    disk.read(0, &mut back).unwrap();
    assert_eq!(back, std::fs::read(&raw).unwrap()[..back.len()]);
    exercise(&mut disk);
    drop(disk);
    qemu("qemu-img", &["check", name]);
}

/// The table of reference counts lies far behind the end.
#[test]
fn a_table_of_reference_counts_that_is_not_there_is_an_error() {
    if runs_elsewhere("a_table_of_reference_counts_that_is_not_there_is_an_error") {
        return;
    }
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

/// Zeros in a qcow2 image are a matter of its tables, also where they are not aligned.
#[test]
fn zeros_in_a_qcow2_image_take_no_room() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    create(&path, 1 << 40);
    let mut disk = Disk::open(&config(&path, ImageType::Qcow2)).unwrap();
    for at in 0..16 {
        disk.write_zeroes(at << 30, 1 << 30, true).unwrap();
        disk.discard(at << 30, 1 << 30).unwrap();
        disk.write_zeroes((at << 30) + 512, (1 << 30) - 512, false).unwrap();
    }
    disk.flush().unwrap();
    let len = std::fs::metadata(&path).unwrap().len();
    assert!(len < 4 * MIB, "{len} bytes");
}

/// A file system without FALLOC_FL_ZERO_RANGE (tmpfs): zeros are written.
#[test]
fn an_order_to_stop_waits_for_one_request() {
    let (_dir, path) = on_tmpfs();
    File::create(&path).unwrap().set_len(MOST_ZEROS).unwrap();
    let mut driver = driver_of(&config(&path, ImageType::Raw));
    let all = add_zeros(&mut driver, MOST_ZEROS);
    driver.kick(0);
    eventually("a request", || driver.used(0) > 0);
    driver.write(VIRTIO_MMIO_STATUS, 0);
    let done = driver.used(0);
    assert!(done < all, "all {done} requests were done before the reset");
}

/// What a turn leaves it goes on with, without a kick.
#[test]
fn a_long_queue_is_served_to_its_end() {
    let (_dir, path) = on_tmpfs();
    std::fs::write(&path, vec![1; MOST_ZEROS as usize]).unwrap();
    let mut driver = driver_of(&config(&path, ImageType::Raw));
    let all = add_zeros(&mut driver, MOST_ZEROS);
    driver.wait_used(0, all);
    assert_eq!(driver.memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), 0);
    assert!(std::fs::read(&path).unwrap().iter().all(|byte| *byte == 0));
    assert!(driver.take_interrupt().is_some());
}

#[test]
fn more_zeros_than_a_request_may_ask_for_are_refused() {
    let (_dir, path) = on_tmpfs();
    std::fs::write(&path, vec![1; 2 * MOST_ZEROS as usize]).unwrap();
    let mut driver = driver_of(&config(&path, ImageType::Raw));
    let all = add_zeros(&mut driver, MOST_ZEROS + 512);
    driver.wait_used(0, all);
    let status: u8 = driver.memory.read_obj(GuestAddress(STATUS)).unwrap();
    assert_eq!(u32::from(status), virtio_bindings::virtio_blk::VIRTIO_BLK_S_IOERR);
    assert!(std::fs::read(&path).unwrap().iter().all(|byte| *byte == 1));
}

/// The most bytes that one request may zero.
const MOST_ZEROS: u64 = MAX_DISCARD_SECTORS as u64 * 512;
const STATUS: u64 = 0x6_0000;

fn on_tmpfs() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("disk");
    (dir, path)
}

fn driver_of(config: &DiskConfig) -> Driver {
    set_up(Signals::Install).unwrap();
    let disk = Arc::new(Mutex::new(Disk::open(config).unwrap()));
    Driver::ready(device_of(&disk), 1)
}

/// Adds as many requests for zeros as the queue takes; how many these are.
fn add_zeros(driver: &mut Driver, len: u64) -> u16 {
    let (header, data) = (GuestAddress(0x4_0000), GuestAddress(0x5_0000));
    driver.memory.write_obj(13_u32, header).unwrap();
    driver.memory.write_obj([0, 0, (len / 512) as u32, 0], data).unwrap();
    driver.memory.write_obj(0xee_u8, GuestAddress(STATUS)).unwrap();
    let buffers = [(header.0, 16, false), (data.0, 16, false), (STATUS, 1, true)];
    driver.add(0, 0, &buffers);
    // The same chain over and over.
    (1..SIZE).for_each(|_| driver.offer(0, 0));
    SIZE
}

/// qcow2 by direct I/O, and an image whose writes fail.
#[test]
fn a_full_file_system_is_told() {
    if runs_elsewhere("a_full_file_system_is_told") {
        return;
    }
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

/// QEMU refuses what this program writes, and this program what QEMU writes; both read what both only read. Of a raw
/// image qemu-io lets others write what it reads.
#[test]
fn qemu_and_this_program_keep_out_of_each_others_way() {
    if runs_elsewhere("qemu_and_this_program_keep_out_of_each_others_way") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    for image_type in [ImageType::Raw, ImageType::Qcow2] {
        let _ = std::fs::remove_file(&path);
        let format = match image_type {
            ImageType::Raw => std::fs::write(&path, vec![0; MIB as usize]).map(|()| "raw").unwrap(),
            ImageType::Qcow2 => {
                create(&path, MIB);
                "qcow2"
            }
        };
        let qemu_io = |arguments: &[&str]| {
            let mut command = Command::new("qemu-io");
            command.args(["-f", format]).args(arguments).arg(&path).stdin(Stdio::null());
            command.stdout(Stdio::null()).stderr(Stdio::piped());
            command
        };
        let may = |arguments: &[&str]| match qemu_io(arguments).output() {
            Ok(run) if run.status.success() => Some(true),
            Ok(run) => {
                let said = String::from_utf8_lossy(&run.stderr).into_owned();
                assert!(said.contains("lock"), "{said}");
                Some(false)
            }
            Err(error) => {
                println!("SKIPPED: needs qemu-io: {error}");
                None
            }
        };
        let open = |readonly| Disk::open(&DiskConfig { readonly, ..config(&path, image_type) });
        let (write, read) = (&["-c", "write 0 512"][..], &["-r", "-c", "read 0 512"][..]);
        let is_raw = image_type == ImageType::Raw;
        for (readonly, expected) in [(false, [false, is_raw]), (true, [false, true])] {
            let _disk = open(readonly).unwrap();
            let Some(writes) = may(write) else { return };
            assert_eq!([Some(writes), may(read)], expected.map(Some), "{format} {readonly}");
        }
        let cases = [(&[][..], [false, false]), (&["-r"], [false, true])];
        for (arguments, expected) in cases.into_iter().take(if is_raw { 1 } else { 2 }) {
            let sleep = [arguments, &["-c", "sleep 600000"]].concat();
            let mut other = qemu_io(&sleep).spawn().unwrap();
            eventually("QEMU's lock", || {
                // While this looks, it has the disk itself, and QEMU ends if that is when it wants it.
                if other.try_wait().unwrap().is_some() {
                    other = qemu_io(&sleep).spawn().unwrap();
                }
                let is_locked = || open(false).is_err();
                is_locked() && {
                    std::thread::sleep(Duration::from_millis(200));
                    other.try_wait().unwrap().is_none() && is_locked()
                }
            });
            for (readonly, may) in [(false, expected[0]), (true, expected[1])] {
                let opened = open(readonly);
                let is_locked = matches!(opened, Err(DiskError::Locked { .. }));
                assert_eq!((opened.is_ok(), is_locked), (may, !may), "{format} {opened:?}");
            }
            other.kill().unwrap();
            other.wait().unwrap();
        }
    }
}

/// A disk by direct I/O whose length and requests are no multiple of what the host's disk needs.
#[test]
fn a_raw_disk_works_by_direct_io_wherever_a_request_lies() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let mut expected: Vec<u8> = (0..MIB + 512).map(|at| (at / 512 % 251) as u8).collect();
    std::fs::write(&path, &expected).unwrap();
    let config = DiskConfig { direct: true, ..config(&path, ImageType::Raw) };
    let mut disk = match Disk::open(&config) {
        Ok(disk) => disk,
        Err(error) => return println!("SKIPPED: direct I/O: {error}"),
    };
    disk.tests_only_need_blocks_of(4096);
    let mut buffer = buffer::Buffer::default();
    for (at, len) in [(512, 512), (MIB, 512), (4096, 8192), (MIB - 4096, 4608), (0, 1024)] {
        let bytes = buffer.of(len);
        disk.read(at, bytes).unwrap();
        let place = at as usize..at as usize + len;
        assert_eq!(bytes, &expected[place.clone()], "{at}");
        bytes.fill(0xa5);
        disk.write(at, bytes).unwrap();
        expected[place].fill(0xa5);
    }
    disk.write_zeroes(512, 1024, false).unwrap();
    expected[512..1536].fill(0);
    disk.flush().unwrap();
    assert!(std::fs::read(&path).unwrap() == expected);
}

/// A guest that ends without a flush: nothing of what it wrote was in this process alone.
#[test]
fn what_was_written_is_in_a_qcow2_image_when_the_device_stops() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    create(&path, 64 * MIB);
    let mut driver = driver_of(&config(&path, ImageType::Qcow2));
    // Without this feature every write is flushed.
    driver.begin(1 << VIRTIO_BLK_F_FLUSH);
    driver.set_up_queue(0);
    driver.add_status(virtio_bindings::virtio_config::VIRTIO_CONFIG_S_DRIVER_OK);
    driver.memory.write_obj(1_u32, GuestAddress(0x4_0000)).unwrap();
    driver.memory.write_slice(&[0xa5; 4096], GuestAddress(0x5_0000)).unwrap();
    driver.add(0, 0, &[(0x4_0000, 16, false), (0x5_0000, 4096, false), (STATUS, 1, true)]);
    driver.wait_used(0, 1);
    driver.write(VIRTIO_MMIO_STATUS, 0);
    assert!(as_it_is(&path, 4096).iter().all(|byte| *byte == 0xa5));
}

/// The kernel tells once that something is lost.
#[test]
fn after_a_flush_that_failed_no_flush_succeeds() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, vec![0; MIB as usize]).unwrap();
    let mut disk = Disk::open(&config(&path, ImageType::Raw)).unwrap();
    disk.flush().unwrap();
    let (failing, good) = (File::open("/dev/full").unwrap(), File::open(&path).unwrap());
    disk.tests_only_become(failing);
    disk.flush().unwrap_err();
    disk.tests_only_become(good);
    disk.flush().unwrap_err();
}

/// The whole device under its filter, with an image that has to grow.
#[test]
fn a_new_qcow2_image_grows_under_the_filter() {
    set_up(Signals::Install).unwrap();
    for (direct, name) in [(false, "a"), (true, "b")] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        create(&path, 1 << 40);
        let config = DiskConfig { direct, ..config(&path, ImageType::Qcow2) };
        let disk = Arc::new(Mutex::new(Disk::open(&config).unwrap()));
        let mut driver = Driver::ready(device_of(&disk), 1);
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
