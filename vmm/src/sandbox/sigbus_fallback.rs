//! What is done about a SIGBUS that neither the guest nor the relay can take care of: this process ends,
//! with the terminal as it was.
//!
//! The relay's own handler says what it was and hands it on to this one. Memory of the VMM itself that
//! went bad ends it with [`STATUS`]; anything else (kill -BUS, a mapped file that was cut short) with the
//! default action, as it would without us.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::{io, ptr};

use libc::{c_int, c_void, siginfo_t};
use mce_relay::signal::BUS_MCEERR_AR;
use vmm_sys_util::signal::unblock_signal;

use crate::outlets::files;
use crate::outlets::sockets::for_handlers;
use crate::sandbox::terminal;
use crate::session::record::dying;

/// Exit status of a VMM whose own memory went bad under it.
pub const STATUS: u8 = 7;

/// Installs the handler; to be done before the relay's, which then finds it. Unblocks SIGBUS on this thread and
/// those that it starts: with it blocked, as some parent may have left it, a page that goes bad under one of them
/// would end this process unheard.
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

/// The main thread waits for the end of the VM.
static WAITS: AtomicBool = AtomicBool::new(false);
/// With which status another thread has it end the process; -1 while none does.
static ENDS: AtomicI32 = AtomicI32::new(-1);
/// How long the main thread may take for that.
static PATIENCE: libc::timespec = libc::timespec { tv_sec: 0, tv_nsec: 250_000_000 };

/// Has `wait` wait on the main thread, which ends the process meanwhile if another thread has to. The others may
/// remove no file.
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

/// Ends the process with this status, and without the sockets if that can be. For signal handlers, on any thread.
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
    // A fault comes again when its instruction is executed again, and finds the default action then.
    // What somebody sent does not, so whoever called us (see `mce_relay::signal`) raises it again.
    if set(libc::SIG_DFL, 0).is_err() {
        // SAFETY: async-signal-safe; the end that was meant, if not in the manner.
        unsafe { libc::_exit(128 + signal) };
    }
}
