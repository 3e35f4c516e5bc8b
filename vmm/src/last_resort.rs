//! What is done about a SIGBUS that neither the guest nor the relay can take care of: this process ends,
//! with the terminal as it was.
//!
//! The relay's own handler says what it was and hands it on to this one. Memory of the VMM itself that
//! went bad ends it with [`STATUS`]; anything else (kill -BUS, a mapped file that was cut short) with the
//! default action, as it would without us.

use std::io;
use std::ptr;

use libc::{c_int, c_void, siginfo_t};
use mce_relay::signal::BUS_MCEERR_AR;

use crate::terminal;

/// Exit status of a VMM whose own memory went bad under it.
pub const STATUS: u8 = 7;

/// Installs the handler; to be done before the relay's, which then finds it.
///
/// # Errors
/// sigaction(2) fails.
pub fn install() -> io::Result<()> {
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

extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // tcsetattr is async-signal-safe.
    terminal::restore();
    // SAFETY: the kernel, or the relay with a siginfo of the same form, passes a valid one.
    let code = unsafe { (*info).si_code };
    if code == BUS_MCEERR_AR {
        const WORDS: &[u8] =
            b"mce-relay: memory of the VMM itself is bad; it ends (exit status 7)\n";
        const _: () = assert!(STATUS == 7, "as the words say");
        // SAFETY: write and _exit are async-signal-safe; the buffer is valid for its length.
        unsafe {
            libc::write(libc::STDERR_FILENO, WORDS.as_ptr().cast(), WORDS.len());
            libc::_exit(c_int::from(STATUS));
        }
    }
    // A fault comes again when its instruction is executed again, and finds the default action then.
    // What somebody sent does not, so whoever called us (see `mce_relay::signal`) raises it again.
    if set(libc::SIG_DFL, 0).is_err() {
        // SAFETY: async-signal-safe; the end that was meant, if not in the manner.
        unsafe { libc::_exit(128 + signal) };
    }
}
