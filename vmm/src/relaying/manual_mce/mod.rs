//! Machine checks that a user asks for: the forecast, and the way to the vCPU's thread. The relay has no part in them.

pub mod bystander;
pub mod forecast;
pub mod injector;
