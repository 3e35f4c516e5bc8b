//! The words of requests for a disk.

use std::ops::Range;
use std::time::Duration;

use super::block::BLOCK;
use crate::words::{number, optional, wrong};

/// Most bytes of one request, which is answered when all of it is done.
const MAX_BYTES: u64 = 1 << 30;
/// Most seconds of a load.
const MAX_SECONDS: usize = 86400;

/// A request for a disk, checked.
#[derive(Debug, PartialEq, Eq)]
pub enum Request {
    /// `disk-write`: write blocks.
    Write { path: String, range: Range<u64>, seed: u64, generation: u64 },
    /// `disk-verify`: read them and say which hold something else.
    Verify { path: String, range: Range<u64>, seed: u64, generation: u64 },
    /// `disk-load`: write and read blocks in any order for a while.
    Load { path: String, bytes: u64, seed: u64, time: Duration },
}

/// Reads what follows `verb`; `None` if that is none of a disk's.
///
/// # Errors
/// A text that names the word that was not understood and the form that was expected.
pub fn parse<'w>(
    verb: &str,
    words: &mut impl Iterator<Item = &'w str>,
) -> Option<Result<Request, String>> {
    match verb {
        "disk-write" => Some(transfer(
            words,
            "disk-write DEVICE OFFSET LEN SEED [GENERATION], OFFSET and LEN in bytes, of whole \
             blocks of 4096, LEN 4096 to 1 GiB",
            |path, range, seed, generation| Request::Write { path, range, seed, generation },
        )),
        "disk-verify" => Some(transfer(
            words,
            "disk-verify DEVICE OFFSET LEN SEED [GENERATION], OFFSET and LEN in bytes, of whole \
             blocks of 4096, LEN 4096 to 1 GiB",
            |path, range, seed, generation| Request::Verify { path, range, seed, generation },
        )),
        "disk-load" => Some(load(words)),
        _ => None,
    }
}

fn transfer<'w>(
    words: &mut impl Iterator<Item = &'w str>,
    usage: &str,
    make: impl FnOnce(String, Range<u64>, u64, u64) -> Request,
) -> Result<Request, String> {
    let path = device(words.next(), usage)?;
    let offset = blocks(words.next(), usage)?;
    let bytes = length(words.next(), usage)?;
    let end = offset.checked_add(bytes).ok_or_else(|| wrong(&offset.to_string(), usage))?;
    let seed = number(words.next(), usage)? as u64;
    let generation = optional(words.next(), |word| number(Some(word), usage))?;
    Ok(make(path, offset..end, seed, generation.unwrap_or(0) as u64))
}

fn load<'w>(words: &mut impl Iterator<Item = &'w str>) -> Result<Request, String> {
    let usage = "disk-load DEVICE LEN SEED SECONDS, LEN in bytes, of whole blocks of 4096, 4096 to \
                 1 GiB; SECONDS 1 to 86400";
    let path = device(words.next(), usage)?;
    let bytes = length(words.next(), usage)?;
    let seed = number(words.next(), usage)? as u64;
    match number(words.next(), usage)? {
        seconds @ 1..=MAX_SECONDS => {
            Ok(Request::Load { path, bytes, seed, time: Duration::from_secs(seconds as u64) })
        }
        seconds => Err(wrong(&seconds.to_string(), usage)),
    }
}

fn device(word: Option<&str>, usage: &str) -> Result<String, String> {
    word.map(str::to_owned).ok_or_else(|| wrong("nothing", usage))
}

fn blocks(word: Option<&str>, usage: &str) -> Result<u64, String> {
    let bytes = number(word, usage)? as u64;
    match bytes.is_multiple_of(BLOCK as u64) {
        true => Ok(bytes),
        false => Err(wrong(&bytes.to_string(), usage)),
    }
}

fn length(word: Option<&str>, usage: &str) -> Result<u64, String> {
    match blocks(word, usage)? {
        bytes @ 1..=MAX_BYTES => Ok(bytes),
        bytes => Err(wrong(&bytes.to_string(), usage)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Request, String> {
        let mut words = line.split(' ');
        parse(words.next().unwrap(), &mut words).unwrap()
    }

    #[test]
    fn requests_are_understood() {
        let path = || "/dev/vdb".to_owned();
        let table = [
            (
                "disk-write /dev/vdb 0x1000 8192 7",
                Request::Write { path: path(), range: 4096..12288, seed: 7, generation: 0 },
            ),
            (
                "disk-verify /dev/vdb 0 4096 7 3",
                Request::Verify { path: path(), range: 0..4096, seed: 7, generation: 3 },
            ),
            (
                "disk-load /dev/vdb 0x100000 1 60",
                Request::Load {
                    path: path(),
                    bytes: 1 << 20,
                    seed: 1,
                    time: Duration::from_secs(60),
                },
            ),
        ];
        for (line, request) in table {
            assert_eq!(parsed(line), Ok(request), "{line}");
        }
    }

    #[test]
    fn bad_requests_name_the_word_and_the_form() {
        for (line, got, expected) in [
            ("disk-write", "\"nothing\"", "DEVICE OFFSET LEN SEED"),
            ("disk-write /dev/vdb 1 4096 7", "\"1\"", "whole blocks"),
            ("disk-write /dev/vdb 0 0 7", "\"0\"", "4096 to 1 GiB"),
            ("disk-write /dev/vdb 0 0x40001000 7", "\"1073745920\"", "4096 to 1 GiB"),
            ("disk-write /dev/vdb 0xfffffffffffff000 4096 7", "\"18446744073709547520\"", "OFFSET"),
            ("disk-verify /dev/vdb 0 4096", "\"nothing\"", "SEED"),
            ("disk-load /dev/vdb 4096 1 0", "\"0\"", "1 to 86400"),
        ] {
            let error = parsed(line).unwrap_err();
            assert!(error.contains(got) && error.contains(expected), "{line}: {error}");
        }
    }
}
