//! What is for x86 only. A back end for another architecture has its place beside it.

pub(crate) mod back_end;
pub mod mca;
