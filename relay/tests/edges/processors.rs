//! Processors that are offline, unplugged or do not come round.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use mce_relay::internals::flush;
use mce_relay::mca::{BANKS, Caps, cap, status};
use mce_relay::{AttachError, Event, ExitByte, VcpuPort, Verdict};

use crate::forge::{BUS_MCEERR_AO, BUS_MCEERR_AR, forge};
use crate::model::*;

#[test]
fn a_bystander_that_is_offline_holds_up_nobody() {
    for takes_back in [true, false] {
        on_own_thread(move || {
            let (relay, _events) = start(2, intel(0));
            let vcpus = [Vcpu::new(), Vcpu { takes_back, ..Vcpu::offline() }];
            run_until(relay, &vcpus, aos(8), all_told(8));
        });
    }
}

#[test]
fn the_boot_processor_may_be_the_one_that_is_offline() {
    for (caps, name) in [(intel(0), "rendezvous"), (intel(cap::LMCE_P), "LMCE"), (amd(), "AMD")] {
        on_own_thread(move || {
            println!("{name}");
            let (relay, events) = start(3, caps);
            let vcpus = [Vcpu::offline(), Vcpu::new(), Vcpu::offline()];
            vcpus.iter().for_each(|vcpu| vcpu.state.lock().unwrap().lmce = caps.has(cap::LMCE_P));
            run_until(relay, &vcpus, aos(20), all_told(20));
            for event in events.try_iter() {
                if let Event::Acknowledged { place, .. } = event {
                    assert!(place.to_string().contains("vCPU 1"), "{place}");
                }
            }
        });
    }
}

/// The records are laid where the processor polls, and then it is taken offline.
#[test]
fn what_lies_in_an_offline_processors_banks_is_told_elsewhere() {
    let busy = io::ErrorKind::ResourceBusy;
    // How often emptying a bank fails, how often it is asked for, how many records stay.
    for (fails, error, asked, stay) in
        [(0, busy, 3, 0), (2, busy, 5, 0), (9, busy, 3, 3), (9, io::ErrorKind::Unsupported, 1, 3)]
    {
        told_elsewhere((fails, error), asked, stay);
    }
}

fn told_elsewhere(fails: (u32, io::ErrorKind), asked: u32, stay: usize) {
    on_own_thread(move || {
        let (relay, events) = start(2, amd());
        let (mut first, mut second) = (Vcpu::new(), Vcpu::new());
        *first.fails.lock().unwrap() = fails;
        let mut port = attach(&relay, 0);
        // A guest that is up for a second may be laid records into.
        assert_eq!(port.before_run(&mut first), Verdict::Run);
        std::thread::sleep(Duration::from_millis(1100));
        for (code, hva) in aos(3) {
            forge(code, hva, 12);
            assert_eq!(port.before_run(&mut first), Verdict::Run);
        }
        assert_eq!(first.records().len(), 3);
        // It goes offline with them.
        *first.processor.lock().unwrap() = Processor::Offline;
        {
            let mut state = first.state.lock().unwrap();
            (state.interrupts_on, state.halted) = (false, true);
        }
        let relay = Arc::new(relay);
        let over = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (relay, over) = (Arc::clone(&relay), Arc::clone(&over));
            move || {
                let mut port = attach(&relay, 1);
                while !over.load(Ordering::Relaxed) {
                    assert_eq!(port.before_run(&mut second), Verdict::Run);
                    second.run();
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        });
        let start = Instant::now();
        while gpas(&relay, is_acknowledged).len() < 3 {
            assert!(start.elapsed() < PATIENCE, "{:#?}", relay.pages());
            assert_eq!(port.before_run(&mut first), Verdict::Run);
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(first.records().len(), stay, "what the processor would read when it is back");
        assert_eq!(first.asked.load(Ordering::Relaxed), asked, "{fails:?}");
        over.store(true, Ordering::Relaxed);
        thread.join().unwrap();
        flush(&relay.handle());
        let elsewhere = events.try_iter().filter(|event| {
            matches!(event, Event::Waiting { wait, .. } if wait.to_string().contains("offline"))
        });
        assert_eq!(elsewhere.count(), 3);
    });
}

#[test]
fn an_unplugged_vcpus_records_and_touches_are_told_elsewhere() {
    on_own_thread(|| {
        let (relay, _events) = start(2, amd());
        let relay = Arc::new(relay);
        let unplugged = std::thread::spawn({
            let relay = Arc::clone(&relay);
            move || {
                let mut vcpu = Vcpu::new();
                let mut port = attach(&relay, 1);
                assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
                std::thread::sleep(Duration::from_millis(1100));
                // A record in a bank, and a touch that is in the slot when the port goes.
                forge(BUS_MCEERR_AO, HVA, 12);
                assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
                assert_eq!(vcpu.records().len(), 1);
                forge(BUS_MCEERR_AR, HVA + 0x1000, 12);
                drop(port);
            }
        });
        unplugged.join().unwrap();
        let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 0));
        run_until_told(&relay, &mut port, &mut vcpu, &[GPA, GPA + 0x1000]);
    });
}

