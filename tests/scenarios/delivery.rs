//! Errors that come when the guest cannot take them, or twice: each waits for the right moment, is
//! told once, and does no harm.

use std::time::Duration;

use mce_relay_tests::agent::{Page, hex};
use mce_relay_tests::burst::{named_all, nothing_lost, same_pages, settled};
use mce_relay_tests::guest::{Guest, MIDDLE, Options, Vmm, hva};
use mce_relay_tests::lab;
use serde_json::Value;

/// Where in `events` the event `name` about the page at `gpa` is.
fn at(events: &[Value], name: &str, gpa: u64) -> Vec<usize> {
    let is = |event: &Value| {
        let of = event["properties"].get("gpa").filter(|gpa| gpa.is_string());
        event["event"] == name && of.is_some_and(|of| hex(of) == gpa)
    };
    (0..events.len()).filter(|index| is(&events[*index])).collect()
}

/// The one record that the guest was given for `page`.
fn told_once(guest: &Vmm, page: Page) -> Value {
    let events = guest.events();
    let told = at(&events, "injected", page.gpa);
    assert_eq!(told.len(), 1, "records for {:#x}: {events:#?}", page.gpa);
    events[told[0]]["properties"].clone()
}

/// Eight pages at once. While the guest is in its handler for one, the next waits; none is put over
/// another, and they come in the order in which they were found.
pub fn while_the_handler_runs() {
    let mut guest = Guest::boot(&Options::intel(2, false).quiet());
    let pages = guest.agent.alloc_many("anon", 8);
    guest.poison_many(&pages.iter().map(|page| page.gpa).collect::<Vec<_>>());
    let ledger = settled(&guest);
    let (named, account) = named_all(&mut guest, pages.len());
    same_pages(&pages, &named, &ledger);
    nothing_lost(&account);

    let events = guest.events();
    let order = |name| -> Vec<u64> {
        let of = events.iter().filter(|event| event["event"] == name);
        of.map(|event| hex(&event["properties"]["gpa"])).collect()
    };
    assert_eq!(order("injected"), order("seen"), "in the order in which they were found");
    let mut waited = 0;
    for pair in order("injected").windows(2) {
        let first = |name, gpa| at(&events, name, gpa)[0];
        let (before, after) = (first("acknowledged", pair[0]), first("injected", pair[1]));
        assert!(before < after, "{:#x} was told over {:#x}: {events:#?}", pair[1], pair[0]);
        // Waiting for a handler that runs, or for what it has not cleared yet.
        let waits = at(&events, "waiting", pair[1]).into_iter().filter(|index| {
            let reason = &events[*index]["properties"]["wait"]["reason"];
            *index < before && (reason == "mcip" || reason == "bank-valid")
        });
        waited += usize::from(waits.count() > 0);
    }
    println!("    {waited} of 8 pages came while the guest was in its handler, and waited");
    assert!(waited > 0, "no page met the guest in its handler: {events:#?}");
    guest.power_off();
}

/// Pages go bad in the first moment of the guest's boot, long before it has opened its handler. They
/// wait, the boot goes on, and the guest learns of them as soon as it can.
fn while_the_guest_boots(options: &Options) {
    let vmm = Vmm::start(options);
    let vm = vmm.info();
    let gpas: Vec<u64> = (0..4).map(|index| MIDDLE + index * (1 << 20)).collect();
    let pages: Vec<Page> = gpas.iter().map(|gpa| Page { number: u64::MAX, gpa: *gpa }).collect();
    for gpa in &gpas {
        lab::write_memory(vm.pid, hva(&vm, *gpa), 0x5a);
    }
    vmm.poison_many(&gpas);
    // A fast guest has opened its handler by now, and is about to wipe its banks.
    vmm.event_where("waiting", "CR4.MCE", |waits| {
        ["cr4-mce-clear", "just-opened"].iter().any(|reason| waits["wait"]["reason"] == **reason)
    });
    let early = vmm.known(pages.len());
    // The first one waits, the others wait for that one.
    let states: Vec<&Value> = early.iter().map(|page| &page["state"]).collect();
    assert_eq!(states, ["waiting", "seen", "seen", "seen"], "{early:#?}");

    let mut guest = vmm.up();
    guest.agent.ask("interval 1");
    let (named, account) = named_all(&mut guest, pages.len());
    same_pages(&pages, &named, &settled(&guest));
    nothing_lost(&account);
    let good = guest.agent.alloc("anon", 8);
    guest.agent.others_intact(&good, &[]);
    guest.power_off();
}

pub fn while_an_amd_guest_boots() {
    while_the_guest_boots(&Options::amd(2).quiet());
}

pub fn while_an_intel_guest_boots() {
    while_the_guest_boots(&Options::intel(2, false).quiet());
}

