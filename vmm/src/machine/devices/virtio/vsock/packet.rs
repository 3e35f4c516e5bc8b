//! The header that each packet begins with (virtio 1.2, 5.10.6).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The length of [`Header`] in bytes.
pub const HEADER: usize = size_of::<Header>();
/// The most data of a packet, in bytes: as much as Linux puts in one.
pub const MOST_DATA: usize = 64 << 10;
/// The host's address (5.10.4).
pub const HOST_CID: u64 = 2;
/// The type of a stream socket's packets, the only one here.
pub const STREAM: u16 = 1;

/// Connect to a port.
pub const REQUEST: u16 = 1;
/// The connection is made.
pub const RESPONSE: u16 = 2;
/// There is no such connection.
pub const RST: u16 = 3;
/// The sender will not receive, or not send, or neither.
pub const SHUTDOWN: u16 = 4;
/// Data.
pub const RW: u16 = 5;
/// What the sender has room for.
pub const CREDIT_UPDATE: u16 = 6;
/// The other side is to say what it has room for.
pub const CREDIT_REQUEST: u16 = 7;

/// In [`SHUTDOWN`]: it receives no more.
pub const NO_RECEIVE: u32 = 1;
/// In [`SHUTDOWN`]: it sends no more.
pub const NO_SEND: u32 = 2;
/// Both.
pub const NEITHER: u32 = NO_RECEIVE | NO_SEND;

/// struct virtio_vsock_hdr. Every value of its bytes is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Header {
    /// The sender's address.
    pub src_cid: U64,
    /// The receiver's address.
    pub dst_cid: U64,
    /// The sender's port.
    pub src_port: U32,
    /// The receiver's port.
    pub dst_port: U32,
    /// Length of the data behind it, in bytes.
    pub len: U32,
    /// [`STREAM`], for what is here.
    pub kind: U16,
    /// [`REQUEST`] and the like.
    pub op: U16,
    /// Of [`SHUTDOWN`].
    pub flags: U32,
    /// The sender's room for data of this connection, in bytes.
    pub buf_alloc: U32,
    /// How much of the data that it got has left that room, in bytes from the beginning, modulo 2^32.
    pub fwd_cnt: U32,
}

impl Header {
    /// The answer to a packet of a connection that is not there.
    #[must_use]
    pub fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: RST.into(),
            ..Self::default()
        }
    }
}

/// A connection's name: no two have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    /// The port on the host's side.
    pub host: u32,
    /// The port on the guest's side.
    pub guest: u32,
}

impl Ports {
    /// Those of a packet of the guest's.
    #[must_use]
    pub fn of(packet: &Header) -> Self {
        Self { host: packet.dst_port.get(), guest: packet.src_port.get() }
    }
}

/// What a packet to the guest says, beside what its connection says in each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Say {
    /// [`REQUEST`] and the like.
    pub op: u16,
    /// Of [`SHUTDOWN`].
    pub flags: u32,
    /// Length of the data, at most [`MOST_DATA`].
    pub len: usize,
}

impl Say {
    /// A packet without data or flags.
    #[must_use]
    pub fn op(op: u16) -> Self {
        Self { op, flags: 0, len: 0 }
    }
}
