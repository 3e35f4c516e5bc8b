//! The kernel's log, counted, streamed and searched.
//!
//! What the guest kernel says about a memory error is the proof that it was told; the console
//! may be off or busy, /dev/kmsg has every line with its number and time.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::sleep;
use std::time::Duration;

use crate::failures::Failures;
use crate::port::Port;
use crate::proto::Event;

const PATH: &str = "/dev/kmsg";
/// One read returns one record and fails if it does not fit; the kernel's limit is 8 KiB.
const RECORD: usize = 8192;

/// One line of the log.
#[derive(Debug, PartialEq, Eq)]
pub struct Record {
    /// Counts from 0 at boot.
    pub seq: u64,
    /// Microseconds since boot.
    pub micros: u64,
    /// 0 (emergency) to 7 (debug).
    pub level: u8,
    /// The text.
    pub line: String,
}

/// Reads the kernel's `prefix,seq,micros,flags;text`; lines after the first are the record's
/// dictionary.
pub fn parse(record: &str) -> Option<Record> {
    let (head, text) = record.split_once(';')?;
    let mut fields = head.split(',');
    let prefix: u32 = fields.next()?.parse().ok()?;
    Some(Record {
        seq: fields.next()?.parse().ok()?,
        micros: fields.next()?.parse().ok()?,
        // The other bits are the facility.
        level: (prefix & 7) as u8,
        line: text.lines().next().unwrap_or_default().to_owned(),
    })
}

/// Most lines that wait to be sent. A burst makes them faster than the port takes them.
const BACKLOG: usize = 4096;
/// How long lines may gather before they are read: a burst should cost a wake-up for many of them,
/// not for each.
const GATHER: Duration = Duration::from_millis(10);

/// The log, read as it grows: every line counts in the account of failures, and goes to the port
/// while it is asked for.
pub struct Log {
    file: File,
    /// The number the next record should have.
    next: u64,
    /// The account.
    pub failures: Failures,
    on: Arc<AtomicBool>,
    lines: SyncSender<Event>,
    /// Lines that were to be sent and are gone.
    gap: bool,
}

impl Log {
    /// Opens the log and reads all that it holds. Whoever takes the events from the receiver has
    /// those of the boot only if `on` is set by now.
    ///
    /// # Errors
    /// What /dev/kmsg said.
    pub fn open(on: &Arc<AtomicBool>) -> io::Result<(Self, Receiver<Event>)> {
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(PATH)?;
        Self::new(file, on)
    }

    fn new(file: File, on: &Arc<AtomicBool>) -> io::Result<(Self, Receiver<Event>)> {
        let (lines, receiver) = sync_channel(BACKLOG);
        let failures = Failures::default();
        let mut log = Self { file, next: 0, failures, on: Arc::clone(on), lines, gap: false };
        log.catch_up()?;
        Ok((log, receiver))
    }

