//! Forecasts what KVM and a Linux guest will do about a machine check, before it is injected.
//!
//! KVM's side is `kvm_vcpu_ioctl_x86_set_mce` in `arch/x86/kvm/x86.c`; the guest's are the tables in
//! `arch/x86/kernel/cpu/mce/severity.c` and what `do_machine_check` and `machine_check_poll` in
//! `core.c` do about each grade, in 6.1 and 6.12. A case without a rule here counts as lethal.

use mce_relay::mca::{Caps, MISC_PHYSICAL_4K, McaState, Record, Vendor, cap, mcg, status};

use crate::api::types::manual_mce::{Forecast, Guest, Kvm, Request};
use crate::api::types::mca_bits::{MCACOD, PCC};

/// The forecast for `request` in a guest that was shown `caps`, with the states `states` of its vCPUs, by index.
#[must_use]
pub fn forecast(request: &Request, caps: &Caps, states: &[McaState]) -> Forecast {
    // The request was checked: there is such a vCPU.
    let state = &states[usize::from(request.vcpu)];
    let online = states.iter().filter(|state| !state.waits_for_sipi).count();
    let (kvm, why) = kvm(request, caps, state);
    let bank = state.banks.get(usize::from(request.bank)).copied().unwrap_or_default();
    let overwrites = bank.valid() && matches!(kvm, Kvm::Logs | Kvm::MachineCheck);
    let kvm_why = match overwrites {
        true => format!("{why}; the record that the bank still holds is overwritten"),
        false => why.to_owned(),
    };
    let (mut guest, guest_why) = match kvm {
        Kvm::Ignores => (Guest::Nothing, "it hears of nothing"),
        Kvm::TripleFault => (Guest::Dies, "no processor survives that"),
        Kvm::MarksOverflow => (Guest::Logs, "of the error that is there already"),
        Kvm::Logs => polled(request, caps),
        Kvm::MachineCheck => handled(request, caps, state, online),
    };
    let mut guest_why = guest_why.to_owned();
    // A record that is lethal by itself needs no further reason.
    if request.broadcast
        && !guest.is_lethal()
        && let Some(worse) = broadcast_danger(request, caps, states, kvm)
    {
        (guest, guest_why) = worse;
    }
    Forecast { kvm, kvm_why, guest, guest_why, lethal: guest.is_lethal() }
}

/// Why a broadcast kills the guest, if it does. `kvm` is what KVM does on the requested vCPU.
fn broadcast_danger(
    request: &Request,
    caps: &Caps,
    states: &[McaState],
    kvm: Kvm,
) -> Option<(Guest, String)> {
    let (target, state) = (request.vcpu, &states[usize::from(request.vcpu)]);
    let Record { bank, status, addr, misc, mcg_status } =
        crate::relaying::manual_mce::bystander::bystander_record(request);
    let bystander = Request { bank, status, addr, misc, mcg_status, ..*request };
    // Linux waits for those that it counts as online, and opens a processor's handler before it does.
    let is_open = |state: &McaState| {
        !state.waits_for_sipi
            && state.cr4_mce
            && (!caps.has(cap::CTL_P) || state.mcg_ctl == u64::MAX)
    };
    let others: Vec<_> = (0_u8..)
        .zip(states)
        .filter(|(vcpu, state)| *vcpu != target && is_open(state))
        .map(|(vcpu, state)| (vcpu, state, self::kvm(&bystander, caps, state)))
        .collect();
    let (called, left_out): (Vec<_>, Vec<_>) =
        others.into_iter().partition(|(_, _, (kvm, _))| *kvm == Kvm::MachineCheck);
    let (first, first_state, _) = *called.first().or(left_out.first())?;
    match caps.vendor {
        Vendor::Intel if kvm != Kvm::MachineCheck || is_local(request, caps, state) => {
            // If no other vCPU is called, none waits.
            called.first()?;
            let why = format!(
                "vCPU {first} is called and waits one second for vCPU {target}, which is not; leave broadcast out"
            );
            Some((Guest::Dies, why))
        }
        Vendor::Intel => {
            let (vcpu, _, (_, why)) = left_out.first()?;
            let why = format!(
                "vCPU {vcpu} cannot be called, and the others wait for it one second: {why}"
            );
            Some((Guest::Dies, why))
        }
        Vendor::Amd => {
            called.first()?;
            let (guest, why) = handled(&bystander, caps, first_state, 1);
            let why = format!("vCPU {first} is called, too: {why}");
            guest.is_lethal().then_some((guest, why))
        }
    }
}

