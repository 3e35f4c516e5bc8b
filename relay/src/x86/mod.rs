//! What is x86's alone. A back end for another architecture has its place beside this one.

pub(crate) mod back_end;
pub mod mca;
