//! What is measured on this machine's own KVM and memory: `here FILE [FIGURE…]`. FILE gets the figures.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "what cannot be set up is not measured"
)]
#![allow(clippy::cast_precision_loss, reason = "figures for people")]

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::ExitCode;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use kvm_bindings::kvm_regs;
use kvm_ioctls::{VcpuExit, VcpuFd};
use mce_relay::internals::scan::{Method, Scanner};
use mce_relay::kvm::ExitRegisters;
use mce_relay::mca::record;
use mce_relay::signal::{BUS_MCEERR_AO, BUS_MCEERR_AR};
use mce_relay::{
    ExitByte, FailureKind, Form, FoundBy, Ledger, Mca, PAGE_SHIFT, Pace, Place, RamMap, RamRegion,
    Relay, State, Verdict, WaitReason,
};
use mce_relay_bench::figure::{Figure, Goal, Series, US};
use mce_relay_bench::{caps, progress};
use mce_relay_tests::ready::forge;
use mce_relay_vmm::api::status::StatusPieces;
use mce_relay_vmm::mce_inject::set_mce;
use mce_relay_vmm::relaying::uffd::Uffd;
use payload::{Did, Payload, Start};
use serde_json::json;

#[allow(dead_code, reason = "the tests use all of it")]
#[path = "../../../tests/kvm/payload.rs"]
mod payload;

type Measure = fn() -> Vec<Figure>;

const MEASURES: [(&str, Measure); 4] =
    [("delivery", delivery), ("exits", exits), ("scan", scan), ("ledger", ledger)];

/// A stretch of addresses where nothing is mapped, or where there is memory that is this program's for this alone.
fn region(hva: u64, gpa: u64, len: u64) -> RamRegion {
    // SAFETY: no reference of Rust's leads there.
    unsafe { RamRegion::new(hva, gpa, len) }
}

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let Some(out) = words.next() else {
        eprintln!("usage: here FILE [delivery|exits|scan|ledger …]");
        return ExitCode::from(2);
    };
    let wanted: Vec<String> = words.collect();
    let mut figures = Vec::new();
    for (name, measure) in MEASURES {
        if wanted.is_empty() || wanted.iter().any(|one| one == name) {
            progress(name);
            figures.extend(measure());
        }
    }
    std::fs::write(out, serde_json::to_string_pretty(&figures).unwrap()).unwrap();
    ExitCode::SUCCESS
}

/// Guest memory that is nowhere: what is forged there hurts nobody.
const FAR_HVA: u64 = 0x7e00_0000_0000;
const FAR_GPA: u64 = 1 << 36;
const FAR_LEN: u64 = 1 << 30;

/// Where a SIGBUS handler without a relay leaves what it caught.
static CAUGHT: AtomicU64 = AtomicU64::new(0);

extern "C" fn bare_handler(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo with SA_SIGINFO, and an address with this code.
    CAUGHT.store(unsafe { (*info).si_addr() }.addr() as u64, Ordering::Relaxed);
}

fn install_bare() -> libc::sigaction {
    // SAFETY: a complete action whose handler is async-signal-safe; plain data for the one before.
    unsafe {
        let mut new: libc::sigaction = std::mem::zeroed();
        let mut before: libc::sigaction = std::mem::zeroed();
        let handler = bare_handler as extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);
        new.sa_sigaction = handler as usize;
        new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        assert_eq!(libc::sigaction(libc::SIGBUS, &raw const new, &raw mut before), 0);
        before
    }
}

fn put_back(action: &libc::sigaction) {
    // SAFETY: an action that was in force.
    assert_eq!(unsafe { libc::sigaction(libc::SIGBUS, action, ptr::null_mut()) }, 0);
}

/// Runs until the machine-check handler's first instruction that shows (it writes MCG_STATUS to a port).
fn to_handler(vcpu: &mut VcpuFd) {
    const PATIENCE: Duration = Duration::from_secs(5);
    let begun = Instant::now();
    loop {
        match vcpu.run().expect("KVM_RUN") {
            VcpuExit::IoOut(0x20, _) => return,
            VcpuExit::IoOut(..) => assert!(begun.elapsed() < PATIENCE, "no machine check comes"),
            other => panic!("{other:?}"),
        }
    }
}

