//! The kernel's log, streamed and searched.
//!
//! What the guest kernel says about a memory error is the proof that it was told; the console
//! may be off or busy, /dev/kmsg has every line with its number and time.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};

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

/// Sends the log from its start (from its end if `on` is not set) and then every new line, as long as `on` is set; lines that
/// come while it is not are dropped. Ends only when the log or the port fails.
///
/// # Errors
/// What /dev/kmsg or the port said.
pub fn stream(port: &Port, on: &AtomicBool) -> io::Result<()> {
    let mut log = File::open(PATH)?;
    if !on.load(Ordering::Relaxed) {
        // Not even read: whoever turns the log on may do so before all of it had been dropped.
        log.seek(SeekFrom::End(0))?;
    }
    let mut buffer = [0; RECORD];
    loop {
        let event = match log.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => match parse(&String::from_utf8_lossy(&buffer[..count])) {
                Some(record) => Event::Kmsg {
                    seq: record.seq,
                    time: record.micros as f64 / 1e6,
                    level: record.level,
                    line: record.line,
                },
                None => continue,
            },
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(e) if e.kind() == ErrorKind::BrokenPipe => Event::KmsgLost {},
            Err(e) => return Err(e),
        };
        if on.load(Ordering::Relaxed) {
            port.send_later(&event)?;
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
}
