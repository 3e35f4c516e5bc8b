//! Writes dumps: to a file, or to a stream.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use log::warn;
use mce_relay_vmm::outlets::directory::named;

use super::error::DumpError;
use super::interrupt::Interrupt;

/// The granularity of a file's holes, in bytes.
pub(super) const PAGE: usize = 4096;
static ZEROS: [u8; PAGE] = [0; PAGE];

/// Files that were made here; dropping this removes them unless the dump is complete.
#[derive(Default)]
pub(super) struct Unfinished(Vec<PathBuf>);

impl Unfinished {
    /// Makes a file with mode 0600, as a guest's memory is its owner's only.
    pub(super) fn create(&mut self, path: &Path) -> Result<File, DumpError> {
        let made = File::options().write(true).create_new(true).mode(0o600).open(path);
        let file = made.map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => DumpError::Exists(path.to_owned()),
            _ => DumpError::Create { path: path.to_owned(), source: named(path, source) },
        })?;
        self.0.push(path.to_owned());
        Ok(file)
    }

    /// The dump is complete.
    pub(super) fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        for path in &self.0 {
            if let Err(error) = fs::remove_file(path) {
                warn!("{} is not complete, and cannot be removed: {error}", path.display());
            }
        }
    }
}

/// An output without seeking, written from its beginning on.
pub(super) struct Stream<'a> {
    to: &'a mut dyn Write,
    interrupt: &'a Interrupt,
    /// How many bytes have been written.
    pub(super) at: u64,
}

impl<'a> Stream<'a> {
    pub(super) fn new(to: &'a mut dyn Write, interrupt: &'a Interrupt) -> Self {
        Self { to, interrupt, at: 0 }
    }

    /// Writes `data` at `offset`, with zeros from the last byte up to it.
    pub(super) fn put(&mut self, offset: u64, data: &[u8]) -> Result<(), DumpError> {
        while self.at < offset {
            self.interrupt.check()?;
            let more = usize::try_from(offset - self.at).unwrap_or(PAGE).min(PAGE);
            self.write(&ZEROS[..more])?;
        }
        self.write(data)
    }

    /// Writes zeros up to `offset`, and flushes.
    pub(super) fn end_at(&mut self, offset: u64) -> Result<(), DumpError> {
        self.put(offset, &[])?;
        self.to.flush().map_err(DumpError::WriteStream)
    }

    fn write(&mut self, data: &[u8]) -> Result<(), DumpError> {
        self.to.write_all(data).map_err(DumpError::WriteStream)?;
        self.at += data.len() as u64;
        Ok(())
    }
}

/// Calls `take` with each row of pages of `data` that are not all zeros, and its offset; returns how many bytes these
/// were.
pub(super) fn each_part<E>(
    data: &[u8],
    mut take: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<u64, E> {
    let (mut at, mut taken) = (0, 0);
    while at < data.len() {
        at += leading(&data[at..], true);
        let len = leading(&data[at..], false);
        if len != 0 {
            take(at as u64, &data[at..at + len])?;
        }
        at += len;
        taken += len as u64;
    }
    Ok(taken)
}

/// Length of the pages of zeros (or, if `zeros` is false, of other pages) at the beginning of `data`.
fn leading(data: &[u8], zeros: bool) -> usize {
    let pages = data.chunks(PAGE);
    pages.take_while(|page| (**page == ZEROS[..page.len()]) == zeros).map(<[u8]>::len).sum()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn zeros_are_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let image = File::create_new(dir.path().join("image")).unwrap();
        let write = |gpa, data: &[u8]| {
            each_part(data, |at, part| image.write_all_at(part, gpa + at)).unwrap()
        };
        let mut data = vec![0; 4 * PAGE + 100];
        data[2 * PAGE - 1] = 1;
        assert_eq!(write(0x1000, &data), 4096);
        assert_eq!(image.metadata().unwrap().len(), 0x1000 + 0x2000);
        data[4 * PAGE + 99] = 1;
        assert_eq!(write(0x1000, &data), 4096 + 100);
        assert_eq!(write(0, &[]), 0);
        assert!(fs::read(dir.path().join("image")).unwrap()[0x1000..] == data);
    }

    #[test]
    fn a_stream_has_the_zeros_in_between() {
        let (mut written, interrupt) = (Vec::new(), Interrupt::new());
        let mut stream = Stream::new(&mut written, &interrupt);
        stream.put(0, b"a").unwrap();
        stream.put(5000, b"b").unwrap();
        stream.end_at(20_000).unwrap();
        assert_eq!(stream.at, 20_000);
        let mut expected = vec![0; 20_000];
        (expected[0], expected[5000]) = (b'a', b'b');
        assert!(written == expected);
    }
}
