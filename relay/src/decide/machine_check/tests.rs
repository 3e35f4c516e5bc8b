use super::*;
use crate::decide::rounds::{LOOP_PAUSE, LOOP_ROUNDS};
use crate::decide::standing::{LEAVE, MASKED};
use crate::x86::mca::BYSTANDER_BANKS;
use crate::x86::mca::{BANKS, cap, status};

const PAGE: u64 = 0x1234_5000;

fn intel(extra: u64) -> Caps {
    let mcg_cap = u64::from(BANKS) | cap::CTL_P | cap::SER_P | extra;
    Caps { vendor: Vendor::Intel, mcg_cap, succor: false }
}

fn amd() -> Caps {
    Caps { vendor: Vendor::Amd, mcg_cap: u64::from(BANKS) | cap::CTL_P, succor: true }
}

/// A vCPU of a guest that has set up its machine checks and has nothing in its banks.
fn ready() -> McaState {
    McaState::up()
}

fn with(change: impl FnOnce(&mut McaState)) -> McaState {
    let mut state = ready();
    change(&mut state);
    state
}

/// Long after the guest has set up its machine checks.
const LATER: Duration = Duration::from_secs(100);

/// For a guest whose vCPUs have all been seen to be ready at time zero.
fn open(caps: Caps, vcpus: usize) -> Delivery {
    let mut delivery = Delivery::new(Some(caps), vcpus, Pace::default());
    for vcpu in 0..vcpus {
        assert_eq!(delivery.next(vcpu, &ready(), Duration::ZERO), Step::Idle);
    }
    delivery
}

fn inject(delivery: &mut Delivery, vcpu: usize, state: &mut McaState, now: Duration) -> Assignment {
    let Step::Inject(told) = delivery.next(vcpu, state, now) else { panic!("an injection") };
    state.banks[usize::from(told.record.bank)].status = told.record.status;
    if told.record.mcg_status != 0 {
        state.mcg_status = told.record.mcg_status;
    }
    delivery.told(&told);
    told
}

/// That which vCPU 0 leads.
fn rendezvous(
    delivery: &mut Delivery,
    states: &[Option<McaState>],
) -> Result<Vec<Assignment>, WaitReason> {
    let error = delivery.first(0).unwrap();
    delivery.rendezvous(0, error, states, LATER)
}

/// One round of a guest that takes the machine check and touches the page again.
fn round(delivery: &mut Delivery, gpa: u64, now: Duration) -> Step {
    round_on(0, delivery, gpa, now)
}

fn round_on(vcpu: usize, delivery: &mut Delivery, gpa: u64, now: Duration) -> Step {
    delivery.push_ar(vcpu, gpa, true, now);
    let mut state = ready();
    let step = delivery.next(vcpu, &state, now);
    if let Step::Inject(told) = &step {
        delivery.told(told);
        state.interrupts_on = true;
        assert_eq!(delivery.taken(vcpu, &state, now).len(), 1, "it took it");
    }
    if let Step::Cannot(error, _) = &step {
        delivery.forget(vcpu, error);
    }
    step
}

#[test]
fn a_touch_that_comes_again_and_again_is_a_loop() {
    let mut delivery = open(amd(), 1);
    let millis = |n: u32| LATER + Duration::from_millis(n.into());
    for again in 0..2 {
        for n in 0..LOOP_ROUNDS {
            let step = round(&mut delivery, PAGE, millis(n));
            assert!(matches!(step, Step::Inject(_)), "{again}, round {n}: {step:?}");
        }
        let error = Pending { gpa: PAGE, kind: FailureKind::ActionRequired };
        let why = UndeliverableReason::Loop { rounds: LOOP_ROUNDS };
        assert_eq!(round(&mut delivery, PAGE, millis(LOOP_ROUNDS)), Step::Cannot(error, why));
        assert!(delivery.is_idle(), "and whoever goes on has as many rounds again");
    }
    const { assert!(LOOP_ROUNDS < 100) };
}

