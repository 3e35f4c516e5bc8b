//! A region of guest memory for vm-memory that gives no bad page out.

use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;

use vm_memory::bitmap::BS;
use vm_memory::mmap::MmapRegion;
use vm_memory::{
    Address, AtomicAccess, Bytes, FileOffset, GuestAddress, GuestMemoryError, GuestMemoryRegion,
    GuestRegionMmap, MemoryRegionAddress, ReadVolatile, VolatileSlice, WriteVolatile,
    bitmap::Bitmap,
};

use super::areas::{self, Registered};
use crate::memory::page_size::page_shift;
use crate::types::PAGE_SHIFT;

type Result<T> = std::result::Result<T, GuestMemoryError>;

/// A region of guest memory of which [`get_slice`](GuestMemoryRegion::get_slice), and with it all that vm-memory and
/// virtio-queue do, is an error (EHWPOISON) where a page is known to be bad. Memory of such regions is
/// `GuestRegionCollection<GuardedRegion>`, in the place of `GuestMemoryMmap`:
///
/// ```
/// use mce_relay::guard::GuardedRegion;
/// use vm_memory::{Bytes, GuestAddress, GuestRegionCollection, MmapRegion};
///
/// type GuestRegionMmap = GuardedRegion<()>;
/// type GuestMemoryMmap = GuestRegionCollection<GuestRegionMmap>;
///
/// let region = GuestRegionMmap::new(MmapRegion::new(0x10000)?, GuestAddress(0)).ok_or("too long")?;
/// let memory = GuestMemoryMmap::from_regions(vec![region])?;
/// memory.write_obj(7_u32, GuestAddress(0x1000))?;
/// assert_eq!(memory.read_obj::<u32>(GuestAddress(0x1000))?, 7);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Of shared memory (a file mapped MAP_SHARED: a memfd, hugetlbfs) it has a second mapping, the view, which slices are of.
/// There a page that goes bad under a device's hands becomes a scratch page; the device asks
/// [`Attempt::is_clean`](super::Attempt::is_clean) before anything that it read is let out. Of private memory there is no
/// view: a page that nobody knows of is a SIGBUS yet, and only known pages are kept away from.
///
/// Where a page of a huge page has gone bad under a device's hands, the others may be good, and the relay finds out. An
/// access to one of them waits for that, for half a second at most.
///
/// [`get_host_address`](GuestMemoryRegion::get_host_address) is that of the guest's own mapping, for KVM's memory slots, for
/// [`RamRegion`](crate::RamRegion) and for system calls, which answer with EFAULT where a page is bad.
#[derive(Debug)]
pub struct GuardedRegion<B = ()> {
    // Goes before the mapping and its file do.
    registered: Registered,
    inner: GuestRegionMmap<B>,
    /// Where the memory that slices are of begins: a host address.
    devices: usize,
    len: usize,
}

impl<B: Bitmap + vm_memory::bitmap::NewBitmap> GuardedRegion<B> {
    /// As [`GuestRegionMmap::new`]: `mapping` at guest-physical `base`. `None` also where the process has too many regions
    /// (512), or no more memory; the log says which.
    #[must_use]
    pub fn new(mapping: MmapRegion<B>, base: GuestAddress) -> Option<Self> {
        let inner = GuestRegionMmap::new(mapping, base)?;
        Self::over(inner)
            .inspect_err(|error| log::error!("guest memory cannot be guarded: {error}"))
            .ok()
    }

    /// Guards `inner`.
    ///
    /// # Errors
    /// The process has too many regions (512), or the second mapping cannot be had.
    pub fn over(inner: GuestRegionMmap<B>) -> io::Result<Self> {
        Self::guard(inner, true)
    }

    /// Guards `inner` without a view, for a guest without devices: of a page that it has mapped twice the kernel sends a
    /// process two signals, and what a rescue puts in the place of a huge page has to be memory that can be mapped twice.
    ///
    /// # Errors
    /// The process has too many regions (512).
    pub fn without_view(inner: GuestRegionMmap<B>) -> io::Result<Self> {
        Self::guard(inner, false)
    }

    fn guard(inner: GuestRegionMmap<B>, with_view: bool) -> io::Result<Self> {
        let start = inner.as_ptr().expose_provenance() as u64;
        let hvas = start..start + GuestMemoryRegion::len(&inner);
        let shared = inner.flags() & libc::MAP_SHARED != 0;
        let registered = match GuestMemoryRegion::file_offset(&inner) {
            Some(of) => {
                let shift = page_shift(of.file());
                // Of a device (/dev/zero, say) two mappings need not be the same memory.
                let is_file = of.file().metadata()?.is_file();
                match with_view && shared && is_file && inner.prot() & libc::PROT_WRITE != 0 {
                    true => {
                        let fd = of.file().as_raw_fd();
                        areas::register_with_view(&hvas, shift, fd, of.start())?
                    }
                    false => areas::register(&hvas, shift)?,
                }
            }
            None => areas::register(&hvas, PAGE_SHIFT)?,
        };
        // A host address fits a usize, and so does what is mapped.
        let devices =
            usize::try_from(registered.view().unwrap_or(start)).map_err(io::Error::other)?;
        let len = usize::try_from(hvas.end - start).map_err(io::Error::other)?;
        Ok(Self { registered, inner, devices, len })
    }
}

