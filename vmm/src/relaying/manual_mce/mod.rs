//! A machine check by hand: what would come of it, and its way to the vCPU's thread. The relay has no part in it.

pub mod bystander;
pub mod forecast;
pub mod injector;
