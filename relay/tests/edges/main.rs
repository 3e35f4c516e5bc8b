//! The relay off the middle of the road: processors that are offline, unplugged or do not come round, touches that
//! come in twos, pauses, memory that comes and goes, hosts that misbehave.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test says what it saw by panicking")]

#[path = "../forge/mod.rs"]
mod forge;
mod hosts;
mod model;
mod processors;
mod touches;