#[test]
fn a_loop_that_wanders_from_vcpu_to_vcpu_is_one() {
    for vcpus in [2, 4, 32] {
        let mut delivery = open(amd(), vcpus);
        let mut step_of = |n: u32| {
            let now = LATER + Duration::from_millis(n.into());
            round_on(n as usize % vcpus, &mut delivery, PAGE, now)
        };
        let told = (0..).take_while(|n| matches!(step_of(*n), Step::Inject(_))).count();
        let others = vcpus - 1;
        assert_eq!(told, LOOP_ROUNDS as usize + others, "{vcpus} vCPUs");
        assert!(told < 100, "{vcpus} vCPUs");
    }
}

#[test]
fn many_vcpus_that_touch_a_page_once_are_none() {
    const VCPUS: usize = 254;
    let mut delivery = open(amd(), VCPUS);
    for vcpu in 0..VCPUS {
        let step = round_on(vcpu, &mut delivery, PAGE, LATER);
        assert!(matches!(step, Step::Inject(_)), "vCPU {vcpu}: {step:?}");
    }
}

#[test]
fn two_pages_in_turn_are_a_loop_as_well() {
    let mut delivery = open(amd(), 1);
    let steps: Vec<Step> = (0..2 * LOOP_ROUNDS + 2)
        .map(|n| {
            let gpa = PAGE + u64::from(n % 2) * 4096;
            round(&mut delivery, gpa, LATER + Duration::from_millis(n.into()))
        })
        .collect();
    let loops = steps.iter().filter(|step| matches!(step, Step::Cannot(..)));
    assert_eq!(loops.count(), 2, "{steps:?}");
}

#[test]
fn touches_that_are_far_apart_are_none() {
    let mut delivery = open(amd(), 1);
    for n in 0..4 * LOOP_ROUNDS {
        let step = round(&mut delivery, PAGE, LATER + n * LOOP_PAUSE);
        assert!(matches!(step, Step::Inject(_)), "{n}: {step:?}");
    }
}

#[test]
fn what_is_gone_is_told_to_nobody() {
    let mut delivery = open(amd(), 2);
    delivery.push_ao(PAGE);
    delivery.push_ar(1, PAGE, true, LATER);
    delivery.gone(&|gpa| gpa == PAGE);
    assert_eq!(delivery.next(0, &ready(), LATER), Step::Idle);
    assert_eq!(delivery.next(1, &ready(), LATER), Step::Idle);
    assert!(delivery.is_idle());
}

#[test]
fn nothing_pending_is_idle() {
    let mut delivery = open(amd(), 2);
    assert_eq!(delivery.next(0, &ready(), LATER), Step::Idle);
    assert!(delivery.is_idle());
}

#[test]
fn an_ao_waits_for_everything_that_would_harm_the_guest() {
    for (caps, name) in [(amd(), "AMD"), (intel(0), "Intel")] {
        let mut delivery = open(caps, 1);
        delivery.push_ao(PAGE);
        let cases = [
            (with(|s| s.waits_for_sipi = true), WaitReason::NotStarted { vcpu: 0 }),
            (with(|s| s.cr4_mce = false), WaitReason::Cr4MceClear { vcpu: 0 }),
            (with(|s| s.mcg_status = mcg::MCIP), WaitReason::Mcip { vcpu: 0 }),
            (with(|s| s.mcg_ctl = 0), WaitReason::McgCtlOff { vcpu: 0 }),
            (
                with(|s| s.banks.iter_mut().for_each(|bank| bank.ctl = 0)),
                WaitReason::BankCtlOff { vcpu: 0, bank: 9 },
            ),
            (
                with(|s| s.banks.iter_mut().for_each(|bank| bank.status = status::VAL)),
                WaitReason::BankValid { vcpu: 0, bank: 9 },
            ),
        ];
        for (state, why) in cases {
            let error = Pending { gpa: PAGE, kind: FailureKind::ActionOptional };
            assert_eq!(delivery.next(0, &state, LATER), Step::Wait(error, why), "{name}");
        }
    }
}

