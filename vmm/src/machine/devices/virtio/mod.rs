//! virtio devices over virtio-mmio (virtio 1.2, 4.2).
//!
//! A device has three parts:
//!
//! - its registers, [`transport::Transport`]: the same for every device, without a thread. The vCPUs' threads read and
//!   write them at the device's [`bus::Window`].
//! - the [`device::Device`]: what it is, and what it does with requests.
//! - its thread, [`worker::Worker`], with a filter of system calls of its own. It calls the device when the driver
//!   kicks a queue or when something comes that the device waits for, stops it at a reset, and parks while the VM is
//!   paused.
//!
//! # A new device
//!
//! [`rng::Rng`] is the smallest one. A device implements [`device::Device`]: an id, a name, a
//! [`Role`](crate::sandbox::role::Role) with a list of system calls in [`crate::sandbox::seccomp`], the sizes of its
//! queues, and `kicked`. There it has [`device::Active::serve`] hand it one request after another:
//!
//! ```
//! use mce_relay_vmm::machine::devices::virtio::attempt::Attempt;
//! use mce_relay_vmm::machine::devices::virtio::device::{Active, Device, DeviceError, Served, Turn};
//! use mce_relay_vmm::sandbox::role::Role;
//!
//! /// Fills every buffer with eights.
//! struct Eights;
//!
//! impl Device for Eights {
//!     fn id(&self) -> u32 {
//!         4 // VIRTIO_ID_RNG
//!     }
//!
//!     fn name(&self) -> &'static str {
//!         "eights"
//!     }
//!
//!     fn role(&self) -> Role {
//!         Role::VirtioRng
//!     }
//!
//!     fn queue_sizes(&self) -> &[u16] {
//!         &[64]
//!     }
//!
//!     fn kicked(&mut self, index: usize, active: &mut Active) -> Result<Turn, DeviceError> {
//!         active.serve(index, |memory, request| {
//!             let attempt = Attempt::begin();
//!             let written = request.write(memory, 0, &[8; 64]);
//!             // What is wrong with the buffers of a request fails this request, and nothing else.
//!             let written = written.ok().filter(|_| attempt.is_clean()).unwrap_or(0);
//!             Ok(Served::Done(u32::try_from(written).unwrap_or(0)))
//!         })
//!     }
//! }
//! ```
//!
//! - `serve` takes at most as many requests as the queue has entries and returns [`device::Turn::Again`] if there are
//!   more, so that an order to stop is never kept waiting by a guest that adds requests all the time.
//! - A request that cannot be served yet is [`device::Served::Later`]; the device then names the descriptor that it
//!   waits for in `waits_for`, and is called by `ready`. For a device whose requests end in another order than they
//!   began there are [`queue::ActiveQueue::pop`] and [`queue::ActiveQueue::push`].
//! - The configuration space is a [`config_space::ConfigSpace`], which the vCPUs read without the device's thread.
//! - What the device keeps of a driver goes in `stop`.
//!
//! An error that a call returns ends the device's work: the thread sets DEVICE_NEEDS_RESET, interrupts the driver, and
//! does nothing until the driver has reset the device. Errors of the rings come from `serve`, `pop` and `push` by
//! themselves. A panic is treated the same way.
//!
//! [`attempt::Attempt`] says whether a page that was touched has turned out to be bad. What was read in an attempt that is not
//! clean is not let out, and what was written in it does not count as written.
//!
//! Then [`crate::config::DeviceConfig`] and [`build`] learn of it, and the command line.

pub mod attempt;
pub mod blk;
pub mod build;
pub mod bus;
pub mod config_space;
pub mod console;
pub mod device;
pub mod interrupt;
pub mod net;
mod panics;
pub mod queue;
mod queue_registers;
pub mod registers;
pub mod rng;
pub mod transport;
pub mod vsock;
pub mod worker;

#[cfg(test)]
pub(crate) mod testing;
