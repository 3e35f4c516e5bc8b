//! What KVM makes of `KVM_X86_SET_MCE`, bare: the facts that the relay's rules rest on. If one of
//! these fails, a rule in `delivery` may be wrong for this kernel.

use mce_relay::mca::{Record, record, status};
use mce_relay::{Form, Mca};
use mce_relay_vmm::mce_inject::set_mce;

use crate::payload::{Did, Payload, Start, handled};

const GPA: u64 = 0x12_3000;

fn ar() -> Record {
    record(Form::AmdAr, GPA, 8, false)
}

fn beating() -> Payload {
    let mut payload = Payload::new(Start::Beat, true);
    assert_eq!(payload.run(), Did::Beat);
    payload.finish_io();
    payload
}

pub fn a_record_reaches_the_handler_as_it_was_written() {
    let mut payload = beating();
    for form in [Form::AmdAr, Form::Srar, Form::Srao] {
        let record = record(form, GPA, 8, false);
        set_mce(&payload.vcpu, &record).unwrap();
        assert_eq!(payload.run(), handled(&record), "{form}");
        assert_eq!(payload.run(), Did::Beat, "and the guest goes on");
        payload.finish_io();
        let state = payload.guest.on(&payload.vcpu).state().unwrap();
        assert!(!state.mcip() && !state.banks[8].valid(), "the guest's clearing is seen");
    }
}

pub fn a_second_record_while_mcip_shuts_the_guest_down() {
    let mut payload = beating();
    set_mce(&payload.vcpu, &ar()).unwrap();
    set_mce(&payload.vcpu, &Record { bank: 7, ..ar() }).expect("KVM returns 0 all the same");
    assert_eq!(payload.run(), Did::Shutdown);
}

pub fn a_record_with_cr4_mce_clear_shuts_the_guest_down() {
    let mut payload = Payload::new(Start::Beat, false);
    assert_eq!(payload.run(), Did::Beat);
    payload.finish_io();
    assert!(!payload.guest.on(&payload.vcpu).state().unwrap().cr4_mce);
    set_mce(&payload.vcpu, &ar()).expect("KVM returns 0 all the same");
    assert_eq!(payload.run(), Did::Shutdown);
}

pub fn a_record_for_a_disabled_bank_is_swallowed() {
    let mut payload = Payload::new(Start::DisableBank9, true);
    assert_eq!(payload.run(), Did::Beat);
    payload.finish_io();
    set_mce(&payload.vcpu, &Record { bank: 9, ..ar() }).expect("KVM returns 0 all the same");
    let state = payload.guest.on(&payload.vcpu).state().unwrap();
    assert_eq!((state.banks[9].ctl, state.banks[9].status, state.mcg_status), (0, 0, 0));
    assert_eq!(payload.run(), Did::Beat, "and nobody was told");
}

pub fn a_deferred_record_is_logged_without_a_machine_check() {
    let mut payload = beating();
    let record = record(Form::Deferred, GPA, 9, false);
    set_mce(&payload.vcpu, &record).unwrap();
    assert_eq!(payload.run(), Did::Beat);
    payload.finish_io();
    let state = payload.guest.on(&payload.vcpu).state().unwrap();
    assert_eq!((state.banks[9].status, state.mcg_status), (record.status, 0));
}

pub fn a_bank_that_is_not_there_is_refused() {
    let payload = beating();
    let error = set_mce(&payload.vcpu, &Record { bank: 10, ..ar() }).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    let without_val = Record { status: ar().status & !status::VAL, ..ar() };
    assert!(set_mce(&payload.vcpu, &without_val).is_err());
}
