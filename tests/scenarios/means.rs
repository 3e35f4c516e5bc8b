//! Every way in which software makes a page go bad, and what it gives: an AO, an AR at the touch, or
//! nothing at all.

use std::os::unix::fs::MetadataExt;
use std::process::Output;
use std::time::{Duration, Instant};

use mce_relay_cli::poison::host::hwpoison_inject::Injector;
use mce_relay_tests::agent::{PATIENCE, Page, hex};
use mce_relay_tests::guest::{Guest, Options, hva, mce_relay};
use mce_relay_tests::lab::{self, Cgroup, OwnPage};
use serde_json::Value;

/// madvise(MADV_HWPOISON) by another process that shares the page. The kernel takes that process
/// for one that touched it (AR); the VMM is one of those who have it mapped (AO).
pub fn madvise() {
    let mut guest = Guest::boot(&Options::intel(1, true));
    let pages = guest.agent.alloc("anon", 8);
    let bad = pages[4];

    let before = shown(&guest, bad);
    assert_eq!(before["presence"], "present", "{before}");
    assert!(before["mapped"].as_u64().unwrap() >= 1 && before["ledger"].is_null(), "{before}");
    guest.poison(bad.gpa, "madvise");
    assert_eq!(guest.event("seen", bad)["kind"], "AO");
    println!("    guest: {}", guest.agent.memory_failure(bad));
    guest.agent.sigbus_ao(bad);
    guest.event("acknowledged", bad);
    // The same frame, and what the host says of it now.
    let after = shown(&guest, bad);
    println!("    {after}");
    assert_eq!(
        (&after["presence"], &after["pfn"]),
        (&"poisoned".into(), &before["pfn"]),
        "{after}"
    );
    let flags = after["flags"].as_array().unwrap();
    assert!(flags.contains(&"hwpoison".into()), "{after}");
    assert_eq!(after["ledger"]["state"], "acknowledged", "{after}");
    guest.agent.others_intact(&pages, &[bad]);
    guest.power_off();
}

