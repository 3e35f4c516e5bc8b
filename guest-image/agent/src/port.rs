//! The line to the outside: a serial port, a socket, or stdin and stdout.
//!
//! Behind an emulated UART every byte costs an exit from the virtual machine, so the kernel's
//! log can keep the port busy for seconds. Replies and events therefore go first: the log waits
//! while one of them does, and never fills the driver's buffer.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::Duration;

use serde::Serialize;

/// The word for stdin and stdout that are a connection from outside, which `vsock` gives to the agent that
/// it starts for each.
pub const SOCKET: &str = "socket";
/// How long what was written to a socket is given to leave: kernels before 6.11 do not say of vsock when it has.
const LEAVING: Duration = Duration::from_millis(200);
/// Longest request; a longer line is noise and is dropped.
const MAX_LINE: usize = 16 << 10;
/// Most bytes of log that may wait in the driver, so that a reply is never far behind.
const LOG_AHEAD: i32 = 512;

/// What a line is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A serial port, so a machine of its own.
    Serial,
    /// A connection from outside this machine, which is then one of its own, too.
    Socket,
    /// Stdin and stdout, perhaps of your own machine.
    Stdio,
}

/// The outgoing half; lines are written whole, from any thread.
pub struct Port {
    out: Mutex<File>,
    fd: i32,
    /// Replies and events that wait for `out`.
    urgent: AtomicUsize,
    kind: Kind,
}

/// Opens `path`, or stdin and stdout for `-` (and for [`SOCKET`], where they are one), and returns both
/// halves.
///
/// # Errors
/// The path, what was tried and what the kernel said.
pub fn open(path: &str) -> Result<(Lines, Port), String> {
    let kind = match path {
        "-" => Kind::Stdio,
        SOCKET => Kind::Socket,
        _ => Kind::Serial,
    };
    if kind != Kind::Serial {
        let duplicate = |fd: io::Result<OwnedFd>| {
            fd.map(File::from).map_err(|e| format!("stdin or stdout: {e}"))
        };
        let input = duplicate(io::stdin().as_fd().try_clone_to_owned())?;
        let output = duplicate(io::stdout().as_fd().try_clone_to_owned())?;
        return Ok((Lines::new(input), Port::new(output, kind)));
    }
    // Without O_NONBLOCK the open would wait for a carrier that an emulated port may not show.
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK)
        .open(path)
        .map_err(|e| format!("{path}: cannot be opened for reading and writing: {e}"))?;
    raw(&file).map_err(|e| format!("{path}: expected a serial port: {e}"))?;
    let input = file.try_clone().map_err(|e| format!("{path}: {e}"))?;
    Ok((Lines::new(input), Port::new(file, kind)))
}

