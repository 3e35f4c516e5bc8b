//! Job-control signals, which must not stop a process that runs a guest.

use std::io::{self};

use crate::sandbox::terminal::deadly;
use crate::sandbox::terminal::on_sigcont;

/// Makes job control not stop this process, which runs a guest, when it is in the background: its output is written,
/// and input that it may not read it does not get. Also lets it notice that it continues after a stop, and restores the
/// terminal before a signal ends it.
///
/// # Errors
/// sigaction(2) fails.
pub fn take_no_stops() -> io::Result<()> {
    deadly::install()?;
    set_handler(libc::SIGTTIN, libc::SIG_IGN)?;
    set_handler(libc::SIGTTOU, libc::SIG_IGN)?;
    set_handler(libc::SIGCONT, on_sigcont as extern "C" fn(libc::c_int) as usize)
}

fn set_handler(signal: libc::c_int, handler: usize) -> io::Result<()> {
    // SAFETY: sigaction is plain data; all zero is a valid value to start from.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
    // SAFETY: `action` is complete, and the one handler that is set is async-signal-safe.
    match unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
