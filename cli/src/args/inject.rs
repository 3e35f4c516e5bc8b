//! `mce-relay inject`: a machine check that the user asks for.

use clap::Args;

use crate::args::mca_status::{McgStatusArg, StatusArg};
use crate::args::values::parse_number;
use crate::args::vm::VmArg;

/// A machine check that the user asks for.
#[derive(Debug, Args)]
pub struct InjectArgs {
    /// Which VM.
    #[command(flatten)]
    pub vm: VmArg,
    /// The vCPU that is to get it.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub vcpu: u8,
    /// The bank.
    #[arg(long, default_value_t = 9, value_name = "N")]
    pub bank: u8,
    /// MCi_STATUS: a number, names of bits with + between (VAL+UC+EN+0xc0), or the whole of it by what
    /// it stands for: srao, srar, ucna, deferred, amd-ar.
    #[arg(long, value_name = "STATUS")]
    pub status: StatusArg,
    /// MCG_STATUS: a number or names (MCIP+RIPV). By default what goes with such a whole, and else 0.
    #[arg(long, value_name = "STATUS")]
    pub mcg_status: Option<McgStatusArg>,
    /// MCi_ADDR: guest-physical address of the error.
    #[arg(long, default_value = "0", value_name = "GPA", value_parser = parse_number)]
    pub addr: u64,
    /// MCi_MISC. The default is a physical address of a 4 KiB page.
    #[arg(long, default_value = "0x8c", value_name = "MISC", value_parser = parse_number)]
    pub misc: u64,
    /// Give the other vCPUs a machine check without an error of their own, as Intel's processors do.
    #[arg(long)]
    pub broadcast: bool,
    /// Do it even if the guest may not survive it.
    #[arg(long)]
    pub force: bool,
    /// Only say what would come of it.
    #[arg(long)]
    pub dry_run: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}
