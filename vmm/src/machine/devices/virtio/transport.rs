//! The registers of virtio-mmio, version 2 (virtio 1.2, 4.2).
//!
//! A register file without a thread: a write changes the registers, and what the device has to do about it is returned
//! as an [`Action`]. Every write of any value to any register in any order is safe. What the specification forbids a
//! driver has no effect.

use std::sync::Arc;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY,
    VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW,
    VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_BASE_LOW, VIRTIO_MMIO_SHM_LEN_HIGH,
    VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::config_space::ConfigSpace;
use super::device::{Active, Device};
use super::interrupt::Interrupt;
use super::queue::ActiveQueue;
use super::queue_registers::QueueRegisters;
use crate::api::types::device::{DriverState, QueueInfo};
use crate::machine::memory::DeviceMemory;

/// What the first register reads.
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// The version of these registers.
const VERSION: u32 = 2;
/// Who made the device: nobody who is registered, so a name, as QEMU does it.
const VENDOR: u32 = u32::from_le_bytes(*b"MCER");
/// The status bits that a driver sets.
const DRIVER_BITS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK;
/// In the order in which a driver sets them (virtio 1.2, 3.1.1).
const ORDER: [u32; 4] = [
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_DRIVER_OK,
];

/// What the device has to do after a write.
#[derive(Debug)]
pub enum Action {
    /// Nothing.
    None,
    /// Begin to work.
    Activate(Activation),
    /// Stop, before the write is over; it does not begin again before the next [`Action::Reset`].
    Stop,
    /// The same, and be as it was at first.
    Reset,
    /// Look at this queue.
    Notify(usize),
}

/// What a device begins to work with.
#[derive(Debug)]
pub struct Activation {
    /// What the driver has accepted of the features, as bits.
    pub features: u64,
    /// How the driver is told.
    pub interrupt: Arc<Interrupt>,
    /// The queues; `None` for one that the driver has not set up.
    pub queues: Vec<Option<Queue>>,
}

impl Activation {
    /// What the device works with, in `memory` and with these kicks, one for each queue.
    #[must_use]
    pub fn into_active(self, memory: DeviceMemory, kicks: &[Arc<EventFd>]) -> Active {
        let Self { features, interrupt, queues } = self;
        let with = |(queue, kick): (Option<Queue>, &Arc<EventFd>)| {
            queue.map(|queue| ActiveQueue::new(queue, Arc::clone(kick)))
        };
        let queues = queues.into_iter().zip(kicks).map(with).collect();
        Active { memory, features, interrupt, queues }
    }
}

/// The registers of one device.
#[derive(Debug)]
pub struct Transport {
    id: u32,
    offered: u64,
    config: Arc<ConfigSpace>,
    interrupt: Arc<Interrupt>,
    /// What the driver has set of it.
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    accepted: u64,
    queue_sel: u32,
    queues: Vec<QueueRegisters>,
}

impl Transport {
    /// The registers of `device`, whose interrupt is raised by writing to `line`.
    #[must_use]
    pub fn new(device: &dyn Device, line: Arc<EventFd>) -> Self {
        Self {
            id: device.id(),
            offered: device.features() | device.ring_features() | 1 << VIRTIO_F_VERSION_1,
            config: device.config(),
            interrupt: Arc::new(Interrupt::new(line)),
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            accepted: 0,
            queue_sel: 0,
            queues: device.queue_sizes().iter().copied().map(QueueRegisters::new).collect(),
        }
    }