/// A kick: the KVM_RUN that it ends.
fn kicked(vcpu: &mut VcpuFd) {
    vcpu.set_kvm_immediate_exit(1);
    let ended = vcpu.run().is_err_and(|error| error.errno() == libc::EINTR);
    assert!(ended, "KVM_RUN with immediate_exit set");
    vcpu.set_kvm_immediate_exit(0);
}

/// From the kick of a vCPU (AO), or from the signal (AR), to the first instruction of its machine-check handler, with the
/// relay and without. The AO is forged to the relay's own thread, as the kernel does it.
fn delivery() -> Vec<Figure> {
    const TIMES: u64 = 400;
    const PATIENCE: Duration = Duration::from_secs(5);
    let mut with = Payload::new(Start::Beat, true);
    let mut without = Payload::new(Start::Beat, true);
    let near = region(with.ram.hva(), 0, payload::Ram::LEN);
    let far = region(FAR_HVA, FAR_GPA, FAR_LEN);
    let ram = RamMap::new(&[near, far]).unwrap();
    let pace = Pace { burst: 1_000_000, rate: 1_000_000 };
    // An Intel-style guest, who is interrupted for an AO; KVM takes its records on any host.
    let relay = Relay::builder(ram).vcpus(1).machine_checks(caps(false)).pace(pace);
    // With interrupts on it is seen to have left its handler.
    for payload in [&with, &without] {
        let regs = payload.vcpu.get_regs().unwrap();
        payload.vcpu.set_regs(&kvm_regs { rflags: regs.rflags | 1 << 9, ..regs }).unwrap();
    }
    let relay = relay.start().unwrap();
    assert!(ExitRegisters::are_offered(&with.vm).unwrap());
    // SAFETY: dropped before the payload, and all that uses registers of its exits.
    let registers = unsafe { ExitRegisters::new((&raw mut *with.vcpu.get_kvm_run()).cast()) };
    let request = registers.request();
    let (asks, kicks) = (request.clone(), Arc::new(AtomicBool::new(false)));
    let kick = {
        let kicks = Arc::clone(&kicks);
        move || {
            asks.ask();
            kicks.store(true, Ordering::Release);
        }
    };
    let mut port = relay.attach(0, ExitByte::NONE, kick).unwrap();
    let relays = install_bare();
    put_back(&relays);

    let (mut ours, mut bare) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    let kinds = [(BUS_MCEERR_AO, Form::Srao, 9), (BUS_MCEERR_AR, Form::Srar, 8)];
    for page in 0..TIMES {
        let kind = usize::from(page % 2 == 1);
        let (code, form, bank) = kinds[kind];
        let at = FAR_HVA + page * 4096;
        // The guest is well, and nothing waits.
        loop {
            assert_eq!(with.run(), Did::Beat);
            with.finish_io();
            let exit = registers.take();
            let mut mca = with.guest.on(&with.vcpu).after_exit(exit);
            assert_eq!(port.before_run(&mut mca), Verdict::Run);
            if relay.handle().inspect(|ledger| ledger.pages().all(|page| is_told(&page))) {
                break;
            }
        }
        let mut begun = Instant::now();
        if code == BUS_MCEERR_AO {
            kicks.store(false, Ordering::Release);
            relay.handle().forge(FAR_GPA + page * 4096, None).unwrap();
            // A kick of before may come late.
            while !(kicks.load(Ordering::Acquire) && port.wants_attention()) {
                assert!(begun.elapsed() < PATIENCE, "no kick comes");
                std::hint::spin_loop();
            }
            begun = Instant::now();
        } else {
            forge(code, usize::try_from(at).unwrap());
        }
        kicked(&mut with.vcpu);
        if code == BUS_MCEERR_AR {
            request.ask();
            kicked(&mut with.vcpu);
        }
        let exit = registers.take();
        let mut mca = with.guest.on(&with.vcpu).after_exit(exit);
        assert_eq!(port.before_run(&mut mca), Verdict::Run);
        to_handler(&mut with.vcpu);
        ours[kind].push(begun.elapsed().as_secs_f64() * 1e6);
        assert!(exit.is_some(), "the registers did not come with the exit");
        assert!(matches!(with.run(), Did::Handled { .. }));

        assert_eq!(without.run(), Did::Beat);
        without.finish_io();
        install_bare();
        let mut begun = Instant::now();
        forge(code, usize::try_from(at).unwrap());
        if code == BUS_MCEERR_AO {
            begun = Instant::now();
        }
        kicked(&mut without.vcpu);
        let gpa = CAUGHT.load(Ordering::Relaxed) - FAR_HVA + FAR_GPA;
        set_mce(&without.vcpu, &record(form, gpa, bank, false)).unwrap();
        to_handler(&mut without.vcpu);
        bare[kind].push(begun.elapsed().as_secs_f64() * 1e6);
        put_back(&relays);
        assert!(matches!(without.run(), Did::Handled { .. }));
    }
    let timed = |mut call: Box<dyn FnMut() + '_>| -> Vec<f64> {
        let mut once = || {
            let begun = Instant::now();
            call();
            begun.elapsed().as_secs_f64() * 1e6
        };
        (0..200).map(|_| once()).collect()
    };
    let vcpu = &without.vcpu;
    let mut parts = vec![
        ("KVM_GET_REGS", timed(Box::new(|| assert!(black_box(vcpu.get_regs()).is_ok())))),
        ("KVM_GET_SREGS", timed(Box::new(|| assert!(black_box(vcpu.get_sregs()).is_ok())))),
        (
            "KVM_GET_VCPU_EVENTS",
            timed(Box::new(|| assert!(black_box(vcpu.get_vcpu_events()).is_ok()))),
        ),
    ];
    let whole = with.guest;
    let states = timed(Box::new(|| assert!(black_box(whole.on(&with.vcpu).state()).is_ok())));
    let mut series = vec![Series::new(US, states)];
    series.extend(parts.drain(..).map(|(name, values)| Series::new(name, values)));
    let state = Figure {
        what: "reading a vCPU's machine-check state".into(),
        unit: "µs".into(),
        series,
        goal: Goal::Shown,
        command: "make bench FIGURES=delivery".into(),
        note: "22 MSRs and these three ioctls".into(),
    };
    let [ours_ao, ours_ar] = ours;
    let [bare_ao, bare_ar] = bare;
    let kinds = [
        ("AO, from the kick of its vCPU", ours_ao, bare_ao, 1.35),
        ("AR, from its signal", ours_ar, bare_ar, 1.5),
    ];
    let told = kinds.map(|(from, ours, bare, goal)| Figure {
        what: format!("forged {from} to the first instruction of the guest's #MC handler"),
        unit: "µs".into(),
        series: vec![Series::new(US, ours), Series::new("bare ioctls", bare)],
        goal: Goal::AtMostTimes(goal, "bare ioctls".into()),
        command: "make bench FIGURES=delivery".into(),
        note: "in turns; bare: the KVM_RUN that kick or signal ends, KVM_X86_SET_MCE, KVM_RUN, without looking at the guest's \
               state first"
            .into(),
    });
    std::iter::once(state).chain(told).collect()
}

