//! `mce-relay pages`: what the host has behind a guest's pages, and what the ledger says of them.
//!
//! It is page-types (the kernel's `tools/mm/page-types.c`) for guest-physical addresses. Values that this user is not
//! shown are left out, with a note.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use mce_relay::Page;
use mce_relay_vmm::api::types::vm::{Status, VmInfo};
use mce_relay_vmm::host::flags;
use mce_relay_vmm::host::page_frames::{PageCounts, PageFlags};
use mce_relay_vmm::host::pagemap::{Entries, Entry};
use serde::{Serialize, Serializer};

use crate::client::error::ClientError;
use crate::client::requests;
use crate::output::table::{self, Cell};
use crate::poison::error::PoisonError;
use crate::poison::target::PageRange;
use crate::poison::targets::targets;

const PAGE_SHIFT: u32 = 12;
/// Progress is reported after this many pages.
const CHUNK: usize = 1 << 16;
/// With more pages than this, adjacent ones with the same values share a line.
const MANY: usize = 64;
/// In place of how often a page is mapped, where that is not known. No page is mapped that often.
const UNKNOWN: u64 = u64::MAX;

/// Why the pages cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum PagesError {
    /// The VM does not answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// An address that is not RAM.
    #[error(transparent)]
    Address(#[from] PoisonError),
}

/// Whether a page of the guest has memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Presence {
    /// It has memory.
    Present,
    /// It was never written, or no process has it mapped now.
    Absent,
    /// Its page-table entry is neither empty nor present: it is swapped out, marked as bad without the ledger's
    /// knowledge (by userfaultfd, say), or bad where this user is not shown that.
    NotMapped,
    /// Its page-table entry or the ledger says that it is bad.
    Poisoned,
    /// Not shown to this user.
    Unknown,
}

impl std::fmt::Display for Presence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Present => "present",
            Self::Absent => "no memory",
            Self::NotMapped => "swapped out or marked",
            Self::Poisoned => "poisoned",
            Self::Unknown => "?",
        })
    }
}

/// One 4 KiB page.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PageView {
    /// Guest-physical address.
    #[serde(with = "mce_relay::hex")]
    pub gpa: u64,
    /// Host virtual address in the VMM.
    #[serde(with = "mce_relay::hex")]
    pub hva: u64,
    /// Size in bytes of the host's pages there.
    pub page_size: u64,
    /// Whether it has memory.
    pub presence: Presence,
    /// The host's page frame number, where it is known.
    #[serde(with = "mce_relay::hex_option")]
    pub pfn: Option<u64>,
    /// How often that frame is mapped, where it is known.
    pub mapped: Option<u64>,
    /// The frame's flags by name, where they are known.
    #[serde(serialize_with = "flag_names")]
    pub flags: Option<u64>,
    /// What the ledger says; null for a page that is not in it.
    pub ledger: Option<Page>,
    /// It is whole and predicted to fail.
    pub predicted: bool,
}

fn flag_names<S: Serializer>(value: &Option<u64>, to: S) -> Result<S::Ok, S::Error> {
    value.map(flags::names).serialize(to)
}

/// Some pages, and why some of their values are not known.
#[derive(Debug, Serialize)]
pub struct Pages {
    /// The pages, in the order asked for.
    pub pages: Vec<PageView>,
    /// Why some values are not known.
    pub notes: Vec<String>,
}

/// What a page-table entry means for a page that the ledger has as bad if `bad`. `is_marked` says whether the host has
/// marked a page frame as poisoned.
fn meaning(entry: Entry, bad: bool, is_marked: impl Fn(u64) -> bool) -> (Presence, Option<u64>) {
    let offset = match entry {
        Entry::Present { pfn, .. } => return (Presence::Present, pfn),
        Entry::Elsewhere { offset } => offset,
        Entry::Empty => None,
    };
    // A bad page's entry looks like that of a page on a swap device, whose offset may be any number. The mark on the
    // page frame tells them apart. A mark of userfaultfd has no frame, and a bad huge page's entry may look empty.
    match offset.filter(|frame| is_marked(*frame)) {
        Some(frame) => (Presence::Poisoned, Some(frame)),
        None if bad => (Presence::Poisoned, None),
        None if entry != Entry::Empty => (Presence::NotMapped, None),
        None => (Presence::Absent, None),
    }
}

