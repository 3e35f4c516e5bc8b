#![allow(clippy::cast_possible_truncation, reason = "the numbers are small")]

use std::fs::File;
use std::os::unix::fs::FileExt;

use imago::{FormatCreateBuilder, Storage, StorageCreateOptions};
use mce_relay::internals::uffd::Uffd;
use mce_relay::signal::{Signals, set_up};
use virtio_bindings::virtio_blk::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::*;
use crate::config::{DiskConfig, ImageType};
use crate::machine::devices::virtio::testing::{Buffer, Driver, eventually, rings};
use crate::sandbox::seccomp::Mode;

/// Length of the disks, in bytes.
const LEN: u64 = 1 << 20;
/// Where the driver has headers, data and the status, each in a page of its own.
const HEADER: u64 = 0x4_0000;
const DATA: u64 = 0x5_0000;
const STATUS: u64 = 0x6_0000;
/// What the status is before the device has written it.
const NONE: u8 = 0xee;

/// The kinds of disks that there are.
const KINDS: [(ImageType, bool); 3] =
    [(ImageType::Raw, false), (ImageType::Raw, true), (ImageType::Qcow2, false)];

/// As in a VM.
pub(super) fn device_of(disk: &SharedDisk) -> Box<Blk> {
    Box::new(Blk::new(disk).with_a_second_thread(&Filters::new(Mode::On).unwrap()).unwrap())
}

struct Setup {
    dir: tempfile::TempDir,
    driver: Driver,
    config: DiskConfig,
    requests: u16,
}

impl Setup {
    /// `None`, after a word, where the directory for temporary files has no direct I/O.
    fn new((image_type, direct): (ImageType, bool), readonly: bool) -> Option<Self> {
        set_up(Signals::Install).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        match image_type {
            ImageType::Raw => {
                File::create(&path).unwrap().set_len(LEN).unwrap();
                let bytes: Vec<u8> = (0..LEN).map(filler).collect();
                std::fs::write(&path, bytes).unwrap();
            }
            ImageType::Qcow2 => {
                let options = StorageCreateOptions::new().filename(&path);
                let file = imago::file::File::create_open(options).unwrap();
                imago::qcow2::Qcow2::<_>::create_builder(file).size(LEN).create().unwrap();
                let image = disk::tests_only_open(&path);
                let bytes: Vec<u8> = (0..LEN).map(filler).collect();
                image.write(&bytes, 0).unwrap();
                image.flush().unwrap();
            }
        }
        let config = DiskConfig {
            path,
            readonly,
            direct,
            image_type: Some(image_type),
            id: Some("a disk".into()),
        };
        let disk = match Disk::open(&config) {
            Err(error) if direct => {
                println!("SKIPPED: direct I/O: {error}");
                return None;
            }
            disk => Arc::new(Mutex::new(disk.unwrap())),
        };
        let driver = Driver::ready(device_of(&disk), 1);
        Some(Self { dir, driver, config, requests: 0 })
    }

    /// The status of a request with this data, and how much the device says to have written.
    fn ask(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        let memory = &self.driver.memory;
        let _ = memory.write_obj(kind, GuestAddress(HEADER));
        let _ = memory.write_obj(sector, GuestAddress(HEADER + 8));
        let _ = memory.write_obj(NONE, GuestAddress(STATUS));
        let mut buffers = vec![(HEADER, 16, false)];
        buffers.extend(data);
        buffers.push((STATUS, 1, true));
        self.driver.add(0, 0, &buffers);
        let nth = self.requests;
        self.requests += 1;
        self.driver.wait_used(0, self.requests);
        let status = self.driver.memory.read_obj(GuestAddress(STATUS)).unwrap_or(NONE);
        (status, self.driver.used_entry(0, nth).1)
    }