#[test]
fn a_vcpu_that_does_not_come_round_holds_nobody_for_long() {
    on_own_thread(|| {
        let (relay, events) = start(2, intel(0));
        let relay = Arc::new(relay);
        let (let_go, held) = channel::<()>();
        let is_attached = Arc::new(Barrier::new(2));
        let stuck = std::thread::spawn({
            let (relay, is_attached) = (Arc::clone(&relay), Arc::clone(&is_attached));
            move || {
                let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 1));
                is_attached.wait();
                // In a device of the VMM's, say.
                held.recv().unwrap();
                let start = Instant::now();
                while !vcpu.state.lock().unwrap().mcip() {
                    assert!(start.elapsed() < PATIENCE, "not called");
                    assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        });
        is_attached.wait();
        let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 0));
        forge(BUS_MCEERR_AO, HVA, 12);
        let mut longest = Duration::ZERO;
        for _ in 0..20 {
            let start = Instant::now();
            assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
            longest = longest.max(start.elapsed());
            std::thread::sleep(Duration::from_millis(20));
        }
        println!("held for {longest:?} at most");
        assert!(longest < Duration::from_secs(5), "held for {longest:?}");
        let waits = |event: &Event| matches!(event, Event::Waiting { wait, .. } if wait.to_string().contains("does not come"));
        flush(&relay.handle());
        assert!(events.try_iter().any(|event| waits(&event)));
        let_go.send(()).unwrap();
        let start = Instant::now();
        while !vcpu.state.lock().unwrap().mcip() {
            assert!(start.elapsed() < PATIENCE, "{:#?}", relay.pages());
            assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
            std::thread::sleep(Duration::from_millis(1));
        }
        stuck.join().unwrap();
    });
}

/// Its thread is held up by something of the host's.
#[test]
fn an_ao_does_not_wait_for_a_vcpu_that_does_not_come() {
    on_own_thread(|| {
        let (relay, _events) = start(2, intel(cap::LMCE_P));
        let relay = Arc::new(relay);
        let (attached, is_attached) = channel();
        let (let_go, held) = channel::<()>();
        let other = std::thread::spawn({
            let relay = Arc::clone(&relay);
            move || {
                let _port = attach(&relay, 0);
                attached.send(()).unwrap();
                held.recv().unwrap();
            }
        });
        is_attached.recv().unwrap();
        let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 1));
        vcpu.state.lock().unwrap().lmce = true;
        forge(BUS_MCEERR_AO, HVA, 12);
        run_until_told(&relay, &mut port, &mut vcpu, &[GPA]);
        let_go.send(()).unwrap();
        other.join().unwrap();
    });
}

/// A vCPU is seen at first as one that waits for its start-up IPI, then started by the guest, which nobody sees.
fn started_unseen(vcpu: &mut Vcpu, port: &mut VcpuPort) {
    let set = |vcpu: &Vcpu, started: bool| {
        let mut state = vcpu.state.lock().unwrap();
        (state.waits_for_sipi, state.cr4_mce, state.interrupts_on) = (!started, started, started);
    };
    set(vcpu, false);
    assert_eq!(port.before_run(vcpu), Verdict::Run);
    set(vcpu, true);
}

