//! A disk, or a file in place of one, and the memory that is transferred.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};

use super::block::{BLOCK, WORDS, Words};
use super::reply::Place;
use crate::pages::{FRAME, Mapping, errno_name, frames};
use crate::touch::{self, Fault};
use crate::words::Hex;

/// What a buffer holds before something is read into it, so that a transfer that is said to be
/// made and is not is seen.
const NOTHING: Words = [0xa5a5_a5a5_a5a5_a5a5; WORDS];

/// One page of the agent's, on its own: its loss is nobody else's.
pub struct Buffer {
    mapping: Mapping,
}

impl Buffer {
    /// Makes one that is there.
    ///
    /// # Errors
    /// There is no memory.
    pub fn new() -> Result<Self, String> {
        let made = || -> io::Result<Mapping> {
            let mapping = Mapping::reserve(BLOCK)?;
            mapping.map(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)?;
            Ok(mapping)
        };
        let buffer = Self { mapping: made().map_err(|e| format!("no buffer: {e}"))? };
        buffer
            .put(&NOTHING)
            .map_err(|fault| format!("SIGBUS (code {}) in a new buffer", fault.code))?;
        Ok(buffer)
    }

    /// Takes another page in place of this one, which may be lost.
    ///
    /// # Errors
    /// There is no memory.
    pub fn renew(&mut self) -> Result<(), String> {
        *self = Self::new()?;
        Ok(())
    }

    /// Where it is.
    ///
    /// # Errors
    /// There is no /proc.
    pub fn place(&self) -> Result<Place, String> {
        let va = self.mapping.va();
        let frame = frames(va, BLOCK)?[0];
        let gpa = (frame != 0).then_some(Hex(frame * FRAME as u64));
        Ok(Place { va: Hex(va as u64), gpa })
    }

    fn put(&self, words: &Words) -> Result<(), Fault> {
        // SAFETY: both are as long as a block; the buffer is this one's alone, and only these accesses
        // and the kernel's refer to it.
        unsafe { touch::copy(self.mapping.va(), words.as_ptr().expose_provenance(), WORDS) }
    }

    fn get(&self) -> Result<Words, Fault> {
        let mut words = [0; WORDS];
        let to = words.as_mut_ptr().expose_provenance();
        // SAFETY: as for `put`, the other way round.
        unsafe { touch::copy(to, self.mapping.va(), WORDS) }?;
        Ok(words)
    }
}

/// What is transferred to and from.
pub struct Device {
    file: File,
    path: String,
    /// Whether the page cache is left out.
    pub direct: bool,
    /// Whether it is a block device.
    pub is_disk: bool,
}

impl Device {
    /// Opens a block device or a file.
    ///
    /// # Errors
    /// The path, and what the kernel said or what it is.
    pub fn open(path: &str, write: bool) -> Result<Self, String> {
        let open = |flags| {
            OpenOptions::new()
                .read(true)
                .write(write)
                .custom_flags(flags | libc::O_CLOEXEC)
                .open(path)
        };
        let (file, direct) = match open(libc::O_DIRECT) {
            // A file system that has no disk, for one.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => (open(libc::O_SYNC), false),
            opened => (opened, true),
        };
        let file = file.map_err(|e| format!("{path}: {e}"))?;
        let kind = file.metadata().map_err(|e| format!("{path}: {e}"))?.file_type();
        if !kind.is_block_device() && !kind.is_file() {
            return Err(format!("{path}: expected a block device or a file"));
        }
        Ok(Self { file, path: path.to_owned(), direct, is_disk: kind.is_block_device() })
    }

    /// Sees to it that it has bytes up to `end`.
    ///
    /// # Errors
    /// It has fewer.
    pub fn holds(&self, end: u64) -> Result<(), String> {
        let path = &self.path;
        match (&self.file).seek(SeekFrom::End(0)).map_err(|e| format!("{path}: {e}"))? {
            bytes if bytes >= end => Ok(()),
            bytes => Err(format!("{path}: has {bytes} bytes, {end} were asked for")),
        }
    }

    /// Writes a block.
    ///
    /// # Errors
    /// The name of the errno, `SIGBUS`, or that it was short.
    pub fn write(&self, buffer: &Buffer, offset: u64, words: &Words) -> Result<(), String> {
        buffer.put(words).map_err(lost)?;
        self.transfer(libc::SYS_pwrite64, buffer, offset)
    }

    /// Reads a block.
    ///
    /// # Errors
    /// The name of the errno, `SIGBUS`, or that it was short.
    pub fn read(&self, buffer: &Buffer, offset: u64) -> Result<Words, String> {
        buffer.put(&NOTHING).map_err(lost)?;
        self.transfer(libc::SYS_pread64, buffer, offset)?;
        buffer.get().map_err(lost)
    }

    fn transfer(&self, call: libc::c_long, buffer: &Buffer, offset: u64) -> Result<(), String> {
        let fd = self.file.as_raw_fd();
        // SAFETY: the buffer is as long as a block, and what the kernel does to it nothing else sees.
        let done = unsafe { touch::transfer(call, fd, buffer.mapping.va(), BLOCK, offset) };
        match done.map_err(lost)? {
            count if count < 0 => Err(errno_name(count)),
            count if count.cast_unsigned() < BLOCK => Err(format!("{count} bytes")),
            _ => Ok(()),
        }
    }

    /// Has what was written kept.
    ///
    /// # Errors
    /// The name of the errno.
    pub fn flush(&self) -> Result<(), String> {
        let name = |e: io::Error| {
            e.raw_os_error().map_or_else(|| e.to_string(), |errno| errno_name(-(errno as isize)))
        };
        self.file.sync_data().map_err(name)
    }
}

fn lost(_: Fault) -> String {
    "SIGBUS".to_owned()
}

#[cfg(test)]
impl Buffer {
    /// Maps an empty file in its place: SIGBUS at any access, as poison would give.
    pub fn lose(&self) {
        let path = std::env::temp_dir().join(format!("agent-{}-lost", self.mapping.va()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        self.mapping.map(libc::MAP_SHARED, file.as_raw_fd()).unwrap();
    }
}
