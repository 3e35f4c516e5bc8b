//! The host's side of a disk: a raw file, a block device, or a qcow2 image.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::buffer::Buffer;
use super::lock::{self, Locked};
use super::qcow2;
use crate::config::{DiskConfig, ImageType};

/// Bytes in a sector of the protocol.
const SECTOR: u64 = 512;

/// Why a disk cannot be had.
#[derive(Debug, Error)]
pub enum DiskError {
    /// It cannot be opened.
    #[error("cannot open the disk {}{}", path.display(), advice(*readonly))]
    Open {
        /// Its path.
        path: PathBuf,
        /// How.
        readonly: bool,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It is neither a file nor a block device.
    #[error("the disk {} is neither a regular file nor a block device", path.display())]
    Kind {
        /// Its path.
        path: PathBuf,
    },
    /// Somebody has it already.
    #[error(
        "the disk {} is in use: another process (QEMU and qemu-img count) or another --disk of this VM has it open for \
         writing, or for reading while this VM wants to write; readonly=on lets several read it",
        path.display()
    )]
    Locked {
        /// Its path.
        path: PathBuf,
    },
    /// What it is was not said.
    #[error(
        "the disk {} begins as a qcow2 image does: image_type=qcow2 opens it as one, image_type=raw gives the guest \
         the file as it is (a guest that wrote this itself must not choose what the host opens)",
        path.display()
    )]
    Ambiguous {
        /// Its path.
        path: PathBuf,
    },
    /// It is not a qcow2 image that can be used.
    #[error("cannot use the disk {} as a qcow2 image: {fault}{}", path.display(), way_out(fault, path))]
    Qcow2 {
        /// Its path.
        path: PathBuf,
        /// What is wrong with it.
        fault: qcow2::Fault,
    },
    /// There is not one sector on it.
    #[error(
        "the disk {} has {len} bytes; expected 512 at least (`truncate -s SIZE FILE` makes a raw one as long as it is to be)",
        path.display()
    )]
    Small {
        /// Its path.
        path: PathBuf,
        /// Its length.
        len: u64,
    },
}

fn advice(readonly: bool) -> &'static str {
    if readonly { "" } else { " for writing (readonly=on opens it for reading)" }
}

/// What to do about a fault.
fn way_out(fault: &qcow2::Fault, path: &Path) -> String {
    let path = path.display();
    match fault {
        qcow2::Fault::Unsound { .. } => format!(
            "; `qemu-img check -r all {path}` repairs what can be repaired, a backup has what was cut off"
        ),
        qcow2::Fault::Unsupported { .. } => {
            format!("; `qemu-img convert -O qcow2 {path} NEW` makes a disk without")
        }
        qcow2::Fault::Read { .. } | qcow2::Fault::Open(_) => String::new(),
    }
}

/// Where the bytes are.
enum Image {
    Raw {
        file: File,
        /// The same by way of the page cache, for direct I/O that is not aligned.
        unaligned: Option<File>,
    },
    Qcow2 {
        image: Box<qcow2::Image>,
        /// Its lock is held as long as this is open.
        _lock: File,
    },
}

/// A disk.
pub struct Disk {
    path: PathBuf,
    image: Image,
    /// In bytes.
    len: u64,
    readonly: bool,
    direct: bool,
    is_device: bool,
    id: String,
    block_size: u32,
    /// What was written before may be lost, although a later flush would succeed.
    lost: bool,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("id", &self.id).field("len", &self.len).finish_non_exhaustive()
    }
}

