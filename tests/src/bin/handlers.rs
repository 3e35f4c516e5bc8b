//! A host process with a SIGBUS handler of some kind and a relay: `handlers HOW`.
//!
//! `std` has what a Rust program has; `before` a handler of its own that the relay comes after; `after`
//! one that is installed over the relay's and calls that; `host` one that the relay leaves alone, and that
//! shows it what comes (`mce_relay::signal::handle`). It takes an AO and an AR of guest RAM, says so, and
//! then meets what is not the relay's.
#![allow(clippy::unwrap_used, reason = "it says what it saw by panicking")]

use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::process::ExitCode;
use std::ptr;
use std::sync::OnceLock;
use std::sync::mpsc::channel;
use std::time::Duration;

use libc::{c_int, c_void, siginfo_t};
use mce_relay::mca::{BANKS, Bank, Caps, Kind, MAX_BANKS, McaState, Record, Vendor, cap};
use mce_relay::signal::{BUS_MCEERR_AR, handle};
use mce_relay::{
    AoChannel, Config, Event, ExitByte, Handled, KillPolicy, Ledger, Mca, Pace, RamMap, RamRegion,
    Relay, Signals,
};

/// Nothing is there, and nothing has to be: the signals are forged.
const HVA: u64 = 0x7f00_0000_0000;
const OUTSIDE: usize = 0x1234_5000;

/// The action that was there before the one that is installed over it.
static BELOW: OnceLock<libc::sigaction> = OnceLock::new();

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

/// Sends this thread an AR as the kernel would.
fn forge_ar(addr: usize) {
    #[repr(C)]
    struct Info {
        signo: c_int,
        errno: c_int,
        code: c_int,
        addr: *mut c_void,
        lsb: i16,
        rest: [u8; 100],
    }
    let addr = ptr::without_provenance_mut(addr);
    let mut info =
        Info { signo: libc::SIGBUS, errno: 0, code: BUS_MCEERR_AR, addr, lsb: 12, rest: [0; 100] };
    // SAFETY: the kernel reads a siginfo, which is no longer than that.
    let done = unsafe {
        let (pid, tid) = (libc::getpid(), libc::gettid());
        libc::syscall(libc::SYS_rt_tgsigqueueinfo, pid, tid, libc::SIGBUS, &raw mut info)
    };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

/// A processor that takes everything.
struct Ready(Vec<Record>);

impl Mca for Ready {
    fn state(&mut self) -> io::Result<McaState> {
        let mut banks = [Bank { ctl: u64::MAX, status: 0 }; MAX_BANKS];
        if let Some(record) = self.0.last() {
            banks[usize::from(record.bank)].status = record.status;
        }
        Ok(McaState {
            waits_for_sipi: false,
            cr4_mce: true,
            mcg_status: self.0.last().map_or(0, |record| record.mcg_status),
            mcg_ctl: u64::MAX,
            lmce: false,
            event_in_flight: false,
            interrupts_on: true,
            rip: 0,
            banks,
        })
    }

    fn inject(&mut self, record: &Record) -> io::Result<()> {
        self.0.push(*record);
        Ok(())
    }
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
        other => {
            eprintln!("handlers: got {other:?}, expected std, before, after or host");
            return ExitCode::from(2);
        }
    };
    let (send, events) = channel();
    let relay = Relay::start(Config {
        vcpus: 1,
        caps: Caps { vendor: Vendor::Amd, mcg_cap: u64::from(BANKS) | cap::CTL_P, succor: true },
        ram: RamMap::new(&[RamRegion::new(HVA, 0, 1 << 20)]).unwrap(),
        policy: KillPolicy::Early,
        pace: Pace::default(),
        ao_channel: AoChannel::default(),
        ghes: None,
        signals,
        ledger: Ledger::default(),
        observer: Box::new(move |event| drop(send.send(event.clone()))),
    })
    .unwrap();
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
    println!("AO at {:#x}", seen(Kind::ActionOptional));
    let mut port = relay.attach(0, ExitByte::NONE, Box::new(|| {})).unwrap();
    let mut vcpu = Ready(Vec::new());
    forge_ar(usize::try_from(HVA).unwrap() + 0x5000);
    let _ = port.before_run(&mut vcpu);
    println!("AR at {:#x}", seen(Kind::ActionRequired));

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
