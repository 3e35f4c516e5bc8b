//! Says, before pages are poisoned, what is lost with them.

use std::collections::BTreeSet;

use mce_relay_vmm::api::types::means::Means;
use mce_relay_vmm::api::types::vm::VmInfo;

use super::burst::Poisoned;

const PAGE_SIZE: u64 = 4096;

/// Everything that is lost with a page: its start and length in bytes.
fn extent(page: &Poisoned) -> (u64, u64) {
    (page.gpa - page.gpa % page.extent, page.extent)
}

/// Whether `len` bytes at `gpa` overlap the stretch into which the guest's kernel was loaded.
pub(super) fn touches_kernel(vm: &VmInfo, gpa: u64, len: u64) -> bool {
    let kernel = vm.kernel;
    gpa < kernel.gpa + kernel.len && gpa + len > kernel.gpa
}

fn size(bytes: u64) -> String {
    match bytes >> 10 {
        kib if kib.is_multiple_of(1 << 20) => format!("{} GiB", kib >> 20),
        kib if kib.is_multiple_of(1 << 10) => format!("{} MiB", kib >> 10),
        kib => format!("{kib} KiB"),
    }
}

/// The addresses of the first few pages.
fn named(pages: &[&Poisoned]) -> String {
    const SHOWN: usize = 4;
    let shown: Vec<String> =
        pages.iter().take(SHOWN).map(|page| format!("{:#x}", page.gpa)).collect();
    match pages.len().saturating_sub(SHOWN) {
        0 => format!("GPA {}", shown.join(", ")),
        more => format!("GPA {} and {more} more", shown.join(", ")),
    }
}

/// The notes for poisoning `pages` of `vm` by `via`. `whose` is the guest's process that has the pages, as its agent
/// says.
pub(super) fn words(
    vm: &VmInfo,
    via: Means,
    pages: &[Poisoned],
    whose: Option<&str>,
) -> Vec<String> {
    [huge(vm, via, pages), others(via, pages, whose), kernel(vm, via, pages), bad(via, pages)]
        .into_iter()
        .flatten()
        .collect()
}

/// The whole of a huge page goes.
fn huge(vm: &VmInfo, via: Means, pages: &[Poisoned]) -> Option<String> {
    let huge: Vec<&Poisoned> = pages.iter().filter(|page| page.extent > PAGE_SIZE).collect();
    let first = huge.first()?;
    let goes = match via {
        Means::SoftOffline => "moves",
        Means::Signal => "is what the guest is told of",
        _ => "goes",
    };
    let keeps = match via {
        Means::SoftOffline | Means::Signal | Means::Uffd => "",
        _ if vm.rescue => {
            "; the guest keeps the rest where the host can still read it (run --rescue)"
        }
        _ => "",
    };
    let extents: BTreeSet<(u64, u64)> = huge.iter().map(|page| extent(page)).collect();
    let bytes: u64 = extents.iter().map(|(_, len)| len).sum();
    if extents.len() == 1 {
        let (start, len) = extent(first);
        return Some(format!(
            "the host keeps {} in a huge page, and {}, GPA {start:#x}..{:#x}, {goes} as a whole ({} pages of 4 KiB){keeps}",
            named(&huge),
            size(len),
            start + len,
            len / PAGE_SIZE
        ));
    }
    Some(format!(
        "the host keeps {} in {} huge pages, and each {goes} as a whole: {}, {} pages of 4 KiB",
        named(&huge),
        extents.len(),
        size(bytes),
        bytes / PAGE_SIZE
    ))
}

/// A note if other pages are lost with those of a process.
fn others(via: Means, pages: &[Poisoned], whose: Option<&str>) -> Option<String> {
    let whose = whose?;
    if via == Means::SoftOffline {
        return None;
    }
    let extents: BTreeSet<(u64, u64)> = pages.iter().map(extent).collect();
    let all: u64 = extents.iter().map(|(_, len)| len / PAGE_SIZE).sum();
    let others = all.saturating_sub(pages.len() as u64);
    (others > 0).then(|| {
        format!(
            "{} of these pages were named as {whose}'s: the other {others} may be of any process of the guest, or \
             of its kernel",
            pages.len()
        )
    })
}

/// A note if memory of the guest's kernel that was whole is hit.
fn kernel(vm: &VmInfo, via: Means, pages: &[Poisoned]) -> Option<String> {
    if via == Means::SoftOffline {
        return None;
    }
    let hit: Vec<&Poisoned> =
        pages.iter().filter(|page| page.guest_kernel && page.was_bad != Some(true)).collect();
    let first = hit.first()?;
    let (start, end) = (vm.kernel.gpa, vm.kernel.gpa + vm.kernel.len);
    let what = match (hit.len(), first.extent) {
        (1, PAGE_SIZE) => format!("{} is", named(&hit)),
        (1, _) => format!("{}, with all that goes with it, is", named(&hit)),
        (_, PAGE_SIZE) => format!("{} are", named(&hit)),
        _ => format!("{}, with all that goes with them, are", named(&hit)),
    };
    Some(format!(
        "{what} in the range where the guest's kernel was loaded ({start:#x}..{end:#x}: text, data, and what it \
         frees after its start); the guest may not survive it"
    ))
}

