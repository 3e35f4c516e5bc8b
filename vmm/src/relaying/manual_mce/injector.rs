//! Injects machine checks that a user asks for. The API passes a request to the vCPU's thread, the only place where a
//! record can be injected.
//!
//! The relay's own records do not come this way, and the relay does not know of these: a bank that one of them fills is
//! a full bank, as if hardware had filled it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mce_relay::Mca;
use mce_relay::mca::{Caps, McaState, Record, status};

use crate::api::types::manual_mce::{Forecast, ManualMce, OnVcpu, Outcome, Request};
use crate::api::types::pause::PauseReason;
use crate::machine::lifecycle::VmControl;
use crate::relaying::manual_mce::{bystander, forecast};

/// How long a vCPU's thread may take until it has carried out a request.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often it is checked whether the VM was paused meanwhile.
const LOOK: Duration = Duration::from_millis(100);

/// Why nothing was injected.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The request is invalid.
    #[error("{0}")]
    Wrong(String),
    /// The guest may not survive it.
    #[error(
        "nothing was injected: the guest may not survive it, and only with --force is it injected then:\n{0}"
    )]
    Lethal(Forecast),
    /// The VM is paused, so no vCPU enters the guest.
    #[error(
        "the VM is paused, and a machine check is given to a vCPU on its way into the guest; resume it first"
    )]
    Paused,
    /// The vCPU's thread did not take the request in time.
    #[error("vCPU {vcpu} did not come round within {s} s; nothing was injected on it", s = PATIENCE.as_secs())]
    Late {
        /// Its index.
        vcpu: u8,
    },
    /// KVM refused.
    #[error("KVM refuses on vCPU {vcpu}: {error}")]
    Kvm {
        /// The vCPU.
        vcpu: u8,
        /// The cause.
        error: io::Error,
    },
}

/// A request to a vCPU's thread.
enum Work {
    /// Report the state.
    Look,
    /// Inject a record, unless the vCPU's state has changed so that the guest would not survive. `states` are the
    /// states of the others.
    Inject { request: Request, record: Record, states: Vec<McaState> },
}

enum Done {
    State(Box<McaState>),
    Injected(OnVcpu),
}

struct Job {
    work: Work,
    answer: SyncSender<Result<Done, Refusal>>,
}

#[derive(Default)]
struct Mailbox {
    /// Whether there is a job: what the vCPU's thread checks before each entry.
    has_job: AtomicBool,
    job: Mutex<Option<Job>>,
}

struct Shared {
    caps: Caps,
    mailboxes: Vec<Mailbox>,
    /// Held during a request, so that there is one at a time.
    turn: Mutex<()>,
}

/// Passes requests to the vCPUs of one VM. Cheap to clone.
#[derive(Clone)]
pub struct Injector(Arc<Shared>);

impl Injector {
    /// For `vcpus` vCPUs, whose guest was shown `caps`.
    #[must_use]
    pub fn new(vcpus: u8, caps: Caps) -> Self {
        let mailboxes = (0..vcpus).map(|_| Mailbox::default()).collect();
        Self(Arc::new(Shared { caps, mailboxes, turn: Mutex::new(()) }))
    }

