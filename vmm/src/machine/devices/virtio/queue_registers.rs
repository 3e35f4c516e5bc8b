//! What a driver sets up of one queue, and the checks before it is a queue.

use thiserror::Error;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory, Permissions};

use super::queue::MAX_QUEUE_SIZE;
use crate::machine::memory::DeviceMemory;

/// Length of a descriptor in bytes (virtio 1.2, 2.7.5).
const DESCRIPTOR: u64 = 16;
/// Length of the available ring without its entries, and of each of them (2.7.6).
const AVAIL: (u64, u64) = (6, 2);
/// The same of the used ring (2.7.8).
const USED: (u64, u64) = (6, 8);

/// Why a queue cannot be used.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub(super) enum NotReady {
    #[error("it has {size} entries; expected a power of two from 1 to {max}")]
    Size { size: u32, max: u16 },
    #[error("its {part} at {addr:#x} is not aligned, or not in RAM that is good")]
    Place { part: &'static str, addr: u64 },
}

/// The registers of one queue.
#[derive(Debug)]
pub(super) struct QueueRegisters {
    max: u16,
    size: u32,
    descriptors: u64,
    avail: u64,
    used: u64,
    /// The queue as it was when it became ready.
    ready: Option<Setup>,
}

/// A queue that has passed the checks.
#[derive(Clone, Copy, Debug)]
struct Setup {
    size: u16,
    descriptors: GuestAddress,
    avail: GuestAddress,
    used: GuestAddress,
}

impl QueueRegisters {
    /// A queue of at most `max` entries, as far as that is possible.
    pub(super) fn new(max: u16) -> Self {
        let max = max.clamp(1, MAX_QUEUE_SIZE);
        // The next lower power of two, if it is none.
        let max = 1 << max.ilog2();
        Self { max, size: max.into(), descriptors: 0, avail: 0, used: 0, ready: None }
    }

    pub(super) fn reset(&mut self) {
        *self = Self::new(self.max);
    }

    pub(super) fn max(&self) -> u16 {
        self.max
    }

    pub(super) fn is_ready(&self) -> bool {
        self.ready.is_some()
    }

    pub(super) fn unready(&mut self) {
        self.ready = None;
    }

    pub(super) fn set_size(&mut self, value: u32) {
        self.size = value;
    }

    pub(super) fn set_descriptors(&mut self, value: u32, shift: u32) {
        put(&mut self.descriptors, value, shift);
    }

    pub(super) fn set_avail(&mut self, value: u32, shift: u32) {
        put(&mut self.avail, value, shift);
    }

    pub(super) fn set_used(&mut self, value: u32, shift: u32) {
        put(&mut self.used, value, shift);
    }

    /// Checks what is set up. Later writes to these registers do not change the queue until it is made ready again.
    pub(super) fn make_ready(&mut self, memory: &DeviceMemory) -> Result<(), NotReady> {
        let wrong = NotReady::Size { size: self.size, max: self.max };
        let size = u16::try_from(self.size).map_err(|_| wrong)?;
        if !size.is_power_of_two() || size > self.max {
            return Err(wrong);
        }
        let entries = u64::from(size);
        let place = |part, addr: u64, align: u64, len: u64, access| {
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            let inside = addr.is_multiple_of(align)
                && addr.checked_add(len as u64).is_some()
                && memory.check_range(GuestAddress(addr), len, access);
            if inside { Ok(GuestAddress(addr)) } else { Err(NotReady::Place { part, addr }) }
        };
        let (descriptors, avail, used) =
            (DESCRIPTOR * entries, AVAIL.0 + AVAIL.1 * entries, USED.0 + USED.1 * entries);
        self.ready = Some(Setup {
            size,
            descriptors: place(
                "descriptor table",
                self.descriptors,
                16,
                descriptors,
                Permissions::Read,
            )?,
            avail: place("available ring", self.avail, 2, avail, Permissions::Read)?,
            used: place("used ring", self.used, 4, used, Permissions::Write)?,
        });
        Ok(())
    }