impl<B> GuardedRegion<B> {
    /// Whether devices have a mapping of their own.
    #[must_use]
    pub fn has_view(&self) -> bool {
        self.registered.view().is_some()
    }
}

impl<B> Deref for GuardedRegion<B> {
    type Target = GuestRegionMmap<B>;

    fn deref(&self) -> &GuestRegionMmap<B> {
        &self.inner
    }
}

impl<B: Bitmap> GuestMemoryRegion for GuardedRegion<B> {
    type B = B;

    fn len(&self) -> u64 {
        GuestMemoryRegion::len(&self.inner)
    }

    fn start_addr(&self) -> GuestAddress {
        self.inner.start_addr()
    }

    fn bitmap(&self) -> BS<'_, B> {
        GuestMemoryRegion::bitmap(&self.inner)
    }

    fn get_host_address(&self, addr: MemoryRegionAddress) -> Result<*mut u8> {
        self.inner.get_host_address(addr)
    }

    fn file_offset(&self) -> Option<&FileOffset> {
        GuestMemoryRegion::file_offset(&self.inner)
    }

    #[inline]
    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, B>>> {
        let at = usize::try_from(offset.raw_value()).unwrap_or(usize::MAX);
        let is_within = at <= self.len && count <= self.len - at;
        if !is_within || self.registered.area().refuses(at as u64, count as u64) {
            return Err(refusal(is_within));
        }
        let start = std::ptr::with_exposed_provenance_mut::<u8>(self.devices);
        // SAFETY: so many bytes from `at` on are within the region, and as many within its view, which both live as long as
        // this, which is borrowed.
        Ok(unsafe {
            let bitmap = self.inner.deref().bitmap().slice_at(at);
            VolatileSlice::with_bitmap(start.add(at), count, bitmap, None)
        })
    }

    fn is_hugetlbfs(&self) -> Option<bool> {
        GuestMemoryRegion::is_hugetlbfs(&self.inner)
    }
}

/// Why there is no slice: a page of it is bad, or it is not within the region.
#[cold]
fn refusal(is_within: bool) -> GuestMemoryError {
    match is_within {
        true => GuestMemoryError::IOError(io::Error::from_raw_os_error(libc::EHWPOISON)),
        false => GuestMemoryError::InvalidBackendAddress,
    }
}

impl<B: Bitmap> GuardedRegion<B> {
    /// As much of `len` bytes at `addr` as the region has: one page that is bad elsewhere is none of this access's.
    fn part(&self, addr: MemoryRegionAddress, len: usize) -> Result<VolatileSlice<'_, BS<'_, B>>> {
        let left = GuestMemoryRegion::len(self).checked_sub(addr.raw_value());
        let left = left.filter(|left| *left > 0 || len == 0);
        let left = left.ok_or(GuestMemoryError::InvalidBackendAddress)?;
        self.get_slice(addr, len.min(usize::try_from(left).unwrap_or(usize::MAX)))
    }
}

impl<B: Bitmap> Bytes<MemoryRegionAddress> for GuardedRegion<B> {
    type E = GuestMemoryError;

    fn write(&self, buf: &[u8], addr: MemoryRegionAddress) -> Result<usize> {
        Ok(self.part(addr, buf.len())?.write(buf, 0)?)
    }

    fn read(&self, buf: &mut [u8], addr: MemoryRegionAddress) -> Result<usize> {
        Ok(self.part(addr, buf.len())?.read(buf, 0)?)
    }

    fn write_slice(&self, buf: &[u8], addr: MemoryRegionAddress) -> Result<()> {
        Ok(self.part(addr, buf.len())?.write_slice(buf, 0)?)
    }

    fn read_slice(&self, buf: &mut [u8], addr: MemoryRegionAddress) -> Result<()> {
        Ok(self.part(addr, buf.len())?.read_slice(buf, 0)?)
    }

    fn read_volatile_from<F: ReadVolatile>(
        &self,
        addr: MemoryRegionAddress,
        src: &mut F,
        count: usize,
    ) -> Result<usize> {
        Ok(self.part(addr, count)?.read_volatile_from(0, src, count)?)
    }

    fn read_exact_volatile_from<F: ReadVolatile>(
        &self,
        addr: MemoryRegionAddress,
        src: &mut F,
        count: usize,
    ) -> Result<()> {
        Ok(self.part(addr, count)?.read_exact_volatile_from(0, src, count)?)
    }

    fn write_volatile_to<F: WriteVolatile>(
        &self,
        addr: MemoryRegionAddress,
        dst: &mut F,
        count: usize,
    ) -> Result<usize> {
        Ok(self.part(addr, count)?.write_volatile_to(0, dst, count)?)
    }

    fn write_all_volatile_to<F: WriteVolatile>(
        &self,
        addr: MemoryRegionAddress,
        dst: &mut F,
        count: usize,
    ) -> Result<()> {
        Ok(self.part(addr, count)?.write_all_volatile_to(0, dst, count)?)
    }

    fn store<T: AtomicAccess>(
        &self,
        val: T,
        addr: MemoryRegionAddress,
        order: Ordering,
    ) -> Result<()> {
        Ok(self.part(addr, size_of::<T>())?.store(val, 0, order)?)
    }

    fn load<T: AtomicAccess>(&self, addr: MemoryRegionAddress, order: Ordering) -> Result<T> {
        Ok(self.part(addr, size_of::<T>())?.load(0, order)?)
    }
}
