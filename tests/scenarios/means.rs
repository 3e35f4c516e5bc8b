//! Every way in which software makes a page go bad, and what it gives: an AO, an AR at the touch, or
//! nothing at all.

use std::os::unix::fs::MetadataExt;
use std::process::Output;
use std::time::Duration;

use mce_relay_tests::agent::{Page, hex};
use mce_relay_tests::guest::{Guest, Options, hva, mce_relay};
use mce_relay_tests::lab::{self, Cgroup};
use serde_json::Value;

/// madvise(MADV_HWPOISON) by another process that shares the page. The kernel takes that process
/// for one that touched it (AR); the VMM is one of those who have it mapped (AO).
pub fn madvise() {
    let mut guest = Guest::boot(&Options::intel(1, true));
    let pages = guest.agent.alloc("anon", 8);
    let bad = pages[4];

    guest.poison(bad.gpa, "madvise");
    assert_eq!(guest.event("seen", bad)["kind"], "AO");
    println!("    guest: {}", guest.agent.memory_failure(bad));
    guest.agent.sigbus_ao(bad);
    guest.event("acknowledged", bad);
    guest.agent.others_intact(&pages, &[bad]);
    guest.power_off();
}

/// With late kill nobody is told of a page that nobody touches; the touch is an AR.
pub fn late_kill_says_nothing_until_a_touch() {
    let mut guest = Guest::boot(&Options::amd(2).late());
    let pages = guest.agent.alloc("anon", 8);
    let bad = pages[6];

    guest.poison(bad.gpa, "hwpoison-inject");
    // An AO is there within milliseconds of the injector's return, where one is sent.
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(guest.status()["vm"]["mce_kill"], "late");
    assert!(guest.ledger(bad).is_none(), "{}", guest.status());

    let reply = guest.agent.touch(bad, "read");
    assert_eq!(reply["sigbus"]["code"], "AR", "{reply}");
    assert_eq!(guest.event("seen", bad)["kind"], "AR");
    guest.event("acknowledged", bad);
    guest.agent.others_intact(&pages, &[bad]);
    guest.power_off();
}

/// The memory is the VMM's alone, so it is the VMM that calls madvise. The kernel sends it an AR, as if
/// it had touched the page; nobody in the guest has, and the guest is told of an AO.
pub fn madvise_by_the_vmm() {
    let options = Options { memory: "size=256M", ..Options::amd(2).ghes() };
    let mut guest = Guest::boot(&options);
    let pages = guest.agent.alloc("anon", 8);
    let bad = pages[4];

    guest.poison(bad.gpa, "madvise");
    let hva = hva(&guest.info(), bad.gpa);
    let caught = guest.event_where("caught", "the page", |caught| hex(&caught["hva"]) == hva);
    assert_eq!((&caught["kind"], &caught["thread"]), (&"AR".into(), &"caller".into()), "{caught}");
    assert_eq!(guest.event("seen", bad)["kind"], "AO");
    println!("    guest: {}", guest.agent.memory_failure(bad));
    guest.agent.sigbus_ao(bad);
    guest.event("acknowledged", bad);

    // The same way for a page that only moves.
    moves(&mut guest, pages[1]);
    guest.agent.others_intact(&pages, &[bad]);
    guest.power_off();
}

/// Takes the frame behind `page` out of use: the guest notices nothing, and the ledger neither.
fn moves(guest: &mut Guest, page: Page) {
    let before = guest.agent.ask("meminfo")["hardware_corrupted_kb"].clone();
    let done = guest.poison(page.gpa, "soft-offline");
    let hva = hva(&guest.info(), page.gpa);
    let touched = guest.agent.touch(page, "read");
    assert_eq!(touched["result"], "ok", "{touched}");
    let now = lab::host_physical(guest.pid(), hva) >> 12;
    assert_ne!(now, hex(&done["pfn"]), "{done}");
    assert!(done["moved_to"].is_null() || hex(&done["moved_to"]) == now, "{done}");
    assert!(guest.ledger(page).is_none(), "{}", guest.status());
    assert_eq!(guest.agent.ask("meminfo")["hardware_corrupted_kb"], before);
}

