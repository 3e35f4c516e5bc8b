//! The VM from boot to boot: what remains when the guest starts over.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use log::warn;
use mce_relay::{Event, FailureKind, FoundBy, Ledger, PAGE_SHIFT, State};

use crate::api::current::{Current, Running};
use crate::api::types::policy::OnUndeliverable;
use crate::api::types::vm::VmInfo;
use crate::api::types::vm_event::VmEvent;
use crate::config::{RescuePolicy, VmConfig};
use crate::events::monitor::Monitor;
use crate::machine::acpi::AcpiError;
use crate::machine::boot::error::BootError;
use crate::machine::lifecycle::reasons::ExitReason;
use crate::machine::memory::block::{PAGE_SIZE, RamBlock};
use crate::machine::memory::guest_ram::GuestRam;
use crate::machine::vm::Vm;
use crate::machine::vm::error::VmError;
use crate::relaying::hooks::{Made, RelayError, RelayHooks};
use crate::sandbox::allocator;
use crate::sandbox::seccomp::Filters;
use crate::session::config::RunConfig;
use crate::session::outlets::{Outlets, Session};

/// A guest that ends in a triple fault within this time did not come up.
const QUICK_END: Duration = Duration::from_secs(1);
/// After this many such ends in a row the VM ends, too.
const MOST_QUICK_ENDS: u32 = 3;
/// How often building a VM is retried after bad pages that prevented it have been replaced.
const TRIES: u32 = 3;

/// What remains when the guest starts over.
pub(crate) struct Machine<'a> {
    pub(super) config: &'a RunConfig,
    pub(super) filters: Filters,
    /// Path of the API's socket.
    pub(super) socket: Option<PathBuf>,
    pub(super) ram: Arc<GuestRam>,
    pub(super) monitor: &'a Monitor,
    pub(super) outlets: Outlets,
    pub(super) ledger: Ledger,
}

