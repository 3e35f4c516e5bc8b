//! One request: what it asks for, and what it gets.

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::buffer::Buffer;
use super::disk::Disk;
use super::reader::Reader;
use crate::machine::devices::virtio::attempt::checked;
use crate::machine::devices::virtio::queue::Request;
use crate::machine::memory::DeviceMemory;

/// Bytes in a sector: the unit of all addresses of the protocol, whatever the disk has.
const SECTOR: u64 = 512;
/// The longest segment of a request, in bytes. With it the longest request is just below 32 MiB.
pub(super) const SEGMENT_MAX: u32 = 128 << 10;
/// The most data of a request, in bytes.
const DATA_MAX: u64 = 32 << 20;
/// The most sectors that are discarded or zeroed at once: 32 MiB, as where the host has no better way zeros are written.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 16;

/// Why a request fails.
#[derive(Debug)]
enum Failed {
    /// Memory of the guest's that is bad or absent, or nonsense.
    Io,
    /// The host's error.
    Host(io::Error),
    /// There is no such request.
    Unsupported,
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            // What the guest asked for is the reason.
            io::ErrorKind::ReadOnlyFilesystem => Self::Io,
            _ if error.raw_os_error() == Some(libc::EFAULT) => Self::Io,
            _ => Self::Host(error),
        }
    }
}

/// How many failures of the host's are told between a reset and the next: a guest can cause as many as it likes.
const MOST_WARNINGS: u32 = 8;

/// What requests are worked on with.
#[derive(Debug, Default)]
pub(super) struct Work {
    buffer: Buffer,
    reader: Reader,
    warnings: u32,
}

/// `struct virtio_blk_outhdr`.
struct Header {
    kind: u32,
    sector: u64,
}

impl Work {
    /// What reads from raw images.
    pub(super) fn set_reader(&mut self, reader: Reader) {
        self.reader = reader;
    }

    /// What was kept of the requests of before is given back.
    pub(super) fn reset(&mut self) {
        (self.buffer, self.warnings) = (Buffer::default(), 0);
    }

    /// Does what `request` asks for, and tells the driver; how many bytes were written to its buffers.
    pub(super) fn serve(
        &mut self,
        disk: &mut Disk,
        memory: &DeviceMemory,
        request: &Request,
        writes_through: bool,
    ) -> u32 {
        // The status is the last byte that the device may write. Without one nothing can be told, and so nothing is done.
        let Some(status_at) = request.writable_len().checked_sub(1) else { return 0 };
        let done = self.carry_out(disk, memory, request, status_at, writes_through);
        self.buffer.shrink();
        let (status, written) = match done {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Failed::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
            Err(Failed::Io) => (VIRTIO_BLK_S_IOERR, 0),
            Err(Failed::Host(error)) => {
                self.warn(disk, &error);
                (VIRTIO_BLK_S_IOERR, 0)
            }
        };
        // A status is one byte.
        let status = [status.to_le_bytes()[0]];
        match checked(|| request.write(memory, status_at, &status)) {
            Ok(1) => u32::try_from(written + 1).unwrap_or(u32::MAX),
            // Who cannot be told that a request is done takes it for failed.
            _ => 0,
        }
    }

    fn warn(&mut self, disk: &Disk, error: &io::Error) {
        self.warnings = self.warnings.saturating_add(1);
        let path = disk.path().display();
        match self.warnings {
            ..MOST_WARNINGS => {
                log::warn!("a request of the guest's to the disk {path} fails: {error}")
            }
            MOST_WARNINGS => log::warn!(
                "a request of the guest's to the disk {path} fails: {error}; this is not told again before the guest \
                 resets the disk"
            ),
            _ => {}
        }
    }