/// What needs no privileges: a page that the kernel takes for bad for the VMM alone, which is an AR when
/// the guest touches it, and a forged signal, which is labelled wherever it shows. Beside them a page that
/// moves.
pub fn uffd_and_signal() {
    let mut guest = Guest::boot(&Options::amd(2).ghes());
    let pages = guest.agent.alloc("anon", 8);
    let (touched, forged) = (pages[2], pages[5]);

    guest.poison(touched.gpa, "uffd");
    std::thread::sleep(Duration::from_secs(1));
    assert!(guest.ledger(touched).is_none(), "nobody was told: {}", guest.status());
    let reply = guest.agent.touch(touched, "read");
    assert_eq!(reply["sigbus"]["code"], "AR", "{reply}");
    println!("    guest: {}", guest.agent.memory_failure(touched));
    guest.event("acknowledged", touched);
    let entry = guest.ledger(touched).unwrap();
    assert_eq!((&entry["kind"], &entry["found_by"]), (&"AR".into(), &"signal".into()));

    let done = guest.poison(forged.gpa, "signal");
    assert_eq!(done["forged"], true, "{done}");
    println!("    guest: {}", guest.agent.memory_failure(forged));
    guest.agent.sigbus_ao(forged);
    guest.event("acknowledged", forged);
    let hva = hva(&guest.info(), forged.gpa);
    let caught = guest.event_where("caught", "the page", |caught| hex(&caught["hva"]) == hva);
    assert_eq!((&caught["kind"], &caught["forged"]), (&"AO".into(), &true.into()), "{caught}");
    assert_eq!(guest.ledger(forged).unwrap()["found_by"], "forged");
    let pfn = lab::host_physical(guest.pid(), hva) >> 12;
    assert!(!mce_relay_vmm::host::is_poisoned(pfn).unwrap(), "the page is whole");

    moves(&mut guest, pages[7]);
    guest.agent.others_intact(&pages, &[touched, forged]);
    guest.power_off();
}

/// Pages of one of the guest's processes, which the guest's own agent names.
pub fn a_process_of_the_guest() {
    let mut guest = Guest::boot(&Options::amd(2).ghes());
    let agent = format!("path={}", guest.path("agent").display());
    let pages = guest.agent.alloc("anon", 8);
    // The agent's socket takes one client at a time.
    let init = guest.agent.ask("process 1 16");
    assert_eq!(init["pid"], 1, "{init}");
    guest.agent.hang_up();
    let more = ["--pid", "1", "--agent", &agent, "--max", "1", "--dry-run"];
    let more = [&more[..], &["--via", "uffd", "--json"]].concat();
    let out = guest.command("poison", &more);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let planned: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(planned["dry_run"], true, "{planned}");
    guest.reconnect();
    guest.agent.others_intact(&pages, &[]);
    guest.power_off();
}

/// From the host's machine-check code down, by the kernel's mce-inject module. Afterwards the kernel
/// takes no page back that software has poisoned, and says so.
pub fn mce_inject() {
    let mut guest = Guest::boot(&Options::intel(2, true));
    let pages = guest.agent.alloc("anon", 8);
    let (software, bad) = (pages[1], pages[3]);

    let first = guest.poison(software.gpa, "hwpoison-inject");
    guest.event("acknowledged", software);
    let done = guest.poison(bad.gpa, "mce-inject");
    assert_eq!(guest.event("seen", bad)["kind"], "AO");
    println!("    guest: {}", guest.agent.memory_failure(bad));
    guest.agent.sigbus_ao(bad);
    guest.event("acknowledged", bad);
    guest.agent.others_intact(&pages, &[software, bad]);
    guest.power_off();
    for page in [first, done] {
        let out = unpoison(&page);
        let said = String::from_utf8_lossy(&out.stderr);
        println!("    {}", said.trim_end());
        assert_eq!(out.status.code(), Some(1));
        assert!(said.contains("hardware error"), "{said}");
    }
}

fn unpoison(page: &Value) -> Output {
    mce_relay(&["unpoison", "--pfn", page["pfn"].as_str().unwrap()])
}

