//! A serial port: a UART for the guest, a queue, and a thread that moves bytes.
//!
//! The guest's side never waits: a vCPU puts output into a bounded queue, and where nobody takes it
//! the oldest bytes are dropped and counted. All that can block is on the port's own thread.

use std::{
    collections::VecDeque,
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
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use thiserror::Error;
use vm_superio::{Serial, Trigger, serial::SerialEvents};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{
    config::SerialMode,
    control::{ExitReason, StopCause, VmControl},
    seccomp::{self, Filters},
    show::counted,
    terminal::{self, Escape, Owner, RawMode},
};

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
    #[error("cannot create the serial output file {}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The path of the socket is taken.
    #[error(
        "cannot make a serial socket at {}: the path exists; remove it if no other VM uses it",
        path.display()
    )]
    SocketExists {
        /// Its path.
        path: PathBuf,
    },
    /// The socket could not be made.
    #[error("cannot make a serial socket at {}", path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The thread could not be started.
    #[error("cannot start the thread of a serial port")]
    Thread(#[source] io::Error),
}

#[derive(Debug, Default)]
struct Queue {
    bytes: VecDeque<u8>,
    dropped: u64,
}

/// What the UART and the port's thread share.
#[derive(Debug)]
struct Link {
    queue: Mutex<Queue>,
    wake: EventFd,
    /// The thread will look at the queue by itself within [`LINGER_MS`].
    looking: AtomicBool,
    /// The thread has input that the UART had no room for.
    input_waits: AtomicBool,
    ending: AtomicBool,
}

impl Link {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // It can only fail when the counter is full, and then the thread is awake anyway.
        let _ = self.wake.write(1);
    }

    fn push(&self, bytes: &[u8]) {
        let mut queue = self.queue();
        let was_empty = queue.bytes.is_empty();
        for byte in bytes {
            if queue.bytes.len() == QUEUE_LEN {
                queue.bytes.pop_front();
                queue.dropped += 1;
            }
            queue.bytes.push_back(*byte);
        }
        drop(queue);
        // The thread clears the flag before it looks a last time, so one of the two sees the other.
        if was_empty && !self.looking.load(Ordering::SeqCst) {
            self.wake();
        }
    }
}

/// Raises a serial port's interrupt: an edge.
pub type IrqLine = Arc<dyn Fn() + Send + Sync>;

/// Called by the UART, most often on the vCPU's own thread in the middle of its port access. An
/// irqfd would have a kernel worker on another processor do it, and kick the vCPU for each byte.
struct Irq(IrqLine);

impl std::fmt::Debug for Irq {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Irq")
    }
}

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        (self.0)();
        Ok(())
    }
}

/// The UART's output.
#[derive(Debug)]
struct Output(Arc<Link>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Tells the thread when the guest has taken all input.
#[derive(Debug)]
struct Events(Arc<Link>);

impl SerialEvents for Events {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        if self.0.input_waits.load(Ordering::Relaxed) {
            self.0.wake();
        }
    }
}

type Uart = Serial<Irq, Events, Output>;

/// One serial port.
#[derive(Debug)]
pub struct SerialPort {
    uart: Arc<Mutex<Uart>>,
    link: Arc<Link>,
    thread: Option<JoinHandle<()>>,
    number: u8,
    _raw: Option<RawMode>,
}

impl SerialPort {
    /// Port `number` (0 is COM1) that interrupts the guest by `irq`, or `None` if it is off. Its thread is
    /// under `filters`.
    ///
    /// # Errors
    /// See [`SerialError`].
    pub fn new(
        number: u8,
        mode: &SerialMode,
        control: &VmControl,
        irq: IrqLine,
        filters: &Filters,
    ) -> Result<Option<Self>, SerialError> {
        let Some(endpoint) = Endpoint::open(mode)? else {
            return Ok(None);
        };
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(SerialError::EventFd);
        let link = Arc::new(Link {
            queue: Mutex::default(),
            wake: event()?,
            looking: AtomicBool::new(false),
            input_waits: AtomicBool::new(false),
            ending: AtomicBool::new(false),
        });
        let uart = Arc::new(Mutex::new(Serial::with_events(
            Irq(irq),
            Events(Arc::clone(&link)),
            Output(Arc::clone(&link)),
        )));
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
            uart: Arc::clone(&uart),
            link: Arc::clone(&link),
            control: control.clone(),
            escape: Escape::default(),
            input: Vec::new(),
            output: Vec::new(),
        };
        let thread = filters
            .spawn(seccomp::Thread::Serial, format!("serial{number}"), move || mover.run())
            .map_err(SerialError::Thread)?;
        Ok(Some(Self { uart, link, thread: Some(thread), number, _raw: raw }))
    }

    /// Bytes of output that were dropped, because nobody took them.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.link.queue().dropped
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
            log::warn!("serial port {}: {error}", self.number);
        }
    }
}