impl Disk {
    /// Opens what `config` names, and locks it against others that would write.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn open(config: &DiskConfig) -> Result<Self, DiskError> {
        let DiskConfig { path, readonly, direct, .. } = config;
        let error = |source| DiskError::Open { path: path.clone(), readonly: *readonly, source };
        // Looked at before it is opened: opening a FIFO would wait for its other end.
        let kind = std::fs::metadata(path).map_err(error)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind { path: path.clone() });
        }
        let open = |flags| {
            let mut options = File::options();
            options.read(true).write(!readonly).custom_flags(flags).open(path).map_err(error)
        };
        let file = open(if *direct { libc::O_DIRECT } else { 0 })?;
        lock(&file, path, *readonly)?;
        let buffered = open(0)?;
        if !is_same(&file, &buffered).map_err(error)? {
            return Err(error(io::Error::other("it was replaced meanwhile")));
        }
        let is_qcow2 = begins_as_qcow2(&buffered);
        let id = config.id.clone().unwrap_or_default();
        let block_size = if *direct { direct_alignment(&file) } else { 512 };
        let (image, len) = match config.image_type {
            None if is_qcow2 => return Err(DiskError::Ambiguous { path: path.clone() }),
            None | Some(ImageType::Raw) => {
                let len = (&file).seek(SeekFrom::End(0)).map_err(error)?;
                (Image::Raw { file, unaligned: direct.then_some(buffered) }, len)
            }
            Some(ImageType::Qcow2) => {
                let own = file.try_clone().map_err(error)?;
                let image = qcow2::Image::open(own, &buffered, *readonly);
                let image =
                    image.map_err(|fault| DiskError::Qcow2 { path: path.clone(), fault })?;
                let len = image.size();
                (Image::Qcow2 { image: Box::new(image), _lock: file }, len)
            }
        };
        if len < SECTOR {
            return Err(DiskError::Small { path: path.clone(), len });
        }
        if let Some(words) = warning_of_rest(path, len, config.image_type) {
            log::warn!("{words}");
        }
        let (readonly, direct, is_device) = (*readonly, *direct, kind.is_block_device());
        let path = path.clone();
        Ok(Self { path, image, len, readonly, direct, is_device, id, block_size, lost: false })
    }

    /// What it is in.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length in sectors of 512 bytes; what is left over at its end the guest does not have.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.len / SECTOR
    }

    /// The unit of its I/O, in bytes.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Whether it is only read.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.readonly
    }

    /// What it is called, of which the guest sees 20 bytes.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The file, if the kernel can put what is read into the guest's memory by itself. Not by direct I/O: it
    /// writes to the pages that were there when the read began, and a huge page may be replaced meanwhile.
    #[must_use]
    pub fn copied_from(&self) -> Option<&File> {
        match &self.image {
            Image::Raw { file, .. } if !self.direct => Some(file),
            _ => None,
        }
    }

    /// Reads what is at `at` into `bytes`.
    ///
    /// # Errors
    /// The disk's.
    pub fn read(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        match &self.image {
            Image::Raw { .. } => self.raw_for(at, bytes)?.read_exact_at(bytes, at),
            Image::Qcow2 { image, .. } => image.read(at, bytes),
        }
    }

    /// Writes `bytes` at `at`.
    ///
    /// # Errors
    /// The disk's; it is read-only.
    pub fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.check_writable()?;
        match &self.image {
            Image::Raw { .. } => self.raw_for(at, bytes)?.write_all_at(bytes, at),
            Image::Qcow2 { image, .. } => image.write(at, bytes),
        }
    }

    /// The open file of a raw image to move `bytes` at `at` with.
    fn raw_for(&self, at: u64, bytes: &[u8]) -> io::Result<&File> {
        let Image::Raw { file, unaligned } = &self.image else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let block = u64::from(self.block_size);
        let is_aligned = at.is_multiple_of(block) && (bytes.len() as u64).is_multiple_of(block);
        // The kernel keeps the two in step: what is in the page cache is written before a direct read, and dropped by a
        // direct write.
        Ok(unaligned.as_ref().filter(|_| !is_aligned).unwrap_or(file))
    }

    /// Has what was written stay, also when the host loses power.
    ///
    /// # Errors
    /// The disk's. Once it has failed it fails from then on: the kernel tells of a lost write once, and a later flush
    /// that succeeds would say that it is there.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.readonly {
            return Ok(());
        }
        if self.lost {
            return Err(io::Error::other("an earlier flush has failed"));
        }
        let synced = match &self.image {
            Image::Raw { file, .. } => file.sync_data(),
            // First what imago keeps of its tables, which it still has if that fails, then all of it.
            Image::Qcow2 { image, .. } => image.write_tables().map(|()| image.sync())?,
        };
        self.lost = synced.is_err();
        synced
    }

    /// Leaves nothing of what was written in this process alone, where it would end with the process.
    ///
    /// # Errors
    /// The disk's.
    pub fn settle(&self) -> io::Result<()> {
        match &self.image {
            Image::Qcow2 { image, .. } if !self.readonly => image.write_tables(),
            _ => Ok(()),
        }
    }

    /// The guest does not need what is at `at` any more.
    ///
    /// # Errors
    /// The disk's; it is read-only.
    pub fn discard(&mut self, at: u64, len: u64) -> io::Result<()> {
        self.check_writable()?;
        let done = match &mut self.image {
            Image::Raw { file, .. } => punch(file, at, len),
            Image::Qcow2 { image, .. } => image.discard(at, len),
        };
        match done {
            // It is a hint.
            Err(error) if is_unsupported(&error) => Ok(()),
            done => done,
        }
    }

    /// Has zeros at `at`, which may be a hole then if `unmaps`.
    ///
    /// # Errors
    /// The disk's; it is read-only.
    pub fn write_zeroes(&mut self, at: u64, len: u64, unmaps: bool) -> io::Result<()> {
        self.check_writable()?;
        let done = match &mut self.image {
            // Of a block device that does not promise zeros afterwards the kernel refuses it.
            Image::Raw { file, .. } if unmaps => punch(file, at, len),
            Image::Raw { file, .. } => fallocate(file, libc::FALLOC_FL_ZERO_RANGE, at, len),
            Image::Qcow2 { image, .. } => image.write_zeroes(at, len),
        };
        match done {
            Err(error) if is_unsupported(&error) => {
                static ZEROS: AlignedZeros = AlignedZeros([0; 64 << 10]);
                let mut done = 0;
                while done < len {
                    let some = (len - done).min(ZEROS.0.len() as u64);
                    let zeros = usize::try_from(some).unwrap_or(0);
                    self.write(at + done, &ZEROS.0[..zeros])?;
                    done += some;
                }
                Ok(())
            }
            done => done,
        }
    }

    fn check_writable(&self) -> io::Result<()> {
        if self.readonly { Err(io::ErrorKind::ReadOnlyFilesystem.into()) } else { Ok(()) }
    }

    /// As if the host's disk had blocks of this size.
    #[cfg(test)]
    pub(super) fn tests_only_need_blocks_of(&mut self, size: u32) {
        self.block_size = size;
    }

    /// From now on it is in `file`.
    #[cfg(test)]
    pub(super) fn tests_only_become(&mut self, file: File) {
        self.image = Image::Raw { file, unaligned: None };
    }

    /// Whether it is a block device of the host's.
    #[must_use]
    pub fn is_device(&self) -> bool {
        self.is_device
    }
}

