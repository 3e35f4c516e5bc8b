//! Good memory in the place of a bad page, for a guest that starts over.

use std::io;

use super::map::RamMap;
use super::mapping::advise;
use super::scan::is_poisoned;
use crate::types::PAGE_SIZE;

/// Gives the host's page that the page of 4 KiB at `hva` is in back to the host, and has another one in its place, which
/// reads as zeros, or as a private file has it.
///
/// # Errors
/// There is none to be had: an empty pool of huge pages, a file that was cut short, or the same bad page again.
pub(crate) fn replace(ram: &RamMap, hva: u64) -> io::Result<()> {
    let len = 1_u64 << ram.page_shift(hva);
    let start = hva & !(len - 1);
    // First the page, of a shared mapping, and then this process's entry for it, which says that it is bad.
    let _: io::Result<()> = advise(start, len, libc::MADV_REMOVE);
    advise(start, len, libc::MADV_DONTNEED)?;
    advise(start, len, libc::MADV_POPULATE_WRITE)?;
    match is_poisoned(hva & !(PAGE_SIZE - 1)) {
        true => Err(io::Error::from_raw_os_error(libc::EHWPOISON)),
        false => Ok(()),
    }
}
