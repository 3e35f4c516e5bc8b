//! Pages that go bad faster than signals can tell: the kernel sends each as a SIGBUS, and standard
//! signals do not queue. The guest's kernel names every one of them all the same, and no other.

use mce_relay_tests::burst::bursts;
use mce_relay_tests::guest::Options;

const SIZES: &[usize] = &[8, 64];

pub fn amd() {
    bursts(Options::amd(2), SIZES);
}

/// The guest's console says when it is done with a page: the next ones are told then.
pub fn of_a_guest_that_says_when_it_is_done() {
    bursts(Options { virtio: true, says_when_done: true, ..Options::amd(2).ghes() }, &[8, 128]);
}

pub fn intel_by_rendezvous() {
    bursts(Options::intel(2, false), SIZES);
}

pub fn intel_by_lmce() {
    bursts(Options::intel(2, true), SIZES);
}
