#![allow(clippy::cast_possible_truncation, reason = "the numbers are small")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use proptest::prelude::{Just, ProptestConfig, any, prop, prop_assert, prop_oneof, proptest};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::config::SerialMode;
use crate::machine::devices::virtio::testing::{Driver, RAM, SIZE, eventually};
use crate::sandbox::seccomp::Filters;

mod hostile;

fn line(mode: &SerialMode) -> Arc<SerialLine> {
    Arc::new(SerialLine::open_console(mode, &Filters::default()).unwrap().unwrap())
}

fn driver(line: Option<&Arc<SerialLine>>) -> Driver {
    let control = VmControl::new(0).unwrap();
    Driver::ready(Box::new(Console::new(line, &control).unwrap()), 2)
}

struct Socket {
    _dir: tempfile::TempDir,
    path: PathBuf,
    line: Arc<SerialLine>,
}

impl Socket {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let line = line(&SerialMode::Socket(path.clone()));
        Self { _dir: dir, path, line }
    }

    fn client(&self) -> UnixStream {
        let client = UnixStream::connect(&self.path).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        client
    }
}

fn print(driver: &mut Driver, text: &[u8]) {
    driver.memory.write_slice(text, GuestAddress(0x8000)).unwrap();
    let before = driver.used(TRANSMIT);
    driver.add(TRANSMIT, 0, &[(0x8000, text.len() as u32, false)]);
    driver.wait_used(TRANSMIT, before + 1);
}

/// What comes in a buffer of `room` bytes.
fn receive(driver: &mut Driver, room: u32) -> Vec<u8> {
    let nth = driver.used(RECEIVE);
    driver.add(RECEIVE, 0, &[(0xc000, room, true)]);
    driver.wait_used(RECEIVE, nth + 1);
    let (_, len) = driver.used_entry(RECEIVE, nth);
    let mut text = vec![0; len as usize];
    driver.memory.read_slice(&mut text, GuestAddress(0xc000)).unwrap();
    text
}

#[test]
fn output_arrives_in_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out");
    let line = line(&SerialMode::File(path.clone().into()));
    let mut driver = driver(Some(&line));
    print(&mut driver, b"one\n");
    driver.memory.write_slice(b"two\nthree\n", GuestAddress(0x9000)).unwrap();
    driver.add(TRANSMIT, 4, &[(0x9000, 4, false), (0x9004, 6, false)]);
    driver.wait_used(TRANSMIT, 2);
    drop((driver, line));
    assert_eq!(std::fs::read(path).unwrap(), b"one\ntwo\nthree\n");
}

#[test]
fn a_client_stays_while_the_driver_and_the_guest_change() {
    let socket = Socket::new();
    let mut client = socket.client();
    for boot in 0..2 {
        let mut driver = driver(Some(&socket.line));
        for round in 0..3 {
            client.write_all(b"in").unwrap();
            assert_eq!(receive(&mut driver, 100), b"in", "{boot} {round}");
            print(&mut driver, b"out");
            let mut out = [0; 3];
            client.read_exact(&mut out).unwrap();
            assert_eq!(&out, b"out");
            driver.set_up(2);
        }
    }
}

#[test]
fn long_input_comes_whole_into_small_buffers() {
    let socket = Socket::new();
    let mut client = socket.client();
    let text: Vec<u8> = (0..20_000_u32).map(|at| (at % 251) as u8).collect();
    let mut driver = driver(Some(&socket.line));
    let sent = text.clone();
    let writer = std::thread::spawn(move || client.write_all(&sent).map(|()| client));
    let mut got = Vec::new();
    while got.len() < text.len() {
        got.extend(receive(&mut driver, 100));
    }
    assert_eq!(got, text);
    drop(writer.join().unwrap().unwrap());
}

