//! Signals that end a process by default, and that anybody may send it: they still do, with the terminal as it was.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{io, ptr};

use libc::{c_int, c_void, siginfo_t};

/// Those that are sent, or come from a timer, a limit or a key. The VM's main thread takes them.
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
/// Those of a program's own faults; the thread that has the fault takes them.
const FAULTS: [c_int; 5] =
    [libc::SIGSEGV, libc::SIGABRT, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP];

/// The standard library's handler of SIGSEGV, which knows a stack that is full.
static OF_STD: OnceLock<extern "C" fn(c_int, *mut siginfo_t, *mut c_void)> = OnceLock::new();

/// Those that are handled here, a bit for each.
static TAKEN: AtomicU64 = AtomicU64::new(0);

/// Of the real-time signals the first is the kick of a vCPU.
fn sent() -> impl Iterator<Item = c_int> {
    SENT.into_iter().chain(libc::SIGRTMIN() + 1..=libc::SIGRTMAX())
}

/// Signals that end this process and put the terminal back before, but for those of the program's own faults. None
/// that somebody else has a handler for.
pub fn taken() -> impl Iterator<Item = c_int> {
    let taken = TAKEN.load(Ordering::Relaxed);
    sent().filter(move |signal| taken & bit(*signal) != 0)
}

fn bit(signal: c_int) -> u64 {
    1 << (signal - 1)
}

/// Has each of them put the terminal back. One that was ignored at the start stays so (nohup).
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
            // Somebody else's, who knows what it is for.
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
        // What went wrong is done again after this, and ends the process then.
        if signal == libc::SIGSEGV
            && let Some(of_std) = OF_STD.get()
        {
            of_std(signal, info, context);
        }
        return;
    }
    // It is blocked as long as this runs, and comes after it.
    // SAFETY: all are async-signal-safe, and every thread's filter has them.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), signal) };
}
