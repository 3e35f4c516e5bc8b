//! A relay without a thread of its own, in an event loop of the host's.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test says what it saw by panicking")]

mod forge;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use std::{io, ptr};

use forge::{BUS_MCEERR_AO, forge};
use mce_relay::mca::{BANKS, Caps, McaState, Record, Vendor, cap};
use mce_relay::{
    Event, ExitByte, KillPolicy, Mca, Polled, RamMap, RamRegion, Relay, Signals, Verdict, signal,
};

use std::sync::atomic::{AtomicU64, Ordering};

const LEN: u64 = 0x10_0000;
const GPA: u64 = 0x10_0000;

const CAPS: Caps = Caps { vendor: Vendor::Amd, mcg_cap: cap::CTL_P | BANKS as u64, succor: true };

/// A vCPU that takes whatever it is told, once it has the time.
struct Model(McaState);

impl Mca for Model {
    fn state(&mut self) -> io::Result<McaState> {
        Ok(self.0)
    }

    fn inject(&mut self, record: &Record) -> io::Result<()> {
        self.0.banks[usize::from(record.bank)].status = record.status;
        self.0.mcg_status = record.mcg_status;
        Ok(())
    }
}

/// The relays of one process hand each other what is not theirs: each has addresses of its own.
fn hva() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0x7f00_0000_0000);
    NEXT.fetch_add(1 << 32, Ordering::Relaxed)
}

fn start(vcpus: usize) -> (Relay, Polled, Receiver<Event>) {
    start_at(hva(), vcpus)
}

fn start_at(hva: u64, vcpus: usize) -> (Relay, Polled, Receiver<Event>) {
    let (tx, rx) = channel();
    // SAFETY: nothing is mapped there.
    let ram = RamMap::new(&[unsafe { RamRegion::new(hva, GPA, LEN) }]).unwrap();
    let observer = move |event: &Event| drop(tx.send(event.clone()));
    let relay = Relay::builder(ram).vcpus(vcpus).machine_checks(CAPS).observer(observer);
    let (relay, polled) = relay.start_polled().unwrap();
    (relay, polled, rx)
}

/// Whether `fd` is readable within `limit`.
fn is_readable(fd: BorrowedFd<'_>, limit: Duration) -> bool {
    let mut fd = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let limit = i32::try_from(limit.as_millis()).unwrap();
    // SAFETY: one live pollfd.
    let ready = unsafe { libc::poll(&raw mut fd, 1, limit) };
    assert!(ready >= 0, "{}", io::Error::last_os_error());
    ready == 1 && fd.revents == libc::POLLIN
}

/// Lets the loop turn until nothing is due for `pause`.
fn settle(polled: &mut Polled, pause: Duration) {
    let start = Instant::now();
    while is_readable(polled.as_fd(), pause) {
        polled.process();
        assert!(start.elapsed() < Duration::from_secs(10), "it does not come to rest");
    }
}

fn is_blocked() -> bool {
    // SAFETY: pthread_sigmask writes the set before it is read.
    unsafe {
        let mut now = std::mem::zeroed::<libc::sigset_t>();
        libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), &raw mut now);
        libc::sigismember(&raw const now, libc::SIGBUS) == 1
    }
}

#[test]
fn a_signal_makes_it_readable() {
    let hva = hva();
    let (relay, mut polled, events) = start_at(hva, 0);
    settle(&mut polled, Duration::from_millis(50));
    events.try_iter().for_each(drop);
    assert!(is_blocked() && KillPolicy::get().unwrap() == KillPolicy::Early);
    forge(BUS_MCEERR_AO, hva + 0x3000, 12);
    assert!(relay.pages().is_empty(), "the signal is pending");
    let start = Instant::now();
    assert!(is_readable(polled.as_fd(), Duration::from_secs(5)));
    assert!(start.elapsed() < Duration::from_millis(500), "by the signal, not by a timer");
    polled.process();
    assert_eq!(relay.pages()[0].gpa, GPA + 0x3000);
    let seen = events.try_iter().any(|event| matches!(event, Event::Seen { .. }));
    assert!(seen, "the observer is called in `process`");
    assert!(is_blocked());
    settle(&mut polled, Duration::from_millis(50));
}

#[test]
fn it_is_nested_in_the_hosts_epoll() {
    let hva = hva();
    let (relay, mut polled, _events) = start_at(hva, 0);
    settle(&mut polled, Duration::from_millis(50));
    // SAFETY: epoll_create1 takes no pointer; both descriptors are open, and the event is live.
    let host = unsafe {
        let host = libc::epoll_create1(libc::EPOLL_CLOEXEC);
        let mut event = libc::epoll_event { events: libc::EPOLLIN.cast_unsigned(), u64: 7 };
        let fd = polled.as_raw_fd();
        assert_eq!(libc::epoll_ctl(host, libc::EPOLL_CTL_ADD, fd, &raw mut event), 0);
        host
    };
    forge(BUS_MCEERR_AO, hva + 0x5000, 12);
    let mut event = libc::epoll_event { events: 0, u64: 0 };
    // SAFETY: room for one event.
    assert_eq!(unsafe { libc::epoll_wait(host, &raw mut event, 1, 5000) }, 1);
    let of = event.u64;
    assert_eq!(of, 7);
    polled.process();
    assert_eq!(relay.pages()[0].gpa, GPA + 0x5000);
    // SAFETY: made above, and closed once.
    unsafe { libc::close(host) };
}