    /// How many bytes of data were written to the request's buffers.
    fn carry_out(
        &mut self,
        disk: &mut Disk,
        memory: &DeviceMemory,
        request: &Request,
        status_at: u64,
        writes_through: bool,
    ) -> Result<u64, Failed> {
        let Header { kind, sector } = header(memory, request)?;
        match kind {
            VIRTIO_BLK_T_IN => {
                let at = place(disk, sector, status_at)?;
                self.read(disk, memory, request, at, status_at)?;
                Ok(status_at)
            }
            VIRTIO_BLK_T_OUT => {
                let len = request.readable_len() - HEADER_LEN as u64;
                let at = place(disk, sector, len)?;
                let bytes = self.buffer.of(usize::try_from(len).map_err(|_| Failed::Io)?);
                read_all(memory, request, bytes)?;
                disk.write(at, bytes)?;
                if writes_through {
                    disk.flush()?;
                }
                Ok(0)
            }
            VIRTIO_BLK_T_FLUSH => Ok(disk.flush().map(|()| 0)?),
            VIRTIO_BLK_T_GET_ID => {
                let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
                for (to, from) in id.iter_mut().zip(disk.id().bytes()) {
                    *to = from;
                }
                let room = usize::try_from(status_at).unwrap_or(id.len()).min(id.len());
                let written = checked(|| request.write(memory, 0, &id[..room]));
                written.map(|written| written as u64).map_err(|_| Failed::Io)
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                clear(disk, memory, request, kind == VIRTIO_BLK_T_DISCARD)?;
                if writes_through {
                    disk.flush()?;
                }
                Ok(0)
            }
            _ => Err(Failed::Unsupported),
        }
    }

    /// Fills the first `len` bytes of the request's buffers with what the disk has at `at`.
    fn read(
        &mut self,
        disk: &mut Disk,
        memory: &DeviceMemory,
        request: &Request,
        at: u64,
        len: u64,
    ) -> Result<(), Failed> {
        if disk.copies_into_place() {
            return Ok(disk.read_into(at, memory, request.writable(), len, &mut self.reader)?);
        }
        let bytes = self.buffer.of(usize::try_from(len).map_err(|_| Failed::Io)?);
        disk.read(at, bytes)?;
        match checked(|| request.write(memory, 0, bytes)) {
            Ok(written) if written == bytes.len() => Ok(()),
            _ => Err(Failed::Io),
        }
    }
}

/// Length of the header.
const HEADER_LEN: usize = 16;

fn header(memory: &DeviceMemory, request: &Request) -> Result<Header, Failed> {
    let mut bytes = [0; HEADER_LEN];
    match checked(|| request.read(memory, 0, &mut bytes)) {
        Ok(read) if read == bytes.len() => {}
        _ => return Err(Failed::Io),
    }
    let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = bytes;
    Ok(Header { kind: u32::from_le_bytes([k0, k1, k2, k3]), sector: u64::from_le_bytes(sector) })
}

/// All that follows the header.
fn read_all(memory: &DeviceMemory, request: &Request, bytes: &mut [u8]) -> Result<(), Failed> {
    match checked(|| request.read(memory, HEADER_LEN as u64, bytes)) {
        Ok(read) if read == bytes.len() => Ok(()),
        _ => Err(Failed::Io),
    }
}

/// Where the `len` bytes at `sector` begin on the disk, if it has them.
fn place(disk: &Disk, sector: u64, len: u64) -> Result<u64, Failed> {
    let is_within = len <= DATA_MAX
        && len.is_multiple_of(SECTOR)
        && sector.checked_add(len / SECTOR).is_some_and(|end| end <= disk.sectors());
    if is_within { Ok(sector * SECTOR) } else { Err(Failed::Io) }
}

/// Discards or zeroes the one stretch that the request names (`struct virtio_blk_discard_write_zeroes`).
fn clear(
    disk: &mut Disk,
    memory: &DeviceMemory,
    request: &Request,
    discards: bool,
) -> Result<(), Failed> {
    let mut bytes = [0; 16];
    if request.readable_len() != (HEADER_LEN + bytes.len()) as u64 {
        return Err(Failed::Unsupported);
    }
    read_all(memory, request, &mut bytes)?;
    let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = bytes;
    let sector = u64::from_le_bytes(sector);
    let count = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes([f0, f1, f2, f3]);
    let unmaps = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
    if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || discards && unmaps {
        return Err(Failed::Unsupported);
    }
    let end = sector.checked_add(count.into()).filter(|end| *end <= disk.sectors());
    if count > MAX_DISCARD_SECTORS || end.is_none() {
        return Err(Failed::Io);
    }
    let (at, len) = (sector * SECTOR, u64::from(count) * SECTOR);
    match discards {
        true => disk.discard(at, len)?,
        false => disk.write_zeroes(at, len, unmaps)?,
    }
    Ok(())
}
