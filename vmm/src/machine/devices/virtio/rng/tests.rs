#![allow(clippy::cast_possible_truncation, reason = "the numbers are small")]

use std::io::Write;

use proptest::prelude::{
    Just, ProptestConfig, any, prop, prop_assert, prop_assert_eq, prop_oneof, proptest,
};
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::machine::devices::virtio::testing::{
    Driver, RAM, SIZE, eventually, rings, write_descriptor,
};

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

fn driver() -> Driver {
    Driver::ready(Box::new(Rng::open(Path::new("/dev/urandom")).unwrap()), 1)
}

fn bytes_at(driver: &Driver, addr: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    driver.memory.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
    bytes
}

#[test]
fn buffers_are_filled() {
    let mut driver = driver();
    driver.add(0, 0, &[(0x8000, 100, true), (0x9000, 0, true), (0xa000, 100, true)]);
    driver.wait_used(0, 1);
    assert_eq!(driver.used_entry(0, 0), (0, 200));
    let (first, second) = (bytes_at(&driver, 0x8000, 101), bytes_at(&driver, 0xa000, 101));
    assert_ne!(first[..100], second[..100]);
    assert!(first[..100].iter().any(|byte| *byte != 0));
    assert_eq!((first[100], second[100]), (0, 0), "not beyond the buffers");
    assert_eq!(bytes_at(&driver, 0x9000, 1), [0]);
}

#[test]
fn a_request_gets_some_bytes_of_those_it_asks_for() {
    let mut driver = driver();
    // 4 GiB less a byte, from the last page of RAM on.
    for (nth, (buffer, expected)) in [
        ((0x8000, 0x10000, true), MOST as u32),
        ((RAM - 0x1000, u32::MAX, true), MOST as u32),
        ((RAM - 0x10, 0x20, true), 0),
        ((RAM, 0x20, true), 0),
        ((u64::MAX - 0xf, 0x20, true), 0),
        ((0x8000, 16, false), 0),
        ((0x8000, 0, true), 0),
    ]
    .into_iter()
    .enumerate()
    {
        let nth = nth as u16;
        driver.add(0, nth, &[buffer]);
        driver.wait_used(0, nth + 1);
        assert_eq!(driver.used_entry(0, nth), (nth.into(), expected), "{buffer:x?}");
    }
    assert!(!driver.needs_reset(), "a buffer is the request's own matter");
}

#[test]
fn indirect_tables_are_followed_once() {
    let mut driver = driver();
    write_descriptor(&driver.memory, 0x8000, (0xa000, 8, WRITE | NEXT, 1));
    write_descriptor(&driver.memory, 0x8010, (0xa008, 8, WRITE, 0));
    driver.descriptor(0, 0, (0x8000, 32, INDIRECT, 0));
    driver.offer(0, 0);
    driver.wait_used(0, 1);
    assert_eq!(driver.used_entry(0, 0), (0, 16));
    write_descriptor(&driver.memory, 0x8000, (0x8000, 32, INDIRECT, 0));
    driver.offer(0, 0);
    driver.kick(0);
    eventually("a wish to be reset", || driver.needs_reset());
}