    fn fill(&self, at: u64, byte: u8, len: usize) {
        self.driver.memory.write_slice(&vec![byte; len], GuestAddress(at)).unwrap();
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.driver.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// What is on the disk, as another process sees it after a flush.
    fn on_disk(&mut self, at: u64, len: usize) -> Vec<u8> {
        assert_eq!(self.ask(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
        let mut bytes = vec![0; len];
        match self.config.image_type {
            Some(ImageType::Qcow2) => {
                disk::tests_only_open(&self.config.path).read(&mut bytes, at).unwrap();
            }
            _ => File::open(&self.config.path).unwrap().read_exact_at(&mut bytes, at).unwrap(),
        }
        bytes
    }

    /// The page at guest-physical `at` is lost, to the guest and to devices.
    fn lose(&self, at: u64) -> bool {
        let memory = &self.driver.memory;
        let devices = memory.get_slice(GuestAddress(at), 1).unwrap().ptr_guard().as_ptr();
        let guests = memory.get_host_address(GuestAddress(at)).unwrap();
        let marker = match Uffd::open() {
            Ok(marker) => marker,
            Err(error) => {
                println!("SKIPPED: needs UFFDIO_POISON (Linux 6.6): {error}");
                return false;
            }
        };
        for hva in [devices, guests.cast_const()] {
            marker.poison(hva.expose_provenance() as u64, 4096).unwrap();
        }
        true
    }
}

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

/// What the disk has at byte `at` first.
fn filler(at: u64) -> u8 {
    (at / 512 % 251) as u8
}

fn filled(at: u64, len: u64) -> Vec<u8> {
    (at..at + len).map(filler).collect()
}

#[test]
fn what_is_written_is_on_the_disk_and_is_read_again() {
    for kind in KINDS {
        let Some(mut it) = Setup::new(kind, false) else { continue };
        let two = [(DATA, 512, true), (DATA + 0x1e00, 3584, true)];
        assert_eq!(it.ask(VIRTIO_BLK_T_IN, 16, &two), (OK, 4097), "{kind:?}");
        assert_eq!(it.bytes(DATA, 512), filled(8192, 512));
        assert_eq!(it.bytes(DATA + 0x1e00, 3584), filled(8704, 3584));
        it.fill(DATA, 0xa5, 4096);
        assert_eq!(it.ask(VIRTIO_BLK_T_OUT, 8, &[(DATA, 4096, false)]), (OK, 1));
        let mut expected = filled(0, 65536);
        expected[4096..8192].fill(0xa5);
        assert_eq!(it.on_disk(0, 65536), expected, "{kind:?}");
        assert_eq!(it.ask(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20, true)]), (OK, 21));
        assert_eq!(it.bytes(DATA, 20), b"a disk\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        assert!(it.dir.path().exists());
    }
}

#[test]
fn stretches_are_discarded_and_zeroed() {
    for kind in KINDS {
        let Some(mut it) = Setup::new(kind, false) else { continue };
        for (request, flags, sector) in [
            (VIRTIO_BLK_T_WRITE_ZEROES, 0_u32, 8_u64),
            (VIRTIO_BLK_T_WRITE_ZEROES, 1, 24),
            (VIRTIO_BLK_T_DISCARD, 0, 128),
        ] {
            let memory = &it.driver.memory;
            memory.write_obj(sector, GuestAddress(DATA)).unwrap();
            memory.write_obj(8_u32, GuestAddress(DATA + 8)).unwrap();
            memory.write_obj(flags, GuestAddress(DATA + 12)).unwrap();
            assert_eq!(it.ask(request, 0, &[(DATA, 16, false)]), (OK, 1), "{kind:?}");
        }
        let mut expected = filled(0, 65536);
        expected[4096..8192].fill(0);
        expected[12288..16384].fill(0);
        assert_eq!(it.on_disk(0, 65536), expected, "{kind:?}");
        it.driver.memory.write_obj(1_u32, GuestAddress(DATA + 12)).unwrap();
        assert_eq!(it.ask(VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 16, false)]).0, UNSUPP);
        it.driver.memory.write_obj(u64::MAX, GuestAddress(DATA)).unwrap();
        assert_eq!(it.ask(VIRTIO_BLK_T_WRITE_ZEROES, 0, &[(DATA, 16, false)]).0, IOERR);
        assert_eq!(it.ask(VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 32, false)]).0, UNSUPP);
    }
}