#[test]
fn an_ar_that_would_harm_the_guest_cannot_be_told() {
    let mut delivery = open(amd(), 2);
    delivery.push_ar(1, PAGE, true, Duration::ZERO);
    let state = with(|s| s.mcg_status = mcg::MCIP);
    let error = Pending { gpa: PAGE, kind: FailureKind::ActionRequired };
    let by = WaitReason::Mcip { vcpu: 1 };
    assert_eq!(
        delivery.next(1, &state, LATER),
        Step::Cannot(error, UndeliverableReason::Blocked { by })
    );
}

#[test]
fn an_ar_goes_to_its_vcpu_and_before_an_ao() {
    let mut delivery = open(amd(), 2);
    delivery.push_ar(0, 0x2000, true, Duration::ZERO);
    assert_eq!(delivery.next(1, &ready(), LATER), Step::Idle);
    delivery.push_ao(0x1000);
    let Step::Inject(told) = delivery.next(0, &ready(), LATER) else { panic!("AR first") };
    assert_eq!((told.record.addr, told.record.bank), (0x2000, AR_BANKS[0]));
    delivery.told(&told);
    let Step::Inject(told) = delivery.next(0, &ready(), LATER) else { panic!("then the AO") };
    assert_eq!((told.record.addr, told.record.bank), (0x1000, AO_BANK));
}

#[test]
fn an_ar_takes_the_place_of_its_pages_ao() {
    let mut delivery = open(amd(), 1);
    delivery.push_ao(PAGE);
    delivery.push_ar(0, PAGE, true, Duration::ZERO);
    delivery.push_ar(0, PAGE, true, Duration::ZERO);
    let Step::Inject(told) = delivery.next(0, &ready(), LATER) else { panic!() };
    delivery.told(&told);
    assert_eq!(delivery.next(0, &ready(), LATER), Step::Idle, "told once");
}

#[test]
fn a_deferred_record_in_its_bank_does_not_hold_up_an_ar() {
    let mut delivery = open(amd(), 1);
    delivery.push_ar(0, PAGE, true, Duration::ZERO);
    let state = with(|s| s.banks[9].status = status::VAL);
    assert!(matches!(delivery.next(0, &state, LATER), Step::Inject(_)));
}

#[test]
fn intel_gathers_unless_the_guest_has_lmce() {
    let mut delivery = open(intel(cap::LMCE_P), 2);
    delivery.push_ao(PAGE);
    assert!(matches!(delivery.next(0, &ready(), LATER), Step::Rendezvous(_)));
    let Step::Inject(told) = delivery.next(0, &with(|s| s.lmce = true), LATER) else { panic!() };
    assert_ne!(told.record.mcg_status & mcg::LMCES, 0);
}

#[test]
fn a_rendezvous_reaches_every_open_vcpu_and_no_other() {
    let mut delivery = open(intel(0), 4);
    delivery.push_ao(PAGE);
    let states = [
        Some(ready()),
        Some(ready()),
        Some(with(|s| s.waits_for_sipi = true)),
        Some(with(|s| s.cr4_mce = false)),
    ];
    let told = rendezvous(&mut delivery, &states).unwrap();
    assert_eq!(told.iter().map(|t| t.vcpu).collect::<Vec<_>>(), [0, 1]);
    assert!(told[0].error.is_some() && told[1].error.is_none());
    assert_eq!(told[1].record.bank, BYSTANDER_BANKS[0]);
}

#[test]
fn a_rendezvous_waits_for_a_vcpu_in_its_handler() {
    let mut delivery = open(intel(0), 2);
    delivery.push_ao(PAGE);
    let states = [Some(ready()), Some(with(|s| s.mcg_status = mcg::MCIP))];
    assert_eq!(rendezvous(&mut delivery, &states), Err(WaitReason::Mcip { vcpu: 1 }));
    assert!(matches!(delivery.next(0, &ready(), LATER), Step::Rendezvous(_)), "nothing is lost");
}