fn raw(file: &File) -> io::Result<()> {
    let fd = file.as_raw_fd();
    // SAFETY: all-zero is a valid termios, tcgetattr fills it in; the descriptor is open.
    let failed = unsafe {
        let mut mode: libc::termios = std::mem::zeroed();
        libc::tcgetattr(fd, &raw mut mode) < 0 || {
            libc::cfmakeraw(&raw mut mode);
            mode.c_cflag |= libc::CLOCAL | libc::CREAD;
            // The speed by hand: the libc crate asks for cfsetspeed by a versioned name, which
            // a static C library does not have.
            mode.c_cflag &= !(libc::CRTSCTS | libc::CBAUD);
            mode.c_cflag |= libc::B115200;
            mode.c_cc[libc::VMIN] = 1;
            mode.c_cc[libc::VTIME] = 0;
            let flags = libc::fcntl(fd, libc::F_GETFL);
            libc::tcsetattr(fd, libc::TCSANOW, &raw const mode) < 0
                || flags < 0
                || libc::fcntl(fd, libc::F_SETFL, flags & !libc::O_NONBLOCK) < 0
        }
    };
    if failed {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

impl Port {
    /// Makes `out` the outgoing half.
    pub fn new(out: File, kind: Kind) -> Self {
        Self { fd: out.as_raw_fd(), out: Mutex::new(out), urgent: AtomicUsize::new(0), kind }
    }

    /// Whether the agent is in a machine of its own, with which it may do anything.
    pub fn is_machine(&self) -> bool {
        self.kind != Kind::Stdio
    }

    /// Whether it goes on where the other side stops: a port has no end.
    pub fn is_endless(&self) -> bool {
        self.kind == Kind::Serial
    }

    /// The descriptor that lines go to; open as long as the port is.
    pub fn fd(&self) -> i32 {
        self.fd
    }

    /// Writes a reply or an event.
    ///
    /// # Errors
    /// What write(2) said.
    pub fn send<T: Serialize>(&self, message: &T) -> io::Result<()> {
        self.urgent.fetch_add(1, Ordering::Relaxed);
        let result = self.write(message);
        self.urgent.fetch_sub(1, Ordering::Relaxed);
        result
    }

    /// Writes a line that can wait.
    ///
    /// # Errors
    /// What write(2) said.
    pub fn send_later<T: Serialize>(&self, message: &T) -> io::Result<()> {
        while self.urgent.load(Ordering::Relaxed) > 0 || self.queued() > LOG_AHEAD {
            sleep(Duration::from_millis(2));
        }
        self.write(message)
    }

    fn write<T: Serialize>(&self, message: &T) -> io::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        out.write_all(&line)
    }

    fn queued(&self) -> i32 {
        let mut bytes = 0i32;
        if self.is_machine() {
            // A socket that does not say how much waits (EOPNOTSUPP) blocks when it is too much.
            // SAFETY: TIOCOUTQ writes one int; the descriptor lives as long as `self`.
            unsafe { libc::ioctl(self.fd, libc::TIOCOUTQ, &raw mut bytes) };
        }
        bytes
    }

    /// Waits until everything written has left the machine.
    pub fn drain(&self) {
        if self.kind == Kind::Socket {
            return sleep(LEAVING);
        }
        // SAFETY: the descriptor lives as long as `self`.
        unsafe { libc::tcdrain(self.fd) };
    }
}

/// The incoming half, cut into lines.
pub struct Lines {
    input: File,
    partial: Vec<u8>,
    overlong: bool,
}

impl Lines {
    /// Makes `input` the incoming half.
    pub fn new(input: File) -> Self {
        Self { input, partial: Vec::new(), overlong: false }
    }

    /// The descriptor to wait on.
    pub fn fd(&self) -> i32 {
        self.input.as_raw_fd()
    }

    /// Reads once and returns the lines that are complete, without empty ones; `None` at the
    /// end of the input.
    ///
    /// # Errors
    /// What read(2) said.
    pub fn read(&mut self) -> io::Result<Option<Vec<String>>> {
        let mut bytes = [0; 512];
        match self.input.read(&mut bytes) {
            Ok(0) => Ok(None),
            Ok(count) => Ok(Some(self.take(&bytes[..count]))),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(Some(Vec::new())),
            Err(e) => Err(e),
        }
    }

    fn take(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for &byte in bytes {
            // A carriage return ends a line as well, so CR, LF and CR LF all work.
            if byte == b'\n' || byte == b'\r' {
                let line = String::from_utf8_lossy(&self.partial).trim().to_owned();
                if !line.is_empty() && !self.overlong {
                    lines.push(line);
                }
                self.partial.clear();
                self.overlong = false;
            } else if self.partial.len() < MAX_LINE {
                self.partial.push(byte);
            } else {
                self.overlong = true;
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_with_cr_lf_or_both_and_may_come_in_pieces() {
        let mut lines = Lines::new(File::open("/dev/null").unwrap());
        assert_eq!(lines.take(b"pi"), Vec::<String>::new());
        assert_eq!(lines.take(b"ng\r\n\n  \nlog off\rcheck"), ["ping", "log off"]);
        assert_eq!(lines.take(b"\n"), ["check"]);
        assert_eq!(lines.take(&[b'x'; MAX_LINE + 1]), Vec::<String>::new());
        assert_eq!(lines.take(b"\nping\n"), ["ping"]);
    }

    #[test]
    fn what_is_no_port_is_refused_by_name() {
        for path in ["/dev/null", "/no/such/port"] {
            let error = open(path).err().unwrap();
            assert!(error.contains(path), "{error}");
        }
    }
}
