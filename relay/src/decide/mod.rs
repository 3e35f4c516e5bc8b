//! What is told next, and when: state machines that read no clock, take no lock and make no calls out.

mod banks;
pub mod firmware;
pub mod machine_check;
pub mod pace;
pub(crate) mod rounds;
mod standing;
pub mod step;
