//! Prints the forecast and the outcome of a machine check that the user asks for.

use std::process::ExitCode;

use mce_relay_vmm::api::types::manual_mce::{Forecast, ManualMce, OnVcpu, Outcome};

use crate::output::print::{output, write_json};

/// Prints the forecast.
pub fn forecast(planned: &ManualMce, json: bool) -> ExitCode {
    output(|out| match json {
        true => write_json(out, planned),
        false => writeln!(out, "{}", planned.forecast),
    })
}

/// Prints the outcome. `shown` is the forecast that was printed before. Exit status 1 when the record was to be
/// injected and is not in the bank.
pub fn manual_mce(shown: Option<&Forecast>, done: &ManualMce, json: bool) -> ExitCode {
    let printed = output(|out| {
        if json {
            return write_json(out, done);
        }
        if shown != Some(&done.forecast) {
            writeln!(out, "by then the guest stood otherwise:\n{}", done.forecast)?;
        }
        done.done.iter().try_for_each(|done| writeln!(out, "{done}"))
    });
    let missing = |done: &OnVcpu| matches!(done.outcome, Outcome::NotThere { .. });
    if done.done.iter().any(missing) { ExitCode::FAILURE } else { printed }
}
