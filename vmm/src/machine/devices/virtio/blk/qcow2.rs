//! qcow2 images: imago has the format, behind a check of all that it would rely on.

use std::any::Any;
use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};

pub use self::fault::Fault;
pub use self::header::MAGIC;
use self::storage::ImageFile;

mod check;
mod counts;
mod fault;
mod header;
mod storage;

/// An image whose tables are sound.
#[derive(Debug)]
pub struct Image(FormatAccess<ImageFile>);

impl Image {
    /// Opens the image in `file`; `buffered` is the same file, open for reading without direct I/O.
    ///
    /// # Errors
    /// See [`Fault`].
    pub fn open(file: File, buffered: &File, readonly: bool) -> Result<Self, Fault> {
        check::check(buffered, readonly)?;
        let opened = contained(|| {
            let image = Qcow2::<ImageFile>::builder(ImageFile::new(file)?)
                .write(!readonly)
                .open(DenyImplicitOpenGate::default())?;
            Ok(FormatAccess::new(image))
        });
        Ok(Self(opened.map_err(Fault::Open)?))
    }

    /// The length of what the guest sees, in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.0.size()
    }

    /// Reads what is at `at`.
    ///
    /// # Errors
    /// The file's; it ends too early; the image's tables have changed.
    pub fn read(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        contained(|| self.0.read(bytes, at))
    }

    /// Writes at `at`.
    ///
    /// # Errors
    /// The file's; the image's tables have changed.
    pub fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        contained(|| self.0.write(bytes, at))
    }

    /// Gives the host's kernel what is kept here of the tables.
    ///
    /// # Errors
    /// The file's.
    pub fn write_tables(&self) -> io::Result<()> {
        contained(|| self.0.flush())
    }

    /// Has the file on its disk.
    ///
    /// # Errors
    /// The file's.
    pub fn sync(&self) -> io::Result<()> {
        contained(|| self.0.sync())
    }

    /// Frees what is at `at`, whatever is read there afterwards.
    ///
    /// # Errors
    /// The file's; it cannot be done; the image's tables have changed.
    pub fn discard(&mut self, at: u64, len: u64) -> io::Result<()> {
        contained(|| self.0.discard_to_any(at, len))
    }

    /// Has zeros at `at`.
    ///
    /// # Errors
    /// The file's; the format's version has no such thing; the image's tables have changed.
    pub fn write_zeroes(&self, at: u64, len: u64) -> io::Result<()> {
        contained(|| self.0.write_zeroes(at, len))
    }
}

/// A panic of imago's fails what was asked for, and nothing else: what was taken for it is given back while it unwinds.
fn contained<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        Err(io::Error::other(format!("the image's tables are not usable: {}", words_of(&panic))))
    })
}

fn words_of(panic: &Box<dyn Any + Send>) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error() {
        let failed = contained(|| -> io::Result<()> { panic!("table {} is not there", 7) });
        let said = failed.map_err(|error| error.to_string());
        assert_eq!(said, Err("the image's tables are not usable: table 7 is not there".into()));
    }
}