fn is_told(page: &mce_relay::Page) -> bool {
    matches!(page.state, State::Acknowledged { .. })
}

/// Exits a second of a guest that does nothing else.
fn exits() -> Vec<Figure> {
    const ROUNDS: usize = 15;
    const TIME: Duration = Duration::from_millis(300);
    let mut payload = Payload::new(Start::Beat, true);
    let ram = RamMap::new(&[region(FAR_HVA, FAR_GPA, FAR_LEN)]).unwrap();
    let relay = Relay::builder(ram).vcpus(1).machine_checks(payload.guest.caps()).start().unwrap();
    let mut port = relay.attach(0, ExitByte::NONE, || {}).unwrap();
    assert_eq!(port.before_run(&mut payload.guest.on(&payload.vcpu)), Verdict::Run);
    let mut with = || {
        let (begun, mut count) = (Instant::now(), 0u64);
        while begun.elapsed() < TIME {
            for _ in 0..64 {
                let guest = &mut payload.guest;
                assert_eq!(port.before_run(&mut guest.on(&payload.vcpu)), Verdict::Run);
                assert_eq!(payload.run(), Did::Beat);
            }
            count += 64;
        }
        count as f64 / begun.elapsed().as_secs_f64()
    };
    let mut on = Vec::new();
    let mut off = Vec::new();
    let mut other = Payload::new(Start::Beat, true);
    let mut without = || {
        let (begun, mut count) = (Instant::now(), 0u64);
        while begun.elapsed() < TIME {
            for _ in 0..64 {
                assert_eq!(other.run(), Did::Beat);
            }
            count += 64;
        }
        count as f64 / begun.elapsed().as_secs_f64()
    };
    for _ in 0..ROUNDS {
        on.push(with());
        off.push(without());
    }
    vec![Figure {
        what: "exits a second of one vCPU".into(),
        unit: "1/s".into(),
        series: vec![Series::new(US, on), Series::new("without the relay", off)],
        goal: Goal::NoDifference("without the relay".into()),
        command: "make bench FIGURES=exits".into(),
        note: "an exit by port I/O and back, in turns".into(),
    }]
}

