//! A vCPU thread's interface to the relay. Records are injected here, on the vCPU's own thread, between two KVM_RUNs.

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

/// How long a vCPU that touched a bad page is kept out of the guest while other processors leave their machine-check
/// handlers. A guest that takes longer has exceeded its own limit of one second.
const AR_PATIENCE: Duration = Duration::from_secs(5);
/// How often it tries again meanwhile.
const AR_LOOK: Duration = Duration::from_millis(1);
/// How long at a time it is held while a huge page that it touched is being rescued.
const HOLD: Duration = Duration::from_millis(100);
/// How many ARs without an address within [`WITHOUT_ADDRESS_IN`] may be touches of guest memory for which KVM will
/// report the address. Any more are taken for failures of other memory.
const MOST_WITHOUT_ADDRESS: u32 = 64;
const WITHOUT_ADDRESS_IN: Duration = Duration::from_secs(10);

/// How often in a row a back end may fail to empty a bank before it is not asked again (`Unsupported` counts at once).
const TAKE_BACK_ATTEMPTS: u32 = 3;

/// A vCPU thread's interface to the relay, by [`Handle::attach`](crate::Handle::attach). It is made, used and dropped
/// on that thread.
pub struct VcpuPort {
    vcpu: usize,
    slot: ThreadSlot,
    shared: Arc<Shared>,
    /// ARs without an address since `without_address_since`.
    without_address: u32,
    without_address_since: Option<Instant>,
    /// How often in a row the back end may still fail to empty a bank.
    take_back_attempts: u32,
    not_send: PhantomData<*const ()>,
}

// A panic in the host's back end, kick or observer is caught where it is called, and leaves nothing half-changed.
impl std::panic::UnwindSafe for VcpuPort {}
impl std::panic::RefUnwindSafe for VcpuPort {}

impl VcpuPort {
    pub(super) fn new(vcpu: usize, slot: ThreadSlot, shared: Arc<Shared>) -> Self {
        Self {
            vcpu,
            slot,
            shared,
            without_address: 0,
            without_address_since: None,
            take_back_attempts: TAKE_BACK_ATTEMPTS,
            not_send: PhantomData,
        }
    }

    /// Takes the signals of this vCPU, and tells its guest what it can be told now. Call it before every KVM_RUN, after
    /// the last exit's I/O has been completed and after [`Self::clear_exit`]. While nothing is wrong it is one relaxed
    /// load.
    #[inline]
    pub fn before_run(&mut self, mca: &mut dyn Mca) -> Verdict {
        if self.slot.attention() { self.before_run_slow(mca) } else { Verdict::Run }
    }

    /// Clears `immediate_exit`, which a kick or a memory failure's signal has set. Call it first in each round of the
    /// run loop, before [`Self::before_run`] and before the VMM looks at flags of its own for which it kicks: a kick
    /// that comes after this call makes the next KVM_RUN return at once. One relaxed store.
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

    /// Call it for an MMIO exit at guest-physical `gpa`. Returns true when that is a bad page of guest RAM: KVM
    /// emulated an instruction that touched poison. The page then counts as touched (AR). Returns false for everything
    /// else that shows as MMIO in RAM: a store to a read-only slot, a slot that is being changed, a file that was cut
    /// short (see [`Self::probe`]).
    pub fn mmio_hit(&mut self, gpa: u64) -> bool {
        self.touches(gpa, 1, false)
    }

    /// Call it when KVM_RUN failed with `errno` EFAULT or EHWPOISON and with KVM_EXIT_MEMORY_FAULT of `size` bytes at
    /// guest-physical `gpa`. Returns true when a page of guest RAM there is bad. KVM reports poison in this way,
    /// without a SIGBUS, for memory that this process has not mapped (guest_memfd). EFAULT alone may have other causes,
    /// so the host is then asked about the pages. The first bad page counts as touched (AR), the others as bad (AO).
    pub fn memory_fault(&mut self, gpa: u64, size: u64, errno: i32) -> bool {
        self.touches(gpa, size, errno == libc::EHWPOISON)
    }

    fn touches(&mut self, gpa: u64, size: u64, sure: bool) -> bool {
        let touched = self.shared.touches(self.vcpu, gpa, size, sure);
        if touched {
            // The touch whose signal had no address has one now.
            self.without_address = 0;
        }
        touched
    }

    /// Whether the byte of guest RAM at guest-physical `gpa` can be read, and if not, why. For exits whose cause may be
    /// poison or something else.
    ///
    /// # Errors
    /// See [`AccessError`].
    pub fn probe(&self, gpa: u64) -> Result<(), AccessError> {
        let probe = || access::read_ram(&self.shared.ram(), gpa, &mut [0]).map(drop);
        let is_stand_in = || {
            let ram = self.shared.ram();
            ram.hva(gpa).is_some_and(|hva| ram.is_stand_in(hva))
        };
        // It may have come to lie there just now.
        probe().or_else(|error| if is_stand_in() { probe() } else { Err(error) })
    }

    /// Runs `wait`, which blocks while the virtual machine is paused. No other vCPU waits for this one meanwhile:
    /// machine checks that have to reach every processor are put off.
    pub fn park(&mut self, wait: impl FnOnce()) {
        self.shared.set_parked(self.vcpu, true);
        // Without the lock: other threads use the relay meanwhile.
        wait();
        self.shared.set_parked(self.vcpu, false);
        // Signals that came meanwhile, and machine checks that were put off, are looked at next.
        self.slot.shared().ask_attention();
        self.shared.wake();
    }

