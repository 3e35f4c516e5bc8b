//! Kinds of guest RAM that tests/scenarios leaves out, and reboot after reboot.

use std::collections::BTreeSet;
use std::time::Instant;

use mce_relay_tests::agent::{PATIENCE, Page, hex};
use mce_relay_tests::burst::settled;
use mce_relay_tests::guest::{Guest, Options};
use mce_relay_tests::lab;
use mce_relay_tests::memory::{HUGE, RAM, heals, options, touched, whole_again};

const GIB: u64 = 1 << 30;
/// How long a guest that is being told of a page of 1 GiB may take to answer, in seconds.
const SLOWEST: f64 = 10.0;

pub fn shared() {
    heals("size=256M,shared=on", 4096);
}

pub fn prefaulted() {
    heals("size=256M,prefault=on", 4096);
}

/// A private copy of a file: what the guest has written is anonymous memory.
pub fn private_file() {
    let path = "/tmp/mce-relay-ram";
    std::fs::File::create(path).unwrap().set_len(RAM).unwrap();
    heals("size=256M,file=/tmp/mce-relay-ram", 4096);
    std::fs::remove_file(path).unwrap();
}

pub fn hugetlb_shared() {
    lab::set_pool("2048kB", RAM / HUGE + 4);
    heals("size=256M,hugepages=on,hugepage_size=2M,shared=on", HUGE);
    lab::set_pool("2048kB", 0);
}

/// A file on a mount of hugetlbfs.
pub fn hugetlbfs_file() {
    lab::set_pool("2048kB", RAM / HUGE + 4);
    let path = "/dev/hugepages/mce-relay-ram";
    std::fs::File::create(path).unwrap().set_len(RAM).unwrap();
    heals("size=256M,file=/dev/hugepages/mce-relay-ram,shared=on", HUGE);
    std::fs::remove_file(path).unwrap();
    lab::set_pool("2048kB", 0);
}

/// Ten reboots, with new poison in each boot. Each comes up with whole memory, and the VMM neither grows
/// nor keeps anything open.
pub fn ten_reboots() {
    let mut guest = Guest::boot(&options("size=256M,thp=off"));
    let (mut sizes, mut used) = (Vec::new(), 0);
    for boot in 2..=11 {
        let pages = guest.agent.alloc_many("anon", 1024);
        let bad = [pages[900], pages[950], pages[1000]];
        guest.poison_many(&[bad[0].gpa, bad[1].gpa]);
        assert_eq!(guest.known(2).len(), 2);
        settled(&guest);
        touched(&mut guest, bad[2]);
        settled(&guest);
        let check = guest.agent.ask("check");
        assert_eq!(check["bad"].as_array().map(Vec::len), Some(0), "{check}");
        used += whole_again(&mut guest, boot, &bad.iter().map(|page| page.gpa).collect());
        let (files, rss) = (lab::open_files(guest.pid()), lab::outside(guest.pid(), RAM));
        println!("    boot {boot}: {rss} kB outside guest RAM, {files} open files");
        sizes.push((files, rss));
    }
    let past = guest.status()["past"].as_array().unwrap().len();
    assert_eq!(past, 30, "the ledger's history is whole");
    assert!(used > 0, "the guest came by none of them in ten boots");
    // The second boot is the first whose start was a reboot.
    let (files, rss) = sizes[0];
    for (boot, (now, size)) in (2..).zip(&sizes) {
        assert_eq!(*now, files, "open files in boot {boot}");
        assert!(*size < rss + 1024, "boot {boot} has {size} kB, boot 2 had {rss}");
    }
    guest.power_off();
}

/// A page of 1 GiB goes bad. It is memory that the guest has set aside (`memmap=`): a guest that has its
/// kernel's own data there would be lost, whoever told it what. All of its 262,144 pages enter the ledger,
/// the guest is told of them at its pace and goes on (it answers within ten seconds, in the lab's emulator),
/// and at the next boot there is another page of 1 GiB.
pub fn gigantic() {
    lab::set_pool("1048576kB", 2);
    let mut guest = Guest::boot(&Options {
        zones: &["size=256M", "size=1G,hugepages=on,hugepage_size=1G"],
        memory: "",
        cmdline: "memmap=1G$256M",
        ..options("")
    });
    let pages = guest.agent.alloc("anon", 8);
    let bad = Page { number: u64::MAX, gpa: RAM + 0x1234_5000 };
    let vm = guest.info();
    lab::write_memory(vm.pid, mce_relay_tests::guest::hva(&vm, bad.gpa), 1);
    let start = Instant::now();
    guest.poison(bad.gpa, "hwpoison-inject");
    let seen = guest.event("seen", bad);
    assert_eq!((&seen["extent"], &seen["pages"]), (&GIB.into(), &(GIB / 4096).into()), "{seen}");
    println!(
        "    {} pages in the ledger after {:.1} s",
        seen["pages"],
        start.elapsed().as_secs_f64()
    );
    // For half a minute of its telling, the guest goes on as before.
    let mut answers = Vec::new();
    while start.elapsed().as_secs() < 30 {
        let asked = Instant::now();
        guest.agent.ask("ping");
        answers.push(asked.elapsed().as_secs_f64());
        std::thread::sleep(std::time::Duration::from_millis(500));
    }
    let told = guest.events().iter().filter(|event| event["event"] == "acknowledged").count();
    let slowest = answers.iter().copied().fold(0.0, f64::max);
    println!(
        "    {told} pages acknowledged in 30 s; the agent's slowest answer took {slowest:.2} s"
    );
    assert!(told > 200, "{told} pages were told");
    assert!(slowest < SLOWEST, "an answer took {slowest:.2} s, {SLOWEST} s at most were expected");
    guest.agent.others_intact(&pages, &[]);

    guest.agent.tell("reboot");
    guest.event_where("booting", "the second boot", |boot| boot["boot"] == 2);
    guest.up_again();
    let start = Instant::now();
    let healed = loop {
        let events = guest.events();
        let healed = events.iter().filter(|event| event["event"] == "healed");
        let healed: BTreeSet<u64> = healed.map(|event| hex(&event["properties"]["gpa"])).collect();
        if healed.len() as u64 == GIB / 4096 || start.elapsed() > PATIENCE {
            break healed;
        }
        std::thread::sleep(std::time::Duration::from_secs(1));
    };
    assert_eq!(healed.len() as u64, GIB / 4096);
    assert!(healed.iter().all(|gpa| (RAM..RAM + GIB).contains(gpa)));
    for gpa in [RAM, bad.gpa, RAM + GIB - 4096] {
        let at = mce_relay_tests::guest::hva(&vm, gpa);
        lab::write_memory(vm.pid, at, 0xa5);
        assert_eq!(lab::read_memory(vm.pid, at).unwrap(), 0xa5);
    }
    guest.power_off();
    lab::set_pool("1048576kB", 0);
}
