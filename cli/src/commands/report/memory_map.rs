//! The guest's memory in rows, and where it is bad.

use std::collections::BTreeMap;

use mce_relay_vmm::api::types::vm::Extent;
use serde::Serialize;

use crate::commands::mark::Mark;

/// Parts of a row that are told apart.
pub const BINS: u64 = 256;
/// Approximate number of rows.
const ROWS: u128 = 16;
/// A row is no shorter, so that a part is no less than a page.
const LEAST_ROW: u128 = 1 << 20;
/// What is drawn of a guest whose memory is not known ends at a multiple of this.
const UNKNOWN_STEP: u128 = 128 << 20;
/// Length of a page in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Adjacent bad pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stretch {
    /// Guest-physical address of its first byte.
    #[serde(with = "mce_relay::hex")]
    pub gpa: u64,
    /// How many pages.
    pub pages: u64,
    /// The worst of them.
    pub worst: Mark,
}

/// A part of a row that has a bad page.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Bin {
    /// Its index in the row, below [`BINS`].
    pub at: u64,
    /// How many stretches begin in it or reach into it.
    pub stretches: u64,
    /// The worst in it.
    pub worst: Mark,
}

/// A row of memory.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// Guest-physical address of its first byte.
    #[serde(with = "mce_relay::hex")]
    pub gpa: u64,
    /// Where it has RAM: from and to, in parts of a row.
    pub ram: Vec<(f64, f64)>,
    /// Where it is bad.
    pub bad: Vec<Bin>,
}

/// The guest's memory.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct MemoryMap {
    /// Where it has RAM; `None` if that is not known.
    pub ram: Option<Vec<Extent>>,
    /// Length of a row in bytes.
    pub row_bytes: u64,
    /// The rows that have RAM.
    pub rows: Vec<Row>,
    /// Where it is bad, by address.
    pub stretches: Vec<Stretch>,
}

impl MemoryMap {
    /// Draws `pages` (address, number of pages, and how bad) into `ram`. Where `ram` is not known it is taken to reach
    /// to the highest of them.
    #[must_use]
    pub fn new(ram: Option<Vec<Extent>>, pages: Vec<(u64, u64, Mark)>) -> Self {
        let stretches = stretches(pages);
        // Wider than addresses, as a file may have any address.
        let bounds = |gpa: u64, len: u64| (u128::from(gpa), u128::from(gpa) + u128::from(len));
        let highest = stretches.last().map_or(0, end_of);
        let blocks: Vec<(u128, u128)> = match &ram {
            Some(ram) => ram.iter().map(|block| bounds(block.gpa, block.len)).collect(),
            None if highest == 0 => Vec::new(),
            None => vec![(0, highest.next_multiple_of(UNKNOWN_STEP))],
        };
        let end = blocks.iter().map(|block| block.1).max().unwrap_or_default();
        let row = end.div_ceil(ROWS).next_power_of_two().max(LEAST_ROW);
        let bin = row / u128::from(BINS);
        let mut rows: Vec<Row> = (0..end.div_ceil(row))
            .map(|at| {
                let (from, to) = (at * row, (at + 1) * row);
                let part = |at: u128| fraction(at.clamp(from, to) - from, row);
                let inside = blocks.iter().filter(|block| block.0 < to && block.1 > from);
                Row {
                    gpa: u64::try_from(from).unwrap_or(u64::MAX),
                    ram: inside.map(|block| (part(block.0), part(block.1))).collect(),
                    bad: Vec::new(),
                }
            })
            .collect();
        for stretch in &stretches {
            let (first, last) = (u128::from(stretch.gpa) / bin, (end_of(stretch) - 1) / bin);
            let drawn = (rows.len() as u128) * u128::from(BINS);
            for at in first..=last.min(drawn.saturating_sub(1)) {
                let (row, at) = (at / u128::from(BINS), at % u128::from(BINS));
                let (Ok(row), Ok(at)) = (usize::try_from(row), u64::try_from(at)) else { continue };
                let Some(row) = rows.get_mut(row) else { continue };
                // They come by address.
                match row.bad.last_mut() {
                    Some(bin) if bin.at == at => {
                        bin.stretches += 1;
                        bin.worst = bin.worst.max(stretch.worst);
                    }
                    _ => row.bad.push(Bin { at, stretches: 1, worst: stretch.worst }),
                }
            }
        }
        rows.retain(|row| !row.ram.is_empty() || !row.bad.is_empty());
        Self { ram, row_bytes: u64::try_from(row).unwrap_or(u64::MAX), rows, stretches }
    }
}

fn end_of(stretch: &Stretch) -> u128 {
    u128::from(stretch.gpa) + u128::from(stretch.pages) * u128::from(PAGE_SIZE)
}

#[allow(clippy::cast_precision_loss, reason = "it is drawn, less exactly than this")]
fn fraction(part: u128, of: u128) -> f64 {
    part as f64 / of as f64
}

