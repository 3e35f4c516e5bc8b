//! The user's terminal in raw mode, put back on every way out, and the escape to leave the VM.

use std::{
    io::{self, IsTerminal},
    mem::MaybeUninit,
    sync::{
        Once, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

/// Ctrl-A, which begins an escape.
const ESCAPE: u8 = 1;

/// How the terminal was before the first VM.
static SAVED: OnceLock<libc::termios> = OnceLock::new();
/// Whether it is different now.
static RAW: AtomicBool = AtomicBool::new(false);
static HOOKS: Once = Once::new();

/// Standard input in raw mode until this is dropped.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Sets raw mode, or does nothing and returns `None` where standard input is no terminal, or
    /// one that another job has (setting it would stop this process).
    ///
    /// # Errors
    /// A terminal that refuses its settings.
    pub fn enter() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() || !in_foreground() {
            return Ok(None);
        }
        let mut now = MaybeUninit::<libc::termios>::uninit();
        // SAFETY: `now` is valid for writing.
        if unsafe { libc::tcgetattr(libc::STDIN_FILENO, now.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: tcgetattr returned 0, so it is filled in.
        let mut raw = *SAVED.get_or_init(|| unsafe { now.assume_init() });
        HOOKS.call_once(install_hooks);
        // SAFETY: `raw` is an initialised termios.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        // Our own messages end in a bare newline.
        raw.c_oflag |= libc::OPOST | libc::ONLCR;
        // Before the change: whatever happens in between, restoring is harmless.
        RAW.store(true, Ordering::SeqCst);
        // SAFETY: `raw` is an initialised termios.
        if unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const raw) } != 0 {
            RAW.store(false, Ordering::SeqCst);
            return Err(io::Error::last_os_error());
        }
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back, if it is in raw mode. May be called in a signal handler.
pub fn restore() {
    if RAW.swap(false, Ordering::SeqCst)
        && let Some(saved) = SAVED.get()
    {
        // SAFETY: `saved` is what tcgetattr gave; tcsetattr is async-signal-safe.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, saved) };
    }
}

extern "C" fn restore_at_exit() {
    restore();
}

fn install_hooks() {
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        previous(info);
    }));
    // SAFETY: the function may be called at any time and does not unwind.
    unsafe { libc::atexit(restore_at_exit) };
}

fn in_foreground() -> bool {
    // SAFETY: neither has preconditions.
    unsafe { libc::tcgetpgrp(libc::STDIN_FILENO) == libc::getpgrp() }
}

/// Finds Ctrl-A x in what the user types. Ctrl-A Ctrl-A is one Ctrl-A.
#[derive(Debug, Default)]
pub struct Escape {
    armed: bool,
}

impl Escape {
    /// Appends to `output` what is meant for the guest; true if the user wants to leave.
    pub fn feed(&mut self, input: &[u8], output: &mut Vec<u8>) -> bool {
        for byte in input {
            match (std::mem::take(&mut self.armed), *byte) {
                (true, b'x' | b'X') => return true,
                (false, ESCAPE) => self.armed = true,
                (_, byte) => output.push(byte),
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(parts: &[&[u8]]) -> (bool, Vec<u8>) {
        let mut escape = Escape::default();
        let mut output = Vec::new();
        let left = parts.iter().any(|part| escape.feed(part, &mut output));
        (left, output)
    }

    #[test]
    fn only_ctrl_a_x_leaves() {
        assert_eq!(feed(&[b"ls\r"]), (false, b"ls\r".to_vec()));
        assert_eq!(feed(&[b"a\x01xb"]), (true, b"a".to_vec()));
        assert_eq!(feed(&[b"\x01", b"x"]), (true, vec![]), "in two reads");
        assert_eq!(feed(&[b"\x01\x01x"]), (false, b"\x01x".to_vec()));
        assert_eq!(feed(&[b"\x01ax"]), (false, b"ax".to_vec()));
    }

    #[test]
    fn restoring_twice_or_never_entered_is_harmless() {
        restore();
        restore();
    }
}
