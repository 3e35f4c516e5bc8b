//! A machine check by hand, and what would come of it. No I/O here.

pub mod bits;
pub mod outlook;

use mce_relay::mca::{self, BYSTANDER_BANKS, Record, status};
use serde::{Deserialize, Deserializer, Serialize};

pub use crate::inject::bits::{McgStatusArg, StatusArg, mcg_status_words, status_words};
pub use crate::inject::outlook::{Guest, Kvm, Outlook, outlook};

/// A machine check by hand. All values as KVM_X86_SET_MCE takes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The vCPU that is to get it.
    #[serde(deserialize_with = "small")]
    pub vcpu: u8,
    /// The bank.
    #[serde(deserialize_with = "small")]
    pub bank: u8,
    /// MCi_STATUS.
    #[serde(with = "mce_relay::event::hex")]
    pub status: u64,
    /// MCG_STATUS.
    #[serde(with = "mce_relay::event::hex")]
    pub mcg_status: u64,
    /// MCi_ADDR.
    #[serde(with = "mce_relay::event::hex")]
    pub addr: u64,
    /// MCi_MISC.
    #[serde(with = "mce_relay::event::hex")]
    pub misc: u64,
    /// Give the other vCPUs one without an error.
    #[serde(default)]
    pub broadcast: bool,
    /// Even if the guest may not survive it.
    #[serde(default)]
    pub force: bool,
    /// Only say what would come of it.
    #[serde(default)]
    pub dry_run: bool,
}

impl Request {
    /// The record that it is.
    #[must_use]
    pub fn record(&self) -> Record {
        let Self { bank, status, addr, misc, mcg_status, .. } = *self;
        Record { bank, status, addr, misc, mcg_status }
    }

    /// What does not depend on how the guest stands.
    ///
    /// # Errors
    /// Words for the user.
    pub fn check(&self, vcpus: usize, banks: u8) -> Result<(), String> {
        let Self { vcpu, bank, .. } = self;
        if usize::from(*vcpu) >= vcpus {
            return Err(format!("there is no vCPU {vcpu}; this guest has 0 to {}", vcpus - 1));
        }
        if *bank >= banks {
            return Err(format!("there is no bank {bank}; this guest has 0 to {}", banks - 1));
        }
        if self.status & status::VAL == 0 {
            return Err(format!(
                "MCi_STATUS {:#x} has no VAL, and KVM takes no record without it; add VAL",
                self.status
            ));
        }
        Ok(())
    }
}

/// A whole number of 0 to 255 in JSON, which has one kind of number: 9.0 is 9.
pub(crate) fn small<'de, D: Deserializer<'de>>(from: D) -> Result<u8, D::Error> {
    let number = f64::deserialize(from)?;
    let found = (0..=u8::MAX).find(|small| f64::from(*small) == number);
    let wrong = || format!("{number} is not a whole number of 0 to 255");
    found.ok_or_else(|| serde::de::Error::custom(wrong()))
}

/// What the other vCPUs are given when `request` is for all of them.
#[must_use]
pub fn bystander_record(request: &Request) -> Record {
    let other = BYSTANDER_BANKS.iter().find(|bank| **bank != request.bank);
    mca::bystander(*other.unwrap_or(&BYSTANDER_BANKS[0]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_refused_with_the_value() {
        let good = Request {
            vcpu: 1,
            bank: 9,
            status: status::VAL,
            mcg_status: 0,
            addr: 0,
            misc: 0,
            broadcast: false,
            force: false,
            dry_run: false,
        };
        good.check(2, 10).unwrap();
        for (bad, named) in [
            (Request { vcpu: 2, ..good }, "vCPU 2; this guest has 0 to 1"),
            (Request { bank: 10, ..good }, "bank 10; this guest has 0 to 9"),
            (Request { status: 0x5, ..good }, "0x5 has no VAL"),
        ] {
            let error = bad.check(2, 10).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
        assert_ne!(bystander_record(&Request { bank: 1, ..good }).bank, 1);
    }
}