impl Machine<'_> {
    /// Boots the guest, and again after each reset; returns how it ended.
    pub(crate) fn run_to_its_end(&mut self, current: &Current) -> Result<ExitReason, VmError> {
        let (policy, no_reboot) = (self.config.on_undeliverable, self.config.no_reboot);
        let (mut boot, mut quick_faults) = (0, 0);
        loop {
            boot += 1;
            let (reason, ran) = self.boot(boot, current)?;
            let quick = ran < QUICK_END && matches!(reason, ExitReason::TripleFault { .. });
            quick_faults = if quick { quick_faults + 1 } else { 0 };
            if !starts_again(&reason, policy, no_reboot) || quick_faults >= MOST_QUICK_ENDS {
                return Ok(reason);
            }
            let by_policy = matches!(reason, ExitReason::Undeliverable(_));
            if matches!(reason, ExitReason::TripleFault { .. }) {
                warn!("{reason}");
            }
            self.monitor.emit(VmEvent::Reset { reason: reason.to_string(), by_policy });
            self.heal();
        }
    }

    /// Boots the guest once and runs it to its end; returns how it ended, and after how long.
    fn boot(&mut self, boot: u32, current: &Current) -> Result<(ExitReason, Duration), VmError> {
        let config = self.config;
        self.outlets.boot = boot;
        let (vm, made) = self.make(current)?;
        let caps = made.setup.caps();
        let mcg_cap = format!("{:#x}", caps.mcg_cap);
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        self.monitor.emit(VmEvent::Booting {
            boot,
            unix_time: since_1970.unwrap_or(Duration::ZERO).as_secs_f64(),
            mcg_cap: mcg_cap.clone(),
            vendor: caps.vendor,
        });
        let relay = made.relay.handle();
        current.set(Some(Running {
            info: VmInfo {
                name: current.name(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                pid: vm.pid(),
                boot,
                vcpus: usize::from(config.vm.cpus),
                vendor: caps.vendor,
                mcg_cap,
                mce_kill: config.mce_kill,
                rescue: config.rescue != RescuePolicy::Off,
                memory: vm.ram_blocks().iter().map(Into::into).collect(),
                ao_channel: config.ao_channel,
                ghes: config.ghes,
                ao_pace: config.ao_pace,
                on_undeliverable: config.on_undeliverable,
                paused: false,
                pause_reason: None,
                panic: None,
                relay_alive: true,
                kernel: vm.kernel().into(),
                devices: vm.devices().iter().map(|device| device.info()).collect(),
            },
            relay: relay.clone(),
            control: vm.control().clone(),
            ram: Arc::clone(&self.ram),
            devices: vm.devices().to_vec(),
            injector: made.injector.clone(),
            button: made.button.clone(),
        }));
        self.outlets.watch(Some(&relay));
        // Building a VM takes more memory for a while than it needs in the end.
        allocator::give_back();
        let begun = Instant::now();
        let reason = vm.run();
        let ran = begun.elapsed();
        self.outlets.watch(None);
        current.set(None);
        // Ends the relay and its thread; the vCPU threads have ended already. Everything that the relay's thread
        // entered before is in the ledger.
        drop(made);
        self.ledger = relay.ledger();
        Ok((reason, ran))
    }

    /// Builds the VM. If bad pages prevent it they are entered and replaced, and it is retried.
    fn make(&mut self, current: &Current) -> Result<(Vm, Made), VmError> {
        let mut tries = 0;
        loop {
            tries += 1;
            let session = Session {
                config: self.config,
                filters: &self.filters,
                monitor: self.monitor,
                current,
            };
            let outlets = &mut self.outlets;
            let mut lines = |config: &VmConfig| outlets.open(config, &session);
            let mut hooks = RelayHooks {
                config: self.config,
                filters: &self.filters,
                socket: self.socket.as_deref(),
                monitor: self.monitor,
                lines: &mut lines,
                ledger: self.ledger.clone(),
                made: None,
            };
            match Vm::new(&self.config.vm, &self.ram, &mut hooks) {
                Ok(vm) => {
                    let made = hooks.made.take();
                    return Ok((vm, made.ok_or_else(|| VmError::Hook(RelayError::Early.into()))?));
                }
                Err(error) => {
                    if let Some(made) = hooks.made.take() {
                        let relay = made.relay.handle();
                        drop(made);
                        self.ledger = relay.ledger();
                    }
                    let bad = self.ram.find_poison();
                    // An older kernel does not report bad huge pages in its page tables; they are checked one by one
                    // then.
                    let huge = self.ram.blocks().iter().any(|block| block.page_size > PAGE_SIZE);
                    let suspected = !bad.is_empty() || (huge && may_be_bad_memory(&error));
                    if tries == TRIES || !suspected || !self.heal() {
                        return Err(error);
                    }
                    warn!("{error}; bad pages in guest memory have been replaced, trying again");
                }
            }
        }
    }

    /// Replaces bad pages by good memory before the guest starts over, and records the result. Returns whether any page
    /// was bad.
    fn heal(&mut self) -> bool {
        let emit = self.monitor.for_relay();
        // With late kill, say, there are pages that nobody has heard of; they go the same way.
        enter(&mut self.ledger, &self.ram.pieces(), &self.ram.find_poison(), &emit);
        let bad: Vec<u64> = self.ledger.pages().map(|page| page.gpa).collect();
        let healing = self.ram.heal(&bad);
        enter(&mut self.ledger, &self.ram.pieces(), &healing.found, &emit);
        let was_bad = !healing.healed.is_empty() || !healing.removed.is_empty();
        let now = SystemTime::now();
        for gpa in healing.healed {
            let forged = self.ledger.get(gpa).is_some_and(|page| page.is_forged());
            if self.ledger.heal(gpa, now) {
                emit(&Event::Healed { gpa, forged });
            }
        }
        for (gpa, len) in healing.removed {
            let within: Vec<u64> =
                self.ledger.within(gpa..gpa + len).map(|page| page.gpa).collect();
            for gpa in within {
                self.ledger.set(gpa, State::Removed, now);
            }
            emit(&Event::Removed { gpa, len });
        }
        self.ledger.forget_predictions();
        was_bad
    }
}

/// Enters the `bad` pages, which no signal named, into the ledger, each with the pages that the host has lost with it:
/// one event for each such group.
pub(crate) fn enter(ledger: &mut Ledger, blocks: &[RamBlock], bad: &[u64], emit: &dyn Fn(&Event)) {
    let (kind, found_by, now) = (FailureKind::ActionOptional, FoundBy::Scan, SystemTime::now());
    for &named in bad {
        // The other pages of a huge page were entered with the first.
        if ledger.contains(named) {
            continue;
        }
        // A page that is no longer guest RAM does not count.
        let Some(block) = blocks.iter().find(|block| block.contains_gpa(named)) else { continue };
        let extent = block.page_size;
        let lsb = u8::try_from(extent.trailing_zeros()).unwrap_or(PAGE_SHIFT);
        let (start, hva) =
            ((named - block.gpa) / extent * extent, |gpa| block.hva + (gpa - block.gpa));
        let all = (0..extent / PAGE_SIZE).map(|page| block.gpa + start + page * PAGE_SIZE);
        let pages =
            all.filter(|gpa| ledger.enter(*gpa, hva(*gpa), lsb, kind, found_by, now)).count();
        let (gpa, hva) = (named, hva(named));
        emit(&Event::Seen { gpa, hva, kind, found_by, extent, pages });
    }
}

