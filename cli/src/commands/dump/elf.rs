//! The form of an ELF core of a whole machine, which crash, drgn and makedumpfile read.
//!
//! In the file's order: the file header, program headers (one PT_NOTE, and a PT_LOAD for each stretch of whole guest
//! RAM, whose p_paddr is the guest-physical address), three section headers, the notes, unused room; then all of guest
//! RAM without the gaps between its blocks; then one more note. Where a page lies in the file does not depend on which
//! pages are bad: a bad page has its place, but no PT_LOAD covers it.
//!
//! The note behind the memory is for pages that are found to be bad after the headers have been written. It has no
//! program header (crash takes every one behind the first for memory), but a section header.

use mce_relay_vmm::api::types::registers::Registers;
use mce_relay_vmm::api::types::vm::Extent;
use mce_relay_vmm::machine::memory::block::PAGE_SIZE;
use object::LittleEndian as LE;
use object::elf::{
    ELFCLASS64, ELFDATA2LSB, ELFMAG, ELFOSABI_NONE, EM_X86_64, ET_CORE, EV_CURRENT, FileFlags,
    FileHeader64, Ident, NT_PRSTATUS, PF_R, PF_W, PF_X, PN_XNUM, PT_LOAD, PT_NOTE, ProgramFlags,
    ProgramHeader64, ProgramType, SHT_NOTE, SHT_NULL, SHT_STRTAB, SectionFlags, SectionHeader64,
    SectionType, SymbolSection,
};
use object::endian::{U16, U32, U64};
use object::pod::bytes_of;

use super::note::{self, NAME_CORE, NAME_OWN, NAME_VMCOREINFO};
use super::ram::{Ram, subtract};
use super::vmcoreinfo::Kernel;
use crate::commands::dump::prstatus;

/// The type of our own note: 24 bytes for each stretch of pages, three little-endian numbers of 8 bytes each: the
/// guest-physical address, the length in bytes, and a [`State`]. An entry of length 0 is unused.
pub(super) const NT_PAGES: u32 = 0x4d43_4501;
const ENTRY: usize = 24;
/// Room in the note behind the memory, in entries, for when that note's size has to be stated in advance.
pub(super) const MOST_LATE: usize = 2048;
/// Room in the headers, in stretches, for when they are written before the number is known. That many pages are 1 GiB.
const MOST_ABSENT: u64 = 1 << 18;

const EHDR: usize = size_of::<FileHeader64<LE>>();
const PHDR: usize = size_of::<ProgramHeader64<LE>>();
const SHDR: usize = size_of::<SectionHeader64<LE>>();
const SECTIONS: usize = 3;
const NAMES: &[u8] = b"\0.note.mce_relay\0.shstrtab\0\0";

/// The state of pages in our own note.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum State {
    /// Poisoned; absent memory.
    Poisoned = 1,
    /// Not readable for another reason; absent memory.
    Unreadable = 2,
    /// Poisoned; zeros, as it was found too late.
    LatePoisoned = 3,
    /// Not readable for another reason; zeros, as it was found too late.
    LateUnreadable = 4,
}

impl State {
    /// The same, found too late.
    pub(super) fn late(self) -> Self {
        match self {
            Self::Poisoned | Self::LatePoisoned => Self::LatePoisoned,
            Self::Unreadable | Self::LateUnreadable => Self::LateUnreadable,
        }
    }
}

/// A stretch of lost pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lost {
    pub(super) extent: Extent,
    pub(super) state: State,
}

/// The description of our own note: lost pages, with room for at least `room` stretches.
pub(super) fn pages(lost: &[Lost], room: usize) -> Vec<u8> {
    let mut description = Vec::with_capacity(lost.len().max(room) * ENTRY);
    for Lost { extent, state } in lost {
        for number in [extent.gpa, extent.len, *state as u64] {
            description.extend(number.to_le_bytes());
        }
    }
    description.resize(description.len().max(room * ENTRY), 0);
    note::note(NAME_OWN, NT_PAGES, &description)
}

