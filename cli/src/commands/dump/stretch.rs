//! Some bytes of a guest's memory, as a hexdump.

use std::fmt;
use std::io::{self, IsTerminal};
use std::path::Path;

use mce_relay_vmm::api::types::limits::MAX_READ;
use mce_relay_vmm::api::types::pages::Gpa;
use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use super::error::DumpError;
use super::vm::{Piece, Vm};

/// The bytes on one line of a hexdump.
const LINE: usize = 16;

/// Some of a guest's memory. Its text has the form of `hexdump -C`, with guest-physical addresses; in JSON the bytes
/// are hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stretch {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// What is there.
    pub bytes: Vec<u8>,
}

impl fmt::Display for Stretch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = self.gpa + self.bytes.len() as u64;
        let width = format!("{end:x}").len().max(8);
        let (mut gpa, mut previous, mut starred) = (self.gpa, None, false);
        for line in self.bytes.chunks(LINE) {
            if previous == Some(line) {
                if !starred {
                    writeln!(f, "*")?;
                }
                starred = true;
            } else {
                write_line(f, gpa, width, line)?;
                starred = false;
            }
            previous = Some(line);
            gpa += line.len() as u64;
        }
        write!(f, "{end:0width$x}")
    }
}

fn write_line(f: &mut fmt::Formatter<'_>, gpa: u64, width: usize, line: &[u8]) -> fmt::Result {
    write!(f, "{gpa:0width$x} ")?;
    for column in 0..LINE {
        if column % 8 == 0 {
            write!(f, " ")?;
        }
        match line.get(column) {
            Some(byte) => write!(f, "{byte:02x} ")?,
            None => write!(f, "   ")?,
        }
    }
    write!(f, " |")?;
    for &byte in line {
        let printable = byte == b' ' || byte.is_ascii_graphic();
        write!(f, "{}", if printable { char::from(byte) } else { '.' })?;
    }
    writeln!(f, "|")
}

impl Serialize for Stretch {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut object = to.serialize_struct("Stretch", 3)?;
        object.serialize_field("gpa", &Gpa(self.gpa))?;
        object.serialize_field("len", &self.bytes.len())?;
        object.serialize_field("bytes", &Digits(&self.bytes))?;
        object.end()
    }
}

/// Bytes as hexadecimal digits, two each.
struct Digits<'a>(&'a [u8]);

impl fmt::Display for Digits<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Serialize for Digits<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

/// Checks that raw bytes may go to stdout.
///
/// # Errors
/// [`DumpError::Terminal`].
pub fn check_raw() -> Result<(), DumpError> {
    if io::stdout().is_terminal() { Err(DumpError::Terminal) } else { Ok(()) }
}

/// Reads `len` bytes, at least 1, at the guest-physical address `gpa` of the VM behind `socket`. All
/// of them are held in memory; [`dump`](crate::commands::dump::job::dump()) is for whole guests.
///
/// # Errors
/// See [`DumpError`]; a single byte that cannot be read is an error.
pub fn read(socket: &Path, gpa: u64, len: u64) -> Result<Stretch, DumpError> {
    if len == 0 {
        return Err(DumpError::Nothing);
    }
    let vm = Vm::open(socket)?;
    vm.check_ram(gpa, len)?;
    let mut bytes = Vec::new();
    let mut before = 0;
    while before < len {
        match vm.piece(gpa + before, (len - before).min(MAX_READ))? {
            Piece::Bytes(more) => bytes.extend(more),
            Piece::Poisoned => return Err(DumpError::Poisoned { gpa: gpa + before, before }),
            Piece::NoMemory(error) => return Err(DumpError::NoMemory { error, before }),
        }
        before = bytes.len() as u64;
    }
    vm.again()?;
    Ok(Stretch { gpa, bytes })
}