/// A note if a signal is forged for a page that is really bad.
fn bad(via: Means, pages: &[Poisoned]) -> Option<String> {
    let bad: Vec<&Poisoned> = pages.iter().filter(|page| page.was_bad == Some(true)).collect();
    (via == Means::Signal && !bad.is_empty())
        .then(|| format!("really bad already: {}; there only the signal is forged", named(&bad)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::an_info;
    use mce_relay_vmm::api::types::vm::Extent;

    const HUGE: u64 = 2 << 20;

    fn vm() -> VmInfo {
        VmInfo { kernel: Extent { gpa: 0x100_0000, len: 0x1f0_0000 }, ..an_info() }
    }

    fn page(gpa: u64, extent: u64, via: Means) -> Poisoned {
        let guest_kernel = touches_kernel(&vm(), gpa - gpa % extent, extent);
        Poisoned { extent, guest_kernel, ..Poisoned::new(gpa, 0x7f00_0000_0000 + gpa, via) }
    }

    fn said(via: Means, pages: &[(u64, u64)], whose: Option<&str>) -> Vec<String> {
        let pages: Vec<Poisoned> =
            pages.iter().map(|(gpa, extent)| page(*gpa, *extent, via)).collect();
        words(&vm(), via, &pages, whose)
    }

    #[test]
    fn a_page_of_a_process_alone_needs_no_words() {
        assert!(
            said(Means::HwpoisonInject, &[(0x800_1000, 4096)], Some("process 7 (sh)")).is_empty()
        );
    }

    #[test]
    fn a_huge_page_goes_as_a_whole() {
        let one = said(Means::HwpoisonInject, &[(0x805_1000, HUGE)], None);
        assert_eq!(
            one,
            [
                "the host keeps GPA 0x8051000 in a huge page, and 2 MiB, GPA 0x8000000..0x8200000, goes as a whole \
              (512 pages of 4 KiB); the guest keeps the rest where the host can still read it (run --rescue)"
            ]
        );
        // Two pages of one, and one of another.
        let pages = [(0x805_1000, HUGE), (0x805_2000, HUGE), (0x840_0000, HUGE)];
        let more = said(Means::Uffd, &pages, None);
        assert!(
            more[0].contains("in 2 huge pages") && more[0].contains("4 MiB, 1024 pages"),
            "{more:?}"
        );
        let giant = said(Means::Madvise, &[(5 << 30 | 0x1000, 1 << 30)], None);
        assert!(giant[0].contains("1 GiB, GPA 0x140000000..0x180000000"), "{giant:?}");
        let moves = said(Means::SoftOffline, &[(0x1000, HUGE)], Some("process 1 (init)"));
        assert!(moves.len() == 1 && moves[0].contains("moves as a whole"), "{moves:?}");
    }

    #[test]
    fn more_than_a_process_goes() {
        let pages = [(0x805_1000, HUGE), (0x805_2000, HUGE)];
        let words = said(Means::HwpoisonInject, &pages, Some("process 89 (agent)"));
        assert!(
            words[1].starts_with(
                "2 of these pages were named as process 89 (agent)'s: the other 510 may"
            ),
            "{words:?}"
        );
    }

    #[test]
    fn the_guests_kernel_is_named() {
        let inside = said(Means::HwpoisonInject, &[(0x100_0000, 4096)], None);
        assert!(
            inside[0].starts_with("GPA 0x1000000 is in the range where the guest's kernel was loaded (0x1000000..0x2f00000"),
            "{inside:?}"
        );
        for outside in [0xff_f000, 0x2f0_0000] {
            assert!(said(Means::Signal, &[(outside, 4096)], None).is_empty(), "{outside:#x}");
        }
        // The page itself is not, and what goes with it is.
        let with = said(Means::Uffd, &[(0x2ff_f000, HUGE)], None);
        assert!(
            with[1].contains("GPA 0x2fff000, with all that goes with it, is in the range"),
            "{with:?}"
        );
        assert!(
            said(Means::SoftOffline, &[(0x100_0000, 4096)], None).is_empty(),
            "nothing is lost"
        );
        let many: Vec<(u64, u64)> = (0..6).map(|n| (0x100_0000 + n * 4096, 4096)).collect();
        let many = said(Means::Uffd, &many, None);
        assert!(many[0].contains("0x1003000 and 2 more are in the range"), "{many:?}");
    }

    #[test]
    fn a_page_that_is_bad_is_not_called_whole() {
        let bad = Poisoned { was_bad: Some(true), ..page(0x900_0000, 4096, Means::Signal) };
        let words = words(&vm(), Means::Signal, &[bad], None);
        assert!(words[0].starts_with("really bad already: GPA 0x9000000"), "{words:?}");
    }

    #[test]
    fn a_page_of_the_kernel_that_is_bad_already_is_not_hit() {
        let bad = Poisoned { was_bad: Some(true), ..page(0x100_0000, 4096, Means::Signal) };
        let whole = Poisoned { was_bad: Some(false), ..page(0x100_1000, 4096, Means::Signal) };
        let said = words(&vm(), Means::Signal, std::slice::from_ref(&bad), None);
        assert!(said.len() == 1 && !said[0].contains("kernel"), "{said:?}");
        let said = words(&vm(), Means::Signal, &[bad, whole], None);
        assert!(said[0].starts_with("GPA 0x1001000 is in the range where"), "{said:?}");
    }
}