    /// The driver reads `data.len()` bytes at `offset` of the window. Below the configuration space there are registers
    /// of four bytes; other accesses there give zeros.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            self.config.read(offset, data);
            return;
        }
        data.fill(0);
        if let Ok(register) = <&mut [u8; 4]>::try_from(data)
            && let Ok(offset) = u32::try_from(offset)
        {
            *register = self.register(offset).to_le_bytes();
        }
    }

    fn register(&self, offset: u32) -> u32 {
        let queue = self.selected();
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.id,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(self.offered, self.device_features_sel),
            VIRTIO_MMIO_QUEUE_NUM_MAX => queue.map_or(0, |queue| queue.max().into()),
            VIRTIO_MMIO_QUEUE_READY => queue.is_some_and(QueueRegisters::is_ready).into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.causes(),
            VIRTIO_MMIO_STATUS if self.interrupt.needs_reset() => {
                self.status | VIRTIO_CONFIG_S_NEEDS_RESET
            }
            VIRTIO_MMIO_STATUS => self.status,
            // There is no shared memory: all ones as a length says so.
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            VIRTIO_MMIO_CONFIG_GENERATION => self.config.generation(),
            _ => 0,
        }
    }

    /// How far the driver has come.
    #[must_use]
    pub fn driver(&self) -> DriverState {
        match self.status {
            status if status & VIRTIO_CONFIG_S_FAILED != 0 => DriverState::Failed,
            _ if self.interrupt.needs_reset() => DriverState::NeedsReset,
            status if status & VIRTIO_CONFIG_S_DRIVER_OK != 0 => DriverState::Working,
            _ => DriverState::Absent,
        }
    }

    /// Whether there is a cause of the interrupt that the driver has not acknowledged.
    #[must_use]
    pub fn interrupt_pending(&self) -> bool {
        self.interrupt.causes() != 0
    }

    /// The queues that it has made ready.
    #[must_use]
    pub fn queues(&self) -> Vec<QueueInfo> {
        let queues = self.queues.iter().enumerate();
        queues.filter_map(|(index, queue)| queue.info(index)).collect()
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    /// The driver writes `data` at `offset` of the window; see [`Self::read`] for the lengths. `memory` is where its
    /// queues have to be.
    #[must_use]
    pub fn write(&mut self, offset: u64, data: &[u8], memory: &DeviceMemory) -> Action {
        if let Some(offset) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            self.config.driver_writes(offset, data);
            return Action::None;
        }
        let (Ok(offset), Ok(value)) = (u32::try_from(offset), <[u8; 4]>::try_from(data)) else {
            return Action::None;
        };
        let value = u32::from_le_bytes(value);
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.accept(value),
            VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            VIRTIO_MMIO_QUEUE_READY => return self.set_ready(value, memory),
            VIRTIO_MMIO_QUEUE_NOTIFY => return self.notify(value),
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => return self.set_status(value),
            _ => self.set_up_queue(offset, value),
        }
        Action::None
    }

    fn has(&self, bits: u32) -> bool {
        self.status & bits == bits
    }

    /// Whether the device works, as far as the driver knows.
    fn is_active(&self) -> bool {
        self.has(VIRTIO_CONFIG_S_DRIVER_OK) && !self.has(VIRTIO_CONFIG_S_FAILED)
    }

    fn accept(&mut self, value: u32) {
        if !self.has(VIRTIO_CONFIG_S_DRIVER) || self.has(VIRTIO_CONFIG_S_FEATURES_OK) {
            return;
        }
        let value = u64::from(value);
        match self.driver_features_sel {
            0 => self.accepted = self.accepted >> 32 << 32 | value,
            1 => self.accepted = self.accepted & u64::from(u32::MAX) | value << 32,
            // There are no more features than 64; a bit of those is one that was not offered.
            _ if value != 0 => self.accepted = u64::MAX,
            _ => {}
        }
    }

    fn set_up_queue(&mut self, offset: u32, value: u32) {
        if !self.has(VIRTIO_CONFIG_S_FEATURES_OK) || self.has(VIRTIO_CONFIG_S_DRIVER_OK) {
            return;
        }
        let Some(queue) = selected(&mut self.queues, self.queue_sel) else { return };
        match offset {
            VIRTIO_MMIO_QUEUE_NUM => queue.set_size(value),
            VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_descriptors(value, 0),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.set_descriptors(value, 32),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_avail(value, 0),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.set_avail(value, 32),
            VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used(value, 0),
            VIRTIO_MMIO_QUEUE_USED_HIGH => queue.set_used(value, 32),
            _ => {}
        }
    }

    fn set_ready(&mut self, value: u32, memory: &DeviceMemory) -> Action {
        let (may, active) = (self.has(VIRTIO_CONFIG_S_FEATURES_OK), self.is_active());
        let Some(queue) = selected(&mut self.queues, self.queue_sel) else { return Action::None };
        match value {
            0 if active && queue.is_ready() => {
                // The driver may use the queue's memory for something else as soon as this is over.
                queue.unready();
                self.interrupt.ask_for_reset();
                return Action::Stop;
            }
            0 => queue.unready(),
            1 if may && !active && !queue.is_ready() => {
                if let Err(why) = queue.make_ready(memory) {
                    log::debug!("device {}: queue {}: {why}", self.id, self.queue_sel);
                    self.interrupt.ask_for_reset();
                }
            }
            _ => {}
        }
        Action::None
    }

    fn notify(&self, value: u32) -> Action {
        match usize::try_from(value) {
            Ok(index) if self.is_active() && index < self.queues.len() => Action::Notify(index),
            _ => Action::None,
        }
    }

    fn set_status(&mut self, value: u32) -> Action {
        if value == 0 {
            return self.reset();
        }
        if self.has(VIRTIO_CONFIG_S_FAILED) {
            return Action::None;
        }
        if value & VIRTIO_CONFIG_S_FAILED != 0 {
            let was_active = self.is_active();
            self.status |= VIRTIO_CONFIG_S_FAILED;
            return if was_active { Action::Stop } else { Action::None };
        }
        // A driver takes no bit back, but by a reset.
        if self.status & !value & DRIVER_BITS != 0 {
            return Action::None;
        }
        let added = value & !self.status;
        for bit in ORDER.into_iter().filter(|bit| added & bit != 0) {
            let before = ORDER.into_iter().take_while(|earlier| *earlier != bit).sum();
            let possible = bit != VIRTIO_CONFIG_S_FEATURES_OK || self.features_will_do();
            if !self.has(before) || !possible {
                return Action::None;
            }
            self.status |= bit;
            if bit == VIRTIO_CONFIG_S_DRIVER_OK {
                return self.activate();
            }
        }
        Action::None
    }

    fn features_will_do(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted >> VIRTIO_F_VERSION_1 & 1 == 1
    }

    fn activate(&self) -> Action {
        if self.interrupt.needs_reset() {
            // The driver may not have listened the first time.
            self.interrupt.ask_for_reset();
            return Action::None;
        }
        let event_idx = self.accepted >> VIRTIO_RING_F_EVENT_IDX & 1 == 1;
        let queues = self.queues.iter().map(|queue| queue.queue(event_idx));
        Action::Activate(Activation {
            features: self.accepted,
            interrupt: Arc::clone(&self.interrupt),
            queues: queues.collect(),
        })
    }

    fn reset(&mut self) -> Action {
        self.status = 0;
        (self.device_features_sel, self.driver_features_sel, self.accepted) = (0, 0, 0);
        self.queue_sel = 0;
        self.queues.iter_mut().for_each(QueueRegisters::reset);
        // The thread may still use the old one, until it has stopped.
        self.interrupt = Arc::new(Interrupt::new(Arc::clone(self.interrupt.line())));
        Action::Reset
    }
}

fn selected(queues: &mut [QueueRegisters], index: u32) -> Option<&mut QueueRegisters> {
    queues.get_mut(usize::try_from(index).ok()?)
}

/// The low or the high 32 bits.
fn half(features: u64, sel: u32) -> u32 {
    let shifted = match sel {
        0 => features,
        1 => features >> 32,
        _ => 0,
    };
    #[allow(clippy::cast_possible_truncation, reason = "it is what is asked for")]
    let low = shifted as u32;
    low
}

#[cfg(test)]
mod tests;