/// The notes on the machine: registers and vmcoreinfo.
pub(super) fn machine(kernel: Option<&Kernel>, registers: &[Registers]) -> Vec<u8> {
    let mut notes = Vec::new();
    // crash takes the first notes for the vCPUs', in their order.
    for vcpu in registers {
        notes.extend(note::note(NAME_CORE, NT_PRSTATUS.0, &prstatus::prstatus(vcpu)));
    }
    if let Some(kernel) = kernel {
        notes.extend(note::note(NAME_VMCOREINFO, 0, kernel.text.as_bytes()));
    }
    notes
}

/// The offsets of the parts of a core.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// Where the memory begins.
    pub(super) memory: u64,
    /// Where it ends and the note behind it begins.
    pub(super) late: u64,
}

impl Layout {
    /// For exactly `loads` stretches of whole memory and `notes` bytes of notes.
    pub(super) fn exact(ram: &Ram, loads: usize, notes: usize) -> Self {
        let headers = EHDR + PHDR * (1 + loads) + SHDR * SECTIONS + notes + NAMES.len();
        let memory = (headers as u64).next_multiple_of(PAGE_SIZE);
        Self { memory, late: memory + ram.len() }
    }

    /// With room for whatever is found while the memory is read. Also returns for how many stretches of lost pages that
    /// is.
    pub(super) fn roomy(ram: &Ram, vcpus: usize) -> (Self, usize) {
        let most = usize::try_from((ram.len() / PAGE_SIZE).min(MOST_ABSENT)).unwrap_or(usize::MAX);
        let vmcoreinfo = note::len(NAME_VMCOREINFO, crate::commands::dump::file::PAGE);
        let registers = note::len(NAME_CORE, prstatus::PRSTATUS);
        let notes = vmcoreinfo + vcpus * registers + note::len(NAME_OWN, most * ENTRY);
        (Self::exact(ram, ram.runs.len() + most, notes), most)
    }

    /// The offset of the memory at `gpa`.
    pub(super) fn offset(&self, ram: &Ram, gpa: u64) -> u64 {
        self.memory + ram.below(gpa)
    }
}

/// The stretches of memory that are not absent.
pub(super) fn loads(ram: &Ram, absent: &[Lost]) -> Vec<Extent> {
    subtract(&ram.runs, absent.iter().map(|lost| lost.extent))
}

/// Everything before the memory, without the zeros up to it. `late` is the length of the note behind it.
pub(super) fn headers(
    layout: Layout,
    ram: &Ram,
    loads: &[Extent],
    notes: &[u8],
    late: usize,
) -> Vec<u8> {
    let count = 1 + loads.len();
    let sections = EHDR + PHDR * count;
    let notes_at = sections + SHDR * SECTIONS;
    let mut headers = Vec::with_capacity(notes_at + notes.len() + NAMES.len());
    headers.extend(bytes_of(&file_header(count, sections)));
    headers.extend(bytes_of(&program_header(PT_NOTE, notes_at as u64, 0, notes.len() as u64)));
    for load in loads {
        let offset = layout.offset(ram, load.gpa);
        headers.extend(bytes_of(&program_header(PT_LOAD, offset, load.gpa, load.len)));
    }
    let names_at = (notes_at + notes.len()) as u64;
    headers.extend(bytes_of(&SectionHeader64 {
        // The number of program headers, if its field in the file header is too small (elf(5), e_phnum).
        sh_info: U32::new(LE, u32::try_from(count).unwrap_or(u32::MAX)),
        ..section(0, SHT_NULL, 0, 0)
    }));
    headers.extend(bytes_of(&section(1, SHT_NOTE, layout.late, late as u64)));
    headers.extend(bytes_of(&section(17, SHT_STRTAB, names_at, NAMES.len() as u64)));
    headers.extend(notes);
    headers.extend(NAMES);
    headers
}

