//! Guest memory for code that touches it itself: devices, loaders, whatever works with plain loads and stores.
//!
//! A load from a bad page is a SIGBUS that no handler can make good, and QEMU's, Cloud Hypervisor's and Firecracker's
//! devices die of it. Three layers keep a VMM's own threads alive; each can be had without the others:
//!
//! 1. **Known pages are not touched.** What a relay knows to be bad is marked in a table that is read without a lock:
//!    [`is_bad`], [`Handle::is_bad`](crate::Handle::is_bad). With feature `vm-memory`, `GuardedRegion` is a region for
//!    vm-memory of which `get_slice()` is an error where a page is marked, and with it everything that vm-memory and
//!    virtio-queue do. While no page is marked, that is one relaxed load.
//! 2. **Code that copies by [`read`], [`write()`], [`load`], [`store()`] and [`compare_exchange`]** gets an error where a page
//!    turns out to be bad that nobody knew of (the SIGBUS handler goes on behind the copy). That costs nothing while memory is
//!    whole, and makes no system call. (On other processors than x86-64 and aarch64 they make one for each piece,
//!    process_vm_writev(2), and no access is one of a whole word.)
//! 3. **Code that is not ours** (vm-memory's volatile accesses, virtio-queue) works in a second mapping of shared guest
//!    memory, the *view* (`GuardedRegion` has one of shared memory). In the view the handler puts a scratch page in the place of the
//!    bad one: a load gives zeros, a store is lost. So nothing that was read may be let out (to a disk, a wire, or the
//!    guest), and nothing counts as written, before [`Attempt::is_clean`] has said that no scratch page came into use
//!    meanwhile. KVM's mapping is another one, and keeps its poison.
//!
//! However a page is found, it is marked at once, and a relay enters it as [`FoundBy::Access`](crate::FoundBy::Access)
//! and tells the guest, which has it no less than the VMM.
//!
//! All of it needs the relay's SIGBUS handler: start a relay first, or call [`set_up`](crate::signal::set_up). A host's
//! own handler calls [`handle_in`](crate::signal::handle_in), as only that has the registers. A thread that blocks SIGBUS
//! is ended by the kernel at such an access.

#[cfg(target_arch = "aarch64")]
mod aarch64;
pub(crate) mod areas;
mod attempt;
mod bits;
mod copy;
mod doubt;
#[cfg(feature = "vm-memory")]
mod region;
mod taken;
mod view;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use areas::is_bad;
pub(crate) use areas::{
    Registered, all_new, as_the_guest_has_it, clear, has_view, is_any_marked, mark, mark_only,
    marked, register, replaced,
};
pub use attempt::Attempt;
pub(crate) use attempt::set_wake;
pub use copy::{BadMemory, Word, compare_exchange, load, read, store, write};
#[cfg(feature = "vm-memory")]
pub use region::GuardedRegion;
pub(crate) use taken::{Touched, guest_ram, recover, recover_by_other_name};
