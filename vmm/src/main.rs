//! The `mce-relay` command.

use std::process::ExitCode;

use clap::Parser;
use log::LevelFilter;
use mce_relay_vmm::cli::{Cli, Command};
use mce_relay_vmm::{api, check, client, host, poison, run, show};

/// Prints an error with its causes, on one line each level.
fn fail(error: &dyn std::error::Error) -> ExitCode {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    eprintln!("mce-relay: {text}");
    ExitCode::FAILURE
}

fn main() -> ExitCode {
    let cli = Cli::parse();
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
        Command::Run(args) => match run::run(&args) {
            Ok(status) => ExitCode::from(status),
            Err(error) => fail(&error),
        },
        Command::Poison { api_socket, gpa, via, json } => {
            match poison::poison(&api_socket.0, gpa, via) {
                Ok(done) => show::print(&done, json),
                Err(error) => fail(&error),
            }
        }
        Command::Unpoison { pfn } => match host::unpoison(pfn) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        },
        Command::Status { api_socket, json } => {
            match client::get::<api::Status>(&api_socket.0, "relay.status") {
                Ok(status) => show::print(&show::StatusView(status), json),
                Err(error) => fail(&error),
            }
        }
        Command::Check { json } => {
            let report = check::check();
            let printed = show::print(&report, json);
            if report.relays() { printed } else { ExitCode::FAILURE }
        }
    }
}
