//! Tier 3 for longer than anybody wants to wait for `make test`: `make soak` runs it in the lab.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests say what they saw by panicking")]

mod burst;
mod channels;
mod disk;
mod memory;
mod soak;

use std::process::ExitCode;

use mce_relay_tests::guest::{has_debian, has_newest};
use mce_relay_tests::lab::may_poison;
use mce_relay_tests::suite;

fn with_newest_kernel() -> Result<(), String> {
    may_poison().and_then(|()| has_newest())
}

fn with_debian() -> Result<(), String> {
    may_poison().and_then(|()| has_debian())
}

fn main() -> ExitCode {
    suite::run(mce_relay_tests::tests![
        burst::amd needs may_poison,
        burst::intel_by_rendezvous needs may_poison,
        burst::intel_by_lmce needs may_poison,
        burst::amd_that_says_when_done needs may_poison,
        burst::intel_that_says_when_done needs may_poison,
        burst::amd_newest_kernel needs with_newest_kernel,
        burst::intel_newest_kernel needs with_newest_kernel,
        channels::records_amd needs may_poison,
        channels::records_intel needs may_poison,
        channels::records_newest_kernel needs with_newest_kernel,
        channels::machine_checks_amd needs may_poison,
        channels::machine_checks_intel needs may_poison,
        channels::machine_checks_newest_kernel needs with_newest_kernel,
        disk::buffers needs may_poison,
        disk::fio_in_debian needs with_debian,
        memory::shared needs may_poison,
        memory::prefaulted needs may_poison,
        memory::private_file needs may_poison,
        memory::hugetlb_shared needs may_poison,
        memory::hugetlbfs_file needs may_poison,
        memory::ten_reboots needs may_poison,
        memory::gigantic needs may_poison,
        soak::amd needs may_poison,
        soak::intel_by_rendezvous needs may_poison,
        soak::intel_by_lmce needs may_poison,
    ])
}
