//! The last SIGBUS handler, for one that neither the guest nor the relay can take care of: this process ends, with the
//! terminal restored.
//!
//! The relay's handler reports the signal and hands it on to this one. If memory of the VMM itself went bad, the
//! process ends with [`STATUS`]; for any other cause (kill -BUS, a mapped file that was cut short) with the default
//! action, as it would without this handler.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::{io, ptr};

use libc::{c_int, c_void, siginfo_t};
use mce_relay::signal::BUS_MCEERR_AR;
use vmm_sys_util::signal::unblock_signal;

use crate::outlets::files;
use crate::outlets::sockets::for_handlers;
use crate::sandbox::terminal;
use crate::session::record::dying;

/// Exit status of a VMM whose own memory went bad.
pub const STATUS: u8 = 7;

/// Installs the handler; call it before the relay installs its own, which hands on to this one. Also unblocks SIGBUS on
/// this thread and those that it starts: if a parent left it blocked, a page that goes bad under a thread would end
/// this process without a report.
///
/// # Errors
/// sigaction(2) or the unblocking fails.
pub fn install() -> io::Result<()> {
    unblock_signal(libc::SIGBUS).map_err(|error| io::Error::other(format!("{error:?}")))?;
    let handler = on_sigbus as extern "C" fn(c_int, *mut siginfo_t, *mut c_void);
    // On the alternate stack that std gives every thread: its own may be what went bad.
    set(handler as usize, libc::SA_SIGINFO | libc::SA_ONSTACK)
}

fn set(handler: usize, flags: c_int) -> io::Result<()> {
    // SAFETY: sigaction is plain data; all zero is a valid value to start from.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: `action` is complete, and a handler in it is async-signal-safe.
    match unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether the main thread waits for the end of the VM.
static WAITS: AtomicBool = AtomicBool::new(false);
/// The exit status with which another thread asks it to end the process; -1 while none does.
static ENDS: AtomicI32 = AtomicI32::new(-1);
/// How long the main thread may take until it has ended the process.
static PATIENCE: libc::timespec = libc::timespec { tv_sec: 0, tv_nsec: 250_000_000 };

/// Runs `wait` on the main thread. Meanwhile another thread may have this one end the process: the other threads'
/// filters do not let them remove files.
pub fn while_waiting(wait: impl FnOnce()) {
    WAITS.store(true, Ordering::SeqCst);
    wait();
    WAITS.store(false, Ordering::SeqCst);
    let status = ENDS.load(Ordering::SeqCst);
    if status >= 0 {
        for_handlers::remove_all();
        // SAFETY: ends the process. Nothing is to be cleaned up: another thread is in a handler.
        unsafe { libc::_exit(status) };
    }
}

/// Ends the process with this status, and removes its sockets if possible. For signal handlers, on any thread.
pub(crate) fn end(status: u8) -> ! {
    dying::note_end(status);
    let status = c_int::from(status);
    // SAFETY: both are async-signal-safe, and every filter has them.
    let on_main = unsafe { libc::getpid() == libc::gettid() };
    if on_main {
        for_handlers::remove_all();
    } else if WAITS.load(Ordering::SeqCst) {
        ENDS.store(status, Ordering::SeqCst);
        files::wake();
        // SAFETY: the futex is a static, which nobody changes while it is waited for, and every filter has this
        // call.
        unsafe {
            let flags = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
            libc::syscall(libc::SYS_futex, ENDS.as_ptr(), flags, status, &raw const PATIENCE);
        }
    }
    // SAFETY: async-signal-safe, and every filter has it.
    unsafe { libc::_exit(status) }
}

extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // tcsetattr is async-signal-safe.
    terminal::restore();
    // SAFETY: the kernel, or the relay with a siginfo of the same form, passes a valid one.
    let code = unsafe { (*info).si_code };
    if code == BUS_MCEERR_AR {
        const WORDS: &[u8] =
            b"mce-relay: memory of the VMM itself is bad; it ends (exit status 7)\n";
        const _: () = assert!(STATUS == 7, "as the words say");
        // SAFETY: write is async-signal-safe; the buffer is valid for its length.
        unsafe {
            libc::write(libc::STDERR_FILENO, WORDS.as_ptr().cast(), WORDS.len());
        }
        end(STATUS);
    }
    // A fault is raised again when its instruction is executed again, and then meets the default action. A signal that
    // was sent is not, so the caller of this handler (see `mce_relay::signal`) raises it again.
    if set(libc::SIG_DFL, 0).is_err() {
        // SAFETY: async-signal-safe; the process ends with the status of the intended signal.
        unsafe { libc::_exit(128 + signal) };
    }
}
