//! Files that are appended to, sockets that others find by their path, and the process at the other end of one. The
//! commands use the last, too.

pub mod directory;
pub mod files;
pub mod peer;
pub mod sockets;