/// Looks up all pages of `ranges` in the VM behind `socket`. `progress` is called with the number of pages done and in
/// all.
///
/// # Errors
/// See [`PagesError`].
pub fn pages(
    socket: &Path,
    ranges: &[PageRange],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Pages, PagesError> {
    let status: Status = requests::get_of_process(socket, "relay.status")?;
    let vm: &VmInfo = &status.vm;
    let targets = targets(vm, ranges)?;
    let ledger: BTreeMap<u64, &Page> = status.pages.iter().map(|page| (page.gpa, page)).collect();
    let predicted: BTreeSet<u64> = status.predicted.iter().map(|page| page.gpa).collect();
    let mut notes = Vec::new();
    let mut entries = Entries::open(vm.pid)
        .inspect_err(|error| {
            notes.push(format!(
                "whether a page has memory is not shown to this user (/proc/{}/pagemap: {error})",
                vm.pid
            ));
        })
        .ok();
    let (flags, counts) = (PageFlags::open().ok(), PageCounts::open().ok());
    if flags.is_none() || counts.is_none() {
        notes.push(
            "page frames, flags and counts are root's to see (/proc/kpageflags, CONFIG_PROC_PAGE_MONITOR)"
                .to_owned(),
        );
    }
    let mut pages = Vec::with_capacity(targets.len());
    for target in &targets {
        let gpa = target.gpa;
        let entry = ledger.get(&gpa).copied();
        let bad = entry.is_some_and(|page| !page.is_forged());
        let is_marked =
            |pfn| flags.as_ref().is_some_and(|flags| flags.is_poisoned(pfn).unwrap_or(false));
        let (presence, pfn) = match entries.as_mut().map(|entries| entries.at(target.hva)) {
            Some(Ok(entry)) => meaning(entry, bad, is_marked),
            _ => (Presence::Unknown, None),
        };
        let of_frame = |pfn| {
            let flags = flags.as_ref().and_then(|flags| flags.get(pfn).ok());
            let mapped = counts.as_ref().and_then(|counts| counts.get(pfn).ok());
            (flags, mapped.filter(|count| *count != UNKNOWN))
        };
        let (flags, mapped) = pfn.map_or((None, None), of_frame);
        pages.push(PageView {
            gpa,
            hva: target.hva,
            page_size: vm.block(gpa).map_or(1 << PAGE_SHIFT, |block| block.page_size),
            presence,
            pfn,
            mapped,
            flags,
            ledger: entry.cloned(),
            predicted: predicted.contains(&gpa),
        });
        if pages.len().is_multiple_of(CHUNK) {
            progress(pages.len(), targets.len());
        }
    }
    Ok(Pages { pages, notes })
}

impl PageView {
    /// The columns of its line, without the addresses.
    fn words(&self) -> [String; 5] {
        let size = match self.page_size >> 10 {
            kib if kib >= 1 << 20 => format!("{}G", kib >> 20),
            kib if kib >= 1 << 10 => format!("{}M", kib >> 10),
            kib => format!("{kib}K"),
        };
        let ledger = match (&self.ledger, self.predicted) {
            (Some(page), _) if page.is_forged() => {
                format!("FORGED {} (the page is whole): {}", page.kind, page.state)
            }
            (Some(page), _) => format!("{}: {}", page.kind, page.state),
            (None, true) => "predicted to fail".to_owned(),
            (None, false) => String::new(),
        };
        [
            size,
            self.presence.to_string(),
            self.mapped.map_or(String::new(), |count| count.to_string()),
            self.flags.map_or(String::new(), |bits| flags::names(bits).join(",")),
            ledger,
        ]
    }
}

/// An address, or the first address and the end of several adjacent pages.
fn span(first: u64, count: u64) -> String {
    match count {
        1 => format!("{first:#x}"),
        _ => format!("{first:#x}..{:#x}", first + (count << PAGE_SHIFT)),
    }
}

/// The pages as lines: the first page of each line, and how many pages it stands for.
fn runs(pages: &[PageView], join: bool) -> Vec<(&PageView, u64)> {
    let mut runs: Vec<(&PageView, u64)> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some((first, count))
                if join
                    && first.gpa + (*count << PAGE_SHIFT) == page.gpa
                    && first.hva + (*count << PAGE_SHIFT) == page.hva
                    && first.words() == page.words() =>
            {
                *count += 1;
            }
            _ => runs.push((page, 1)),
        }
    }
    runs
}

