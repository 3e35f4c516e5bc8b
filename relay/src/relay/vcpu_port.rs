//! A vCPU thread's door to the relay. Injection happens here, on the vCPU's own thread, between two KVM_RUNs.

use std::io;
use std::marker::PhantomData;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use log::warn;

use super::gathering::Part;
use super::inject::Verdict;
use crate::core::host::{BACK_END, ask_host};
use crate::core::shared::Shared;
use crate::decide::machine_check::Step;
use crate::event::{Reach, SignalledThread};
use crate::memory::access::{self, AccessError};
use crate::signal::{self, ThreadSlot};
use crate::types::{Caught, FailureKind, UndeliverableReason, WaitReason};
use crate::x86::back_end::Mca;

/// How long a vCPU that touched a bad page is held back while other processors leave their
/// machine-check handlers. A guest that takes longer has given up on its own one-second limit.
const AR_PATIENCE: Duration = Duration::from_secs(5);
/// How often it looks meanwhile.
const AR_LOOK: Duration = Duration::from_millis(1);
/// How long at a time it is held while a huge page that it touched is being rescued.
const HOLD: Duration = Duration::from_millis(100);
/// So many ARs without an address within [`NAMELESS_IN`] are a touch that KVM does not give the address of either.
const NAMELESS: u32 = 64;
const NAMELESS_IN: Duration = Duration::from_secs(10);

/// How often in a row a back end may fail to empty a bank, for whatever reason but that it cannot.
const TAKE_BACK_ATTEMPTS: u32 = 3;

/// A vCPU thread's door to the relay. Made on that thread, used there, dropped there.
pub struct VcpuPort {
    vcpu: usize,
    slot: ThreadSlot,
    shared: Arc<Shared>,
    /// ARs without an address, and when the first of them came.
    nameless: u32,
    nameless_since: Option<Instant>,
    /// How often in a row the back end may still fail to empty a bank; it is not asked again after that.
    take_back_attempts: u32,
    not_send: PhantomData<*const ()>,
}

// A panic of the host's, in a back end, a kick or the observer, is caught where it is called, and nothing is half-changed.
impl std::panic::UnwindSafe for VcpuPort {}
impl std::panic::RefUnwindSafe for VcpuPort {}

impl VcpuPort {
    pub(super) fn new(vcpu: usize, slot: ThreadSlot, shared: Arc<Shared>) -> Self {
        Self {
            vcpu,
            slot,
            shared,
            nameless: 0,
            nameless_since: None,
            take_back_attempts: TAKE_BACK_ATTEMPTS,
            not_send: PhantomData,
        }
    }

    /// Call before every KVM_RUN, after the last exit's I/O has been completed and after `immediate_exit` has been
    /// cleared ([`Self::clear_exit`]). While nothing is wrong it is one relaxed load.
    #[inline]
    pub fn before_run(&mut self, mca: &mut dyn Mca) -> Verdict {
        if self.slot.attention() { self.come_round(mca) } else { Verdict::Run }
    }

    /// Clears `immediate_exit`, which a kick, or a signal of the kernel's, has set. First thing in a round of the run
    /// loop, before whatever a kick may be about is looked at: [`Self::before_run`], and what the VMM itself kicks for.
    /// A kick that comes later makes the next KVM_RUN return at once. One relaxed store.
    #[inline]
    pub fn clear_exit(&self) {
        self.slot.clear_exit();
    }

    /// Whether [`Self::before_run`] has something to do. For a VMM that completes the last exit's I/O
    /// only when it has to. One relaxed load.
    #[inline]
    pub fn wants_attention(&self) -> bool {
        self.slot.attention()
    }

    /// An MMIO exit at `gpa`: true when that is guest RAM and the page is bad, which means that KVM emulated an
    /// instruction that met poison. The page is then taken for touched (AR). False for what else shows as MMIO
    /// in RAM: a store to a read-only slot, a slot that is being changed, a file that was cut short (see
    /// [`Self::probe`]).
    pub fn mmio_hit(&mut self, gpa: u64) -> bool {
        self.touches(gpa, 1, false)
    }

    /// A KVM_RUN that failed with `errno`, EFAULT or EHWPOISON, and KVM_EXIT_MEMORY_FAULT of `size` bytes at `gpa`: true
    /// when a page of guest RAM there is bad. KVM says it so, and raises no SIGBUS, of memory that this process has
    /// not mapped (guest_memfd); with EFAULT alone it may mean anything, and the host is asked. The first bad page is
    /// then taken for touched (AR), and the others for bad (AO).
    pub fn memory_fault(&mut self, gpa: u64, size: u64, errno: i32) -> bool {
        self.touches(gpa, size, errno == libc::EHWPOISON)
    }

