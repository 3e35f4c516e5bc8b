//! virtio-net (virtio 1.2, 5.1) on a tap of the host: in this process, or, with `vhost=on`, in the host's kernel.
//!
//! No offloads: each frame is whole, with its checksums, and the header before it says nothing. A frame that touched a
//! bad page is dropped and counted, as a wire may lose it; the rings are the device's, as everywhere.

mod config;
mod device;
mod drops;
mod incoming;
mod outgoing;
mod tap;
mod vhost;

pub use device::Net;
pub use drops::Drops;
pub use tap::{Tap, TapError};
pub use vhost::{VhostError, VhostNet};

/// The queue of buffers for frames from the host (5.1.2).
const RECEIVE: usize = 0;
/// The queue of frames to the host.
const TRANSMIT: usize = 1;
/// The sizes of both.
const QUEUE_SIZES: [u16; 2] = [256, 256];

/// struct virtio_net_hdr_v1 (5.1.6), before each frame in a buffer.
const HEADER: usize = 12;
/// Of its fields: flags, gso_type, and num_buffers.
const HEADER_FLAGS: usize = 0;
const HEADER_GSO_TYPE: usize = 1;
const HEADER_BUFFERS: usize = 10;

/// The least bytes of a frame: both addresses and a type.
const LEAST_FRAME: usize = 14;
/// The most: the largest MTU, with two VLAN tags.
const MOST_FRAME: usize = LEAST_FRAME + 2 * 4 + u16::MAX as usize;

#[cfg(test)]
mod tests;
