//! Hosts that misbehave, and what a VMM may do with the relay.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use mce_relay::internals::flush;
use mce_relay::mca::{McaState, Record, cap};
use mce_relay::{
    Bell, ErrorSource, Event, ExitByte, FailureKind, Form, FoundBy, Handle, Ledger, Mca,
    NoMachineChecks, RamError, RamMap, Relay, State, UndeliverableReason, Verdict,
};

use crate::forge::{BUS_MCEERR_AO, BUS_MCEERR_AR, forge};
use crate::model::*;

fn sigbus_is_blocked() -> bool {
    // SAFETY: a null new mask only reads the one in force into the live local.
    unsafe {
        let mut mask = std::mem::zeroed::<libc::sigset_t>();
        libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut mask);
        libc::sigismember(&raw const mask, libc::SIGBUS) == 1
    }
}

/// KVM_RUN would try again for ever: its AR is not forced.
#[test]
fn sigbus_that_somebody_has_blocked_is_unblocked() {
    on_own_thread(|| {
        // SAFETY: the set is initialised before it is read.
        unsafe {
            let mut bus = std::mem::zeroed::<libc::sigset_t>();
            libc::sigemptyset(&raw mut bus);
            libc::sigaddset(&raw mut bus, libc::SIGBUS);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const bus, std::ptr::null_mut());
        }
        assert!(sigbus_is_blocked());
        let (relay, _events) = start(1, amd());
        let mut port = attach(&relay, 0);
        assert!(!sigbus_is_blocked());
        forge(BUS_MCEERR_AR, HVA, 12);
        assert_eq!(port.before_run(&mut Vcpu::new()), Verdict::Run);
        assert_eq!(relay.pages().len(), 1);
    });
}

#[test]
fn a_page_that_was_never_told_waits_in_the_next_relay() {
    on_own_thread(|| {
        let now = SystemTime::now();
        let mut ledger = Ledger::default();
        for page in 0..2 {
            let (gpa, hva) = (GPA + page * 4096, HVA + page * 4096);
            assert!(ledger.enter(gpa, hva, 12, FailureKind::ActionOptional, FoundBy::Signal, now));
        }
        let place = mce_relay::Place::Mce { vcpu: 0, bank: 9, form: Form::Srao };
        assert!(ledger.set(GPA, State::Acknowledged { place }, now));
        // Of a restored guest the told one is good again, and the other cannot be called so.
        assert_eq!(ledger.replace(GPA, now), Ok(true));
        let untold = ledger.replace(GPA + 4096, now).unwrap_err();
        assert!(untold.to_string().contains("0x101000"), "{untold}");
        let (config, events) = config(1, intel(cap::LMCE_P), ram());
        let relay = config.ledger(ledger).start().unwrap();
        let mut vcpu = Vcpu::new();
        vcpu.state.lock().unwrap().lmce = true;
        let mut port = attach(&relay, 0);
        assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
        flush(&relay.handle());
        assert_eq!(forms(&events), [(GPA + 4096, Form::Srao)]);
    });
}

/// A kick that takes a lock of the VMM's, under which another thread uses the relay.
#[test]
fn a_kick_may_take_a_lock_of_the_hosts() {
    on_own_thread(|| {
        let (relay, _events) = start(1, amd());
        let relay = Arc::new(relay);
        let lock = Arc::new(Mutex::new(()));
        let kicks = Arc::new(AtomicU32::new(0));
        let kick = {
            let (lock, kicks) = (Arc::clone(&lock), Arc::clone(&kicks));
            move || {
                drop(lock.lock());
                kicks.fetch_add(1, Ordering::Relaxed);
            }
        };
        let port = relay.attach(0, ExitByte::NONE, Box::new(kick)).unwrap();
        let (done, told) = channel();
        let user = std::thread::spawn({
            let (relay, lock, kicks) = (Arc::clone(&relay), Arc::clone(&lock), Arc::clone(&kicks));
            move || {
                while kicks.load(Ordering::Relaxed) < 50 {
                    let _held = lock.lock();
                    assert!(relay.pages().is_empty());
                }
                done.send(()).unwrap();
            }
        });
        // Meanwhile the relay's thread has the vCPU called.
        let start = Instant::now();
        while told.try_recv().is_err() {
            assert!(start.elapsed() < PATIENCE, "they wait for each other");
            relay.handle().forge(GPA, Some(0)).unwrap();
        }
        user.join().unwrap();
        drop(port);
    });
}