    /// Carries out `request`. Not to be called on a vCPU's thread.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub fn inject(&self, request: &Request, control: &VmControl) -> Result<ManualMce, Refusal> {
        let Shared { caps, mailboxes, turn } = &*self.0;
        // The lock protects no data that a panic could leave half changed.
        let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
        request.check(mailboxes.len(), caps.banks()).map_err(Refusal::Wrong)?;
        if control.paused_for_long(PATIENCE).is_some() {
            return Err(Refusal::Paused);
        }
        let vcpus = 0..u8::try_from(mailboxes.len()).unwrap_or(u8::MAX);
        let states = vcpus
            .map(|vcpu| match self.ask(vcpu, Work::Look, control)? {
                Done::State(state) => Ok(*state),
                Done::Injected(_) => Err(Refusal::Late { vcpu }),
            })
            .collect::<Result<Vec<_>, _>>()?;
        let forecast = forecast::forecast(request, caps, &states);
        if request.dry_run {
            return Ok(ManualMce { forecast, done: Vec::new() });
        }
        if forecast.lethal && !request.force {
            return Err(Refusal::Lethal(forecast));
        }
        let mut done = Vec::new();
        for (vcpu, state) in (0..).zip(&states) {
            let record = match vcpu == request.vcpu {
                true => request.record(),
                false if !request.broadcast => continue,
                false => bystander::bystander_record(request),
            };
            if vcpu != request.vcpu && state.waits_for_sipi {
                let (bank, why) = (record.bank, "the guest has not started it".to_owned());
                done.push(OnVcpu { vcpu, bank, outcome: Outcome::Skipped { why } });
                continue;
            }
            let work = Work::Inject { request: *request, record, states: states.clone() };
            match self.ask(vcpu, work, control) {
                Ok(Done::Injected(outcome)) => done.push(outcome),
                Ok(Done::State(_)) => return Err(Refusal::Late { vcpu }),
                // The vCPUs that were given a record have to be reported.
                Err(error @ (Refusal::Paused | Refusal::Late { .. })) if !done.is_empty() => {
                    let outcome = Outcome::Skipped { why: error.to_string() };
                    done.push(OnVcpu { vcpu, bank: record.bank, outcome });
                }
                Err(error) => return Err(error),
            }
        }
        Ok(ManualMce { forecast, done })
    }

    fn ask(&self, vcpu: u8, work: Work, control: &VmControl) -> Result<Done, Refusal> {
        let mailbox = &self.0.mailboxes[usize::from(vcpu)];
        let (answer, answered) = sync_channel(1);
        *mailbox.lock() = Some(Job { work, answer });
        mailbox.has_job.store(true, Ordering::Release);
        control.kick(vcpu);
        let mut left = PATIENCE;
        let late = loop {
            match answered.recv_timeout(LOOK) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Disconnected) => break Refusal::Late { vcpu },
                Err(RecvTimeoutError::Timeout) => {}
            }
            match control.paused() {
                // This pause ends in a moment, and the vCPU takes the request then.
                Some(PauseReason::Marking) => {}
                Some(_) => break Refusal::Paused,
                None if left.is_zero() => break Refusal::Late { vcpu },
                None => left = left.saturating_sub(LOOK),
            }
        };
        // A job that was not taken by now is withdrawn; one that was taken is about to be answered.
        match mailbox.lock().take() {
            Some(_) => Err(late),
            None => answered.recv_timeout(PATIENCE).unwrap_or(Err(late)),
        }
    }

    /// Whether there is a job for `vcpu`. One load.
    #[inline]
    #[must_use]
    pub fn wants(&self, vcpu: u8) -> bool {
        self.0.mailboxes[usize::from(vcpu)].has_job.load(Ordering::Acquire)
    }

    /// Carries out the job. Called on that vCPU's thread, between two entries.
    pub fn serve(&self, vcpu: u8, mca: &mut impl Mca) {
        let mailbox = &self.0.mailboxes[usize::from(vcpu)];
        mailbox.has_job.store(false, Ordering::Release);
        let Some(Job { work, answer }) = mailbox.lock().take() else { return };
        let done = self.done(vcpu, &work, mca);
        // Without a receiver the caller has given up.
        let _ = answer.try_send(done);
    }

    fn done(&self, vcpu: u8, work: &Work, mca: &mut impl Mca) -> Result<Done, Refusal> {
        let failed = |error| Refusal::Kvm { vcpu, error };
        let state = mca.state().map_err(failed)?;
        let Work::Inject { request, record, states } = work else {
            return Ok(Done::State(Box::new(state)));
        };
        if vcpu == request.vcpu {
            let mut states = states.clone();
            states[usize::from(vcpu)] = state;
            let forecast = forecast::forecast(request, &self.0.caps, &states);
            if forecast.lethal && !request.force {
                return Err(Refusal::Lethal(forecast));
            }
        } else if state.mcip() || !state.cr4_mce {
            // It would be a triple fault, which was not asked for on this vCPU.
            let why = "it is in its machine-check handler, or has not opened it".to_owned();
            let outcome = Outcome::Skipped { why };
            return Ok(Done::Injected(OnVcpu { vcpu, bank: record.bank, outcome }));
        }
        mca.inject(record).map_err(failed)?;
        let state = mca.state().map_err(failed)?;
        let now = state.banks.get(usize::from(record.bank)).map_or(0, |bank| bank.status);
        let mcg_status = state.mcg_status;
        // KVM adds OVER where the bank was full.
        let outcome = if now & !status::OVER == record.status & !status::OVER {
            Outcome::Injected { status: now, mcg_status }
        } else {
            Outcome::NotThere { status: now, mcg_status }
        };
        Ok(Done::Injected(OnVcpu { vcpu, bank: record.bank, outcome }))
    }
}

