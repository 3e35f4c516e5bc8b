//! A serial port: a UART for the guest, a queue, and a thread that moves bytes.
//!
//! The guest's side never waits: a vCPU puts output into a bounded queue, and when the queue is full the oldest bytes
//! are dropped and counted. Everything that can block is on the port's own thread.
//!
//! A [`SerialLine`] is the host's side: a file, a socket or the terminal, with the queue and the thread. It lives as
//! long as the process. A [`SerialPort`](port::SerialPort) is a guest's UART on that line, and is made anew for each
//! boot; a client that is connected to the line stays connected. The virtio console is on such a line, too.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;

use jiff::Timestamp;

use crate::config::{SerialMode, VmConfig};
use crate::machine::devices::serial::endpoint::Endpoint;
use crate::machine::devices::serial::error::SerialError;
use crate::machine::devices::serial::finished::Finished;
use crate::machine::devices::serial::link::Link;
use crate::machine::devices::serial::mover::Mover;
use crate::machine::devices::virtio::blk::SharedDisk;
use crate::machine::devices::virtio::vsock::host::VsockLine;
use crate::outlets::sockets::BoundPath;
use crate::sandbox::role;
use crate::sandbox::seccomp::Filters;
use crate::sandbox::terminal::{self, Escape, Owner, RawMode};
use crate::words::counted;

pub(crate) mod attached;
pub mod endpoint;
pub mod error;
pub mod finished;
pub mod link;
pub mod mover;
pub mod port;

/// The host's side of a serial port.
#[derive(Debug)]
pub struct SerialLine {
    link: Arc<Link>,
    thread: Option<JoinHandle<()>>,
    /// What it is called in messages.
    label: String,
    /// It is a file that keeps what is written, so lines of the VMM's own may be added.
    keeps: bool,
    /// That file was not empty when it was opened.
    was_begun: bool,
    /// The boot that was noted last.
    noted: AtomicU32,
    /// The path of a socket, which is removed with this.
    _path: Option<BoundPath>,
    _raw: Option<RawMode>,
}

impl SerialLine {
    /// The line of port `number` (0 is COM1), or `None` if it is off. Its thread is under `filters`.
    ///
    /// # Errors
    /// See [`SerialError`].
    pub fn open(
        number: u8,
        mode: &SerialMode,
        filters: &Filters,
    ) -> Result<Option<Self>, SerialError> {
        Self::open_as(format!("serial port {number}"), format!("serial{number}"), mode, filters)
    }

    /// The same for the virtio console.
    ///
    /// # Errors
    /// See [`SerialError`].
    pub fn open_console(mode: &SerialMode, filters: &Filters) -> Result<Option<Self>, SerialError> {
        Self::open_as("console".to_owned(), "console".to_owned(), mode, filters)
    }

    fn open_as(
        label: String,
        thread: String,
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
            .spawn(role::Role::Serial, thread, move || mover.run())
            .map_err(SerialError::Thread)?;
        let (thread, noted) = (Some(thread), AtomicU32::new(0));
        Ok(Some(Self { link, thread, label, keeps, was_begun, noted, _path: path, _raw: raw }))
    }

    /// Writes a line between the output of two boots into a file, when boot `boot` (1 is the first) begins.
    pub fn note_boot(&self, boot: u32) {
        let again = self.noted.swap(boot, Ordering::Relaxed) == boot;
        if !again && self.keeps && (self.was_begun || boot > 1) {
            let now = Timestamp::now();
            self.link.push_line(&format!("--- mce-relay: boot {boot}, {now:.0} ---"));
        }
    }

    /// Has `finished` called for each page that the guest's output says it is done with, from now on and until it is
    /// called again; on the threads of vCPUs and devices.
    pub fn watch(&self, finished: Option<Finished>) {
        self.link.watch(finished);
    }

    /// Bytes of output that were dropped because they were not read in time.
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
            log::error!("the thread of {} panicked", self.label);
        }
        let dropped = self.dropped();
        if dropped > 0 {
            let dropped = counted(dropped, "byte");
            log::warn!("{}: {dropped} of output dropped", self.label);
        }
    }
}

/// What the devices of a VM have on the host, which lives as long as the process and is handed to each boot.
#[derive(Clone, Debug, Default)]
pub struct HostSides {
    /// Of both serial ports, COM1 first.
    pub ports: [Option<Arc<SerialLine>>; 2],
    /// Of the virtio console.
    pub console: Option<Arc<SerialLine>>,
    /// The disks, in the order of the devices that have them.
    pub disks: Vec<SharedDisk>,
    /// The socket of virtio-vsock.
    pub vsock: Option<Arc<VsockLine>>,
}

impl HostSides {
    /// Those of the serial ports and of the console.
    pub fn iter(&self) -> impl Iterator<Item = &SerialLine> {
        self.ports.iter().chain([&self.console]).flatten().map(AsRef::as_ref)
    }
}

/// Opens those that `config` wants.
///
/// # Errors
/// See [`SerialError`].
pub fn open_lines(config: &VmConfig, filters: &Filters) -> Result<HostSides, SerialError> {
    let mut lines = HostSides::default();
    for ((number, mode), line) in (0..).zip(&config.serial).zip(&mut lines.ports) {
        *line = SerialLine::open(number, mode, filters)?.map(Arc::new);
    }
    if let Some(mode) = config.console_line() {
        lines.console = SerialLine::open_console(mode, filters)?.map(Arc::new);
    }
    if let Some((_, path)) = config.vsocks().next() {
        lines.vsock = Some(Arc::new(VsockLine::open(path)?));
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::devices::serial::link::QUEUE_LEN;
    use crate::machine::devices::serial::port::SerialPort;
    use crate::machine::lifecycle::VmControl;
    use crate::outlets::files::{self, LogFile};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

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
            crate::words::with_causes(&error)
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