#[test]
fn an_interrupt_on_its_way_is_not_run_over() {
    let busy = || with(|s| s.event_in_flight = true);
    let mut delivery = open(intel(0), 2);
    delivery.push_ao(PAGE);
    let error = Pending { gpa: PAGE, kind: FailureKind::ActionOptional };
    let wait = |vcpu| WaitReason::EventInFlight { vcpu };
    assert_eq!(delivery.next(0, &busy(), LATER), Step::Wait(error, wait(0)));
    assert_eq!(rendezvous(&mut delivery, &[Some(ready()), Some(busy())]), Err(wait(1)));
    // A deferred record interrupts nothing, and an AR has to be told.
    let mut delivery = open(amd(), 1);
    delivery.push_ao(PAGE);
    assert!(matches!(delivery.next(0, &busy(), LATER), Step::Inject(_)));
    delivery.push_ar(0, PAGE, true, Duration::ZERO);
    assert!(matches!(delivery.next(0, &busy(), LATER), Step::Inject(_)));
}

/// Between clearing MCIP and its return Linux' handler is on a stack that the next machine check
/// would overwrite.
#[test]
fn a_handler_is_left_before_the_next_machine_check() {
    let mut delivery = open(intel(cap::LMCE_P), 1);
    delivery.push_ao(0x1000);
    delivery.push_ao(0x2000);
    let lmce = |interrupts_on| {
        with(|s| {
            s.lmce = true;
            s.interrupts_on = interrupts_on;
        })
    };
    inject(&mut delivery, 0, &mut lmce(true), LATER);
    let next = Pending { gpa: 0x2000, kind: FailureKind::ActionOptional };
    let waits = Step::Wait(next, WaitReason::InHandler { vcpu: 0 });
    let leaving = lmce(false);
    assert_eq!(delivery.taken(0, &leaving, LATER).len(), 1, "acknowledged all the same");
    assert_eq!(delivery.next(0, &leaving, LATER), waits);
    assert!(matches!(delivery.next(0, &lmce(true), LATER), Step::Inject(_)));
    // A guest that idles with interrupts off is given a second.
    inject(&mut delivery, 0, &mut lmce(true), LATER);
    delivery.push_ao(0x3000);
    assert!(matches!(delivery.next(0, &leaving, LATER), Step::Wait(..)));
    assert!(matches!(delivery.next(0, &leaving, LATER + LEAVE), Step::Inject(_)));
}

#[test]
fn a_bystander_leaves_its_handler_first_too() {
    let mut delivery = open(intel(0), 2);
    delivery.push_ao(0x1000);
    delivery.push_ao(0x2000);
    for told in rendezvous(&mut delivery, &[Some(ready()), Some(ready())]).unwrap() {
        delivery.told(&told);
    }
    let leaving = with(|s| s.interrupts_on = false);
    delivery.taken(0, &ready(), LATER);
    delivery.taken(1, &leaving, LATER);
    let refused = rendezvous(&mut delivery, &[Some(ready()), Some(leaving)]);
    assert_eq!(refused, Err(WaitReason::InHandler { vcpu: 1 }));
    delivery.taken(1, &ready(), LATER);
    assert!(rendezvous(&mut delivery, &[Some(ready()), Some(ready())]).is_ok());
}

/// One of them a crash may have left behind, and which is not known: the error would be nothing to it, and the end
/// of the other.
#[test]
fn of_two_with_interrupts_off_none_leads_at_once() {
    let mut delivery = open(intel(0), 2);
    delivery.next(1, &ready(), Duration::from_secs(50));
    delivery.push_ao(0x1000);
    let masked = with(|s| s.interrupts_on = false);
    let states = [Some(masked), Some(masked)];
    delivery.taken(0, &masked, LATER);
    delivery.taken(1, &masked, LATER);
    assert_eq!(delivery.ao_vcpu(), 1, "it was seen with interrupts on last");
    let mut lead = |leader, states: &[Option<McaState>], now| {
        let error = Pending { gpa: 0x1000, kind: FailureKind::ActionOptional };
        delivery.rendezvous(leader, error, states, now)
    };
    assert_eq!(lead(1, &states, LATER), Err(WaitReason::InHandler { vcpu: 1 }));
    // One that shows itself online leads, and the other does not.
    let one_online = [Some(ready()), Some(masked)];
    assert_eq!(lead(1, &one_online, LATER), Ok(Vec::new()));
    assert!(lead(0, &one_online, LATER).is_ok_and(|told| told.len() == 2));
    // A guest that has them off all the time is told in the end.
    let mut now = LATER;
    while lead(0, &states, now).is_err() {
        now += Duration::from_secs(1);
        assert!(now < LATER + 2 * MASKED);
    }
    assert!(now >= LATER + MASKED);
}