/// Whether the guest takes it for a local machine check (LMCE).
fn is_local(request: &Request, caps: &Caps, state: &McaState) -> bool {
    request.mcg_status & mcg::LMCES != 0 && state.lmce && caps.has(cap::LMCE_P)
}

fn kvm(request: &Request, caps: &Caps, state: &McaState) -> (Kvm, &'static str) {
    let has = |bit| request.status & bit != 0;
    let bank = state.banks.get(usize::from(request.bank)).copied().unwrap_or_default();
    // `is_ucna` in x86.c.
    if request.mcg_status == 0 && has(status::UC) && !has(PCC | status::S | status::AR) {
        return (Kvm::Logs, "UC without S, AR and MCG_STATUS (UCNA)");
    }
    if !has(status::UC) {
        return match bank.valid() {
            true if bank.status & status::UC != 0 => {
                (Kvm::MarksOverflow, "the bank still holds an uncorrected error")
            }
            true => (Kvm::Logs, "UC is clear; as the bank still holds an error, OVER is added"),
            false => (Kvm::Logs, "UC is clear"),
        };
    }
    if caps.has(cap::CTL_P) && state.mcg_ctl != u64::MAX {
        return (Kvm::Ignores, "MCG_CTL is not all ones");
    }
    if bank.ctl != u64::MAX {
        return (Kvm::Ignores, "MCi_CTL of the bank is not all ones");
    }
    if state.mcip() {
        return (Kvm::TripleFault, "MCG_STATUS.MCIP is set: a machine check is in progress");
    }
    if !state.cr4_mce {
        return (Kvm::TripleFault, "CR4.MCE is clear");
    }
    match bank.valid() {
        true => (Kvm::MachineCheck, "UC is set; as the bank still holds an error, OVER is added"),
        false => (Kvm::MachineCheck, "UC is set"),
    }
}

/// `mce_usable_address`: whether the guest takes MCi_ADDR for the address of a page.
fn names_a_page(request: &Request, caps: &Caps) -> bool {
    let has = |bit| request.status & bit != 0;
    has(status::ADDRV)
        && match caps.vendor {
            Vendor::Amd => has(status::POISON),
            // The granularity is that of a page or finer, the address a physical one.
            Vendor::Intel => {
                const LSB: u64 = 0x3f;
                const MODE: u64 = 7 << 6;
                has(status::MISCV)
                    && request.misc & MODE == MISC_PHYSICAL_4K & MODE
                    && request.misc & LSB <= MISC_PHYSICAL_4K & LSB
            }
        }
}

/// What a guest does about a record that raised nothing.
fn polled(request: &Request, caps: &Caps) -> (Guest, &'static str) {
    let has = |bit| request.status & bit != 0;
    let page = names_a_page(request, caps);
    match caps.vendor {
        // `mce_severity_amd` asks for DEFERRED before UC.
        Vendor::Amd if has(status::DEFERRED) && !has(status::UC) && page => {
            (Guest::IsolatesPageAtPoll, "a deferred error (every five minutes by default)")
        }
        Vendor::Amd if has(status::UC) => (
            Guest::Nothing,
            "its poll leaves uncorrected errors to a machine check that never comes",
        ),
        Vendor::Intel if has(status::UC) && has(status::EN) && caps.has(cap::SER_P) && page => {
            (Guest::IsolatesPageAtPoll, "UCNA (every five minutes by default)")
        }
        _ => (Guest::Logs, "a corrected error, or one that names no page; at its next poll"),
    }
}

