//! The queues, and the header before each frame.

/// The queue of buffers for frames from the host (5.1.2).
pub(super) const RECEIVE: usize = 0;
/// The queue of frames to the host.
pub(super) const TRANSMIT: usize = 1;
/// The sizes of both.
pub(super) const QUEUE_SIZES: [u16; 2] = [256, 256];

/// struct virtio_net_hdr_v1 (5.1.6), before each frame in a buffer.
pub(super) const HEADER: usize = 12;
/// Of its fields: flags, gso_type, and num_buffers.
pub(super) const HEADER_FLAGS: usize = 0;
pub(super) const HEADER_GSO_TYPE: usize = 1;
pub(super) const HEADER_BUFFERS: usize = 10;

/// The least bytes of a frame: both addresses and a type.
pub(super) const LEAST_FRAME: usize = 14;
/// The most: the largest MTU, with two VLAN tags.
pub(super) const MOST_FRAME: usize = LEAST_FRAME + 2 * 4 + u16::MAX as usize;
