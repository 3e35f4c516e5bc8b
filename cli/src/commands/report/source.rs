//! Where the events of a report are from.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use mce_relay_vmm::api::types::vm::Status;
use mce_relay_vmm::session::record::Counts;

use super::builder::Builder;
use super::error::ReportError;
use super::model::{Lacks, Origin};
use super::raw::Raw;
use crate::client::error::ClientError;
use crate::client::record::Record;
use crate::client::requests;

/// The longest line that is taken for an event, in bytes.
const MAX_LINE: u64 = 1 << 20;
/// The most that is read of a file, in bytes: over a million events.
const MAX_BYTES: u64 = 256 << 20;

/// What was read.
#[derive(Debug, Default)]
pub struct Material {
    /// The report in the making.
    pub builder: Builder,
    /// The lines.
    pub raw: Raw,
    /// What it is about.
    pub of: Origin,
    /// The VM and its ledger, if there is a VM or a record of one.
    pub status: Option<Status>,
}

impl Material {
    fn line(&mut self, line: &str) {
        self.builder.line(line);
        self.raw.push(line);
    }
}

/// Reads the events of a running VM, and its ledger.
///
/// # Errors
/// The VM does not answer.
pub fn vm(socket: &Path) -> Result<Material, ReportError> {
    // The ledger first: events are the newer ones then, as they are in a record. Between two boots there is none.
    let status = match requests::get::<Status>(socket, "relay.status") {
        Ok(status) => Some(status),
        Err(ClientError::Refused { status: 503, .. }) => None,
        Err(error) => return Err(error.into()),
    };
    let mut read = Material { status, ..Material::default() };
    for line in requests::lines(socket, "relay.events")? {
        read.line(&line?);
    }
    let vm = read.status.as_ref().map(|status| &status.vm);
    read.of = Origin {
        vm: vm.and_then(|vm| vm.name.clone()),
        events: format!("of the VM that answers at {}", socket.display()),
        stands: vm.map(|vm| {
            let pause = vm.pause_reason.as_ref().map(|reason| format!(", paused {reason}"));
            let panic = vm.panic.map(|panic| format!(", panicked: {panic}"));
            format!("runs{}{}", pause.unwrap_or_default(), panic.unwrap_or_default())
        }),
    };
    Ok(read)
}

/// Reads what a VM has left.
#[must_use]
pub fn record(record: &Record) -> Material {
    let mut read = Material { status: record.status().cloned(), ..Material::default() };
    let Counts { pages, predicted, past } = record.left_out();
    read.builder.lacks(Lacks { pages, predicted, past });
    for line in record.events() {
        read.line(&line);
    }
    read.of = Origin {
        vm: Some(record.name.clone()),
        events: "of the record that it has left".to_owned(),
        stands: Some(record.headline()),
    };
    read
}

/// Reads a file of events; `-` is stdin.
///
/// # Errors
/// It cannot be read, or is too large.
pub fn file(path: &Path) -> Result<Material, ReportError> {
    let (from, file): (String, Box<dyn Read>) = match path.as_os_str() == "-" {
        true => ("stdin".to_owned(), Box::new(io::stdin().lock())),
        false => {
            let from = path.display().to_string();
            let file = File::open(path);
            let file = file.map_err(|source| ReportError::Read { from: from.clone(), source })?;
            (from, Box::new(file))
        }
    };
    let mut read = Material::default();
    lines(&mut BufReader::new(file), &from, &mut read)?;
    read.of.events = format!("of {from}");
    Ok(read)
}

fn lines(file: &mut dyn BufRead, from: &str, read: &mut Material) -> Result<(), ReportError> {
    let failed = |source| ReportError::Read { from: from.to_owned(), source };
    let (mut line, mut bytes) = (Vec::new(), 0);
    loop {
        line.clear();
        let len = file.take(MAX_LINE).read_until(b'\n', &mut line).map_err(failed)? as u64;
        if len == 0 {
            return Ok(());
        }
        bytes += len;
        if len == MAX_LINE && !line.ends_with(b"\n") {
            bytes += skip_line(file, MAX_BYTES.saturating_sub(bytes)).map_err(failed)?;
            read.builder.too_long(format!("longer than {} MiB", MAX_LINE >> 20));
        } else {
            match std::str::from_utf8(&line) {
                Ok(line) => read.line(line.trim_end()),
                Err(error) => {
                    read.builder.too_long(error.to_string());
                    read.raw.push(String::from_utf8_lossy(&line).trim_end());
                }
            }
        }
        if bytes > MAX_BYTES {
            return Err(ReportError::TooMuch { from: from.to_owned(), mib: MAX_BYTES >> 20 });
        }
    }
}

/// Reads to the end of the line, or a byte more than `most`; returns how many bytes.
fn skip_line(file: &mut dyn BufRead, most: u64) -> io::Result<u64> {
    let mut skipped = 0;
    loop {
        let buffer = file.fill_buf()?;
        let (len, done) = match buffer.iter().position(|byte| *byte == b'\n') {
            Some(at) => (at + 1, true),
            None => (buffer.len(), buffer.is_empty()),
        };
        file.consume(len);
        skipped += len as u64;
        if done || skipped > most {
            return Ok(skipped);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(bytes: &[u8]) -> Result<super::super::model::Log, ReportError> {
        let mut read = Material::default();
        lines(&mut &*bytes, "x", &mut read)?;
        Ok(read.builder.finish(Origin::default(), None, 0.0).log)
    }

    const HEALED: &str = r#"{"timestamp":{"secs":3,"nanos":0},"source":"memory","event":"healed","properties":{"gpa":"0x1000"}}"#;

    #[test]
    fn what_is_no_line_of_an_event_is_counted() {
        let long = vec![b'x'; 3 << 20];
        let bytes =
            [HEALED.as_bytes(), b"\n\n\xff\n", &long, b"\r\n", HEALED.as_bytes(), b"\r\n{\"cut"]
                .concat();
        let log = log(&bytes).unwrap();
        assert_eq!((log.events, log.broken), (2, 3));
        let super::super::model::Broken { line, why } = log.first_broken.unwrap();
        assert!(line == 3 && why.contains("utf-8"), "{line}: {why}");
    }

    #[test]
    fn what_does_not_end_is_refused() {
        struct Endless;
        impl Read for Endless {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                buffer.fill(0);
                Ok(buffer.len())
            }
        }
        let mut file = BufReader::with_capacity(1 << 20, Endless);
        let error =
            lines(&mut file, "/dev/zero", &mut Material::default()).unwrap_err().to_string();
        assert!(error.contains("/dev/zero has more than 256 MiB"), "{error}");
    }
}
