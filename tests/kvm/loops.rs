//! A guest that meets the same bad page again and again without getting on: recognised within 100 rounds,
//! with address and RIP, and never a hang. The page is really bad for this process (see `uffd`). Where KVM
//! emulates the guest's instruction, the touch shows as MMIO at an address that is RAM.

use mce_relay::internals::LOOP_ROUNDS;
use mce_relay::{State, UndeliverableReason, Verdict};

use crate::payload::{CODE, Did, Start, TARGET};
use crate::relayed::Relayed;
use crate::uffd::Uffd;

/// Runs the guest until it cannot go on: that verdict, and how often it was told before.
fn rounds(relayed: &mut Relayed) -> (Verdict, u32) {
    let mut told = 0;
    loop {
        match relayed.before_run() {
            Verdict::Run => {}
            end => return (end, told),
        }
        match relayed.payload.run() {
            Did::Handled { addr, .. } => {
                assert_eq!(addr, TARGET);
                told += 1;
                assert!(told < 100, "no end after {told} rounds");
            }
            Did::Ram(gpa) => assert!(relayed.port.mmio_hit(gpa), "{gpa:#x} is RAM"),
            Did::Beat | Did::Interrupted => {}
            other => panic!("{other:?} after {told} rounds"),
        }
    }
}

/// A kernel that takes each machine check and loads from the page again.
pub fn a_guest_that_ignores_it() {
    let mut relayed = Relayed::new(Start::LoadAsKernel, true);
    let uffd = Uffd::open().unwrap();
    uffd.poison(relayed.payload.ram.hva() + TARGET, 4096).unwrap();
    for again in 0..2 {
        let (end, told) = rounds(&mut relayed);
        println!("    {end:?} after {told} rounds");
        let Verdict::Undeliverable {
            gpa,
            why: UndeliverableReason::Loop { rounds },
            rip: Some(rip),
        } = end
        else {
            panic!("{again}: {end:?}")
        };
        assert_eq!((gpa, rounds), (TARGET, LOOP_ROUNDS));
        // The load itself and not what is behind it, and nothing was loaded.
        assert_eq!(rip, CODE as u64 + Start::LoadAsKernel as u64, "RIP {rip:#x}");
        assert_ne!(relayed.payload.vcpu.get_regs().unwrap().rbx, u64::MAX);
        let state = relayed.relay.pages()[0].state;
        assert!(
            matches!(state, State::Undeliverable { why: UndeliverableReason::Loop { .. } }),
            "{state:?}"
        );
        // Whoever lets it go on, as `resume` does, gets as many rounds again.
    }
    drop(uffd);
}

/// The stack that the machine check is to be pushed onto is bad itself: the guest cannot take it, and the
/// next touch is one that cannot be told of.
pub fn a_stack_that_is_bad() {
    let mut relayed = Relayed::new(Start::LoadAsUser, true);
    let uffd = Uffd::open().unwrap();
    let ram = relayed.payload.ram.hva();
    uffd.poison(ram + TARGET, 4096).unwrap();
    uffd.poison(ram + STACK_PAGE, 4096).unwrap();
    for round in 0..100 {
        match relayed.before_run() {
            Verdict::Run => {}
            Verdict::Undeliverable { gpa, why, rip } => {
                println!("    GPA {gpa:#x}, RIP {rip:#x?}, in round {round}: {why}");
                assert!(gpa == TARGET || gpa == STACK_PAGE, "{gpa:#x}");
                return;
            }
        }
        match relayed.payload.run() {
            Did::Ram(gpa) => assert!(relayed.port.mmio_hit(gpa), "{gpa:#x} is RAM"),
            Did::Interrupted => {}
            // A KVM that emulates the delivery of exceptions gives up at once, as a processor does.
            Did::Shutdown => {
                println!("    a triple fault in round {round}");
                return;
            }
            other => panic!("{other:?} in round {round}"),
        }
    }
    panic!("no end within 100 rounds");
}

/// Below the top of the stack for exceptions from user mode.
const STACK_PAGE: u64 = 0x1_f000;