/// Whether bad memory may be the reason why a VM could not be built.
pub(crate) fn may_be_bad_memory(error: &VmError) -> bool {
    matches!(
        error,
        VmError::Boot(
            BootError::Load { .. } | BootError::CopyInitramfs { .. } | BootError::Write { .. }
        ) | VmError::Acpi(AcpiError::Write(_))
    )
}

/// Whether a guest that ended for `reason` is to be started again.
pub(crate) fn starts_again(reason: &ExitReason, policy: OnUndeliverable, no_reboot: bool) -> bool {
    let wanted = match reason {
        ExitReason::Reset | ExitReason::ResetBy(_) | ExitReason::TripleFault { .. } => true,
        ExitReason::Undeliverable(_) => policy == OnUndeliverable::Reset,
        _ => false,
    };
    wanted && !no_reboot
}

#[cfg(test)]
mod tests {
    use mce_relay::{AccessError, Event, FoundBy};

    use super::*;
    use crate::api::types::pause::Undeliverable;
    use crate::machine::boot::error::BootError;
    use crate::machine::lifecycle::reasons::StopCause;

    fn untold() -> ExitReason {
        ExitReason::Undeliverable(Undeliverable {
            vcpu: 0,
            gpa: 0x1000,
            why: "test".into(),
            rip: None,
        })
    }

    #[test]
    fn a_huge_page_is_entered_as_a_whole_and_said_once() {
        let huge = 2 << 20;
        // The block does not begin at a multiple of its pages in the guest.
        let (small, gpa) = (RamBlock::new(0, 0x3000, 0x7000_0000), 0x3000);
        let large = RamBlock { page_size: huge, ..RamBlock::new(gpa, 4 * huge, 0x7e00_0000_0000) };
        let blocks = [small, large];
        let seen = std::cell::RefCell::new(Vec::new());
        let emit = |event: &Event| match event {
            Event::Seen { gpa, hva, extent, pages, found_by: FoundBy::Scan, .. } => {
                seen.borrow_mut().push((*gpa, *hva, *extent, *pages));
            }
            other => panic!("{other}"),
        };
        let mut ledger = Ledger::default();
        let within = gpa + huge;
        let bad: Vec<u64> = (0..512).map(|page| within + page * PAGE_SIZE).collect();
        enter(&mut ledger, &blocks, &[&[0x1000], &bad[..]].concat(), &emit);
        let hva = large.hva + huge;
        assert_eq!(*seen.borrow(), [(0x1000, 0x7000_1000, 4096, 1), (within, hva, huge, 512)]);
        assert_eq!(ledger.len(), 513);
        assert!(
            ledger
                .pages()
                .skip(1)
                .all(|page| page.lsb == 21 && page.hva - page.gpa == hva - within)
        );
        enter(&mut ledger, &blocks, &bad, &emit);
        assert_eq!(seen.borrow().len(), 2, "known already");
    }

    #[test]
    fn what_may_be_for_bad_memory() {
        let boot = |error: BootError| may_be_bad_memory(&VmError::Boot(error));
        // A file that is damaged looks the same; then nothing is found bad, and it is not tried again.
        let cause = "invalid kernel start address".to_owned();
        assert!(boot(BootError::Load { path: "x".into(), ram: 1 << 20, cause }));
        let source = AccessError::Poisoned { gpa: 0x1000 };
        assert!(boot(BootError::Write { what: "command line", gpa: 0x1000, source }));
        assert!(!boot(BootError::EmptyInitramfs { path: "x".into() }));
        assert!(!boot(BootError::Hole { gpa: 0x1000 }));
    }

    #[test]
    fn who_starts_again() {
        use OnUndeliverable::{Pause, Reset, Stop};
        for policy in [Stop, Pause, Reset] {
            assert!(starts_again(&ExitReason::Reset, policy, false));
            let by_the_user = || ExitReason::ResetBy(StopCause::Request("test".to_owned()));
            assert!(starts_again(&by_the_user(), policy, false));
            assert_eq!(starts_again(&untold(), policy, false), policy == Reset);
            let triple_fault = ExitReason::TripleFault { vcpu: 0 };
            assert!(starts_again(&triple_fault, policy, false));
            assert!(!starts_again(&ExitReason::PowerOff, policy, false));
            for reason in [ExitReason::Reset, by_the_user(), triple_fault, untold()] {
                assert!(!starts_again(&reason, policy, true), "{reason:?} with --no-reboot");
            }
        }
    }
}
