//! A host process with a SIGBUS handler of some kind and a relay: `handlers HOW`.
//!
//! `std` has what a Rust program has; `before` a handler of its own that the relay comes after; `after`
//! one that is installed over the relay's and calls that; `host` one that the relay leaves alone, and that
//! shows it what comes (`mce_relay::signal::handle`); `replaced` one that takes the place of the relay's between two
//! relays, as it might between two boots. It takes an AO and an AR of guest RAM, says so, and
//! then meets what is not the relay's.
#![allow(clippy::unwrap_used, reason = "it says what it saw by panicking")]

use std::error::Error;
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::process::ExitCode;
use std::sync::OnceLock;
use std::sync::mpsc::channel;
use std::time::Duration;

use libc::{c_int, c_void, siginfo_t};
use mce_relay::signal::handle;
use mce_relay::{
    Event, ExitByte, FailureKind, Handled, RamMap, RamRegion, Relay, Signals, StartError,
};
use mce_relay_tests::ready::{Ready, forge_ar};

/// Nothing is there, and nothing has to be: the signals are forged.
const HVA: u64 = 0x7f00_0000_0000;
const OUTSIDE: usize = 0x1234_5000;

/// The action that was there before the one that is installed over it.
static BELOW: OnceLock<libc::sigaction> = OnceLock::new();

/// A stretch of addresses where nothing is mapped, or where there is memory that is this program's for this alone.
fn region(hva: u64, gpa: u64, len: u64) -> RamRegion {
    // SAFETY: no reference of Rust's leads there.
    unsafe { RamRegion::new(hva, gpa, len) }
}

/// Says what it was called for, with a write of its own.
fn say(who: &str, info: &siginfo_t) {
    // SAFETY: an address is there for codes above 0, and reading it does no harm for the others.
    let addr = if info.si_code > 0 { unsafe { info.si_addr() }.addr() } else { 0 };
    println!("{who}: si_code {} at {addr:#x}", info.si_code);
    let _ = io::stdout().flush();
}

extern "C" fn foreign(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo with SA_SIGINFO.
    say("foreign handler", unsafe { &*info });
}

extern "C" fn hosts(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: as above.
    let info = unsafe { &*info };
    if handle(info) == Handled::NotOurs {
        say("host's handler", info);
    }
}

extern "C" fn over(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let Some(below) = BELOW.get() else { return };
    // SAFETY: the relay's action has a handler of this form.
    let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
        unsafe { std::mem::transmute(below.sa_sigaction) };
    handler(signal, info, context);
}

fn install(handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void)) -> libc::sigaction {
    // SAFETY: sigaction is plain data; all zero is a valid value to start from.
    let mut new: libc::sigaction = unsafe { std::mem::zeroed() };
    new.sa_sigaction = handler as usize;
    new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    let mut before = MaybeUninit::uninit();
    // SAFETY: a complete action, and room for the one before.
    assert_eq!(unsafe { libc::sigaction(libc::SIGBUS, &raw const new, before.as_mut_ptr()) }, 0);
    // SAFETY: the kernel has filled it.
    unsafe { before.assume_init() }
}

fn start(
    signals: Signals,
    observer: impl Fn(&Event) + Send + Sync + 'static,
) -> Result<Relay, StartError> {
    let ram = RamMap::new(&[region(HVA, 0, 1 << 20)]).unwrap();
    let relay = Relay::builder(ram).vcpus(1).machine_checks(Ready::CAPS);
    relay.signals(signals).observer(observer).start()
}

fn main() -> ExitCode {
    let how = std::env::args().nth(1).unwrap_or_default();
    let signals = match how.as_str() {
        "std" | "after" => Signals::Install,
        "before" => {
            install(foreign);
            Signals::Install
        }
        "host" => {
            install(hosts);
            Signals::Host
        }
        "replaced" => {
            start(Signals::Install, |_| ()).unwrap();
            install(hosts);
            // Nothing is told by a relay whose signals another handler has.
            let refused = start(Signals::Install, |_| ()).map(drop).unwrap_err();
            println!("{refused}: {}", refused.source().unwrap());
            Signals::Host
        }
        other => {
            eprintln!("handlers: got {other:?}, expected std, before, after, host or replaced");
            return ExitCode::from(2);
        }
    };
    let (send, events) = channel();
    let relay = start(signals, move |event| drop(send.send(event.clone()))).unwrap();
    if how == "after" {
        let _ = BELOW.set(install(over));
    }
    let seen = |kind| loop {
        match events.recv_timeout(Duration::from_secs(10)).unwrap() {
            Event::Seen { gpa, kind: found, .. } if found == kind => return gpa,
            _ => {}
        }
    };
    relay.handle().forge(0x1000, None).unwrap();
    println!("AO at {:#x}", seen(FailureKind::ActionOptional));
    let mut port = relay.attach(0, ExitByte::NONE, || {}).unwrap();
    let mut vcpu = Ready::default();
    forge_ar(usize::try_from(HVA).unwrap() + 0x5000);
    let _ = port.before_run(&mut vcpu);
    println!("AR at {:#x}", seen(FailureKind::ActionRequired));

    println!("an AR that is not the guest's");
    let _ = io::stdout().flush();
    forge_ar(OUTSIDE);
    // It is stored like any other on this thread, and found out here.
    let _ = port.before_run(&mut vcpu);
    println!("kill -BUS");
    let _ = io::stdout().flush();
    // SAFETY: sends a signal to this process.
    unsafe { libc::raise(libc::SIGBUS) };
    println!("lives");
    ExitCode::SUCCESS
}
