//! MCi_STATUS and MCG_STATUS by the names of their bits.

use std::str::FromStr;

use mce_relay::Form;
use mce_relay::mca::{record, status};
use mce_relay_vmm::api::types::mca_bits::{MCG_STATUS, STATUS};
use mce_relay_vmm::number;

/// MCi_STATUS as a user writes it, and the MCG_STATUS that goes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusArg {
    /// MCi_STATUS.
    pub status: u64,
    /// MCG_STATUS, if the status was given by one of the names below; else 0.
    pub mcg_status: u64,
}

/// MCG_STATUS as a user writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct McgStatusArg(pub u64);

/// Names that stand for a whole MCi_STATUS with its MCG_STATUS.
const WHOLES: [&str; 5] = ["srao", "srar", "ucna", "deferred", "amd-ar"];

fn whole(name: &str) -> Option<StatusArg> {
    let form = match name {
        "srao" => Form::Srao,
        "srar" => Form::Srar,
        "deferred" => Form::Deferred,
        "amd-ar" => Form::AmdAr,
        "ucna" => {
            let srao = record(Form::Srao, 0, 0, false);
            return Some(StatusArg { status: srao.status & !status::S, mcg_status: 0 });
        }
        _ => return None,
    };
    let record = record(form, 0, 0, false);
    Some(StatusArg { status: record.status, mcg_status: record.mcg_status })
}

/// Names, and numbers among them, joined by `+`.
fn bits(text: &str, names: &[(&str, u64)]) -> Result<u64, String> {
    text.split('+').try_fold(0, |bits, term| {
        let named = names.iter().find(|(name, _)| name.eq_ignore_ascii_case(term));
        number::plain(term).or(named.map(|(_, bit)| *bit)).map(|more| bits | more).ok_or_else(
            || {
                let all: Vec<&str> = names.iter().map(|(name, _)| *name).collect();
                format!(
                    "{term:?} is no bit; expected a number, or of {} with + between",
                    all.join(", ")
                )
            },
        )
    })
}

impl FromStr for StatusArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(whole) = whole(&text.to_ascii_lowercase()) {
            return Ok(whole);
        }
        let status = bits(text, &STATUS)
            .map_err(|error| format!("{error}; or the whole of it: {}", WHOLES.join(", ")))?;
        Ok(Self { status, mcg_status: 0 })
    }
}

impl FromStr for McgStatusArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        bits(text, &MCG_STATUS).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use mce_relay::mca::mcg;

    use super::*;
    use mce_relay_vmm::api::types::mca_bits::{mcg_status_words, status_words};

    #[test]
    fn names_numbers_and_wholes() {
        let status = |text: &str| text.parse::<StatusArg>().map(|arg| arg.status);
        let srao = 0xBD00_0000_0000_00C0;
        assert_eq!(status("srao"), Ok(srao));
        assert_eq!(status("0xbd000000000000c0"), Ok(srao));
        assert_eq!(status("VAL+uc+EN+MISCV+ADDRV+S+0xc0"), Ok(srao));
        assert_eq!("SRAO".parse::<StatusArg>().unwrap().mcg_status, mcg::MCIP | mcg::RIPV);
        assert_eq!(status("ucna"), Ok(srao & !status::S));
        assert_eq!("MCIP+RIPV".parse(), Ok(McgStatusArg(5)));
        for name in WHOLES {
            status(name).unwrap();
        }
        for bad in ["", "VAL+", "VALID", "0xg", "VAL UC", "-1"] {
            let error = status(bad).unwrap_err();
            assert!(error.contains("expected a number") && error.contains("srao"), "{error}");
        }
        assert!("VAL".parse::<McgStatusArg>().unwrap_err().contains("MCIP"));
    }

    #[test]
    fn words_for_values() {
        assert_eq!(status_words(0xBD80_0000_0000_0134), "VAL UC EN MISCV ADDRV S AR MCACOD 0x134");
        assert_eq!(status_words(1 << 63 | 1 << 20), "VAL 0x100000 MCACOD 0x0");
        assert_eq!(mcg_status_words(7), "RIPV EIPV MCIP");
        assert_eq!(mcg_status_words(0), "0");
        assert_eq!(mcg_status_words(0x11), "RIPV 0x10");
    }
}
