//! `mce-relay report`: of what a report is made, and where it goes.

use std::path::PathBuf;

use clap::Args;

use crate::args::values::ApiPath;
use crate::args::vm::VmArg;
use crate::client::names::Which;

/// Of what a report is made: a VM, or a file.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct ReportOf {
    /// The VM: its name (`run --name`), or the path of its API socket. `mce-relay list` shows which run. One that has
    /// ended has left its last events.
    #[arg(long, value_name = "NAME|PATH")]
    vm: Option<Which>,
    /// API socket of the VM (path=PATH or PATH).
    #[arg(long, value_name = "path=PATH")]
    api_socket: Option<ApiPath>,
    /// A file of events, as `run --event-monitor` and `events --json` write it; - is stdin.
    #[arg(long, value_name = "FILE")]
    pub events: Option<PathBuf>,
}

impl ReportOf {
    /// The VM, if it is not of a file.
    #[must_use]
    pub fn vm(&self) -> VmArg {
        VmArg { vm: self.vm.clone(), api_socket: self.api_socket.clone() }
    }
}

/// The arguments of `report`.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// Of what.
    #[command(flatten)]
    pub of: ReportOf,
    /// Where to write it; a file that is there is replaced when the new one is complete. - is stdout, and with --json
    /// it may be left out.
    #[arg(short, long, value_name = "FILE", required_unless_present = "json")]
    pub output: Option<PathBuf>,
    /// Write what the report says as JSON instead.
    #[arg(long)]
    pub json: bool,
}
