//! The host's own means to make a page frame go bad and to limit that to the right frame: hwpoison-inject, its filters,
//! mce-inject, EINJ, and unpoison.

pub mod einj;
pub mod filter;
pub mod host_mce_injector;
pub mod hwpoison_inject;
pub mod memcg;
pub mod unpoison;
