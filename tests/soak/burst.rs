//! What the scenarios show with 64 pages, with 4,096: more than any queue on the way can hold.

use mce_relay_tests::burst::bursts;
use mce_relay_tests::guest::{NEWEST, Options};

const SIZES: &[usize] = &[512, 4096];

pub fn amd() {
    bursts(Options::amd(2), SIZES);
}

pub fn intel_by_rendezvous() {
    bursts(Options::intel(2, false), SIZES);
}

pub fn intel_by_lmce() {
    bursts(Options::intel(2, true), SIZES);
}

/// A guest whose console says when it is done with a page is told as fast as it goes.
fn as_fast_as_it_goes(options: Options) {
    bursts(Options { virtio: true, says_when_done: true, ..options }, SIZES);
}

pub fn amd_that_says_when_done() {
    as_fast_as_it_goes(Options::amd(2).ghes());
}

pub fn intel_that_says_when_done() {
    as_fast_as_it_goes(Options::intel(2, true));
}

/// The same in a guest with the newest kernel: its own queues are longer, its banks not the same.
fn newest(options: Options) {
    bursts(Options { image: NEWEST, ..options }, SIZES);
}

pub fn amd_newest_kernel() {
    newest(Options::amd(2));
}

pub fn intel_newest_kernel() {
    newest(Options::intel(2, false));
}