    #[cold]
    fn before_run_slow(&mut self, mca: &mut dyn Mca) -> Verdict {
        let verdict = self.attend(mca);
        if verdict != Verdict::Run {
            // The host acts on the verdict; the events that led to it are delivered first.
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
            // Several system calls, made without the lock. The vCPU does not run meanwhile.
            let state = ask_host(BACK_END, || mca.state());
            if let Err(error) = &state {
                warn!("vCPU {me}: cannot read its machine-check state: {error}");
            }
            let mut inner = shared.lock();
            shared.mark_present(&mut inner, me);
            for caught in shared.take(&mut inner, &self.slot, SignalledThread::Vcpu(me)) {
                if caught.kind == FailureKind::ActionRequired
                    && caught.hva == 0
                    && self.may_lack_address()
                {
                    // For memory that this process has not mapped (guest_memfd) the signal has no address. The kernel
                    // knows the page by now, and KVM reports it when the guest touches it again.
                    shared.hint();
                } else if caught.kind == FailureKind::ActionRequired {
                    // Without the lock, and after all events: the previous handler or the default action may end the
                    // process.
                    drop(inner);
                    shared.outbox.flush();
                    signal::give_up(caught);
                    inner = shared.lock();
                }
            }
            if inner.rescues.holds(me) && inner.gathering.is_none() {
                if shared.is_working() {
                    // The page may be good again in a moment. What the host wants of this vCPU meanwhile it sees to
                    // in its loop; then the touch is made again.
                    let since = *held_for.get_or_insert_with(Instant::now);
                    if since.elapsed() > HOLD {
                        // What it does next need not be that touch: an interrupt may come first.
                        inner.rescues.let_go(me);
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
                    // No gathering may wait for a vCPU that cannot take part.
                    shared.absent(&mut inner, me);
                    // If it ran on, it would touch the page again and get an AR each time, without end.
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
                // The state has changed, so it is read again.
                continue;
            }
            if !left.is_empty() {
                shared.tell_elsewhere(&mut inner, me, &left, false);
            }
            let gathering = inner.gathering.is_some();
            let step = if gathering { None } else { Some(inner.delivery.next(me, &state, now)) };
            if inner.delivery.ao_vcpu() != ao_vcpu {
                // AOs are told on another vCPU from here on.
                inner.news = true;
                inner.wake_relay();
            }
            match step {
                Some(Step::Idle) => return Verdict::Run,
                Some(Step::Inject(told)) => {
                    let (at, reach) = (state.rip, Reach::Local);
                    let (guard, done) = shared.inject(inner, mca, &told, reach, at);
                    if let Err(verdict) = done {
                        return verdict;
                    }
                    // Reading the state again would cost as much as all the rest.
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
                        // This vCPU's own gathering, and it is done.
                        (Part::Assignment, Some(_)) if !inner.delivery.has_something_for(me) => {
                            return Verdict::Run;
                        }
                        // Another vCPU's gathering, or more errors wait here.
                        (Part::Assignment, _) | (Part::Postponed(_), None) => {}
                        (Part::Postponed(wait), Some(error)) => {
                            shared.waiting(&mut inner, error, wait);
                            if error.kind == FailureKind::ActionOptional {
                                return Verdict::Run;
                            }
                            // A paused vCPU will not stop for it, and this one is to be paused, too. If the guest needs
                            // the page, it touches it again after the pause.
                            if matches!(wait, WaitReason::Paused { .. }) {
                                inner.goes_on(me);
                                inner.wake_relay();
                                return Verdict::Run;
                            }
                            let since: Instant = *held_since.get_or_insert_with(Instant::now);
                            if since.elapsed() > AR_PATIENCE {
                                let (why, rip) =
                                    (UndeliverableReason::Blocked { by: wait }, Some(state.rip));
                                shared.undeliverable(&mut inner, me, error, why, rip);
                                return Verdict::Undeliverable { gpa: error.gpa, why, rip };
                            }
                            // The kicks are made first, with the unlock; a wait under this lock would delay them.
                            drop(inner);
                            drop(shared.pause(shared.lock(), AR_LOOK));
                        }
                    }
                }
            }
        }
    }

    /// Whether one more AR without an address may be taken for a touch of guest memory.
    fn may_lack_address(&mut self) -> bool {
        let now = Instant::now();
        let first = *self.without_address_since.get_or_insert(now);
        self.without_address += 1;
        if now.duration_since(first) > WITHOUT_ADDRESS_IN {
            (self.without_address_since, self.without_address) = (Some(now), 1);
        }
        self.without_address <= MOST_WITHOUT_ADDRESS
    }

    /// Empties `banks`, whose records this vCPU does not take; their pages are told of elsewhere.
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
        self.shared.tell_elsewhere(&mut self.shared.lock(), me, &emptied, true);
    }
}

impl Drop for VcpuPort {
    fn drop(&mut self) {
        if self.shared.is_of_parent() {
            return;
        }
        let me = self.vcpu;
        let mut inner = self.shared.lock();
        // Signals that came since `before_run` was called last.
        let not_guest_ram = self.shared.take(&mut inner, &self.slot, SignalledThread::Vcpu(me));
        let kick = inner.leaves(me);
        self.shared.leaves_gathering(&mut inner, me);
        drop(inner);
        if let Some(kick) = kick {
            // Waits for a thread that is just making this kick.
            *kick.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        self.shared.wake();
        // An AR without an address is of guest memory, which this vCPU touches no more.
        let is_ar = |caught: &Caught| caught.kind == FailureKind::ActionRequired && caught.hva != 0;
        for caught in not_guest_ram.into_iter().filter(is_ar) {
            self.shared.outbox.flush();
            signal::give_up(caught);
        }
    }
}
