//! A minimal virtual machine monitor for KVM that relays memory errors to its guest: everything that runs in a VM's
//! process. The commands that ask it, and all output for people, are in the crate `mce-relay-cli`.
//!
//! From the bottom: [`words`] and [`number`]; [`api::types`], the data that goes over the wire; [`outlets`],
//! [`sandbox`] and [`host`], the process and its surroundings; [`machine`], which can run without a relay and has the
//! traits in [`machine::vm`] and [`machine::vcpu`] for one to plug into; [`mce_inject`], the relay's back end;
//! [`relaying`], which connects the machine and the relay; [`events`] and [`api`], by which people and programs see it;
//! and [`session`], one `mce-relay run`.

pub mod api;
pub mod config;
pub mod events;
pub mod host;
pub mod machine;
pub mod mce_inject;
pub mod number;
pub mod outlets;
pub mod relaying;
pub mod sandbox;
pub mod session;
pub mod words;