#[test]
fn a_vcpu_that_cannot_be_told_is_called_again_when_its_time_has_come() {
    let hva = hva();
    let (relay, mut polled, events) = start_at(hva, 1);
    let handle = relay.handle();
    let (kicks, kicked) = channel();
    let vcpu = std::thread::spawn(move || {
        let mut port = handle.attach(0, ExitByte::NONE, move || kicks.send(()).unwrap()).unwrap();
        assert!(!is_blocked(), "of a vCPU's thread it is unblocked");
        let mut vcpu = Model(McaState { cr4_mce: true, interrupts_on: true, ..McaState::up() });
        // A machine check is under way in the guest.
        vcpu.0.mcg_status = mce_relay::mca::mcg::MCIP;
        let mut calls = 0;
        while vcpu.0.banks.iter().all(|bank| bank.status == 0) {
            kicked.recv_timeout(Duration::from_secs(10)).expect("it is called");
            calls += 1;
            if calls == 3 {
                vcpu.0.mcg_status = 0;
            }
            port.clear_exit();
            assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
        }
        assert!(calls >= 3, "it is told too early");
    });
    forge(BUS_MCEERR_AO, hva + 0x7000, 12);
    let start = Instant::now();
    while !vcpu.is_finished() {
        if is_readable(polled.as_fd(), Duration::from_millis(100)) {
            polled.process();
        }
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", relay.pages());
    }
    vcpu.join().unwrap();
    let injected = events.try_iter().any(|event| matches!(event, Event::Injected { .. }));
    assert!(injected, "{:?}", relay.pages());
}

#[test]
fn others_wake_it() {
    let hva = hva();
    let (relay, mut polled, _events) = start_at(hva, 0);
    settle(&mut polled, Duration::from_millis(50));
    let handle = relay.handle();
    // SAFETY: nothing is mapped there.
    let more = unsafe { RamRegion::new(hva + (1 << 30), 1 << 32, 4096) };
    std::thread::spawn(move || handle.add_ram(more).unwrap()).join().unwrap();
    let start = Instant::now();
    assert!(is_readable(polled.as_fd(), Duration::from_secs(5)));
    assert!(start.elapsed() < Duration::from_millis(500), "by the call, not by a timer");
    polled.process();
}

#[test]
fn an_ao_of_another_thread_is_found_within_a_second() {
    let hva = hva();
    let (relay, mut polled, _events) = start_at(hva, 0);
    settle(&mut polled, Duration::from_millis(50));
    std::thread::spawn(move || {
        // It is inherited that SIGBUS is blocked.
        mask(libc::SIG_UNBLOCK);
        forge(BUS_MCEERR_AO, hva + 0x9000, 12);
    })
    .join()
    .unwrap();
    let start = Instant::now();
    // Another test's relay may take it, and hands it over.
    while relay.pages().is_empty() {
        if is_readable(polled.as_fd(), Duration::from_millis(100)) {
            polled.process();
        }
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}

/// Blocks or unblocks (`how`) SIGBUS on this thread.
fn mask(how: libc::c_int) {
    // SAFETY: the set is initialised before it is read.
    unsafe {
        let mut bus = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut bus);
        libc::sigaddset(&raw mut bus, libc::SIGBUS);
        libc::pthread_sigmask(how, &raw const bus, ptr::null_mut());
    }
}

#[test]
fn a_signal_within_process_is_seen_at_once() {
    let hva = hva();
    // SAFETY: nothing is mapped there.
    let ram = RamMap::new(&[unsafe { RamRegion::new(hva, GPA, LEN) }]).unwrap();
    let once = std::sync::atomic::AtomicBool::new(false);
    let observer = move |event: &Event| {
        if matches!(event, Event::Seen { .. }) && !once.swap(true, Ordering::Relaxed) {
            // The next page goes bad while the first is being told.
            forge(BUS_MCEERR_AO, hva + 0x5000, 12);
        }
    };
    let (relay, mut polled) = Relay::builder(ram).observer(observer).start_polled().unwrap();
    settle(&mut polled, Duration::from_millis(50));
    forge(BUS_MCEERR_AO, hva + 0x3000, 12);
    let start = Instant::now();
    while relay.pages().len() < 2 {
        assert!(is_readable(polled.as_fd(), Duration::from_secs(5)));
        polled.process();
    }
    assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
}

#[test]
fn a_mask_that_had_it_blocked_is_restored() {
    mask(libc::SIG_BLOCK);
    let (relay, polled, _events) = start(0);
    drop(polled);
    drop(relay);
    assert!(is_blocked());
}

#[test]
fn another_relay_may_be_started_on_its_thread() {
    let (_relay, _polled, _events) = start(0);
    // SAFETY: nothing is mapped there.
    let ram = RamMap::new(&[unsafe { RamRegion::new(hva(), GPA, LEN) }]).unwrap();
    let other = Relay::builder(ram).start().unwrap();
    let (policy, blocked) = (KillPolicy::get().unwrap(), is_blocked());
    drop(other);
    assert_eq!((policy, blocked), (KillPolicy::Early, true));
}

#[test]
fn what_is_left_of_the_thread_is_as_before() {
    let (relay, polled, _events) = start(0);
    let handle = relay.handle();
    assert!(handle.is_alive());
    drop(polled);
    assert!(!handle.is_alive() && !is_blocked());
    assert_eq!(KillPolicy::get().unwrap(), KillPolicy::Late);
    // The thread can have another one.
    drop(relay);
    let (relay, mut polled, _events) = start(0);
    drop(relay);
    polled.process();
    assert!(is_blocked(), "until it is dropped");
    drop(polled);
    assert!(!is_blocked());
    let failed = Relay::builder(RamMap::new(&[]).unwrap())
        .on_thread(|| Err(io::Error::other("no")))
        .start_polled();
    assert!(failed.is_err() && !is_blocked());
    assert_eq!(KillPolicy::get().unwrap(), KillPolicy::Late);
    signal::request_exit();
    drop(Relay::builder(RamMap::new(&[]).unwrap()).signals(Signals::Install).start().unwrap());
}
