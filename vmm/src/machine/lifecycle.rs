//! Control of a running VM: stop, pause, resume, and kicking vCPUs out of the guest.
//!
//! A handle is cheap to clone and outlives its VM. After the VM's end all calls do nothing.

pub mod reasons;
pub(crate) mod seat;

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use std::{fmt, io};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::SIGRTMIN;

use crate::api::types::pause::{Panic, PauseReason, Undeliverable};
use crate::api::types::registers::Registers;
use crate::machine::lifecycle::reasons::{Change, ExitReason, Parked};

/// What the vCPUs are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum State {
    Running = 0,
    Paused = 1,
    Ending = 2,
}

/// What holds the vCPUs. Each holder releases only its own hold; the vCPUs run again when none is left.
#[derive(Debug, Default)]
struct Holders {
    /// The first page that the guest could not be told of, until the user resumes the VM.
    undeliverable: Option<Undeliverable>,
    /// The user's request, however often it was made.
    request: bool,
    /// How many callers mark pages at the moment.
    marking: usize,
}

impl Holders {
    /// The reason to report: a page that the guest cannot be told of before a request, and a request before a hold that
    /// ends in a moment.
    fn reason(&self) -> Option<PauseReason> {
        match self {
            Self { undeliverable: Some(what), .. } => {
                Some(PauseReason::Undeliverable(what.clone()))
            }
            Self { request: true, .. } => Some(PauseReason::Request),
            Self { marking: 1.., .. } => Some(PauseReason::Marking),
            _ => None,
        }
    }

    /// Whether only the user can end the pause.
    fn needs_user(&self) -> bool {
        self.request || self.undeliverable.is_some()
    }

    fn add(&mut self, reason: PauseReason) {
        match reason {
            PauseReason::Request => self.request = true,
            PauseReason::Marking => self.marking += 1,
            PauseReason::Undeliverable(what) => {
                self.undeliverable.get_or_insert(what);
            }
        }
    }
}

#[derive(Debug, Default)]
struct Inner {
    reason: Option<ExitReason>,
    /// There is a holder as long as the state is [`State::Paused`].
    holders: Holders,
    /// What the guest has reported of a panic.
    panic: Option<Panic>,
    /// Thread ids of the vCPUs that are alive.
    threads: Vec<Option<libc::pid_t>>,
    parked: usize,
    /// The other threads that use guest memory.
    workers: Vec<Option<Worker>>,
    /// The registers of each vCPU when it was parked last.
    registers: Vec<Option<Registers>>,
}

/// A thread other than a vCPU's that uses guest memory.
#[derive(Debug)]
struct Worker {
    wake: Arc<EventFd>,
    parked: bool,
}

impl Inner {
    /// vCPUs that are alive and not parked, and workers.
    fn unparked(&self) -> usize {
        let workers = self.workers.iter().flatten().filter(|worker| !worker.parked).count();
        self.threads.iter().flatten().count().saturating_sub(self.parked) + workers
    }

    fn wake_workers(&self) {
        for worker in self.workers.iter().flatten() {
            // It fails only when the counter is full, and then the thread is awake anyway.
            let _ = worker.wake.write(1);
        }
    }
}

/// Called at each [`Change`].
type Observer = dyn Fn(Change<'_>) + Send + Sync;

struct Shared {
    /// A copy of what `inner` protects, so that the run loop need not lock.
    state: AtomicU8,
    inner: Mutex<Inner>,
    changed: Condvar,
    ended: EventFd,
    observer: OnceLock<Box<Observer>>,
}

/// A handle to a VM.
#[derive(Clone)]
pub struct VmControl(Arc<Shared>);

impl fmt::Debug for VmControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmControl").field("state", &self.state()).finish_non_exhaustive()
    }
}

