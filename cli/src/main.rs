//! The `mce-relay` command.

use std::error::Error;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use env_logger::{Target, WriteStyle};
use log::LevelFilter;
use mce_relay_cli::args::commands::{self, Cli, Command};
use mce_relay_cli::args::inject::InjectArgs;
use mce_relay_cli::args::memory::MemoryCommand;
use mce_relay_cli::args::poison::{MemcgArg, PoisonArgs};
use mce_relay_cli::args::report::ReportArgs;
use mce_relay_cli::args::values;
use mce_relay_cli::args::vm::VmArg;
use mce_relay_cli::client::life::Life;
use mce_relay_cli::client::{agent, error, requests};
use mce_relay_cli::commands::check::report;
use mce_relay_cli::commands::dump::{form, job, stretch};
use mce_relay_cli::commands::list::list;
use mce_relay_cli::commands::report::{command, save, source};
use mce_relay_cli::commands::{ending, inject, manual, map, pages, retire, status, watch};
use mce_relay_cli::output::{print, progress, screen};
use mce_relay_cli::poison::host::filter::Filter;
use mce_relay_cli::poison::host::memcg;
use mce_relay_cli::poison::host::unpoison::unpoison;
use mce_relay_cli::poison::order::{FilterChoice, Order};
use mce_relay_cli::poison::target::PageRange;
use mce_relay_cli::poison::{carry_out, shown, targets};
use mce_relay_vmm::api::types::{manual_mce, vm};
use mce_relay_vmm::relaying::manual_mce::injector;
use mce_relay_vmm::sandbox::allocator;
use mce_relay_vmm::sandbox::sigbus_fallback;
use mce_relay_vmm::sandbox::terminal::stops;
use mce_relay_vmm::session::run;
use mce_relay_vmm::words;

/// The result of a command: its exit status, or an error for the user.
type Outcome = Result<ExitCode, Box<dyn Error>>;

/// A request without an answer beyond its success.
fn put(vm: &VmArg, what: &str) -> Outcome {
    requests::put(&vm.socket()?, what)?;
    Ok(ExitCode::SUCCESS)
}

fn main() -> ExitCode {
    allocator::keep_small();
    let cli = read_command_line();
    screen::look();
    start_log(cli.verbose);
    match carry_out(cli.command) {
        Ok(status) => status,
        Err(error) => {
            // Nobody can be told where stderr cannot be written; the exit status says it.
            let _ = writeln!(io::stderr(), "mce-relay: {}", words::with_causes(&*error));
            ExitCode::FAILURE
        }
    }
}

/// Reads the command line on a thread of its own: the stack that it takes, more than a VM's main thread needs, is given
/// back with the thread.
fn read_command_line() -> Cli {
    const STACK: usize = 2 << 20; // whatever RUST_MIN_STACK says
    match thread::Builder::new()
        .name("command-line".into())
        .stack_size(STACK)
        .spawn(commands::parse)
    {
        Ok(reader) => reader.join().unwrap_or_else(|panic| resume_unwind(panic)),
        Err(_) => commands::parse(),
    }
}

/// Decided once here, as a VM's threads may not ask the terminal when they log.
fn start_log(verbose: u8) {
    let level = match verbose {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        _ => LevelFilter::Debug,
    };
    let coloured = match std::env::var(env_logger::DEFAULT_WRITE_STYLE_ENV).as_deref() {
        Ok("always") => true,
        Ok("never") => false,
        _ => screen::stderr().colour,
    };
    env_logger::Builder::new()
        .filter_level(level)
        // It logs as errors what a guest can cause as often as it likes; the devices tell of it within limits.
        .filter_module("virtio_queue", LevelFilter::Off)
        .parse_default_env()
        .write_style(if coloured { WriteStyle::Always } else { WriteStyle::Never })
        // Given the standard error as its target, env_logger would use anstream, which asks with each line whether that
        // is a terminal.
        .target(Target::Pipe(Box::new(io::stderr())))
        .format_timestamp_millis()
        // A path in the source means nothing to a user.
        .format_target(false)
        .init();
}

/// The result of a command for a named VM that has ended; `None` for any other VM.
fn from_record(command: &Command) -> Option<Outcome> {
    match command {
        Command::Status { vm, follow, json } => vm.record().map(|record| {
            if *follow {
                let what = watch::the_last(true, "what it has left:");
                eprintln!("mce-relay: {}; {what}", record.headline());
            }
            Ok(status::record(&record, *json))
        }),
        Command::Events { vm, follow, json } => vm.record().map(|record| {
            watch::record(&record, *follow, *json)?;
            Ok(ExitCode::SUCCESS)
        }),
        _ => None,
    }
}