/// What a guest does about a machine check.
fn handled(
    request: &Request,
    caps: &Caps,
    state: &McaState,
    online: usize,
) -> (Guest, &'static str) {
    let full = state.banks.get(usize::from(request.bank)).is_some_and(|bank| bank.valid());
    let over = request.status & status::OVER != 0 || full;
    let has = |bit| request.status & bit != 0;
    let mcg = |bit| request.mcg_status & bit != 0;
    // Intel's wait for each other (`mce_start`): one second, then "Timeout: Not all CPUs entered
    // broadcast exception handler".
    let alone = is_local(request, caps, state);
    if caps.vendor == Vendor::Intel && online > 1 && !request.broadcast && !alone {
        return (
            Guest::Dies,
            "its other vCPUs are not called, and it waits for them one second; use broadcast, or LMCES where it \
             is on",
        );
    }
    if has(PCC) {
        return (Guest::Dies, "PCC: the processor's context is corrupt");
    }
    if !mcg(mcg::MCIP) {
        return (
            Guest::Dies,
            "MCG_STATUS has no MCIP, which its handler takes for broken hardware",
        );
    }
    match caps.vendor {
        Vendor::Amd => amd(request, caps, over),
        Vendor::Intel => intel(request, caps, over),
    }
}

fn amd(request: &Request, caps: &Caps, over: bool) -> (Guest, &'static str) {
    let has = |bit| request.status & bit != 0;
    if has(status::DEFERRED) {
        return match names_a_page(request, caps) {
            true => (Guest::IsolatesPage, "a deferred error, found by the machine check"),
            false => (Guest::Logs, "a deferred error that names no page"),
        };
    }
    if !caps.succor {
        return (Guest::Dies, "it cannot contain uncorrected errors (no SUCCOR)");
    }
    if over {
        return (Guest::Dies, "OVER: errors were lost");
    }
    match names_a_page(request, caps) {
        true => (Guest::KillsWhatRuns, "consumed poison (AR); the page is taken out of use"),
        false => (Guest::KillsWhatRuns, "an uncorrected error that names no page"),
    }
}

fn intel(request: &Request, caps: &Caps, over: bool) -> (Guest, &'static str) {
    // MCACODs that are graded as AO (`severity.c`): memory scrubbing, and last-level cache write-back.
    const SCRUBBING: std::ops::RangeInclusive<u64> = status::MCACOD_SCRUB..=0xcf;
    const WRITE_BACK: u64 = 0x17a;
    /// And as AR beside a data load: an instruction fetch (SDM vol. 3B, table 17-17).
    const FETCH: u64 = 0x150;
    let has = |bit| request.status & bit != 0;
    let mcg = |bit| request.mcg_status & bit != 0;
    let code = request.status & MCACOD;
    if !has(status::EN) {
        return (Guest::Nothing, "EN is clear: its handler skips the bank");
    }
    if !mcg(mcg::RIPV | mcg::EIPV) {
        return (Guest::Dies, "neither RIPV nor EIPV");
    }
    if !caps.has(cap::SER_P) {
        return (Guest::Dies, "an uncorrected error, and no software error recovery (SER_P)");
    }
    if !has(status::S) {
        return match has(status::AR) {
            true => (Guest::Dies, "AR without S is not graded"),
            false => (Guest::IsolatesPageAtPoll, "UCNA: its handler leaves it to the poll"),
        };
    }
    if has(status::AR) {
        if over {
            return (Guest::Dies, "action required with lost events (OVER)");
        }
        if !mcg(mcg::EIPV) {
            return (Guest::Nothing, "AR without EIPV is some other thread's");
        }
        let known = code == status::MCACOD_DATA_LOAD || code == FETCH;
        return match known && names_a_page(request, caps) {
            true => (Guest::KillsWhatRuns, "SRAR; the page is taken out of use"),
            false => (Guest::Dies, "an AR of unknown code, or one that names no page"),
        };
    }
    if !mcg(mcg::RIPV) {
        return (Guest::KillsWhatRuns, "RIPV is clear: what ran there cannot go on");
    }
    if over {
        return (Guest::Logs, "action optional with lost events (OVER): not acted on");
    }
    match SCRUBBING.contains(&code) || code == WRITE_BACK {
        true if names_a_page(request, caps) => (Guest::IsolatesPage, "SRAO"),
        _ => (Guest::Logs, "an AO of unknown code, or one that names no page"),
    }
}

#[cfg(test)]
mod tests {
    use mce_relay::Form;
    use mce_relay::mca::{BANKS, record};

    use super::*;

    fn caps(vendor: Vendor) -> Caps {
        let ser = if vendor == Vendor::Intel { cap::SER_P | cap::LMCE_P } else { 0 };
        let mcg_cap = u64::from(BANKS) | cap::CTL_P | ser;
        Caps { vendor, mcg_cap, succor: vendor == Vendor::Amd }
    }

