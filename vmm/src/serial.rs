//! A serial port: a UART for the guest, a queue, and a thread that moves bytes.
//!
//! The guest's side never waits: a vCPU puts output into a bounded queue, and where nobody takes it
//! the oldest bytes are dropped and counted. All that can block is on the port's own thread.
//!
//! A [`SerialLine`] is what leads out of this process: a file, a socket or the terminal, with the queue and the
//! thread. It lives as long as the process. A [`SerialPort`] is a guest's UART on it, and is another one at each
//! boot; whoever is connected to the line stays so.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, BorrowedFd, RawFd},
        unix::{
            fs::{FileTypeExt, OpenOptionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use thiserror::Error;
use vm_superio::Serial;

use crate::{
    config::SerialMode,
    control::{ExitReason, StopCause, VmControl},
    files::{self, Appended, LogFile},
    seccomp::{self, Filters},
    show::counted,
    sockets::{self, BindError, BoundPath},
    terminal::{self, Escape, Owner, RawMode},
};

mod link;

use link::{Events, Guest, Irq, Link, Output, Uart};

/// How much output waits for a reader, in bytes.
pub const QUEUE_LEN: usize = 1 << 20;
/// The most that goes to a reader at once: a pipe that is writable takes this without blocking.
const CHUNK: usize = 4096;
/// How long the end of the VM waits for a reader to take what is left.
const DRAIN: Duration = Duration::from_secs(1);
/// How long the thread gathers output after it has written some. Output comes byte by byte, and to
/// be woken for each would cost more than the byte.
const LINGER_MS: i32 = 5;
/// How often input is offered again to a guest that does not take it.
const RETRY_MS: i32 = 100;
/// How often it is looked whether a terminal that another job has is ours now: a shell does not say so to a
/// job that it takes to the foreground while it runs.
const BACKGROUND_MS: i32 = 250;

/// Why there is no serial port.
#[derive(Debug, Error)]
pub enum SerialError {
    /// No more file descriptors.
    #[error("cannot create an eventfd for a serial port")]
    EventFd(#[source] io::Error),
    /// The terminal refused raw mode.
    #[error("cannot set the terminal to raw mode")]
    Terminal(#[source] io::Error),
    /// Standard output could not be used.
    #[error("cannot use standard output for a serial port")]
    Stdout(#[source] io::Error),
    /// The output file could not be made.
    #[error("cannot open the serial output file {}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The socket could not be made.
    #[error("cannot make a serial socket at {}", path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: BindError,
    },
    /// The thread could not be started.
    #[error("cannot start the thread of a serial port")]
    Thread(#[source] io::Error),
}

/// Raises a serial port's interrupt: an edge.
pub type IrqLine = Arc<dyn Fn() + Send + Sync>;

/// What leads from a serial port out of this process.
#[derive(Debug)]
pub struct SerialLine {
    link: Arc<Link>,
    thread: Option<JoinHandle<()>>,
    number: u8,
    /// It leads to a file that keeps what is written; so words of the VMM's own may stand in it.
    keeps: bool,
    /// That file had something in it at the beginning.
    was_begun: bool,
    /// The boot that was noted last.
    noted: AtomicU32,
    /// Of a socket; it goes when this does.
    _path: Option<BoundPath>,
    _raw: Option<RawMode>,
}

impl SerialLine {
    /// The way out for port `number` (0 is COM1), or `None` if it is off. Its thread is under `filters`.
    ///
    /// # Errors
    /// See [`SerialError`].
    pub fn open(
        number: u8,
        mode: &SerialMode,
        filters: &Filters,
    ) -> Result<Option<Self>, SerialError> {
        let Some((endpoint, path)) = Endpoint::open(mode)? else {
            return Ok(None);
        };
        let link = Arc::new(Link::new().map_err(SerialError::EventFd)?);
        let (mut keeps, mut was_begun) = (false, false);
        if let Endpoint::File(file) = &endpoint {
            (keeps, was_begun) = (file.is_regular(), file.was_begun());
            link.queue().mid_line = file.is_mid_line();
        }
        let raw = match mode {
            SerialMode::Tty => RawMode::enter().map_err(SerialError::Terminal)?,
            _ => None,
        };
        let tty = match &raw {
            Some(_) => Some(terminal::continued_event().map_err(SerialError::EventFd)?),
            None => None,
        };
        let mover = Mover {
            endpoint,
            tty,
            owner: Owner::Others,
            link: Arc::clone(&link),
            escape: Escape::default(),
            leaves: false,
            input: Vec::new(),
            input_of: 0,
            output: Vec::new(),
            stalled: None,
        };
        let thread = filters
            .spawn(seccomp::Thread::Serial, format!("serial{number}"), move || mover.run())
            .map_err(SerialError::Thread)?;
        let (thread, noted) = (Some(thread), AtomicU32::new(0));
        Ok(Some(Self { link, thread, number, keeps, was_begun, noted, _path: path, _raw: raw }))
    }

    /// Writes a line between what guests say into a file, when boot `boot` (1 is the first) begins.
    pub fn note_boot(&self, boot: u32) {
        let again = self.noted.swap(boot, Ordering::Relaxed) == boot;
        if !again && self.keeps && (self.was_begun || boot > 1) {
            let now = Timestamp::now();
            self.link.push_line(&format!("--- mce-relay: boot {boot}, {now:.0} ---"));
        }
    }

    /// Bytes of output that were dropped, because nobody took them.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.link.queue().dropped
    }
}

impl Drop for SerialLine {
    fn drop(&mut self) {
        self.link.ending.store(true, Ordering::Release);
        self.link.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of serial port {} panicked", self.number);
        }
        let dropped = self.dropped();
        if dropped > 0 {
            let dropped = counted(dropped, "byte");
            log::warn!("serial port {}: {dropped} of output dropped", self.number);
        }
    }
}

/// Both serial ports' ways out, COM1 first.
pub type SerialLines = [Option<Arc<SerialLine>>; 2];

/// Opens both.
///
/// # Errors
/// See [`SerialError`].
pub fn open_lines(modes: &[SerialMode; 2], filters: &Filters) -> Result<SerialLines, SerialError> {
    let mut lines = SerialLines::default();
    for ((number, mode), line) in (0..).zip(modes).zip(&mut lines) {
        *line = SerialLine::open(number, mode, filters)?.map(Arc::new);
    }
    Ok(lines)
}

/// One serial port, of one boot of the guest.
#[derive(Debug)]
pub struct SerialPort {
    uart: Arc<Mutex<Uart>>,
    line: Arc<SerialLine>,
}

impl SerialPort {
    /// A new UART on `line` that interrupts the guest by `irq`. A line has one at a time.
    #[must_use]
    pub fn on(line: &Arc<SerialLine>, control: &VmControl, irq: IrqLine) -> Self {
        let link = &line.link;
        let uart = Arc::new(Mutex::new(Serial::with_events(
            Irq(irq),
            Events(Arc::clone(link)),
            Output(Arc::clone(link)),
        )));
        link.set_guest(Some(Guest { uart: Arc::clone(&uart), control: control.clone() }));
        Self { uart, line: Arc::clone(line) }
    }

    fn uart(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest reads a register.
    #[must_use]
    pub fn read(&self, offset: u8) -> u8 {
        self.uart().read(offset)
    }

    /// The guest writes a register.
    pub fn write(&self, offset: u8, value: u8) {
        if let Err(error) = self.uart().write(offset, value) {
            log::warn!("serial port {}: {error}", self.line.number);
        }
    }
}

impl Drop for SerialPort {
    fn drop(&mut self) {
        self.line.link.set_guest(None);
    }
}

/// Where the bytes go and come from.
#[derive(Debug)]
enum Endpoint {
    File(Appended),
    Terminal { output: File, input_open: bool },
    Socket { listener: UnixListener, client: Option<UnixStream>, input_open: bool },
}

impl Endpoint {
    fn open(mode: &SerialMode) -> Result<Option<(Self, Option<BoundPath>)>, SerialError> {
        Ok(Some(match mode {
            SerialMode::Off => return Ok(None),
            SerialMode::Tty => {
                let output = own_stdout().map_err(SerialError::Stdout)?;
                (Self::Terminal { output, input_open: true }, None)
            }
            SerialMode::File(to) => (Self::File(open_file(to)?), None),
            SerialMode::Socket(path) => {
                let (endpoint, path) = listen(path)?;
                (endpoint, Some(path))
            }
        }))
    }

    /// Whether it is a file that keeps what is written.
    fn keeps(&self) -> bool {
        matches!(self, Self::File(file) if file.is_regular())
    }

    fn output_fd(&self) -> Option<RawFd> {
        match self {
            Self::File(file) => Some(file.as_raw_fd()),
            Self::Terminal { output: file, .. } => Some(file.as_raw_fd()),
            Self::Socket { client, .. } => client.as_ref().map(AsRawFd::as_raw_fd),
        }
    }

    fn input_fd(&self) -> Option<RawFd> {
        match self {
            Self::Terminal { input_open: true, .. } => Some(libc::STDIN_FILENO),
            Self::Socket { client, input_open: true, .. } => {
                client.as_ref().map(AsRawFd::as_raw_fd)
            }
            _ => None,
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::File(file) => file.write(bytes),
            Self::Terminal { output: file, .. } => file.write(bytes),
            Self::Socket { client: Some(client), .. } => client.write(bytes),
            Self::Socket { client: None, .. } => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::File(_) => Ok(0),
            // Not std's Stdin: its buffer would hide bytes from poll.
            Self::Terminal { .. } => {
                // SAFETY: the buffer is valid for writes of its length.
                let n = unsafe {
                    libc::read(libc::STDIN_FILENO, buffer.as_mut_ptr().cast(), buffer.len())
                };
                usize::try_from(n).map_err(|_| io::Error::last_os_error())
            }
            Self::Socket { client: Some(client), .. } => client.read(buffer),
            Self::Socket { client: None, .. } => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn end_of_input(&mut self) {
        match self {
            Self::Terminal { input_open, .. } | Self::Socket { input_open, .. } => {
                *input_open = false;
            }
            Self::File(_) => {}
        }
    }
}

fn open_file(to: &LogFile) -> Result<Appended, SerialError> {
    // A FIFO without a reader is an error, not a wait without end.
    Appended::open(to, false).map_err(|source| SerialError::File { path: to.path.clone(), source })
}

fn listen(path: &Path) -> Result<(Endpoint, BoundPath), SerialError> {
    let error = |source| SerialError::Socket { path: path.into(), source };
    let (listener, bound) = sockets::bind(path).map_err(error)?;
    listener.set_nonblocking(true).map_err(|source| error(source.into()))?;
    Ok((Endpoint::Socket { listener, client: None, input_open: false }, bound))
}

/// Standard output, where possible through a description of our own that does not block: setting
/// the shared one would change it under the feet of whoever else writes to it.
fn own_stdout() -> io::Result<File> {
    // SAFETY: standard output is open as long as the process (std sees to it).
    let stdout = unsafe { BorrowedFd::borrow_raw(libc::STDOUT_FILENO) };
    let shared = File::from(stdout.try_clone_to_owned()?);
    let kind = shared.metadata()?.file_type();
    if kind.is_char_device() || kind.is_fifo() {
        let own = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open("/proc/self/fd/1");
        if let Ok(own) = own {
            return Ok(own);
        }
    }
    Ok(shared)
}

/// The port's thread.
struct Mover {
    endpoint: Endpoint,
    /// Where standard input is a terminal: what wakes this thread after the process was stopped.
    tty: Option<RawFd>,
    /// Whose that terminal was when it was last looked at.
    owner: Owner,
    link: Arc<Link>,
    escape: Escape,
    /// The user has typed the escape, and there was no guest to end.
    leaves: bool,
    /// Read, and not yet taken by the UART.
    input: Vec<u8>,
    /// For which guest, by its number.
    input_of: u64,
    /// Taken from the queue, and not yet written.
    output: Vec<u8>,
    /// A file could not be written to, and is tried again then.
    stalled: Option<Instant>,
}

impl Mover {
    fn run(mut self) {
        let mut deadline = None;
        loop {
            self.offer_input();
            self.look_at_terminal();
            let has_output = self.refill();
            if self.link.ending.load(Ordering::Acquire) {
                let end = *deadline.get_or_insert_with(|| Instant::now() + DRAIN);
                if !has_output || self.endpoint.output_fd().is_none() || Instant::now() >= end {
                    self.give_up();
                    return;
                }
            }
            if has_output {
                self.link.looking.store(true, Ordering::SeqCst);
            }
            let linger = !has_output && self.link.looking.load(Ordering::SeqCst);
            let timeout = match linger {
                true => LINGER_MS,
                false if deadline.is_some() || !self.input.is_empty() => RETRY_MS,
                false if self.waits_for_terminal() => BACKGROUND_MS,
                false if self.stalled.is_some() => RETRY_MS,
                false => -1,
            };
            if self.stalled.is_some_and(|until| Instant::now() >= until) {
                self.write_output();
            }
            let writes = has_output && self.stalled.is_none();
            self.wait_and_move(writes, timeout);
            if linger {
                self.link.looking.store(false, Ordering::SeqCst);
            }
        }
    }

    /// Sees whose the terminal is, if that may have changed.
    fn look_at_terminal(&mut self) {
        if self.tty.is_none() {
            return;
        }
        let continued = terminal::has_continued();
        if continued || self.waits_for_terminal() {
            // One that refuses raw mode now has not done so at the start; it is tried again.
            self.owner = terminal::claim().unwrap_or(Owner::Others);
        }
        if self.owner == Owner::Nobody {
            self.endpoint.end_of_input();
        }
    }

    fn waits_for_terminal(&self) -> bool {
        self.tty.is_some() && self.owner == Owner::Others
    }

    /// Counts what is left, and will not be in the file.
    fn give_up(&self) {
        if self.endpoint.keeps() {
            let mut queue = self.link.queue();
            queue.dropped += (self.output.len() + queue.bytes.len()) as u64;
        }
    }

    /// Whether there is output to write.
    fn refill(&mut self) -> bool {
        if self.output.is_empty() {
            let mut queue = self.link.queue();
            if self.endpoint.keeps() && queue.untold > 0 {
                let missing = std::mem::take(&mut queue.untold);
                let words = format!("\n--- mce-relay: {missing} bytes are missing here ---\n");
                self.output.extend_from_slice(words.as_bytes());
                return true;
            }
            let n = queue.bytes.len().min(CHUNK);
            self.output.extend(queue.bytes.drain(..n));
        }
        !self.output.is_empty()
    }

    fn offer_input(&mut self) {
        let link = Arc::clone(&self.link);
        let guest = link.guest();
        self.forget_old_input();
        let Some(guest) = guest.as_ref() else { return };
        if std::mem::take(&mut self.leaves) {
            guest.control.stop(ExitReason::Stopped(StopCause::Console));
        }
        if self.input.is_empty() {
            return;
        }
        // Set before the UART is asked, so that the guest emptying it meanwhile is noticed.
        self.link.input_waits.store(true, Ordering::Relaxed);
        let mut uart = guest.uart.lock().unwrap_or_else(PoisonError::into_inner);
        if uart.fifo_capacity() > 0 {
            match uart.enqueue_raw_bytes(&self.input) {
                Ok(taken) => drop(self.input.drain(..taken)),
                Err(error) => log::warn!("serial input: {error}"),
            }
        }
        drop(uart);
        if self.input.is_empty() {
            self.link.input_waits.store(false, Ordering::Relaxed);
        }
    }

    /// What was read for a guest that is gone is not for the next one.
    fn forget_old_input(&mut self) {
        let now = self.link.guests.load(Ordering::SeqCst);
        if std::mem::replace(&mut self.input_of, now) != now {
            self.input.clear();
        }
    }

    /// Where input is to be read from now. Without a guest it stays where it is, but for the escape.
    fn wanted_input(&self) -> Option<RawFd> {
        let takes = self.input.is_empty()
            && (matches!(self.endpoint, Endpoint::Terminal { .. }) || self.link.guest().is_some());
        self.endpoint.input_fd().filter(|_| takes)
    }

    fn wait_and_move(&mut self, has_output: bool, timeout: i32) {
        let pollfd = |fd: Option<RawFd>, events| libc::pollfd {
            // poll skips negative descriptors.
            fd: fd.unwrap_or(-1),
            events,
            revents: 0,
        };
        let listener = match &self.endpoint {
            Endpoint::Socket { listener, client: None, .. } => Some(listener.as_raw_fd()),
            _ => None,
        };
        let is_socket = matches!(self.endpoint, Endpoint::Socket { .. });
        // A client that hangs up shows even if nothing is asked of it; a terminal has no such need.
        let watch_output = has_output || is_socket;
        let mut fds = [
            pollfd(Some(self.link.wake.as_raw_fd()), libc::POLLIN),
            pollfd(
                self.endpoint.output_fd().filter(|_| watch_output),
                if has_output { libc::POLLOUT } else { 0 },
            ),
            // Who reads the terminal of another job is stopped, or takes its keys away.
            pollfd(self.wanted_input().filter(|_| !self.waits_for_terminal()), libc::POLLIN),
            pollfd(listener, libc::POLLIN),
            pollfd(self.tty, libc::POLLIN),
        ];
        // SAFETY: the array is valid and as long as said.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) };
        if ready <= 0 {
            return;
        }
        let [wake, output, input, accept, continued] = fds.map(|fd| fd.revents);
        if wake != 0 {
            let _ = self.link.wake.read();
        }
        if continued != 0
            && let Some(event) = self.tty
        {
            let mut count = 0_u64;
            // SAFETY: an eventfd, which is never closed, is emptied into 8 bytes of our own; it does not block.
            unsafe { libc::read(event, (&raw mut count).cast(), size_of::<u64>()) };
        }
        if input != 0 {
            self.read_input();
        }
        if has_output && output != 0 {
            self.write_output();
        }
        if is_socket && output & (libc::POLLHUP | libc::POLLERR) != 0 {
            self.hang_up();
        }
        if accept != 0 {
            self.accept();
        }
    }

    fn read_input(&mut self) {
        let mut buffer = [0; CHUNK];
        self.forget_old_input();
        match self.endpoint.read(&mut buffer) {
            Ok(0) => self.endpoint.end_of_input(),
            Ok(n) => {
                let bytes = &buffer[..n];
                if !matches!(self.endpoint, Endpoint::Terminal { .. }) {
                    self.input.extend_from_slice(bytes);
                } else if self.escape.feed(bytes, &mut self.input) {
                    self.leaves = true;
                }
            }
            Err(error) if is_transient(&error) => {}
            // This process has just been put into the background.
            Err(error) if self.tty.is_some() && error.raw_os_error() == Some(libc::EIO) => {
                self.owner = Owner::Others;
            }
            Err(_) => self.endpoint.end_of_input(),
        }
    }

    fn write_output(&mut self) {
        if let Endpoint::File(file) = &mut self.endpoint {
            file.renew();
        }
        match self.endpoint.write(&self.output) {
            Ok(n) => {
                self.output.drain(..n);
                if self.stalled.take().is_some() {
                    log::warn!("serial output goes on");
                }
            }
            Err(error) if is_transient(&error) => {}
            Err(error) if self.endpoint.keeps() => self.stall(&error),
            Err(error) => {
                if matches!(self.endpoint, Endpoint::Socket { .. }) {
                    self.hang_up();
                    return;
                }
                // A closed pipe: the guest goes on, what it said is lost.
                let mut queue = self.link.queue();
                if queue.dropped == 0 {
                    log::warn!("cannot write serial output: {error}");
                }
                queue.dropped += self.output.len() as u64;
                self.output.clear();
            }
        }
    }

    /// A full disk, as a rule: what does not find room in the queue meanwhile is lost, and counted.
    fn stall(&mut self, error: &io::Error) {
        if let (None, Endpoint::File(file)) = (self.stalled, &self.endpoint) {
            log::warn!(
                "cannot write serial output to {}: {error}; it is tried again every second, with the last \
                 {QUEUE_LEN} bytes",
                file.path().display()
            );
        }
        self.stalled = Some(Instant::now() + files::RETRY);
    }

    fn hang_up(&mut self) {
        if let Endpoint::Socket { client, input_open, .. } = &mut self.endpoint {
            *client = None;
            *input_open = false;
        }
    }

    fn accept(&mut self) {
        if let Endpoint::Socket { listener, client, input_open, .. } = &mut self.endpoint
            && let Ok((stream, _)) = listener.accept()
            && stream.set_nonblocking(true).is_ok()
        {
            *client = Some(stream);
            *input_open = true;
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: u8 = 0;
    const LINE_STATUS: u8 = 5;

    fn line(mode: &SerialMode) -> Arc<SerialLine> {
        Arc::new(SerialLine::open(1, mode, &Filters::default()).unwrap().unwrap())
    }

    fn port_on(line: &Arc<SerialLine>) -> SerialPort {
        SerialPort::on(line, &VmControl::new(1).unwrap(), Arc::new(|| {}))
    }

    fn port(mode: &SerialMode) -> SerialPort {
        port_on(&line(mode))
    }

    fn print(port: &SerialPort, text: &[u8]) {
        text.iter().for_each(|byte| port.write(DATA, *byte));
    }

    fn receive(port: &SerialPort, n: usize) -> Vec<u8> {
        let end = Instant::now() + Duration::from_secs(10);
        let mut got = Vec::new();
        while got.len() < n && Instant::now() < end {
            if port.read(LINE_STATUS) & 1 == 1 {
                got.push(port.read(DATA));
            } else {
                std::thread::yield_now();
            }
        }
        got
    }

    #[test]
    fn off_is_no_line() {
        assert!(SerialLine::open(0, &SerialMode::Off, &Filters::default()).unwrap().is_none());
    }

    #[test]
    fn a_file_is_appended_to_and_complete_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let mode = SerialMode::File(path.clone().into());
        let port = port(&mode);
        print(&port, b"boot\r\n");
        port.line.note_boot(1);
        drop(port);
        assert_eq!(std::fs::read(&path).unwrap(), b"boot\r\n");

        let line = line(&mode);
        line.note_boot(1);
        for boot in 2..4 {
            let port = port_on(&line);
            print(&port, b"panic");
            drop(port);
            line.note_boot(boot);
            line.note_boot(boot);
        }
        drop(line);
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let [first, one, panic, two, again, three] = lines[..] else { panic!("{text}") };
        assert_eq!((first, panic, again), ("boot", "panic", "panic"));
        for (boot, line) in (1..).zip([one, two, three]) {
            let begin = format!("--- mce-relay: boot {boot}, 2");
            assert!(line.starts_with(&begin) && line.ends_with("Z ---"), "{line}");
        }
    }

    #[test]
    fn a_long_file_is_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let to = LogFile { path: path.clone(), max_size: Some(8) };
        let port = port(&SerialMode::File(to));
        let end = Instant::now() + Duration::from_secs(10);
        print(&port, b"123456789");
        while !files::older(&path).exists() {
            files::attend();
            assert!(Instant::now() < end);
        }
        print(&port, b"abc");
        drop(port);
        assert_eq!(std::fs::read(files::older(&path)).unwrap(), b"123456789");
        assert_eq!(std::fs::read(&path).unwrap(), b"abc");
    }

    #[test]
    fn a_client_stays_while_guests_come_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let line = line(&SerialMode::Socket(path.clone()));
        let mut client = UnixStream::connect(&path).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        for round in [b"one", b"two"] {
            let port = port_on(&line);
            client.write_all(round).unwrap();
            assert_eq!(receive(&port, 3), round);
            print(&port, round);
            let mut echo = [0; 3];
            client.read_exact(&mut echo).unwrap();
            assert_eq!(&echo, round);
            // More than a FIFO holds, which this guest does not take, and the next one is not to get.
            client.write_all(&[b'x'; 100]).unwrap();
            let end = Instant::now() + Duration::from_secs(10);
            while !line.link.input_waits.load(Ordering::Relaxed) {
                assert!(Instant::now() < end);
            }
        }
        let port = port_on(&line);
        client.write_all(b"last").unwrap();
        assert_eq!(receive(&port, 4), b"last");
    }

    #[test]
    fn unusable_paths_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let try_open = |mode| {
            let error = SerialLine::open(1, &mode, &Filters::default()).unwrap_err();
            crate::show::with_causes(&error)
        };
        let absent = dir.path().join("no/such/dir");
        assert!(try_open(SerialMode::File(absent.clone().into())).contains("no/such/dir"));
        assert!(try_open(SerialMode::Socket(absent)).contains("no/such/dir"));
        let taken = dir.path().join("taken");
        std::fs::write(&taken, "").unwrap();
        assert!(try_open(SerialMode::Socket(taken)).contains("the path exists"));
    }

    #[test]
    fn socket_carries_both_ways_and_takes_the_next_client() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let port = port(&SerialMode::Socket(path.clone()));
        print(&port, b"early");
        for round in [b"one", b"two"] {
            let mut client = UnixStream::connect(&path).unwrap();
            client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            if round == b"one" {
                let mut early = [0; 5];
                client.read_exact(&mut early).unwrap();
                assert_eq!(&early, b"early", "kept until somebody came");
            }
            client.write_all(round).unwrap();
            assert_eq!(receive(&port, 3), round);
            print(&port, b"echo");
            let mut echo = [0; 4];
            client.read_exact(&mut echo).unwrap();
            assert_eq!(&echo, b"echo");
        }
        drop(port);
        assert!(!path.exists(), "the socket goes with its line");
    }

    #[test]
    fn long_input_arrives_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let port = port(&SerialMode::Socket(path.clone()));
        let mut client = UnixStream::connect(&path).unwrap();
        let text: Vec<u8> = (0..10_000_u32).map(|i| i.to_le_bytes()[0]).collect();
        client.write_all(&text).unwrap();
        assert_eq!(receive(&port, text.len()), text, "longer than FIFO and buffer");
    }

    #[test]
    fn stuck_reader_costs_the_oldest_bytes_and_no_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let port = port(&SerialMode::Socket(path.clone()));
        let client = UnixStream::connect(&path).unwrap();
        let chunk = [b'x'; 4096];
        for _ in 0..1024 {
            print(&port, &chunk);
        }
        assert!(port.line.dropped() > 0);
        assert!(port.line.link.queue().bytes.len() <= QUEUE_LEN);
        drop(client);
    }

    #[test]
    fn half_closed_client_still_gets_output() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let port = port(&SerialMode::Socket(path.clone()));
        let mut client = UnixStream::connect(&path).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        print(&port, b"still here");
        let mut got = [0; 10];
        client.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"still here");
    }
}
