//! A minimal virtual machine monitor for KVM that relays memory errors to its guest: everything that runs in the
//! process of a VM. The commands that ask it, and all that draws, are the crate `mce-relay-cli`.
//!
//! From the bottom: [`words`] and [`number`]; [`api::types`], the data that goes over the wire; [`outlets`],
//! [`sandbox`] and [`host`], the process and what is around it; [`machine`], which can be run without a relay and
//! into which whoever relays errors plugs in by the traits of [`machine::vm`] and [`machine::vcpu`]; [`mce_inject`],
//! the back end that the relay asks for; [`relaying`], where the machine and the relay meet; [`events`] and [`api`],
//! how people and programs see it; and [`session`], one `mce-relay run`.

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
