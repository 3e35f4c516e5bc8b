//! Tables: with lines, colours and the terminal's width on a terminal, in plain columns elsewhere.
//!
//! On a terminal that is too narrow text wraps between words, never within one, as an address or a name in two parts
//! can neither be read nor copied. Where even that does not fit, neighbouring columns are folded into one, with one
//! value below the other; on a screen that has no room for one column in its frame there is no frame.

use std::fmt::{self};

use comfy_table::{ColumnConstraint, ContentArrangement, Table, TableStyle, Width, presets};
use console::measure_text_width;

use crate::output::screen::{self, Screen};

pub use comfy_table::Color;

/// Width that a column takes beside its text: padding and a line.
const FRAME: usize = 3;
/// A list without spaces may be broken at its commas from this length on.
const LONG_LIST: usize = 20;

/// One field of a table.
#[derive(Debug, Clone, Default)]
pub struct Cell {
    text: String,
    colour: Option<Color>,
    bold: bool,
}

impl Cell {
    /// A field with this text.
    pub fn new(text: impl fmt::Display) -> Self {
        Self { text: text.to_string(), ..Self::default() }
    }

    /// Sets its colour, where colours can be shown.
    #[must_use]
    pub fn fg(self, colour: Color) -> Self {
        Self { colour: Some(colour), ..self }
    }

    /// Makes it bold, where that can be shown.
    #[must_use]
    pub fn bold(self) -> Self {
        Self { bold: true, ..self }
    }

    /// The width of its longest line, and of its longest part that may not be broken.
    fn widths(&self) -> (usize, usize) {
        let longest = |parts: &mut dyn Iterator<Item = &str>| {
            parts.map(measure_text_width).max().unwrap_or_default()
        };
        (longest(&mut self.text.lines()), longest(&mut self.text.split_whitespace()))
    }

    /// Adds a field below it, and merges their colours.
    fn above(self, below: Self) -> Self {
        let text = match (self.text.is_empty(), below.text.is_empty()) {
            (true, _) => below.text,
            (_, true) => self.text,
            _ => format!("{}\n{}", self.text, below.text),
        };
        Self { text, colour: self.colour.or(below.colour), bold: self.bold || below.bold }
    }

    fn into_comfy(self) -> comfy_table::Cell {
        let mut cell = comfy_table::Cell::new_owned(self.text);
        if let Some(colour) = self.colour {
            cell = cell.fg(colour);
        }
        if self.bold { cell.add_attribute(comfy_table::Attribute::Bold) } else { cell }
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self { text, ..Self::default() }
    }
}

/// A table.
#[derive(Debug, Clone)]
pub struct Sheet {
    screen: Screen,
    columns: usize,
    /// The rows, of which the first is the header.
    rows: Vec<Vec<Cell>>,
}

impl Sheet {
    /// A table without rows, for a screen of this many `columns`.
    pub fn new(header: &[&str], screen: Screen, columns: u16) -> Self {
        let header = header.iter().map(Cell::new).collect();
        Self { screen, columns: usize::from(columns), rows: vec![header] }
    }

    /// Adds a row.
    pub fn add_row<C: Into<Cell>>(&mut self, cells: impl IntoIterator<Item = C>) {
        let mut row: Vec<Cell> = cells.into_iter().map(Into::into).collect();
        row.resize(self.rows[0].len(), Cell::default());
        self.rows.push(row);
    }

    /// Its lines.
    #[must_use]
    pub fn into_lines(self) -> Vec<String> {
        let Self { screen, columns, mut rows } = self;
        if !screen.terminal {
            return table(rows, presets::NOTHING, screen.colour).lines().collect();
        }
        let (full, condensed) = match screen.unicode {
            true => (presets::UTF8_FULL, presets::UTF8_FULL_CONDENSED),
            false => (presets::ASCII_FULL, presets::ASCII_FULL_CONDENSED),
        };
        let mut style = condensed;
        if room(&full_widths(&rows)) > columns {
            part_lists(&mut rows);
        }
        // If rows have several lines, a rule is drawn between them.
        while room(&hard_widths(&rows)) > columns && fold(&mut rows) {
            style = full;
        }
        if room(&hard_widths(&rows)) > columns {
            return unframed(rows, screen.colour, columns);
        }
        let widths = share(&full_widths(&rows), &hard_widths(&rows), columns);
        let mut table = table(rows, style, screen.colour);
        table.set_content_arrangement(ContentArrangement::Dynamic);
        table.set_width(u16::try_from(columns).unwrap_or(u16::MAX));
        table.set_constraints(widths.iter().map(|width| {
            let width = u16::try_from(width + FRAME - 1).unwrap_or(u16::MAX);
            ColumnConstraint::Absolute(Width::Fixed(width))
        }));
        thin(table.lines().collect())
    }
}