/// A private mapping of `len` bytes of which one page in each 16 MiB is there.
fn sparse(len: usize) -> u64 {
    let (prot, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
    );
    // SAFETY: a new mapping at an address of the kernel's choice, and writes within it.
    unsafe {
        let at = libc::mmap(ptr::null_mut(), len, prot, flags, -1, 0);
        assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        libc::madvise(at, len, libc::MADV_NOHUGEPAGE);
        for offset in (0..len).step_by(16 << 20) {
            at.cast::<u8>().add(offset).write_volatile(1);
        }
        at.expose_provenance() as u64
    }
}

fn unmap(at: u64, len: usize) {
    // SAFETY: the mapping that `sparse` made, of which nobody knows any more.
    unsafe { libc::munmap(ptr::with_exposed_provenance_mut(usize::try_from(at).unwrap()), len) };
}

/// A look for bad pages that nobody was signalled, over sparse guest RAM.
fn scan() -> Vec<Figure> {
    const TIMES: usize = 7;
    let mut figures = Vec::new();
    for (gib, poisoned) in [(1, 0), (16, 0), (256, 0), (256, 64), (256, 4096)] {
        progress(&format!("scan of {gib} GiB with {poisoned} bad pages"));
        let len = gib << 30;
        let at = sparse(len);
        let uffd = Uffd::open();
        let marked = (0..poisoned).all(|page: u64| {
            let hva = at + ((page * (len as u64 / (poisoned + 1))) & !4095) + 4096;
            uffd.as_ref().is_ok_and(|uffd| uffd.poison(hva, 4096).is_ok())
        });
        if !marked {
            progress("userfaultfd cannot mark pages here (Linux 6.6): not measured");
            unmap(at, len);
            continue;
        }
        let mut scanner = Scanner::new().unwrap();
        let mut time = || {
            let begun = Instant::now();
            let range = at..at + len as u64;
            let found = scanner.scan(std::iter::once(range), |_| false).unwrap();
            assert_eq!(found.len() as u64, poisoned);
            begun.elapsed().as_secs_f64() * 1e3
        };
        let ours: Vec<f64> = (0..TIMES).map(|_| time()).collect();
        let method = scanner.method();
        // Once is enough for what is only shown.
        let whole = vec![read_pagemap(at, len)];
        figures.push(Figure {
            what: format!("look through {gib} GiB of sparse guest RAM, {poisoned} bad pages"),
            unit: "ms".into(),
            series: vec![Series::new(US, ours), Series::new("pagemap read whole", whole)],
            goal: if gib == 256 { Goal::AtMost(100.0) } else { Goal::Shown },
            command: "make bench FIGURES=scan".into(),
            note: if method == Method::PagemapScan {
                "by PAGEMAP_SCAN; one page of 16 MiB is there".into()
            } else {
                "this kernel has no PAGEMAP_SCAN (Linux 6.7)".into()
            },
        });
        unmap(at, len);
    }
    figures
}

/// Milliseconds that it takes to read all entries.
fn read_pagemap(at: u64, len: usize) -> f64 {
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    let mut entries = vec![0; 1 << 20];
    let begun = Instant::now();
    for offset in (0..len as u64 / 4096 * 8).step_by(entries.len()) {
        let wanted = entries.len().min(usize::try_from(len as u64 / 4096 * 8 - offset).unwrap());
        pagemap.read_exact_at(&mut entries[..wanted], at / 4096 * 8 + offset).unwrap();
        black_box(&entries);
    }
    begun.elapsed().as_secs_f64() * 1e3
}

