//! `mce-relay pages --map`: an overview of all guest RAM.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use console::Style;
use mce_relay_vmm::api::types::vm::{Extent, Status, VmInfo};
use mce_relay_vmm::words::counted;
use serde::Serialize;

use crate::client::requests;
use crate::commands::mark::Mark;
use crate::commands::pages::PagesError;
use crate::output::print::{output, write_json};
use crate::output::screen;

const PAGE_SIZE: u64 = 4096;
/// Cells in a row.
const WIDTH: u64 = 64;
/// Approximate number of rows of all blocks together.
const ROWS: u64 = 32;
/// Columns of an address and what is behind it.
const ADDRESS: usize = 16;

impl Mark {
    /// Its character, distinct from the others also without colour.
    fn char(self) -> char {
        match self {
            Self::Empty => '.',
            Self::Whole => '#',
            Self::Healed => 'h',
            Self::Predicted => 'p',
            Self::Forged => 'f',
            Self::Acknowledged => 'a',
            Self::Injected => 'i',
            Self::Waiting => 'w',
            Self::Removed => '-',
            Self::Undeliverable => 'X',
        }
    }

    fn style(self) -> Style {
        let style = Style::new().force_styling(true);
        match self {
            Self::Empty | Self::Whole => style.dim(),
            Self::Healed => style.green().bold(),
            Self::Predicted | Self::Forged => style.cyan().bold(),
            Self::Acknowledged => style.magenta().bold(),
            Self::Injected => style.blue().bold(),
            Self::Waiting => style.yellow().bold(),
            Self::Removed | Self::Undeliverable => style.red().bold(),
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Empty => "no memory",
            Self::Whole => "in use",
            Self::Healed => "healed",
            Self::Predicted => "predicted to fail",
            Self::Forged => "FORGED and whole",
            Self::Acknowledged => "bad, and the guest knows",
            Self::Injected => "bad, and the guest is told",
            Self::Waiting => "bad, and waits to be told",
            Self::Removed => "removed",
            Self::Undeliverable => "bad, and cannot be told",
        }
    }
}

/// A stretch of guest RAM as one character.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Cell {
    /// Guest-physical address of its first byte.
    #[serde(with = "mce_relay::hex")]
    pub gpa: u64,
    /// Its length in bytes.
    pub len: u64,
    /// The worst state in it.
    pub mark: Mark,
    /// Pages in it that are bad now.
    pub bad: u64,
}

/// All of guest RAM.
#[derive(Debug, Serialize)]
pub struct Map {
    /// Bytes of a cell; the last of a block may be shorter.
    pub bytes_per_cell: u64,
    /// The cells of each block of RAM.
    pub blocks: Vec<Vec<Cell>>,
    /// How many pages have each mark that occurs.
    pub pages: BTreeMap<&'static str, u64>,
}

/// Maps all RAM of the VM behind `socket`. The VM itself says which of it has memory, so this needs no privileges.
///
/// # Errors
/// The VM does not answer.
pub fn map(socket: &Path) -> Result<Map, PagesError> {
    let extents: Vec<Extent> = requests::get(socket, "vm.extents?in_use=true")?;
    let status: Status = requests::get(socket, "relay.status")?;
    let marks = status
        .past
        .iter()
        // A forged page was whole, so nothing was healed.
        .filter(|page| !page.is_forged())
        .map(|page| (page.gpa, Mark::Healed))
        .chain(status.predicted.iter().map(|page| (page.gpa, Mark::Predicted)))
        .chain(status.pages.iter().map(|page| (page.gpa, Mark::of(page.state, page.is_forged()))));
    Ok(Map::new(&status.vm, &extents, marks))
}

impl Map {
    fn new(vm: &VmInfo, extents: &[Extent], marks: impl Iterator<Item = (u64, Mark)>) -> Self {
        let total: u64 = vm.memory.iter().map(|block| block.len).sum();
        let bytes_per_cell = total.div_ceil(WIDTH * ROWS).next_power_of_two().max(PAGE_SIZE);
        let mut blocks: Vec<Vec<Cell>> = vm
            .memory
            .iter()
            .map(|block| {
                let starts = (0..block.len.div_ceil(bytes_per_cell)).map(|n| n * bytes_per_cell);
                let cell = |at| Cell {
                    gpa: block.gpa + at,
                    len: bytes_per_cell.min(block.len - at),
                    mark: Mark::Empty,
                    bad: 0,
                };
                starts.map(cell).collect()
            })
            .collect();
        // Cells are found by index, so that a large guest with many bad pages takes no longer.
        let mut raise = |gpa: u64, mark: Mark, bad: u64| {
            let found = vm.memory.iter().position(|b| gpa >= b.gpa && gpa - b.gpa < b.len);
            let cell = found.and_then(|block| {
                let at = (gpa - vm.memory[block].gpa) / bytes_per_cell;
                blocks[block].get_mut(usize::try_from(at).ok()?)
            });
            if let Some(cell) = cell {
                cell.mark = cell.mark.max(mark);
                cell.bad += bad;
            }
        };
        for Extent { gpa, len } in extents {
            let mut at = *gpa;
            while at < gpa + len {
                raise(at, Mark::Whole, 0);
                // Skip to the start of the next cell of the same block.
                let start = vm.block(at).map_or(at, |block| block.gpa);
                at = start + ((at - start) / bytes_per_cell + 1) * bytes_per_cell;
            }
        }
        let mut pages = BTreeMap::new();
        for (gpa, mark) in marks {
            *pages.entry(mark.words()).or_default() += 1;
            raise(gpa, mark, u64::from(mark >= Mark::Acknowledged));
        }
        Self { bytes_per_cell, blocks, pages }
    }