/// To an offline processor an SRAO is nothing, and to the others it is a machine check from nowhere: they panic.
#[test]
fn the_error_of_a_rendezvous_goes_to_a_processor_that_is_online() {
    for spins in [false, true] {
        on_own_thread(move || {
            let (relay, _events) = start(2, intel(0));
            let relay = Arc::new(relay);
            let over = Arc::new(AtomicBool::new(false));
            let (ready, is_ready) = channel();
            let online = std::thread::spawn({
                let (relay, over) = (Arc::clone(&relay), Arc::clone(&over));
                move || {
                    let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 1));
                    started_unseen(&mut vcpu, &mut port);
                    ready.send(()).unwrap();
                    for look in 0.. {
                        if over.load(Ordering::Relaxed) {
                            break;
                        }
                        // It, too, has interrupts off at most looks.
                        vcpu.state.lock().unwrap().interrupts_on = !spins || look % 3 == 0;
                        assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
                        vcpu.run();
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
            });
            let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 0));
            assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
            is_ready.recv().unwrap();
            *vcpu.processor.lock().unwrap() = Processor::Offline;
            (vcpu.state.lock().unwrap().interrupts_on, vcpu.state.lock().unwrap().halted) =
                (false, true);
            for page in 0..4 {
                forge(BUS_MCEERR_AO, HVA + page * 4096, 12);
                let start = Instant::now();
                while gpas(&relay, is_acknowledged).len() as u64 <= page {
                    assert!(start.elapsed() < PATIENCE, "{:#?}", relay.pages());
                    assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
                    let is_error = |record: &u64| record & status::EN != 0;
                    assert!(
                        !vcpu.records().iter().any(is_error),
                        "page {page}: {:x?}",
                        vcpu.records()
                    );
                    if spins && vcpu.state.lock().unwrap().mcip() {
                        // As after a crash: `halt(); for (;;) cpu_relax();`.
                        vcpu.state.lock().unwrap().halted = false;
                    }
                    vcpu.run();
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            over.store(true, Ordering::Relaxed);
            online.join().unwrap();
        });
    }
}

/// A pause is on, and another vCPU's thread is held up: who has touched a page pauses, and is not kept from it.
#[test]
fn a_pause_counts_for_more_than_a_vcpu_that_does_not_come() {
    on_own_thread(|| {
        let (relay, _events) = start(3, intel(0));
        let relay = Arc::new(relay);
        let (is_there, there) = channel();
        let (let_go, held) = channel::<()>();
        let stuck = std::thread::spawn({
            let (relay, is_there) = (Arc::clone(&relay), is_there.clone());
            move || {
                let _port = attach(&relay, 0);
                is_there.send(()).unwrap();
                held.recv().unwrap();
            }
        });
        let (resume, resumed) = channel::<()>();
        let paused = std::thread::spawn({
            let relay = Arc::clone(&relay);
            move || {
                let mut port = attach(&relay, 1);
                port.park(|| {
                    is_there.send(()).unwrap();
                    resumed.recv().unwrap();
                });
            }
        });
        there.recv().unwrap();
        there.recv().unwrap();
        let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 2));
        // It has been found out that the first does not come.
        forge(BUS_MCEERR_AO, HVA, 12);
        let start = Instant::now();
        forge(BUS_MCEERR_AR, HVA + 0x1000, 12);
        assert_eq!(
            port.before_run(&mut vcpu),
            Verdict::Run,
            "it pauses, and touches the page again"
        );
        assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
        resume.send(()).unwrap();
        let_go.send(()).unwrap();
        stuck.join().unwrap();
        paused.join().unwrap();
    });
}

#[test]
fn attaching_says_what_is_wrong() {
    on_own_thread(|| {
        let (relay, _events) = start(1, amd());
        let refused = |vcpu| relay.attach(vcpu, ExitByte::NONE, || {}).err().unwrap();
        let error = refused(5);
        assert!(matches!(error, AttachError::NoVcpu { vcpu: 5, vcpus: 1 }), "{error}");
        let _port = attach(&relay, 0);
        let error = refused(0);
        assert!(matches!(error, AttachError::Attached { vcpu: 0 }), "{error}");
    });
}

/// MCG_CAP without CTL_P: there is no MCG_CTL that could be off.
#[test]
fn a_guest_without_mcg_ctl_is_told() {
    let caps = Caps { mcg_cap: u64::from(BANKS) | cap::SER_P, ..intel(0) };
    let values: Vec<u64> =
        caps.state_msrs().iter().map(|msr| if msr % 4 == 0 { u64::MAX } else { 0 }).collect();
    assert_eq!(caps.state(&values).mcg_ctl, u64::MAX);
}
