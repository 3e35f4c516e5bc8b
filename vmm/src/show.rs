//! Results for people: tables and colour on a terminal, plain text in a pipe, JSON on request.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use comfy_table::{Cell, Color, ContentArrangement, Table, presets};
use mce_relay::ledger::State;
use serde::Serialize;

use crate::api::Status;

/// Prints `value` on stdout, as JSON or as its text. A reader that goes away is no error.
pub fn print(value: &(impl Serialize + std::fmt::Display), json: bool) -> ExitCode {
    let mut out = io::stdout().lock();
    let written = if json {
        serde_json::to_writer_pretty(&mut out, value)
            .map_err(io::Error::from)
            .and_then(|()| writeln!(out))
    } else {
        writeln!(out, "{value}")
    };
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mce-relay: cannot write the result: {error}");
            ExitCode::FAILURE
        }
    }
}

/// An empty table: with lines and colour on a terminal, in bare columns anywhere else.
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    if io::stdout().is_terminal() {
        table.load_style(presets::UTF8_FULL_CONDENSED);
        table.set_content_arrangement(ContentArrangement::Dynamic);
    } else {
        table.load_style(presets::NOTHING);
        table.force_no_tty();
    }
    table.set_header(header);
    table
}

/// A VM's status, as `mce-relay status` shows it.
#[derive(Serialize)]
#[serde(transparent)]
pub struct StatusView(pub Status);

impl std::fmt::Display for StatusView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Status { vm, pages } = &self.0;
        writeln!(
            f,
            "pid {}, boot {}, {} vCPUs, {:?}-style guest, MCG_CAP {}, {:?} kill",
            vm.pid, vm.boot, vm.vcpus, vm.vendor, vm.mcg_cap, vm.mce_kill
        )?;
        if pages.is_empty() {
            return f.write_str("no bad pages");
        }
        let mut table = table(&["GPA", "HVA", "kind", "signals", "outcome"]);
        for page in pages {
            let colour = match page.state {
                State::Acknowledged { .. } => Color::Green,
                State::Undeliverable { .. } => Color::Red,
                _ => Color::Yellow,
            };
            table.add_row([
                Cell::new(format!("{:#x}", page.gpa)),
                Cell::new(format!("{:#x}", page.hva)),
                Cell::new(page.kind),
                Cell::new(page.signals),
                Cell::new(page.state).fg(colour),
            ]);
        }
        write!(f, "{table}")
    }
}
