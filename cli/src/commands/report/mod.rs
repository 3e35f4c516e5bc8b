//! `mce-relay report`: what has happened to a VM's memory, as one page for a browser or a printer.
//!
//! [`builder`] makes a [`model::Report`] of a file of events, line by line, and [`html`] a page of that. Neither reads or
//! writes anything; [`source`] and [`save`] do.
//!
//! The events are not trusted, whoever wrote them: whatever is in them is text on the page, and the page runs no script but
//! its own.

pub mod builder;
mod clock;
pub mod command;
pub mod error;
pub mod html;
pub mod huge;
pub mod latency;
mod ledger;
pub mod line;
pub mod memory_map;
pub mod model;
mod pages;
mod predicted;
pub mod raw;
pub mod save;
mod signals;
pub mod source;
#[cfg(test)]
mod tests;
mod totals;
