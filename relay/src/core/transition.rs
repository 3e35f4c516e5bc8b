//! What becomes of a page: every change of its state goes by here, into the ledger and to the observer.

use std::time::{Duration, Instant, SystemTime};

use super::inner::{Inner, RETRY_FIRST};
use super::shared::Shared;
use crate::decide::machine_check::{Pending, Taken, index};
use crate::event::Event;
use crate::types::{FailureKind, Place, State, UndeliverableReason, WaitReason};

/// What a change of a page's state means.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Change {
    /// It was not so before.
    pub(crate) news: bool,
    /// The page is whole.
    pub(crate) forged: bool,
    /// How long after the page became known, where it is the first time.
    pub(crate) after_micros: Option<u64>,
}

impl Shared {
    pub(crate) fn set(&self, inner: &mut Inner, gpa: u64, state: State) -> Change {
        let now = SystemTime::now();
        let Some((before, news)) = inner.ledger.change(gpa, state, now) else {
            return Change::default();
        };
        let times = &before.times;
        let is_first = news
            && match state {
                State::Injected { .. } => times.injected.is_none(),
                State::Acknowledged { .. } => times.acknowledged.is_none(),
                _ => false,
            };
        // The clock may have been set back.
        let since = now.duration_since(times.seen).unwrap_or(Duration::ZERO);
        let micros = u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
        Change { news, forged: before.is_forged(), after_micros: is_first.then_some(micros) }
    }

    pub(crate) fn waiting(&self, inner: &mut Inner, error: Pending, wait: WaitReason) {
        let Pending { gpa, kind } = error;
        // What a touch waits for does not change that the guest knows of the page.
        if kind == FailureKind::ActionRequired
            && inner.ledger.state_of(gpa).is_some_and(|state| !state.is_untold())
        {
            return;
        }
        let Change { news, forged, .. } = self.set(inner, gpa, State::Waiting { wait });
        if news {
            inner.emit(Event::Waiting { gpa, kind, wait, forged });
            // The relay's thread may be asleep, and it calls the vCPU again.
            inner.wake_relay();
        }
    }

    /// What has become of records that lay in `vcpu`'s banks.
    pub(crate) fn taken(&self, inner: &mut Inner, vcpu: usize, taken: &[Taken]) {
        for taken in taken {
            inner.retry = RETRY_FIRST;
            match *taken {
                Taken::Acknowledged { gpa, bank, form } => {
                    self.acknowledged(inner, gpa, Place::Mce { vcpu: index(vcpu), bank, form });
                }
                Taken::Lost { gpa } => {
                    let error = Pending { gpa, kind: FailureKind::ActionOptional };
                    self.waiting(inner, error, WaitReason::Restarted { vcpu: index(vcpu) });
                }
            }
        }
    }

    /// vCPUs whose ports have been gone for some time are unplugged, as long as there are others.
    pub(crate) fn unplug_gone_vcpus(&self, inner: &mut Inner) {
        let now = Instant::now();
        let due: Vec<usize> =
            inner.gone.iter().filter(|(_, at)| *at <= now).map(|(vcpu, _)| *vcpu).collect();
        if !due.is_empty() && inner.vcpus.iter().any(Option::is_some) {
            inner.gone.retain(|(vcpu, _)| !due.contains(vcpu));
            self.unplug(inner, &due);
        }
    }

    /// The ports of `vcpus` have gone: what they were to be told, or had in their banks, is told elsewhere.
    pub(crate) fn unplug(&self, inner: &mut Inner, vcpus: &[usize]) {
        for &vcpu in vcpus {
            let again = inner.delivery.absent(vcpu, self.now());
            self.told_elsewhere(inner, &again, WaitReason::Unplugged { vcpu: index(vcpu) });
        }
    }

    /// The records of these pages were not read, for the reason in `wait`; the pages wait to be told again.
    pub(crate) fn told_elsewhere(&self, inner: &mut Inner, gpas: &[u64], wait: WaitReason) {
        for &gpa in gpas {
            self.waiting(inner, Pending { gpa, kind: FailureKind::ActionOptional }, wait);
        }
        inner.news = true;
        inner.retry = RETRY_FIRST;
        inner.wake_relay();
    }

    pub(crate) fn acknowledged(&self, inner: &mut Inner, gpa: u64, place: Place) {
        let Change { news, forged, after_micros } =
            self.set(inner, gpa, State::Acknowledged { place });
        if news {
            inner.emit(Event::Acknowledged { gpa, place, after_micros, forged });
        }
    }

    pub(crate) fn undeliverable(
        &self,
        inner: &mut Inner,
        vcpu: usize,
        error: Pending,
        why: UndeliverableReason,
        rip: Option<u64>,
    ) {
        inner.delivery.forget(vcpu, &error);
        let Pending { gpa, kind } = error;
        if kind == FailureKind::ActionRequired {
            inner.goes_on(vcpu);
            inner.wake_relay();
        }
        let Change { forged, .. } = self.set(inner, gpa, State::Undeliverable { why });
        inner.emit(Event::Undeliverable { gpa, kind, vcpu, why, rip, forged });
    }
}
