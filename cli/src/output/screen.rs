//! What the terminals at standard output and standard error can show.
//!
//! Found out once, by [`look`] at the start of the process: later the threads of a running VM are under filters that do
//! not let them ask a terminal.

use std::sync::OnceLock;
use std::{env, io};

use anstream::stream::RawStream;
use anstream::{AutoStream, ColorChoice};
use console::Term;

/// Columns of a terminal that does not know its size (0x0, as serial consoles say), or of none.
const COLUMNS: u16 = 80;

/// What standard output or standard error can show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Screen {
    /// It is a terminal.
    pub terminal: bool,
    /// Colours are possible and wanted (`NO_COLOR`, `CLICOLOR`, `CLICOLOR_FORCE`, `TERM`).
    pub colour: bool,
    /// The cursor can be moved, so that text can be replaced.
    pub moves: bool,
    /// Characters beyond ASCII are displayed correctly.
    pub unicode: bool,
}

impl Screen {
    /// What output that goes to no terminal can show.
    pub const NONE: Self = Self { terminal: false, colour: false, moves: false, unicode: false };

    fn of<S: RawStream>(stream: &S) -> Self {
        let terminal = stream.is_terminal();
        let dumb = env::var_os("TERM").is_none_or(|term| term == "dumb");
        let choice = AutoStream::choice(stream);
        Self {
            terminal,
            // On a terminal without escape sequences colours stay off, whatever CI=true, say, would decide.
            colour: choice != ColorChoice::Never && !(terminal && dumb),
            moves: terminal && !dumb,
            unicode: is_utf8(&|name| env::var(name).ok()),
        }
    }
}

/// What standard output can show.
#[must_use]
pub fn stdout() -> Screen {
    static SCREEN: OnceLock<Screen> = OnceLock::new();
    *SCREEN.get_or_init(|| Screen::of(&io::stdout()))
}

/// What standard error can show.
#[must_use]
pub fn stderr() -> Screen {
    static SCREEN: OnceLock<Screen> = OnceLock::new();
    *SCREEN.get_or_init(|| Screen::of(&io::stderr()))
}

/// Finds out everything. Nothing in this module asks a terminal afterwards, except [`columns`].
pub fn look() {
    let _ = (stdout(), stderr());
}

/// The present width of standard output's terminal; not for the threads of a running VM.
#[must_use]
pub fn columns() -> u16 {
    Term::stdout().size_checked().map_or(COLUMNS, |(_, columns)| columns)
}

/// Whether text is UTF-8 in the locale that `variable` gives, as setlocale(3) would decide it.
fn is_utf8(variable: &dyn Fn(&str) -> Option<String>) -> bool {
    let names = ["LC_ALL", "LC_CTYPE", "LANG"];
    let locale = names.iter().find_map(|name| variable(name).filter(|value| !value.is_empty()));
    locale.is_some_and(|locale| {
        let locale = locale.to_ascii_lowercase();
        locale.contains("utf-8") || locale.contains("utf8")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_variable_that_is_set_decides_the_locale() {
        let utf8 = |given: &[(&str, &str)]| {
            is_utf8(&|name| {
                given.iter().find(|(one, _)| *one == name).map(|(_, value)| (*value).to_owned())
            })
        };
        assert!(!utf8(&[]));
        assert!(utf8(&[("LANG", "en_US.UTF-8")]));
        assert!(utf8(&[("LANG", "C.utf8"), ("LC_ALL", "")]));
        assert!(!utf8(&[("LANG", "en_US.UTF-8"), ("LC_ALL", "C")]));
        assert!(!utf8(&[("LANG", "en_US.UTF-8"), ("LC_CTYPE", "POSIX")]));
        assert!(!utf8(&[("LANG", "de_DE@euro")]));
    }
}