/// Adjacent pages with the same mark as one, by address; of several marks of a page the worst.
fn stretches(pages: Vec<(u64, u64, Mark)>) -> Vec<Stretch> {
    // Where one begins or ends, and how many there are of each mark from there on.
    let mut steps: Vec<(u128, Mark, bool)> = Vec::new();
    for (gpa, pages, mark) in pages {
        let (start, len) = (u128::from(gpa), u128::from(pages) * u128::from(PAGE_SIZE));
        steps.push((start, mark, true));
        steps.push((start + len, mark, false));
    }
    steps.sort_unstable();
    let (mut all, mut open) = (Vec::<Stretch>::new(), BTreeMap::<Mark, u64>::new());
    for (at, (start, mark, begins)) in steps.iter().enumerate() {
        let count = open.entry(*mark).or_default();
        // One may end where another begins, and is counted first then.
        *count = if *begins { count.wrapping_add(1) } else { count.wrapping_sub(1) };
        let Some((end, ..)) = steps.get(at + 1) else { break };
        let worst = open.iter().rev().find(|(_, count)| **count > 0).map(|(mark, _)| *mark);
        let (Some(worst), Ok(gpa)) = (worst, u64::try_from(*start)) else { continue };
        let Ok(pages) = u64::try_from((end - start) / u128::from(PAGE_SIZE)) else { continue };
        match all.last_mut() {
            _ if pages == 0 => {}
            Some(last) if end_of(last) == *start && last.worst == worst => last.pages += pages,
            _ => all.push(Stretch { gpa, pages, worst }),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn blocks(all: &[(u64, u64)]) -> Option<Vec<Extent>> {
        Some(all.iter().map(|&(gpa, len)| Extent { gpa, len }).collect())
    }

    #[test]
    fn rows_fit_guests_of_any_size() {
        for (ram, row, rows) in [
            (vec![(0, 128 * MIB)], 8 * MIB, 16),
            (vec![(0, 512 * MIB)], 32 * MIB, 16),
            (vec![(0, 3 * GIB), (4 * GIB, 3 * GIB)], 512 * MIB, 12),
            (vec![(0, 3 * GIB), (4 * GIB, 1021 * GIB)], 128 * GIB, 9),
            (vec![(0, MIB)], MIB, 1),
        ] {
            let map = MemoryMap::new(blocks(&ram), vec![(MIB / 2, 1, Mark::Injected)]);
            assert_eq!((map.row_bytes, map.rows.len()), (row, rows), "{ram:?}");
            assert_eq!(map.rows[0].bad.len(), 1);
        }
    }

    #[test]
    fn a_hole_is_no_ram() {
        let map = MemoryMap::new(blocks(&[(0, 3 * GIB), (4 * GIB, 3 * GIB)]), Vec::new());
        assert_eq!(map.rows[5].gpa, 5 * GIB / 2);
        assert_eq!(map.rows[6].gpa, 4 * GIB);
        assert_eq!(map.rows[0].ram, [(0.0, 1.0)]);
    }

    #[test]
    fn the_worst_is_shown_and_adjacent_pages_are_one() {
        let pages = vec![
            (0x3000, 1, Mark::Acknowledged),
            (0x2000, 1, Mark::Acknowledged),
            (0x2000, 1, Mark::Healed),
            (0x4000, 1, Mark::Undeliverable),
            (64 * MIB, 512, Mark::Waiting),
        ];
        let map = MemoryMap::new(None, pages);
        let stretch = |gpa, pages, worst| Stretch { gpa, pages, worst };
        assert_eq!(
            map.stretches,
            [
                stretch(0x2000, 2, Mark::Acknowledged),
                stretch(0x4000, 1, Mark::Undeliverable),
                stretch(64 * MIB, 512, Mark::Waiting),
            ]
        );
        assert_eq!(map.row_bytes, 8 * MIB, "128 MiB, where it is not known");
        assert_eq!(map.rows[0].bad, [Bin { at: 0, stretches: 2, worst: Mark::Undeliverable }]);
        assert_eq!(map.rows[8].bad.len(), 64, "2 MiB");
    }

    /// The sum of all stretches is the number of pages, however they overlap.
    #[test]
    fn a_page_is_in_one_stretch() {
        let pages = vec![
            (0, 512, Mark::Waiting),
            (0, 1, Mark::Undeliverable),
            (0x5000, 3, Mark::Removed),
            (0x6000, 1, Mark::Healed),
        ];
        let map = MemoryMap::new(None, pages);
        let all: Vec<_> = map.stretches.iter().map(|one| (one.gpa, one.pages, one.worst)).collect();
        let expected = [
            (0, 1, Mark::Undeliverable),
            (0x1000, 4, Mark::Waiting),
            (0x5000, 3, Mark::Removed),
            (0x8000, 504, Mark::Waiting),
        ];
        assert_eq!(all, expected);
    }

    #[test]
    fn any_address_can_be_drawn() {
        for gpa in [0, u64::MAX, u64::MAX - 4095, 1 << 63] {
            let map =
                MemoryMap::new(None, vec![(gpa, 1, Mark::Waiting), (gpa, 262_144, Mark::Healed)]);
            assert!(map.rows.len() <= 17 && map.rows.iter().any(|row| !row.bad.is_empty()));
        }
        let outside = MemoryMap::new(blocks(&[(0, GIB)]), vec![(4 * GIB, 1, Mark::Waiting)]);
        assert_eq!(outside.stretches.len(), 1);
        let nothing = MemoryMap::new(None, Vec::new());
        assert!(nothing.rows.is_empty() && nothing.stretches.is_empty());
    }
}