    fn touches(&mut self, gpa: u64, size: u64, sure: bool) -> bool {
        let touched = self.shared.touches(self.vcpu, gpa, size, sure);
        if touched {
            // What had no address has one now.
            self.nameless = 0;
        }
        touched
    }

    /// Whether the byte of guest RAM at `gpa` can be read, and if not, why. For exits that may be about
    /// poison and may be about something else.
    ///
    /// # Errors
    /// See [`AccessError`].
    pub fn probe(&self, gpa: u64) -> Result<(), AccessError> {
        access::read_ram(&self.shared.ram(), gpa, &mut [0]).map(drop)
    }

    /// Runs `wait`, which blocks while the virtual machine is paused. Meanwhile nobody waits for this
    /// vCPU: machine checks that have to reach every processor are put off.
    pub fn park(&mut self, wait: impl FnOnce()) {
        self.shared.set_parked(self.vcpu, true);
        // Under no lock: what else was there may go on.
        wait();
        self.shared.set_parked(self.vcpu, false);
        // What came in the meantime, and whatever was put off.
        self.slot.shared().ask_attention();
        self.shared.wake();
    }

    #[cold]
    fn come_round(&mut self, mca: &mut dyn Mca) -> Verdict {
        let verdict = self.attend(mca);
        if verdict != Verdict::Run {
            // The host acts on it, and what led to it is said first.
            self.shared.outbox.flush();
        }
        verdict
    }

    fn attend(&mut self, mca: &mut dyn Mca) -> Verdict {
        let shared = Arc::clone(&self.shared);
        let me = self.vcpu;
        let mut held_since = None;
        let mut held_for: Option<Instant> = None;
        loop {
            self.slot.clear_attention();
            // Several system calls, for which nobody else need wait. The vCPU stands still meanwhile.
            let state = ask_host(BACK_END, || mca.state());
            if let Err(error) = &state {
                warn!("vCPU {me}: cannot read its machine-check state: {error}");
            }
            let mut inner = shared.lock();
            shared.comes_round(&mut inner, me);
            for caught in shared.take(&mut inner, &self.slot, SignalledThread::Vcpu(me)) {
                if caught.kind == FailureKind::ActionRequired
                    && caught.hva == 0
                    && self.is_nameless()
                {
                    // The kernel does not say where, of memory that this process has not mapped (guest_memfd). It
                    // knows by now, and says it when the guest touches the page again.
                    shared.hint();
                } else if caught.kind == FailureKind::ActionRequired {
                    // Not under the lock: whoever was there before us may end the process, and have
                    // something to put in order first.
                    drop(inner);
                    shared.outbox.flush();
                    signal::give_up(caught);
                    inner = shared.lock();
                }
            }
            if inner.rescues.holds(me) && inner.gathering.is_none() {
                if shared.is_alive() {
                    // The page may be good again in a moment. What the host wants of this vCPU meanwhile it sees to
                    // in its loop; then the touch is made again.
                    let since = *held_for.get_or_insert_with(Instant::now);
                    if since.elapsed() > HOLD {
                        return Verdict::Run;
                    }
                    drop(shared.pause(inner, HOLD));
                    continue;
                }
                shared.give_up_rescues(&mut inner);
            }
            let state = match state {
                Ok(state) => state,
                Err(_) => {
                    // Nobody may be kept waiting in a gathering by a vCPU that cannot take part.
                    shared.absent(&mut inner, me);
                    // Back in the guest it would meet its AR again, and again without end.
                    let Some(error) = inner.delivery.first_ar(me) else { return Verdict::Run };
                    let why = UndeliverableReason::NoState;
                    shared.undeliverable(&mut inner, me, error, why, None);
                    return Verdict::Undeliverable { gpa: error.gpa, why, rip: None };
                }
            };
            let now = shared.now();
            let ao_vcpu = inner.delivery.ao_vcpu();
            let taken = inner.delivery.taken(me, &state, now);
            shared.taken(&mut inner, me, &taken);
            let left = inner.delivery.left_behind(me, &state, now);
            if !left.is_empty() && self.take_back_attempts > 0 {
                drop(inner);
                self.take_back(mca, &left);
                // The banks are other ones now.
                continue;
            }
            if !left.is_empty() {
                shared.given_up(&mut inner, me, &left, false);
            }
            let gathering = inner.gathering.is_some();
            let step = if gathering { None } else { Some(inner.delivery.next(me, &state, now)) };
            if inner.delivery.ao_vcpu() != ao_vcpu {
                // AOs are another vCPU's matter from here on.
                inner.news = true;
                shared.wake();
            }
            match step {
                Some(Step::Idle) => return Verdict::Run,
                Some(Step::Inject(told)) => {
                    let (at, reach) = (state.rip, Reach::Local);
                    let (guard, done) = shared.inject(inner, mca, &told, reach, at);
                    if let Err(verdict) = done {
                        return verdict;
                    }
                    // Reading the state again costs as much as all the rest.
                    if !guard.delivery.has_something_for(me) {
                        return Verdict::Run;
                    }
                }
                Some(Step::Wait(error, wait)) => {
                    shared.waiting(&mut inner, error, wait);
                    return Verdict::Run;
                }
                Some(Step::Cannot(error, why)) => {
                    shared.undeliverable(&mut inner, me, error, why, Some(state.rip));
                    if error.kind == FailureKind::ActionRequired {
                        let rip = Some(state.rip);
                        return Verdict::Undeliverable { gpa: error.gpa, why, rip };
                    }
                }
                Some(Step::Rendezvous(_)) | None => {
                    let error = step.and_then(|step| match step {
                        Step::Rendezvous(error) => Some(error),
                        _ => None,
                    });
                    if let Some(error) = error {
                        shared.call_gathering(&mut inner, me, error);
                    }
                    let (guard, part) = shared.take_part(inner, me, state, mca);
                    inner = guard;
                    match (part, error) {
                        (Part::Refused(verdict), _) => return verdict,
                        // Ours, and it is done.
                        (Part::Assignment, Some(_)) if !inner.delivery.has_something_for(me) => {
                            return Verdict::Run;
                        }
                        // Somebody else's gathering, or there is more.
                        (Part::Assignment, _) | (Part::Postponed(_), None) => {}
                        (Part::Postponed(wait), Some(error)) => {
                            shared.waiting(&mut inner, error, wait);
                            if error.kind == FailureKind::ActionOptional {
                                return Verdict::Run;
                            }
                            // A vCPU that is paused will not come, and this one is to pause, too. What it
                            // touched it touches again after that.
                            if matches!(wait, WaitReason::Paused { .. }) {
                                inner.goes_on(me);
                                shared.wake();
                                return Verdict::Run;
                            }
                            let since: Instant = *held_since.get_or_insert_with(Instant::now);
                            if since.elapsed() > AR_PATIENCE {
                                let (why, rip) =
                                    (UndeliverableReason::Blocked { by: wait }, Some(state.rip));
                                shared.undeliverable(&mut inner, me, error, why, rip);
                                return Verdict::Undeliverable { gpa: error.gpa, why, rip };
                            }
                            // First the kicks, which a wait would be put off for.
                            drop(inner);
                            drop(shared.pause(shared.lock(), AR_LOOK));
                        }
                    }
                }
            }
        }
    }