#[test]
fn a_host_that_panics_does_not_take_the_relay_along() {
    on_own_thread(|| {
        let (tx, events) = channel();
        let observer = move |event: &Event| {
            tx.send(event.clone()).unwrap();
            assert!(!matches!(event, Event::Caught { .. }), "a host's own defect");
        };
        let relay = Relay::builder(ram())
            .vcpus(1)
            .machine_checks(amd())
            .observer(observer)
            .start()
            .unwrap();
        let kick = || panic!("a host's own defect");
        let port = relay.attach(0, ExitByte::NONE, Box::new(kick)).unwrap();
        for page in 0..3 {
            relay.handle().forge(GPA + page * 4096, None).unwrap();
        }
        let start = Instant::now();
        while relay.pages().len() < 3 {
            assert!(start.elapsed() < PATIENCE, "{:?}", relay.pages());
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(relay.handle().is_alive());
        drop(port);
        let handle = relay.handle();
        drop(relay);
        assert!(events.try_iter().count() >= 3, "each was given");
        assert!(!handle.is_alive(), "it has ended");
    });
}

/// The thread is not there in the child, and its locks may be held for ever.
#[test]
fn a_forked_child_that_drops_a_relay_ends() {
    on_own_thread(|| {
        let (relay, _events) = start(1, amd());
        let port = attach(&relay, 0);
        // SAFETY: the child drops what this test made, and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            drop(port);
            drop(relay);
            // SAFETY: ends the process.
            unsafe { libc::_exit(0) };
        }
        let start = Instant::now();
        let mut status = 0;
        // SAFETY: a child that has not been waited for; `status` is a live local.
        while unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) } == 0 {
            if start.elapsed() > PATIENCE {
                // SAFETY: as above.
                unsafe { libc::kill(child, libc::SIGKILL) };
                panic!("the child does not end");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(status, 0);
        assert!(relay.handle().is_alive());
    });
}

struct Silent;