#[test]
fn input_without_a_driver_waits_for_one() {
    let socket = Socket::new();
    let mut client = socket.client();
    let control = VmControl::new(0).unwrap();
    let mut driver = Driver::new(Box::new(Console::new(Some(&socket.line), &control).unwrap()));
    client.write_all(b"early").unwrap();
    std::thread::sleep(Duration::from_millis(5));
    driver.set_up(2);
    assert_eq!(receive(&mut driver, 100), b"early");
}

#[test]
fn the_null_console_takes_everything() {
    let mut driver = driver(None);
    print(&mut driver, b"into the dark");
    driver.add(RECEIVE, 0, &[(0xc000, 1, true)]);
    driver.kick(RECEIVE as u32);
    print(&mut driver, b"and again");
    assert_eq!(driver.used(RECEIVE), 0);
}

#[test]
fn requests_that_cannot_be_read_or_written_fail_alone() {
    let socket = Socket::new();
    let mut client = socket.client();
    let mut driver = driver(Some(&socket.line));
    for (nth, buffer) in
        [(RAM, 8, false), (RAM - 4, 8, false), (u64::MAX - 3, 8, false), (0x8000, 0, false)]
            .into_iter()
            .enumerate()
    {
        driver.add(TRANSMIT, nth as u16, &[buffer]);
        driver.wait_used(TRANSMIT, nth as u16 + 1);
    }
    // A good buffer before a bad one: none of it comes out.
    driver.memory.write_slice(b"half", GuestAddress(0x8000)).unwrap();
    driver.add(TRANSMIT, 5, &[(0x8000, 4, false), (RAM, 4, false)]);
    driver.wait_used(TRANSMIT, 5);
    print(&mut driver, b"good");
    let mut out = [0; 4];
    client.read_exact(&mut out).unwrap();
    assert_eq!(&out, b"good");

    client.write_all(b"in").unwrap();
    driver.add(RECEIVE, 1, &[(RAM, 16, true)]);
    driver.wait_used(RECEIVE, 1);
    assert_eq!(driver.used_entry(RECEIVE, 0), (1, 0));
    assert_eq!(receive(&mut driver, 16), b"in", "it was not lost");
    assert!(!driver.needs_reset());
}

#[test]
fn a_request_of_4_gib_takes_no_4_gib() {
    let socket = Socket::new();
    let mut driver = driver(Some(&socket.line));
    let buffers: Vec<_> = (0..SIZE).map(|_| (0, RAM as u32, false)).collect();
    driver.add(TRANSMIT, 0, &buffers);
    driver.wait_used(TRANSMIT, 1);
    // More than the RAM that is there.
    driver.add(TRANSMIT, 0, &[(0, u32::MAX, false)]);
    driver.wait_used(TRANSMIT, 2);
    assert!(!driver.needs_reset());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    /// Whatever requests there are: the device goes on or asks for a reset, and works after one.
    #[test]
    fn any_requests_are_survived(
        descriptors in prop::collection::vec(
            (
                0_usize..2,
                prop_oneof![0..RAM, RAM - 64..RAM + 64, any::<u64>()],
                prop_oneof![Just(0_u32), 1..64_u32, Just(u32::MAX), any::<u32>()],
                0_u16..8,
                0..SIZE + 1,
            ),
            0..32,
        ),
        heads in prop::collection::vec((0_usize..2, 0..SIZE + 1), 0..30),
        input in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let socket = Socket::new();
        let mut client = socket.client();
        let mut driver = driver(Some(&socket.line));
        for (at, (queue, addr, len, flags, next)) in (0_u16..).zip(descriptors) {
            driver.descriptor(queue, at % SIZE, (addr, len, flags, next));
        }
        for (queue, head) in heads {
            driver.offer(queue, head);
        }
        client.write_all(&input).unwrap();
        driver.kick(0);
        driver.kick(1);
        driver.set_up(2);
        print(&mut driver, b"x");
        prop_assert!(!driver.needs_reset());
        eventually("a quiet device", || driver.used(TRANSMIT) == 1);
    }
}
