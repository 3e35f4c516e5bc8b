//! A touch that no signal tells of: an exit of KVM says where.

use super::shared::Shared;
use crate::event::SignalledThread;
use crate::memory::access::{self, AccessError};
use crate::types::{Caught, FailureKind, PAGE_SHIFT, PAGE_SIZE};

/// More than one huge page is no single fault.
const MOST: u64 = 1 << 30;

impl Shared {
    /// `vcpu` has touched `size` bytes at `gpa`. If it is `sure`, the first page is bad, and else those are of which the host
    /// says so. True when there is any; the first counts as touched (AR), the others as bad (AO).
    pub(crate) fn touches(&self, vcpu: usize, gpa: u64, size: u64, sure: bool) -> bool {
        let ram = self.ram();
        let first = gpa & !(PAGE_SIZE - 1);
        let end = gpa.saturating_add(size.clamp(1, MOST));
        let pages: Vec<(u64, u64)> = (first..end)
            .step_by(1 << PAGE_SHIFT)
            .filter_map(|gpa| ram.hva(gpa).map(|hva| (gpa, hva)))
            .collect();
        if pages.is_empty() {
            return false;
        }
        let present = self.mapped.are_present(pages.iter().map(|(_, hva)| *hva));
        let is_bad = |gpa: u64, is_present: bool| {
            let read = || access::read_ram(&ram, gpa, &mut [0]);
            // What is mapped is not bad as far as the kernel knows, and need not be read.
            (sure && gpa == first)
                || (!is_present && matches!(read(), Err(AccessError::Poisoned { .. })))
        };
        let bad: Vec<u64> = pages
            .iter()
            .zip(present)
            .filter_map(|(&(gpa, hva), is_present)| is_bad(gpa, is_present).then_some(hva))
            .collect();
        // A thread that changes the map does not have to wait for the observer.
        drop(ram);
        if bad.is_empty() {
            return false;
        }
        let mut inner = self.lock();
        // Without an attached thread no vCPU has touched it, but the page is bad all the same.
        let thread = match inner.vcpus.get(vcpu) {
            Some(Some(_)) => SignalledThread::Vcpu(vcpu),
            _ => SignalledThread::Other,
        };
        let mut kind = FailureKind::ActionRequired;
        for &hva in &bad {
            let caught = Caught { kind, hva, lsb: PAGE_SHIFT };
            self.enter(&mut inner, caught, thread);
            kind = FailureKind::ActionOptional;
        }
        inner.ask(vcpu);
        true
    }
}
