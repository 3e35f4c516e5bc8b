//! Asking a running VM: which one, by its API, for as long as it shows that it is there; its agent; and what one left.

pub mod agent;
pub mod answer;
pub mod life;
pub mod names;
pub mod other_users;
pub mod patience;
pub mod record;
pub mod requests;

pub mod ask;
pub mod ending;
pub mod error;
#[cfg(test)]
mod served;
