//! Finds vmcoreinfo, what a Linux kernel says about itself for readers of its memory: lines of KEY=VALUE.
//!
//! The kernel keeps the lines at the beginning of a page of their own, and once more in an ELF note at the beginning of
//! another page (kernel/vmcore_info.c, kernel/crash_core.c before Linux 6.9). The guest need not help: every page that
//! is read is checked. There may be copies, even of an earlier kernel, so a candidate counts only if it agrees with the
//! running kernel's name (`init_uts_ns`, which the lines point to).

use std::fmt;

use mce_relay_vmm::machine::memory::block::PAGE_SIZE;
use serde::Serialize;

use super::error::DumpError;
use super::file::PAGE;
use super::note::{self, NAME_VMCOREINFO};
use super::vm::{Piece, Vm};

/// The first line begins with this.
const FIRST: &[u8] = b"OSRELEASE=";
/// How many candidates are examined; a guest can make as many as it likes.
const MOST: usize = 64;
/// Where the kernel's image is mapped (arch/x86/include/asm/page_64_types.h).
const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// Offset of the release in struct new_utsname, and the length of each field (include/uapi/linux/utsname.h).
const RELEASE: u64 = 2 * 65;
const FIELD: usize = 65;

/// A guest's kernel, as it describes itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Kernel {
    /// Its release, as `uname -r` has it.
    pub release: String,
    /// Guest-physical address of the lines.
    #[serde(with = "mce_relay::hex")]
    pub vmcoreinfo: u64,
    #[serde(skip)]
    pub(super) text: String,
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Linux {}, vmcoreinfo at GPA {:#x}", self.release, self.vmcoreinfo)
    }
}

impl Kernel {
    /// The kernel that the page of guest RAM at `gpa` describes, if it does.
    fn of(gpa: u64, page: &[u8]) -> Option<Self> {
        let text = if page.starts_with(FIRST) {
            page.split(|byte| *byte == 0).next()?
        } else {
            note::description(page, NAME_VMCOREINFO, 0).filter(|text| text.starts_with(FIRST))?
        };
        let text = std::str::from_utf8(text).ok()?;
        let is_line = |line: &str| {
            line.contains('=') && line.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic())
        };
        let whole = text.ends_with('\n') && text.lines().all(is_line);
        let kernel =
            Self { release: value(text, "OSRELEASE")?.into(), vmcoreinfo: gpa, text: text.into() };
        (whole && value(text, "PAGESIZE") == Some("4096") && text.contains("\nSYMBOL("))
            .then_some(kernel)
    }

    /// Guest-physical address of the running kernel's own name.
    fn name(&self) -> Option<u64> {
        let symbol = u64::from_str_radix(value(&self.text, "SYMBOL(init_uts_ns)")?, 16).ok()?;
        let offset: u64 = value(&self.text, "OFFSET(uts_namespace.name)")?.parse().ok()?;
        let base: i64 = value(&self.text, "NUMBER(phys_base)")?.parse().ok()?;
        symbol
            .checked_sub(START_KERNEL_MAP)?
            .checked_add_signed(base)?
            .checked_add(offset)?
            .checked_add(RELEASE)
    }

    /// Whether the running kernel's name agrees; `None` where it cannot be read.
    fn runs(&self, vm: &Vm<'_>) -> Result<Option<bool>, DumpError> {
        let Some(gpa) = self.name() else { return Ok(None) };
        if vm.info.block(gpa).is_none() {
            return Ok(Some(false));
        }
        Ok(match vm.piece(gpa, FIELD as u64)? {
            Piece::Bytes(bytes) => {
                let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
                Some(name == self.release.as_bytes())
            }
            Piece::Poisoned | Piece::NoMemory(_) => None,
        })
    }
}

fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
}

/// Checks every page that is read.
#[derive(Debug, Default)]
pub(super) struct Finder(Vec<Kernel>);

impl Finder {
    /// Checks `data` at `gpa`, the beginning of a page.
    pub(super) fn look(&mut self, gpa: u64, data: &[u8]) {
        for (at, page) in (gpa..).step_by(PAGE).zip(data.chunks(PAGE)) {
            if let Some(kernel) = Kernel::of(at, page)
                && self.0.len() < MOST
            {
                self.0.push(kernel);
            }
        }
    }

    /// The running kernel, if it was found.
    pub(super) fn choose(self, vm: &Vm<'_>) -> Result<Option<Kernel>, DumpError> {
        let mut other = None;
        for kernel in self.0 {
            match kernel.runs(vm)? {
                Some(true) => return Ok(Some(kernel)),
                Some(false) => {}
                None => other = other.or(Some(kernel)),
            }
        }
        Ok(other)
    }
}

const _: () = assert!(PAGE as u64 == PAGE_SIZE);

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "OSRELEASE=6.1.0-test\nPAGESIZE=4096\nSYMBOL(init_uts_ns)=ffffffff81002000\n\
        OFFSET(uts_namespace.name)=4\nNUMBER(phys_base)=-4096\nKERNELOFFSET=0\n";

    fn page(words: &[u8]) -> Vec<u8> {
        let mut page = words.to_vec();
        page.resize(PAGE, 0);
        page
    }

    #[test]
    fn both_forms_are_found() {
        let note = note::note(NAME_VMCOREINFO, 0, TEXT.as_bytes());
        for form in [TEXT.as_bytes(), &note] {
            let mut finder = Finder::default();
            finder.look(0x5000, &[page(b"x"), page(form)].concat());
            let [kernel] = &finder.0[..] else { panic!("{:?}", finder.0) };
            assert_eq!((&*kernel.release, kernel.vmcoreinfo), ("6.1.0-test", 0x6000));
            assert_eq!(kernel.text, TEXT);
            assert_eq!(kernel.name(), Some(0x100_2000 - 0x1000 + 4 + 130));
        }
    }

    #[test]
    fn what_is_none_is_not_taken() {
        let cut = &TEXT[..TEXT.len() - 1];
        let escape = TEXT.replace("test", "\x1b[2J");
        let words = TEXT.replace("KERNELOFFSET=0", "and so on");
        let pages = TEXT.replace("PAGESIZE=4096", "PAGESIZE=65536");
        let symbols = TEXT.replace("SYMBOL", "symbol");
        for text in [cut, &escape, &words, &pages, &symbols, "OSRELEASE=1\n", ""] {
            assert_eq!(Kernel::of(0, &page(text.as_bytes())), None, "{text}");
        }
        let long = TEXT.to_owned() + &"X=1\n".repeat(1000);
        let note = note::note(NAME_VMCOREINFO, 0, long.as_bytes());
        assert_eq!(Kernel::of(0, &note[..PAGE]), None, "its end is in the next page");
    }

    #[test]
    fn a_guest_full_of_them_is_no_matter() {
        let mut finder = Finder::default();
        (0..100).for_each(|_| finder.look(0, &page(TEXT.as_bytes())));
        assert_eq!(finder.0.len(), MOST);
    }
}
