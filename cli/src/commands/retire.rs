//! `mce-relay retire`: makes a running guest stop using pages that are whole and predicted to fail.

use std::path::Path;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

use mce_relay::{Predicted, State};
use mce_relay_vmm::api::types::limits;
use mce_relay_vmm::api::types::pages::{self, Gpa, Retiring};
use mce_relay_vmm::api::types::pause::PauseReason;
use mce_relay_vmm::api::types::vm::{Status, VmInfo};
use serde::Serialize;

use crate::client::error::ClientError;
use crate::client::life::Life;
use crate::client::requests;
use crate::output::print::{output, write_json};
use crate::output::stretches::runs;
use crate::poison::error::PoisonError;
use crate::poison::target::PageRange;
use crate::poison::targets::targets;

/// How often the VM is asked for the state of the pages.
const LOOK: Duration = Duration::from_millis(50);

/// The outcome for a page that the guest was to stop using.
#[derive(Debug, Serialize)]
pub struct Retired {
    /// Guest-physical address of the page.
    #[serde(with = "mce_relay::hex")]
    pub gpa: u64,
    /// Whether the guest has taken the record.
    pub told: bool,
    /// The outcome in words.
    pub outcome: String,
}

impl std::fmt::Display for Retired {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: GPA {:#x}: {}", self.word(), self.gpa, self.outcome)
    }
}

impl Retired {
    fn word(&self) -> &'static str {
        if self.told { "told" } else { "not told" }
    }
}

/// Why the guest was not asked at all.
#[derive(Debug, thiserror::Error)]
pub enum RetireError {
    /// The VM does not answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// An address is not guest RAM.
    #[error(transparent)]
    Target(#[from] PoisonError),
}

/// Has the guest behind `socket` told of all pages in `ranges`, and waits until each was told or cannot be. `progress`
/// is called with the number of pages that are settled and in all.
///
/// # Errors
/// See [`RetireError`]; or the VM is paused.
pub fn retire(
    socket: &Path,
    ranges: &[PageRange],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Retired>, RetireError> {
    let (pid, vm): (u32, VmInfo) = requests::get_and_pid(socket, "vm.info")?;
    let life = Life::of(socket, pid);
    let gpas: Vec<u64> = targets(&vm, ranges)?.into_iter().map(|target| target.gpa).collect();
    let mut asked: Vec<Retiring> = Vec::with_capacity(gpas.len());
    for some in gpas.chunks(limits::MAX_PAGES) {
        let body = pages::Retire { gpas: some.iter().copied().map(Gpa).collect() };
        let told = requests::put_json::<Vec<Retiring>>(socket, "vm.retire", &body);
        asked.extend(told.map_err(|error| life.explain(error))?);
    }
    let mut retired = Vec::new();
    let mut open = Vec::new();
    for Retiring { gpa: Gpa(gpa), error } in asked {
        match error {
            Some(outcome) => retired.push(Retired { gpa, told: false, outcome }),
            None => open.push(gpa),
        }
    }
    while !open.is_empty() {
        let status: Status = match requests::get(socket, "relay.status") {
            Ok(status) => status,
            // The VM is between two boots, or near its end.
            Err(ClientError::Refused { status: 503, .. }) if !life.ends() => continue,
            Err(error) => {
                let ended = match error {
                    ClientError::Refused { .. } => life.ended(),
                    error => life.explain(error),
                };
                if !matches!(ended, ClientError::Ended { .. }) {
                    return Err(ended.into());
                }
                retired.extend(open.drain(..).map(|gpa| unknown(gpa, &ended)));
                break;
            }
        };
        let again = status.vm.boot != vm.boot;
        // A pause that ends in a moment is not mentioned.
        let stands = status.vm.pause_reason.filter(|reason| *reason != PauseReason::Marking);
        open.retain(|gpa| {
            let page = status.predicted.iter().find(|page| page.gpa == *gpa).filter(|_| !again);
            let done = settled(*gpa, page).or_else(|| stands.as_ref().map(|_| put_off(*gpa)));
            let Some(done) = done else { return true };
            retired.push(done);
            false
        });
        progress(gpas.len() - open.len(), gpas.len());
        if !open.is_empty() {
            sleep(LOOK);
        }
    }
    retired.sort_by_key(|page| page.gpa);
    Ok(retired)
}

/// A page that the guest was to be told of when the VM was paused.
fn put_off(gpa: u64) -> Retired {
    let outcome = "the VM was paused meanwhile; the guest is told when it is resumed";
    Retired { gpa, told: false, outcome: outcome.to_owned() }
}

/// A page that the guest was to be told of when the VM ended.
fn unknown(gpa: u64, ended: &ClientError) -> Retired {
    let outcome = format!("{ended}, and the guest is not known to have taken the record before");
    Retired { gpa, told: false, outcome }
}

/// The outcome for the page at `gpa`, once it is known.
fn settled(gpa: u64, page: Option<&Predicted>) -> Option<Retired> {
    let (told, outcome) = match page.map(|page| page.state) {
        None => (false, "the guest started over, with other memory".to_owned()),
        Some(State::Acknowledged { .. }) => {
            (true, "the guest has taken the record; its own log says what came of it".to_owned())
        }
        Some(State::Undeliverable { why }) => (false, why.to_string()),
        Some(_) => return None,
    };
    Some(Retired { gpa, told, outcome })
}

/// Prints the outcome: pages that the guest was told of on stdout, the others on stderr. Exit status 1 when there are
/// any others.
pub fn retired(pages: &[Retired], json: bool) -> ExitCode {
    let (told, not_told): (Vec<&Retired>, Vec<&Retired>) = pages.iter().partition(|page| page.told);
    let printed = output(|out| {
        if json {
            write_json(out, &pages)
        } else {
            told.iter().try_for_each(|page| writeln!(out, "{page}"))
        }
    });
    for (pages, outcome) in runs(not_told.iter().map(|page| (page.gpa, &page.outcome))) {
        eprintln!("mce-relay: not told: {pages}: {outcome}");
    }
    if not_told.is_empty() { printed } else { ExitCode::FAILURE }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use mce_relay::{FallbackReason, Place, Times, UndeliverableReason, WaitReason};

    use super::*;

    #[test]
    fn told_is_said_of_what_the_guest_has_taken_only() {
        let times = Times::new(SystemTime::UNIX_EPOCH);
        let place = Place::Ghes { record: 1 };
        let no_taker = UndeliverableReason::NoTaker { why: FallbackReason::NoSource };
        for (state, told) in [
            (State::Seen, None),
            (State::Waiting { wait: WaitReason::Pace }, None),
            (State::Injected { place }, None),
            (State::Acknowledged { place }, Some(true)),
            (State::Undeliverable { why: no_taker }, Some(false)),
        ] {
            let page = Predicted { gpa: 0x1000, state, times };
            assert_eq!(settled(0x1000, Some(&page)).map(|page| page.told), told, "{state}");
        }
        assert!(!settled(0x1000, None).unwrap().told);
    }
}
