//! The SIGBUS handler, and how a signal that is not a memory failure of the guest's is handed on.

use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use libc::{c_int, c_void, sigaction, siginfo_t};

use super::code::{BUS_MCEERR_AO, BUS_MCEERR_AR, code_of};
use super::last_words::{self, Next, Origin};
use super::slot::Orphans;
use super::thread_slot::{self, own_slot, request_exit};
use crate::guard::{self, Touched};
use crate::types::{Caught, FailureKind, PAGE_SHIFT, PAGE_SIZE};

thread_local! {
    // As in `thread_slot`: the handler reads it.

    /// The next memory failure signalled to the calling thread is not the relay's: it was looked at, and is sent again
    /// for the previous handler or the default action.
    static NOT_OURS: AtomicBool = const { AtomicBool::new(false) };
}

/// Whether the relay or the host has the process's SIGBUS handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Signals {
    /// The relay installs its own, once for the process. What it does not take care of goes to the previous handler or
    /// the default action.
    #[default]
    Install,
    /// The host has one, which calls [`handle`]. It is installed before the relay is started, with SA_SIGINFO and
    /// SA_ONSTACK.
    Host,
}

/// What became of a SIGBUS that was shown to [`handle`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Handled {
    /// A memory failure that the relay takes care of: the handler returns.
    Handled,
    /// Not the relay's: the handler does what it would do without a relay.
    NotOurs,
}

/// Shows the relay a SIGBUS. A host's own handler calls it first. Async-signal-safe: a few plain atomic stores, and mmap(2) where
/// a view of guest memory gets a scratch page.
///
/// An AO is always taken, on any thread; one of memory that is not the guest's is reported as the event
/// [`Outside`](crate::Event::Outside). An AR is taken on a thread that takes part (a vCPU's with its port); on any
/// other thread only a touch by a view of guest memory or by a copy of [`guard`](crate::guard) can be made good, and where there
/// is a view an AR that names the guest's own mapping may be one, so the first of a page is taken. If it turns out not to be of guest RAM, the signal is sent to the
/// thread again, and this returns `NotOurs` for it then. It returns `NotOurs`, too, for an AR that repeats without a
/// call of [`VcpuPort::before_run`](crate::VcpuPort::before_run) in between: the thread's own code loads from the bad
/// page. [`handle_in`] can do more for such code.
pub fn handle(info: &siginfo_t) -> Handled {
    // SAFETY: no registers are given.
    unsafe { handle_in(info, ptr::null_mut()) }
}

/// As [`handle`], with the handler's third argument, the interrupted thread's registers, so that a copy of
/// [`guard`](crate::guard) that comes to a bad page ends as an error. A touch of a bad page in a view of guest memory is
/// handled, too, and is the one case that takes a system call, mmap(2).
///
/// # Safety
/// `context` is what the kernel passed to the calling handler for this signal, or null.
pub unsafe fn handle_in(info: &siginfo_t, context: *mut c_void) -> Handled {
    // SAFETY: a siginfo of SIGBUS begins as MceInfo does (include/uapi/asm-generic/siginfo.h), and is
    // larger.
    let mce = unsafe { &*ptr::from_ref(info).cast::<MceInfo>() };
    if store(mce, context) { Handled::Handled } else { Handled::NotOurs }
}

/// Takes a memory failure that was signalled to a thread outside the relay: an AO, or the AR of a touch that was made good,
/// with the host address at which the guest has the page.
pub(crate) fn take_orphan() -> Option<Caught> {
    PROCESS.get().and_then(|process| process.orphans.take())
}

/// Takes the number of such AOs that were dropped because too many came at once.
pub(crate) fn take_orphan_overrun() -> u32 {
    PROCESS.get().map_or(0, |process| process.orphans.take_dropped())
}

/// What the handler needs besides the thread's slot; set before the handler can run.
static PROCESS: OnceLock<Process> = OnceLock::new();

struct Process {
    /// The disposition that was there before ours.
    previous: sigaction,
    orphans: Orphans,
}

/// Whether this process has our own handler.
struct Setup {
    installed: bool,
}

/// Not for the handler: it locks.
fn process() -> MutexGuard<'static, Setup> {
    static SETUP: Mutex<Setup> = Mutex::new(Setup { installed: false });
    SETUP.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes this process ready for memory failures, once for each of the two modes; later calls do nothing.
///
/// # Errors
/// `sigaction(2)` fails, or this host has its memory in pages of another size than 4096 bytes.
pub fn set_up(signals: Signals) -> io::Result<()> {
    // SAFETY: takes a number.
    pages_are_ours(unsafe { libc::sysconf(libc::_SC_PAGESIZE) })?;
    match signals {
        Signals::Install => install(),
        Signals::Host => {
            let previous = in_force(libc::SIGBUS).ok_or_else(io::Error::last_os_error)?;
            PROCESS.get_or_init(|| Process { previous, orphans: Orphans::new() });
            thread_slot::set_ready();
            Ok(())
        }
    }
}

