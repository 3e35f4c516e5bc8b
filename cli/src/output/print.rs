//! Prints to stdout and stderr.

use std::fmt::Display;
use std::io::{self, BufWriter, Write};
use std::process::ExitCode;

use serde::Serialize;

/// Lets `write` write to stdout. A reader that goes away is no error.
pub(crate) fn output(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> ExitCode {
    let mut out = BufWriter::new(io::stdout().lock());
    match write(&mut out).and_then(|()| out.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody can be told where stderr cannot be written either.
            let _ = writeln!(io::stderr(), "mce-relay: cannot write the result: {error}");
            ExitCode::FAILURE
        }
    }
}

pub(crate) fn write_json(out: &mut dyn Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, value)?;
    writeln!(out)
}

/// Prints `value` on stdout, as JSON or as its text. A reader that goes away is no error.
pub fn print(value: &(impl Serialize + Display), json: bool) -> ExitCode {
    output(|out| if json { write_json(out, value) } else { writeln!(out, "{value}") })
}

/// The same on stderr, for when stdout has other data.
pub fn print_beside(value: &(impl Serialize + Display), json: bool) -> ExitCode {
    let mut out = io::stderr().lock();
    let written = if json { write_json(&mut out, value) } else { writeln!(out, "{value}") };
    if written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Writes `bytes` to stdout as they are. A reader that goes away is no error.
pub fn raw(bytes: &[u8]) -> ExitCode {
    output(|out| out.write_all(bytes))
}

/// Prints notes on stderr.
pub fn notes(notes: &[String]) {
    notes.iter().for_each(|note| eprintln!("mce-relay: note: {note}"));
}
