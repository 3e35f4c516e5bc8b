//! Pages that go bad: what touches one is dropped, whole, and nothing else is.

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_INDIRECT_DESC, VRING_DESC_F_INDIRECT};

use super::*;
use crate::machine::devices::virtio::testing::lose;

/// Where three pages begin of which the middle one goes bad.
const PAGES: u64 = 0x8_0000;
const BAD: u64 = PAGES + 0x1000;

#[test]
fn of_a_frame_from_a_bad_page_nothing_reaches_the_wire() {
    // The frame's middle, its end, and its header.
    for (before, len) in [(0x800, 0x1800), (0x800, 0x802), (0, 0x100)] {
        let mut setup = Setup::new();
        // Of the header there are the first six bytes before the bad page, if anything is.
        let start = if before == 0 { BAD - 6 } else { BAD - before };
        setup.put(start, &[0; HEADER]);
        setup.put(start + HEADER as u64, &frame(len, 1));
        if !lose(&setup.driver.memory, BAD) {
            return;
        }
        // When nobody knows of the page, and when it is known.
        for times in 1..3 {
            setup.send(0, &[(start, (HEADER + len) as u32)]);
            assert_eq!(counted(&setup.drops.bad_memory), times);
        }
        setup.put(0xa000, &[0; HEADER]);
        setup.send(0, &[(0xa000, HEADER as u32), (BAD, 64)]);
        assert_eq!(counted(&setup.drops.bad_memory), 3);
        setup.nothing_arrived();
        assert!(!setup.driver.needs_reset());
    }
}

#[test]
fn a_frame_for_a_bad_page_goes_into_the_next_buffer_whole() {
    let mut setup = Setup::new();
    let bytes = frame(3000, 2);
    if !lose(&setup.driver.memory, BAD) {
        return;
    }
    setup.driver.add(RECEIVE, 0, &[(BAD - 0x800, 4000, true)]);
    setup.driver.add(RECEIVE, 1, &[(BAD - 0x800, 0x800, true), (BAD + 0x20, 4000, true)]);
    setup.driver.add(RECEIVE, 3, &[(0xa000, 4000, true)]);
    setup.host.send(&bytes).unwrap();
    setup.driver.wait_used(RECEIVE, 3);
    for (nth, entry) in [(0, 0), (1, 0), (3, 3012)].into_iter().enumerate() {
        assert_eq!(setup.driver.used_entry(RECEIVE, nth as u16), entry);
    }
    assert_eq!(setup.get(0xa000 + HEADER as u64, 3000), bytes);
    assert!(setup.drops.is_empty() && !setup.driver.needs_reset());
}

#[test]
fn bad_rings_ask_for_a_reset() {
    const INDIRECT: u64 = 0x7_0000;
    for queue in [RECEIVE, TRANSMIT] {
        let rings = rings(queue);
        for lost in [rings, rings + 0x1000, rings + 0x2000, INDIRECT] {
            let mut setup = Setup::new();
            let driver = &mut setup.driver;
            driver.begin(1 << VIRTIO_RING_F_INDIRECT_DESC);
            (0..2).for_each(|index| driver.set_up_queue(index));
            driver.add_status(4);
            let buffer = match lost {
                INDIRECT => (INDIRECT, 32, VRING_DESC_F_INDIRECT as u16, 0),
                _ => (0x8000, 200, if queue == RECEIVE { 2 } else { 0 }, 0),
            };
            driver.descriptor(queue, 0, buffer);
            if !lose(&driver.memory, lost) {
                return;
            }
            setup.host.send(&frame(100, 3)).unwrap();
            if lost != rings + 0x1000 {
                setup.driver.offer(queue, 0);
            }
            setup.driver.kick(queue as u32);
            eventually("a wish to be reset", || setup.driver.needs_reset());
        }
    }
}
