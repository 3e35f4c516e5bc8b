//! Any 128 bytes as the siginfo of a SIGBUS, shown to the relay on a vCPU's thread: what is taken is what
//! the bytes say, nothing else is, and the page ends in the ledger if and only if it is guest RAM.
#![no_main]

use std::cell::RefCell;
use std::sync::mpsc::{Receiver, channel};

use libfuzzer_sys::fuzz_target;
use mce_relay::signal::{BUS_MCEERR_AO, BUS_MCEERR_AR, handle};
use mce_relay::{
    Event, ExitByte, FailureKind, Handled, Pace, RamMap, RamRegion, Relay, Signals, VcpuPort,
};
use mce_relay_tests::ready::Ready;

/// Nothing is there, and nothing has to be.
const HVA: u64 = 0x7f00_0000_0000;
const LEN: u64 = 64 << 12;
/// After so many the relay starts anew, and knows nothing.
const RUNS: u32 = 200;

/// A stretch of addresses where nothing is mapped, or where there is memory that is this program's for this alone.
fn region(hva: u64, gpa: u64, len: u64) -> RamRegion {
    // SAFETY: no reference of Rust's leads there.
    unsafe { RamRegion::new(hva, gpa, len) }
}

struct Host {
    relay: Relay,
    port: VcpuPort,
    events: Receiver<Event>,
    runs: u32,
}

extern "C" fn on_sigbus(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // An AR that is not of guest RAM comes once more, for whoever else there is: nobody, here.
    // SAFETY: the kernel passes a valid siginfo with SA_SIGINFO.
    let _ = handle(unsafe { &*info });
}

fn host() -> Host {
    // SAFETY: a complete action, whose handler is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let handler = on_sigbus as extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        assert_eq!(libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()), 0);
    }
    let (send, events) = channel();
    let observer = move |event: &Event| drop(send.send(event.clone()));
    let ram = RamMap::new(&[region(HVA, 0, LEN)]).unwrap();
    let pace = Pace { burst: 1_000_000, rate: 1_000_000 };
    let signals = Signals::Host;
    let relay = Relay::builder(ram).vcpus(1).machine_checks(Ready::CAPS);
    let relay = relay.signals(signals).pace(pace).observer(observer).start().unwrap();
    let port = relay.attach(0, ExitByte::NONE, || {}).unwrap();
    Host { relay, port, events, runs: 0 }
}

thread_local! {
    static HOST: RefCell<Option<Host>> = const { RefCell::new(None) };
}

fuzz_target!(|bytes: [u8; 128]| {
    // SAFETY: siginfo is 128 bytes of plain data; any will do.
    let info: libc::siginfo_t = unsafe { std::mem::transmute(bytes) };
    let number = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
    // include/uapi/asm-generic/siginfo.h: si_code, si_addr and si_addr_lsb.
    let code = i32::from_ne_bytes(bytes[8..12].try_into().unwrap());
    let (hva, lsb) = (number(16), bytes[24]);
    HOST.with_borrow_mut(|host| {
        if host.as_ref().is_some_and(|host| host.runs == RUNS) {
            *host = None;
        }
        let host = host.get_or_insert_with(self::host);
        let known = host.relay.pages().len();
        let handled = handle(&info);
        let kind = match code {
            BUS_MCEERR_AR => Some(FailureKind::ActionRequired),
            BUS_MCEERR_AO => Some(FailureKind::ActionOptional),
            _ => None,
        };
        assert_eq!(handled == Handled::Handled, kind.is_some(), "si_code {code}");
        let _ = host.port.before_run(&mut Ready::default());
        let caught = host.events.try_iter().find_map(|event| match event {
            Event::Caught { kind, hva, lsb, .. } => Some((kind, hva, lsb)),
            _ => None,
        });
        assert_eq!(caught, kind.map(|kind| (kind, hva, lsb)));
        let pages = host.relay.handle().inspect(|ledger| {
            let within = |page: &mce_relay::Page| page.gpa < LEN && page.gpa % 4096 == 0;
            assert!(ledger.pages().all(|page| within(&page)));
            ledger.len()
        });
        let is_ram = hva >= HVA && hva - HVA < LEN;
        if kind.is_some() && is_ram {
            assert!(host.relay.handle().inspect(|l| l.get((hva - HVA) & !4095).is_some()));
        }
        if kind.is_none() {
            assert_eq!(pages, known);
        }
        host.runs += 1;
    });
});