    /// Draws it for a screen of so many `columns`.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write(&self, out: &mut dyn Write, colour: bool, columns: usize) -> io::Result<()> {
        // Half as many beside each address, or a quarter, where a terminal would break the line.
        let mut width = usize::try_from(WIDTH).unwrap_or(1);
        while width > 8 && ADDRESS + width > columns {
            width /= 2;
        }
        let show = |mark: Mark| match colour {
            true => mark.style().apply_to(mark.char()).to_string(),
            false => mark.char().to_string(),
        };
        let mut end = 0;
        for block in &self.blocks {
            let Some(first) = block.first() else { continue };
            if first.gpa > end {
                writeln!(out, "{:>14}  no RAM for {} KiB", "", (first.gpa - end) >> 10)?;
            }
            for row in block.chunks(width) {
                let cells: String = row.iter().map(|cell| show(cell.mark)).collect();
                writeln!(out, "{:>#14x}  {cells}", row[0].gpa)?;
            }
            end = block.last().map_or(end, |last| last.gpa + last.len);
        }
        writeln!(
            out,
            "each character is {} KiB and shows the worst in it:",
            self.bytes_per_cell >> 10
        )?;
        for mark in Mark::ALL {
            let count = match self.pages.get(mark.words()) {
                Some(count) => format!(": {}", counted(*count, "page")),
                None if mark > Mark::Whole => continue,
                None => String::new(),
            };
            writeln!(out, "  {}  {}{count}", show(mark), mark.words())?;
        }
        Ok(())
    }
}

/// Prints a map of guest RAM.
pub fn print_map(map: &Map, json: bool) -> ExitCode {
    let screen = screen::stdout();
    let columns = if screen.terminal { usize::from(screen::columns()) } else { usize::MAX };
    output(|out| if json { write_json(out, map) } else { map.write(out, screen.colour, columns) })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::testing::an_info;
    use mce_relay_vmm::api::types::vm::MemoryBlock;

    fn vm(blocks: &[(u64, u64)]) -> VmInfo {
        let block = |&(gpa, len): &(u64, u64)| MemoryBlock {
            gpa,
            len,
            hva: 0x7000_0000 + gpa,
            fd: None,
            fd_offset: 0,
            shared: false,
            page_size: 4096,
        };
        VmInfo { memory: blocks.iter().map(block).collect(), ..an_info() }
    }

    #[test]
    fn every_mark_has_a_character_of_its_own() {
        let chars: HashSet<char> = Mark::ALL.map(Mark::char).into();
        assert_eq!(chars.len(), Mark::ALL.len());
        assert!(Mark::ALL.is_sorted(), "from harmless to worst");
    }

    #[test]
    fn a_cell_shows_the_worst_in_it() {
        let vm = vm(&[(0, 64 << 20), (4 << 30, 64 << 20)]);
        let extents =
            [Extent { gpa: 0, len: 128 << 10 }, Extent { gpa: (4 << 30) + 4096, len: 4096 }];
        let marks = [
            (0x1000, Mark::Acknowledged),
            (0x2000, Mark::Waiting),
            (0x3000, Mark::Healed),
            (4 << 30, Mark::Predicted),
            ((4 << 30) + 0x1000, Mark::Forged),
        ];
        let map = Map::new(&vm, &extents, marks.into_iter());
        assert_eq!(map.bytes_per_cell, 64 << 10);
        let row: Vec<(Mark, u64)> =
            map.blocks[0][..3].iter().map(|cell| (cell.mark, cell.bad)).collect();
        assert_eq!(row, [(Mark::Waiting, 2), (Mark::Whole, 0), (Mark::Empty, 0)]);
        let cell = &map.blocks[1][0];
        assert_eq!((cell.mark, cell.bad), (Mark::Forged, 0), "whole");

        let mut text = Vec::new();
        map.write(&mut text, false, 80).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(
            text.starts_with("           0x0  w#....") && text.contains("no RAM for"),
            "{text}"
        );
        assert!(text.contains("w  bad, and waits to be told: 1 page"), "{text}");
        assert!(text.contains("f  FORGED and whole: 1 page"), "{text}");
        assert!(!text.contains('\u{1b}'));
        let mut text = Vec::new();
        map.write(&mut text, true, 80).unwrap();
        assert!(text.contains(&0x1b));
    }

    #[test]
    fn a_large_guest_fits() {
        for gib in [1_u64, 3, 256, 6000] {
            let vm = vm(&[(0, 3 << 30), (4 << 30, gib << 30)]);
            let all = [Extent { gpa: 0, len: 3 << 30 }, Extent { gpa: 4 << 30, len: gib << 30 }];
            let map = Map::new(&vm, &all, std::iter::empty());
            let mut text = Vec::new();
            map.write(&mut text, false, 80).unwrap();
            let lines = text.split(|byte| *byte == b'\n').count();
            assert!(lines < 50, "{gib} GiB: {lines} lines");
            assert!(map.blocks.iter().flatten().all(|cell| cell.mark == Mark::Whole));
        }
    }
}