#[repr(C, align(4096))]
struct AlignedZeros([u8; 64 << 10]);

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENODEV | libc::EINVAL))
        || error.kind() == io::ErrorKind::Unsupported
}

fn lock(file: &File, path: &Path, readonly: bool) -> Result<(), DiskError> {
    match lock::take(file, readonly) {
        Locked::Yes => Ok(()),
        Locked::InUse => Err(DiskError::Locked { path: path.into() }),
        Locked::Impossible(error) => {
            log::warn!("the disk {} is not locked against others: {error}", path.display());
            Ok(())
        }
    }
}

/// What to say of a disk that ends within a sector. The guest does not have the rest: were the disk rounded up, as QEMU
/// does it, a write to its end would change the length of the user's file.
fn warning_of_rest(path: &Path, len: u64, image_type: Option<ImageType>) -> Option<String> {
    let rest = len % SECTOR;
    let longer = len.next_multiple_of(SECTOR);
    let path = path.display();
    let way_out = match image_type {
        Some(ImageType::Qcow2) => format!("qemu-img resize -f qcow2 {path} {longer}"),
        None | Some(ImageType::Raw) => format!("truncate -s {longer} {path}"),
    };
    (rest != 0).then(|| {
        format!(
            "the disk {path} has {len} bytes, which is no whole number of sectors of {SECTOR}: the guest does not have the \
             last {rest}; with `{way_out}` it has them, and zeros behind them"
        )
    })
}

fn is_same(one: &File, other: &File) -> io::Result<bool> {
    let (one, other) = (one.metadata()?, other.metadata()?);
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}

fn begins_as_qcow2(file: &File) -> bool {
    let mut magic = [0; qcow2::MAGIC.len()];
    file.read_exact_at(&mut magic, 0).is_ok() && magic == qcow2::MAGIC
}

/// What direct I/O on `file` is aligned to, 512 to 4096 bytes (statx(2), STATX_DIOALIGN of Linux 6.1; an older kernel and
/// some file systems do not say it, and then it is tried).
fn direct_alignment(file: &File) -> u32 {
    const STATX_DIOALIGN: libc::c_uint = 0x2000;
    // SAFETY: statx is plain data, which the call fills; the path is a C string.
    let (done, statx) = unsafe {
        let mut statx: libc::statx = std::mem::zeroed();
        let (fd, path) = (file.as_raw_fd(), c"".as_ptr());
        let done = libc::statx(fd, path, libc::AT_EMPTY_PATH, STATX_DIOALIGN, &raw mut statx);
        (done, statx)
    };
    match statx.stx_dio_offset_align {
        align @ 512..=4096 if done == 0 && align.is_power_of_two() => align,
        _ => tried_alignment(file),
    }
}

fn tried_alignment(file: &File) -> u32 {
    let mut buffer = Buffer::default();
    let works = |align: &u32| {
        let read = file.read_at(buffer.of(*align as usize), 0);
        !read.is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL))
    };
    [512, 1024, 2048].into_iter().find(works).unwrap_or(4096)
}

fn fallocate(file: &File, mode: libc::c_int, at: u64, len: u64) -> io::Result<()> {
    let to_offset = |value| libc::off_t::try_from(value).map_err(io::Error::other);
    let (at, len) = (to_offset(at)?, to_offset(len)?);
    loop {
        // SAFETY: takes numbers only.
        if unsafe { libc::fallocate(file.as_raw_fd(), mode, at, len) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn punch(file: &File, at: u64, len: u64) -> io::Result<()> {
    fallocate(file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, at, len)
}

/// The image at `path`, whoever has it open.
#[cfg(test)]
pub(super) fn tests_only_open(path: &Path) -> imago::FormatAccess<imago::file::File> {
    use imago::FormatDriverBuilder;
    let file = File::options().read(true).write(true).open(path).unwrap();
    let file = imago::file::File::try_from(file).unwrap();
    let builder = imago::qcow2::Qcow2::<imago::file::File>::builder(file).write(true);
    imago::FormatAccess::new(builder.open(imago::DenyImplicitOpenGate::default()).unwrap())
}
