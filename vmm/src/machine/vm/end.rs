//! Waits for a VM's end, which a termination signal causes, too.

use std::io;
use std::os::fd::{AsRawFd, IntoRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::machine::lifecycle::VmControl;
use crate::machine::lifecycle::reasons::{ExitReason, StopCause};
use crate::outlets::files;
use crate::sandbox::{hangup, sigbus_fallback};

/// Reading ends of pipes that the signal handlers write to. Made once and kept: a signal that comes between two VMs
/// ends the second one.
pub(crate) fn termination_pipes() -> io::Result<[(i32, RawFd); 3]> {
    static PIPES: Mutex<Option<[(i32, RawFd); 3]>> = Mutex::new(None);
    let mut pipes = PIPES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(pipes) = *pipes {
        return Ok(pipes);
    }
    let pipe = |signal| -> io::Result<(i32, RawFd)> {
        // A signal that was ignored at the start (nohup(1), a shell without job control) stays ignored. poll skips -1.
        let ignored = if signal == SIGHUP { hangup::is_ignored() } else { hangup::ignores(signal) };
        if ignored {
            return Ok((signal, -1));
        }
        let (read, write) = UnixStream::pair()?;
        read.set_nonblocking(true)?;
        signal_hook::low_level::pipe::register(signal, write)?;
        Ok((signal, read.into_raw_fd()))
    };
    let made = [pipe(SIGTERM)?, pipe(SIGINT)?, pipe(SIGHUP)?];
    *pipes = Some(made);
    hangup::let_go()?;
    Ok(made)
}

/// Returns when the VM has ended; a termination signal ends it.
pub(crate) fn wait_for_end(control: &VmControl) {
    let pipes = match termination_pipes() {
        Ok(pipes) => pipes,
        Err(error) => {
            let what = format!("cannot watch for termination signals: {error}");
            control.stop(ExitReason::Fatal(what));
            return;
        }
    };
    let pollfd = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    while control.exit_reason().is_none() {
        let mut fds = [
            pollfd(control.ended().as_raw_fd()),
            pollfd(pipes[0].1),
            pollfd(pipes[1].1),
            pollfd(pipes[2].1),
            pollfd(files::wanted().unwrap_or(-1)),
        ];
        sigbus_fallback::while_waiting(|| {
            // SAFETY: the array is valid and as long as said.
            unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
        });
        for (signal, fd) in pipes {
            let mut byte = [0_u8; 16];
            // SAFETY: the buffer is valid for writes of its length; the descriptor is ours for
            // the life of the process and does not block.
            let n = unsafe { libc::read(fd, byte.as_mut_ptr().cast(), byte.len()) };
            match signal {
                _ if n <= 0 => {}
                SIGHUP if !hangup::is_the_end() => files::reopen(),
                _ => control.stop(ExitReason::Stopped(StopCause::Signal(signal))),
            }
        }
        if fds[4].revents != 0 {
            files::attend();
        }
    }
}
