//! Values that several commands take.

use std::path::PathBuf;
use std::str::FromStr;

use mce_relay_vmm::number;
use mce_relay_vmm::outlets::files::LogFile;

use super::parts::{Part, parts};
use crate::poison::target::PageRange;

/// `path=PATH`, or `PATH`, which is taken as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiPath(pub PathBuf);

impl FromStr for ApiPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.starts_with("path=").then(|| parts(text)).transpose()?;
        let path = match parts.as_deref() {
            None => text,
            Some([path]) => path.value(),
            Some([.., more]) => return Err(more.not_understood("path=PATH")),
            Some([]) => "",
        };
        match path {
            "" => Err("the path is empty; expected path=PATH".to_owned()),
            path => Ok(Self(path.into())),
        }
    }
}

/// `path=PATH` or `PATH`, and `,max-size=SIZE` behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogPath(pub LogFile);

impl FromStr for LogPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let whole = match text.starts_with("path=") {
            true => text.to_owned(),
            false => format!("path={text}"),
        };
        log_file(&parts(&whole)?, "path=PATH or path=PATH,max-size=SIZE").map(Self)
    }
}

/// The value of the first part as a path, and `max-size=SIZE` behind it. `expected` completes the text of an error.
pub(super) fn log_file(parts: &[Part], expected: &str) -> Result<LogFile, String> {
    let path = parts.first().map_or("", Part::value);
    if path.is_empty() {
        return Err(format!("the path is empty; expected {expected}"));
    }
    let mut file = LogFile::from(path);
    for part in &parts[1..] {
        if part.key() != "max-size" {
            return Err(part.not_understood(expected));
        }
        file.max_size = match parse_number(part.value())? {
            0 => return Err("max-size is 0; expected a size of 1 or more, as in 64M".to_owned()),
            size => Some(size),
        };
    }
    Ok(file)
}

impl FromStr for PageRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((start, end)) = text.split_once("..") else {
            return parse_number(text).map(Self::page);
        };
        let number =
            |text| parse_number(text).map_err(|error| format!("{error}, as in 0x3000..0x8000"));
        let (start, end) = (number(start)?, number(end)?);
        Self::new(start, end).ok_or_else(|| match start == end {
            true => format!("{text} is empty: the end of a range is not part of it"),
            false => format!("{text} ends before it starts"),
        })
    }
}

/// A plain number within `range`: `0x…` or decimal.
fn number_in(text: &str, range: std::ops::RangeInclusive<u64>, what: &str) -> Result<u64, String> {
    number::plain(text).filter(|number| range.contains(number)).ok_or_else(|| {
        let (first, last) = (range.start(), range.end());
        match *last {
            u64::MAX => format!("{text:?} is no {what}; expected a whole number from {first} on"),
            _ => format!("{text:?} is no {what}; expected a whole number from {first} to {last}"),
        }
    })
}

/// How many pages: 1 or more.
pub(super) fn parse_count(text: &str) -> Result<u64, String> {
    number_in(text, 1..=u64::MAX, "number of pages")
}

/// The seed of random pages.
pub(super) fn parse_seed(text: &str) -> Result<u64, String> {
    number_in(text, 0..=u64::MAX, "seed")
}

/// Whole seconds.
pub(super) fn parse_seconds(text: &str) -> Result<u32, String> {
    let seconds = number_in(text, 0..=u32::MAX.into(), "number of seconds")?;
    u32::try_from(seconds).map_err(|error| error.to_string())
}

/// Page frame numbers of the host, first and last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frames {
    first: u64,
    last: u64,
}

impl Frames {
    /// Each of them.
    pub fn numbers(self) -> impl Iterator<Item = u64> {
        self.first..=self.last
    }
}

impl FromStr for Frames {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| {
            number::plain(text).ok_or_else(|| {
                format!("{text:?} is no page frame number; expected e.g. 0x10d205, or 0x3000..0x3010 for a range")
            })
        };
        let Some((first, end)) = text.split_once("..") else {
            return number(text).map(|first| Self { first, last: first });
        };
        let (first, end) = (number(first)?, number(end)?);
        match end.checked_sub(1) {
            Some(last) if first <= last => Ok(Self { first, last }),
            _ => Err(format!("{text} is empty: the end of a range is not part of it")),
        }
    }
}

/// A number of bytes or an address: `0x…` or decimal, with K, M, G or T for powers of 1024.
///
/// # Errors
/// A sentence for the user.
pub fn parse_number(text: &str) -> Result<u64, String> {
    number::with_unit(text)
}