/// The rows, of one column, one below the other with an empty line between: a frame would be broken by the terminal.
fn unframed(rows: Vec<Vec<Cell>>, colour: bool, columns: usize) -> Vec<String> {
    // A word that is wider than the screen stays whole.
    let width = hard_widths(&rows).into_iter().max().unwrap_or_default().max(columns);
    let mut lines = Vec::new();
    for row in rows {
        let mut row = table(vec![row], presets::NOTHING, colour);
        row.set_content_arrangement(ContentArrangement::Dynamic);
        row.set_width(u16::try_from(width).unwrap_or(u16::MAX));
        row.column_iter_mut().for_each(|column| {
            column.set_padding((0, 0));
        });
        lines.extend(row.lines().map(|line| line.trim_end().to_owned()));
        lines.push(String::new());
    }
    lines.pop();
    lines
}

/// Removes the rules between rows of one line each, which need none.
fn thin(lines: Vec<String>) -> Vec<String> {
    let is_rule = |line: &String| ["├", "+-", "|-"].iter().any(|edge| line.starts_with(edge));
    let last = lines.len().saturating_sub(1);
    let tall = |lines: &mut dyn Iterator<Item = &String>| {
        lines.take_while(|line| !is_rule(line) && !line.starts_with(['╞', '└', '+'])).count() > 1
    };
    let keeps = |at: usize| {
        let (above, below) = (&mut lines[..at].iter().rev(), &mut lines[at + 1..].iter());
        at == 0 || at == last || !is_rule(&lines[at]) || tall(above) || tall(below)
    };
    let kept: Vec<bool> = (0..lines.len()).map(keeps).collect();
    lines.into_iter().zip(kept).filter_map(|(line, keeps)| keeps.then_some(line)).collect()
}

impl fmt::Display for Sheet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.clone().into_lines().join("\n"))
    }
}

pub(super) fn table(rows: Vec<Vec<Cell>>, style: TableStyle, colour: bool) -> Table {
    let mut table = Table::new();
    table.load_style(style);
    // Only `screen` asks the terminal.
    table.force_no_tty();
    if colour {
        table.enforce_styling();
    }
    let mut rows = rows.into_iter().map(|row| row.into_iter().map(Cell::into_comfy));
    if let Some(header) = rows.next() {
        table.set_header(header);
    }
    rows.for_each(|row| {
        table.add_row(row);
    });
    table
}

/// The width of a table with columns of these widths.
fn room(widths: &[usize]) -> usize {
    widths.iter().map(|width| width + FRAME).sum::<usize>() + 1
}

fn of_columns(rows: &[Vec<Cell>], width: impl Fn(&Cell) -> usize) -> Vec<usize> {
    let columns = rows.first().map_or(0, Vec::len);
    let widest = |column: usize| rows.iter().map(|row| width(&row[column])).max();
    (0..columns).map(|column| widest(column).unwrap_or_default()).collect()
}

/// The width of each column without any wrapping.
fn full_widths(rows: &[Vec<Cell>]) -> Vec<usize> {
    of_columns(rows, |cell| cell.widths().0)
}

/// The least width of each column at which nothing is broken that may not be.
fn hard_widths(rows: &[Vec<Cell>]) -> Vec<usize> {
    of_columns(rows, |cell| cell.widths().1)
}

/// Lets long lists wrap.
fn part_lists(rows: &mut [Vec<Cell>]) {
    for cell in rows.iter_mut().flatten() {
        if cell.widths().1 > LONG_LIST && cell.text.contains(',') {
            cell.text = cell.text.replace(", ", ",").replace(',', ", ");
        }
    }
}

/// Folds the two neighbouring columns that save most by it; false when there is only one column.
fn fold(rows: &mut [Vec<Cell>]) -> bool {
    let widths = hard_widths(rows);
    let saved = |left: &usize| widths[*left].min(widths[left + 1]);
    // The first of equals.
    let Some(left) = (0..widths.len().saturating_sub(1)).rev().max_by_key(saved) else {
        return false;
    };
    for row in rows {
        let below = row.remove(left + 1);
        row[left] = std::mem::take(&mut row[left]).above(below);
    }
    true
}

/// The width of each column: its least width, and a share of the rest, as much as it can use; columns that need more
/// divide what others leave.
fn share(full: &[usize], hard: &[usize], columns: usize) -> Vec<usize> {
    let mut widths = hard.to_vec();
    let mut left = columns.saturating_sub(room(hard));
    let mut wanting: Vec<usize> = (0..full.len()).collect();
    let need = |column: &usize| full[*column].saturating_sub(hard[*column]);
    wanting.sort_by_key(need);
    let count = wanting.len();
    for (served, column) in wanting.into_iter().enumerate() {
        let given = need(&column).min(left / (count - served));
        widths[column] += given;
        left -= given;
    }
    widths
}