/// Of other pages (kernels for aarch64 are built with 16 and 64 KiB, too) more is lost with each than is reckoned with here.
fn pages_are_ours(size: libc::c_long) -> io::Result<()> {
    if u64::try_from(size) == Ok(PAGE_SIZE) {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "this host has its memory in pages of {size} bytes, expected {PAGE_SIZE}; run a kernel that is built for those"
    )))
}

/// Installs the SIGBUS handler for this process, once; later calls do nothing.
///
/// # Errors
/// `sigaction(2)` fails.
pub fn install() -> io::Result<()> {
    let mut setup = process();
    if setup.installed {
        let now = in_force(libc::SIGBUS).ok_or_else(io::Error::last_os_error)?;
        if now.sa_sigaction == action().sa_sigaction {
            return Ok(());
        }
        // The host's handler may hand on to the relay's, so the relay's must not hand on to it.
        return Err(io::Error::other(
            "another handler has taken the place of the relay's; have it call mce_relay::signal::handle, and \
             start relays with Signals::Host",
        ));
    }
    let previous = in_force(libc::SIGBUS).ok_or_else(io::Error::last_os_error)?;
    // Set before the handler can run. It may be set already, by an earlier attempt that failed below.
    PROCESS.get_or_init(|| Process { previous, orphans: Orphans::new() });

    let new = action();
    // SAFETY: `new` is a complete action whose handler is async-signal-safe.
    if unsafe { sigaction(libc::SIGBUS, &raw const new, ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    setup.installed = true;
    thread_slot::set_ready();
    Ok(())
}

/// The relay's action.
fn action() -> sigaction {
    // SAFETY: sigaction is plain data; all zero is a valid value to start from.
    let mut new: sigaction = unsafe { std::mem::zeroed() };
    new.sa_sigaction = on_sigbus as extern "C" fn(c_int, *mut siginfo_t, *mut c_void) as usize;
    // ONSTACK: std gives every thread an alternate stack, so the handler runs even if the stack's own page is bad.
    // RESTART: other threads' system calls are not interrupted.
    new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    new
}

/// `siginfo` of a memory failure; libc does not give access to `si_addr_lsb`.
#[repr(C)]
struct MceInfo {
    signo: c_int,
    errno: c_int,
    code: c_int,
    addr: *mut c_void,
    addr_lsb: i16,
}

extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo with SA_SIGINFO.
    if unsafe { handle_in(&*info, context) } == Handled::NotOurs {
        hand_on(signal, info, context);
    }
}

/// Stores the signal. Returns true when it is a memory failure that the relay will take care of, or the thread goes on.
fn store(mce: &MceInfo, context: *mut c_void) -> bool {
    let addr = mce.addr as u64;
    let kind = match mce.code {
        BUS_MCEERR_AR => FailureKind::ActionRequired,
        BUS_MCEERR_AO => FailureKind::ActionOptional,
        // There is no memory behind the address: a file was cut short, or a pool of huge pages is empty. (A kernel
        // without memory failure says it of marked pages, too.) The relay finds out.
        libc::BUS_ADRERR | libc::BUS_OBJERR => return recover(addr, PAGE_SHIFT, context),
        _ => return false,
    };
    if NOT_OURS.with(|not_ours| not_ours.swap(false, Ordering::Relaxed)) {
        return false;
    }
    // An lsb is at most 63; a nonsensical one is kept to its low byte.
    let lsb = mce.addr_lsb.to_le_bytes()[0];
    let caught = Caught { kind, hva: addr, lsb };
    if kind == FailureKind::ActionRequired && recover(addr, lsb, context) {
        return true;
    }
    // SAFETY: the pointer is that of this thread's own `ThreadSlot`, which resets it before the slot
    // can be freed; that is not before this handler has returned.
    if let Some(slot) = unsafe { own_slot().as_ref() } {
        let stored = slot.store(caught);
        request_exit();
        // A thread that gets AR after AR without taking them out of its slot is not in KVM_RUN: its own code loads from
        // the bad page again and again, which nothing here can end.
        return stored || kind == FailureKind::ActionOptional;
    }
    match (kind, PROCESS.get()) {
        (FailureKind::ActionOptional, Some(process)) => {
            process.orphans.store(caught);
            true
        }
        (FailureKind::ActionRequired, _) => goes_on(guard::recover_by_other_name(addr, lsb), lsb),
        _ => false,
    }
}

/// Whether the calling thread, which has touched `addr`, goes on all the same: see [`guard`].
fn recover(addr: u64, lsb: u8, context: *mut c_void) -> bool {
    goes_on(guard::recover(addr, lsb, context), lsb)
}

/// Whether the thread goes on. A relay looks at the page.
fn goes_on(touched: Touched, lsb: u8) -> bool {
    let Touched::GoesOn(hva) = touched else { return false };
    if let (Some(hva), Some(process)) = (hva, PROCESS.get()) {
        process.orphans.store(Caught { kind: FailureKind::ActionRequired, hva, lsb });
    }
    true
}

/// Hands the signal on to the previous handler or the default action, after a line on stderr.
fn hand_on(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let Some(Process { previous, .. }) = PROCESS.get() else {
        return;
    };
    // SAFETY: the kernel passes a valid siginfo with SA_SIGINFO.
    let (code, from) = unsafe { ((*info).si_code, origin(info)) };
    let sent = code <= 0;
    last_words::say(code, from, next(previous, sent));
    match previous.sa_sigaction {
        // The faulting instruction is executed again, raises the signal again with the true siginfo, and then meets the
        // default action.
        libc::SIG_DFL => set_default(signal),
        libc::SIG_IGN if sent => return,
        libc::SIG_IGN => set_default(signal),
        handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: the previous owner registered it as a handler of this form for this signal.
            let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: as above, of the one-argument form.
            let handler: extern "C" fn(c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
    // A signal that was sent does not come again by itself: where the default action is in force now (std's handler
    // leaves it so), it has to be raised again to take effect.
    if sent && is_default(signal) {
        // SAFETY: the kernel passed a valid siginfo.
        unsafe { send_to_oneself(signal, info) };
    }
}

/// Gives up an action-required failure that was stored and turned out not to be of guest memory: sends it to this
/// thread again, with the same siginfo, for the previous handler or the default action. Returns if that handler does.
pub(crate) fn give_up(caught: Caught) {
    // Only this thread reads the mark, and between here and the signal it gets no other memory failure: AOs go to the
    // relay's thread.
    NOT_OURS.with(|not_ours| not_ours.store(true, Ordering::Relaxed));
    send_failure(caught);
    if is_default(libc::SIGBUS) {
        // The first one was handed on by setting the default action (std's handler leaves that in force, too), which
        // expects the fault to repeat.
        send_failure(caught);
    }
}

/// Sends this thread a signal as the kernel sends it for `caught`.
pub(crate) fn send_failure(caught: Caught) {
    let mut info = failure(caught);
    // SAFETY: a whole siginfo of our own.
    unsafe { send_to_oneself(libc::SIGBUS, &raw mut info) };
}

/// The siginfo that the kernel sends for `caught`.
fn failure(caught: Caught) -> siginfo_t {
    let Caught { kind, hva, lsb } = caught;
    // SAFETY: siginfo is plain data, all zero is a valid value to start from.
    let mut info: siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: as in `on_sigbus`; nothing else refers to the local.
    let mce = unsafe { &mut *(&raw mut info).cast::<MceInfo>() };
    *mce = MceInfo {
        signo: libc::SIGBUS,
        errno: 0,
        code: code_of(kind),
        addr: ptr::without_provenance_mut(usize::try_from(hva).unwrap_or(usize::MAX)),
        addr_lsb: i16::from(lsb),
    };
    info
}

/// What raised the signal.
///
/// # Safety
/// `info` is a valid siginfo of SIGBUS.
unsafe fn origin(info: *const siginfo_t) -> Origin {
    // SAFETY: by this function's contract; which members mean anything depends on the code, but all
    // of them are there.
    unsafe {
        match (*info).si_code <= 0 {
            true => Origin::Sender { pid: (*info).si_pid(), uid: (*info).si_uid() },
            false => {
                let mce = &*info.cast::<MceInfo>();
                let lsb = mce.addr_lsb.to_le_bytes()[0];
                let addr = mce.addr.addr() as u64;
                Origin::Fault { addr, lsb, guest: guard::guest_ram(addr).is_some() }
            }
        }
    }
}

fn next(previous: &sigaction, sent: bool) -> Next {
    match previous.sa_sigaction {
        libc::SIG_IGN if sent => Next::Ignored,
        libc::SIG_DFL | libc::SIG_IGN => Next::Default,
        _ => Next::Handler,
    }
}

/// Sends this thread `signal` with this very siginfo, which the kernel allows for any code. It is delivered at once, or
/// when the handler that calls this returns. Async-signal-safe.
///
/// # Safety
/// `info` is a valid siginfo.
unsafe fn send_to_oneself(signal: c_int, info: *mut siginfo_t) {
    // SAFETY: the kernel reads one siginfo, which is valid by this function's contract.
    unsafe {
        libc::syscall(libc::SYS_rt_tgsigqueueinfo, libc::getpid(), libc::gettid(), signal, info);
    }
}

fn set_default(signal: c_int) {
    // SAFETY: sigaction is plain data, all zero is SIG_DFL with no flags.
    let default: sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: sigaction is async-signal-safe and `default` is a complete action.
    unsafe { sigaction(signal, &raw const default, ptr::null_mut()) };
}

fn is_default(signal: c_int) -> bool {
    in_force(signal).is_some_and(|action| action.sa_sigaction == libc::SIG_DFL)
}

/// The action in force for `signal`; `None` when `sigaction(2)` fails. Async-signal-safe.
fn in_force(signal: c_int) -> Option<sigaction> {
    let mut action = MaybeUninit::<sigaction>::uninit();
    // SAFETY: a null new action only reads the one in force into `action`.
    let read = unsafe { sigaction(signal, ptr::null(), action.as_mut_ptr()) } == 0;
    // SAFETY: the kernel has filled it where the call succeeded.
    read.then(|| unsafe { action.assume_init() })
}

#[cfg(test)]
mod tests {
    use super::super::thread_slot::{ExitByte, ThreadSlot};
    use super::*;

    const NONE: *mut c_void = ptr::null_mut();
    const AO: MceInfo = MceInfo {
        signo: libc::SIGBUS,
        errno: 0,
        code: BUS_MCEERR_AO,
        addr: ptr::without_provenance_mut(0x1000),
        addr_lsb: 12,
    };

    #[test]
    fn a_stored_signal_asks_for_an_exit() {
        install().unwrap();
        let mut exit = 0_u8;
        let exit = &raw mut exit;
        // SAFETY: the byte outlives the slot.
        let slot = ThreadSlot::attach(unsafe { ExitByte::new(exit) }).unwrap();
        assert!(store(&AO, NONE));
        assert!(slot.attention());
        // SAFETY: a local of this function.
        assert_eq!(unsafe { exit.read_volatile() }, 1);
        let caught = Caught { kind: FailureKind::ActionOptional, hva: 0x1000, lsb: 12 };
        assert_eq!(slot.take(), Some(caught));
        drop(slot);
        // SAFETY: as above.
        unsafe { exit.write_volatile(0) };
        request_exit();
        // SAFETY: as above.
        assert_eq!(unsafe { exit.read_volatile() }, 0, "not after the end");
    }

    #[test]
    fn a_full_slot_keeps_an_ao_and_hands_an_ar_on() {
        install().unwrap();
        let slot = ThreadSlot::attach(ExitByte::NONE).unwrap();
        let ar = MceInfo { code: BUS_MCEERR_AR, ..AO };
        while slot.take_overrun() == 0 {
            assert!(store(&AO, NONE));
        }
        assert!(!store(&ar, NONE), "an AR that would loop for ever");
        assert!(slot.take().is_some());
        assert!(store(&ar, NONE), "room again");
    }

    #[test]
    fn a_host_with_other_pages_is_refused() {
        assert!(pages_are_ours(4096).is_ok());
        for size in [-1, 0, 16 << 10, 64 << 10] {
            let error = pages_are_ours(size).unwrap_err().to_string();
            assert!(error.contains(&format!("{size} bytes, expected 4096")), "{error}");
        }
    }

    #[test]
    fn only_memory_failures_are_ours() {
        install().unwrap();
        let slot = ThreadSlot::attach(ExitByte::NONE).unwrap();
        let codes = [libc::SI_USER, libc::SI_QUEUE, libc::SI_TKILL, libc::BUS_ADRERR, 0x80];
        for code in codes.into_iter().chain([-BUS_MCEERR_AO, BUS_MCEERR_AO + 1, i32::MIN]) {
            assert!(!store(&MceInfo { code, ..AO }, NONE), "si_code {code}");
        }
        assert_eq!(slot.take(), None);
    }

    #[test]
    fn an_ao_without_a_slot_is_kept_or_counted_and_an_ar_handed_on() {
        install().unwrap();
        let mut stored = 0;
        let dropped = loop {
            assert!(store(&AO, NONE));
            stored += 1;
            match take_orphan_overrun() {
                0 => {}
                dropped => break dropped,
            }
        };
        assert!(!store(&MceInfo { code: BUS_MCEERR_AR, ..AO }, NONE));
        let caught = Caught { kind: FailureKind::ActionOptional, hva: 0x1000, lsb: 12 };
        let taken: Vec<_> = std::iter::from_fn(take_orphan).collect();
        assert_eq!((dropped, taken), (1, vec![caught; stored - 1]));
    }
}
