//! Data types that all of the component shares: what a memory failure is, what is known of a page, and why a guest is
//! not told of it. No behaviour.

mod kind;
mod reason;
mod rescue;
#[cfg(feature = "serde")]
mod serde_with;
mod state;

pub use kind::{Caught, FailureKind, PAGE_SHIFT, PAGE_SIZE};
pub use reason::{FallbackReason, UndeliverableReason, WaitReason};
pub use rescue::{RescueRefusal, RescueStep, Rescued};
#[cfg(feature = "serde")]
pub use serde_with::{hex, hex_option};
#[cfg(feature = "serde")]
pub(crate) use serde_with::{unix_time, unix_time_option};
pub use state::{Form, FoundBy, Place, State};
