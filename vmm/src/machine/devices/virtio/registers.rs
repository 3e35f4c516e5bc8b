//! The registers of a device as several threads have them: the vCPUs, and whoever asks what the drivers have made of it.

use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use super::transport::Transport;
use crate::api::types::device::{DeviceInfo, DriverState};

/// One device's. They outlive its thread.
#[derive(Debug)]
pub struct Registers {
    name: &'static str,
    /// Guest-physical address.
    gpa: u64,
    transport: Mutex<Transport>,
}

impl Registers {
    /// Those of the device `name` at guest-physical address `gpa`.
    #[must_use]
    pub fn new(name: &'static str, gpa: u64, transport: Transport) -> Self {
        Self { name, gpa, transport: Mutex::new(transport) }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Transport> {
        self.transport.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device as its driver has set it up. It does not wait: a driver that resets the device holds its registers
    /// until the device has stopped.
    #[must_use]
    pub fn info(&self) -> DeviceInfo {
        let of = |transport: &Transport| {
            (transport.driver(), transport.interrupt_pending(), transport.queues())
        };
        let (driver, interrupt_pending, queues) = match self.transport.try_lock() {
            Ok(transport) => of(&transport),
            Err(TryLockError::Poisoned(held)) => of(&held.into_inner()),
            Err(TryLockError::WouldBlock) => (DriverState::Resetting, false, Vec::new()),
        };
        let name = format!("virtio-{}", self.name);
        DeviceInfo { name, gpa: self.gpa, driver, interrupt_pending, queues }
    }
}
