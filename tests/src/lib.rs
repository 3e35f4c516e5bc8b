//! What the end-to-end tests share: a guest under `mce-relay run`, the agent in it, and the lab.
//!
//! A test says what it saw by panicking; the runner turns that into a failure with its words.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests say what they saw by panicking")]

/// The examples of docs/embedding.md, which run.
#[cfg(doctest)]
#[doc = include_str!("../../docs/embedding.md")]
pub struct Embedding;

pub mod agent;
pub mod burst;
pub mod debian;
pub mod disk_load;
pub mod documents;
pub mod guest;
pub mod history;
pub mod hooked;
pub mod judges;
pub mod lab;
pub mod left;
pub mod line;
pub mod memory;
pub mod network;
pub mod pty;
pub mod qemu;
pub mod ready;
pub mod schema;
pub mod spinning;
pub mod stuck;
pub mod suite;
pub mod tiny;