fn file_header(program_headers: usize, sections: usize) -> FileHeader64<LE> {
    let half = |number: usize| U16::new(LE, u16::try_from(number).unwrap_or(u16::MAX));
    FileHeader64 {
        e_ident: Ident {
            magic: ELFMAG,
            class: ELFCLASS64,
            data: ELFDATA2LSB,
            version: EV_CURRENT,
            os_abi: ELFOSABI_NONE,
            abi_version: 0,
            padding: [0; 7],
        },
        e_type: U16::new(LE, ET_CORE),
        e_machine: U16::new(LE, EM_X86_64),
        e_version: U32::new(LE, EV_CURRENT.0.into()),
        e_entry: U64::new(LE, 0),
        e_phoff: U64::new(LE, EHDR as u64),
        e_shoff: U64::new(LE, sections as u64),
        e_flags: U32::new(LE, FileFlags(0)),
        e_ehsize: half(EHDR),
        e_phentsize: half(PHDR),
        e_phnum: half(program_headers.min(PN_XNUM.into())),
        e_shentsize: half(SHDR),
        e_shnum: half(SECTIONS),
        e_shstrndx: U16::new(LE, SymbolSection(2)),
    }
}

/// p_vaddr is 0, which makedumpfile takes for unknown: it uses the kernel's page tables. p_align is 0, by which crash
/// recognises this form of core.
fn program_header(kind: ProgramType, offset: u64, gpa: u64, len: u64) -> ProgramHeader64<LE> {
    let (flags, align, memory) = match kind {
        PT_NOTE => (ProgramFlags(0), 4, 0),
        _ => (PF_R | PF_W | PF_X, 0, len),
    };
    ProgramHeader64 {
        p_type: U32::new(LE, kind),
        p_flags: U32::new(LE, flags),
        p_offset: U64::new(LE, offset),
        p_vaddr: U64::new(LE, 0),
        p_paddr: U64::new(LE, gpa),
        p_filesz: U64::new(LE, len),
        p_memsz: U64::new(LE, memory),
        p_align: U64::new(LE, align),
    }
}

