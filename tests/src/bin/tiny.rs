//! Writes a guest kernel of two instructions, which runs until its VM is ended: `tiny FILE`.

use std::process::ExitCode;

use mce_relay_tests::{hooked, tiny};

fn main() -> ExitCode {
    let Some(path) = std::env::args_os().nth(1) else {
        eprintln!("usage: tiny FILE");
        return ExitCode::from(2);
    };
    match std::fs::write(&path, tiny::elf(&hooked::SPIN)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tiny: {}: {error}", path.display());
            ExitCode::FAILURE
        }
    }
}