/// What `mce-relay pages` says of a page; its frame is known.
fn shown(guest: &Guest, page: Page) -> Value {
    let out = guest.command("pages", &["--gpa", &format!("{:#x}", page.gpa), "--json"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let pages: Value = serde_json::from_slice(&out.stdout).unwrap();
    let page = pages["pages"][0].clone();
    assert!(page["pfn"].is_string() && page["flags"].is_array(), "{pages}");
    page
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

/// How often a guest may be met in its kernel by an AR that is meant for a process of it.
const TRIES: usize = 5;

/// Has the agent load from a page of its own without a pause, on vCPU 1, and `hit` give that vCPU an AR for
/// the page meanwhile. The page, and what the agent met.
///
/// Nearly always the vCPU is in user mode then. In the guest's timer interrupt it is not, and Linux
/// panics when its kernel meets an AR: it starts over, and is hit again.
fn hit_in_user_mode(guest: &mut Guest, hit: impl Fn(&Guest, Page)) -> (Page, Value) {
    for _ in 0..TRIES {
        let boot = guest.status()["vm"]["boot"].as_u64().unwrap();
        let bad = guest.agent.alloc("anon", 4)[1];
        guest.agent.ask("cpu 1");
        let request = format!("touch {} spin", bad.number);
        guest.agent.tell(&request);
        // More than the agent needs to read that and begin.
        std::thread::sleep(Duration::from_secs(1));
        hit(guest, bad);
        if let Some(reply) = reply_before_reboot(guest, &request, boot) {
            return (bad, reply);
        }
        println!(
            "    the AR met the guest in its kernel, which panicked; once more in the next boot"
        );
        guest.up_again();
    }
    panic!(
        "{TRIES} times the vCPU was in the guest's kernel, though a process of it is busy there"
    );
}

/// The agent's reply to `request`; none when the guest, in this `boot`, starts over instead.
fn reply_before_reboot(guest: &mut Guest, request: &str, boot: u64) -> Option<Value> {
    let start = Instant::now();
    loop {
        let error = match guest.agent.reply(request, Instant::now() + Duration::from_secs(1)) {
            Ok(reply) => return Some(reply),
            Err(error) => error,
        };
        let is_next =
            |event: &Value| event["event"] == "booting" && event["properties"]["boot"] == boot + 1;
        if guest.events().iter().any(is_next) {
            return None;
        }
        assert!(start.elapsed() < PATIENCE, "{request}: {error}");
        // The VMM may have closed the port, and then the answer is there at once.
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// What needs no privileges: a page that the kernel takes for bad for the VMM alone, which is an AR when
/// the guest touches it, and forged signals, an AO and an AR, which are labelled wherever they show. Beside
/// them a page that moves.
pub fn uffd_and_signal() {
    let mut guest = Guest::boot(&Options { reboot: true, ..Options::amd(2).ghes() });
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
    for event in ["injected", "acknowledged"] {
        assert_eq!(guest.event(event, forged)["forged"], true);
    }
    assert_eq!(guest.event("acknowledged", touched)["forged"], false);
    let hva = hva(&guest.info(), forged.gpa);
    let caught = guest.event_where("caught", "the page", |caught| hex(&caught["hva"]) == hva);
    assert_eq!((&caught["kind"], &caught["forged"]), (&"AO".into(), &true.into()), "{caught}");
    assert_eq!(guest.ledger(forged).unwrap()["found_by"], "forged");
    let pfn = lab::host_physical(guest.pid(), hva) >> 12;
    assert!(!mce_relay_vmm::host::page_frames::is_poisoned(pfn).unwrap(), "the page is whole");

    moves(&mut guest, pages[7]);
    guest.agent.others_intact(&pages, &[touched, forged]);
    forged_ar(&mut guest);
    guest.power_off();
}

/// A forged AR, while a process of the guest's runs on that vCPU: for the guest it is as if that process had
/// touched a bad page.
fn forged_ar(guest: &mut Guest) {
    let (bad, reply) = hit_in_user_mode(guest, |guest, bad| {
        let gpa = format!("{:#x}", bad.gpa);
        let ar = ["--via", "signal", "--kind", "ar", "--vcpu", "1", "--force", "--json"];
        let done = poison(guest, &[&ar[..], &["--gpa", &gpa]].concat());
        assert_eq!(done["forged"], true, "{done}");
    });
    assert_eq!((&reply["result"], &reply["sigbus"]["code"]), (&"sigbus".into(), &"AR".into()));
    println!("    guest: {}", guest.agent.memory_failure(bad));
    let hva = hva(&guest.info(), bad.gpa);
    let caught = guest.event_where("caught", "the page", |caught| hex(&caught["hva"]) == hva);
    assert_eq!(
        (&caught["kind"], &caught["forged"], &caught["thread"]["vcpu"]),
        (&"AR".into(), &true.into(), &1.into()),
        "{caught}"
    );
    let acknowledged = guest.event("acknowledged", bad);
    assert_eq!(acknowledged["vcpu"], 1, "{acknowledged}");
    let entry = guest.ledger(bad).unwrap();
    assert_eq!(
        (&entry["kind"], &entry["found_by"], &entry["state"]),
        (&"AR".into(), &"forged".into(), &"acknowledged".into()),
        "{entry}"
    );
    let pfn = lab::host_physical(guest.pid(), hva) >> 12;
    assert!(!mce_relay_vmm::host::page_frames::is_poisoned(pfn).unwrap(), "the page is whole");
    nothing_else_lost(guest);
}

/// Sees that the agent, which knows which of its pages are bad, has lost no other.
fn nothing_else_lost(guest: &mut Guest) {
    let check = guest.agent.ask("check");
    assert_eq!(check["bad"].as_array().map(Vec::len), Some(0), "{check}");
}

/// Runs `mce-relay poison` with `more`, which holds `--json`; what it printed.
fn poison(guest: &Guest, more: &[&str]) -> Value {
    let out = guest.command("poison", more);
    assert!(out.status.success(), "{more:?}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

/// Pages of one of the guest's processes, which the guest's own agent names, and pages at random; and what
/// is only planned is not done.
pub fn a_process_of_the_guest() {
    let mut guest = Guest::boot(&Options::amd(2).ghes());
    let agent = format!("path={}", guest.path("agent").display());
    let pages = guest.agent.alloc("anon", 8);
    // The agent's socket takes one client at a time.
    let init = guest.agent.ask("process 1 16");
    assert_eq!(init["pid"], 1, "{init}");
    let own = guest.agent.ask("ping")["pid"].to_string();
    guest.agent.hang_up();
    let of = |pid, more: &[&str]| {
        let all = ["--pid", pid, "--agent", &agent, "--via", "uffd", "--json"];
        poison(&guest, &[&all[..], more].concat())
    };
    let planned = of("1", &["--dry-run"]);
    assert_eq!(planned["dry_run"], true, "{planned}");
    // Of itself the agent names what it has allocated first.
    let named: Vec<u64> = gpas(&of(&own, &["--max", "2"]));
    guest.reconnect();
    let bad: Vec<Page> = pages.iter().filter(|page| named.contains(&page.gpa)).copied().collect();
    assert_eq!((named.len(), bad.len()), (2, 2), "{named:#x?} are of {pages:#x?}");
    println!("    process {own} of the guest has lost {:#x} and {:#x}", bad[0].gpa, bad[1].gpa);
    assert!(guest.pages().is_empty(), "nobody was told: {}", guest.status());
    for page in &bad {
        let reply = guest.agent.touch(*page, "read");
        assert_eq!(reply["sigbus"]["code"], "AR", "{reply}");
        println!("    guest: {}", guest.agent.memory_failure(*page));
        guest.event("acknowledged", *page);
    }
    // The second one may have been found by a look at the page tables meanwhile.
    assert_eq!(guest.ledger(bad[0]).unwrap()["kind"], "AR", "{}", guest.status());
    guest.agent.others_intact(&pages, &bad);

    let whole = *pages.iter().rfind(|page| !bad.contains(page)).unwrap();
    only_planned(&guest, whole);
    deferred_by_hand(&mut guest, whole);
    at_random(guest);
}

/// The addresses in what `mce-relay poison --json` printed of several pages.
fn gpas(done: &Value) -> Vec<u64> {
    done.as_array().unwrap().iter().map(|page| hex(&page["gpa"])).collect()
}

/// A dry run names the host's page frame, and leaves it as it is.
fn only_planned(guest: &Guest, page: Page) {
    let gpa = format!("{:#x}", page.gpa);
    let plan = poison(guest, &["--gpa", &gpa, "--via", "hwpoison-inject", "--dry-run", "--json"]);
    assert_eq!(plan["dry_run"], true, "{plan}");
    let pfn = hex(&plan["pfn"]);
    assert_eq!(lab::host_physical(guest.pid(), hva(&guest.info(), page.gpa)) >> 12, pfn);
    assert!(!mce_relay_vmm::host::page_frames::is_poisoned(pfn).unwrap(), "{plan}");
    assert!(guest.ledger(page).is_none(), "{}", guest.status());
}

/// A seed chooses the same pages again, for the same guest in the same state: one that is held. It does not
/// go on afterwards, as any page may be among them, its kernel's own as well.
fn at_random(mut guest: Guest) {
    guest.put("vm.pause");
    let random = ["--random", "3", "--seed", "7", "--via", "uffd", "--json"];
    let planned = gpas(&poison(&guest, &[&random[..], &["--dry-run"]].concat()));
    let read =
        |gpa: u64| guest.command("memory read", &["--gpa", &format!("{gpa:#x}"), "--len", "8"]);
    assert!(planned.iter().all(|gpa| read(*gpa).status.success()), "{planned:#x?} are whole");
    let done = gpas(&poison(&guest, &random));
    assert_eq!((planned.len(), &planned), (3, &done), "the same pages by the same seed");
    println!("    three pages at random: {done:#x?}");
    for gpa in done {
        let said = String::from_utf8_lossy(&read(gpa).stderr).into_owned();
        assert!(said.contains(&format!("poisoned at GPA {gpa:#x}")), "{said}");
    }
    guest.put("vm.shutdown");
    assert_eq!(guest.ended().code(), Some(0));
}

/// Runs `mce-relay inject` about `page` with `more`; the words of its outlook, which are printed, too, and
/// what it did on each vCPU.
fn inject(guest: &Guest, page: Page, more: &[&str]) -> (Value, Value) {
    let gpa = format!("{:#x}", page.gpa);
    let out = guest.command("inject", &[&["--json", "--addr", &gpa], more].concat());
    assert!(out.status.success(), "{more:?}: {}", String::from_utf8_lossy(&out.stderr));
    let mut done: Value = serde_json::from_slice(&out.stdout).unwrap();
    let outlook = done["outlook"].take();
    println!(
        "    {}: Linux {}: {}",
        more.join(" "),
        outlook["guest"].as_str().unwrap(),
        outlook["guest_why"].as_str().unwrap()
    );
    (outlook, done["done"].take())
}

/// Sees that the guest's kernel takes `page`, of which a machine check by hand told it, out of use, as the
/// outlook said; and that nothing else came of it.
fn isolated(guest: &mut Guest, page: Page) {
    println!("    guest: {}", guest.agent.memory_failure(page));
    guest.agent.sigbus_ao(page);
    assert!(guest.ledger(page).is_none(), "it does not go through the relay: {}", guest.status());
    nothing_else_lost(guest);
}

/// Machine checks by hand, on two vCPUs that wait for each other in their handlers: what the guest's own
/// kernel makes of each is what was said before.
pub fn by_hand() {
    let mut guest = Guest::boot(&Options { reboot: true, ..Options::intel(2, false) });
    let bad = guest.agent.alloc("anon", 8)[3];

    // What the guest would not survive is not done.
    let gpa = format!("{:#x}", bad.gpa);
    let out = guest.command("inject", &["--status", "srao", "--addr", &gpa]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("Linux dies: its other vCPUs are not called"), "{said}");
    nothing_else_lost(&mut guest);

    let (outlook, done) = inject(&guest, bad, &["--status", "srao", "--broadcast"]);
    assert_eq!(
        (&outlook["kvm"], &outlook["guest"], &outlook["lethal"]),
        (&"machine-check".into(), &"isolates-page".into(), &false.into()),
        "{outlook}"
    );
    let on: Vec<&Value> = done.as_array().unwrap().iter().map(|on| &on["outcome"]).collect();
    assert_eq!(on, ["injected", "injected"], "{done}");
    isolated(&mut guest, bad);

    let (bad, reply) = hit_in_user_mode(&mut guest, |guest, bad| {
        let srar = ["--status", "srar", "--vcpu", "1", "--broadcast", "--force"];
        let (outlook, done) = inject(guest, bad, &srar);
        assert_eq!(
            (&outlook["kvm"], &outlook["guest"], &outlook["lethal"]),
            (&"machine-check".into(), &"kills-what-runs".into(), &true.into()),
            "{outlook}"
        );
        assert_eq!(done[1]["outcome"], "injected", "{done}");
    });
    // The process that ran there is killed, unless it takes the signal, as the agent does.
    assert_eq!((&reply["result"], &reply["sigbus"]["code"]), (&"sigbus".into(), &"AR".into()));
    println!("    guest: {}", guest.agent.memory_failure(bad));
    let access = format!("Uncorrected hardware memory error in user-access at {:x}", bad.gpa);
    let log = guest.agent.ask(&format!("dmesg {access}"));
    assert_eq!(log["count"], 1, "{access}: {log}");
    assert!(guest.ledger(bad).is_none(), "{}", guest.status());
    nothing_else_lost(&mut guest);
    guest.power_off();
}

/// A deferred error by hand into an AMD guest, which finds it when it polls its banks.
fn deferred_by_hand(guest: &mut Guest, bad: Page) {
    let (outlook, done) = inject(guest, bad, &["--status", "deferred"]);
    assert_eq!(
        (&outlook["kvm"], &outlook["guest"], &outlook["lethal"]),
        (&"logs".into(), &"isolates-page-at-poll".into(), &false.into()),
        "{outlook}"
    );
    assert_eq!(done[0]["outcome"], "injected", "{done}");
    // Its poll is every five minutes.
    guest.agent.ask("interval 1");
    isolated(guest, bad);
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
/// afterwards; pages that software has poisoned can be given back to the host, when the VM does not use them
/// any more.
pub fn filters_and_unpoison() {
    // What all of this needs is here.
    let out = mce_relay(&["check"]);
    let report = String::from_utf8_lossy(&out.stdout);
    assert_eq!(out.status.code(), Some(0), "mce-relay check: {report}");
    assert!(report.contains("memory errors of this host can be relayed to guests"), "{report}");

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
        assert_eq!(
            said.contains(&format!("{OWN_CGROUP} can be hit ({own_path})")),
            !filter.contains(&"--filter-memcg"),
            "{filter:?}: {said}"
        );
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
    let many = guest.agent.alloc_many("anon", 2048);
    held_back_and_interrupted(&guest, &many, &own_inode);
    assert_eq!(filters(), before);
    in_use(&frames[0]);
    guest.power_off();

    for page in &frames {
        let out = unpoison(page);
        assert!(out.status.success(), "{page}: {}", String::from_utf8_lossy(&out.stderr));
        assert!(!mce_relay_vmm::host::page_frames::is_poisoned(hex(&page["pfn"])).unwrap());
        let out = unpoison(page);
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success() && said.contains("not poisoned"), "{said}");
    }
    println!("    {} host pages poisoned and given back", frames.len());
}

/// What is said of the filter that is the default.
const OWN_CGROUP: &str = "only pages of the VM's own memory cgroup";

/// While the default filter is in force it names the VM's own cgroup, `inode`, and a page of somebody else
/// survives that is hit. Ctrl-C in the middle of many: some are done, and the others are said not to be.
fn held_back_and_interrupted(guest: &Guest, many: &[Page], inode: &str) {
    let bystander = OwnPage::new();
    let injector = Injector::open().unwrap();
    let list: Vec<String> = many.iter().map(|page| format!("{:#x}", page.gpa)).collect();
    let child = guest.spawn("poison", &["--via", "hwpoison-inject", "--gpa", &list.join(",")]);
    let start = Instant::now();
    while filter("enable") != "1" {
        assert!(start.elapsed() < Duration::from_secs(20), "no filter comes into force");
        std::thread::sleep(Duration::from_millis(1));
    }
    lab::stop(child.id());
    // It was not done with its pages before it stood still.
    assert_eq!((filter("enable"), filter("memcg")), ("1".to_owned(), inode.to_owned()));
    let pfn = bystander.pfn();
    injector.corrupt(pfn).unwrap();
    let is_poisoned = |pfn| mce_relay_vmm::host::page_frames::is_poisoned(pfn).unwrap();
    assert!(!is_poisoned(pfn), "page frame {pfn:#x} is another process's");
    assert!(bystander.is_whole());

    // SAFETY: sends signals to a child that has not been waited for.
    unsafe {
        libc::kill(child.id().cast_signed(), libc::SIGINT);
        libc::kill(child.id().cast_signed(), libc::SIGCONT);
    }
    let out = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    println!("    {}", said.lines().last().unwrap_or_default());
    assert_eq!(out.status.code(), Some(130), "{said}");
    assert!(said.contains("interrupted: of ") && said.contains(OWN_CGROUP), "{said}");

    // The filter was what held that page back.
    let pfn = bystander.pfn();
    injector.corrupt(pfn).unwrap();
    assert!(is_poisoned(pfn), "without the filter page frame {pfn:#x} is hit");
    drop(bystander);
    let back = match mce_relay_cli::poison::host::unpoison::unpoison(pfn) {
        Ok(()) => "given back".to_owned(),
        Err(error) => error.to_string(),
    };
    println!("    a page of another process: held back by the filter, and hit without it; {back}");
}

/// A page frame that the VM has in its memory yet is not given back, and that is said.
fn in_use(page: &Value) {
    let out = unpoison(page);
    let said = String::from_utf8_lossy(&out.stderr);
    println!("    {}", said.trim_end());
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("still has it mapped") && said.contains("end the VM"), "{said}");
    assert!(mce_relay_vmm::host::page_frames::is_poisoned(hex(&page["pfn"])).unwrap());
}

/// What one of hwpoison-inject's filters is set to.
fn filter(name: &str) -> String {
    let path = format!("/sys/kernel/debug/hwpoison/corrupt-filter-{name}");
    std::fs::read_to_string(path).unwrap().trim().to_owned()
}

/// What all of them are set to.
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