fn section(name: u32, kind: SectionType, offset: u64, len: u64) -> SectionHeader64<LE> {
    SectionHeader64 {
        sh_name: U32::new(LE, name),
        sh_type: U32::new(LE, kind),
        sh_flags: U64::new(LE, SectionFlags(0)),
        sh_addr: U64::new(LE, 0),
        sh_offset: U64::new(LE, offset),
        sh_size: U64::new(LE, len),
        sh_link: U32::new(LE, 0),
        sh_info: U32::new(LE, 0),
        sh_addralign: U64::new(LE, if kind == SHT_NOTE { 4 } else { 0 }),
        sh_entsize: U64::new(LE, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::dump::testing;

    fn lost(pages: impl IntoIterator<Item = u64>) -> Vec<Lost> {
        let mut lost: Vec<Lost> = Vec::new();
        for page in pages {
            let (gpa, len) = (page * PAGE_SIZE, PAGE_SIZE);
            match lost.last_mut() {
                Some(last) if last.extent.gpa + last.extent.len == gpa => last.extent.len += len,
                _ => lost.push(Lost { extent: Extent { gpa, len }, state: State::Poisoned }),
            }
        }
        lost
    }

    /// The headers of a core of `ram` without `absent`, with an empty note where the memory ends.
    fn made(ram: &Ram, absent: &[Lost]) -> (Layout, Vec<u8>) {
        let (notes, loads) = (pages(absent, 0), loads(ram, absent));
        let late = pages(&[], 0);
        let mut layout = Layout::exact(ram, loads.len(), notes.len());
        // The note is next to the headers here, so that the memory need not be there.
        let memory = layout.late - layout.memory;
        layout.late = layout.memory;
        let mut bytes = headers(layout, ram, &loads, &notes, late.len());
        assert!(bytes.len() as u64 <= layout.memory, "the headers end where the memory begins");
        bytes.resize(usize::try_from(layout.memory).unwrap(), 0);
        bytes.extend(late);
        layout.late = layout.memory + memory;
        (layout, bytes)
    }

    /// Whatever is bad, every other page of RAM is in one stretch, at its place, and no bad one is.
    #[test]
    fn stretches_and_pages_are_the_same() {
        let mut random = fastrand::Rng::with_seed(7);
        for round in 0..200 {
            let start = random.u64(64..200);
            let runs = [(0, random.u64(1..60)), (start, random.u64(1..60))];
            let runs = runs.map(|(at, len)| Extent { gpa: at * PAGE_SIZE, len: len * PAGE_SIZE });
            let ram = Ram { runs: runs.to_vec() };
            let share = random.f32();
            let all: Vec<u64> = ram
                .runs
                .iter()
                .flat_map(|run| (run.gpa..run.gpa + run.len).step_by(4096))
                .collect();
            let (bad, good): (Vec<u64>, Vec<u64>) = all.iter().partition(|_| random.f32() < share);
            let absent = lost(bad.iter().map(|gpa| gpa / PAGE_SIZE));
            let (layout, bytes) = made(&ram, &absent);
            let core = testing::core(&bytes);
            let mut found = Vec::new();
            for (gpa, offset, len) in &core.loads {
                for at in (0..*len).step_by(4096) {
                    let rank = all.iter().position(|page| *page == gpa + at);
                    let place = rank.map(|rank| layout.memory + rank as u64 * PAGE_SIZE);
                    assert_eq!(Some(offset + at), place, "round {round}: {:#x}", gpa + at);
                    found.push(gpa + at);
                }
            }
            assert_eq!(found, good, "round {round}");
            let listed: Vec<u64> = core
                .lost()
                .iter()
                .flat_map(|[gpa, len, state]| {
                    assert_eq!(*state, 1);
                    (*gpa..gpa + len).step_by(4096)
                })
                .collect();
            assert_eq!(listed, bad, "round {round}");
        }
    }

    #[test]
    fn there_may_be_more_stretches_than_a_file_header_can_count() {
        for count in [0xfffd, 0xfffe, 0xffff, 100_000] {
            let ram = Ram { runs: vec![Extent { gpa: 0, len: 300_000 * PAGE_SIZE }] };
            let absent = lost((0..count).map(|page| 2 * page));
            let (_, bytes) = made(&ram, &absent);
            let core = testing::core(&bytes);
            assert_eq!(core.loads.len() as u64, count);
            let last = 2 * count - 1;
            let len = (300_000 - last) * PAGE_SIZE;
            let (gpa, _, found) = *core.loads.last().unwrap();
            assert_eq!((gpa, found), (last * PAGE_SIZE, len), "{count}");
        }
    }

    #[test]
    fn the_room_is_enough() {
        let ram = Ram { runs: vec![Extent { gpa: 0, len: 1000 * PAGE_SIZE }] };
        let (roomy, most) = Layout::roomy(&ram, 4);
        assert_eq!(most, 1000, "all of them");
        let vcpus: Vec<Registers> = (0..4).map(|vcpu| prstatus::tests::at(vcpu, 0)).collect();
        let text = "X=1\n".repeat(1024);
        let kernel = Kernel { release: "1".into(), vmcoreinfo: 0, text };
        let mut absent = lost((0..500).map(|page| 2 * page));
        absent.extend_from_within(..500); // of both states
        let mut notes = machine(Some(&kernel), &vcpus);
        notes.extend(pages(&absent, 0));
        let needed = Layout::exact(&ram, 500, notes.len()).memory;
        assert!(needed <= roomy.memory, "{needed} of {}", roomy.memory);
        let large = Ram { runs: vec![Extent { gpa: 0, len: 1 << 40 }] };
        assert!(Layout::roomy(&large, 254).0.memory < 32 << 20, "crash holds it in memory");
    }

    #[test]
    fn what_is_late_is_marked_so() {
        assert_eq!(State::Poisoned.late(), State::LatePoisoned);
        assert_eq!(State::Unreadable.late(), State::LateUnreadable);
        assert_eq!(pages(&[], MOST_LATE).len(), 12 + 12 + MOST_LATE * ENTRY);
    }
}
