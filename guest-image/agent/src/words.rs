//! What requests and replies have in common: numbers, and words that are none.

use serde::{Serialize, Serializer};

/// An address or another number that JSON carries as `"0x…"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hex(pub u64);

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{:#x}", self.0))
    }
}

/// That `got` is not what was expected.
pub fn wrong(got: &str, expected: &str) -> String {
    let got: String = got.chars().take(32).collect();
    format!("got {got:?}, expected {expected}")
}

/// A number, decimal or after `0x`.
///
/// # Errors
/// It is none.
pub fn number(word: Option<&str>, usage: &str) -> Result<usize, String> {
    let word = word.unwrap_or("nothing");
    match word.strip_prefix("0x") {
        Some(hex) => usize::from_str_radix(hex, 16),
        None => word.parse(),
    }
    .map_err(|_| wrong(word, usage))
}

/// What `read` makes of a word, if there is one.
///
/// # Errors
/// Those of `read`.
pub fn optional<'w, T>(
    word: Option<&'w str>,
    read: impl FnOnce(&'w str) -> Result<T, String>,
) -> Result<Option<T>, String> {
    word.map(read).transpose()
}
