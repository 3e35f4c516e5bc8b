//! Guest RAM: what it is made of, what there is of it, and how it becomes good again.

pub mod backing;
pub mod block;
pub mod error;
pub mod extents;
mod guest_memfd;
pub mod guest_ram;
pub mod heal;
pub mod pool;
pub mod stand_ins;

/// Guest memory as devices use it: a page that is known to be bad is an error, and one that nobody knew of becomes a scratch
/// page of the devices', so that what they do is validated by [`Attempt`](mce_relay::guard::Attempt).
#[cfg(not(mce_relay_unguarded))]
pub type DeviceMemory = vm_memory::GuestRegionCollection<mce_relay::guard::GuardedRegion>;
/// Without the guard, for a measurement of what it costs.
#[cfg(mce_relay_unguarded)]
pub type DeviceMemory = vm_memory::GuestMemoryMmap;
