//! The lines that were read, as many as fit on a page.

use std::collections::VecDeque;

/// The most bytes that are kept: a page has them twice.
pub const MOST: usize = 1 << 20;

/// The last lines that were read.
#[derive(Debug, Default)]
pub struct Raw {
    lines: VecDeque<String>,
    bytes: usize,
    /// How many earlier lines were left out.
    pub left_out: u64,
}

impl Raw {
    /// Adds a line, and drops the first ones when there are too many.
    pub fn push(&mut self, line: &str) {
        if line.trim().is_empty() {
            return;
        }
        self.bytes += line.len();
        self.lines.push_back(line.to_owned());
        while self.bytes > MOST {
            let Some(first) = self.lines.pop_front() else { break };
            self.bytes -= first.len();
            self.left_out += 1;
        }
    }

    /// The lines that are kept.
    pub fn lines(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().map(String::as_str)
    }

    /// How many they are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lines.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_kept() {
        let mut raw = Raw::default();
        let line = "x".repeat(1000);
        for _ in 0..2000 {
            raw.push(&line);
        }
        raw.push(" ");
        raw.push("last");
        assert_eq!(raw.lines().last(), Some("last"));
        assert_eq!((raw.len() as u64 + raw.left_out, raw.left_out), (2001, 952));
        raw.push(&"y".repeat(MOST + 1));
        assert!(raw.is_empty(), "one that does not fit at all");
    }
}
