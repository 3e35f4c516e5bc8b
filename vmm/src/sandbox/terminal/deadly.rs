//! Signals that end a process by default, and that any process may send: they still end it, with the terminal restored.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{io, ptr};

use libc::{c_int, c_void, siginfo_t};

/// Signals that are sent, or raised by a timer, a limit or a key. The VM's main thread takes them.
const SENT: [c_int; 10] = [
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGQUIT,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
    libc::SIGPWR,
    libc::SIGSTKFLT,
    libc::SIGXCPU,
];
/// Signals of a program's own faults; the thread that has the fault takes them.
const FAULTS: [c_int; 5] =
    [libc::SIGSEGV, libc::SIGABRT, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP];

/// The standard library's handler of SIGSEGV, which detects stack overflows.
static OF_STD: OnceLock<extern "C" fn(c_int, *mut siginfo_t, *mut c_void)> = OnceLock::new();

/// The signals that are handled here, a bit for each.
static TAKEN: AtomicU64 = AtomicU64::new(0);

/// [`SENT`], and the real-time signals but the first, which kicks vCPUs.
fn sent() -> impl Iterator<Item = c_int> {
    SENT.into_iter().chain(libc::SIGRTMIN() + 1..=libc::SIGRTMAX())
}

/// The signals that end this process with the terminal restored, without those of a program's own faults, and without
/// any that has another handler.
pub fn taken() -> impl Iterator<Item = c_int> {
    let taken = TAKEN.load(Ordering::Relaxed);
    sent().filter(move |signal| taken & bit(*signal) != 0)
}

fn bit(signal: c_int) -> u64 {
    1 << (signal - 1)
}

/// Installs a handler for each that restores the terminal. A signal that was ignored at the start stays ignored
/// (nohup).
pub(super) fn install() -> io::Result<()> {
    for signal in sent().chain(FAULTS) {
        // SAFETY: sigaction is plain data, all zero is a valid one, and it is only written to.
        let mut now: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: a null action changes nothing.
        if unsafe { libc::sigaction(signal, ptr::null(), &raw mut now) } != 0 {
            return Err(io::Error::last_os_error());
        }
        match now.sa_sigaction {
            libc::SIG_DFL => {}
            libc::SIG_IGN => continue,
            handler if signal == libc::SIGSEGV && now.sa_flags & libc::SA_SIGINFO != 0 => {
                // SAFETY: a handler that was installed with SA_SIGINFO is such a function.
                let handler = unsafe {
                    std::mem::transmute::<usize, extern "C" fn(c_int, *mut siginfo_t, *mut c_void)>(
                        handler,
                    )
                };
                let _ = OF_STD.set(handler);
            }
            // Another handler is installed, and keeps the signal.
            _ => continue,
        }
        let handler = on_deadly as extern "C" fn(c_int, *mut siginfo_t, *mut c_void);
        // SAFETY: as above.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESETHAND;
        // SAFETY: `action` is complete, and its handler is async-signal-safe.
        if unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        TAKEN.fetch_or(bit(signal), Ordering::Relaxed);
    }
    Ok(())
}

/// The default action is in force again by the time this runs (SA_RESETHAND).
extern "C" fn on_deadly(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    crate::sandbox::terminal::restore();
    // SAFETY: the kernel passes a valid one.
    let code = unsafe { (*info).si_code };
    if FAULTS.contains(&signal) && code > 0 {
        // The faulting instruction is executed again after this, and then ends the process.
        if signal == libc::SIGSEGV
            && let Some(of_std) = OF_STD.get()
        {
            of_std(signal, info, context);
        }
        return;
    }
    // The signal is blocked while this runs, and is delivered after it.
    // SAFETY: all are async-signal-safe, and every thread's filter has them.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), signal) };
}
