//! The commands, without `run` and `poison`.

pub mod check;
pub mod dump;
pub mod ending;
pub mod inject;
pub mod list;
pub mod manual;
pub mod map;
pub mod mark;
pub mod pages;
pub mod report;
pub mod retire;
pub mod status;
pub mod watch;