impl Drop for SerialPort {
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

/// A socket's file, removed when the port goes.
#[derive(Debug)]
struct SocketPath(PathBuf);

impl Drop for SocketPath {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Where the bytes go and come from.
#[derive(Debug)]
enum Endpoint {
    File(File),
    Terminal {
        output: File,
        input_open: bool,
    },
    Socket {
        listener: UnixListener,
        client: Option<UnixStream>,
        input_open: bool,
        _path: SocketPath,
    },
}

impl Endpoint {
    fn open(mode: &SerialMode) -> Result<Option<Self>, SerialError> {
        Ok(Some(match mode {
            SerialMode::Off => return Ok(None),
            SerialMode::Tty => Self::Terminal {
                output: own_stdout().map_err(SerialError::Stdout)?,
                input_open: true,
            },
            SerialMode::File(path) => Self::File(
                // Non-blocking: a FIFO without a reader is an error then, not a wait without end.
                OpenOptions::new()
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                    .open(path)
                    .map_err(|source| SerialError::File { path: path.clone(), source })?,
            ),
            SerialMode::Socket(path) => listen(path)?,
        }))
    }

    fn output_fd(&self) -> Option<RawFd> {
        match self {
            Self::File(file) | Self::Terminal { output: file, .. } => Some(file.as_raw_fd()),
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
            Self::File(file) | Self::Terminal { output: file, .. } => file.write(bytes),
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

fn listen(path: &Path) -> Result<Endpoint, SerialError> {
    let error = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => SerialError::SocketExists { path: path.into() },
        _ => SerialError::Socket { path: path.into(), source },
    };
    let listener = UnixListener::bind(path).map_err(error)?;
    let path_guard = SocketPath(path.into());
    listener.set_nonblocking(true).map_err(error)?;
    Ok(Endpoint::Socket { listener, client: None, input_open: false, _path: path_guard })
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
    uart: Arc<Mutex<Uart>>,
    link: Arc<Link>,
    control: VmControl,
    escape: Escape,
    /// Read, and not yet taken by the UART.
    input: Vec<u8>,
    /// Taken from the queue, and not yet written.
    output: Vec<u8>,
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
                false => -1,
            };
            self.wait_and_move(has_output, timeout);
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

    /// Whether there is output to write.
    fn refill(&mut self) -> bool {
        if self.output.is_empty() {
            let mut queue = self.link.queue();
            let n = queue.bytes.len().min(CHUNK);
            self.output.extend(queue.bytes.drain(..n));
        }
        !self.output.is_empty()
    }

    fn offer_input(&mut self) {
        if self.input.is_empty() {
            return;
        }
        // Set before the UART is asked, so that the guest emptying it meanwhile is noticed.
        self.link.input_waits.store(true, Ordering::Relaxed);
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
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
            pollfd(
                self.endpoint
                    .input_fd()
                    .filter(|_| self.input.is_empty() && !self.waits_for_terminal()),
                libc::POLLIN,
            ),
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
        match self.endpoint.read(&mut buffer) {
            Ok(0) => self.endpoint.end_of_input(),
            Ok(n) => {
                let bytes = &buffer[..n];
                if !matches!(self.endpoint, Endpoint::Terminal { .. }) {
                    self.input.extend_from_slice(bytes);
                } else if self.escape.feed(bytes, &mut self.input) {
                    self.control.stop(ExitReason::Stopped(StopCause::Console));
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
        match self.endpoint.write(&self.output) {
            Ok(n) => drop(self.output.drain(..n)),
            Err(error) if is_transient(&error) => {}
            Err(error) => {
                if matches!(self.endpoint, Endpoint::Socket { .. }) {
                    self.hang_up();
                    return;
                }
                // A full disk or a closed pipe: the guest goes on, what it said is lost.
                let mut queue = self.link.queue();
                if queue.dropped == 0 {
                    log::warn!("cannot write serial output: {error}");
                }
                queue.dropped += self.output.len() as u64;
                self.output.clear();
            }
        }
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

    fn port(mode: &SerialMode) -> SerialPort {
        SerialPort::new(1, mode, &VmControl::new(1).unwrap(), Arc::new(|| {}), &Filters::default())
            .unwrap()
            .unwrap()
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
    fn off_is_no_port() {
        assert!(
            SerialPort::new(
                0,
                &SerialMode::Off,
                &VmControl::new(1).unwrap(),
                Arc::new(|| {}),
                &Filters::default()
            )
            .unwrap()
            .is_none()
        );
    }

    #[test]
    fn file_is_truncated_and_complete_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        std::fs::write(&path, "an older and longer text").unwrap();
        let port = port(&SerialMode::File(path.clone()));
        print(&port, b"boot\r\n");
        drop(port);
        assert_eq!(std::fs::read(path).unwrap(), b"boot\r\n");
    }

    #[test]
    fn unusable_paths_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let control = VmControl::new(1).unwrap();
        let try_open = |mode| {
            SerialPort::new(1, &mode, &control, Arc::new(|| {}), &Filters::default())
                .unwrap_err()
                .to_string()
        };
        let absent = dir.path().join("no/such/dir");
        assert!(try_open(SerialMode::File(absent.clone())).contains("no/such/dir"));
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
        assert!(!path.exists(), "the socket goes with its port");
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
        assert!(port.dropped() > 0);
        assert!(port.link.queue().bytes.len() <= QUEUE_LEN);
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
