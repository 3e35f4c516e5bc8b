//! Values that several commands take.

use std::path::PathBuf;
use std::str::FromStr;

use crate::files::LogFile;
use crate::number;
use crate::poison::PageRange;

/// `path=PATH` or `PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiPath(pub PathBuf);

impl FromStr for ApiPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("path=").unwrap_or(text) {
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
        let text = text.strip_prefix("path=").unwrap_or(text);
        log_file(text, "path=PATH or path=PATH,max-size=SIZE").map(Self)
    }
}

/// `PATH` or `PATH,max-size=SIZE`; a path may have commas. `expected` is for the words of an error.
pub(super) fn log_file(text: &str, expected: &str) -> Result<LogFile, String> {
    const MAX_SIZE: &str = ",max-size=";
    let (path, max_size) = match text.rsplit_once(MAX_SIZE) {
        None => (text, None),
        Some((path, size)) => match parse_number(size)? {
            0 => return Err("max-size is 0; expected a size of 1 or more, as in 64M".to_owned()),
            size => (path, Some(size)),
        },
    };
    match path {
        "" => Err(format!("the path is empty; expected {expected}")),
        path => Ok(LogFile { path: path.into(), max_size }),
    }
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

/// A number of bytes or an address: `0x…` or decimal, with K, M, G or T for powers of 1024.
///
/// # Errors
/// Words for the user.
pub fn parse_number(text: &str) -> Result<u64, String> {
    number::with_unit(text)
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
    fn paths() {
        assert_eq!("path=/a".parse(), Ok(ApiPath("/a".into())));
        assert!("path=".parse::<ApiPath>().is_err());
    }

    #[test]
    fn files() {
        let file = |path: &str, max_size| Ok(LogPath(LogFile { path: path.into(), max_size }));
        assert_eq!("path=/a".parse(), file("/a", None));
        assert_eq!("/a,b".parse(), file("/a,b", None));
        assert_eq!("path=/a,max-size=64M".parse(), file("/a", Some(64 << 20)));
        for (bad, named) in [
            ("path=", "empty"),
            (",max-size=1", "empty"),
            ("/a,max-size=", "\"\" is not a number"),
            ("/a,max-size=0", "max-size is 0"),
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
