//! How a Linux kernel gets into guest RAM, and what a vCPU finds when it starts.

pub mod error;
pub mod layout;
pub mod load;
pub mod mp_table;
pub mod place;
pub mod pvh;
pub mod regs;
pub mod reset_vector;
#[cfg(test)]
pub(crate) mod tiny;
pub mod zero_page;