#[test]
fn two_ars_share_one_rendezvous() {
    let mut delivery = open(intel(0), 2);
    delivery.push_ar(0, 0x1000, true, Duration::ZERO);
    delivery.push_ar(1, 0x2000, true, Duration::ZERO);
    let told = rendezvous(&mut delivery, &[Some(ready()), Some(ready())]).unwrap();
    assert_eq!(told.iter().map(|t| t.record.addr).collect::<Vec<_>>(), [0x1000, 0x2000]);
}

#[test]
fn acknowledged_means_bank_and_mcip_clear() {
    let mut delivery = open(amd(), 1);
    delivery.push_ar(0, PAGE, true, Duration::ZERO);
    let told = inject(&mut delivery, 0, &mut ready(), LATER);
    let bank = told.record.bank;
    let mut taken = |state: &McaState| delivery.taken(0, state, LATER);
    assert!(taken(&with(|s| s.mcg_status = mcg::MCIP)).is_empty());
    assert!(taken(&with(|s| s.banks[usize::from(bank)].status = status::VAL)).is_empty());
    let form = Form::AmdAr;
    assert_eq!(taken(&ready()), [Taken::Acknowledged { gpa: PAGE, bank, form }]);
    assert!(taken(&ready()).is_empty(), "once");
    assert!(delivery.is_idle());
}

#[test]
fn an_amd_guest_is_given_deferred_records_in_every_bank_of_every_vcpu() {
    let mut delivery = Delivery::new(Some(amd()), 2, Pace { burst: 100, rate: 1000 });
    let mut states = [ready(), ready()];
    delivery.next(0, &states[0], Duration::ZERO);
    delivery.next(1, &states[1], Duration::ZERO);
    (0..20).for_each(|page| delivery.push_ao(page << 12));
    let mut given = Vec::new();
    for (vcpu, state) in states.iter_mut().enumerate() {
        for _ in DEFERRED_BANKS {
            let told = inject(&mut delivery, vcpu, state, LATER);
            given.push((told.record.addr, told.record.bank));
        }
    }
    let banks = DEFERRED_BANKS.iter().chain(&DEFERRED_BANKS);
    let expected: Vec<_> = (0..14).map(|page| page << 12).zip(banks.copied()).collect();
    assert_eq!(given, expected);
    let full = WaitReason::BankValid { vcpu: 0, bank: AO_BANK };
    let error = Pending { gpa: 14 << 12, kind: FailureKind::ActionOptional };
    assert_eq!(delivery.next(0, &states[0], LATER), Step::Wait(error, full));
    assert_eq!(delivery.next(1, &states[1], LATER), Step::Idle, "one says what all wait for");

    states[1].banks[2].status = 0;
    let taken = delivery.taken(1, &states[1], LATER);
    assert_eq!(taken, [Taken::Acknowledged { gpa: 10 << 12, bank: 2, form: Form::Deferred }]);
    assert_eq!(inject(&mut delivery, 1, &mut states[1], LATER).record.bank, 2, "refilled");
}

#[test]
fn the_pace_counts_what_lies_in_banks_and_what_was_taken() {
    let pace = Pace { burst: 3, rate: 1 };
    let mut delivery = Delivery::new(Some(amd()), 1, pace);
    let mut state = ready();
    delivery.next(0, &state, Duration::ZERO);
    (0..5).for_each(|page| delivery.push_ao(page << 12));
    (0..3).for_each(|_| {
        inject(&mut delivery, 0, &mut state, LATER);
    });
    let paced =
        |gpa| Step::Wait(Pending { gpa, kind: FailureKind::ActionOptional }, WaitReason::Pace);
    assert_eq!(delivery.next(0, &state, LATER), paced(3 << 12));
    assert_eq!(delivery.room_at(), None, "time alone makes no room");
    assert_eq!(delivery.waiting_vcpus(LATER), [0], "to see what the guest takes");

    state = ready();
    assert_eq!(delivery.taken(0, &state, LATER).len(), 3);
    assert_eq!(delivery.next(0, &state, LATER), paced(3 << 12));
    assert!(delivery.waiting_vcpus(LATER).is_empty());
    // The guest has to begin, and then takes a second for each.
    let then = LATER + Duration::from_secs(2);
    assert_eq!(delivery.room_at(), Some(then));
    assert_eq!(delivery.waiting_vcpus(then), [0]);
    inject(&mut delivery, 0, &mut state, then);

    delivery.push_ar(0, 0x9000, true, Duration::ZERO);
    inject(&mut delivery, 0, &mut state, then);
}

