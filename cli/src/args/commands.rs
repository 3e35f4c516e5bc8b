//! The command line. Its forms follow Cloud Hypervisor's, as both have the same users.

use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use mce_relay::AoChannel;

use crate::args::inject::InjectArgs;
use crate::args::memory::MemoryCommand;
use crate::args::poison::PoisonArgs;
use crate::args::report::ReportArgs;
use crate::args::run::RunArgs;
use crate::args::values::{Frames, parse_seconds};
use crate::args::vm::VmArg;
use crate::client::names::Which;
use crate::poison::target::PageRange;

/// Runs Linux guests on KVM and tells them of the host's memory errors.
///
/// A first round, on a host that is meant for it or in the lab (make lab), in
/// target/guest-image:
///
///     mce-relay check
///     mce-relay run --name try --kernel vmlinux --initramfs initramfs.cpio \
///         --serial file=/tmp/console &
///     mce-relay poison --vm try --random 1 --via hwpoison-inject
///     mce-relay events --vm try
///     mce-relay status --vm try
///     mce-relay shutdown --vm try
///
/// Without --serial the guest has this terminal, until Ctrl-A x.
#[derive(Debug, Parser)]
#[allow(rustdoc::invalid_rust_codeblocks, reason = "it is shown as it is, and has commands")]
#[command(name = "mce-relay", version, max_term_width = 100, verbatim_doc_comment)]
pub struct Cli {
    /// Say more on stderr: each step of each error (-v), and how (-vv). RUST_LOG overrides it.
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub verbose: u8,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Reads this process's command line. If it is wrong the process ends, with an explanation and exit status 2.
#[must_use]
pub fn parse() -> Cli {
    let cli = Cli::try_parse().unwrap_or_else(|error| {
        // The most common mistake: a VM's name without its option.
        let stray = error
            .get(ContextKind::InvalidArg)
            .filter(|_| error.kind() == ErrorKind::UnknownArgument);
        if let Some(ContextValue::String(word)) = stray
            && word.parse::<Which>().is_ok()
            // Only for a command that takes a VM.
            && error.to_string().contains("--vm")
        {
            let _ = error.print();
            eprintln!("\nA VM is named by --vm: --vm {word}");
            std::process::exit(error.exit_code());
        }
        error.exit()
    });
    if let Err(error) = cli.check() {
        error.exit();
    }
    cli
}

impl Cli {
    /// Checks combinations of values.
    pub(crate) fn check(&self) -> Result<(), clap::Error> {
        match &self.command {
            Command::Run(args) if args.ao_channel == AoChannel::Mce && args.ghes_poll.is_some() => {
                let words = "--ghes-poll says how the guest looks for firmware-first records, and with \
                             --ao-channel mce it is given none; leave one of the two out";
                Err(wrong("run", ErrorKind::ArgumentConflict, words))
            }
            Command::Run(args)
                if !args.memory_zone.is_empty()
                    && args.memory.as_ref().is_some_and(|memory| memory.0.size != 0) =>
            {
                let words = "--memory and --memory-zone both say what guest RAM is; leave --memory out, \
                             or give it as size=0";
                Err(wrong("run", ErrorKind::ArgumentConflict, words))
            }
            Command::Run(args)
                if !args.devices().is_empty()
                    && args.zones().iter().any(|zone| zone.guest_memfd) =>
            {
                let words = "guest_memfd=on is for a guest without virtio devices (--disk, --rng, --net, --vsock, \
                             --console): of a page that goes bad under a device's hands the VMM would end";
                Err(wrong("run", ErrorKind::ArgumentConflict, words))
            }
            Command::Poison(args) => {
                args.check().map_err(|(kind, words)| wrong("poison", kind, words))
            }
            Command::Pages { gpa, map: false, .. } if gpa.is_empty() => {
                let words = "which pages? --gpa LIST, or --map for all of guest RAM";
                Err(wrong("pages", ErrorKind::MissingRequiredArgument, words))
            }
            _ => Ok(()),
        }
    }
}

/// An error in the arguments of `command`, with the usage of that command.
pub(crate) fn wrong(command: &str, kind: ErrorKind, words: &str) -> clap::Error {
    let mut all = Cli::command();
    // Gives subcommands their full names.
    all.build();
    match all.find_subcommand_mut(command) {
        Some(command) => command.error(kind, words),
        None => all.error(kind, words),
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a guest and relay memory errors to it.
    ///
    /// A guest that resets itself, or dies of a triple fault, is started again in the same process,
    /// with good memory in place of what went bad.
    ///
    /// Options of the form key=value,key=value take each key once, and a comma in a value is written twice: --disk
    /// path=/a,,b is the file /a,b.
    ///
    /// Exit status: 0 the guest powered off, or the API ended it; 1 it could not be started, or this
    /// program failed; 2 the command line is wrong; 3 the guest reset itself, or was reset (with --no-reboot);
    /// 4 triple fault (with --no-reboot, or three in a row right after the start); 5 KVM failed;
    /// 6 the guest touched a bad page and could not be told (with --on-undeliverable stop, or reset
    /// and --no-reboot); 7 memory of this program itself went bad; 8 it made a system call that it does
    /// not need (--seccomp); 128+N ended by signal N.
    Run(Box<RunArgs>),
    /// Show the VMs that were given a name and run, and how each stands; with --all also those that have ended.
    ///
    /// All are asked at the same time, for two seconds; of one that does not answer the state of its process
    /// is shown, and what to do. Of one that has ended: the exit status of its `run`.
    List {
        /// Those of all users that this user may see (of all of them, for root), and those that have ended
        /// and left their events and ledger.
        #[arg(long)]
        all: bool,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Make pages of a running guest go bad, on the host.
    ///
    /// All addresses are checked before the first page is poisoned; then the pages are poisoned as
    /// fast as the kernel takes them, and looked at. Exit status 1 when not all of them are bad; 128+N when
    /// signal N (Ctrl-C is 2) ended it before all were tried: the others are as they were.
    /// What is not the VM's own memory, such as the host's zero page, is left alone. What goes with a page
    /// is said before it goes, and with --dry-run.
    ///
    /// Most means need root and a host kernel with memory failure handling, and really take the page
    /// out of use on this host: use the lab (make lab) unless the host is meant for it. uffd and signal
    /// need neither.
    Poison(Box<PoisonArgs>),
    /// Take host pages that software poisoned back into use.
    ///
    /// Needs root and the hwpoison-inject module. The kernel refuses it from the first real
    /// hardware error on, and einj and mce-inject count as one. End the VM first: a page that is still in use
    /// cannot be given back.
    Unpoison {
        /// The host's page frame numbers, as `poison` prints them, and ranges of them: 0x and digits, or decimal;
        /// a range is all from its start to before its end. `poison --json` has those of many pages.
        #[arg(long, required = true, value_name = "LIST", value_delimiter = ',')]
        pfn: Vec<Frames>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Inject a machine check into a guest.
    ///
    /// Says first what KVM and a Linux guest would do about it, as the vCPU is at that moment, and injects nothing that
    /// the guest may not survive without --force. The relay takes no part in it, and no page goes bad.
    Inject(Box<InjectArgs>),
    /// Show a running VM's bad pages, and what became of each.
    ///
    /// Of a named VM that has ended: how it did, and its last ledger.
    Status {
        /// Which VM.
        #[command(flatten)]
        vm: VmArg,
        /// Show it again whenever something happens, until the VM ends or Ctrl-C. Of a VM that has ended
        /// already what it has left is printed once, and the exit status is 0.
        #[arg(long)]
        follow: bool,
        /// Print JSON; with --follow one line for each time.
        #[arg(long)]
        json: bool,
    },
    /// Show what has happened to a running VM: each step of each error, and each change of the VM.
    ///
    /// The last 16,384 events are kept. Of a named VM that has ended: how it did, and the last of its events, 1
    /// MiB and more. Exit status 1 when the VM does not answer.
    Events {
        /// Which VM.
        #[command(flatten)]
        vm: VmArg,
        /// Go on with what happens from now on, until the VM ends or Ctrl-C. Of a VM that has ended
        /// already what it has left is printed, and the exit status is 0.
        #[arg(long)]
        follow: bool,
        /// Print JSON, one line for each event, as docs/events.md has it.
        #[arg(long)]
        json: bool,
    },
    /// Write what has happened to a VM's memory as a page for a browser: the bad pages, what became of each, and when.
    ///
    /// The page is one file that needs no network: a map of the memory, every bad page with its timeline, how long it took
    /// to tell the guest, and the events themselves. docs/report.md says what is in it.
    ///
    /// Events of a newer version are counted, and so are lines that are no events; neither is an error. Exit status 1
    /// when the events cannot be read or the report cannot be written; a report that was there is left as it is then.
    Report(ReportArgs),
    /// Show what the host has behind guest pages, and what the ledger says of them.
    ///
    /// Page frames, flags and counts are root's to see; everything else is shown to whoever may use
    /// the VM's API socket.
    Pages {
        /// Which VM.
        #[command(flatten)]
        vm: VmArg,
        /// Guest-physical addresses and ranges, as for `poison`.
        #[arg(long, value_name = "LIST", value_delimiter = ',')]
        gpa: Vec<PageRange>,
        /// Draw all of guest RAM as a map instead.
        #[arg(long, conflicts_with = "gpa")]
        map: bool,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Have a running guest stop using pages that are whole and predicted to fail.
    ///
    /// The guest is told by a firmware-first record (a corrected error past its threshold). Linux then
    /// moves what is in the page elsewhere and never uses it again; nothing is lost, and no process is
    /// signalled. Returns when the guest has taken the record for every page; what it did with a page
    /// only its own log and /proc/meminfo (HardwareCorrupted) say. Exit status 1 when a page could not
    /// be told of, with the reason.
    Retire {
        /// Which VM.
        #[command(flatten)]
        vm: VmArg,
        /// Guest-physical addresses and ranges, as for `poison`.
        #[arg(long, value_name = "LIST", required = true, value_delimiter = ',')]
        gpa: Vec<PageRange>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Read a running guest's memory, bad pages or not.
    ///
    /// The VM does the reading, so a bad page is reported and harms neither the VM nor its guest. A
    /// guest that runs meanwhile changes what is being read; `mce-relay pause` holds it still.
    Memory {
        /// What to do with it.
        #[command(subcommand)]
        command: MemoryCommand,
    },
    /// Hold all vCPUs of a running VM; returns when none of them is in the guest any more.
    ///
    /// Memory errors are still taken meanwhile, and told when the VM goes on.
    Pause {
        /// Which VM.
        #[command(flatten)]
        vm: VmArg,
    },
    /// Let a paused VM go on.
    ///
    /// If it was paused because the guest touched a bad page and could not be told
    /// (--on-undeliverable pause), the vCPU touches the page again, and if the guest still cannot be
    /// told, the VM is paused again.
    Resume {
        /// Which VM.
        #[command(flatten)]
        vm: VmArg,
    },
    /// Ask a running guest to power itself off, by its power button.
    ///
    /// Returns when the guest has done so and the VM has ended. The button is ACPI's: a Linux guest powers
    /// off if something in it listens to that button (systemd-logind or acpid, with the kernel's module
    /// button). Exit status 1 when the guest cannot be asked, or has not ended in time; it goes on then,
    /// and --now ends it.
    Shutdown {
        /// Which VM.
        #[command(flatten)]
        vm: VmArg,
        /// Do not ask the guest: end the VM at once, paused or not, as if its power went off.
        #[arg(long, conflicts_with = "timeout")]
        now: bool,
        /// How long to wait for the guest's end, in seconds; 0: only ask.
        #[arg(long, default_value = "60", value_name = "SECONDS", value_parser = parse_seconds)]
        timeout: u32,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Have a running guest start over, paused or not, as if it had reset itself.
    ///
    /// The guest is not asked: this is a machine's reset button. It finds good memory where pages went
    /// bad. Returns when the next boot has begun. A VM of `run --no-reboot` ends instead (exit status 1
    /// here, 3 of `run`).
    Reset {
        /// Which VM.
        #[command(flatten)]
        vm: VmArg,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show what this host and its kernel offer, and what to do about what is missing.
    ///
    /// Exit status 1 when something is missing without which no error can be relayed.
    Check {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print completions for a shell: `source <(mce-relay completions bash)`.
    Completions {
        /// Which shell.
        #[arg(value_enum)]
        shell: Shell,
    },
    /// Write the manual pages, one for each command, into a directory.
    Man {
        /// Where to; made if it is not there.
        #[arg(value_name = "DIR")]
        dir: PathBuf,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_vm_is_named_once() {
        let parse = |more: &[&str]| {
            Cli::try_parse_from(["mce-relay", "status"].iter().chain(more).copied())
        };
        for good in [&["--vm", "a"][..], &["--api-socket", "/x"], &["--vm", "./x"]] {
            parse(good).unwrap();
        }
        for bad in [&[][..], &["--vm", "a", "--api-socket", "/x"], &["--vm", ""]] {
            parse(bad).unwrap_err();
        }
    }
}
