//! From the hardware down, with nothing forged on the way.

use mce_relay::Form;
use mce_relay::mca::record;
use mce_relay_tests::agent::hex;
use mce_relay_tests::guest::{Guest, Options};
use mce_relay_tests::lab;

/// An error in the emulated host's own machine-check bank, at the physical address of a guest's
/// page: the host's kernel finds it there, signals the VMM, and the guest's process is told.
pub fn from_the_bank_to_the_guests_process() {
    lab::poll_banks(1);
    let mut guest = Guest::boot(&Options::intel(2, true));
    let pages = guest.agent.alloc("anon", 8);
    let bad = pages[2];
    let vm = guest.status()["vm"].clone();
    let low = &vm["memory"][0];
    let hva = hex(&low["hva"]) + bad.gpa - hex(&low["gpa"]);
    let physical = lab::host_physical(guest.pid(), hva);

    // A deferred error, as an AMD memory controller logs it when it finds bad data by itself.
    let error = record(Form::Deferred, physical, 9, false);
    lab::hardware_error(error.bank, error.status, error.mcg_status, error.addr, error.misc);

    let seen = guest.event("seen", bad);
    assert_eq!(seen["kind"], "AO");
    println!("    guest: {}", guest.agent.memory_failure(bad));
    guest.agent.sigbus_ao(bad);
    guest.event("acknowledged", bad);
    guest.agent.others_intact(&pages, &[bad]);
    guest.power_off();
}

/// What is said of a guest that does not come up: the registers of the lab's processors.
pub fn where_the_processors_stand() {
    const TIMES: usize = 2;
    let processors = std::thread::available_parallelism().unwrap().get();
    let said = lab::processors(TIMES);
    println!("{said}");
    assert!(said.matches("RIP=").count() >= processors * TIMES, "of {processors}: {said}");
}
