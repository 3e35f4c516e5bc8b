//! Something done over and over, for callgrind to count its instructions: `counted WHAT TIMES`.
//!
//! `empty` is a loop around nothing; `deliver` the same around `before_run` with nothing pending; `handler`
//! shows the relay a siginfo on a vCPU's thread, which takes it in between.
#![allow(clippy::unwrap_used, reason = "without its relay there is nothing to count")]

use std::hint::black_box;
use std::process::ExitCode;

use mce_relay::signal::BUS_MCEERR_AO;
use mce_relay::{ExitByte, Handled, RamMap, RamRegion, Relay, VcpuPort, Verdict, signal};
use mce_relay_bench::{Quick, caps};

const HVA: u64 = 0x7f00_0000_0000;

/// A stretch of addresses where nothing is mapped, or where there is memory that is this program's for this alone.
fn region(hva: u64, gpa: u64, len: u64) -> RamRegion {
    // SAFETY: no reference of Rust's leads there.
    unsafe { RamRegion::new(hva, gpa, len) }
}

#[inline(never)]
fn empty(port: &mut VcpuPort, times: u64) {
    for _ in 0..times {
        black_box(&mut *port);
    }
}

#[inline(never)]
fn deliver(port: &mut VcpuPort, vcpu: &mut Quick, times: u64) {
    for _ in 0..times {
        if black_box(&mut *port).before_run(vcpu) != Verdict::Run {
            return;
        }
    }
}

/// callgrind counts what is done inside.
#[inline(never)]
fn shown_to_the_relay(info: &libc::siginfo_t) -> Handled {
    signal::handle(info)
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (what, times) = match &words[..] {
        [what, times] => (what.as_str(), times.parse().unwrap_or(0)),
        _ => ("", 0),
    };
    let ram = RamMap::new(&[region(HVA, 0, 1 << 20)]).unwrap();
    let relay = Relay::builder(ram).vcpus(1).machine_checks(caps(true)).start().unwrap();
    let mut port = relay.attach(0, ExitByte::NONE, || {}).unwrap();
    let mut vcpu = Quick::new(true);
    assert_eq!(port.before_run(&mut vcpu), Verdict::Run);
    match what {
        "empty" => empty(&mut port, times),
        "deliver" => deliver(&mut port, &mut vcpu, times),
        "handler" => {
            // include/uapi/asm-generic/siginfo.h: si_signo, si_code, si_addr, si_addr_lsb.
            let mut bytes = [0; size_of::<libc::siginfo_t>()];
            bytes[0..4].copy_from_slice(&libc::SIGBUS.to_ne_bytes());
            bytes[8..12].copy_from_slice(&BUS_MCEERR_AO.to_ne_bytes());
            bytes[16..24].copy_from_slice(&HVA.to_ne_bytes());
            bytes[24] = 12;
            // SAFETY: siginfo is plain data of that size.
            let info: libc::siginfo_t = unsafe { std::mem::transmute(bytes) };
            for _ in 0..times {
                assert_eq!(shown_to_the_relay(black_box(&info)), Handled::Handled);
                let _ = port.before_run(&mut vcpu);
            }
        }
        _ => {
            eprintln!("usage: counted empty|deliver|handler TIMES");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}
