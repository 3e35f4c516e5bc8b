//! The guest's devices, as its drivers have set them up.

use serde::{Deserialize, Serialize};

/// How far a driver of the guest's has come with a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DriverState {
    /// No driver has it, or one is setting it up.
    Absent,
    /// It works.
    Working,
    /// The device has asked for a reset (DEVICE_NEEDS_RESET) and does nothing before that: its rings are bad, or it cannot
    /// go on.
    NeedsReset,
    /// The driver has given it up.
    Failed,
    /// The driver resets it at this moment.
    Resetting,
}

/// A queue of a device. Guest-physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueInfo {
    /// Its number.
    pub index: usize,
    /// How many entries it has.
    pub size: u16,
    /// The descriptor table.
    #[serde(with = "mce_relay::hex")]
    pub descriptors: u64,
    /// The available ring, which the driver writes.
    #[serde(with = "mce_relay::hex")]
    pub avail: u64,
    /// The used ring, which the device writes.
    #[serde(with = "mce_relay::hex")]
    pub used: u64,
}

/// A virtio device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// What it is: `virtio-blk`, say.
    pub name: String,
    /// Guest-physical address of its registers, 4096 bytes.
    #[serde(with = "mce_relay::hex")]
    pub gpa: u64,
    /// What its driver does.
    pub driver: DriverState,
    /// Whether the device has raised its interrupt and the driver not acknowledged it (InterruptStatus; virtio 1.2, 4.2.2):
    /// for long only if the guest has not seen it.
    pub interrupt_pending: bool,
    /// The queues that the driver has made ready.
    pub queues: Vec<QueueInfo>,
}
