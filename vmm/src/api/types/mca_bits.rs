//! MCi_STATUS and MCG_STATUS by the names of their bits.

use mce_relay::mca::{mcg, status};

/// MCi_STATUS.PCC: the processor's context is corrupt (SDM vol. 3B, 17.3.2.2).
pub(crate) const PCC: u64 = 1 << 57;
/// The error code in MCi_STATUS: MCACOD, bits 15:0.
pub(crate) const MCACOD: u64 = 0xffff;
/// The bits of MCi_STATUS.
pub const STATUS: [(&str, u64); 12] = [
    ("VAL", status::VAL),
    ("OVER", status::OVER),
    ("UC", status::UC),
    ("EN", status::EN),
    ("MISCV", status::MISCV),
    ("ADDRV", status::ADDRV),
    ("PCC", PCC),
    ("S", status::S),
    ("AR", status::AR),
    // AMD: the task's context is corrupt (APM vol. 2, 9.3.2.2).
    ("TCC", 1 << 55),
    ("DEFERRED", status::DEFERRED),
    ("POISON", status::POISON),
];
/// The bits of MCG_STATUS.
pub const MCG_STATUS: [(&str, u64); 4] =
    [("RIPV", mcg::RIPV), ("EIPV", mcg::EIPV), ("MCIP", mcg::MCIP), ("LMCES", mcg::LMCES)];

/// The names of the bits of MCi_STATUS that are set, and its error code.
#[must_use]
pub fn status_words(value: u64) -> String {
    // AMD's TCC is where Intel has AR; both read as AR.
    let names = STATUS.iter().filter(|(name, _)| *name != "TCC");
    let mut words = words(value & !MCACOD, names);
    words.push(format!("MCACOD {:#x}", value & MCACOD));
    words.join(" ")
}

/// The names of the bits of MCG_STATUS that are set.
#[must_use]
pub fn mcg_status_words(value: u64) -> String {
    match value {
        0 => "0".to_owned(),
        _ => words(value, MCG_STATUS.iter()).join(" "),
    }
}

pub(crate) fn words<'a>(
    value: u64,
    names: impl Iterator<Item = &'a (&'a str, u64)>,
) -> Vec<String> {
    let mut left = value;
    let mut words: Vec<String> = Vec::new();
    for (name, bit) in names {
        if value & bit != 0 {
            left &= !bit;
            words.push((*name).to_owned());
        }
    }
    if left != 0 {
        words.push(format!("{left:#x}"));
    }
    words
}