#[test]
fn nonsense_fails_and_the_next_request_works() {
    let mut it = Setup::new(KINDS[0], false).unwrap();
    let end = LEN / 512;
    for (kind, sector, data, status) in [
        (VIRTIO_BLK_T_IN, end, (DATA, 512, true), IOERR),
        (VIRTIO_BLK_T_IN, end - 1, (DATA, 1024, true), IOERR),
        (VIRTIO_BLK_T_IN, u64::MAX, (DATA, 512, true), IOERR),
        (VIRTIO_BLK_T_IN, 0, (DATA, 511, true), IOERR),
        (VIRTIO_BLK_T_IN, 0, (0x8000_0000, 512, true), IOERR),
        (VIRTIO_BLK_T_IN, 0, (u64::MAX - 511, 512, true), IOERR),
        (VIRTIO_BLK_T_IN, 0, (0xf_fe00, 1024, true), IOERR),
        (VIRTIO_BLK_T_OUT, 0, (DATA, 513, false), IOERR),
        (VIRTIO_BLK_T_OUT, end, (DATA, 512, false), IOERR),
        (VIRTIO_BLK_T_OUT, 0, (0xf_fe00, 1024, false), IOERR),
        (VIRTIO_BLK_T_OUT, 0, (DATA, 0xffff_fe00, false), IOERR),
        (99, 0, (DATA, 512, true), UNSUPP),
        (u32::MAX, 0, (DATA, 512, false), UNSUPP),
    ] {
        let asked = it.ask(kind, sector, &[data]);
        assert_eq!(asked.0, status, "{kind} {sector:#x} {data:x?}");
        assert_eq!(it.ask(VIRTIO_BLK_T_IN, 1, &[(DATA, 512, true)]), (OK, 513));
        assert_eq!(it.bytes(DATA, 512), filled(512, 512));
    }
    assert_eq!(it.on_disk(0, 1 << 20), filled(0, LEN), "nothing was written");
    // Without a status byte nothing is done.
    it.driver.add(0, 0, &[(HEADER, 16, false), (DATA, 512, false)]);
    it.requests += 1;
    it.driver.wait_used(0, it.requests);
    assert_eq!(it.driver.used_entry(0, it.requests - 1).1, 0);
    assert!(!it.driver.needs_reset());
}

#[test]
fn a_disk_that_is_only_read_stays_as_it_is() {
    for kind in KINDS {
        let Some(mut it) = Setup::new(kind, true) else { continue };
        it.fill(DATA, 1, 512);
        assert_eq!(it.ask(VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, false)]).0, IOERR);
        assert_eq!(it.ask(VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
        assert_eq!(it.ask(VIRTIO_BLK_T_IN, 0, &[(DATA, 512, true)]).0, OK);
        assert_eq!(it.bytes(DATA, 512), filled(0, 512), "{kind:?}");
    }
}

#[test]
fn of_a_write_from_a_bad_page_nothing_reaches_the_disk() {
    for kind in KINDS {
        let Some(mut it) = Setup::new(kind, false) else { continue };
        it.fill(DATA, 0xa5, 3 * 4096);
        if !it.lose(DATA + 4096) {
            return;
        }
        let three = [(DATA, 12288, false)];
        // Once when nobody knows of the page, and once when it is known.
        for _ in 0..2 {
            assert_eq!(it.ask(VIRTIO_BLK_T_OUT, 8, &three).0, IOERR, "{kind:?}");
        }
        assert_eq!(it.on_disk(0, 65536), filled(0, 65536), "{kind:?}");
        let others = [(DATA, 4096, false), (DATA + 8192, 4096, false)];
        assert_eq!(it.ask(VIRTIO_BLK_T_OUT, 8, &others).0, OK);
        let mut expected = filled(0, 65536);
        expected[4096..12288].fill(0xa5);
        assert_eq!(it.on_disk(0, 65536), expected, "{kind:?}");
        assert!(!it.driver.needs_reset());
    }
}

#[test]
fn a_read_into_a_bad_page_fails_and_the_next_one_works() {
    for kind in KINDS {
        let Some(mut it) = Setup::new(kind, false) else { continue };
        if !it.lose(DATA + 4096) {
            return;
        }
        for _ in 0..2 {
            let (status, _) = it.ask(VIRTIO_BLK_T_IN, 8, &[(DATA, 12288, true)]);
            assert_eq!(status, IOERR, "{kind:?}");
        }
        let hva = it.driver.memory.get_host_address(GuestAddress(DATA + 4096)).unwrap();
        assert!(mce_relay::guard::is_bad(hva.expose_provenance() as u64, 1), "it is known by now");
        assert_eq!(it.ask(VIRTIO_BLK_T_IN, 8, &[(DATA, 4096, true)]), (OK, 4097));
        assert_eq!(it.bytes(DATA, 4096), filled(4096, 4096));
    }
}

