//! The SIGBUS handler, and how a signal that is not a memory failure of the guest's is handed on.
//!
//! The handler of a memory failure does plain atomic stores and returns; for a touch by the VMM's own code that
//! [`guard`](crate::guard) takes care of it moves RIP behind the copy, or puts a scratch page in place. Each thread that takes
//! part has a slot; the handler finds it by a const-initialised thread-local pointer, copies
//! (code, address, lsb) into it, sets the thread's `immediate_exit` byte so that a KVM_RUN that is
//! about to start ends at once, and is done.
//!
//! Everything else (other codes, an AR on a thread that takes no part) goes to the previous handler, or to the default
//! action with the true `siginfo`, after one line on stderr (`last_words`). No other process can forge a memory
//! failure: the kernel lets it send codes of 0 and below only.
//!
//! A host that keeps a SIGBUS handler of its own ([`Signals::Host`]) calls [`handle`] first in it, and treats what is
//! [`Handled::NotOurs`] as it would without a relay.

mod code;
mod handler;
mod last_words;
mod policy;
mod poll;
mod slot;
mod thread_slot;
mod unblock;
mod wake;

pub use crate::types::Caught;
pub use code::{BUS_MCEERR_AO, BUS_MCEERR_AR};
pub use handler::{Handled, Signals, handle, handle_in, set_up};
pub(crate) use handler::{give_up, send_failure, take_orphan, take_orphan_overrun};
pub use policy::KillPolicy;
pub(crate) use poll::{Poll, is_blocked};
pub(crate) use slot::Slot;
pub use thread_slot::{ExitByte, request_exit};
pub(crate) use thread_slot::{ThreadSlot, is_attached};
pub(crate) use unblock::unblock;
pub(crate) use wake::Wake;
