//! The histories of `tests/histories` on real KVM and in its model at once, instruction by
//! instruction: the model is true, and what holds in it holds on KVM.

use std::time::Duration;

use kvm_ioctls::Kvm;
use mce_relay::Form;
use mce_relay::mca::{BANKS, Caps, McaState, Record, Vendor, bystander, record, status};
use mce_relay_tests::history::generate::{caps, for_all, guest_step, histories};
use mce_relay_tests::history::guest::{self, GuestStep};
use mce_relay_tests::history::model::ModelVcpu;
use mce_relay_tests::history::{Counts, Vcpu, driver};
use mce_relay_vmm::mce_inject::MceSetup;
use proptest::prelude::*;

use crate::stepper::{Stepper, steppers};

/// Histories of one test, as far as there is time.
const CASES: u32 = 500;
const LEAST: u32 = 5;
const TIME: Duration = Duration::from_secs(6);

/// A vCPU of KVM, and the model that is to be its equal in all it does.
struct Both {
    kvm: Stepper,
    model: ModelVcpu,
}

/// The vCPUs of a virtual machine that is shown `caps`, and their models.
fn both(kvm: &Kvm, caps: &Caps, count: usize) -> Vec<Both> {
    let lmce = caps.has(mce_relay::mca::cap::LMCE_P);
    let setup = MceSetup::new(kvm, caps.vendor, lmce, caps.succor).unwrap();
    assert_eq!(setup.caps(), *caps);
    let vcpus = steppers(kvm, &setup, count).into_iter().enumerate();
    vcpus.map(|(index, kvm)| Both { kvm, model: ModelVcpu::new(index, caps) }).collect()
}

/// What both say.
#[track_caller]
fn same<T: PartialEq + std::fmt::Debug>(kvm: T, model: T) -> T {
    assert!(kvm == model, "KVM says {kvm:x?}, the model says {model:x?}");
    kvm
}

impl Vcpu for Both {
    fn state(&mut self) -> McaState {
        // The model has no code, so no place in it either.
        let kvm = McaState { rip: 0, ..self.kvm.state() };
        same(kvm, self.model.state())
    }
    fn inject(&mut self, record: &Record) -> bool {
        same(self.kvm.inject(record), self.model.inject(record))
    }
    fn start(&mut self) {
        self.kvm.start();
        self.model.start();
    }
    fn init(&mut self) {
        self.kvm.init();
        self.model.init();
    }
    fn resume(&mut self) -> bool {
        same(self.kvm.resume(), self.model.resume())
    }
    fn handlers(&self) -> u32 {
        same(self.kvm.handlers(), self.model.handlers())
    }
    fn rdmsr(&mut self, index: u32) -> u64 {
        same(self.kvm.rdmsr(index), self.model.rdmsr(index))
    }
    fn wrmsr(&mut self, index: u32, value: u64) {
        self.kvm.wrmsr(index, value);
        self.model.wrmsr(index, value);
    }
    fn host_wrmsr(&mut self, index: u32, value: u64) {
        self.kvm.host_wrmsr(index, value);
        self.model.host_wrmsr(index, value);
    }
    fn set_cr4_mce(&mut self, set: bool) {
        self.kvm.set_cr4_mce(set);
        self.model.set_cr4_mce(set);
    }
    fn interrupt(&mut self) {
        self.kvm.interrupt();
        self.model.interrupt();
    }
    fn set_interrupts(&mut self, on: bool) {
        self.kvm.set_interrupts(on);
        self.model.set_interrupts(on);
    }
    fn set_halted(&mut self, on: bool) {
        self.kvm.set_halted(on);
        self.model.set_halted(on);
    }
    fn iret(&mut self) {
        self.kvm.iret();
        self.model.iret();
    }
}

fn replay(vendor: Vendor) {
    let kvm = Kvm::new().unwrap();
    // What KVM cannot be set up with, no guest has; and without SER_P nobody is told anything.
    let caps = caps(vendor, Just(BANKS))
        .prop_filter("SER_P", |caps| vendor == Vendor::Amd || caps.has(mce_relay::mca::cap::SER_P));
    let counts = for_all(histories(caps), CASES, LEAST, TIME, |history| {
        driver::play(history, both(&kvm, &history.caps, history.vcpus))
    });
    println!("    {counts}");
}

pub fn histories_amd() {
    replay(Vendor::Amd);
}

pub fn histories_intel() {
    replay(Vendor::Intel);
}

/// What nobody would do: any record at any time.
#[derive(Debug, Clone)]
enum Raw {
    Inject(Record),
    Guest(GuestStep),
}

fn raw() -> impl Strategy<Value = Raw> {
    let forms = [Form::Srao, Form::Srar, Form::Deferred, Form::AmdAr];
    let form = prop::sample::select(forms.to_vec());
    let told = (form, 0..=BANKS).prop_map(|(form, bank)| record(form, 0x5000, bank, false));
    let bystander = (0..=BANKS).prop_map(bystander);
    // UCNA by Intel's definition, a corrected error, and an error that is none.
    let other = |record: Record| {
        let ucna =
            Record { status: record.status & !(status::S | status::AR), mcg_status: 0, ..record };
        let corrected = Record { status: record.status & !status::UC, ..record };
        let invalid = Record { status: record.status & !status::VAL, ..record };
        prop::sample::select(vec![record, ucna, corrected, invalid])
    };
    let record = prop_oneof![4 => told, 1 => bystander].prop_flat_map(other);
    // A vCPU that waits in HLT for what nobody sends is not entered; histories see to that.
    let step = guest_step(0).prop_filter("Offline", |step| *step != GuestStep::Offline);
    prop_oneof![1 => record.prop_map(Raw::Inject), 2 => step.prop_map(Raw::Guest)]
}

pub fn the_model_is_kvm() {
    let kvm = Kvm::new().unwrap();
    let amd = caps(Vendor::Amd, Just(BANKS));
    let strategy = (amd, prop::collection::vec(raw(), 1..60));
    let counts = for_all(strategy, CASES, LEAST, TIME, |(caps, ops)| {
        let mut counts = Counts::default();
        counts.count("histories");
        let [vcpu] = &mut both(&kvm, caps, 1)[..] else { panic!("one vCPU") };
        // A guest without its handler does not live long.
        guest::step(vcpu, caps, GuestStep::OpenHandler);
        for op in ops {
            match op {
                Raw::Inject(record) => {
                    counts.count("injections");
                    if !vcpu.inject(record) {
                        counts.count("refused");
                    }
                }
                Raw::Guest(_) if !vcpu.resume() => {
                    counts.count("triple faults");
                    return counts;
                }
                Raw::Guest(step) => {
                    for took in guest::step(vcpu, caps, *step) {
                        counts.count(if took.status & status::OVER == 0 {
                            "taken"
                        } else {
                            "with OVER"
                        });
                    }
                }
            }
            vcpu.state();
        }
        counts
    });
    println!("    {counts}");
    let wanted = ["injections", "refused", "triple faults", "taken", "with OVER"];
    let missing = wanted.into_iter().filter(|what| counts.of(what) == 0);
    assert_eq!(missing.collect::<Vec<_>>(), Vec::<&str>::new(), "these never happened");
}
