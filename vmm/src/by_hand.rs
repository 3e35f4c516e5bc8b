//! Machine checks by hand: from the API to the vCPU's thread, the only place where one can be put in.
//!
//! The relay's own deliveries do not come this way, and it knows nothing of these: a bank that one of
//! them fills is a bank that is full, as if the guest had found it so.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mce_relay::Mca;
use mce_relay::mca::{Caps, McaState, Record, status};
use serde::{Deserialize, Serialize};

use crate::control::{PauseReason, VmControl};
use crate::inject::{self, Outlook, Request};

/// How long a vCPU may take to come round.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often it is looked whether the VM was paused meanwhile.
const LOOK: Duration = Duration::from_millis(100);

/// What came of a machine check by hand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByHand {
    /// What KVM and a Linux guest would make of it, as the vCPUs stood.
    pub outlook: Outlook,
    /// What was done on each vCPU; empty when nothing was to be done.
    pub done: Vec<OnVcpu>,
}

/// What was done on one vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OnVcpu {
    /// Its index.
    pub vcpu: u8,
    /// The bank.
    pub bank: u8,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What came of a record on one vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "outcome")]
pub enum Outcome {
    /// The bank holds it.
    Injected {
        /// MCi_STATUS as read back.
        #[serde(with = "mce_relay::hex")]
        status: u64,
        /// MCG_STATUS as read back.
        #[serde(with = "mce_relay::hex")]
        mcg_status: u64,
    },
    /// KVM took the call, and the bank holds something else.
    NotThere {
        /// MCi_STATUS as read back.
        #[serde(with = "mce_relay::hex")]
        status: u64,
        /// MCG_STATUS as read back.
        #[serde(with = "mce_relay::hex")]
        mcg_status: u64,
    },
    /// Nothing was tried.
    Skipped {
        /// FallbackReason.
        why: String,
    },
}

impl std::fmt::Display for OnVcpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { vcpu, bank, outcome } = self;
        match outcome {
            Outcome::Injected { status, mcg_status } => write!(
                f,
                "injected: vCPU {vcpu}, bank {bank}: {} ({status:#018x}), MCG_STATUS {} ({mcg_status:#x})",
                inject::status_words(*status),
                inject::mcg_status_words(*mcg_status)
            ),
            Outcome::NotThere { status, mcg_status } => write!(
                f,
                "NOT injected: vCPU {vcpu}: KVM took the call, but bank {bank} holds {status:#018x} \
                 and MCG_STATUS is {mcg_status:#x}"
            ),
            Outcome::Skipped { why } => write!(f, "skipped: vCPU {vcpu}: {why}"),
        }
    }
}

/// Why nothing was injected.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The request makes no sense.
    #[error("{0}")]
    Wrong(String),
    /// It would kill the guest.
    #[error(
        "nothing was injected: the guest may not survive it, and only with --force is it injected then:\n{0}"
    )]
    Lethal(Outlook),
    /// No vCPU is going to enter the guest.
    #[error(
        "the VM is paused, and a machine check is given to a vCPU on its way into the guest; resume it first"
    )]
    Paused,
    /// The vCPU did not come round.
    #[error("vCPU {vcpu} did not come round within {s} s; nothing was injected on it", s = PATIENCE.as_secs())]
    Late {
        /// Its index.
        vcpu: u8,
    },
    /// KVM does not do it.
    #[error("KVM refuses on vCPU {vcpu}: {error}")]
    Kvm {
        /// The vCPU.
        vcpu: u8,
        /// Its words.
        error: io::Error,
    },
}

/// What a vCPU's thread is to do.
enum Work {
    /// Say how it stands.
    Look,
    /// Put a record in, unless it stands otherwise than was thought and the guest would not survive. How
    /// the others stood comes with it.
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
struct Door {
    /// Whether there is a job; what the vCPU looks at before each entry.
    knocked: AtomicBool,
    job: Mutex<Option<Job>>,
}

struct Shared {
    caps: Caps,
    doors: Vec<Door>,
    /// One at a time.
    turn: Mutex<()>,
}

/// The way to the vCPUs of one VM. Cheap to clone.
#[derive(Clone)]
pub struct Injector(Arc<Shared>);

impl Injector {
    /// To so many vCPUs, whose guest was shown `caps`.
    #[must_use]
    pub fn new(vcpus: u8, caps: Caps) -> Self {
        let doors = (0..vcpus).map(|_| Door::default()).collect();
        Self(Arc::new(Shared { caps, doors, turn: Mutex::new(()) }))
    }