/// An empty table for standard output.
pub fn sheet(header: &[&str]) -> Sheet {
    Sheet::new(header, screen::stdout(), screen::columns())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Screen = Screen { terminal: true, colour: false, moves: true, unicode: true };

    fn status(columns: u16, screen: Screen) -> Vec<String> {
        let header = ["GPA", "HVA", "kind", "found by", "signals", "seen", "outcome", "after seen"];
        let mut sheet = Sheet::new(&header, screen, columns);
        for _ in 0..2 {
            sheet.add_row([
                Cell::new("0x123456789000"),
                Cell::new("0x7fabab059000"),
                Cell::new("AO"),
                Cell::new("signal"),
                Cell::new(1),
                Cell::new("2026-11-25T08:15:30.790Z"),
                Cell::new("acknowledged: firmware-first record 1 taken").fg(Color::Green),
                Cell::new("injected +0.008 s, acknowledged +0.156 s"),
            ]);
        }
        sheet.into_lines()
    }

    fn whole(lines: &[String], words: &[&str]) {
        for word in words {
            assert!(lines.iter().any(|line| line.contains(word)), "{word}: {}", lines.join("\n"));
        }
    }

    #[test]
    fn nothing_is_broken_on_any_width() {
        let words =
            ["0x123456789000", "0x7fabab059000", "2026-11-25T08:15:30.790Z", "acknowledged:"];
        for columns in [40, 60, 80, 100, 120, 160, 200, 400] {
            let lines = status(columns, PLAIN);
            whole(&lines, &words);
            let widest = lines.iter().map(|line| measure_text_width(line)).max();
            assert!(widest <= Some(usize::from(columns)), "{columns}:\n{}", lines.join("\n"));
        }
        assert_eq!(status(400, PLAIN).len(), 6, "one line each");
    }

    #[test]
    fn a_word_as_wide_as_the_screen_has_no_frame() {
        let word = "events/ras/memory_failure_event_of_this_host";
        for screen in [PLAIN, Screen { colour: true, ..PLAIN }] {
            let mut sheet = Sheet::new(&["", "what"], screen, 45);
            sheet.add_row([Cell::new("missing").fg(Color::Red), Cell::new(word)]);
            sheet.add_row([
                Cell::new("ok"),
                Cell::new("debugfs, as root: mount -t debugfs none /sys/kernel/debug"),
            ]);
            let lines = sheet.into_lines();
            let text = lines.join("\n");
            assert!(lines.iter().all(|line| measure_text_width(line) <= 45), "{text}");
            assert!(
                text.contains(word) && text.contains("debugfs") && !text.contains('│'),
                "{text}"
            );
        }
    }

    #[test]
    fn rules_are_beside_tall_rows_only() {
        for unicode in [true, false] {
            let mut sheet = Sheet::new(&["", "a", "b"], Screen { unicode, ..PLAIN }, 40);
            for what in ["short", "short", "averylongwordthatfoldscolumns", "short", "short"] {
                sheet.add_row([Cell::default(), Cell::new(what), Cell::new("")]);
            }
            let long = || Cell::new("abcdefghijklmnopqrstuvwxyz");
            sheet.add_row([Cell::new("x"), long(), long()]);
            let lines = sheet.into_lines();
            let text = lines.join("\n");
            let shorts: Vec<usize> =
                (0..lines.len()).filter(|at| lines[*at].contains("short")).collect();
            assert_eq!(shorts.len(), 4, "{text}");
            assert_eq!(shorts[1] - shorts[0], 1, "{text}");
            let tall = lines.iter().position(|line| line.contains("xyz")).unwrap();
            assert!(lines[tall - 1].starts_with(['├', '|']), "{text}");
            assert!(!lines[tall - 1].contains("short"), "a rule above what is tall: {text}");
        }
    }

    #[test]
    fn a_screen_gets_what_it_can_show() {
        let text = |screen| status(80, screen).join("\n");
        assert!(!text(PLAIN).contains('\u{1b}') && text(PLAIN).contains('│'));
        assert!(text(Screen { colour: true, ..PLAIN }).contains('\u{1b}'));
        assert!(text(Screen { unicode: false, ..PLAIN }).is_ascii());
        let piped = text(Screen::NONE);
        assert!(piped.is_ascii() && !piped.contains('|') && piped.lines().count() == 3, "{piped}");
    }

    #[test]
    fn columns_get_their_due() {
        assert_eq!(share(&[7, 10, 100, 90], &[7, 5, 20, 20], 80), [7, 10, 25, 25]);
        assert_eq!(share(&[7, 10], &[7, 5], 80), [7, 10]);
        assert_eq!(share(&[50, 60], &[50, 60], 20), [50, 60]);
    }

    #[test]
    fn a_long_list_wraps_at_its_commas() {
        let mut sheet = Sheet::new(&["GPA", "flags"], PLAIN, 40);
        sheet.add_row([
            Cell::new("0x28f9000"),
            Cell::new("referenced,uptodate,dirty,anon,swapbacked,hwpoison,mappedtodisk"),
        ]);
        whole(&sheet.into_lines(), &["0x28f9000", "referenced,", "hwpoison,", "mappedtodisk"]);
    }
}