/// Each of hwpoison-inject's filters lets its pages through and holds the others back, and is gone
/// afterwards; pages that software has poisoned can be given back to the host.
pub fn filters_and_unpoison() {
    let (own, other) = (Cgroup::new("vm"), Cgroup::new("other"));
    let options = Options { cgroup: Some(own.path().to_owned()), ..Options::intel(1, true) };
    let mut guest = Guest::boot(&options);
    let pages = guest.agent.alloc("anon", 16);
    let mut left = pages.iter();
    let vm = guest.info();
    let fd = vm.memory[0].fd.unwrap();
    let device = std::fs::metadata(format!("/proc/{}/fd/{fd}", vm.pid)).unwrap().dev();
    let device = format!("{}:{}", libc::major(device), libc::minor(device));
    let before = filters();

    let (mut gone, mut frames) = (Vec::new(), Vec::new());
    let own_path = own.path().to_str().unwrap();
    let other_inode = other.path().metadata().unwrap().ino().to_string();
    let own_inode = own.path().metadata().unwrap().ino().to_string();
    for (filter, passes) in [
        // The default is the VM's own cgroup.
        (&[][..], true),
        (&["--filter-memcg", "own"], true),
        (&["--filter-memcg", own_path], true),
        (&["--filter-memcg", &own_inode], true),
        (&["--filter-memcg", &other_inode], false),
        (&["--filter-memcg", "none", "--filter-dev", &device], true),
        (&["--filter-dev", "9:9"], false),
        (&["--filter-flags", "swapbacked+huge=swapbacked"], true),
        (&["--filter-flags", "anon=anon"], false),
        (&["--filter-memcg", "own", "--filter-dev", &device, "--filter-flags", "huge=0"], true),
        (&["--filter-memcg", "own", "--filter-dev", "9:9"], false),
    ] {
        let page = *left.next().unwrap();
        let gpa = format!("{:#x}", page.gpa);
        let more = [&["--via", "hwpoison-inject", "--json", "--gpa", &gpa], filter].concat();
        let out = guest.command("poison", &more);
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.success(), passes, "{filter:?}: {said}");
        if passes {
            let done: Value = serde_json::from_slice(&out.stdout).unwrap();
            frames.push(done);
            guest.event("acknowledged", page);
            gone.push(page);
        } else {
            assert!(said.contains("filter"), "{filter:?}: {said}");
        }
        assert_eq!(filters(), before, "{filter:?}: everything is as it was");
    }
    guest.agent.others_intact(&pages, &gone);
    // Ctrl-C in the middle of many: some are done, and the filters are as they were.
    let many = guest.agent.alloc_many("anon", 512);
    let list: Vec<String> = many.iter().map(|page| format!("{:#x}", page.gpa)).collect();
    let child = guest.spawn("poison", &["--via", "hwpoison-inject", "--gpa", &list.join(",")]);
    while filters() == before {
        std::thread::sleep(Duration::from_millis(1));
    }
    // SAFETY: sends a signal to a child that has not been waited for.
    unsafe { libc::kill(child.id().cast_signed(), libc::SIGINT) };
    let out = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    println!("    {}", said.lines().last().unwrap_or_default());
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("interrupted before its turn"), "{said}");
    assert_eq!(filters(), before);
    guest.power_off();

    for page in &frames {
        let out = unpoison(page);
        assert!(out.status.success(), "{page}: {}", String::from_utf8_lossy(&out.stderr));
        assert!(!mce_relay_vmm::host::is_poisoned(hex(&page["pfn"])).unwrap());
        let out = unpoison(page);
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success() && said.contains("not poisoned"), "{said}");
    }
    println!("    {} host pages poisoned and given back", frames.len());
}

/// What hwpoison-inject's filters are set to.
fn filters() -> Vec<(String, String)> {
    let dir = std::fs::read_dir("/sys/kernel/debug/hwpoison").unwrap();
    let names = dir.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut filters: Vec<(String, String)> = names
        .filter(|name| name.starts_with("corrupt-filter"))
        .map(|name| {
            let path = format!("/sys/kernel/debug/hwpoison/{name}");
            (name, std::fs::read_to_string(path).unwrap())
        })
        .collect();
    filters.sort();
    assert!(filters.len() >= 5, "{filters:?}");
    filters
}