/// Each of these is no chain at all: the device asks for a reset, and works after it.
#[test]
fn what_is_no_chain_asks_for_a_reset() {
    let mut driver = driver();
    let mut try_one = |what: &str, prepare: &dyn Fn(&mut Driver)| {
        driver.set_up(1);
        prepare(&mut driver);
        driver.kick(0);
        eventually(what, || driver.needs_reset());
        assert_eq!(driver.used(0), 0, "{what}");
        driver.set_up(1);
        driver.add(0, 0, &[(0x8000, 16, true)]);
        driver.wait_used(0, 1);
    };
    try_one("a chain of one that loops", &|driver| {
        driver.descriptor(0, 0, (0x8000, 1, WRITE | NEXT, 0));
        driver.offer(0, 0);
    });
    try_one("a loop of two", &|driver| {
        driver.descriptor(0, 3, (0x8000, 1, WRITE | NEXT, 4));
        driver.descriptor(0, 4, (0x8000, 1, WRITE | NEXT, 3));
        driver.offer(0, 3);
    });
    try_one("a head beyond the queue", &|driver| driver.offer(0, SIZE));
    try_one("the largest head", &|driver| driver.offer(0, u16::MAX));
    try_one("a next one beyond the queue", &|driver| {
        driver.descriptor(0, 0, (0x8000, 1, WRITE | NEXT, SIZE));
        driver.offer(0, 0);
    });
    try_one("more than 4 GiB", &|driver| {
        driver.descriptor(0, 0, (0x8000, u32::MAX, WRITE | NEXT, 1));
        driver.descriptor(0, 1, (0x8000, u32::MAX, WRITE, 0));
        driver.offer(0, 0);
    });
    try_one("a buffer to read after one to write to", &|driver| {
        driver.add(0, 0, &[(0x8000, 1, true), (0x8000, 1, false)]);
    });
    try_one("an index that is too far ahead", &|driver| driver.set_avail_index(0, SIZE + 1));
    for (what, table) in [
        ("an indirect table of no whole descriptors", (0x8000, 17)),
        ("an empty indirect table", (0x8000, 0)),
        ("an indirect table of 4 GiB", (0x8000, u32::MAX - 15)),
        ("an indirect table outside of RAM", (RAM, 32)),
        ("an indirect table at the end of all addresses", (u64::MAX - 15, 32)),
    ] {
        try_one(what, &|driver| {
            driver.descriptor(0, 0, (table.0, table.1, INDIRECT, 0));
            driver.offer(0, 0);
        });
    }
    try_one("more descriptors than there may be", &|driver| {
        for at in 0..2048 {
            let desc = (0x8000, 0, WRITE | NEXT, at + 1);
            write_descriptor(&driver.memory, 0x8_0000 + u64::from(at) * 16, desc);
        }
        driver.descriptor(0, 0, (0x8_0000, 2048 * 16, INDIRECT, 0));
        driver.offer(0, 0);
    });
}

#[test]
fn a_source_that_has_nothing_yet_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fifo");
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: the name is a valid string.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let rng = Rng::open(&path).unwrap();
    let mut writer = OpenOptions::new().write(true).open(&path).unwrap();
    let mut driver = Driver::ready(Box::new(rng), 1);
    driver.add(0, 0, &[(0x8000, 16, true)]);
    driver.kick(0);
    std::thread::sleep(std::time::Duration::from_millis(2));
    assert_eq!(driver.used(0), 0);
    writer.write_all(b"0123456789").unwrap();
    eventually("the bytes", || driver.used(0) == 1);
    assert_eq!(driver.used_entry(0, 0), (0, 10));
    assert_eq!(bytes_at(&driver, 0x8000, 11), b"0123456789\0");
    // It goes away.
    driver.add(0, 1, &[(0x8000, 16, true)]);
    drop(writer);
    driver.kick(0);
    eventually("a wish to be reset", || driver.needs_reset());
}

#[test]
fn a_source_that_is_none_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "the same bytes").unwrap();
    for (path, named) in [
        (file, "neither a character device nor a FIFO"),
        (dir.path().to_owned(), "neither"),
        (dir.path().join("absent"), "absent"),
    ] {
        let error = crate::words::with_causes(&Rng::open(&path).unwrap_err());
        assert!(error.contains(named), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Whatever is in the rings: the device goes on or asks for a reset, and after a reset it works.
    #[test]
    fn any_rings_are_survived(
        junk in prop::collection::vec((0_u64..0x3000, any::<u64>()), 0..64),
        descriptors in prop::collection::vec(
            (
                prop_oneof![0..RAM, RAM - 64..RAM + 64, any::<u64>()],
                prop_oneof![Just(0_u32), 1..64_u32, Just(u32::MAX), any::<u32>()],
                0_u16..8,
                0..SIZE + 1,
            ),
            0..usize::from(SIZE),
        ),
        heads in prop::collection::vec(0..SIZE + 1, 0..40),
        index in prop::option::of(any::<u16>()),
    ) {
        let mut driver = driver();
        for (at, value) in junk {
            driver.memory.write_obj(value, GuestAddress(rings(0) + at)).unwrap();
        }
        for (at, desc) in (0..).zip(descriptors) {
            driver.descriptor(0, at, desc);
        }
        for head in heads {
            driver.offer(0, head);
        }
        if let Some(index) = index {
            driver.set_avail_index(0, index);
        }
        driver.kick(0);
        driver.set_up(1);
        driver.add(0, 0, &[(0x8000, 16, true)]);
        driver.wait_used(0, 1);
        prop_assert!(!driver.needs_reset());
        prop_assert_eq!(driver.used_entry(0, 0), (0, 16));
    }
}