/// So long a read is done by two threads; either may be the one that meets the page.
#[test]
fn a_long_read_into_a_bad_page_fails_and_its_other_pages_can_be_read() {
    const LONG: u64 = 0x8_0000;
    const PART: u64 = 0x2_0000;
    let parts: Vec<Buffer> = (0..4).map(|part| (LONG + part * PART, PART as u32, true)).collect();
    for bad in [0, PART, 2 * PART + 0x1000, 4 * PART - 0x1000] {
        let mut it = Setup::new(KINDS[0], false).unwrap();
        let len = 4 * PART as usize;
        assert_eq!(it.ask(VIRTIO_BLK_T_IN, 8, &parts), (OK, len as u32 + 1));
        assert_eq!(it.bytes(LONG, len), filled(4096, 4 * PART));
        if !it.lose(LONG + bad) {
            return;
        }
        for _ in 0..2 {
            assert_eq!(it.ask(VIRTIO_BLK_T_IN, 8, &parts).0, IOERR, "{bad:#x}");
        }
        let hva = it.driver.memory.get_host_address(GuestAddress(LONG + bad)).unwrap();
        assert!(mce_relay::guard::is_bad(hva.expose_provenance() as u64, 1), "it is known by now");
        let whole = |part: &&Buffer| !(part.0..part.0 + PART).contains(&(LONG + bad));
        let whole: Vec<Buffer> = parts.iter().filter(whole).copied().collect();
        assert_eq!(it.ask(VIRTIO_BLK_T_IN, 16, &whole), (OK, 3 * PART as u32 + 1));
        assert_eq!(it.bytes(whole[0].0, PART as usize), filled(8192, PART));
    }
}

/// Reads that are in hand together, with short requests between them: each has its own end.
#[test]
fn of_several_long_reads_at_once_only_the_one_into_a_bad_page_fails() {
    const LONG: u64 = 0x8_0000;
    const LEN: u32 = 0x2_0000;
    const BAD: u64 = 2;
    let data = |nth: u64| if nth < 4 { LONG + nth * u64::from(LEN) } else { DATA };
    for round in 0..20 {
        let mut it = Setup::new(KINDS[0], false).unwrap();
        if !it.lose(data(BAD) + 0x1000 * (round % 32)) {
            return;
        }
        // The last one is short, and done while the others are in hand.
        let requests = [LEN, LEN, LEN, LEN, 4096];
        for (nth, len) in (0..).zip(requests) {
            let memory = &it.driver.memory;
            memory.write_obj(VIRTIO_BLK_T_IN, GuestAddress(HEADER + nth * 16)).unwrap();
            memory.write_obj(8 + nth, GuestAddress(HEADER + nth * 16 + 8)).unwrap();
            memory.write_obj(NONE, GuestAddress(STATUS + nth)).unwrap();
            let buffers =
                [(HEADER + nth * 16, 16, false), (data(nth), len, true), (STATUS + nth, 1, true)];
            it.driver.add(0, nth as u16 * 3, &buffers);
        }
        it.driver.wait_used(0, requests.len() as u16);
        for (nth, len) in (0..).zip(requests) {
            let status: u8 = it.driver.memory.read_obj(GuestAddress(STATUS + nth)).unwrap();
            let came_back = (0..requests.len() as u16).map(|at| it.driver.used_entry(0, at));
            let written: Vec<u32> = came_back
                .filter_map(|(head, written)| (u64::from(head) == nth * 3).then_some(written))
                .collect();
            if nth == BAD {
                assert_eq!((status, &written[..]), (IOERR, &[1][..]), "{round}");
                continue;
            }
            assert_eq!((status, &written[..]), (OK, &[len + 1][..]), "{round}: {nth}");
            let expected = filled((8 + nth) * 512, len.into());
            assert_eq!(it.bytes(data(nth), len as usize), expected, "{round}: {nth}");
        }
        assert!(!it.driver.needs_reset());
    }
}

