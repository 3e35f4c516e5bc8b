//! Sets the user's terminal to raw mode, restores it on every way out, and finds the escape that leaves the VM.

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

/// The terminal's settings before the first VM.
static SAVED: OnceLock<libc::termios> = OnceLock::new();
/// Whether they were changed.
static RAW: AtomicBool = AtomicBool::new(false);
/// Whether raw mode is wanted: a VM uses the terminal, and the process is not ending.
static WANTED: AtomicBool = AtomicBool::new(false);
/// A thread is about to set raw mode, if it is still wanted.
static SETTING: AtomicBool = AtomicBool::new(false);
/// How long that may take once it has begun.
const SET_WITHIN: Duration = Duration::from_millis(50);
/// The terminal may have other settings than those that were made, as the process was stopped since.
static STALE: AtomicBool = AtomicBool::new(false);
/// The process was stopped and continues: owner and settings of the terminal have to be looked at anew.
static CONTINUED: AtomicBool = AtomicBool::new(false);
/// An eventfd that wakes the thread that reads the terminal after that; below 0 for none.
static WAKE: AtomicI32 = AtomicI32::new(-1);
static HOOKS: Once = Once::new();
static SAID: Once = Once::new();

/// Which job the terminal at standard input belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// This process: it may read the terminal and set its modes.
    Us,
    /// Another job, most often the shell: this process is in the background.
    Others,
    /// None: the terminal is gone.
    Nobody,
}

pub(super) extern "C" fn on_sigcont(_: libc::c_int) {
    // The shell may have changed the terminal's settings. If nothing was stopped it has not, and they still have to be
    // restored.
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

/// An eventfd that is written whenever the process continues after a stop; made once, and never closed.
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

/// Whether the process was stopped and continued since the last call.
pub fn has_continued() -> bool {
    CONTINUED.swap(false, Ordering::SeqCst)
}

/// While this lives, standard input is in raw mode, if it is a terminal and belongs to this process.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Sets raw mode now, or later by [`claim`] when this process comes to the foreground. `None` if standard input is
    /// no terminal.
    ///
    /// # Errors
    /// The terminal refuses its settings.
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

/// Finds out which job the terminal at standard input belongs to, and sets raw mode if it is this process's and not
/// set.
///
/// # Errors
/// The terminal refuses its settings.
pub fn claim() -> io::Result<Owner> {
    match owner() {
        Some(Owner::Us) => {}
        Some(other) => return Ok(other),
        // It is not this session's terminal, so reading it stops no process; its settings are left alone.
        None => return Ok(Owner::Us),
    }
    if is_raw() {
        return Ok(Owner::Us);
    }
    // A thread that ends the process either sees this and waits a moment, or its own mark is seen below.
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
    // Set before the change: to restore too much is harmless.
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

/// Restores the terminal for good, if it is in raw mode and still this process's. May be called in a signal handler.
pub fn restore() {
    WANTED.store(false, Ordering::SeqCst);
    let begun = Instant::now();
    // Limited in time, as the interrupted thread may be the very one that is setting it.
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
        // The VM may run on without the thread that panicked.
        put_back();
        previous(info);
    }));
    // SAFETY: the function may be called at any time and does not unwind.
    unsafe { libc::atexit(restore_at_exit) };
}

/// Which job it belongs to; `None` if it is not the terminal of this session. May be called in a signal handler.
fn owner() -> Option<Owner> {
    static GROUP: AtomicI32 = AtomicI32::new(0);
    // SAFETY: async-signal-safe, and without preconditions.
    let foreground = unsafe { libc::tcgetpgrp(libc::STDIN_FILENO) };
    if foreground < 0 {
        let gone = io::Error::last_os_error().raw_os_error() != Some(libc::ENOTTY);
        return gone.then_some(Owner::Nobody);
    }
    // A shell sets a job's process group before the job begins, and only the main thread's filter allows the question.
    if GROUP.load(Ordering::Relaxed) == 0 {
        // SAFETY: it cannot fail, and takes nothing.
        GROUP.store(unsafe { libc::getpgrp() }, Ordering::Relaxed);
    }
    let ours = foreground == GROUP.load(Ordering::Relaxed);
    Some(if ours { Owner::Us } else { Owner::Others })
}

/// Finds Ctrl-A x in the user's input. Ctrl-A Ctrl-A stands for one Ctrl-A.
#[derive(Debug, Default)]
pub struct Escape {
    armed: bool,
}

impl Escape {
    /// Appends the guest's part of `input` to `output`; returns true if the user wants to leave.
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
