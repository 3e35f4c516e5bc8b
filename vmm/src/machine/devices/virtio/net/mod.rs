//! virtio-net (virtio 1.2, 5.1) on a tap of the host: in this process, or, with `vhost=on`, in the host's kernel.
//!
//! No offloads: each frame is whole, with its checksums, and the header before it says nothing. A frame that touched a
//! bad page is dropped and counted, as a wire may lose it; the rings are the device's, as everywhere.

mod config;
mod device;
mod drops;
mod incoming;
mod layout;
mod outgoing;
mod tap;
mod vhost;

pub use device::Net;
pub use drops::Drops;
pub use tap::{Tap, TapError};
pub use vhost::{VhostError, VhostNet};

#[cfg(test)]
mod tests;
