//! What a SIGHUP means: either that the terminal is gone, which ends the VM, or that files were moved away (logrotate),
//! so that they have to be opened again.
//!
//! The kernel sends it when a terminal hangs up, and a shell passes it on to its jobs; at that time the terminal is no
//! longer there. A process that was started with SIGHUP ignored (nohup) runs on in either case.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::OnceLock;

use vmm_sys_util::signal;

use crate::sandbox::terminal;

/// Whether this process was started on a terminal.
static HAD_TERMINAL: OnceLock<bool> = OnceLock::new();

/// Whether SIGHUP was ignored when this process was started. Call it before a handler is installed; it also notes
/// whether there is a terminal.
#[must_use]
pub fn is_ignored() -> bool {
    HAD_TERMINAL.get_or_init(has_terminal);
    ignores(libc::SIGHUP)
}

/// Has a SIGHUP wait until [`let_go`]: one that comes while guest memory is made, say, would end the process before anybody
/// could look what it means. For the thread that calls, and those that it starts. It also notes whether there is a terminal.
///
/// # Errors
/// The kernel's.
pub fn hold() -> io::Result<()> {
    HAD_TERMINAL.get_or_init(has_terminal);
    match signal::block_signal(libc::SIGHUP) {
        Err(signal::Error::SignalAlreadyBlocked(_)) => Ok(()),
        done => done.map_err(in_words),
    }
}

/// There is a handler now. For the thread that calls.
///
/// # Errors
/// The kernel's.
pub fn let_go() -> io::Result<()> {
    signal::unblock_signal(libc::SIGHUP).map_err(in_words)
}

/// vmm-sys-util's errors are none of the standard library's.
fn in_words(error: signal::Error) -> io::Error {
    io::Error::other(error.to_string())
}

/// Whether this process ignores `signal`, which it may have inherited.
#[must_use]
pub fn ignores(signal: i32) -> bool {
    // SAFETY: sigaction is plain data, and a null action changes nothing.
    let (result, now) = unsafe {
        let mut now: libc::sigaction = std::mem::zeroed();
        (libc::sigaction(signal, std::ptr::null(), &raw mut now), now)
    };
    result == 0 && now.sa_sigaction == libc::SIG_IGN
}

/// Whether a SIGHUP that has arrived ends the VM.
#[must_use]
pub fn is_the_end() -> bool {
    terminal::is_raw() || (HAD_TERMINAL.get() == Some(&true) && !has_terminal())
}

/// Whether this process has a controlling terminal.
fn has_terminal() -> bool {
    let flags = libc::O_NOCTTY | libc::O_NONBLOCK;
    OpenOptions::new().read(true).custom_flags(flags).open("/dev/tty").is_ok()
}
