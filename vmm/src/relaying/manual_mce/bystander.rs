//! The record for the other vCPUs of a broadcast.

use mce_relay::mca;
use mce_relay::mca::{BYSTANDER_BANKS, Record};

use crate::api::types::manual_mce::Request;

/// The record that the other vCPUs are given when `request` is a broadcast.
#[must_use]
pub fn bystander_record(request: &Request) -> Record {
    let other = BYSTANDER_BANKS.iter().find(|bank| **bank != request.bank);
    mca::bystander(*other.unwrap_or(&BYSTANDER_BANKS[0]))
}

#[cfg(test)]
mod tests {
    use mce_relay::mca::status;

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