/// The value of a key that is a switch.
pub fn on_or_off(key: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{key} is {value:?}; expected on or off")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(parse_number("512M"), Ok(512 << 20));
        assert_eq!(parse_number("0x1000"), Ok(4096));
        assert_eq!(parse_number("4g"), Ok(4 << 30));
        for bad in ["", "M", "0x", "-1", "1.5G", "99999999T", "0xg", "é", "+1", "0x+1"] {
            assert!(parse_number(bad).unwrap_err().contains(bad), "{bad}");
        }
    }

    #[test]
    fn plain_numbers_and_what_is_none() {
        assert_eq!(
            (parse_count("3"), parse_seed("0x7"), parse_seconds("0")),
            (Ok(3), Ok(7), Ok(0))
        );
        for (bad, words) in [
            (parse_count("0"), "\"0\" is no number of pages; expected a whole number from 1 on"),
            (
                parse_count("1.5"),
                "\"1.5\" is no number of pages; expected a whole number from 1 on",
            ),
            (parse_seed("x"), "\"x\" is no seed; expected a whole number from 0 on"),
        ] {
            assert_eq!(bad, Err(words.to_owned()));
        }
        assert!(parse_seconds("1.5").unwrap_err().contains("from 0 to 4294967295"));
    }

    #[test]
    fn page_frames() {
        let all = |text: &str| text.parse::<Frames>().map(|frames| frames.numbers().collect());
        assert_eq!(all("0x10"), Ok(vec![16]));
        assert_eq!(all("0x1..3"), Ok(vec![1, 2]));
        for bad in ["4K", "0x3..0x3", "0x3..0x1", "..", "x"] {
            let error = all(bad).unwrap_err();
            assert!(error.contains("page frame number") || error.contains("is empty"), "{error}");
        }
    }

    #[test]
    fn paths() {
        assert_eq!("path=/a".parse(), Ok(ApiPath("/a".into())));
        assert_eq!("/a,b".parse(), Ok(ApiPath("/a,b".into())), "as it is");
        assert_eq!("path=/a,,b".parse(), Ok(ApiPath("/a,b".into())));
        for (bad, named) in [
            ("", "the path is empty"),
            ("path=", "the path is empty"),
            ("path=/a,b", "\"b\" is not understood; expected path=PATH; a comma"),
            ("path=/a,path=/b", "path is given twice"),
        ] {
            let error = bad.parse::<ApiPath>().unwrap_err();
            assert!(error.contains(named), "{bad}: {error}");
        }
    }

    #[test]
    fn files() {
        let file = |path: &str, max_size| Ok(LogPath(LogFile { path: path.into(), max_size }));
        assert_eq!("path=/a".parse(), file("/a", None));
        assert_eq!("/a,,b".parse(), file("/a,b", None));
        assert_eq!("path=/a,max-size=64M".parse(), file("/a", Some(64 << 20)));
        for (bad, named) in [
            ("path=", "empty"),
            (",max-size=1", "empty"),
            ("/a,max-size=", "\"\" is not a number"),
            ("/a,max-size=0", "max-size is 0"),
            ("/a,b", "\"b\" is not understood; expected path=PATH or"),
            ("path=/a,path=/b", "path is given twice"),
            ("path=/a,max-size=1,max-size=2", "max-size is given twice"),
        ] {
            let error = bad.parse::<LogPath>().unwrap_err();
            assert!(error.contains(named), "{bad}: {error}");
        }
    }

    #[test]
    fn pages_and_ranges() {
        assert_eq!("0x1000".parse(), Ok(PageRange::page(0x1000)));
        assert_eq!("0x3000..0x8000".parse(), Ok(PageRange::new(0x3000, 0x8000).unwrap()));
        assert_eq!("16M..17M".parse(), Ok(PageRange::new(16 << 20, 17 << 20).unwrap()));
        for (bad, named) in [
            ("", "\"\""),
            ("0x3000..", "\"\""),
            ("..0x3000", "\"\""),
            ("0x3000...0x8000", ".0x8000"),
            ("0x3000-0x8000", "0x3000-0x8000"),
            ("0x8000..0x3000", "0x8000..0x3000 ends before it starts"),
            ("0x3000..0x3000", "0x3000..0x3000 is empty"),
        ] {
            let error = bad.parse::<PageRange>().unwrap_err();
            assert!(error.contains(named), "{bad}: {error}");
        }
    }
}
