//! A driver for tests: it sets a device up by its registers and fills its rings, as a guest does.
#![allow(clippy::cast_possible_truncation, reason = "the numbers are small")]

use std::fs::File;
use std::os::fd::FromRawFd;
use std::time::{Duration, Instant};

use mce_relay::guard::GuardedRegion;
use mce_relay::internals::uffd::Uffd;
use mce_relay::signal::{Signals, set_up};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK,
    VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY,
    VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL,
    VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_STATUS,
};
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, MmapRegion};

use super::bus::Window;
use super::device::Device;
use crate::machine::lifecycle::VmControl;
use crate::machine::memory::DeviceMemory;
use crate::sandbox::seccomp::{Filters, Mode};

/// Guest RAM of the tests, in bytes.
pub(crate) const RAM: u64 = 1 << 20;
/// Where the rings of queue 0 lie; those of the others follow.
const RINGS: u64 = 0x1_0000;
/// Room for the rings of one queue.
const ROOM: u64 = 0x4000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Entries of each queue.
pub(crate) const SIZE: u16 = 16;

/// A buffer in a request: address, length, and whether the device writes to it.
pub(crate) type Buffer = (u64, u32, bool);

pub(crate) fn ram() -> DeviceMemory {
    memory(&[(0, RAM)])
}

/// Shared memory at these addresses and of these lengths, as devices use it.
pub(crate) fn memory(ranges: &[(u64, u64)]) -> DeviceMemory {
    let region = |(start, len): &(u64, u64)| {
        // SAFETY: takes a string; the descriptor is checked by the next call, and owned by nobody else.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"ram".as_ptr(), 0)) };
        file.set_len(*len).unwrap();
        let mapping = MmapRegion::from_file(FileOffset::new(file, 0), *len as usize).unwrap();
        let region = GuardedRegion::new(mapping, GuestAddress(*start)).unwrap();
        assert!(region.has_view());
        region
    };
    DeviceMemory::from_regions(ranges.iter().map(region).collect()).unwrap()
}

/// The page at guest-physical `at` is lost, to the guest and to devices. False, after a word, where that cannot be done.
pub(crate) fn lose(memory: &DeviceMemory, at: u64) -> bool {
    set_up(Signals::Install).unwrap();
    let marker = match Uffd::open() {
        Ok(marker) => marker,
        Err(error) => {
            println!("SKIPPED: needs UFFDIO_POISON (Linux 6.6): {error}");
            return false;
        }
    };
    let devices = memory.get_slice(GuestAddress(at), 1).unwrap().ptr_guard().as_ptr();
    let guests = memory.get_host_address(GuestAddress(at)).unwrap();
    for hva in [devices, guests.cast_const()] {
        marker.poison(hva.expose_provenance() as u64, 4096).unwrap();
    }
    true
}

/// Waits for a condition.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < end, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A VMM has one arena for all threads. Where there are more, as in tests, glibc opens a file before it gives memory of
/// theirs back, which the filters of devices' threads do not have.
fn keep_what_is_freed() {
    // SAFETY: it changes a setting of the allocator only.
    #[cfg(target_env = "gnu")]
    let _ = unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 30) };
}

/// A driver and its device.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) window: Window,
    pub(crate) memory: DeviceMemory,
    pub(crate) control: VmControl,
    /// Requests that were added to each queue.
    added: [u16; 8],
}

impl Driver {
    /// A device that was not touched yet, with its thread under its filter.
    pub(crate) fn new(device: Box<dyn Device>) -> Self {
        Self::with_memory(device, ram())
    }

    /// The same, for a device that knows its guest's memory already.
    pub(crate) fn with_memory(device: Box<dyn Device>, memory: DeviceMemory) -> Self {
        keep_what_is_freed();
        let control = VmControl::new(0).unwrap();
        let filters = Filters::new(Mode::On).unwrap();
        let window = Window::new(device, 0, &memory, &control, &filters).unwrap();
        Self { window, memory, control, added: [0; 8] }
    }

    /// One that is set up, with queues 0 to `queues`.
    pub(crate) fn ready(device: Box<dyn Device>, queues: u32) -> Self {
        let mut driver = Self::new(device);
        driver.set_up(queues);
        driver
    }

    pub(crate) fn set_up(&mut self, queues: u32) {
        self.begin(0);
        (0..queues).for_each(|index| self.set_up_queue(index));
        self.add_status(VIRTIO_CONFIG_S_DRIVER_OK);
    }

    /// Up to the features: those given, and version 1.
    pub(crate) fn begin(&mut self, features: u32) {
        self.added = [0; 8];
        self.write(VIRTIO_MMIO_STATUS, 0);
        self.add_status(VIRTIO_CONFIG_S_ACKNOWLEDGE);
        self.add_status(VIRTIO_CONFIG_S_DRIVER);
        self.write(VIRTIO_MMIO_DRIVER_FEATURES, features);
        self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        self.write(VIRTIO_MMIO_DRIVER_FEATURES, 1 << (VIRTIO_F_VERSION_1 - 32));
        self.add_status(VIRTIO_CONFIG_S_FEATURES_OK);
        assert_ne!(self.status() & VIRTIO_CONFIG_S_FEATURES_OK, 0);
    }

