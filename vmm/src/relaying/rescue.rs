//! Who owns guest memory, for the relay that rescues what is left of huge pages: nobody but this process, unless a zone is
//! shared=on.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use mce_relay::{HugePage, MemoryOwner, RescueRefusal, Rescued};

use crate::machine::memory::guest_ram::GuestRam;

/// Guest memory, and the files behind it.
pub(crate) struct Owner(pub(crate) Arc<GuestRam>);

impl MemoryOwner for Owner {
    fn release(&mut self, page: HugePage) -> Result<(BorrowedFd<'_>, u64), RescueRefusal> {
        self.0.file_of(page.hva)
    }

    fn replaced(&mut self, rescued: &Rescued) {
        self.0.has_stand_in(rescued.hva);
    }
}