impl Bell for Silent {
    fn ring(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn the_error_sources_page_stays() {
    on_own_thread(|| {
        let regions = [region(own_page(), 0, 4096), region(HVA, GPA, 4096)];
        let (config, _events) = config(1, amd(), RamMap::new(&regions).unwrap());
        let source = ErrorSource::new(0, Silent).patience(Duration::from_secs(1));
        let relay = config.error_source(source).start().unwrap();
        let error = relay.handle().remove_ram(0).unwrap_err();
        assert_eq!(error, RamError::Source { gpa: 0, page: 0 });
        assert_eq!(relay.handle().remove_ram(GPA).unwrap(), regions[1]);
    });
}

/// A VMM on an architecture without machine checks: nothing can be told, and nothing is lost.
#[test]
fn a_relay_without_machine_checks() {
    for code in [BUS_MCEERR_AO, BUS_MCEERR_AR] {
        on_own_thread(move || {
            let (tx, events) = channel();
            let observer = move |event: &Event| drop(tx.send(event.clone()));
            let relay = Relay::builder(ram()).vcpus(1).observer(observer).start().unwrap();
            let mut port = attach(&relay, 0);
            forge(code, HVA, 12);
            let verdict = port.before_run(&mut NoMachineChecks);
            let no_entry = matches!(verdict, Verdict::Undeliverable { gpa: GPA, .. });
            assert_eq!(no_entry, code == BUS_MCEERR_AR, "{verdict:?}");
            let why = UndeliverableReason::NoForm;
            assert_eq!(gpas(&relay, |state| *state == State::Undeliverable { why }), [GPA]);
            drop(relay);
            assert!(events.try_iter().any(|event| matches!(event, Event::Undeliverable { .. })));
        });
    }
}

/// A back end that panics has refused: the guest was not told.
#[test]
fn a_back_end_that_panics_has_told_nobody() {
    struct Panics(Vcpu);
    impl Mca for Panics {
        fn state(&mut self) -> io::Result<McaState> {
            self.0.state()
        }

        fn inject(&mut self, _: &Record) -> io::Result<()> {
            panic!("the host's own defect")
        }
    }
    on_own_thread(|| {
        let (relay, _events) = start(1, amd());
        let mut port = attach(&relay, 0);
        let mut vcpu = Panics(Vcpu::new());
        forge(BUS_MCEERR_AR, HVA, 12);
        let verdict = port.before_run(&mut vcpu);
        assert!(matches!(verdict, Verdict::Undeliverable { gpa: GPA, .. }), "{verdict:?}");
        // It comes round once more, and finds an empty bank.
        relay.handle().forge(GPA + 0x1000, None).unwrap();
        let start = Instant::now();
        while relay.pages().len() < 2 {
            assert!(start.elapsed() < PATIENCE);
            let _ = port.before_run(&mut vcpu);
        }
        let why = UndeliverableReason::Refused;
        assert_eq!(gpas(&relay, |state| *state == State::Undeliverable { why }), [GPA]);
    });
}

/// Who only looks may hold a lock that the observer takes: it is called by those who have something to say.
#[test]
fn who_only_looks_calls_nobody() {
    on_own_thread(|| {
        let threads: Arc<Mutex<Vec<std::thread::ThreadId>>> = Arc::default();
        let seen = Arc::clone(&threads);
        let observer = move |_: &Event| {
            seen.lock().unwrap().push(std::thread::current().id());
            std::thread::sleep(Duration::from_micros(100));
        };
        let relay = Relay::builder(ram()).vcpus(1).machine_checks(amd()).observer(observer);
        let relay = relay.start().unwrap();
        let (handle, over) = (relay.handle(), Arc::new(AtomicBool::new(false)));
        let looks = std::thread::spawn({
            let over = Arc::clone(&over);
            move || {
                while !over.load(Ordering::Relaxed) {
                    drop((handle.pages(), handle.whole_parts(GPA..GPA + 0x1000)));
                    assert!(!handle.mmio_hit(0, 0xfee0_0000));
                }
                std::thread::current().id()
            }
        });
        let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 0));
        for page in 0..PAGES {
            forge(BUS_MCEERR_AO, HVA + page * 4096, 12);
            assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
        }
        over.store(true, Ordering::Relaxed);
        let looked = looks.join().unwrap();
        drop(relay);
        let threads = threads.lock().unwrap();
        assert!(threads.len() > 256 && !threads.contains(&looked), "{}", threads.len());
    });
}

/// The observer may use the relay, and whoever waits for it holds up nobody else.
#[test]
fn an_observer_may_use_the_relay() {
    on_own_thread(|| {
        let handle: Arc<Mutex<Option<Handle>>> = Arc::default();
        let (own, (tx, events)) = (Arc::clone(&handle), channel());
        let observer = move |event: &Event| {
            let known = own.lock().unwrap().as_ref().map_or(0, |handle| handle.pages().len());
            let _ = tx.send((event.clone(), known));
        };
        let relay = Relay::builder(ram()).vcpus(1).machine_checks(amd()).observer(observer);
        let relay = relay.start().unwrap();
        *handle.lock().unwrap() = Some(relay.handle());
        let (mut vcpu, mut port) = (Vcpu::new(), attach(&relay, 0));
        forge(BUS_MCEERR_AR, HVA, 12);
        assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
        flush(&relay.handle());
        let seen: Vec<_> = events.try_iter().collect();
        let is_injected = |(event, known): &(Event, usize)| {
            matches!(event, Event::Injected { .. }) && *known == 1
        };
        assert!(seen.iter().any(is_injected), "{seen:?}");
        *handle.lock().unwrap() = None;
    });
}
