//! The places in this process at which the guest has a request's buffers.

use std::io;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::machine::devices::virtio::queue::Segment;
use crate::machine::memory::DeviceMemory;

/// The host addresses at which the guest has the first `len` bytes of `segments`.
///
/// # Errors
/// EFAULT if one of them is not RAM; they are shorter.
pub(super) fn host_places(
    memory: &DeviceMemory,
    segments: &[Segment],
    len: u64,
) -> io::Result<Vec<libc::iovec>> {
    let (mut places, mut left) = (Vec::new(), len);
    for segment in segments {
        let (mut addr, mut rest) = (segment.addr.0, u64::from(segment.len).min(left));
        left -= rest;
        while rest > 0 {
            let not_ram = || io::Error::from_raw_os_error(libc::EFAULT);
            let (region, at) = memory.to_region_addr(GuestAddress(addr)).ok_or_else(not_ram)?;
            let some = rest.min(region.len() - at.0);
            let iov_base = region.get_host_address(at).map_err(io::Error::other)?.cast();
            let iov_len = usize::try_from(some).map_err(io::Error::other)?;
            places.push(libc::iovec { iov_base, iov_len });
            addr += some;
            rest -= some;
        }
    }
    if left == 0 { Ok(places) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

/// Whether the page may be read at all, be it bad: a stretch that was taken out of guest memory may not.
fn is_mapped(page: *const u8) -> bool {
    // SAFETY: advice on a page of guest memory, which changes nothing.
    let asked = unsafe { libc::madvise(page.cast_mut().cast(), 1, libc::MADV_POPULATE_READ) };
    asked == 0 || io::Error::last_os_error().raw_os_error() == Some(libc::EHWPOISON)
}

/// The kernel did not say which page it was, nor whom it told: each is touched, so that the relay learns of it.
pub(super) fn find_bad_page(places: &[libc::iovec]) {
    const PAGE: usize = 4096;
    for place in places {
        let start: *const u8 = place.iov_base.cast();
        let first = start.map_addr(|addr| addr & !(PAGE - 1));
        for at in (0..place.iov_len + PAGE).step_by(PAGE) {
            let page = first.wrapping_add(at);
            if page.addr() < start.addr() + place.iov_len && is_mapped(page) {
                // SAFETY: a byte of guest memory, within the page that the place begins or goes on in; it may be read.
                let _ = unsafe { mce_relay::guard::read(page, &mut [0]) };
            }
        }
    }
}
