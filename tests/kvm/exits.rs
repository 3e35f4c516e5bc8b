//! The registers that come with an exit are those of the last exit, and say what KVM says when it is asked.

use mce_relay::kvm::ExitRegisters;
use mce_relay::mca::record;
use mce_relay::{Form, Mca};
use mce_relay_vmm::mce_inject::set_mce;

use crate::payload::{Did, Payload, Start, TARGET, finish_io};

/// # Panics
/// KVM has none, which is so for guests whose memory is encrypted only.
fn of(payload: &mut Payload) -> ExitRegisters {
    assert!(ExitRegisters::are_offered(&payload.vm).unwrap());
    let run = &raw mut *payload.vcpu.get_kvm_run();
    // SAFETY: the tests drop it before the payload, and use what it uses by it alone.
    unsafe { ExitRegisters::new(run.cast()) }
}

/// A payload at its first beat, and the registers of its exits.
fn at_a_beat() -> (Payload, ExitRegisters) {
    let mut payload = Payload::new(Start::Beat, true);
    let registers = of(&mut payload);
    assert_eq!(payload.run(), Did::Beat);
    (payload, registers)
}

pub fn come_when_they_were_asked_for() {
    let (mut payload, registers) = at_a_beat();
    let request = registers.request();
    assert_eq!(registers.take(), None, "nobody has asked");

    request.ask();
    assert_eq!(registers.take(), None, "no exit since");
    request.ask();
    payload.finish_io();
    let values = registers.take().unwrap();
    let (regs, sregs) = (payload.vcpu.get_regs().unwrap(), payload.vcpu.get_sregs().unwrap());
    assert_eq!((values.rip, values.rflags, values.cr4), (regs.rip, regs.rflags, sregs.cr4));
    assert!(!values.event_in_flight && values.mp_state.is_none());
    assert_eq!(registers.take(), None, "they are taken once");
    assert_eq!(payload.run(), Did::Beat);
    assert_eq!(registers.take(), None, "nor do they come again unasked");
}

/// Asked for at one exit and taken at another, they are the later one's.
pub fn are_of_the_last_exit() {
    let (mut payload, registers) = at_a_beat();
    registers.request().ask();
    payload.finish_io();
    let regs = payload.vcpu.get_regs().unwrap();
    let changed = kvm_bindings::kvm_regs { rflags: regs.rflags | 1, ..regs };
    payload.vcpu.set_regs(&changed).unwrap();
    finish_io(&mut payload.vcpu);
    assert_eq!(registers.take().unwrap().rflags, regs.rflags | 1);
}

/// What came with an exit before somebody began to take them may be of before a reset.
pub fn of_before_are_dropped() {
    let (mut payload, registers) = at_a_beat();
    registers.request().ask();
    payload.finish_io();
    let again = of(&mut payload);
    assert_eq!(again.take(), None);
    again.request().ask();
    finish_io(&mut payload.vcpu);
    assert!(again.take().is_some());
}

/// A machine check that is on its way to the guest is an event in flight.
pub fn say_what_is_in_flight() {
    let (mut payload, registers) = at_a_beat();
    payload.finish_io();
    set_mce(&payload.vcpu, &record(Form::AmdAr, TARGET, 8, false)).unwrap();
    registers.request().ask();
    finish_io(&mut payload.vcpu);
    assert!(registers.take().unwrap().event_in_flight);
}

/// A state that was read with them is the one that KVM is asked for.
pub fn make_the_same_state() {
    let (mut payload, registers) = at_a_beat();
    for interrupts in [false, true] {
        payload.finish_io();
        let regs = payload.vcpu.get_regs().unwrap();
        let rflags = if interrupts { regs.rflags | 1 << 9 } else { regs.rflags & !(1 << 9) };
        payload.vcpu.set_regs(&kvm_bindings::kvm_regs { rflags, ..regs }).unwrap();
        registers.request().ask();
        payload.finish_io();
        let exit = registers.take();
        assert!(exit.is_some());
        let mut mca = payload.guest.on(&payload.vcpu).after_exit(exit);
        let (first, second) = (mca.state().unwrap(), mca.state().unwrap());
        assert_eq!(first, second, "the second is asked for");
        assert_eq!(first.interrupts_on, interrupts);
    }
}
