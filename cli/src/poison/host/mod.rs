//! The host's own means of making a page frame go bad, and of keeping it to the right one: hwpoison-inject, its
//! filters, mce-inject, and giving frames back.

pub mod filter;
pub mod host_mce_injector;
pub mod hwpoison_inject;
pub mod memcg;
pub mod unpoison;
