//! What a piece of guest RAM is made of: one mapping, and the file behind it if there is one.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::Arc;
use std::{io, ptr};

use vm_memory::FileOffset;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};

use super::block::PAGE_SIZE;
use super::error::MemoryError;
use super::pool;
use crate::config::{MemoryZone, PageSize};

/// Mappings start at a multiple of this at least, so that the host can use huge pages in both its own
/// page tables and the guest's.
const ALIGNMENT: u64 = 2 << 20;
/// f_type of hugetlbfs (include/uapi/linux/magic.h).
const HUGETLBFS_MAGIC: u32 = 0x9584_58f6;
/// f_type of tmpfs, likewise.
const TMPFS_MAGIC: u32 = 0x0102_1994;

/// The file of a zone, and the pages it comes in. Mappings of the zone share it.
pub(super) struct Opened {
    file: Option<Arc<File>>,
    /// In bytes.
    pub(super) page_size: u64,
    memfd: bool,
    guest_memfd: bool,
}

/// Opens what `zone` is to be made of.
pub(super) fn open(zone: &MemoryZone) -> Result<Opened, MemoryError> {
    let page_size = zone.page_size.bytes();
    if zone.guest_memfd {
        return Ok(Opened { file: None, page_size: PAGE_SIZE, memfd: false, guest_memfd: true });
    }
    let Some(path) = &zone.file else {
        // Of huge pages, too, so that the good part of one that goes bad can be read: `relaying::rescue`.
        let memfd_backed = zone.shared || zone.viewed || page_size > PAGE_SIZE;
        let file = if memfd_backed { Some(Arc::new(memfd(zone.page_size)?)) } else { None };
        return Ok(Opened { file, page_size, memfd: memfd_backed, guest_memfd: false });
    };
    let error = |source| MemoryError::File { path: path.clone(), source };
    // Looked at before it is opened: opening a FIFO would wait for its other end.
    let meta = std::fs::metadata(path).map_err(error)?;
    if !meta.is_file() || meta.file_type().is_fifo() {
        return Err(MemoryError::NotAFile { path: path.clone() });
    }
    // A private mapping is never written back.
    let file = File::options().read(true).write(zone.shared).open(path).map_err(error)?;
    if meta.len() < zone.size {
        let (found, wanted) = (meta.len(), zone.size);
        return Err(MemoryError::ShortFile { path: path.clone(), found, wanted });
    }
    if zone.shared && !zone.lossy && !says_what_is_lost(&file).map_err(error)? {
        return Err(MemoryError::Lossy { path: path.clone() });
    }
    if !zone.shared {
        // Of what is on the disk as well a bad page is read again as it is. A file system that cannot has no disk.
        let _ = file.sync_data();
    }
    let page_size = page_size_of(&file).map_err(error)?;
    Ok(Opened { file: Some(Arc::new(file)), page_size, memfd: false, guest_memfd: false })
}

/// Checks that no two zones are the same memory: each zone of a file begins at the file's beginning, so a bad page
/// would be bad in both.
pub(super) fn check_distinct(zones: &[MemoryZone], opened: &[Opened]) -> Result<(), MemoryError> {
    let mut seen: Vec<(u64, u64, usize)> = Vec::new();
    for (number, (zone, opened)) in (1..).zip(zones.iter().zip(opened)) {
        // What is written to a private zone stays in it; a memfd is nobody else's.
        let (true, Some(path), Some(file)) = (zone.shared, &zone.file, &opened.file) else {
            continue;
        };
        let error = |source| MemoryError::File { path: path.clone(), source };
        let meta = file.metadata().map_err(error)?;
        let is_it = |(dev, ino, _): &&(u64, u64, usize)| (*dev, *ino) == (meta.dev(), meta.ino());
        if let Some(&(_, _, first)) = seen.iter().find(is_it) {
            let first_path = zones[first - 1].file.clone().unwrap_or_default();
            let (second, second_path) = (number, path.clone());
            return Err(MemoryError::SameFile { first, first_path, second, second_path });
        }
        seen.push((meta.dev(), meta.ino(), number));
    }
    Ok(())
}

impl Opened {
    /// Gives a new file its size.
    pub(super) fn size(&self, zone: &MemoryZone) -> Result<(), MemoryError> {
        let bytes = zone.size;
        match &self.file {
            Some(file) if self.memfd => {
                file.set_len(bytes).map_err(|source| MemoryError::Resize { bytes, source })
            }
            _ => Ok(()),
        }
    }
}