impl VmControl {
    /// The control of a VM with `cpus` vCPUs, none of which runs yet.
    ///
    /// # Errors
    /// No more file descriptors.
    pub fn new(cpus: u8) -> io::Result<Self> {
        Ok(Self(Arc::new(Shared {
            state: AtomicU8::new(State::Running as u8),
            inner: Mutex::new(Inner { threads: vec![None; usize::from(cpus)], ..Inner::default() }),
            changed: Condvar::new(),
            ended: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            observer: OnceLock::new(),
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A thread that panicked under the lock left nothing half done: see each use.
        self.0.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the VM. The first reason given is the one that counts.
    pub fn stop(&self, reason: ExitReason) {
        let mut inner = self.lock();
        if inner.reason.is_some() {
            return;
        }
        inner.reason = Some(reason);
        inner.holders = Holders::default();
        self.0.state.store(State::Ending as u8, Ordering::Release);
        kick_threads(&inner);
        inner.wake_workers();
        self.0.changed.notify_all();
        if let Err(error) = self.0.ended.write(1) {
            log::error!("cannot tell the main thread that the VM ended: {error}");
        }
    }

    /// Why the VM ended, or is about to.
    #[must_use]
    pub fn exit_reason(&self) -> Option<ExitReason> {
        self.lock().reason.clone()
    }

    /// Has `observer` called at each change, in the order in which they happen. It is called with a lock
    /// held: it must be quick, must not block and must not use this handle. The first observer stays.
    pub fn observe(&self, observer: impl Fn(Change<'_>) + Send + Sync + 'static) {
        if self.0.observer.set(Box::new(observer)).is_err() {
            log::error!("the VM has an observer already");
        }
    }

    /// Makes every vCPU leave the guest and wait. Returns at once; [`Self::wait_parked`] waits until they have. May be
    /// called on a vCPU's own thread, which then has to go on with its run loop.
    ///
    /// The pause lasts until [`Self::resume`]; for a brief hold there is [`Self::hold`]. The end of a VM goes on in
    /// spite of it. Of several reasons the most important one is reported, and of several pages that the guest cannot
    /// be told of the first.
    pub fn request_pause(&self, reason: PauseReason) {
        self.change(|holders| holders.add(reason));
    }

    /// Makes every vCPU leave the guest and wait while the returned value lives, even if other holders release theirs.
    /// Returns at once, as [`Self::request_pause`] does.
    #[must_use]
    pub fn hold(&self) -> Hold {
        self.change(|holders| holders.add(PauseReason::Marking));
        Hold(self.clone())
    }

    /// Changes the holders, and lets vCPUs, waiters and the observer act on it.
    fn change(&self, change: impl FnOnce(&mut Holders)) {
        let mut inner = self.lock();
        if self.state() == State::Ending {
            return;
        }
        let before = inner.holders.reason();
        change(&mut inner.holders);
        let after = inner.holders.reason();
        if before != after {
            let state = if after.is_some() { State::Paused } else { State::Running };
            self.0.state.store(state as u8, Ordering::Release);
            inner.wake_workers();
            self.tell_observer(after.as_ref().map_or(Change::Resumed, Change::Paused));
        }
        if after.is_some() {
            kick_threads(&inner);
        }
        self.0.changed.notify_all();
    }

    /// Waits until all vCPUs of a paused VM are parked, the VM is resumed or ends, or `patience` is
    /// over.
    ///
    /// Not to be called on a vCPU's own thread, which would wait for itself.
    #[must_use]
    pub fn wait_parked(&self, patience: Duration) -> Parked {
        self.wait_while_held(patience, |holders| holders.reason().is_some())
    }

    /// [`Self::wait_parked`] for a caller whose hold lasts as long as `is_held`.
    fn wait_while_held(&self, patience: Duration, is_held: impl Fn(&Holders) -> bool) -> Parked {
        let is_under_way = |inner: &mut Inner| is_held(&inner.holders) && inner.unparked() > 0;
        let waited = self.0.changed.wait_timeout_while(self.lock(), patience, is_under_way);
        let (inner, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match inner.unparked() {
            _ if !is_held(&inner.holders) => Parked::Unpaused,
            0 => Parked::All,
            unparked => Parked::Not(unparked),
        }
    }

    /// Pauses at the user's request and waits until the vCPUs are parked, at most for `patience`. The request stays,
    /// whatever the result. Not to be called on a vCPU's own thread.
    pub fn pause_within(&self, patience: Duration) -> Parked {
        self.request_pause(PauseReason::Request);
        self.wait_while_held(patience, Holders::needs_user)
    }

    /// [`Self::pause_within`] without a limit.
    pub fn pause(&self) -> Parked {
        self.pause_within(Duration::MAX)
    }

    /// Releases the vCPUs for the user: ends a request, and a pause for a page that the guest could not be told of.
    /// They run again at once, or when no other holder is left.
    pub fn resume(&self) {
        self.change(|holders| {
            holders.request = false;
            holders.undeliverable = None;
        });
    }

    /// Why the VM is paused, if it is.
    #[must_use]
    pub fn paused(&self) -> Option<PauseReason> {
        self.lock().holders.reason()
    }

    /// As [`Self::paused`], for a caller that needs the guest to run: a hold that ends in a moment is waited for, at
    /// most for `patience`.
    #[must_use]
    pub fn paused_for_long(&self, patience: Duration) -> Option<PauseReason> {
        let is_brief = |inner: &mut Inner| inner.holders.reason() == Some(PauseReason::Marking);
        let waited = self.0.changed.wait_timeout_while(self.lock(), patience, is_brief);
        waited.unwrap_or_else(PoisonError::into_inner).0.holders.reason()
    }

    /// Calls the observer. The caller holds the lock, so the calls come in the order of the changes.
    fn tell_observer(&self, change: Change<'_>) {
        if let Some(observer) = self.0.observer.get() {
            observer(change);
        }
    }

    /// Called on a vCPU's thread: the guest reports that its kernel has panicked. The observer is told once, however
    /// often the guest reports it. The last report counts, and a panic is not taken back.
    pub(crate) fn note_panic(&self, panic: Panic) {
        let mut inner = self.lock();
        let is_known = inner.panic == Some(panic) || inner.panic == Some(Panic::Panicked);
        if is_known || self.state() == State::Ending {
            return;
        }
        inner.panic = Some(panic);
        self.tell_observer(Change::Panicked(panic));
    }

    /// What the guest has reported of a panic since it was started.
    #[must_use]
    pub fn panicked(&self) -> Option<Panic> {
        self.lock().panic
    }

    /// Makes one vCPU leave the guest and pass its hook before it enters again.
    pub fn kick(&self, vcpu: u8) {
        let inner = self.lock();
        if let Some(Some(thread)) = inner.threads.get(usize::from(vcpu)) {
            kick_thread(*thread);
        }
    }

    /// Makes all vCPUs leave the guest and pass their hooks before they enter again.
    pub fn kick_all(&self) {
        kick_threads(&self.lock());
    }

    /// Becomes readable when the VM ends.
    pub(crate) fn ended(&self) -> &EventFd {
        &self.0.ended
    }

    pub(crate) fn state(&self) -> State {
        match self.0.state.load(Ordering::Acquire) {
            0 => State::Running,
            1 => State::Paused,
            _ => State::Ending,
        }
    }

    /// Called on a vCPU's thread: from now on it can be kicked.
    pub(crate) fn enrol(&self, vcpu: u8) {
        // SAFETY: has no preconditions.
        let thread = unsafe { libc::gettid() };
        if let Some(slot) = self.lock().threads.get_mut(usize::from(vcpu)) {
            *slot = Some(thread);
        }
    }

    /// Called on a vCPU's thread before it ends, so that no kick hits a later thread with the same id.
    pub(crate) fn leave(&self, vcpu: u8) {
        if let Some(slot) = self.lock().threads.get_mut(usize::from(vcpu)) {
            *slot = None;
        }
        self.0.changed.notify_all();
    }

    /// See [`seat::Seat`], whose calls this and the next ones are.
    fn add_worker(&self, wake: Arc<EventFd>) -> usize {
        let mut inner = self.lock();
        inner.workers.push(Some(Worker { wake, parked: false }));
        inner.workers.len() - 1
    }

    fn park_worker(&self, index: usize) {
        if let Some(Some(worker)) = self.lock().workers.get_mut(index) {
            worker.parked = true;
        }
        self.0.changed.notify_all();
    }

    fn unpark_worker(&self, index: usize) -> bool {
        let mut inner = self.lock();
        // The state changes under the lock only.
        let may = self.state() == State::Running;
        if let Some(Some(worker)) = inner.workers.get_mut(index).filter(|_| may) {
            worker.parked = false;
        }
        may
    }

    fn remove_worker(&self, index: usize) {
        if let Some(worker) = self.lock().workers.get_mut(index) {
            *worker = None;
        }
        self.0.changed.notify_all();
    }

    /// The registers of all vCPUs that are alive, while none is in the guest: `None` unless the VM is paused and all
    /// are parked. A vCPU whose registers KVM did not return is left out.
    #[must_use]
    pub fn registers(&self) -> Option<Vec<Registers>> {
        let inner = self.lock();
        let still = self.state() == State::Paused && inner.unparked() == 0;
        let alive =
            inner.registers.iter().zip(&inner.threads).filter(|(_, thread)| thread.is_some());
        still.then(|| alive.filter_map(|(registers, _)| registers.clone()).collect())
    }

    /// Called on a vCPU's thread before it parks: its registers, or `None` where KVM did not return them.
    pub(crate) fn set_registers(&self, vcpu: u8, registers: Option<Registers>) {
        let mut inner = self.lock();
        let len = inner.threads.len();
        inner.registers.resize(len, None);
        if let Some(slot) = inner.registers.get_mut(usize::from(vcpu)) {
            *slot = registers;
        }
    }

    /// Called on a vCPU's thread: waits while the VM is paused.
    pub(crate) fn park(&self) {
        let mut inner = self.lock();
        inner.parked += 1;
        self.0.changed.notify_all();
        while self.state() == State::Paused {
            inner = self.0.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner.parked -= 1;
    }
}

/// The vCPUs, held while this lives: see [`VmControl::hold`].
#[derive(Debug)]
pub struct Hold(VmControl);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.change(|holders| holders.marking = holders.marking.saturating_sub(1));
    }
}

fn kick_threads(inner: &Inner) {
    inner.threads.iter().flatten().for_each(|thread| kick_thread(*thread));
}

fn kick_thread(thread: libc::pid_t) {
    // SAFETY: sends a signal that has a handler (installed before any thread enrols) to a thread
    // of this process that is alive: it takes itself off the list under the lock that is held.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGRTMIN()) };
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64};
    use std::sync::mpsc::channel;
    use std::thread::{self, JoinHandle, sleep};
    use std::time::Instant;

    use super::*;

    fn untold(vcpu: u8) -> PauseReason {
        PauseReason::Undeliverable(Undeliverable {
            vcpu,
            gpa: 0x1000,
            why: "test".into(),
            rip: Some(0),
        })
    }

    #[test]
    fn first_reason_counts() {
        let control = VmControl::new(2).unwrap();
        assert_eq!(control.exit_reason(), None);
        control.stop(ExitReason::PowerOff);
        control.stop(ExitReason::Reset);
        assert_eq!(control.exit_reason(), Some(ExitReason::PowerOff));
        assert_eq!(control.state(), State::Ending);
        assert_eq!(control.pause(), Parked::Unpaused);
        control.resume();
        assert_eq!(control.state(), State::Ending, "the end is final");
        assert_eq!(control.paused(), None);
        assert_eq!(control.ended().read().unwrap(), 1);
    }

    #[test]
    fn pause_waits_for_whoever_is_alive() {
        let control = VmControl::new(1).unwrap();
        assert_eq!(control.pause(), Parked::All, "with nobody to wait for");
        assert_eq!(control.paused(), Some(PauseReason::Request));
        control.resume();
        assert_eq!(control.paused(), None);
        assert_eq!(control.wait_parked(Duration::MAX), Parked::Unpaused);
        // A kick without threads goes nowhere.
        control.kick(0);
        control.kick(9);
        control.kick_all();
    }

    #[test]
    fn registers_are_those_of_a_vm_that_stands_still() {
        crate::machine::vcpu::install_kick_handler();
        let control = VmControl::new(2).unwrap();
        let vcpu = control.clone();
        let shown = crate::machine::cpu::registers::tests::at(1, 0x1234);
        let registers = shown.clone();
        assert_eq!(control.registers(), None, "it runs");
        control.request_pause(PauseReason::Request);
        assert_eq!(control.registers(), Some(Vec::new()), "there is no vCPU");
        let (enrolled, is_enrolled) = channel();
        let (go, may_go) = channel::<()>();
        let thread = thread::spawn(move || {
            vcpu.enrol(1);
            enrolled.send(()).unwrap();
            may_go.recv().unwrap();
            vcpu.set_registers(1, Some(registers));
            vcpu.park();
            vcpu.leave(1);
        });
        is_enrolled.recv().unwrap();
        assert_eq!(control.registers(), None, "a vCPU is not parked yet");
        go.send(()).unwrap();
        assert_eq!(control.wait_parked(Duration::MAX), Parked::All);
        assert_eq!(control.registers(), Some(vec![shown]));
        control.resume();
        thread.join().unwrap();
        assert_eq!(control.registers(), None, "it was resumed");
    }

    #[test]
    fn each_change_is_told_once_and_a_page_counts_more_than_a_request() {
        let control = VmControl::new(2).unwrap();
        let (send, told) = channel();
        control.observe(move |change| {
            send.send(match change {
                Change::Paused(reason) => Some(reason.clone()),
                Change::Resumed => None,
                Change::Panicked(panic) => panic!("{panic}"),
            })
            .unwrap();
        });
        control.request_pause(PauseReason::Request);
        control.request_pause(PauseReason::Request);
        control.request_pause(untold(1));
        control.request_pause(untold(0));
        control.request_pause(PauseReason::Request);
        assert_eq!(control.paused(), Some(untold(1)));
        control.resume();
        control.resume();
        control.request_pause(untold(0));
        control.stop(ExitReason::PowerOff);
        control.request_pause(untold(0));
        control.resume();
        assert_eq!(control.paused(), None, "the end is no pause");
        let told: Vec<Option<PauseReason>> = told.try_iter().collect();
        let expected = [Some(PauseReason::Request), Some(untold(1)), None, Some(untold(0))];
        assert_eq!(told, expected);
    }

    #[test]
    fn of_two_holders_the_last_lets_the_vcpus_go() {
        let control = VmControl::new(1).unwrap();
        let (send, told) = channel();
        control.observe(move |change| send.send(format!("{change:?}")).unwrap());
        let (one, other) = (control.hold(), control.hold());
        assert_eq!(control.wait_parked(Duration::ZERO), Parked::All);
        drop(one);
        assert_eq!(control.paused(), Some(PauseReason::Marking));
        // The user lets go of what the user holds.
        control.resume();
        assert_eq!(control.state(), State::Paused);
        assert_eq!(control.pause_within(Duration::ZERO), Parked::All);
        control.resume();
        assert_eq!(control.paused(), Some(PauseReason::Marking), "the other marks still");
        assert_eq!(control.wait_parked(Duration::ZERO), Parked::All);
        control.request_pause(untold(0));
        drop(other);
        assert_eq!(control.paused(), Some(untold(0)));
        assert_eq!(control.paused_for_long(Duration::MAX), Some(untold(0)));
        control.resume();
        assert_eq!((control.state(), control.paused()), (State::Running, None));
        let marking = "Paused(Marking)".to_owned();
        let untold = format!("Paused({:?})", untold(0));
        let request = "Paused(Request)".to_owned();
        let resumed = "Resumed".to_owned();
        let course = [marking.clone(), request, marking, untold, resumed];
        assert_eq!(told.try_iter().collect::<Vec<_>>(), course);

        // Releasing a hold after the end lets no vCPU run.
        let late = control.hold();
        control.stop(ExitReason::PowerOff);
        drop(late);
        assert_eq!(control.state(), State::Ending);
    }

    #[test]
    fn who_needs_the_guest_to_run_waits_for_the_end_of_what_is_brief() {
        let control = VmControl::new(1).unwrap();
        assert_eq!(control.paused_for_long(Duration::MAX), None);
        let hold = control.hold();
        let expected = Some(PauseReason::Marking);
        assert_eq!(control.paused_for_long(Duration::from_millis(1)), expected);
        let other = control.clone();
        let waiting = thread::spawn(move || other.paused_for_long(Duration::from_secs(60)));
        drop(hold);
        assert_eq!(waiting.join().unwrap(), None);
        control.request_pause(PauseReason::Request);
        assert_eq!(control.paused_for_long(Duration::MAX), Some(PauseReason::Request));
    }

    #[test]
    fn a_panic_is_told_once() {
        let control = VmControl::new(1).unwrap();
        let (send, told) = channel();
        control.observe(move |change| send.send(format!("{change:?}")).unwrap());
        assert_eq!(control.panicked(), None);
        for panic in [Panic::CrashLoaded, Panic::CrashLoaded, Panic::Panicked, Panic::Panicked] {
            control.note_panic(panic);
            assert_eq!(control.panicked(), Some(panic));
        }
        control.note_panic(Panic::CrashLoaded);
        assert_eq!(control.panicked(), Some(Panic::Panicked));
        let expected = ["Panicked(CrashLoaded)", "Panicked(Panicked)"];
        assert_eq!(told.try_iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn reasons_in_json() {
        let json = serde_json::to_value(untold(1)).unwrap();
        let expected = serde_json::json!({
            "reason": "undeliverable", "vcpu": 1, "gpa": "0x1000", "why": "test", "rip": "0x0"
        });
        assert_eq!(json, expected);
        assert_eq!(serde_json::from_value::<PauseReason>(json).unwrap(), untold(1));
        let json = serde_json::to_value(PauseReason::Request).unwrap();
        assert_eq!(json, serde_json::json!({ "reason": "request" }));
    }

    /// Threads that run the loop of a vCPU, without a guest.
    struct Crew {
        control: VmControl,
        rounds: Arc<AtomicU64>,
        threads: Vec<JoinHandle<()>>,
    }

    impl Crew {
        /// Each of them requests a pause itself every `pause_every` rounds; 0 is never.
        fn start(count: u8, pause_every: u64) -> Self {
            crate::machine::vcpu::install_kick_handler();
            let control = VmControl::new(count).unwrap();
            let rounds = Arc::new(AtomicU64::new(0));
            let threads = (0..count).map(|vcpu| {
                let (control, rounds) = (control.clone(), Arc::clone(&rounds));
                thread::spawn(move || {
                    control.enrol(vcpu);
                    for round in 1_u64.. {
                        match control.state() {
                            State::Paused => control.park(),
                            State::Ending => break,
                            State::Running if round.checked_rem(pause_every) == Some(0) => {
                                control.request_pause(untold(vcpu));
                            }
                            State::Running => {
                                rounds.fetch_add(1, Ordering::SeqCst);
                                thread::yield_now();
                            }
                        }
                    }
                    control.leave(vcpu);
                })
            });
            let threads = threads.collect();
            let crew = Self { control, rounds, threads };
            crew.goes_on();
            crew
        }

        fn rounds(&self) -> u64 {
            self.rounds.load(Ordering::SeqCst)
        }

        fn goes_on(&self) {
            let (before, start) = (self.rounds(), Instant::now());
            while self.rounds() == before {
                assert!(start.elapsed() < Duration::from_secs(20), "nobody moves");
                self.control.resume();
                thread::yield_now();
            }
        }

        fn ends(self) {
            self.control.stop(ExitReason::PowerOff);
            let start = Instant::now();
            for thread in self.threads {
                while !thread.is_finished() {
                    assert!(start.elapsed() < Duration::from_secs(20), "somebody stays parked");
                    sleep(Duration::from_millis(1));
                }
                thread.join().unwrap();
            }
        }
    }

    #[test]
    fn a_pause_that_has_come_to_its_end_holds_everybody() {
        let crew = Crew::start(4, 0);
        let paused = || {
            crew.control.request_pause(PauseReason::Request);
            crew.control.wait_parked(Duration::from_secs(20))
        };
        for _ in 0..300 {
            assert_eq!(paused(), Parked::All);
            let before = crew.rounds();
            assert_eq!(paused(), Parked::All, "once more is the same");
            thread::yield_now();
            assert_eq!(crew.rounds(), before);
            crew.goes_on();
        }
        assert_eq!(paused(), Parked::All);
        // Time for threads that were leaving the last pause to park again.
        sleep(Duration::from_millis(50));
        crew.ends();
    }

    #[test]
    fn pauses_from_all_sides_lose_nobody() {
        let crew = Crew::start(4, 50);
        let over = Arc::new(AtomicBool::new(false));
        let others: Vec<JoinHandle<()>> = (0..3)
            .map(|other| {
                let (control, over) = (crew.control.clone(), Arc::clone(&over));
                thread::spawn(move || {
                    while !over.load(Ordering::SeqCst) {
                        match other {
                            0 => assert!(!matches!(control.pause(), Parked::Not(_))),
                            1 => control.request_pause(PauseReason::Request),
                            _ => control.resume(),
                        }
                        thread::yield_now();
                    }
                })
            })
            .collect();
        sleep(Duration::from_millis(300));
        over.store(true, Ordering::SeqCst);
        // A thread that waits in a pause is released by a resume, or by the end.
        crew.goes_on();
        crew.control.request_pause(untold(0));
        crew.ends();
        others.into_iter().for_each(|other| other.join().unwrap());
    }

    /// Three threads that mark pages, each on its own, beside a user who pauses and resumes: while any of them holds
    /// the vCPUs none takes a step.
    #[test]
    fn whoever_holds_the_vcpus_has_them_still() {
        let crew = Crew::start(3, 0);
        let over = Arc::new(AtomicBool::new(false));
        let marking: Vec<JoinHandle<u64>> = (0..3)
            .map(|_| {
                let (control, rounds) = (crew.control.clone(), Arc::clone(&crew.rounds));
                let over = Arc::clone(&over);
                thread::spawn(move || {
                    let mut times = 0;
                    while !over.load(Ordering::SeqCst) {
                        let hold = control.hold();
                        assert_eq!(control.wait_parked(Duration::from_secs(60)), Parked::All);
                        let before = rounds.load(Ordering::SeqCst);
                        (0..20).for_each(|_| thread::yield_now());
                        assert_eq!(rounds.load(Ordering::SeqCst), before, "somebody runs");
                        drop(hold);
                        times += 1;
                        thread::yield_now();
                    }
                    times
                })
            })
            .collect();
        let (control, user_is_over) = (crew.control.clone(), Arc::clone(&over));
        let user = thread::spawn(move || {
            while !user_is_over.load(Ordering::SeqCst) {
                assert_eq!(control.pause_within(Duration::from_secs(60)), Parked::All);
                thread::yield_now();
                control.resume();
                thread::yield_now();
            }
        });
        sleep(Duration::from_millis(500));
        over.store(true, Ordering::SeqCst);
        for marking in marking {
            assert!(marking.join().unwrap() > 0, "it never came to its turn");
        }
        user.join().unwrap();
        assert_eq!(crew.control.paused(), None, "nobody is left");
        crew.goes_on();
        crew.ends();
    }

    #[test]
    fn a_pause_says_for_how_many_it_waits() {
        let control = VmControl::new(2).unwrap();
        crate::machine::vcpu::install_kick_handler();
        // This thread takes part and does not go round.
        control.enrol(0);
        control.request_pause(PauseReason::Request);
        assert_eq!(control.wait_parked(Duration::from_millis(5)), Parked::Not(1));
        control.leave(0);
        assert_eq!(control.wait_parked(Duration::ZERO), Parked::All);
    }
}