    fn state() -> McaState {
        McaState::up()
    }

    fn of(form: Form, lmce: bool) -> Request {
        let record = record(form, 0x5000, 9, lmce);
        Request {
            vcpu: 0,
            bank: record.bank,
            status: record.status,
            mcg_status: record.mcg_status,
            addr: record.addr,
            misc: record.misc,
            broadcast: false,
            force: false,
            dry_run: false,
        }
    }

    /// With one vCPU that stands so.
    fn alone(request: &Request, caps: &Caps, state: McaState) -> Forecast {
        forecast(request, caps, &[state])
    }

    /// What the guest would do, with one vCPU.
    fn guest(request: &Request, vendor: Vendor) -> Guest {
        alone(request, &caps(vendor), state()).guest
    }

    #[test]
    fn the_relays_own_forms() {
        use Vendor::{Amd, Intel};
        for (form, vendor, kvm, guest) in [
            (Form::Srao, Intel, Kvm::MachineCheck, Guest::IsolatesPage),
            (Form::Srar, Intel, Kvm::MachineCheck, Guest::KillsWhatRuns),
            (Form::AmdAr, Amd, Kvm::MachineCheck, Guest::KillsWhatRuns),
            (Form::Deferred, Amd, Kvm::Logs, Guest::IsolatesPageAtPoll),
        ] {
            let forecast = alone(&of(form, false), &caps(vendor), state());
            assert_eq!((forecast.kvm, forecast.guest), (kvm, guest), "{form}: {forecast}");
            assert_eq!(forecast.lethal, guest == Guest::KillsWhatRuns, "{form}");
        }
    }

    #[test]
    fn what_kvm_makes_of_a_vcpu_that_is_not_ready() {
        let srao = of(Form::Srao, false);
        let (caps, fresh) = (caps(Vendor::Intel), state());
        let mut disabled = fresh;
        disabled.banks[9].ctl = 0;
        let mut full = fresh;
        full.banks[9].status = status::VAL | status::UC;
        let over = Request { status: srao.status | status::OVER, ..srao };
        for (state, request, kvm, guest) in [
            (McaState { mcg_status: mcg::MCIP, ..fresh }, srao, Kvm::TripleFault, Guest::Dies),
            (McaState { cr4_mce: false, ..fresh }, srao, Kvm::TripleFault, Guest::Dies),
            (McaState { mcg_ctl: 0, ..fresh }, srao, Kvm::Ignores, Guest::Nothing),
            (disabled, srao, Kvm::Ignores, Guest::Nothing),
            (full, srao, Kvm::MachineCheck, Guest::Logs),
            (fresh, over, Kvm::MachineCheck, Guest::Logs),
            (full, of(Form::Srar, false), Kvm::MachineCheck, Guest::Dies),
            (full, of(Form::Deferred, false), Kvm::MarksOverflow, Guest::Logs),
        ] {
            let forecast = alone(&request, &caps, state);
            assert_eq!((forecast.kvm, forecast.guest), (kvm, guest), "{forecast}");
        }
    }

    #[test]
    fn what_linux_panics_of() {
        let (srao, srar) = (of(Form::Srao, false), of(Form::Srar, false));
        let amd = of(Form::AmdAr, false);
        let with = |request: Request, set: u64| Request { status: request.status | set, ..request };
        for (request, vendor) in [
            (with(srao, PCC), Vendor::Intel),
            (with(srar, status::OVER), Vendor::Intel),
            (Request { mcg_status: mcg::RIPV, ..srao }, Vendor::Intel),
            (Request { mcg_status: mcg::MCIP, ..srao }, Vendor::Intel),
            (Request { status: srar.status & !MCACOD, ..srar }, Vendor::Intel),
            (with(amd, PCC), Vendor::Amd),
            (with(amd, status::OVER), Vendor::Amd),
        ] {
            assert_eq!(guest(&request, vendor), Guest::Dies, "{request:x?}");
        }
        let poor = Caps { mcg_cap: u64::from(BANKS), succor: false, ..caps(Vendor::Intel) };
        assert!(alone(&srao, &poor, state()).lethal, "no SER_P");
        let poor = Caps { succor: false, ..caps(Vendor::Amd) };
        assert!(alone(&amd, &poor, state()).lethal, "no SUCCOR");
    }

