//! Which VM a command is about.

use std::path::PathBuf;

use clap::Args;

use crate::args::values::ApiPath;
use crate::client::names::{self, FindError, Which};
use crate::client::record::Record;

/// Which running VM a command is about.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct VmArg {
    /// The VM: its name (`run --name`), or the path of its API socket. `mce-relay list` shows which run.
    #[arg(long, value_name = "NAME|PATH")]
    pub vm: Option<Which>,
    /// API socket of the VM (path=PATH or PATH).
    #[arg(long, value_name = "path=PATH")]
    pub api_socket: Option<ApiPath>,
}

impl VmArg {
    /// The path of the VM's API socket.
    ///
    /// # Errors
    /// No VM of that name runs.
    pub fn socket(&self) -> Result<PathBuf, FindError> {
        match (&self.vm, &self.api_socket) {
            (Some(which), _) => names::find(which),
            (None, Some(ApiPath(path))) => Ok(path.clone()),
            // clap requires one of the two.
            (None, None) => Ok(PathBuf::new()),
        }
    }

    /// The record of the VM, if it is named and has ended.
    #[must_use]
    pub fn record(&self) -> Option<Record> {
        match &self.vm {
            Some(Which::Name(name)) => names::record(name),
            _ => None,
        }
    }
}
