//! A guest that writes anything into the registers, the rings and the memory of virtio-rng. The transport is every
//! device's.
#![no_main]

#[path = "../virtio.rs"]
mod virtio;

use libfuzzer_sys::fuzz_target;
use mce_relay_vmm::machine::devices::virtio::rng::Rng;
use virtio::{Machine, Step};

fuzz_target!(|steps: Vec<Step>| {
    let rng = Rng::open("/dev/urandom".as_ref()).unwrap();
    Machine::new(rng).run(steps, |_, _| {});
});