    #[test]
    fn an_intel_guest_wants_all_its_vcpus_or_lmce() {
        let (caps, srao) = (caps(Vendor::Intel), of(Form::Srao, false));
        assert_eq!(forecast(&srao, &caps, &[state(); 2]).guest, Guest::Dies);
        let all = Request { broadcast: true, ..srao };
        assert_eq!(forecast(&all, &caps, &[state(); 2]).guest, Guest::IsolatesPage);
        let local = of(Form::Srao, true);
        assert_eq!(forecast(&local, &caps, &[state(); 2]).guest, Guest::Dies, "LMCE is off");
        let on = McaState { lmce: true, ..state() };
        assert_eq!(forecast(&local, &caps, &[on; 2]).guest, Guest::IsolatesPage);
        let amd = of(Form::AmdAr, false);
        let amd = forecast(&amd, &self::caps(Vendor::Amd), &[state(); 2]);
        assert_eq!(amd.guest, Guest::KillsWhatRuns, "AMD's are always local");
    }

    #[test]
    fn a_broadcast_has_all_come_or_none() {
        use Vendor::{Amd, Intel};
        let (srao, deferred) = (of(Form::Srao, false), of(Form::Deferred, false));
        let fresh = state();
        let busy = McaState { mcg_status: mcg::MCIP, ..fresh };
        let closed = McaState { cr4_mce: false, ..fresh };
        let not_started = McaState { waits_for_sipi: true, ..closed };
        let mut disabled = fresh;
        disabled.banks[1].ctl = 0;
        let lmce = McaState { lmce: true, ..fresh };
        for (request, vendor, first, second, guest, words) in [
            (srao, Intel, fresh, fresh, Guest::IsolatesPage, "SRAO"),
            (srao, Intel, fresh, busy, Guest::Dies, "vCPU 1 cannot be called"),
            (srao, Intel, fresh, disabled, Guest::Dies, "vCPU 1 cannot be called"),
            // Linux does not wait for those.
            (srao, Intel, fresh, closed, Guest::IsolatesPage, "SRAO"),
            (srao, Intel, fresh, not_started, Guest::IsolatesPage, "SRAO"),
            // They would wait for one that has come alone, or not at all.
            (of(Form::Srao, true), Intel, lmce, lmce, Guest::Dies, "waits one second for vCPU 0"),
            (deferred, Intel, fresh, fresh, Guest::Dies, "waits one second for vCPU 0"),
            (deferred, Intel, fresh, not_started, Guest::Logs, "corrected"),
            // An AMD guest takes the others' for errors of their own.
            (deferred, Amd, fresh, fresh, Guest::KillsWhatRuns, "vCPU 1 is called, too"),
            (deferred, Amd, fresh, busy, Guest::IsolatesPageAtPoll, "deferred"),
        ] {
            let all = Request { broadcast: true, ..request };
            let forecast = forecast(&all, &caps(vendor), &[first, second]);
            assert_eq!(forecast.guest, guest, "{forecast}");
            assert!(forecast.guest_why.contains(words), "{words}: {forecast}");
        }
    }

    #[test]
    fn what_is_found_by_the_poll_or_not_at_all() {
        let ucna = Request { mcg_status: 0, ..of(Form::Srao, false) };
        let ucna = Request { status: ucna.status & !status::S, ..ucna };
        assert_eq!(guest(&ucna, Vendor::Intel), Guest::IsolatesPageAtPoll);
        assert_eq!(guest(&ucna, Vendor::Amd), Guest::Nothing);
        let corrected = Request { status: status::VAL | status::EN, ..ucna };
        assert_eq!(guest(&corrected, Vendor::Intel), Guest::Logs);
        let huge = Request { misc: MISC_PHYSICAL_4K & !0x3f | 21, ..of(Form::Srao, false) };
        assert_eq!(guest(&huge, Vendor::Intel), Guest::Logs, "no page of 4 KiB");
        let disabled = of(Form::Srao, false);
        let disabled = Request { status: disabled.status & !status::EN, ..disabled };
        assert_eq!(guest(&disabled, Vendor::Intel), Guest::Nothing);
    }
}