fn resident() -> f64 {
    // What was freed before is not to be found in what comes after.
    // SAFETY: it gives free memory back to the kernel, and touches nothing that is in use.
    unsafe { libc::malloc_trim(0) };
    let status = std::fs::read_to_string(Path::new("/proc/self/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<f64>().unwrap() / 1024.0
}

/// Memory of a ledger of a million pages, each of which has gone its way to the end: one after the other
/// in memory, and all over 256 GiB.
fn ledger() -> Vec<Figure> {
    const PAGES: u64 = 1_000_000;
    let mut figures = Vec::new();
    for (how, stride) in [("in one piece", 1), ("all over 256 GiB", 67)] {
        let before = resident();
        let mut ledger = Ledger::default();
        let begun = Instant::now();
        // Not in the order of their addresses: 999,983 has no factor in common with a million.
        let gpas = (0..PAGES).map(|page| (page * 999_983 % PAGES * stride) << PAGE_SHIFT);
        for (record, gpa) in (1..).zip(gpas) {
            let (hva, kind) = (FAR_HVA + gpa, FailureKind::ActionOptional);
            ledger.enter(gpa, hva, PAGE_SHIFT, kind, FoundBy::Signal, SystemTime::now());
            let place = Place::Ghes { record };
            for state in [
                State::Waiting { wait: WaitReason::Pace },
                State::Injected { place },
                State::Acknowledged { place },
            ] {
                ledger.set(gpa, state, SystemTime::now());
            }
        }
        let took = begun.elapsed().as_secs_f64() * 1e9 / PAGES as f64;
        let used = resident() - before;
        assert_eq!(black_box(&ledger).len() as u64, PAGES);
        figures.extend([
            Figure {
                what: format!("ledger of 1,000,000 acknowledged pages, {how}"),
                unit: "MiB".into(),
                series: vec![Series::new(US, vec![used])],
                goal: Goal::AtMost(64.0),
                command: "make bench FIGURES=ledger".into(),
                note: "resident memory more than before".into(),
            },
            Figure {
                what: format!("a page entered and set to three states, {how}"),
                unit: "ns".into(),
                series: vec![Series::new(US, vec![took])],
                goal: Goal::Shown,
                command: "make bench FIGURES=ledger".into(),
                note: String::new(),
            },
        ]);
        drop(ledger);
    }
    figures.extend(status());
    figures
}

/// The status of more than a million pages, as the API sends it.
fn status() -> [Figure; 2] {
    const GIB: u64 = 1 << 30;
    let huge = region(FAR_HVA, FAR_GPA, 4 * GIB).in_pages_of(30);
    let relay = Relay::builder(RamMap::new(&[huge]).unwrap())
        .vcpus(1)
        .machine_checks(caps(false))
        .start()
        .unwrap();
    let handle = relay.handle();
    for page in 0..4 {
        handle.forge(FAR_GPA + page * GIB, None).unwrap();
        while handle.inspect(|ledger| ledger.len() as u64) != (page + 1) * GIB / 4096 {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let info = serde_json::from_value(json!({
        "name": null, "version": "", "pid": 1, "boot": 1, "vcpus": 1, "vendor": "intel", "mcg_cap": "0x10a",
        "mce_kill": "early", "ao_channel": "auto", "ghes": null, "ao_pace": { "burst": 16, "rate": 10 },
        "on_undeliverable": "stop", "paused": false, "pause_reason": null, "memory": [],
    }))
    .unwrap();
    let (before, begun) = (resident(), Instant::now());
    let (mut largest, mut bytes, mut most) = (0, 0, 0.0_f64);
    for (index, piece) in StatusPieces::new(handle, &info).enumerate() {
        (largest, bytes) = (largest.max(piece.len()), bytes + piece.len());
        if index % 512 == 0 {
            most = most.max(resident() - before);
        }
    }
    let took = begun.elapsed().as_secs_f64();
    let figure = |what: &str, unit: &str, value, goal| Figure {
        what: what.into(),
        unit: unit.into(),
        series: vec![Series::new(US, vec![value])],
        goal,
        command: "make bench FIGURES=ledger".into(),
        note: format!("{bytes} bytes of JSON in pieces of at most {largest}"),
    };
    [
        figure("status of 1,048,576 pages: memory it takes", "MiB", most, Goal::AtMost(1.0)),
        figure("status of 1,048,576 pages: time", "s", took, Goal::Shown),
    ]
}