    /// Does what `request` says. Not to be called on a vCPU's thread.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub fn inject(&self, request: &Request, control: &VmControl) -> Result<ByHand, Refusal> {
        let Shared { caps, doors, turn } = &*self.0;
        // There is nothing behind it that a panic could have left half done.
        let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
        request.check(doors.len(), caps.banks()).map_err(Refusal::Wrong)?;
        if control.paused_for_long(PATIENCE).is_some() {
            return Err(Refusal::Paused);
        }
        let vcpus = 0..u8::try_from(doors.len()).unwrap_or(u8::MAX);
        let states = vcpus
            .map(|vcpu| match self.ask(vcpu, Work::Look, control)? {
                Done::State(state) => Ok(*state),
                Done::Injected(_) => Err(Refusal::Late { vcpu }),
            })
            .collect::<Result<Vec<_>, _>>()?;
        let outlook = inject::outlook(request, caps, &states);
        if request.dry_run {
            return Ok(ByHand { outlook, done: Vec::new() });
        }
        if outlook.lethal && !request.force {
            return Err(Refusal::Lethal(outlook));
        }
        let mut done = Vec::new();
        for (vcpu, state) in (0..).zip(&states) {
            let record = match vcpu == request.vcpu {
                true => request.record(),
                false if !request.broadcast => continue,
                false => inject::bystander_record(request),
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
                // What has been done has to be said.
                Err(error @ (Refusal::Paused | Refusal::Late { .. })) if !done.is_empty() => {
                    let outcome = Outcome::Skipped { why: error.to_string() };
                    done.push(OnVcpu { vcpu, bank: record.bank, outcome });
                }
                Err(error) => return Err(error),
            }
        }
        Ok(ByHand { outlook, done })
    }

    fn ask(&self, vcpu: u8, work: Work, control: &VmControl) -> Result<Done, Refusal> {
        let door = &self.0.doors[usize::from(vcpu)];
        let (answer, answered) = sync_channel(1);
        *door.lock() = Some(Job { work, answer });
        door.knocked.store(true, Ordering::Release);
        control.kick(vcpu);
        let mut left = PATIENCE;
        let late = loop {
            match answered.recv_timeout(LOOK) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Disconnected) => break Refusal::Late { vcpu },
                Err(RecvTimeoutError::Timeout) => {}
            }
            match control.paused() {
                // It is over in a moment, and the vCPU comes round then.
                Some(PauseReason::Marking) => {}
                Some(_) => break Refusal::Paused,
                None if left.is_zero() => break Refusal::Late { vcpu },
                None => left = left.saturating_sub(LOOK),
            }
        };
        // Whatever comes too late is not done any more; what has been taken is about to be answered.
        match door.lock().take() {
            Some(_) => Err(late),
            None => answered.recv_timeout(PATIENCE).unwrap_or(Err(late)),
        }
    }

    /// Whether there is something to do on `vcpu`. One load.
    #[inline]
    #[must_use]
    pub fn wants(&self, vcpu: u8) -> bool {
        self.0.doors[usize::from(vcpu)].knocked.load(Ordering::Acquire)
    }

    /// Does it. To be called on that vCPU's thread, between two entries.
    pub fn serve(&self, vcpu: u8, mca: &mut impl Mca) {
        let door = &self.0.doors[usize::from(vcpu)];
        door.knocked.store(false, Ordering::Release);
        let Some(Job { work, answer }) = door.lock().take() else { return };
        let done = self.done(vcpu, &work, mca);
        // Nobody waits for it any more where there is no receiver.
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
            let outlook = inject::outlook(request, &self.0.caps, &states);
            if outlook.lethal && !request.force {
                return Err(Refusal::Lethal(outlook));
            }
        } else if state.mcip() || !state.cr4_mce {
            // It would be a triple fault, and nobody has asked for one there.
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

impl Door {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Job>> {
        // A plain assignment is all that ever happens under the lock.
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
    fn of_two(request: &Request, mcg_status: u64) -> Result<ByHand, Refusal> {
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
        assert!(!done.outlook.lethal, "{done:?}");

        // The second is in its handler.
        let Err(Refusal::Lethal(outlook)) = of_two(&srao, mcg::MCIP) else { panic!("not refused") };
        assert!(outlook.guest_why.contains("vCPU 1 cannot be called"), "{outlook}");
        let planned = of_two(&Request { dry_run: true, ..srao }, mcg::MCIP).unwrap();
        assert_eq!((planned.outlook, planned.done.len()), (outlook, 0));
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
        // Nobody serves.
        let asking = std::thread::spawn(move || injector.inject(&srao, &other));
        std::thread::sleep(2 * LOOK);
        control.request_pause(PauseReason::Request);
        let refused = asking.join().unwrap();
        assert!(matches!(refused, Err(Refusal::Paused)), "{refused:?}");
    }
}
