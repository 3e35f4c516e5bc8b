//! One request: what it asks for, and what it gets.

use std::collections::VecDeque;
use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::buffer::Buffer;
use super::disk::Disk;
use super::places::{find_bad_page, host_places};
use super::reader::{PIECE, Reader, UntilRest, read_now};
use crate::machine::devices::virtio::attempt::checked;
use crate::machine::devices::virtio::device::Served;
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

/// So many bytes are read at once; one more request may be begun as long as there are fewer.
const AT_ONCE: u64 = 4 << 20;

/// What requests are worked on with.
#[derive(Debug, Default)]
pub(super) struct Work {
    buffer: Buffer,
    reader: Reader,
    /// What `reader` has begun, in its order.
    in_hand: VecDeque<InHand>,
    warnings: u32,
}

/// A read.
#[derive(Debug)]
struct InHand {
    request: Request,
    /// Where its data goes, and how much.
    places: Vec<libc::iovec>,
    len: u64,
}

// SAFETY: the addresses are the kernel's to write to, on any thread.
unsafe impl Send for InHand {}

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
        self.in_hand = VecDeque::new();
    }

    /// A turn begins. It is over when what is returned is dropped: guest memory and the disk are not used any more then.
    pub(super) fn begin_turn(&mut self) -> UntilRest {
        // What a turn that was given up had begun is not given back: the device asks for a reset.
        self.in_hand.clear();
        self.reader.until_rest()
    }

    /// Whether no more is to be begun before something is finished.
    pub(super) fn is_full(&self) -> bool {
        self.in_hand.iter().map(|read| read.len).sum::<u64>() >= AT_ONCE
    }

    /// Does what `request` asks for, and tells the driver, or begins with it.
    pub(super) fn begin(
        &mut self,
        disk: &mut Disk,
        memory: &DeviceMemory,
        request: &Request,
        writes_through: bool,
    ) -> Served {
        // The status is the last byte that the device may write. Without one nothing can be told, and so nothing is done.
        let Some(status_at) = request.writable_len().checked_sub(1) else {
            return Served::Done(0);
        };
        let done = self.carry_out(disk, memory, request, status_at, writes_through);
        self.buffer.shrink();
        match done.transpose() {
            Some(done) => Served::Done(self.tell(disk, memory, request, done)),
            None => Served::InHand,
        }
    }

    /// Works on what was begun until the oldest request is done, and tells the driver; how many bytes were written to its
    /// buffers.
    pub(super) fn finish(&mut self, disk: &Disk, memory: &DeviceMemory) -> Option<(Request, u32)> {
        let done = self.reader.finish()?;
        let InHand { request, places, len } = self.in_hand.pop_front()?;
        let done = found(done, &places).map(|()| len).map_err(Failed::from);
        let written = self.tell(disk, memory, &request, done);
        Some((request, written))
    }

    /// Writes the status of a request for which `done` bytes of data were written; how many were written with it.
    fn tell(
        &mut self,
        disk: &Disk,
        memory: &DeviceMemory,
        request: &Request,
        done: Result<u64, Failed>,
    ) -> u32 {
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
        let status_at = request.writable_len().saturating_sub(1);
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

    /// How many bytes of data were written to the request's buffers; `None` if that was begun.
    fn carry_out(
        &mut self,
        disk: &mut Disk,
        memory: &DeviceMemory,
        request: &Request,
        status_at: u64,
        writes_through: bool,
    ) -> Result<Option<u64>, Failed> {
        let Header { kind, sector } = header(memory, request)?;
        match kind {
            VIRTIO_BLK_T_IN => {
                let at = place(disk, sector, status_at)?;
                let is_done = self.read(disk, memory, request, at, status_at)?;
                Ok(is_done.then_some(status_at))
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
                Ok(Some(0))
            }
            VIRTIO_BLK_T_FLUSH => Ok(disk.flush().map(|()| Some(0))?),
            VIRTIO_BLK_T_GET_ID => {
                let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
                for (to, from) in id.iter_mut().zip(disk.id().bytes()) {
                    *to = from;
                }
                let room = usize::try_from(status_at).unwrap_or(id.len()).min(id.len());
                let written = checked(|| request.write(memory, 0, &id[..room]));
                written.map(|written| Some(written as u64)).map_err(|_| Failed::Io)
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                clear(disk, memory, request, kind == VIRTIO_BLK_T_DISCARD)?;
                if writes_through {
                    disk.flush()?;
                }
                Ok(Some(0))
            }
            _ => Err(Failed::Unsupported),
        }
    }

    /// Fills the first `len` bytes of the request's buffers with what the disk has at `at`, or begins to; whether it is
    /// done.
    fn read(
        &mut self,
        disk: &mut Disk,
        memory: &DeviceMemory,
        request: &Request,
        at: u64,
        len: u64,
    ) -> Result<bool, Failed> {
        if let Some(file) = disk.copied_from() {
            let places = host_places(memory, request.writable(), len)?;
            if len < PIECE as u64 {
                found(read_now(file, at, &places), &places)?;
                return Ok(true);
            }
            self.reader.begin(file, at, &places);
            self.in_hand.push_back(InHand { request: request.clone(), places, len });
            return Ok(false);
        }
        let bytes = self.buffer.of(usize::try_from(len).map_err(|_| Failed::Io)?);
        disk.read(at, bytes)?;
        match checked(|| request.write(memory, 0, bytes)) {
            Ok(written) if written == bytes.len() => Ok(true),
            _ => Err(Failed::Io),
        }
    }
}

/// Of a bad page the kernel does not say which it is; it is found here, so that the relay learns of it.
pub(super) fn found(done: io::Result<()>, places: &[libc::iovec]) -> io::Result<()> {
    done.inspect_err(|error| {
        if error.raw_os_error() == Some(libc::EFAULT) {
            find_bad_page(places);
        }
    })
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
