//! What became of a huge page of which a part went bad.

use std::fmt;
use std::io;

#[cfg(feature = "serde")]
use super::serde_with::hex;

/// A huge page that the host has lost, and of which the guest has all but the bad part again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Rescued {
    /// Guest-physical address of its first byte, the lowest where the guest has it more than once.
    #[cfg_attr(feature = "serde", serde(with = "hex"))]
    pub gpa: u64,
    /// Host virtual address of its first byte.
    #[cfg_attr(feature = "serde", serde(with = "hex"))]
    pub hva: u64,
    /// How many bytes the host has lost: 2 MiB or 1 GiB.
    pub extent: u64,
    /// How many of its pages of 4 KiB the guest has as they were.
    pub kept: u64,
    /// How many are gone; each is in the ledger.
    pub gone: u64,
    /// How long the rescue took, in microseconds: from the first word of the failure to good memory in place.
    pub micros: u64,
    /// How long the first vCPU that touched it stood still, in microseconds; `None` where none did.
    #[cfg_attr(feature = "serde", serde(default))]
    pub held_micros: Option<u64>,
}

impl fmt::Display for Rescued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { gpa, hva, extent, kept, gone, micros, held_micros } = *self;
        write!(
            f,
            "of the {} KiB at GPA {gpa:#x} (HVA {hva:#x}) the guest keeps {kept} of {} pages; it took {micros} us",
            extent >> 10,
            kept.saturating_add(gone)
        )?;
        match held_micros {
            Some(held) => write!(f, ", for {held} of which a vCPU stood still"),
            None => Ok(()),
        }
    }
}

/// Why a huge page is not rescued; all of it is gone then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case", tag = "reason"))]
#[non_exhaustive]
pub enum RescueRefusal {
    /// It is anonymous memory: there is no file to read the rest from.
    NoFile,
    /// It is a private mapping of a file: what was written to it is not in the file.
    Private,
    /// Another process has it mapped, and would go on with other memory.
    Shared,
    /// The host's VMM does not allow it.
    Forbidden,
    /// There is no memory for what is left of it.
    NoMemory {
        /// How many bytes it takes.
        needed: u64,
        /// How many this process may take (MemAvailable less 64 MiB, and its memory cgroups' limits).
        free: u64,
    },
    /// Some of it is mapped, so the guest may be changing it.
    Mapped,
    /// The file gives nothing of it (Linux before 6.6).
    NothingLeft,
    /// The file gives all of it: the page was only marked as bad (by userfaultfd, say), and what the file has is not what
    /// the guest had.
    NoneBad,
    /// The bad part cannot be marked: no UFFDIO_POISON (Linux 6.6), or userfaultfd(2) is forbidden to this process.
    NoMarker {
        /// What the kernel said.
        errno: i32,
    },
    /// The kernel refused a step.
    System {
        /// Which.
        step: RescueStep,
        /// What it said.
        errno: i32,
    },
}

/// A step of a rescue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum RescueStep {
    /// Getting memory.
    Allocate,
    /// Reading what is left.
    Read,
    /// Marking what is gone.
    Mark,
    /// Putting it in place.
    Move,
}

impl fmt::Display for RescueRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let says = |errno: i32| io::Error::from_raw_os_error(errno);
        match *self {
            Self::NoFile => {
                f.write_str("it is anonymous memory, with no file to read the rest from")
            }
            Self::Private => {
                f.write_str("it is a private mapping, whose file does not have what was written")
            }
            Self::Shared => f.write_str("another process has it mapped"),
            Self::Forbidden => f.write_str("the VMM does not allow it"),
            Self::NoMemory { needed, free } => write!(
                f,
                "there is no memory for the rest: it takes {} MiB, and {} MiB may be taken",
                needed >> 20,
                free >> 20
            ),
            Self::Mapped => f.write_str("some of it is still mapped"),
            Self::NoneBad => {
                f.write_str("its file gives all of it, so the page was only marked as bad")
            }
            Self::NothingLeft => f.write_str("its file gives nothing of it (Linux before 6.6)"),
            Self::NoMarker { errno } => {
                write!(f, "the bad part cannot be marked (userfaultfd): {}", says(errno))
            }
            Self::System { step, errno } => {
                let step = match step {
                    RescueStep::Allocate => "no memory is to be had for the rest",
                    RescueStep::Read => "its file cannot be read",
                    RescueStep::Mark => "the bad part cannot be marked",
                    RescueStep::Move => "good memory cannot be put in its place",
                };
                write!(f, "{step}: {}", says(errno))
            }
        }
    }
}