fn carry_out(command: Command) -> Outcome {
    if let Some(outcome) = from_record(&command) {
        return outcome;
    }
    Ok(match command {
        Command::Run(args) => {
            // Installed before the relay's handler, which hands on to it. Installed here, not by the VM, as a program
            // that runs a VM in its own process has its own handler.
            sigbus_fallback::install()
                .map_err(|error| format!("cannot install a handler for SIGBUS: {error}"))?;
            stops::take_no_stops()
                .map_err(|error| format!("cannot handle the signals of job control: {error}"))?;
            ExitCode::from(run::run(&args.config())?)
        }
        Command::List { all, json } => print::print(&list(all), json),
        Command::Poison(args) => poison_pages(&args)?,
        Command::Unpoison { pfn, json } => shown::unpoisoned(
            &pfn.into_iter()
                .flat_map(values::Frames::numbers)
                .map(|pfn| (pfn, unpoison(pfn)))
                .collect::<Vec<_>>(),
            json,
        ),
        Command::Inject(args) => inject_mce(&args)?,
        Command::Status { vm, follow: true, json } => {
            watch::status(&vm.socket()?, json)?;
            ExitCode::SUCCESS
        }
        Command::Status { vm, follow: false, json } => {
            status::status(&requests::get::<vm::Status>(&vm.socket()?, "relay.status")?, json)
        }
        Command::Events { vm, follow, json } => {
            watch::events(&vm.socket()?, follow, json)?;
            ExitCode::SUCCESS
        }
        Command::Report(args) => make_report(&args)?,
        Command::Pages { vm, map: true, json, .. } => {
            map::print_map(&map::map(&vm.socket()?)?, json)
        }
        Command::Pages { vm, gpa, map: false, json } => {
            let mut bar = progress::Progress::new("looking at");
            let found = pages::pages(&vm.socket()?, &gpa, &mut |n, of| bar.step(n, of));
            drop(bar);
            print::print(&found?, json)
        }
        Command::Retire { vm, gpa, json } => {
            let mut bar = progress::Progress::new("telling");
            let done = retire::retire(&vm.socket()?, &gpa, &mut |n, of| bar.step(n, of));
            drop(bar);
            retire::retired(&done?, json)
        }
        Command::Memory { command } => memory(command)?,
        Command::Pause { vm } => put(&vm, "vm.pause")?,
        Command::Resume { vm } => put(&vm, "vm.resume")?,
        Command::Shutdown { vm, now, timeout, json } => {
            let socket = vm.socket()?;
            let done = if now {
                ending::end(&socket)?
            } else {
                ending::power_off(&socket, Duration::from_secs(timeout.into()))?
            };
            print::print(&done, json)
        }
        Command::Reset { vm, json } => print::print(&ending::reset(&vm.socket()?)?, json),
        Command::Check { json } => {
            let report = report::check();
            let printed = print::print(&report, json);
            if report.relays() { printed } else { ExitCode::FAILURE }
        }
        Command::Completions { shell } => {
            manual::completions(shell, &mut io::stdout())?;
            ExitCode::SUCCESS
        }
        Command::Man { dir } => {
            for page in manual::pages(&dir)? {
                println!("{}", page.display());
            }
            ExitCode::SUCCESS
        }
    })
}

fn make_report(args: &ReportArgs) -> Outcome {
    let ReportArgs { of, output, json } = args;
    let output = output.as_deref().unwrap_or(std::path::Path::new("-"));
    // Checked before anything is read.
    let target = save::Target::check(output, of.events.as_deref(), !json)?;
    let vm = of.vm();
    let material = match &of.events {
        Some(file) => source::file(file)?,
        None => match vm.record() {
            Some(record) => source::record(&record),
            None => source::vm(&vm.socket()?)?,
        },
    };
    Ok(command::report(material, &target, *json)?)
}

fn memory(command: MemoryCommand) -> Outcome {
    Ok(match command {
        MemoryCommand::Read { vm, gpa, len, raw, json } => {
            if raw {
                // Checked before anything is read.
                stretch::check_raw()?;
            }
            let stretch = stretch::read(&vm.socket()?, gpa, len)?;
            if raw { print::raw(&stretch.bytes) } else { print::print(&stretch, json) }
        }
        MemoryCommand::Dump { vm, file, raw, json } => {
            dump_memory(&vm, &file, if raw { form::Form::Raw } else { form::Form::Elf }, json)?
        }
    })
}

fn dump_memory(vm: &VmArg, file: &std::path::Path, form: form::Form, json: bool) -> Outcome {
    let to_stdout = file.as_os_str() == "-";
    if to_stdout {
        // Checked before anything is read.
        job::check_stdout()?;
    }
    let socket = vm.socket()?;
    // Not std's stdout, which buffers by lines.
    let mut stdout = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let target =
        if to_stdout { form::Target::Stream(&mut stdout) } else { form::Target::File(file) };
    let mut bar = progress::Progress::bytes("dumping");
    let done = job::dump(&socket, form, target, &mut |n, of| bar.advance(n, of));
    drop(bar);
    match done {
        Ok(done) => {
            for note in done.notes() {
                eprintln!("mce-relay: note: {note}");
            }
            Ok(if to_stdout { print::print_beside(&done, json) } else { print::print(&done, json) })
        }
        Err(error) => match error.signal().and_then(|signal| u8::try_from(signal).ok()) {
            Some(signal) => {
                eprintln!("mce-relay: {}", words::with_causes(&error));
                Ok(ExitCode::from(128 + signal))
            }
            None => Err(error.into()),
        },
    }
}