impl std::fmt::Display for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let headers = ["GPA", "HVA", "pfn", "of", "memory", "mapped", "flags", "ledger"];
        let mut table = table::sheet(&headers);
        for (page, count) in runs(&self.pages, self.pages.len() > MANY) {
            let pfn = match (page.pfn, count) {
                (Some(pfn), 1) => format!("{pfn:#x}"),
                (Some(_), count) => format!("({count} pages)"),
                (None, 1) => String::new(),
                (None, count) => format!("({count} pages)"),
            };
            let mut row = vec![span(page.gpa, count), span(page.hva, count), pfn];
            row.extend(page.words());
            table.add_row(row.into_iter().map(Cell::new));
        }
        write!(f, "{table}")?;
        self.notes.iter().try_for_each(|note| write!(f, "\nnote: {note}"))
    }
}

#[cfg(test)]
mod tests {
    use mce_relay::FoundBy;

    use super::*;

    fn view(number: u64, presence: Presence) -> PageView {
        PageView {
            gpa: number << 12,
            hva: 0x7000_0000 + (number << 12),
            page_size: 4096,
            presence,
            pfn: (presence == Presence::Present).then_some(0x42 + 7 * number),
            mapped: Some(1),
            flags: Some(1 << 12 | 1 << 4),
            ledger: None,
            predicted: false,
        }
    }

    #[test]
    fn pages_of_which_the_same_is_to_be_said_share_a_line() {
        let kinds = [Presence::Present, Presence::Present, Presence::Absent, Presence::Present];
        let pages: Vec<PageView> = (0..).zip(kinds).map(|(n, kind)| view(n, kind)).collect();
        let counts = |join| runs(&pages, join).iter().map(|(_, count)| *count).collect::<Vec<_>>();
        assert_eq!(counts(true), [2, 1, 1]);
        assert_eq!(counts(false), [1, 1, 1, 1]);
        let text = Pages { pages, notes: vec!["x".to_owned()] }.to_string();
        assert!(text.contains("dirty,anon") && text.ends_with("note: x"), "{text}");
        assert_eq!(span(0x1000, 2), "0x1000..0x3000");
    }

    #[test]
    fn a_forged_page_is_said_to_be() {
        let (gpa, now) = (0x3000, std::time::SystemTime::UNIX_EPOCH);
        let ledger = |found_by| {
            let mut ledger = mce_relay::Ledger::default();
            ledger.enter(gpa, gpa, 12, mce_relay::FailureKind::ActionOptional, found_by, now);
            PageView { ledger: ledger.get(gpa), ..view(3, Presence::Present) }.words()[4].clone()
        };
        assert!(ledger(FoundBy::Forged).starts_with("FORGED AO (the page is whole): seen"));
        assert!(ledger(FoundBy::Signal).starts_with("AO: seen"));
    }

    #[test]
    fn json_has_flags_by_name() {
        let json = serde_json::to_value(view(3, Presence::Present)).unwrap();
        assert_eq!(json["flags"], serde_json::json!(["dirty", "anon"]));
        assert_eq!(json["pfn"], "0x57");
        assert_eq!(json["presence"], "present");
    }

    #[test]
    fn a_bad_pages_entry_names_its_frame() {
        let elsewhere = |offset| Entry::Elsewhere { offset };
        let present = Entry::Present { pfn: Some(0x10_b7aa), exclusive: true };
        let bad_frame = |frame| frame == 0x10_b7aa;
        for (entry, bad, meant) in [
            (elsewhere(Some(0x10_b7aa)), false, (Presence::Poisoned, Some(0x10_b7aa))),
            (elsewhere(Some(0x10_b7aa)), true, (Presence::Poisoned, Some(0x10_b7aa))),
            // On a swap device, or marked by userfaultfd.
            (elsewhere(Some(0x42)), false, (Presence::NotMapped, None)),
            (elsewhere(Some(0x42)), true, (Presence::Poisoned, None)),
            // Numbers are hidden from this user.
            (elsewhere(None), false, (Presence::NotMapped, None)),
            (present, false, (Presence::Present, Some(0x10_b7aa))),
            (Entry::Empty, true, (Presence::Poisoned, None)),
            (Entry::Empty, false, (Presence::Absent, None)),
        ] {
            assert_eq!(meaning(entry, bad, bad_frame), meant, "{entry:?}");
        }
    }
}
