//! What a dump holds, for people and programs.

use std::fmt;
use std::path::{Path, PathBuf};

use mce_relay_vmm::api::types::vm::Extent;
use mce_relay_vmm::machine::memory::block::PAGE_SIZE;
use serde::Serialize;

use super::elf::{Lost, State};
use super::form::Form;
use super::ram::{add, len_of};
use super::vmcoreinfo::Kernel;

/// The account of a dump; in JSON it is also written beside a raw image.
#[derive(Debug, Serialize)]
pub struct Dumped {
    /// The VMM's version.
    pub version: String,
    /// The VMM's process.
    pub pid: u32,
    /// Which boot of the guest it is; 1 for the first.
    pub boot: u32,
    /// Whether the VM was paused both before the first byte was read and after the last. If not,
    /// parts of the image may be of different moments.
    pub paused: bool,
    /// The ranges of guest RAM.
    pub memory: Vec<Extent>,
    /// Bad pages: absent memory in an ELF core, holes in a raw image. Adjacent pages are one entry.
    pub poisoned: Vec<Extent>,
    /// Pages that could not be read for another reason; in the dump they are like bad ones.
    pub unreadable: Vec<Extent>,
    /// Pages of both kinds that were found when the headers of an ELF core had been written. They are zeros there, and
    /// in no other list.
    pub late: Vec<Extent>,
    /// Bytes of pages that are not all zeros. The other pages are holes.
    pub bytes: u64,
    /// The form of the file.
    pub form: Form,
    /// What the guest's kernel says about itself; null if it was not found.
    pub kernel: Option<Kernel>,
    /// The number of vCPUs whose registers are in an ELF core.
    pub registers: usize,
    /// The file's name; null for stdout.
    pub file: Option<String>,
    /// The file's path as it was given; none for stdout.
    #[serde(skip)]
    pub path: Option<PathBuf>,
}

impl fmt::Display for Dumped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ram, data) = (size(len_of(&self.memory)), size(self.bytes));
        write!(f, "dumped: {ram} of guest RAM {}, {data} of it data", self.destination())?;
        let (verb, are) = match self.form {
            Form::Elf => ("is absent", "are absent"),
            Form::Raw => ("is a hole", "are holes"),
        };
        let listed = self.listed();
        match pages(&self.poisoned) {
            0 => write!(f, "; no page is poisoned")?,
            1 => write!(f, "; 1 poisoned page {verb}{listed}")?,
            pages => write!(f, "; {pages} poisoned pages {are}{listed}")?,
        }
        match pages(&self.unreadable) {
            0 => {}
            1 => write!(f, "; 1 other page could not be read and {verb}")?,
            pages => write!(f, "; {pages} other pages could not be read and {are}")?,
        }
        match pages(&self.late) {
            0 => {}
            1 => write!(f, "; 1 page went bad meanwhile and is zeros, listed at the end")?,
            pages => {
                write!(f, "; {pages} pages went bad meanwhile and are zeros, listed at the end")?;
            }
        }
        if let Some(kernel) = &self.kernel {
            write!(f, "\nits kernel: {kernel}")?;
        }
        if !self.paused {
            write!(
                f,
                "\nthe guest was not paused: parts of the image may be of different moments; \
                 `mce-relay pause` before holds it still"
            )?;
        }
        Ok(())
    }
}

impl Dumped {
    /// Notes for people on what is missing in the dump.
    #[must_use]
    pub fn notes(&self) -> Vec<&'static str> {
        if self.form == Form::Raw {
            return Vec::new();
        }
        let mut notes = Vec::new();
        if self.kernel.is_none() {
            notes.push(
                "no kernel's vmcoreinfo was found in the guest's memory, without which crash and drgn do not \
                 take the file for a kernel's; expected a Linux guest that has booted, with CONFIG_VMCORE_INFO \
                 or CONFIG_CRASH_CORE",
            );
        }
        if self.registers == 0 {
            notes.push(
                "the vCPUs' registers are not in the dump, as they are known of a paused VM only; \
                 `mce-relay pause` before",
            );
        }
        notes
    }

    /// The pages that are absent from an ELF core, by guest-physical address.
    pub(super) fn lost(&self) -> Vec<Lost> {
        lost([(&self.poisoned, State::Poisoned), (&self.unreadable, State::Unreadable)])
    }

    /// Moves all but the first `most` stretches of lost pages to the late ones; returns what was moved.
    pub(super) fn make_late(&mut self, most: usize) -> Vec<Lost> {
        let mut lost = self.lost();
        if lost.len() <= most {
            return Vec::new();
        }
        let mut late = lost.split_off(most);
        let first = late[0].extent.gpa;
        self.poisoned.retain(|extent| extent.gpa < first);
        self.unreadable.retain(|extent| extent.gpa < first);
        for Lost { extent, state } in &mut late {
            *state = state.late();
            add(&mut self.late, extent.gpa, extent.len);
        }
        late
    }

    /// Adds the pages that only the second reading found as late ones; returns them.
    pub(super) fn add_late(&mut self, second: &Self) -> Vec<Lost> {
        let late = [
            (&second.poisoned, State::Poisoned.late()),
            (&second.unreadable, State::Unreadable.late()),
        ];
        let late = lost(late);
        late.iter().for_each(|lost| add(&mut self.late, lost.extent.gpa, lost.extent.len));
        late
    }

    fn destination(&self) -> String {
        match &self.path {
            Some(path) => format!("into {}", path.display()),
            None => "to stdout".to_owned(),
        }
    }

    /// Where the bad pages are listed.
    fn listed(&self) -> String {
        match (self.form, &self.path) {
            (Form::Elf, _) => ", listed in its MCE_RELAY note".to_owned(),
            (Form::Raw, Some(path)) => format!(", listed in {}", list_of(path).display()),
            (Form::Raw, None) => ", listed by --json".to_owned(),
        }
    }
}

/// Both lists, merged by guest-physical address.
fn lost(lists: [(&Vec<Extent>, State); 2]) -> Vec<Lost> {
    let with_state = |(list, state): (&Vec<Extent>, State)| {
        list.iter().map(|extent| Lost { extent: *extent, state }).collect::<Vec<_>>()
    };
    let mut all: Vec<Lost> = lists.into_iter().flat_map(with_state).collect();
    all.sort_unstable_by_key(|lost| lost.extent.gpa);
    all
}

fn pages(extents: &[Extent]) -> u64 {
    len_of(extents).div_ceil(PAGE_SIZE)
}

/// A number of bytes, for people; rounded down.
pub(super) fn size(bytes: u64) -> String {
    const MIB: u64 = 1 << 20;
    if bytes < MIB {
        return format!("{} KiB", bytes >> 10);
    }
    match (bytes / MIB, bytes % MIB * 10 / MIB) {
        (whole, 0) => format!("{whole} MiB"),
        (whole, tenths) => format!("{whole}.{tenths} MiB"),
    }
}

/// The path of a raw image's account.
pub(super) fn list_of(file: &Path) -> PathBuf {
    let mut path = file.as_os_str().to_owned();
    path.push(".json");
    path.into()
}
