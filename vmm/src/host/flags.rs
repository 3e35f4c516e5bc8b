//! The kernel's flags of a page frame, by the names that page-types shows.

use std::str::FromStr;

use crate::number;

/// Bits of /proc/kpageflags (`include/uapi/linux/kernel-page-flags.h`; from 32 on, those that the
/// kernel shows to its own developers, `include/linux/kernel-page-flags.h`).
pub const NAMES: [(u32, &str); 38] = [
    (0, "locked"),
    (1, "error"),
    (2, "referenced"),
    (3, "uptodate"),
    (4, "dirty"),
    (5, "lru"),
    (6, "active"),
    (7, "slab"),
    (8, "writeback"),
    (9, "reclaim"),
    (10, "buddy"),
    (11, "mmap"),
    (12, "anon"),
    (13, "swapcache"),
    (14, "swapbacked"),
    (15, "compound_head"),
    (16, "compound_tail"),
    (17, "huge"),
    (18, "unevictable"),
    (19, "hwpoison"),
    (20, "nopage"),
    (21, "ksm"),
    (22, "thp"),
    (23, "offline"),
    (24, "zero_page"),
    (25, "idle_page"),
    (26, "pgtable"),
    (32, "reserved"),
    (33, "mlocked"),
    (34, "mappedtodisk"),
    (35, "private"),
    (36, "private_2"),
    (37, "owner_private"),
    (38, "arch"),
    (39, "uncached"),
    (40, "softdirty"),
    (41, "arch_2"),
    (42, "arch_3"),
];

/// KPF_LRU: on one of the lists of pages that can be reclaimed.
pub const LRU: u64 = 1 << 5;
/// KPF_SLAB: the kernel's own objects.
pub const SLAB: u64 = 1 << 7;
/// KPF_BUDDY: free memory.
pub const BUDDY: u64 = 1 << 10;
/// KPF_MMAP: mapped into the address space of a process.
pub const MMAP: u64 = 1 << 11;
/// KPF_ANON: memory of processes that is of no file.
pub const ANON: u64 = 1 << 12;
/// KPF_HUGE: a page of hugetlb.
pub const HUGE: u64 = 1 << 17;
/// KPF_HWPOISON: bad.
pub const HWPOISON: u64 = 1 << 19;
/// KPF_NOPAGE: there is no memory that the kernel manages; also memory of a device (DAX).
pub const NOPAGE: u64 = 1 << 20;
/// KPF_KSM: one page shared by several mappings, of any processes, that had the same contents.
pub const KSM: u64 = 1 << 21;
/// KPF_THP: part of a transparent huge page.
pub const THP: u64 = 1 << 22;
/// KPF_OFFLINE: taken from this kernel, as by a balloon.
pub const OFFLINE: u64 = 1 << 23;
/// KPF_ZERO_PAGE: the page (with KPF_THP the huge page) that is mapped everywhere where a process has only read
/// unwritten memory.
pub const ZERO_PAGE: u64 = 1 << 24;
/// KPF_PGTABLE: a page table.
pub const PGTABLE: u64 = 1 << 26;
/// KPF_RESERVED (`include/linux/kernel-page-flags.h`): the kernel's own or the firmware's.
pub const RESERVED: u64 = 1 << 32;

/// The names of the flags that are set; a flag without a name here by its number.
#[must_use]
pub fn names(flags: u64) -> Vec<String> {
    let set = (0..64).filter(|bit| flags & (1 << bit) != 0);
    set.map(|bit| match NAMES.iter().find(|(known, _)| *known == bit) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("bit{bit}"),
    })
    .collect()
}

/// Flags by names with `+` between, or by number.
///
/// # Errors
/// Words for the user.
pub fn mask(text: &str) -> Result<u64, String> {
    if let Some(number) = number::plain(text) {
        return Ok(number);
    }
    text.split('+').try_fold(0, |flags, name| {
        let name = name.to_ascii_lowercase();
        let found = NAMES.iter().find(|(_, known)| *known == name);
        found.map(|(bit, _)| flags | 1 << bit).ok_or_else(|| {
            let all: Vec<&str> = NAMES.iter().map(|(_, name)| *name).collect();
            format!(
                "{name:?} is no flag of a page; expected a number, or names with + between, of {}",
                all.join(", ")
            )
        })
    })
}

/// Accepts flags of which, among those in `mask`, exactly those in `value` are set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlagsFilter {
    /// The flags that matter.
    pub mask: u64,
    /// Those that have to be set.
    pub value: u64,
}

impl FromStr for FlagsFilter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (left, right) = text.split_once('=').ok_or_else(|| {
            format!("{text:?} is no filter; expected MASK=VALUE, e.g. anon+huge=anon or huge=0")
        })?;
        let (mask, value) = (mask(left)?, mask(right)?);
        if value & !mask != 0 {
            let beyond = names(value & !mask).join("+");
            return Err(format!("{text}: {beyond} is in the value, but not in the mask"));
        }
        if mask == 0 {
            return Err(format!("{text}: the mask is empty; leave the filter out"));
        }
        Ok(Self { mask, value })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        assert_eq!(names(1 << 12 | 1 << 19 | 1 << 63), ["anon", "hwpoison", "bit63"]);
        assert_eq!(mask("anon+hwpoison"), Ok(1 << 12 | 1 << 19));
        assert_eq!(mask("0x80000"), Ok(HWPOISON));
        assert_eq!(mask("0"), Ok(0));
        let constants = [
            (LRU, "lru"),
            (SLAB, "slab"),
            (BUDDY, "buddy"),
            (MMAP, "mmap"),
            (ANON, "anon"),
            (HUGE, "huge"),
            (HWPOISON, "hwpoison"),
            (NOPAGE, "nopage"),
            (KSM, "ksm"),
            (THP, "thp"),
            (OFFLINE, "offline"),
            (ZERO_PAGE, "zero_page"),
            (PGTABLE, "pgtable"),
            (RESERVED, "reserved"),
        ];
        for (flag, name) in constants {
            assert_eq!(mask(name), Ok(flag));
        }
        for (bit, name) in NAMES {
            assert_eq!(mask(name), Ok(1 << bit));
        }
    }

    #[test]
    fn filters() {
        let filter = |mask, value| Ok(FlagsFilter { mask, value });
        assert_eq!("anon+huge=anon".parse(), filter(1 << 12 | HUGE, 1 << 12));
        assert_eq!("huge=0".parse(), filter(HUGE, 0));
        for (bad, named) in [
            ("anon", "MASK=VALUE"),
            ("anon=huge", "huge is in the value"),
            ("0=0", "empty"),
            ("red=red", "\"red\""),
            ("anon=", "\"\""),
        ] {
            let error = bad.parse::<FlagsFilter>().unwrap_err();
            assert!(error.contains(named), "{bad}: {error}");
        }
    }
}
