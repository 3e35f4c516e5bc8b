//! The size of the pages in which a file's memory is kept.

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

use crate::types::PAGE_SHIFT;

/// `log2` of the bytes that the host loses as a whole in `file`: those of a page of hugetlbfs, else 12, as transparent
/// huge pages are split.
pub(crate) fn page_shift(file: &File) -> u8 {
    let mut of = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the kernel fills one statfs.
    if unsafe { libc::fstatfs(file.as_raw_fd(), of.as_mut_ptr()) } != 0 {
        return PAGE_SHIFT;
    }
    // SAFETY: the call has worked.
    let of = unsafe { of.assume_init() };
    if of.f_type != libc::HUGETLBFS_MAGIC {
        return PAGE_SHIFT;
    }
    // hugetlbfs reports its page size as the block size.
    u64::try_from(of.f_bsize)
        .map_or(PAGE_SHIFT, |size| size.max(1).ilog2().try_into().unwrap_or(PAGE_SHIFT))
}

#[cfg(test)]
mod tests {
    use std::os::fd::FromRawFd;

    use super::*;

    #[test]
    fn hugetlb_is_told_from_the_rest() {
        // SAFETY: takes a string; the descriptor is checked, and owned by nobody else.
        let memfd = |flags| unsafe {
            let fd = libc::memfd_create(c"pages".as_ptr(), flags);
            (fd >= 0).then(|| File::from_raw_fd(fd))
        };
        assert_eq!(page_shift(&memfd(0).unwrap()), 12);
        // A kernel without hugetlbfs has none; an empty pool does not matter.
        if let Some(huge) = memfd(libc::MFD_HUGETLB | libc::MFD_HUGE_2MB) {
            assert_eq!(page_shift(&huge), 21);
        }
        assert_eq!(page_shift(&File::open("/proc/self/status").unwrap()), 12);
    }
}