    /// Whether one more AR without an address may be taken for one of guest memory.
    fn is_nameless(&mut self) -> bool {
        let now = Instant::now();
        let first = *self.nameless_since.get_or_insert(now);
        self.nameless += 1;
        if now.duration_since(first) > NAMELESS_IN {
            (self.nameless_since, self.nameless) = (Some(now), 1);
        }
        self.nameless <= NAMELESS
    }

    /// Empties `banks`, whose records this vCPU does not take, and has what they told told elsewhere.
    fn take_back(&mut self, mca: &mut dyn Mca, banks: &[u8]) {
        let me = self.vcpu;
        let mut emptied = Vec::new();
        for &bank in banks {
            match ask_host(BACK_END, || mca.take_back(bank)) {
                Ok(()) => {
                    emptied.push(bank);
                    self.take_back_attempts = TAKE_BACK_ATTEMPTS;
                }
                Err(error) => {
                    warn!(
                        "vCPU {me}: cannot empty bank {bank}, whose record it does not take: {error}"
                    );
                    self.take_back_attempts = match error.kind() {
                        io::ErrorKind::Unsupported => 0,
                        _ => self.take_back_attempts.saturating_sub(1),
                    };
                    break;
                }
            }
        }
        self.shared.given_up(&mut self.shared.lock(), me, &emptied, true);
    }
}

impl Drop for VcpuPort {
    fn drop(&mut self) {
        if self.shared.is_of_parent() {
            return;
        }
        let me = self.vcpu;
        let mut inner = self.shared.lock();
        // What came since it last looked.
        let nobodys = self.shared.take(&mut inner, &self.slot, SignalledThread::Vcpu(me));
        let kick = inner.leaves(me);
        self.shared.leaves_gathering(&mut inner, me);
        drop(inner);
        if let Some(kick) = kick {
            // Whoever is kicking this vCPU is waited for.
            *kick.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        self.shared.wake();
        // One without an address is of guest memory, which this vCPU touches no more.
        let is_ar = |caught: &Caught| caught.kind == FailureKind::ActionRequired && caught.hva != 0;
        for caught in nobodys.into_iter().filter(is_ar) {
            self.shared.outbox.flush();
            signal::give_up(caught);
        }
    }
}
