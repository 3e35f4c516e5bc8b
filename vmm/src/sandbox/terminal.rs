//! The user's terminal in raw mode, put back on every way out, and the escape to leave the VM.

use std::io::{self, IsTerminal};
use std::mem::MaybeUninit;
use std::os::fd::{IntoRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Once, OnceLock};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub mod deadly;
pub mod stops;

/// Ctrl-A, which begins an escape.
const ESCAPE: u8 = 1;

/// How the terminal was before the first VM.
static SAVED: OnceLock<libc::termios> = OnceLock::new();
/// Whether it is different now.
static RAW: AtomicBool = AtomicBool::new(false);
/// Raw mode is wanted: there is a VM that has the terminal, and the process does not end yet.
static WANTED: AtomicBool = AtomicBool::new(false);
/// A thread is about to set raw mode, and does so if it was wanted by then.
static SETTING: AtomicBool = AtomicBool::new(false);
/// So long may that take it, once it has begun.
const SET_WITHIN: Duration = Duration::from_millis(50);
/// The modes may be others than those that were set, as the process was stopped since.
static STALE: AtomicBool = AtomicBool::new(false);
/// The process was stopped and goes on: whose the terminal is, and how it is set, has to be looked at anew.
static CONTINUED: AtomicBool = AtomicBool::new(false);
/// An eventfd that wakes whoever reads the terminal after that; below 0, nobody.
static WAKE: AtomicI32 = AtomicI32::new(-1);
static HOOKS: Once = Once::new();
static SAID: Once = Once::new();

/// Whose the terminal at standard input is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// This process may read it and set its modes.
    Us,
    /// Another job's, most often the shell's: this one is in the background.
    Others,
    /// It has gone.
    Nobody,
}

pub(super) extern "C" fn on_sigcont(_: libc::c_int) {
    // The shell may have set the terminal as it wants it. Or not, where nothing was stopped: then it is still to be
    // put back.
    STALE.store(true, Ordering::SeqCst);
    CONTINUED.store(true, Ordering::SeqCst);
    let wake = WAKE.load(Ordering::SeqCst);
    if wake >= 0 {
        let one = 1_u64;
        // SAFETY: write is async-signal-safe, and every filter has it; the eventfd is never closed. errno is
        // put back for the code that was interrupted.
        unsafe {
            let errno = *libc::__errno_location();
            libc::write(wake, (&raw const one).cast(), size_of::<u64>());
            *libc::__errno_location() = errno;
        }
    }
}

/// An eventfd that is written to whenever the process goes on after a stop; made once, and never closed.
///
/// # Errors
/// There are no more file descriptors.
pub fn continued_event() -> io::Result<RawFd> {
    let known = WAKE.load(Ordering::SeqCst);
    if known >= 0 {
        return Ok(known);
    }
    let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
    let fd = event.into_raw_fd();
    WAKE.store(fd, Ordering::SeqCst);
    Ok(fd)
}

/// Whether the process was stopped and goes on, since this was asked before.
pub fn has_continued() -> bool {
    CONTINUED.swap(false, Ordering::SeqCst)
}

/// Standard input in raw mode, where it is a terminal and as long as it is ours, until this is dropped.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Sets raw mode, now or, by [`claim`], when this process comes to the foreground. `None` where standard
    /// input is no terminal.
    ///
    /// # Errors
    /// A terminal that refuses its settings.
    pub fn enter() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        HOOKS.call_once(install_hooks);
        WANTED.store(true, Ordering::SeqCst);
        claim()?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Sees whose the terminal at standard input is, and sets raw mode if it is ours and not set.
///
/// # Errors
/// A terminal that refuses its settings.
pub fn claim() -> io::Result<Owner> {
    match owner() {
        Some(Owner::Us) => {}
        Some(other) => return Ok(other),
        // Not this session's terminal: nobody is stopped for reading it, and it is left as it is.
        None => return Ok(Owner::Us),
    }
    if is_raw() {
        return Ok(Owner::Us);
    }
    // Whoever ends the process either sees this, and waits a moment, or is seen here.
    SETTING.store(true, Ordering::SeqCst);
    let set = if WANTED.load(Ordering::SeqCst) { set_raw() } else { Ok(()) };
    SETTING.store(false, Ordering::SeqCst);
    set.map(|()| Owner::Us)
}

fn set_raw() -> io::Result<()> {
    STALE.store(false, Ordering::SeqCst);
    let mut now = MaybeUninit::<libc::termios>::uninit();
    // SAFETY: `now` is valid for writing.
    if unsafe { libc::tcgetattr(libc::STDIN_FILENO, now.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: tcgetattr returned 0, so it is filled in.
    let mut raw = *SAVED.get_or_init(|| unsafe { now.assume_init() });
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
    SAID.call_once(|| {
        eprintln!(
            "mce-relay: this terminal is a serial port of the guest's now; Ctrl-A x ends the VM"
        );
    });
    Ok(())
}

/// Puts the terminal back for good, if it is in raw mode and still ours. May be called in a signal handler.
pub fn restore() {
    WANTED.store(false, Ordering::SeqCst);
    let begun = Instant::now();
    // It may be this very thread that was interrupted in it.
    while SETTING.load(Ordering::SeqCst) && begun.elapsed() < SET_WITHIN {
        std::hint::spin_loop();
    }
    put_back();
}

fn put_back() {
    if RAW.swap(false, Ordering::SeqCst)
        && owner() == Some(Owner::Us)
        && let Some(saved) = SAVED.get()
    {
        // SAFETY: `saved` is what tcgetattr gave; tcsetattr is async-signal-safe.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, saved) };
    }
}

/// Whether the terminal is in raw mode now, for a VM of this process.
#[must_use]
pub fn is_raw() -> bool {
    RAW.load(Ordering::SeqCst) && !STALE.load(Ordering::SeqCst)
}

extern "C" fn restore_at_exit() {
    restore();
}

fn install_hooks() {
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        // The thread may be one that the VM goes on without.
        put_back();
        previous(info);
    }));
    // SAFETY: the function may be called at any time and does not unwind.
    unsafe { libc::atexit(restore_at_exit) };
}

/// Whose it is; `None` where it is not the terminal of this session. May be called in a signal handler.
fn owner() -> Option<Owner> {
    static GROUP: AtomicI32 = AtomicI32::new(0);
    // SAFETY: async-signal-safe, and without preconditions.
    let foreground = unsafe { libc::tcgetpgrp(libc::STDIN_FILENO) };
    if foreground < 0 {
        let gone = io::Error::last_os_error().raw_os_error() != Some(libc::ENOTTY);
        return gone.then_some(Owner::Nobody);
    }
    // A shell gives a job its process group before the job begins, and only the main thread may ask for it.
    if GROUP.load(Ordering::Relaxed) == 0 {
        // SAFETY: it cannot fail, and takes nothing.
        GROUP.store(unsafe { libc::getpgrp() }, Ordering::Relaxed);
    }
    let ours = foreground == GROUP.load(Ordering::Relaxed);
    Some(if ours { Owner::Us } else { Owner::Others })
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
