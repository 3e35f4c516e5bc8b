//! Asks a running VM: finds it, uses its API as long as it responds, and its guest's agent; and reads the record of one
//! that has ended.

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