/// The pages that `args` name, and the guest's process that has them, if the agent was asked.
fn chosen(
    args: &PoisonArgs,
    socket: &std::path::Path,
) -> Result<(Vec<PageRange>, Option<String>), Box<dyn Error>> {
    if let Some(count) = args.random {
        let seed = args.seed.unwrap_or_else(|| fastrand::u64(..));
        let pages = targets::random(socket, args.via.into(), usize::try_from(count)?, seed)?;
        eprintln!("mce-relay: random pages by --seed {seed}");
        return Ok((pages, None));
    }
    if let (Some(which), Some(agent)) = (&args.pid, &args.agent) {
        let process = agent::process(&agent.0, which, args.max)?;
        let whose = format!("process {} ({})", process.pid, process.comm);
        for page in &process.pages {
            eprintln!(
                "mce-relay: {whose} of the guest has GPA {:#x} at {:#x} ({})",
                page.gpa, page.va, page.area
            );
        }
        let pages = process.pages.iter().map(|page| PageRange::page(page.gpa)).collect();
        return Ok((pages, Some(whose)));
    }
    Ok((args.gpa.clone(), None))
}

fn filter_of(args: &PoisonArgs) -> Result<FilterChoice, Box<dyn Error>> {
    let PoisonArgs { filter_memcg, filter_dev, filter_flags, .. } = args;
    let (dev, flags) = (filter_dev.map(|dev| (dev.0, dev.1)), *filter_flags);
    let memcg = match filter_memcg {
        None => return Ok(FilterChoice::OwnCgroup(Filter { memcg: None, dev, flags })),
        Some(MemcgArg::Nothing) if dev.is_some() || flags.is_some() => None,
        Some(MemcgArg::Nothing) => return Ok(FilterChoice::Nothing),
        Some(MemcgArg::Own) => {
            let vmm: vm::Ping = requests::get_of_process(&args.vm.socket()?, "vmm.ping")?;
            let own = memcg::of(vmm.pid)?.map_err(|none| {
                format!("{none}; give --filter-memcg none to use no such filter")
            })?;
            Some(own.inode)
        }
        Some(MemcgArg::Inode(inode)) => Some(*inode),
        Some(MemcgArg::Path(path)) => {
            let found = std::fs::metadata(path).map_err(|error| {
                format!("cannot look at the cgroup {}: {error}", path.display())
            })?;
            Some(std::os::unix::fs::MetadataExt::ino(&found))
        }
    };
    Ok(FilterChoice::Given(Filter { memcg, dev, flags }))
}

fn poison_pages(args: &PoisonArgs) -> Outcome {
    let socket: PathBuf = args.vm.socket()?;
    let (ranges, whose) = chosen(args, &socket)?;
    let order = Order {
        socket: &socket,
        ranges: &ranges,
        via: args.via.into(),
        kind: args.kind.into(),
        vcpu: args.vcpu,
        filter: filter_of(args)?,
        force: args.force,
        whose,
        dry_run: args.dry_run,
    };
    let prepared = carry_out::prepare(&order)?;
    // Printed before the first page is poisoned.
    print::notes(prepared.notes());
    if args.dry_run {
        return Ok(shown::burst(&prepared.plan(), args.via.into(), args.json));
    }
    let mut bar = progress::Progress::new("poisoning");
    let done = prepared.carry_out(&mut |n, of| bar.step(n, of));
    drop(bar);
    Ok(shown::burst(&done?, args.via.into(), args.json))
}

fn inject_mce(args: &InjectArgs) -> Outcome {
    let InjectArgs { vcpu, bank, addr, misc, broadcast, force, dry_run, .. } = *args;
    let status = args.status.status;
    let mcg_status = args.mcg_status.map_or(args.status.mcg_status, |given| given.0);
    let request = manual_mce::Request {
        vcpu,
        bank,
        status,
        mcg_status,
        addr,
        misc,
        broadcast,
        force,
        dry_run,
    };
    let socket = args.vm.socket()?;
    let life = Life::at(&socket);
    let ask = |dry_run| -> Result<manual_mce::ManualMce, error::ClientError> {
        let request = manual_mce::Request { dry_run, ..request };
        requests::put_json(&socket, "vm.inject", &request).map_err(|error| match &life {
            Some(life) => life.explain(error),
            None => error,
        })
    };
    if dry_run {
        return Ok(inject::forecast(&ask(true)?, args.json));
    }
    if args.json {
        return Ok(inject::manual_mce(None, &ask(false)?, true));
    }
    // The forecast comes first, as the guest may not survive the injection.
    let planned = ask(true)?;
    if planned.forecast.lethal && !force {
        return Err(injector::Refusal::Lethal(planned.forecast).into());
    }
    inject::forecast(&planned, false);
    Ok(inject::manual_mce(Some(&planned.forecast), &ask(false)?, false))
}