/// The guest was told, and touches the page all the same: that is between its kernel and its
/// process, and nothing is told again.
pub fn a_touch_after_the_ao() {
    let mut guest = Guest::boot(&Options::intel(2, true));
    let pages = guest.agent.alloc("anon", 8);
    let bad = pages[3];
    guest.poison(bad.gpa, "hwpoison-inject");
    guest.event("acknowledged", bad);
    guest.agent.sigbus_ao(bad);
    let reply = guest.agent.touch(bad, "read");
    assert_eq!(reply["sigbus"]["code"], "AR", "{reply}");
    assert_eq!(told_once(&guest, bad)["form"], "SRAO");
    guest.agent.others_intact(&pages, &[bad]);
    guest.power_off();
}

/// The guest touches a page whose AO has not come to its turn yet: the AR takes the AO's place.
pub fn a_touch_while_the_ao_waits() {
    // It polls every five minutes: its banks are soon full, and stay so.
    let mut guest = Guest::boot(&Options::amd(2).quiet());
    let pages = guest.agent.alloc_many("anon", 40);
    guest.poison_many(&pages.iter().map(|page| page.gpa).collect::<Vec<_>>());
    guest.known(pages.len());
    let waits = |guest: &Guest, page: &Page| {
        let state = guest.ledger(*page).expect("a page of the ledger")["state"].take();
        state == "waiting" || state == "seen"
    };
    let bad = *pages.iter().rev().find(|page| waits(&guest, page)).expect("a page that waits");

    let reply = guest.agent.touch(bad, "read");
    assert_eq!(reply["sigbus"]["code"], "AR", "{reply}");
    guest.event("acknowledged", bad);

    guest.agent.ask("interval 1");
    let ledger = settled(&guest);
    let (named, account) = named_all(&mut guest, pages.len());
    same_pages(&pages, &named, &ledger);
    nothing_lost(&account);
    assert_eq!(told_once(&guest, bad)["form"], "AMD-AR");
    guest.power_off();
}

/// A vCPU runs into the page before the relay's thread has come to take the AO: the guest is told by
/// the AR, and not again by the AO that comes after.
fn a_touch_before_the_ao(options: &Options, form: &str) {
    let mut guest = Guest::boot(options);
    let pages = guest.agent.alloc("anon", 8);
    let bad = pages[6];

    let held = lab::hold_thread(guest.pid(), "mce-relay-ao");
    guest.poison(bad.gpa, "hwpoison-inject");
    let reply = guest.agent.touch(bad, "write");
    assert_eq!(reply["sigbus"]["code"], "AR", "{reply}");
    assert!(at(&guest.events(), "again", bad.gpa).is_empty(), "the AO has not been taken yet");
    drop(held);

    assert_eq!(guest.event("again", bad)["kind"], "AO");
    guest.event("acknowledged", bad);
    // Whatever were to follow would be there by then: the relay looks again within a second.
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(told_once(&guest, bad)["form"], form);
    let ledger = guest.pages();
    assert_eq!(ledger.len(), 1, "{ledger:#?}");
    assert_eq!((&ledger[0]["state"], &ledger[0]["signals"]), (&"acknowledged".into(), &2.into()));
    guest.agent.others_intact(&pages, &[bad]);
    guest.power_off();
}

pub fn a_touch_before_the_ao_amd() {
    a_touch_before_the_ao(&Options::amd(2), "AMD-AR");
}

pub fn a_touch_before_the_ao_intel() {
    a_touch_before_the_ao(&Options::intel(2, true), "SRAR");
}

/// A page that the guest never wrote is clean for the host, whose kernel takes it away without a
/// signal to anybody. The relay finds it all the same, and the guest learns of it.
fn a_page_without_a_signal(options: &Options) {
    let mut guest = Guest::boot(&options.clone().quiet());
    guest.agent.ask("interval 1");
    let bad = guest.clean_page();
    guest.poison_many(&[bad.gpa]);
    assert_eq!(guest.event("seen", bad)["found_by"], "scan");
    let (named, account) = named_all(&mut guest, 1);
    let ledger = settled(&guest);
    same_pages(&[bad], &named, &ledger);
    nothing_lost(&account);
    assert_eq!((&ledger[0]["found_by"], &ledger[0]["signals"]), (&"scan".into(), &0.into()));
    assert!(guest.events().iter().all(|event| event["event"] != "caught"), "nobody was signalled");
    guest.power_off();
}

pub fn a_page_without_a_signal_amd() {
    a_page_without_a_signal(&Options::amd(2));
}

pub fn a_page_without_a_signal_intel() {
    a_page_without_a_signal(&Options::intel(2, false));
}
