//! virtio-rng (virtio 1.2, 5.4): random bytes of the host for the guest.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::attempt::checked;
use super::device::{Active, Device, DeviceError, Served, Turn, Wait};
use super::queue::Request;
use crate::machine::memory::DeviceMemory;
use crate::sandbox::role::Role;

/// The most bytes that one request gets. The driver asks again.
const MOST: usize = 4096;

/// Why there is no source of random bytes.
#[derive(Debug, Error)]
pub enum RngError {
    /// It cannot be opened.
    #[error("cannot read random bytes from {}", path.display())]
    Open {
        /// Its path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It would not be random.
    #[error(
        "{} is neither a character device nor a FIFO: the guest would get the same bytes at each boot; expected \
         /dev/urandom, say",
        path.display()
    )]
    NotRandom {
        /// Its path.
        path: PathBuf,
    },
}

/// The device.
#[derive(Debug)]
pub struct Rng {
    source: File,
    /// A request waits for the source to have bytes.
    starved: bool,
}

impl Rng {
    /// One that reads from `path`.
    ///
    /// # Errors
    /// See [`RngError`].
    pub fn open(path: &Path) -> Result<Self, RngError> {
        let error = |source| RngError::Open { path: path.into(), source };
        // Not waiting at a read, as a reset waits for the device.
        let source = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let source = source.map_err(error)?;
        let kind = source.metadata().map_err(error)?.file_type();
        if !kind.is_char_device() && !kind.is_fifo() {
            return Err(RngError::NotRandom { path: path.into() });
        }
        Ok(Self { source, starved: false })
    }

    /// Bytes for `request`, if the source has any.
    fn fill(
        source: &mut File,
        memory: &DeviceMemory,
        request: &Request,
    ) -> Result<Served, DeviceError> {
        let mut bytes = [0; MOST];
        let len = usize::try_from(request.writable_len()).unwrap_or(MOST).min(MOST);
        if len == 0 {
            return Ok(Served::Done(0));
        }
        let len = match source.read(&mut bytes[..len]) {
            Ok(0) => return Err(ended(io::ErrorKind::UnexpectedEof.into())),
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Served::Later),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(Served::Later),
            Err(error) => return Err(ended(error)),
        };
        // A request whose buffer is no good memory gets no bytes.
        let written = checked(|| request.write(memory, 0, &bytes[..len])).unwrap_or(0);
        Ok(Served::Done(u32::try_from(written).unwrap_or(0)))
    }
}

fn ended(source: io::Error) -> DeviceError {
    DeviceError::Host { what: "read random bytes", source }
}

impl Device for Rng {
    fn id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn name(&self) -> &'static str {
        "rng"
    }

    fn role(&self) -> Role {
        Role::VirtioRng
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn kicked(&mut self, index: usize, active: &mut Active) -> Result<Turn, DeviceError> {
        let mut starved = false;
        let turn = active.serve(index, |memory, request| {
            let served = Self::fill(&mut self.source, memory, request)?;
            starved = served == Served::Later;
            Ok(served)
        });
        self.starved = starved;
        turn
    }

    fn waits_for(&self, waits: &mut Vec<Wait>) {
        if self.starved {
            waits.push(Wait { fd: self.source.as_raw_fd(), events: libc::POLLIN });
        }
    }

    fn ready(&mut self, _: Wait, active: &mut Active) -> Result<Turn, DeviceError> {
        self.kicked(0, active)
    }

    fn stop(&mut self) {
        self.starved = false;
    }
}

#[cfg(test)]
mod tests;
