//! A frame on its way from the tap to the guest.

use std::io;

use super::drops::{Drops, count};
use super::layout::{HEADER, HEADER_BUFFERS, MOST_FRAME};
use super::tap::Tap;
use crate::machine::devices::virtio::attempt::checked;
use crate::machine::devices::virtio::queue::Request;
use crate::machine::memory::DeviceMemory;

/// In how many buffers of bad memory a frame is tried before it is dropped.
const MOST_TRIES: u32 = 8;
/// How many frames that are too long are dropped before the thread looks for orders.
const MOST_DROPS: u32 = 64;

/// What became of a buffer of the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filled {
    /// It is used, with so many bytes; with none if its memory is bad.
    Used(u32),
    /// There is no frame for it now.
    NoFrame,
    /// There will be none.
    Gone,
}

/// At most one frame, which has left the tap.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    /// Header and frame.
    bytes: Vec<u8>,
    /// How much of it there is; 0 when none waits.
    len: usize,
    tries: u32,
}

impl Incoming {
    /// Puts a frame into the buffer of `request`: whole, or not at all.
    pub(super) fn fill(
        &mut self,
        tap: &Tap,
        drops: &Drops,
        memory: &DeviceMemory,
        request: &Request,
    ) -> Filled {
        for _ in 0..MOST_DROPS {
            if self.len == 0 {
                match self.take(tap) {
                    Ok(true) => {}
                    Ok(false) => return Filled::NoFrame,
                    Err(error) => {
                        log::warn!("virtio-net: {tap} is gone, the guest's link is down: {error}");
                        return Filled::Gone;
                    }
                }
            }
            if self.len as u64 <= request.writable_len() {
                return Filled::Used(self.give(drops, memory, request));
            }
            count(&drops.no_room);
            self.clear();
        }
        Filled::NoFrame
    }

    /// Takes a frame from the tap; false if there is none.
    fn take(&mut self, tap: &Tap) -> io::Result<bool> {
        self.bytes.resize(HEADER + MOST_FRAME, 0);
        let len = match tap.read(&mut self.bytes) {
            Ok(len) => len,
            Err(error) => {
                return match error.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(false),
                    _ => Err(error),
                };
            }
        };
        self.bytes[..HEADER].fill(0);
        // One, little-endian.
        self.bytes[HEADER_BUFFERS] = 1;
        (self.len, self.tries) = (HEADER + len, 0);
        Ok(true)
    }

    /// How many bytes count as written.
    fn give(&mut self, drops: &Drops, memory: &DeviceMemory, request: &Request) -> u32 {
        let written = checked(|| request.write(memory, 0, &self.bytes[..self.len]));
        if written.is_ok_and(|written| written == self.len) {
            let len = u32::try_from(self.len).unwrap_or(0);
            self.clear();
            return len;
        }
        // The next buffer gets it: a driver drops a buffer that has less than a header.
        self.tries += 1;
        if self.tries == MOST_TRIES {
            if count(&drops.bad_memory) {
                log::warn!(
                    "virtio-net: a frame for a guest whose buffers are bad memory is dropped"
                );
            }
            self.clear();
        }
        0
    }

    /// Drops what waits.
    pub(super) fn clear(&mut self) {
        (self.len, self.tries) = (0, 0);
    }
}
