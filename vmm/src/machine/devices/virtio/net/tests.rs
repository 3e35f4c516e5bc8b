#![allow(clippy::cast_possible_truncation, reason = "the numbers are small")]

use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::{
    Just, ProptestConfig, any, prop, prop_assert, prop_assert_eq, prop_oneof, proptest,
};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_TCPV4,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::layout::*;
use super::*;
use crate::config::{NetConfig, TapSource};
use crate::machine::devices::virtio::device::{Active, Device, Turn, Wait};
use crate::machine::devices::virtio::interrupt::Interrupt;
use crate::machine::devices::virtio::queue::ActiveQueue;
use crate::machine::devices::virtio::testing::{Driver, RAM, SIZE, eventually, ram, rings};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

fn config() -> NetConfig {
    NetConfig { tap: TapSource::Fd(-1), mac: MAC, mtu: None, vhost: false }
}

/// A device with a socket in the place of its tap, and the host's end of that.
fn device(mtu: Option<u16>) -> (Net, UnixDatagram) {
    let (ours, host) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    host.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    (Net::new(Tap::of_socket(ours.into(), mtu), &config()), host)
}

struct Setup {
    driver: Driver,
    host: UnixDatagram,
    drops: Arc<Drops>,
}

impl Setup {
    fn new() -> Self {
        let (net, host) = device(None);
        let drops = net.drops();
        Self { driver: Driver::ready(Box::new(net), 2), host, drops }
    }

    /// Has the guest send what is in `buffers`, and waits for the used entry.
    fn send(&mut self, head: u16, buffers: &[(u64, u32)]) {
        let buffers: Vec<_> = buffers.iter().map(|(addr, len)| (*addr, *len, false)).collect();
        let before = self.driver.used(TRANSMIT);
        self.driver.add(TRANSMIT, head, &buffers);
        self.driver.wait_used(TRANSMIT, before.wrapping_add(1));
        assert_eq!(self.driver.used_entry(TRANSMIT, before), (head.into(), 0));
    }

