//! The thread of a serial port, which moves bytes between the UART and the host's side.

use std::io::{self};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::machine::devices::serial::endpoint::Endpoint;
use crate::machine::devices::serial::link::{Link, QUEUE_LEN};
use crate::machine::lifecycle::reasons::{ExitReason, StopCause};
use crate::outlets::files;
use crate::sandbox::terminal::{self, Escape, Owner};

/// The most that is written at once: a pipe that is writable takes this much without blocking.
const CHUNK: usize = 4096;
/// How long the end of the VM waits until the rest of the output is taken.
const DRAIN: Duration = Duration::from_secs(1);
/// How long the thread waits for more output after a write. Output comes byte by byte, and to be woken for each would
/// cost more than the byte.
const LINGER_MS: i32 = 5;
/// How often input is offered again to a guest that did not take it.
const RETRY_MS: i32 = 100;
/// How often it is checked whether a terminal that another job has belongs to this process again: a shell does not
/// signal a running job that it brings to the foreground.
const BACKGROUND_MS: i32 = 250;

/// The port's thread.
pub(crate) struct Mover {
    pub(super) endpoint: Endpoint,
    /// If standard input is a terminal: the eventfd that wakes this thread after the process was stopped.
    pub(super) tty: Option<RawFd>,
    /// Which process that terminal belonged to at the last look.
    pub(super) owner: Owner,
    pub(super) link: Arc<Link>,
    pub(super) escape: Escape,
    /// The user typed the escape while there was no guest to end.
    pub(super) leaves: bool,
    /// Input that was read and that the UART has not taken yet.
    pub(super) input: Vec<u8>,
    /// The number of the guest that the input is for.
    pub(super) input_of: u64,
    /// Output that was taken from the queue and not written yet.
    pub(super) output: Vec<u8>,
    /// Set when a file could not be written to: when to try again.
    pub(super) stalled: Option<Instant>,
}

impl Mover {
    pub(crate) fn run(mut self) {
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

    /// Finds out which job the terminal belongs to, if that may have changed.
    fn look_at_terminal(&mut self) {
        if self.tty.is_none() {
            return;
        }
        let continued = terminal::has_continued();
        if continued || self.waits_for_terminal() {
            // Raw mode worked at the start; if it fails now, it is tried again.
            self.owner = terminal::claim().unwrap_or(Owner::Others);
        }
        if self.owner == Owner::Nobody {
            self.endpoint.end_of_input();
        }
    }

    fn waits_for_terminal(&self) -> bool {
        self.tty.is_some() && self.owner == Owner::Others
    }

    /// Counts the output that is left, which will not be in the file.
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
            if self.endpoint.keeps() && queue.unreported > 0 {
                let missing = std::mem::take(&mut queue.unreported);
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
        // Set before the guest's side is asked, so that a guest that empties it meanwhile is noticed.
        self.link.input_waits.store(true, Ordering::Relaxed);
        let taken = guest.taker.take(&self.input);
        self.input.drain(..taken);
        if self.input.is_empty() {
            self.link.input_waits.store(false, Ordering::Relaxed);
        }
    }

    /// Drops input that was read for a guest that is gone.
    fn forget_old_input(&mut self) {
        let now = self.link.guests.load(Ordering::SeqCst);
        if std::mem::replace(&mut self.input_of, now) != now {
            self.input.clear();
        }
    }

    /// The descriptor to read input from now. Without a guest only the terminal is read, for the escape.
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
        // A client's hang-up is reported even when no event is asked for; the terminal needs no such watch.
        let watch_output = has_output || is_socket;
        let mut fds = [
            pollfd(Some(self.link.wake.as_raw_fd()), libc::POLLIN),
            pollfd(
                self.endpoint.output_fd().filter(|_| watch_output),
                if has_output { libc::POLLOUT } else { 0 },
            ),
            // A process that reads the terminal of another job is stopped, or takes that job's input.
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
            // This process was put into the background just now.
            Err(error) if self.tty.is_some() && error.raw_os_error() == Some(libc::EIO) => {
                self.owner = Owner::Others;
            }
            Err(_) => self.endpoint.end_of_input(),
        }
    }

    fn write_output(&mut self) {
        if let Endpoint::File(file) = &mut self.endpoint {
            file.put_aside();
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
                // The pipe is closed: the guest runs on, and its output is lost.
                let mut queue = self.link.queue();
                if queue.dropped == 0 {
                    log::warn!("cannot write serial output: {error}");
                }
                queue.dropped += self.output.len() as u64;
                self.output.clear();
            }
        }
    }

    /// Mostly for a full disk: output that does not fit the queue meanwhile is dropped and counted.
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
