//! `mce-relay memory`: what to do with a guest's memory.

use std::path::PathBuf;

use clap::Subcommand;

use crate::args::values::parse_number;
use crate::args::vm::VmArg;

/// What to do with a guest's memory.
#[derive(Debug, Subcommand)]
pub enum MemoryCommand {
    /// Show some bytes of a running guest's memory.
    ///
    /// As a hexdump with guest-physical addresses, in the form of `hexdump -C`: a `*` stands for
    /// lines like the one before. All bytes or none: when one of them is in a bad page, the error
    /// names its address and how much can be read before it. Exit status 1 then.
    Read {
        /// Which VM.
        #[command(flatten)]
        vm: VmArg,
        /// Guest-physical address of the first byte: 0x and digits, or decimal with K, M, G or T.
        #[arg(long, value_parser = parse_number)]
        gpa: u64,
        /// Number of bytes, 1 or more, in the same forms.
        #[arg(long, default_value = "64", value_parser = parse_number)]
        len: u64,
        /// Write the bytes as they are, to a file or a program; a terminal is refused.
        #[arg(long, conflicts_with = "json")]
        raw: bool,
        /// Print JSON, with the bytes as hexadecimal digits.
        #[arg(long)]
        json: bool,
    },
    /// Write all memory of a running guest to a file.
    ///
    /// FILE is an ELF core of the machine, as crash, drgn and makedumpfile read it: a PT_LOAD for each
    /// stretch of guest RAM, with guest-physical addresses; of a Linux guest its vmcoreinfo, which
    /// is looked for in its memory; and of a paused VM the vCPUs' registers. Bad pages are absent
    /// from it, and a note of its own lists them (MCE_RELAY, docs/dumps.md).
    ///
    /// With --raw the offset in FILE is the guest-physical address. What is no RAM reads as zeros,
    /// and so do bad pages, which FILE.json lists with all else that is to be known of the image.
    ///
    /// FILE is sparse, and readable by its owner alone, as it holds the guest's secrets. If it
    /// cannot be completed (no room, Ctrl-C, the guest started over) it is removed, and the exit status is
    /// 1, or 128+N when signal N ended it; bad pages are no reason. A FILE that was left behind all the same (kill -9) is no ELF
    /// file, or has no FILE.json.
    ///
    /// FILE may be -, for stdout: it is read twice then, to begin with what is bad, and what is
    /// printed otherwise goes to stderr.
    ///
    /// `mce-relay pause` before makes it a dump of one moment.
    Dump {
        /// Which VM.
        #[command(flatten)]
        vm: VmArg,
        /// Where to write it; neither it nor, with --raw, FILE.json may exist. - is stdout.
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Write an image in which the offset is the guest-physical address.
        #[arg(long)]
        raw: bool,
        /// Print JSON: the pages that are bad, and what else is known of the dump.
        #[arg(long)]
        json: bool,
    },
}
