//! The words that all of the component speaks in, as data: what a memory failure is, what is known of a page, and the
//! reasons why it is not told. Nothing here does anything.

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