#[test]
fn a_page_that_the_guest_is_done_with_makes_room_wherever_its_record_was_last_seen() {
    let mut delivery = Delivery::new(Some(amd()), 1, Pace { burst: 2, rate: 1 });
    let mut state = ready();
    delivery.next(0, &state, Duration::ZERO);
    (0..4).for_each(|page| delivery.push_ao(page << 12));
    inject(&mut delivery, 0, &mut state, LATER);
    inject(&mut delivery, 0, &mut state, LATER);
    // In a bank: there is no room before the bank is seen to be empty.
    assert!(delivery.finished(0, LATER), "others wait");
    assert!(!delivery.finished(0, LATER), "once");
    assert!(!delivery.finished(3 << 12, LATER), "of this one it was not told");
    assert!(matches!(delivery.next(0, &state, LATER), Step::Wait(_, WaitReason::Pace)));
    state = ready();
    assert_eq!(delivery.taken(0, &state, LATER).len(), 2);
    inject(&mut delivery, 0, &mut state, LATER);
    assert!(matches!(delivery.next(0, &state, LATER), Step::Wait(_, WaitReason::Pace)));
    // In the guest's queue.
    assert!(delivery.finished(1 << 12, LATER));
    inject(&mut delivery, 0, &mut state, LATER);
    assert!(!delivery.finished(1 << 12, LATER), "once");
}

#[test]
fn a_record_is_not_laid_into_a_bank_that_may_be_wiped() {
    let mut delivery = Delivery::new(Some(amd()), 1, Pace::default());
    delivery.push_ao(PAGE);
    let error = Pending { gpa: PAGE, kind: FailureKind::ActionOptional };
    let just = Step::Wait(error, WaitReason::JustOpened { vcpu: 0 });
    let at = Duration::from_millis;
    assert_eq!(delivery.next(0, &ready(), at(5000)), just);
    assert_eq!(delivery.next(0, &ready(), at(5999)), just);
    delivery.next(0, &with(|s| s.cr4_mce = false), at(6000));
    assert_eq!(delivery.next(0, &ready(), at(6001)), just, "counted anew");
    assert!(matches!(delivery.next(0, &ready(), at(7001)), Step::Inject(_)));
}

#[test]
fn a_guest_that_starts_over_is_told_again() {
    let mut delivery = open(amd(), 1);
    delivery.push_ao(0x1000);
    delivery.push_ao(0x2000);
    let mut state = ready();
    inject(&mut delivery, 0, &mut state, LATER);
    let mut off = state;
    off.cr4_mce = false;
    assert!(delivery.taken(0, &off, LATER).is_empty());
    assert_eq!(delivery.taken(0, &ready(), LATER), [Taken::Lost { gpa: 0x1000 }]);
    let told = inject(&mut delivery, 0, &mut ready(), 2 * LATER);
    assert_eq!(told.record.addr, 0x1000, "and in its old turn");
}

#[test]
fn a_guest_with_too_few_banks_is_not_written_beyond_them() {
    let mcg_cap = 4 | cap::CTL_P | cap::SER_P;
    let caps = Caps { vendor: Vendor::Intel, mcg_cap, succor: false };
    let mut delivery = open(caps, 1);
    delivery.push_ao(PAGE);
    let error = Pending { gpa: PAGE, kind: FailureKind::ActionOptional };
    assert_eq!(
        delivery.next(0, &ready(), LATER),
        Step::Wait(error, WaitReason::NoBank { vcpu: 0 })
    );
}
