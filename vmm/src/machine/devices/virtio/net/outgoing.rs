//! A frame on its way from the guest to the tap.

use std::io;

use virtio_bindings::virtio_net::{VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE};

use super::drops::{Drops, count};
use super::layout::{HEADER, HEADER_FLAGS, HEADER_GSO_TYPE, LEAST_FRAME, MOST_FRAME};
use super::tap::Tap;
use crate::machine::devices::virtio::attempt::checked;
use crate::machine::devices::virtio::device::Served;
use crate::machine::devices::virtio::queue::Request;
use crate::machine::memory::DeviceMemory;

/// Room for one frame.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    /// Header and frame.
    bytes: Vec<u8>,
}

impl Outgoing {
    /// Sends the frame of `request`, all of it, or drops it. [`Served::Later`] when the tap takes nothing now.
    pub(super) fn send(
        &mut self,
        tap: &Tap,
        drops: &Drops,
        memory: &DeviceMemory,
        request: &Request,
    ) -> Served {
        let len = usize::try_from(request.readable_len()).unwrap_or(usize::MAX);
        if !(HEADER + LEAST_FRAME..=HEADER + MOST_FRAME).contains(&len) {
            count(&drops.malformed);
            return Served::Done(0);
        }
        self.bytes.resize(len, 0);
        let read = checked(|| request.read(memory, 0, &mut self.bytes));
        // Nothing of it is looked at before.
        if !read.is_ok_and(|read| read == len) {
            if count(&drops.bad_memory) {
                log::warn!("virtio-net: a frame of the guest's that is in bad memory is dropped");
            }
            return Served::Done(0);
        }
        if !is_plain(&self.bytes) {
            count(&drops.malformed);
            return Served::Done(0);
        }
        match tap.write(&mut self.bytes) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Served::Later,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Served::Later,
            Err(error) => {
                if count(&drops.refused) {
                    log::warn!("virtio-net: {tap} does not take a frame of the guest's: {error}");
                }
            }
        }
        Served::Done(0)
    }

    /// Gives its memory back.
    pub(super) fn clear(&mut self) {
        self.bytes = Vec::new();
    }
}

/// Whether the header asks for nothing. What it might ask for was not offered.
fn is_plain(bytes: &[u8]) -> bool {
    u32::from(bytes[HEADER_FLAGS]) & VIRTIO_NET_HDR_F_NEEDS_CSUM == 0
        && u32::from(bytes[HEADER_GSO_TYPE]) == VIRTIO_NET_HDR_GSO_NONE
}