    /// The queue, if it is ready.
    pub(super) fn queue(&self, event_idx: bool) -> Option<Queue> {
        let setup = self.ready?;
        let mut queue = Queue::new(self.max).ok()?;
        // They have been checked, and none of these can fail any more.
        queue.try_set_size(setup.size).ok()?;
        queue.try_set_desc_table_address(setup.descriptors).ok()?;
        queue.try_set_avail_ring_address(setup.avail).ok()?;
        queue.try_set_used_ring_address(setup.used).ok()?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Some(queue)
    }
}

/// Replaces the 32 bits from `shift` on.
fn put(word: &mut u64, value: u32, shift: u32) {
    let keep = u64::from(u32::MAX) << (32 - shift);
    *word = *word & keep | u64::from(value) << shift;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> DeviceMemory {
        crate::machine::devices::virtio::testing::memory(&[(0, 0x10000), (0x20000, 0x1000)])
    }

    fn registers(size: u32, descriptors: u64, avail: u64, used: u64) -> QueueRegisters {
        QueueRegisters { size, descriptors, avail, used, ..QueueRegisters::new(256) }
    }

    #[test]
    fn a_queue_has_to_fit_into_ram() {
        let place = |part, addr| Err(NotReady::Place { part, addr });
        let (table, avail, used) = ("descriptor table", "available ring", "used ring");
        for (size, places, expected) in [
            (16, (0x1000, 0x2000, 0x3000), Ok(())),
            (256, (0xf000, 0x2000, 0x3000), Ok(())),
            (256, (0xf010, 0x2000, 0x3000), place(table, 0xf010)),
            (16, (0x1008, 0x2000, 0x3000), place(table, 0x1008)),
            (16, (0x1000, 0x2001, 0x3000), place(avail, 0x2001)),
            (16, (0x1000, 0x2000, 0x3002), place(used, 0x3002)),
            (1, (0xfff0, 0xfff8, 0x20ff0), Ok(())),
            (1, (0xfff0, 0xfffa, 0x20ff0), place(avail, 0xfffa)),
            (1, (0xfff0, 0xfff8, 0x20ff4), place(used, 0x20ff4)),
            (16, (0x10000, 0x2000, 0x3000), place(table, 0x10000)),
            (16, (u64::MAX << 4, 0x2000, 0x3000), place(table, u64::MAX << 4)),
            (16, (0x1000, u64::MAX - 1, 0x3000), place(avail, u64::MAX - 1)),
            (16, (0x1000, 0x2000, u64::MAX - 3), place(used, u64::MAX - 3)),
        ] {
            let mut queue = registers(size, places.0, places.1, places.2);
            assert_eq!(queue.make_ready(&memory()), expected, "{size} {places:x?}");
            assert_eq!(queue.queue(true).is_some(), expected.is_ok());
        }
        for size in [0, 3, 257, 512, 65536, u32::MAX] {
            let mut queue = registers(size, 0x1000, 0x2000, 0x3000);
            assert_eq!(queue.make_ready(&memory()), Err(NotReady::Size { size, max: 256 }));
        }
    }

    #[test]
    fn halves_of_an_address_are_set_in_any_order() {
        let mut word = 0;
        put(&mut word, 0x1111_2222, 32);
        put(&mut word, 0x3333_4444, 0);
        assert_eq!(word, 0x1111_2222_3333_4444);
        put(&mut word, u32::MAX, 32);
        assert_eq!(word, 0xffff_ffff_3333_4444);
        put(&mut word, 0, 0);
        assert_eq!(word, 0xffff_ffff_0000_0000);
    }

    #[test]
    fn a_device_that_asks_for_too_much_gets_what_there_is() {
        for (asked, max) in [(0, 1), (1, 1), (100, 64), (256, 256), (u16::MAX, 256)] {
            assert_eq!(QueueRegisters::new(asked).max(), max);
        }
    }
}