    pub(crate) fn set_up_queue(&self, index: u32) {
        let rings = rings(index as usize);
        self.memory.write_slice(&[0; ROOM as usize], GuestAddress(rings)).unwrap();
        self.write(VIRTIO_MMIO_QUEUE_SEL, index);
        self.write(VIRTIO_MMIO_QUEUE_NUM, SIZE.into());
        for (low, high, addr) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH, rings),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, rings + AVAIL),
            (VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_QUEUE_USED_HIGH, rings + USED),
        ] {
            self.write(low, addr as u32);
            self.write(high, 0);
        }
        self.write(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    pub(crate) fn write(&self, offset: u32, value: u32) {
        self.window.write(offset.into(), &value.to_le_bytes());
    }

    pub(crate) fn read(&self, offset: u32) -> u32 {
        let mut data = [0xaa; 4];
        self.window.read(offset.into(), &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn status(&self) -> u32 {
        self.read(VIRTIO_MMIO_STATUS)
    }

    pub(crate) fn add_status(&self, bit: u32) {
        self.write(VIRTIO_MMIO_STATUS, self.status() | bit);
    }

    pub(crate) fn needs_reset(&self) -> bool {
        self.status() & VIRTIO_CONFIG_S_NEEDS_RESET != 0
    }

    /// Writes descriptor `at` of queue `queue` as it is.
    pub(crate) fn descriptor(&self, queue: usize, at: u16, desc: (u64, u32, u16, u16)) {
        let (addr, len, flags, next) = desc;
        let to = rings(queue) + u64::from(at) * 16;
        write_descriptor(&self.memory, to, (addr, len, flags, next));
    }

    /// Makes the chain at descriptor `head` available.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) {
        let avail = rings(queue) + AVAIL;
        let added = self.added[queue];
        let entry = avail + 4 + u64::from(added % SIZE) * 2;
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.added[queue] = added.wrapping_add(1);
        self.set_avail_index(queue, self.added[queue]);
    }

    pub(crate) fn set_avail_index(&self, queue: usize, index: u16) {
        let at = GuestAddress(rings(queue) + AVAIL + 2);
        self.memory.store(index, at, std::sync::atomic::Ordering::Release).unwrap();
    }

    /// Adds a request of these buffers, from descriptor `head` on.
    pub(crate) fn add(&mut self, queue: usize, head: u16, buffers: &[Buffer]) {
        for (at, (addr, len, writable)) in (head..).zip(buffers) {
            let is_last = usize::from(at - head) + 1 == buffers.len();
            let next = if is_last { 0 } else { VRING_DESC_F_NEXT };
            let flags = next | if *writable { VRING_DESC_F_WRITE } else { 0 };
            self.descriptor(queue, at, (*addr, *len, flags as u16, at + 1));
        }
        self.offer(queue, head);
    }

    pub(crate) fn kick(&self, queue: u32) {
        self.write(VIRTIO_MMIO_QUEUE_NOTIFY, queue);
    }

    /// How many requests of `queue` came back since it was set up.
    pub(crate) fn used(&self, queue: usize) -> u16 {
        let at = GuestAddress(rings(queue) + USED + 2);
        self.memory.load(at, std::sync::atomic::Ordering::Acquire).unwrap()
    }

    /// The head and the length written of the request that came back as number `nth`.
    pub(crate) fn used_entry(&self, queue: usize, nth: u16) -> (u32, u32) {
        let at = rings(queue) + USED + 4 + u64::from(nth % SIZE) * 8;
        let entry: [u32; 2] = self.memory.read_obj(GuestAddress(at)).unwrap();
        (entry[0], entry[1])
    }

    /// Kicks `queue` and waits until `count` of its requests have come back in all.
    pub(crate) fn wait_used(&self, queue: usize, count: u16) {
        self.kick(queue as u32);
        eventually("a used buffer", || self.used(queue) == count);
    }

    /// Takes an interrupt as a driver does: its causes.
    pub(crate) fn take_interrupt(&self) -> Option<u32> {
        self.window.line().read().ok()?;
        let causes = self.read(VIRTIO_MMIO_INTERRUPT_STATUS);
        self.write(VIRTIO_MMIO_INTERRUPT_ACK, causes);
        Some(causes)
    }
}

pub(crate) fn rings(queue: usize) -> u64 {
    RINGS + queue as u64 * ROOM
}

pub(crate) fn write_descriptor(memory: &DeviceMemory, to: u64, desc: (u64, u32, u16, u16)) {
    let (addr, len, flags, next) = desc;
    memory.write_obj(addr, GuestAddress(to)).unwrap();
    memory.write_obj(len, GuestAddress(to + 8)).unwrap();
    memory.write_obj(flags, GuestAddress(to + 12)).unwrap();
    memory.write_obj(next, GuestAddress(to + 14)).unwrap();
}