#[test]
fn a_bad_header_fails_the_request_and_a_bad_status_counts_as_failure() {
    for (lost, expected) in [(HEADER, (IOERR, 1)), (STATUS, (NONE, 0))] {
        let mut it = Setup::new(KINDS[0], false).unwrap();
        it.fill(DATA, 0xa5, 4096);
        let memory = &it.driver.memory;
        memory.write_obj(VIRTIO_BLK_T_OUT, GuestAddress(HEADER)).unwrap();
        memory.write_obj(8_u64, GuestAddress(HEADER + 8)).unwrap();
        if !it.lose(lost) {
            return;
        }
        it.driver.add(0, 0, &[(HEADER, 16, false), (DATA, 4096, false), (STATUS, 1, true)]);
        it.driver.wait_used(0, 1);
        let status = it.driver.memory.read_obj(GuestAddress(STATUS)).unwrap_or(NONE);
        assert_eq!((status, it.driver.used_entry(0, 0).1), expected, "{lost:#x}");
        assert!(!it.driver.needs_reset());
    }
}

#[test]
fn bad_rings_ask_for_a_reset_and_good_memory_brings_the_disk_back() {
    // The descriptor table, the available ring, the used ring, and a table of indirect descriptors.
    const INDIRECT: u64 = 0x7_0000;
    for lost in [rings(0), rings(0) + 0x1000, rings(0) + 0x2000, INDIRECT] {
        let mut it = Setup::new(KINDS[0], false).unwrap();
        let memory = &it.driver.memory;
        memory.write_obj(VIRTIO_BLK_T_FLUSH, GuestAddress(HEADER)).unwrap();
        if lost == INDIRECT {
            // VIRTIO_RING_F_INDIRECT_DESC
            it.driver.begin(1 << 28);
            it.driver.set_up_queue(0);
            it.driver.add_status(4);
            it.driver.descriptor(0, 0, (INDIRECT, 32, 4, 0));
        } else {
            it.driver.descriptor(0, 0, (HEADER, 16, 1, 1));
            it.driver.descriptor(0, 1, (STATUS, 1, 2, 0));
        }
        if !it.lose(lost) {
            return;
        }
        // A guest that is told of a bad ring cannot add to it either; here the device finds out by itself.
        if lost != rings(0) + 0x1000 {
            it.driver.offer(0, 0);
        }
        it.driver.kick(0);
        eventually("a request for a reset", || it.driver.needs_reset());
    }
}

#[test]
fn one_disk_is_written_by_one_vm() {
    let _apart = hostile::apart();
    let it = Setup::new(KINDS[0], false).unwrap();
    let again = |readonly| Disk::open(&DiskConfig { readonly, ..it.config.clone() });
    for readonly in [false, true] {
        let error = again(readonly).unwrap_err().to_string();
        assert!(error.contains("is in use") && error.contains("readonly=on"), "{error}");
    }
    drop(it.driver);
    let first = again(true).unwrap();
    again(true).unwrap();
    again(false).unwrap_err();
    drop(first);
}

#[test]
fn what_cannot_be_a_disk_is_said() {
    let _apart = hostile::apart();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let config = DiskConfig {
        path: path.clone(),
        readonly: false,
        direct: false,
        image_type: None,
        id: None,
    };
    let error = || Disk::open(&config).unwrap_err().to_string();
    assert!(error().contains("cannot open the disk"), "{}", error());
    std::fs::write(&path, [0; 511]).unwrap();
    assert!(error().contains("511 bytes; expected 512 at least"), "{}", error());
    std::fs::write(&path, []).unwrap();
    assert!(error().contains("0 bytes; expected 512 at least"), "{}", error());
    std::fs::write(&path, [&b"QFI\xfb"[..], &[0; 1020]].concat()).unwrap();
    assert!(error().contains("image_type=qcow2"), "{}", error());
    let raw = DiskConfig { image_type: Some(ImageType::Raw), ..config.clone() };
    assert_eq!(Disk::open(&raw).unwrap().sectors(), 2);
    let qcow2 = DiskConfig { image_type: Some(ImageType::Qcow2), ..config.clone() };
    let error = Disk::open(&qcow2).unwrap_err().to_string();
    assert!(error.contains("qcow2 image"), "{error}");
    let config = DiskConfig { path: dir.path().into(), ..config };
    let error = Disk::open(&config).unwrap_err().to_string();
    assert!(error.contains("neither a regular file"), "{error}");
}