impl Mailbox {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Job>> {
        // Only plain assignments happen under the lock.
        self.job.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use mce_relay::Form;
    use mce_relay::mca::{BANKS, Vendor, cap, mcg, record};

    use super::*;

    /// A vCPU whose banks take everything.
    struct Fake(McaState);

    impl Mca for Fake {
        fn state(&mut self) -> io::Result<McaState> {
            Ok(self.0)
        }

        fn inject(&mut self, record: &Record) -> io::Result<()> {
            self.0.banks[usize::from(record.bank)].status = record.status;
            self.0.mcg_status = record.mcg_status;
            Ok(())
        }
    }

    /// That of a guest with its handlers open.
    fn ready(mcg_status: u64) -> McaState {
        McaState { mcg_status, ..McaState::up() }
    }

    /// Does `request` to an Intel-style guest of two vCPUs, the second of which has this MCG_STATUS.
    fn of_two(request: &Request, mcg_status: u64) -> Result<ManualMce, Refusal> {
        let mcg_cap = u64::from(BANKS) | cap::CTL_P | cap::SER_P;
        let injector = Injector::new(2, Caps { vendor: Vendor::Intel, mcg_cap, succor: false });
        let control = VmControl::new(2).unwrap();
        let is_over = Arc::new(AtomicBool::new(false));
        let threads = [(0, 0), (1, mcg_status)].map(|(vcpu, mcg_status)| {
            let (injector, is_over) = (injector.clone(), Arc::clone(&is_over));
            let mut mca = Fake(ready(mcg_status));
            std::thread::spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    injector.serve(vcpu, &mut mca);
                    std::thread::yield_now();
                }
            })
        });
        let done = injector.inject(request, &control);
        is_over.store(true, Ordering::Relaxed);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        done
    }

    #[test]
    fn all_are_called_or_it_is_said_before() {
        let Record { bank, status, addr, misc, mcg_status } = record(Form::Srao, 0x5000, 9, false);
        let (broadcast, force, dry_run) = (true, false, false);
        let srao =
            Request { vcpu: 0, bank, status, mcg_status, addr, misc, broadcast, force, dry_run };
        let done = of_two(&srao, 0).unwrap();
        let injected = |done: &OnVcpu| matches!(done.outcome, Outcome::Injected { .. });
        assert!(done.done.len() == 2 && done.done.iter().all(injected), "{done:?}");
        assert!(!done.forecast.lethal, "{done:?}");

        // The second is in its handler.
        let Err(Refusal::Lethal(forecast)) = of_two(&srao, mcg::MCIP) else {
            panic!("not refused")
        };
        assert!(forecast.guest_why.contains("vCPU 1 cannot be called"), "{forecast}");
        let planned = of_two(&Request { dry_run: true, ..srao }, mcg::MCIP).unwrap();
        assert_eq!((planned.forecast, planned.done.len()), (forecast, 0));
        let forced = of_two(&Request { force: true, ..srao }, mcg::MCIP).unwrap();
        assert!(injected(&forced.done[0]), "{forced:?}");
        assert!(matches!(forced.done[1].outcome, Outcome::Skipped { .. }), "{forced:?}");
    }

    #[test]
    fn a_pause_that_comes_in_between_is_said_at_once() {
        let mcg_cap = u64::from(BANKS) | cap::CTL_P | cap::SER_P;
        let injector = Injector::new(1, Caps { vendor: Vendor::Intel, mcg_cap, succor: false });
        let control = VmControl::new(1).unwrap();
        let Record { bank, status, addr, misc, mcg_status } = record(Form::Srao, 0x5000, 9, false);
        let (vcpu, broadcast, force, dry_run) = (0, false, false, false);
        let srao =
            Request { vcpu, bank, status, mcg_status, addr, misc, broadcast, force, dry_run };
        let other = control.clone();
        // No vCPU takes the request.
        let asking = std::thread::spawn(move || injector.inject(&srao, &other));
        std::thread::sleep(2 * LOOK);
        control.request_pause(PauseReason::Request);
        let refused = asking.join().unwrap();
        assert!(matches!(refused, Err(Refusal::Paused)), "{refused:?}");
    }
}