/// Whether the host signals each page of `file` that goes bad, also one that was written to. Of a file system with a
/// disk behind it such a page is dropped and read again, stale (`me_pagecache_dirty`, mm/memory-failure.c).
fn says_what_is_lost(file: &File) -> io::Result<bool> {
    let in_memory = [TMPFS_MAGIC, HUGETLBFS_MAGIC];
    Ok(in_memory.contains(&magic(&stat(file)?)) || is_dax(file))
}

/// Whether the file's pages are the storage itself.
fn is_dax(file: &File) -> bool {
    let flag = u64::from(libc::STATX_ATTR_DAX.cast_unsigned());
    // SAFETY: statx is plain data, which the call fills; the path is a C string.
    unsafe {
        let mut statx: libc::statx = std::mem::zeroed();
        let done =
            libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, 0, &raw mut statx);
        done == 0 && statx.stx_attributes & flag != 0
    }
}

fn stat(file: &File) -> io::Result<libc::statfs> {
    // SAFETY: statfs is plain data, and fstatfs fills it.
    unsafe {
        let mut stat: libc::statfs = std::mem::zeroed();
        match libc::fstatfs(file.as_raw_fd(), &raw mut stat) {
            0 => Ok(stat),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn magic(stat: &libc::statfs) -> u32 {
    u32::try_from(stat.f_type).unwrap_or(0)
}

/// The pages that the mappings of `file` come in: a file of hugetlbfs has that of its mount.
fn page_size_of(file: &File) -> io::Result<u64> {
    let stat = stat(file)?;
    let is_hugetlbfs = magic(&stat) == HUGETLBFS_MAGIC;
    Ok(if is_hugetlbfs { u64::try_from(stat.f_bsize).unwrap_or(PAGE_SIZE) } else { PAGE_SIZE })
}

fn memfd(page_size: PageSize) -> Result<File, MemoryError> {
    let huge = match page_size {
        PageSize::Size4K => 0,
        PageSize::Size2M => libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
        PageSize::Size1G => libc::MFD_HUGETLB | libc::MFD_HUGE_1GB,
    };
    let name = c"guest-ram";
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | huge) };
    if fd < 0 {
        let source = io::Error::last_os_error();
        let page = page_size.bytes();
        return Err(match source.raw_os_error() {
            // The kernel has no such pages.
            Some(libc::ENODEV | libc::EINVAL) if huge != 0 => {
                MemoryError::NoPool { kib: page >> 10 }
            }
            _ => MemoryError::MemFd { page, source },
        });
    }
    // SAFETY: the descriptor was just made and nobody else has it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// One mapping of guest RAM. It goes when this is dropped.
#[derive(Debug)]
pub(super) struct Backing {
    hva: u64,
    len: u64,
    /// In bytes.
    page_size: u64,
    /// The file, and where in it the mapping begins.
    file: Option<(Arc<File>, u64)>,
    /// The file is this process's own.
    memfd: bool,
    /// It is mapped MAP_SHARED: what is written is in the file.
    shared: bool,
    /// Other processes are to map the file, too.
    for_others: bool,
    /// `None` where the pages are none that the host could join.
    thp: Option<bool>,
    prefault: bool,
    /// A guest_memfd takes its place when there is a VM: see [`Self::become_guest_memfd`].
    guest_memfd: bool,
}

impl Backing {
    /// Maps `len` bytes of `zone`, from `offset` in it.
    pub(super) fn map(
        opened: &Opened,
        zone: &MemoryZone,
        offset: u64,
        len: u64,
    ) -> Result<Self, MemoryError> {
        let page_size = opened.page_size;
        let mut backing = Self {
            hva: 0,
            len,
            page_size,
            file: opened.file.as_ref().map(|file| (Arc::clone(file), offset)),
            memfd: opened.memfd,
            shared: zone.shared || opened.memfd,
            for_others: zone.shared,
            thp: (page_size == PAGE_SIZE && !opened.guest_memfd).then_some(zone.thp),
            prefault: zone.prefault,
            guest_memfd: opened.guest_memfd,
        };
        let error = |source: io::Error| MemoryError::Map { bytes: len, page: page_size, source };
        backing.hva = reserve(len, page_size.max(ALIGNMENT)).map_err(error)?;
        match backing.map_at(0, len) {
            Ok(()) => Ok(backing),
            // The pool's own numbers say more than the kernel's ENOMEM.
            Err(source) if page_size > PAGE_SIZE => {
                Err(pool::why_not(len, page_size).unwrap_or_else(|| error(source)))
            }
            Err(source) => Err(error(source)),
        }
    }

    /// Puts memory of this kind in place of whatever is at `start..start + len` (from the mapping's
    /// beginning; whole pages). Where it fails nothing is mapped there any more.
    pub(super) fn map_at(&self, start: u64, len: u64) -> io::Result<()> {
        let huge = match self.page_size {
            PAGE_SIZE => 0,
            page => libc::MAP_HUGETLB | (page_shift(page) << libc::MAP_HUGE_SHIFT),
        };
        // Without MAP_NORESERVE for huge pages: with it an empty pool would be a SIGBUS later.
        let lazy = if huge == 0 { libc::MAP_NORESERVE } else { 0 };
        let (flags, fd, offset) = match (&self.file, self.shared) {
            (None, _) => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | huge | lazy, -1, 0),
            (Some((file, offset)), true) => (libc::MAP_SHARED, file.as_raw_fd(), offset + start),
            (Some((file, offset)), false) => {
                (libc::MAP_PRIVATE | lazy, file.as_raw_fd(), offset + start)
            }
        };
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: MAP_FIXED replaces a part of our own reservation, to which no reference leads.
        let at = unsafe {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(self.at(start), size(len)?, prot, flags | libc::MAP_FIXED, fd, offset)
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        if let Some(thp) = self.thp {
            let advice = if thp { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
            // A kernel without huge pages needs no advice.
            let _ = self.advise(start, len, advice);
        }
        Ok(())
    }

    /// The same for one huge page, without a moment in which nothing is mapped there: the kernel unmaps
    /// what MAP_FIXED replaces before it asks the pool, and another thread could get the place.
    pub(super) fn exchange(&self, start: u64) -> io::Result<()> {
        let len = self.page_size;
        if len == PAGE_SIZE {
            return self.map_at(start, len);
        }
        match self.another(start)?.move_to(self, start) {
            // Linux before 5.16 does not move huge pages.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => self.map_at(start, len),
            done => done,
        }
    }

    /// A mapping of the page at `start` elsewhere.
    fn another(&self, start: u64) -> io::Result<Self> {
        let len = self.page_size;
        let mut other = Self { hva: reserve(len, len)?, len, file: None, ..self.copy() };
        other.file = self.file.as_ref().map(|(file, offset)| (Arc::clone(file), offset + start));
        other.map_at(0, len)?;
        Ok(other)
    }

    /// Makes it a part of `whole`, from `start` on, in place of whatever is there.
    fn move_to(mut self, whole: &Self, start: u64) -> io::Result<()> {
        let (len, flags) = (size(self.len)?, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
        // SAFETY: moves a mapping of our own over another one, to which no reference leads.
        let moved = unsafe { libc::mremap(self.at(0), len, len, flags, whole.at(start)) };
        if moved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        self.hva = 0;
        Ok(())
    }

    /// Puts a huge page that has memory in the place of whatever is at `start`, or leaves that as it is.
    pub(super) fn exchange_for_good(&self, start: u64) -> io::Result<()> {
        let other = self.another(start)?;
        other.advise(0, other.len, libc::MADV_POPULATE_WRITE)?;
        other.move_to(self, start)
    }

    /// The kind of this mapping, and no mapping.
    fn copy(&self) -> Self {
        Self { hva: 0, len: 0, file: None, ..*self }
    }

    /// Puts a mapping that nobody can use at `start..start + len`, so that nothing else of this
    /// process ever comes to lie in the guest's memory.
    pub(super) fn plug(&self, start: u64, len: u64) -> io::Result<()> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // SAFETY: as in `map_at`.
        let at = unsafe { libc::mmap(self.at(start), size(len)?, libc::PROT_NONE, flags, -1, 0) };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// madvise(2) on a part of it.
    pub(super) fn advise(&self, start: u64, len: u64, advice: libc::c_int) -> io::Result<()> {
        // SAFETY: the range is a part of our own mapping, to which no reference leads.
        match unsafe { libc::madvise(self.at(start), size(len)?, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Gives a part of the file back to its file system; it reads as zeros then. Nothing where there
    /// is no file, or one that is only read.
    pub(super) fn punch(&self, start: u64, len: u64) -> io::Result<()> {
        let Some((file, offset)) = self.file.as_ref().filter(|_| self.shared) else {
            return Ok(());
        };
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let at = libc::off_t::try_from(offset + start).map_err(io::Error::other)?;
        let len = libc::off_t::try_from(len).map_err(io::Error::other)?;
        // SAFETY: takes integers only; the descriptor is open.
        match unsafe { libc::fallocate(file.as_raw_fd(), mode, at, len) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Empties the whole of this process's own file, which other pieces of the same zone are in, too: all of them start
    /// over.
    pub(super) fn empty(&self) -> io::Result<()> {
        let Some((file, _)) = self.file.as_ref().filter(|_| self.memfd) else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let len = file.metadata()?.len();
        file.set_len(0)?;
        file.set_len(len)
    }

    /// Gives a part of it memory, if that was asked for.
    pub(super) fn prefault(&self, start: u64, len: u64) -> io::Result<()> {
        // Before there is a VM a guest_memfd's place is empty, and after it the memory is the last one's.
        match self.prefault && !self.guest_memfd {
            true => self.advise(start, len, libc::MADV_POPULATE_WRITE),
            false => Ok(()),
        }
    }

    /// Puts `file`, a guest_memfd as long as this mapping, in its place. The mapping keeps it alive.
    pub(super) fn become_guest_memfd(&self, file: &File) -> io::Result<()> {
        let (prot, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
        // SAFETY: as in `map_at`.
        let at =
            unsafe { libc::mmap(self.at(0), size(self.len)?, prot, flags, file.as_raw_fd(), 0) };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Maps all of a guest_memfd: of what this process has not mapped the host signals nothing, and nobody sees whether there
    /// is anything.
    pub(super) fn map_all(&self) -> io::Result<()> {
        self.advise(0, self.len, libc::MADV_POPULATE_WRITE)
    }

    /// Whether it is a guest_memfd, as long as there is a VM.
    pub(super) fn is_guest_memfd(&self) -> bool {
        self.guest_memfd
    }

    /// As vm-memory takes it; the mapping stays this value's.
    pub(super) fn region(&self) -> Result<MmapRegion, MemoryError> {
        let error = |what: String| MemoryError::Map {
            bytes: self.len,
            page: self.page_size,
            source: io::Error::other(what),
        };
        let len = size(self.len).map_err(|e| error(e.to_string()))?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = if self.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        // SAFETY: a live mapping of that length, which `GuestRam` drops after what it makes of this
        // (field order).
        let builder =
            unsafe { MmapRegionBuilder::new(len).with_raw_mmap_pointer(self.at(0).cast()) };
        let builder = builder.with_mmap_prot(prot).with_mmap_flags(flags);
        let builder = match &self.file {
            Some((file, offset)) => {
                builder.with_file_offset(FileOffset::from_arc(Arc::clone(file), *offset))
            }
            None => builder,
        };
        builder.build().map_err(|e| error(e.to_string()))
    }

    /// Where it is in this process.
    pub(super) fn hva(&self) -> u64 {
        self.hva
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn page_size(&self) -> u64 {
        self.page_size
    }

    pub(super) fn fd(&self) -> Option<i32> {
        self.file.as_ref().map(|(file, _)| file.as_raw_fd())
    }

    /// The file, and where in it the mapping begins.
    pub(super) fn file(&self) -> Option<(&File, u64)> {
        self.file.as_ref().map(|(file, offset)| (&**file, *offset))
    }

    /// Whether the file is one that this process has made for nothing else.
    pub(super) fn is_memfd(&self) -> bool {
        self.memfd
    }

    /// Whether others that map the file see the same memory.
    pub(super) fn is_shared(&self) -> bool {
        self.shared && self.file.is_some()
    }

    /// Whether others are meant to.
    pub(super) fn is_for_others(&self) -> bool {
        self.for_others
    }

    fn at(&self, start: u64) -> *mut libc::c_void {
        // 64-bit hosts only.
        ptr::with_exposed_provenance_mut(usize::try_from(self.hva + start).unwrap_or(usize::MAX))
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        if self.hva != 0
            && let Ok(len) = size(self.len)
        {
            // SAFETY: our own mapping, which nobody uses any more (see `GuestRam`).
            unsafe { libc::munmap(self.at(0), len) };
        }
    }
}

fn size(len: u64) -> io::Result<usize> {
    usize::try_from(len).map_err(io::Error::other)
}

fn page_shift(page: u64) -> libc::c_int {
    libc::c_int::try_from(page.trailing_zeros()).unwrap_or(0)
}

/// Address space of `len` bytes at a multiple of `align`, which nobody can use yet.
fn reserve(len: u64, align: u64) -> io::Result<u64> {
    let all = size(len.checked_add(align).ok_or_else(|| io::Error::other("too large"))?)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice changes nothing that exists.
    let base = unsafe { libc::mmap(ptr::null_mut(), all, libc::PROT_NONE, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let start = base.expose_provenance() as u64;
    let hva = start.next_multiple_of(align);
    let trim = |from: u64, to: u64| {
        if let (true, Ok(at), Ok(len)) = (to > from, usize::try_from(from), size(to - from)) {
            // SAFETY: a part of the new mapping that nobody has been told of.
            unsafe { libc::munmap(ptr::with_exposed_provenance_mut(at), len) };
        }
    };
    trim(start, hva);
    trim(hva + len, start + all as u64);
    Ok(hva)
}