    fn put(&self, addr: u64, bytes: &[u8]) {
        self.driver.memory.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    fn get(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.driver.memory.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    fn arrived(&self) -> Vec<u8> {
        let mut bytes = vec![0; MOST_FRAME + 1];
        let len = self.host.recv(&mut bytes).unwrap();
        bytes.truncate(len);
        bytes
    }

    /// Sees that nothing has arrived but what is sent now.
    fn nothing_arrived(&mut self) {
        let last = frame(LEAST_FRAME, 0xee);
        self.put(0x8000, &[&[0; HEADER][..], &last].concat());
        self.send(15, &[(0x8000, (HEADER + LEAST_FRAME) as u32)]);
        assert_eq!(self.arrived(), last);
    }
}

fn frame(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

fn counted(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[test]
fn a_frame_goes_out_whole_and_without_the_header() {
    let mut setup = Setup::new();
    let bytes = frame(1500, 1);
    setup.put(0x8000, &[0; HEADER]);
    setup.put(0x9000, &bytes[..100]);
    setup.put(0xa000, &bytes[100..]);
    setup.send(3, &[(0x8000, HEADER as u32), (0x9000, 100), (0xb000, 0), (0xa000, 1400)]);
    assert_eq!(setup.arrived(), bytes);
    // The header and the frame in one buffer, and a header across two.
    setup.put(0x8000, &[&[0; HEADER][..], &bytes].concat());
    setup.send(0, &[(0x8000, (HEADER + 1500) as u32)]);
    assert_eq!(setup.arrived(), bytes);
    setup.send(0, &[(0x8000, 5), (0x8005, (HEADER + 1500 - 5) as u32)]);
    assert_eq!(setup.arrived(), bytes);
    assert!(setup.drops.is_empty());
}

#[test]
fn a_frame_comes_in_whole_behind_a_header() {
    let mut setup = Setup::new();
    let bytes = frame(1514, 2);
    // It waits until there is a buffer.
    setup.host.send(&bytes).unwrap();
    setup.driver.add(RECEIVE, 0, &[(0x8000, 12, true), (0x9000, 600, true), (0xa000, 1000, true)]);
    setup.driver.wait_used(RECEIVE, 1);
    assert_eq!(setup.driver.used_entry(RECEIVE, 0), (0, 1526));
    assert_eq!(setup.get(0x8000, 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(setup.get(0x9000, 600), bytes[..600]);
    assert_eq!(setup.get(0xa000, 915), [&bytes[600..], &[0][..]].concat());
    // And the buffer waits for one, without a kick.
    setup.driver.add(RECEIVE, 3, &[(0x8000, 2000, true)]);
    setup.driver.kick(RECEIVE as u32);
    setup.host.send(&bytes[..60]).unwrap();
    eventually("a frame", || setup.driver.used(RECEIVE) == 2);
    assert_eq!(setup.driver.used_entry(RECEIVE, 1), (3, 72));
    assert!(setup.driver.take_interrupt().is_some());
    assert!(setup.drops.is_empty());
}

#[test]
fn a_frame_in_memory_that_is_not_there_is_dropped_and_the_next_one_is_not() {
    let mut setup = Setup::new();
    setup.put(0x8000, &[0; 4096]);
    for (nth, bad) in [(RAM, 100), (RAM - 16, 32), (u64::MAX - 15, 100)].into_iter().enumerate() {
        setup.send(0, &[(0x8000, HEADER as u32), (0x9000, 40), bad]);
        assert_eq!(counted(&setup.drops.bad_memory), nth as u64 + 1);
    }
    setup.send(0, &[(RAM, HEADER as u32), (0x9000, 40)]);
    assert_eq!(counted(&setup.drops.bad_memory), 4);
    setup.nothing_arrived();
    assert!(!setup.driver.needs_reset(), "a buffer is the request's own matter");
}

#[test]
fn a_frame_for_memory_that_is_not_there_goes_into_the_next_buffer() {
    let mut setup = Setup::new();
    let bytes = frame(64, 3);
    setup.driver.add(RECEIVE, 0, &[(0x8000, 20, true), (RAM, 2000, true)]);
    setup.driver.add(RECEIVE, 2, &[(RAM - 16, 2000, true)]);
    setup.driver.add(RECEIVE, 3, &[(0xa000, 2000, true)]);
    setup.host.send(&bytes).unwrap();
    setup.driver.wait_used(RECEIVE, 3);
    // Less than a header is no frame.
    assert_eq!(setup.driver.used_entry(RECEIVE, 0), (0, 0));
    assert_eq!(setup.driver.used_entry(RECEIVE, 1), (2, 0));
    assert_eq!(setup.driver.used_entry(RECEIVE, 2), (3, 76));
    assert_eq!(setup.get(0xa000 + HEADER as u64, 64), bytes);
    assert!(setup.drops.is_empty());
    // Not for ever.
    setup.host.send(&frame(64, 4)).unwrap();
    for head in 0..8 {
        setup.driver.add(RECEIVE, head, &[(RAM, 2000, true)]);
    }
    setup.driver.wait_used(RECEIVE, 11);
    assert_eq!(counted(&setup.drops.bad_memory), 1);
    setup.driver.add(RECEIVE, 0, &[(0xa000, 2000, true)]);
    setup.driver.kick(RECEIVE as u32);
    setup.host.send(&bytes).unwrap();
    eventually("the next frame", || setup.driver.used(RECEIVE) == 12);
    assert_eq!(setup.get(0xa000 + HEADER as u64, 64), bytes);
    assert!(!setup.driver.needs_reset());
}

#[test]
fn what_is_no_frame_is_dropped() {
    let mut setup = Setup::new();
    let most = (HEADER + MOST_FRAME) as u32;
    setup.put(0x8_0000, &frame(MOST_FRAME + 100, 5));
    setup.put(0x8_0000, &[0; HEADER]);
    let bad = [0, 1, HEADER as u32, (HEADER + LEAST_FRAME - 1) as u32, most + 1, u32::MAX];
    for (nth, len) in bad.into_iter().enumerate() {
        setup.send(0, &[(0x8_0000, len)]);
        assert_eq!(counted(&setup.drops.malformed), nth as u64 + 1, "{len}");
    }
    // Buffers to write to are none of a frame's.
    setup.driver.add(TRANSMIT, 0, &[(0x8_0000, 8000, true)]);
    setup.driver.wait_used(TRANSMIT, 7);
    assert_eq!(counted(&setup.drops.malformed), 7);
    for (at, value) in [
        (HEADER_FLAGS, VIRTIO_NET_HDR_F_NEEDS_CSUM as u8),
        (HEADER_GSO_TYPE, VIRTIO_NET_HDR_GSO_TCPV4 as u8),
    ] {
        let mut header = [0; HEADER];
        header[at] = value;
        setup.put(0x8_0000, &header);
        setup.send(0, &[(0x8_0000, 100)]);
    }
    assert_eq!(counted(&setup.drops.malformed), 9, "no offloads are offered");
    setup.nothing_arrived();
    setup.put(0x8_0000, &[0; HEADER]);
    setup.send(0, &[(0x8_0000, most)]);
    assert_eq!(setup.arrived().len(), MOST_FRAME);
    assert!(!setup.driver.needs_reset());
}

#[test]
fn a_frame_that_a_buffer_has_no_room_for_is_dropped() {
    let mut setup = Setup::new();
    setup.driver.add(RECEIVE, 0, &[(0x8000, 100, true)]);
    setup.driver.kick(RECEIVE as u32);
    setup.host.send(&frame(89, 6)).unwrap();
    setup.host.send(&frame(88, 7)).unwrap();
    eventually("the frame that fits", || setup.driver.used(RECEIVE) == 1);
    assert_eq!(setup.driver.used_entry(RECEIVE, 0), (0, 100));
    assert_eq!(setup.get(0x8000 + HEADER as u64, 88), frame(88, 7));
    assert_eq!(counted(&setup.drops.no_room), 1);
}

/// A socket takes ten datagrams or so.
#[test]
fn frames_wait_for_a_tap_that_takes_none_now() {
    let mut setup = Setup::new();
    for nth in 0..SIZE {
        let addr = 0x8000 + u64::from(nth) * 0x100;
        setup.put(addr, &[&[0; HEADER][..], &frame(64, nth as u8)].concat());
        setup.driver.add(TRANSMIT, nth, &[(addr, (HEADER + 64) as u32, false)]);
    }
    setup.driver.kick(TRANSMIT as u32);
    eventually("some frames", || setup.driver.used(TRANSMIT) > 0);
    for nth in 0..SIZE {
        assert_eq!(setup.arrived(), frame(64, nth as u8));
    }
    eventually("all used", || setup.driver.used(TRANSMIT) == SIZE);
    assert!(setup.drops.is_empty());
}

#[test]
fn a_tap_that_refuses_costs_the_frame_only() {
    let mut setup = Setup::new();
    let (_, other) = device(None);
    drop(std::mem::replace(&mut setup.host, other));
    setup.put(0x8000, &[0; 100]);
    setup.send(0, &[(0x8000, 100)]);
    assert_eq!(counted(&setup.drops.refused), 1);
    assert!(!setup.driver.needs_reset());
}

#[test]
fn it_works_again_after_a_reset_and_a_pause() {
    let mut setup = Setup::new();
    for round in 0..3 {
        // A frame that has left the tap and found no good buffer goes with the reset.
        setup.host.send(&frame(50, 8)).unwrap();
        setup.driver.add(RECEIVE, 0, &[(RAM, 2000, true)]);
        setup.driver.wait_used(RECEIVE, 1);
        setup.driver.set_up(2);
        setup.control_pauses();
        setup.host.send(&frame(60, round)).unwrap();
        setup.driver.add(RECEIVE, 0, &[(0x8000, 2000, true)]);
        setup.driver.wait_used(RECEIVE, 1);
        assert_eq!(setup.get(0x8000 + HEADER as u64, 60), frame(60, round));
        setup.nothing_arrived();
        setup.driver.set_up(2);
    }
}

impl Setup {
    /// While the VM is paused nothing comes in.
    fn control_pauses(&mut self) {
        self.driver.control.pause();
        self.driver.add(RECEIVE, 5, &[(0x8000, 2000, true)]);
        self.driver.kick(RECEIVE as u32);
        self.host.send(&frame(70, 9)).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert_eq!(self.driver.used(RECEIVE), 0);
        self.driver.control.resume();
        eventually("the frame", || self.driver.used(RECEIVE) == 1);
        self.driver.set_up(2);
    }
}

#[test]
fn the_driver_reads_its_address_its_link_and_its_mtu() {
    let read = |net: Net| {
        let features = net.features();
        let driver = Driver::ready(Box::new(net), 2);
        let mut bytes = [0xaa; 16];
        driver.window.read(VIRTIO_MMIO_CONFIG.into(), &mut bytes);
        (features, bytes)
    };
    let base = 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS;
    let (features, bytes) = read(device(None).0);
    assert_eq!(features, base);
    assert_eq!(bytes, [2, 0, 0, 0, 0, 7, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let (features, bytes) = read(device(Some(9000)).0);
    assert_eq!(features, base | 1 << VIRTIO_NET_F_MTU);
    assert_eq!(bytes[10..12], 9000_u16.to_le_bytes());
    let (ours, _) = UnixDatagram::pair().unwrap();
    let config = NetConfig { mtu: Some(1400), ..config() };
    let (_, bytes) = read(Net::new(Tap::of_socket(ours.into(), Some(9000)), &config));
    assert_eq!(bytes[10..12], 1400_u16.to_le_bytes(), "what was asked for");
}

/// Without a buffer of the guest's nothing is waited for but kicks: frames that nobody takes cost nothing.
#[test]
fn a_guest_without_buffers_costs_no_time() {
    let (mut net, host) = device(None);
    let memory = ram();
    let eventfd = || Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_desc_table_address(Some(rings(0) as u32), Some(0));
    queue.set_avail_ring_address(Some(rings(0) as u32 + 0x1000), Some(0));
    queue.set_used_ring_address(Some(rings(0) as u32 + 0x2000), Some(0));
    queue.set_ready(true);
    let queue = Some(ActiveQueue::new(queue, eventfd()));
    let interrupt = Arc::new(Interrupt::new(eventfd()));
    let mut active = Active { memory, features: 0, interrupt, queues: vec![queue, None] };
    host.send(&frame(64, 1)).unwrap();
    let waits = |net: &Net| {
        let mut waits: Vec<Wait> = Vec::new();
        net.waits_for(&mut waits);
        waits.len()
    };
    assert_eq!(net.kicked(RECEIVE, &mut active).unwrap(), Turn::Done);
    assert_eq!(waits(&net), 0);
    // One buffer: the frame that is there, and then none again.
    let put = |at: u64, value: u64| {
        active.memory.write_obj(value, GuestAddress(at)).unwrap();
    };
    put(rings(0), 0x8000);
    put(rings(0) + 8, 2000 | 2 << 32);
    put(rings(0) + 0x1000, 1 << 16);
    assert_eq!(net.kicked(RECEIVE, &mut active).unwrap(), Turn::Done);
    let used: u16 = active.memory.read_obj(GuestAddress(rings(0) + 0x2002)).unwrap();
    assert_eq!((used, waits(&net)), (1, 0));
    // Two: the second one waits for a frame.
    active.memory.write_obj(2 << 16_u64, GuestAddress(rings(0) + 0x1000)).unwrap();
    assert_eq!(net.kicked(RECEIVE, &mut active).unwrap(), Turn::Done);
    assert_eq!(waits(&net), 1);
    net.stop();
    assert_eq!(waits(&net), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Whatever is in the rings: the device goes on or asks for a reset, and after a reset it works both ways.
    #[test]
    fn any_rings_are_survived(
        junk in prop::collection::vec((0_usize..2, 0_u64..0x3000, any::<u64>()), 0..64),
        descriptors in prop::collection::vec(
            (
                0_usize..2,
                0..SIZE,
                prop_oneof![0..RAM, RAM - 64..RAM + 64, any::<u64>()],
                prop_oneof![Just(0_u32), 1..2000_u32, Just(u32::MAX), any::<u32>()],
                0_u16..8,
                0..SIZE + 1,
            ),
            0..usize::from(SIZE) * 2,
        ),
        heads in prop::collection::vec((0_usize..2, 0..SIZE + 1), 0..40),
        frames in prop::collection::vec(1_usize..3000, 0..8),
    ) {
        let Setup { mut driver, host, drops } = Setup::new();
        for (queue, at, value) in junk {
            driver.memory.write_obj(value, GuestAddress(rings(queue) + at)).unwrap();
        }
        for (queue, at, addr, len, flags, next) in descriptors {
            driver.descriptor(queue, at, (addr, len, flags, next));
        }
        host.set_nonblocking(true).unwrap();
        for len in frames {
            let _ = host.send(&frame(len, 1));
        }
        for (queue, head) in heads {
            driver.offer(queue, head);
            driver.kick(queue as u32);
        }
        driver.set_up(2);
        let mut setup = Setup { driver, host, drops };
        // Frames of before, in either direction.
        let mut bytes = vec![0; MOST_FRAME];
        while setup.host.recv(&mut bytes).is_ok() {}
        setup.host.set_nonblocking(false).unwrap();
        setup.nothing_arrived();
        let _ = setup.host.send(&frame(100, 3));
        setup.driver.add(RECEIVE, 0, &[(0x8000, 4000, true)]);
        setup.driver.wait_used(RECEIVE, 1);
        let (head, len) = setup.driver.used_entry(RECEIVE, 0);
        prop_assert_eq!(head, 0);
        prop_assert!(len > HEADER as u32);
        prop_assert!(!setup.driver.needs_reset());
    }
}

mod bad_pages;
mod on_a_tap;