    /// Reads what there is.
    ///
    /// # Errors
    /// What /dev/kmsg said.
    pub fn catch_up(&mut self) -> io::Result<()> {
        let mut buffer = [0; RECORD];
        loop {
            match self.file.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => {
                    if let Some(record) = parse(&String::from_utf8_lossy(&buffer[..count])) {
                        self.take(record);
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                // Overwritten while it was read: the next record's number says how many.
                Err(e) if matches!(e.kind(), ErrorKind::BrokenPipe | ErrorKind::Interrupted) => {}
                Err(e) => return Err(e),
            }
        }
    }

    fn take(&mut self, record: Record) {
        let missed = record.seq.saturating_sub(self.next);
        self.next = record.seq + 1;
        self.gap |= missed > 0;
        self.failures.missed(missed);
        self.failures.line(&record.line, record.micros);
        if !self.on.load(Ordering::Relaxed) {
            self.gap = false;
            return;
        }
        if self.gap && self.lines.try_send(Event::KmsgLost {}).is_ok() {
            self.gap = false;
        }
        let line = Event::Kmsg {
            seq: record.seq,
            time: record.micros as f64 / 1e6,
            level: record.level,
            line: record.line,
        };
        self.gap |= self.lines.try_send(line).is_err();
    }
}

/// Keeps the log read, for ever.
///
/// # Errors
/// What /dev/kmsg said.
pub fn follow(log: &Mutex<Log>) -> io::Result<()> {
    let lock = || log.lock().unwrap_or_else(PoisonError::into_inner);
    let fd = lock().file.as_raw_fd();
    loop {
        let mut entry = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid entry; the descriptor is open as long as `log` is.
        let ready = unsafe { libc::poll(&raw mut entry, 1, -1) };
        if ready < 0 {
            let error = io::Error::last_os_error();
            match error.kind() {
                ErrorKind::Interrupted => continue,
                _ => return Err(error),
            }
        }
        sleep(GATHER);
        lock().catch_up()?;
    }
}

/// Sends the lines of the log, those that are still asked for when it is their turn. Ends when the
/// log or the port fails.
///
/// # Errors
/// What the port said.
pub fn send(lines: &Receiver<Event>, port: &Port, on: &AtomicBool) -> io::Result<()> {
    for line in lines {
        if on.load(Ordering::Relaxed) {
            port.send_later(&line)?;
        }
    }
    Ok(())
}

/// The time now on the log's clock, in microseconds: that of a line written for it.
///
/// # Errors
/// What /dev/kmsg said, or the line does not come back.
pub fn clock() -> io::Result<u64> {
    let mut log =
        File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(PATH)?;
    log.seek(SeekFrom::End(0))?;
    let mark = format!("agent: the time, asked for by {}", std::process::id());
    // Level 7: it is for no console. Without its end the kernel would wait for more of the line.
    log.write_all(format!("<7>{mark}\n").as_bytes())?;
    let mut buffer = [0; RECORD];
    loop {
        match log.read(&mut buffer) {
            Ok(count) => {
                let record = parse(&String::from_utf8_lossy(&buffer[..count]));
                if let Some(record) = record.filter(|record| record.line == mark) {
                    return Ok(record.micros);
                }
            }
            Err(e) if matches!(e.kind(), ErrorKind::BrokenPipe | ErrorKind::Interrupted) => {}
            Err(e) => return Err(e),
        }
    }
}

/// All lines of the log so far that contain `pattern`.
///
/// # Errors
/// What /dev/kmsg said.
pub fn grep(pattern: &str) -> io::Result<Vec<String>> {
    let mut log = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(PATH)?;
    let mut buffer = [0; RECORD];
    let mut lines = Vec::new();
    loop {
        match log.read(&mut buffer) {
            Ok(0) => return Ok(lines),
            Ok(count) => lines.extend(
                parse(&String::from_utf8_lossy(&buffer[..count]))
                    .map(|record| record.line)
                    .filter(|line| line.contains(pattern)),
            ),
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(lines),
            // Overwritten while it was read: the next read continues at the oldest line left.
            Err(e) if matches!(e.kind(), ErrorKind::BrokenPipe | ErrorKind::Interrupted) => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn records_are_taken_apart() {
        let text = "30,339,5140900,-;NET: a; b\n SUBSYSTEM=acpi\n DEVICE=+acpi:X\n";
        let record = Record { seq: 339, micros: 5_140_900, level: 6, line: "NET: a; b".into() };
        assert_eq!(parse(text), Some(record));
        assert_eq!(parse("6,1,2,-;").unwrap().line, "");
        for broken in ["", "6,1,2", "x,1,2,-;a", "6,-1,2,-;a", "6;a"] {
            assert_eq!(parse(broken), None, "{broken}");
        }
    }

    /// A log of our own making: one datagram is one record, as one read of /dev/kmsg is.
    fn made(on: &Arc<AtomicBool>, first: &[&str]) -> (UnixDatagram, Log, Receiver<Event>) {
        let (kernel, file) = UnixDatagram::pair().unwrap();
        file.set_nonblocking(true).unwrap();
        for record in first {
            kernel.send(record.as_bytes()).unwrap();
        }
        let (log, lines) = Log::new(File::from(OwnedFd::from(file)), on).unwrap();
        (kernel, log, lines)
    }

    fn numbers(lines: &Receiver<Event>) -> Vec<i64> {
        let number = |event| match event {
            Event::Kmsg { seq, .. } => seq.try_into().unwrap(),
            Event::KmsgLost {} => -1,
            other => panic!("{other:?}"),
        };
        lines.try_iter().map(number).collect()
    }

    #[test]
    fn every_line_counts_and_is_sent_only_while_it_is_asked_for() {
        let on = Arc::new(AtomicBool::new(false));
        let failure = "3,0,1,-;Memory failure: 0x10: recovery action for dirty LRU page: Recovered";
        let (kernel, mut log, lines) = made(&on, &[failure, "6,1,2,-;one"]);
        assert!(log.failures.holds(0x10, 1), "from the boot on");
        on.store(true, Ordering::Relaxed);
        kernel.send(b"6,2,3,-;two").unwrap();
        kernel.send(b"noise").unwrap();
        kernel.send(b"3,3,4,-;Memory failure: 0x11: already hardware poisoned").unwrap();
        log.catch_up().unwrap();
        on.store(false, Ordering::Relaxed);
        kernel.send(b"6,4,5,-;four").unwrap();
        log.catch_up().unwrap();
        assert_eq!(numbers(&lines), [2, 3]);
        assert!(log.failures.holds(0x11, 1));
    }

    #[test]
    fn what_the_kernel_overwrote_is_counted_and_told() {
        let on = Arc::new(AtomicBool::new(true));
        let (kernel, mut log, lines) = made(&on, &["6,0,1,-;zero", "6,5,2,-;five"]);
        kernel.send(b"6,6,3,-;six").unwrap();
        kernel.send(b"6,9,4,-;nine").unwrap();
        log.catch_up().unwrap();
        assert_eq!(numbers(&lines), [0, -1, 5, 6, -1, 9]);
        let account = serde_json::to_string(&log.failures.account(false)).unwrap();
        assert!(account.contains(r#""kmsg_lost":6,"#), "{account}");
    }

    #[test]
    fn lines_that_nobody_takes_do_not_pile_up() {
        let on = Arc::new(AtomicBool::new(true));
        let (kernel, mut log, lines) = made(&on, &[]);
        for seq in 0..BACKLOG + 10 {
            kernel.send(format!("6,{seq},0,-;line").as_bytes()).unwrap();
            log.catch_up().unwrap();
        }
        assert_eq!(numbers(&lines).len(), BACKLOG);
        kernel.send(format!("6,{},0,-;last", BACKLOG + 10).as_bytes()).unwrap();
        log.catch_up().unwrap();
        assert_eq!(numbers(&lines)[0], -1, "the gap is told");
        let account = serde_json::to_string(&log.failures.account(false)).unwrap();
        assert!(account.contains(r#""kmsg_lost":0,"#), "they were read: {account}");
    }
}
