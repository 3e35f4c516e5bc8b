//! The `mce-relay` command.

use std::process::ExitCode;

use log::LevelFilter;
use mce_relay_vmm::cli::{self, ApiPath, Command, MemoryCommand};
use mce_relay_vmm::{api, check, client, dump, host, last_resort, poison, retire, run, show};

fn fail(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("mce-relay: {}", show::with_causes(error));
    ExitCode::FAILURE
}

/// A request that is answered by its being done.
fn put(socket: &ApiPath, what: &str) -> ExitCode {
    match client::put(&socket.0, what) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn main() -> ExitCode {
    let cli = cli::parse();
    let level = match cli.verbose {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        _ => LevelFilter::Debug,
    };
    env_logger::Builder::new()
        .filter_level(level)
        .parse_default_env()
        .format_timestamp_millis()
        .init();
    match cli.command {
        Command::Run(args) => {
            // Before the relay's handler, which hands on to it. The process's and not the VM's: who runs a
            // VM in a process of their own has their own.
            if let Err(error) = last_resort::install() {
                eprintln!("mce-relay: cannot install a handler for SIGBUS: {error}");
                return ExitCode::FAILURE;
            }
            match run::run(&args) {
                Ok(status) => ExitCode::from(status),
                Err(error) => fail(&error),
            }
        }
        Command::Poison { api_socket, gpa, via, json } => {
            let mut bar = show::Progress::new("poisoning");
            let done = poison::poison_all(&api_socket.0, &gpa, via, &mut |n, of| bar.step(n, of));
            drop(bar);
            match done {
                Ok(burst) => show::burst(&burst, via, json),
                Err(error) => fail(&error),
            }
        }
        Command::Memory { command: MemoryCommand::Read { api_socket, gpa, len, raw, json } } => {
            // Before anything is read: the terminal will not become something else.
            if let (true, Err(error)) = (raw, dump::check_raw()) {
                return fail(&error);
            }
            match dump::read(&api_socket.0, gpa, len) {
                Ok(stretch) if raw => show::raw(&stretch.bytes),
                Ok(stretch) => show::print(&stretch, json),
                Err(error) => fail(&error),
            }
        }
        Command::Memory { command: MemoryCommand::Dump { api_socket, file, json } } => {
            let mut bar = show::Progress::bytes("dumping");
            let done = dump::dump(&api_socket.0, &file, &mut |n, of| bar.advance(n, of));
            drop(bar);
            match done {
                Ok(dumped) => show::print(&dumped, json),
                Err(error) => fail(&error),
            }
        }
        Command::Unpoison { pfn } => match host::unpoison(pfn) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        },
        Command::Status { api_socket, json } => {
            match client::get::<api::Status>(&api_socket.0, "relay.status") {
                Ok(status) => show::status(&status, json),
                Err(error) => fail(&error),
            }
        }
        Command::Retire { api_socket, gpa, json } => {
            let mut bar = show::Progress::new("telling");
            let done = retire::retire(&api_socket.0, &gpa, &mut |n, of| bar.step(n, of));
            drop(bar);
            match done {
                Ok(pages) => show::retired(&pages, json),
                Err(error) => fail(&error),
            }
        }
        Command::Pause { api_socket } => put(&api_socket, "vm.pause"),
        Command::Resume { api_socket } => put(&api_socket, "vm.resume"),
        Command::Check { json } => {
            let report = check::check();
            let printed = show::print(&report, json);
            if report.relays() { printed } else { ExitCode::FAILURE }
        }
    }
}
