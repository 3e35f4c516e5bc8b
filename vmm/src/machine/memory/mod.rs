//! Guest RAM: what it is made of, what there is of it, and how it becomes good again.

pub mod backing;
pub mod block;
pub mod error;
pub mod extents;
pub mod guest_ram;
pub mod heal;
pub mod pool;
pub mod stand_ins;

/// Guest memory as devices use it.
pub type DeviceMemory = vm_memory::GuestMemoryMmap;
