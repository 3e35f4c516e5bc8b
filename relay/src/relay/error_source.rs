//! The acting half of the firmware-first channel: the status block in guest memory, and the bell.
//!
//! All of it happens on the relay's thread. Guest memory is reached only by the kernel's copy
//! ([`crate::memory::access`]), since the page that holds the block can go bad like any other.

use std::io;
use std::time::{Duration, Instant, SystemTime};

use log::{debug, warn};

use crate::acpi::cper::{self, MAX_LEN, MAX_PAGES, Notice, STATUS_LEN};
use crate::core::host::call_host;
use crate::core::inner::Inner;
use crate::core::shared::{IDLE_TICK, Shared};
use crate::core::transition::Change;
use crate::decide::firmware::{Block, ChannelStep, Observation, Outcome, Publication};
use crate::decide::machine_check::Pending;
use crate::event::{Event, Injection};
use crate::memory::access;
use crate::types::{
    FailureKind, FallbackReason, PAGE_SIZE, Place, State, UndeliverableReason, WaitReason,
};

/// Pause before the first look at a record that has just been published; it doubles.
const LOOK_FIRST: Duration = Duration::from_millis(1);
/// The longest such pause.
const LOOK_LAST: Duration = Duration::from_millis(100);
/// How often the bell is rung again while a record lies untaken: the first ring may have come while the guest had its
/// interrupts masked.
const RING_AGAIN: Duration = Duration::from_secs(1);

/// How the guest is notified of a record, and how the relay sees whether the guest uses the source.
///
/// Called on the relay's thread. Neither call may block for long or use the relay.
pub trait Bell: Send {
    /// Raises the interrupt that the error source names, as an edge. Does nothing where the guest polls.
    ///
    /// # Errors
    /// The guest was not notified; it is told by machine check from here on.
    fn ring(&mut self) -> io::Result<()>;

    /// Whether the guest has taken the source into use (has unmasked its interrupt, say). `None` where that cannot be
    /// seen; then the first record is a trial: the guest takes it within [`ErrorSource::patience`] or is told by
    /// machine check.
    fn is_heard(&mut self) -> Option<bool> {
        None
    }
}

impl<B: Bell + ?Sized> Bell for Box<B> {
    fn ring(&mut self) -> io::Result<()> {
        (**self).ring()
    }

    fn is_heard(&mut self) -> Option<bool> {
        (**self).is_heard()
    }
}

/// The ACPI error source that the guest was given (HEST, generic hardware error source).
pub struct ErrorSource {
    page: u64,
    bell: Box<dyn Bell>,
    patience: Duration,
}

const _: () = assert!(MAX_LEN <= ErrorSource::BLOCK_LEN as usize);

impl ErrorSource {
    /// Where in the page the error status address register lies: eight bytes that hold the guest-physical
    /// address of the block (ACPI 6.5, table 18.10, "error status address").
    pub const ADDRESS_OFFSET: u64 = 0;
    /// Where in the page the status block begins.
    pub const BLOCK_OFFSET: u64 = 64;
    /// Room for a status block, in bytes: the source's "error status block length".
    #[allow(clippy::cast_possible_truncation, reason = "less than a page")]
    pub const BLOCK_LEN: u32 = (PAGE_SIZE - Self::BLOCK_OFFSET) as u32;
    /// How many pages a record names at most: the source's "max sections per record".
    #[allow(clippy::cast_possible_truncation, reason = "it is 15")]
    pub const MAX_SECTIONS: u32 = MAX_PAGES as u32;
    /// The default of [`Self::patience`], for a guest that is notified by interrupt; for one that polls add twice its
    /// interval.
    pub const PATIENCE: Duration = Duration::from_secs(10);

    /// An error source in the page at guest-physical address `page`, aligned to 4 KiB, which is guest RAM and reserved
    /// in the guest's memory map. The relay writes the error status address register at [`Self::ADDRESS_OFFSET`] in it,
    /// and the status block, of [`Self::BLOCK_LEN`] bytes, at [`Self::BLOCK_OFFSET`]. `bell` notifies the guest.
    #[must_use]
    pub fn new(page: u64, bell: impl Bell + 'static) -> Self {
        Self { page, bell: Box::new(bell), patience: Self::PATIENCE }
    }

    /// How long the guest may take to use the source after it has booted, and to take a record; [`Self::PATIENCE`] by
    /// default. It has to exceed the interval of a guest that polls.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    pub(super) fn page(&self) -> u64 {
        self.page
    }

    pub(super) fn how_patient(&self) -> Duration {
        self.patience
    }
}

/// The status block of one guest.
pub(crate) struct Source {
    of: ErrorSource,
    hva: u64,
    /// The record that was published last.
    record: Vec<u8>,
    look_at: Instant,
    pause: Duration,
    rang_at: Instant,
    failing: bool,
}

impl Source {
    /// Writes an empty block to the page at host address `hva`.
    pub(crate) fn new(of: ErrorSource, hva: u64) -> io::Result<Self> {
        let now = Instant::now();
        let source = Self {
            of,
            hva,
            record: Vec::new(),
            look_at: now,
            pause: LOOK_FIRST,
            rang_at: now,
            failing: false,
        };
        source.write(ErrorSource::BLOCK_OFFSET, &[0; MAX_LEN])?;
        source.write(
            ErrorSource::ADDRESS_OFFSET,
            &(source.of.page + ErrorSource::BLOCK_OFFSET).to_le_bytes(),
        )?;
        Ok(source)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        access::write(self.hva + offset, bytes)
    }

    /// What lies in the block.
    fn block(&mut self) -> Block {
        let mut now = vec![0; self.record.len().max(STATUS_LEN)];
        if let Err(error) = access::read(self.hva + ErrorSource::BLOCK_OFFSET, &mut now) {
            if !std::mem::replace(&mut self.failing, true) {
                warn!("cannot read the error source's status block: {error}");
            }
            return Block::Unreachable;
        }
        let (status, rest) = now.split_at(STATUS_LEN);
        let ours = self.record.get(STATUS_LEN..).is_none_or(|ours| ours == rest);
        match (status.iter().all(|byte| *byte == 0), ours) {
            (true, true) => Block::Empty,
            (false, true) if self.record.get(..STATUS_LEN) == Some(status) => Block::Ours,
            _ => Block::Foreign,
        }
    }

    /// Puts the record into the block, its status last, so that no guest sees half of it.
    fn publish(&mut self, publication: &Publication) -> io::Result<()> {
        self.record = cper::record(publication.notice, &publication.gpas);
        let (status, rest) = self.record.split_at(STATUS_LEN);
        self.write(ErrorSource::BLOCK_OFFSET + STATUS_LEN as u64, rest)?;
        self.write(ErrorSource::BLOCK_OFFSET, status)?;
        self.pause = LOOK_FIRST;
        self.ring()
    }

    fn ring(&mut self) -> io::Result<()> {
        self.rang_at = Instant::now();
        let rung = call_host("bell", || self.of.bell.ring());
        rung.unwrap_or_else(|| Err(io::Error::other("the bell panicked")))
    }

    /// Zeroes the status word: the record is withdrawn.
    fn withdraw(&mut self) {
        self.record.clear();
        if let Err(error) = self.write(ErrorSource::BLOCK_OFFSET, &[0; STATUS_LEN]) {
            debug!("cannot empty the error source's status block: {error}");
        }
    }

    /// Takes the next step on this channel; returns how long the thread may sleep before the next look.
    pub(crate) fn look(&mut self, shared: &Shared) -> Duration {
        {
            let inner = shared.lock();
            if inner.delivery.firmware_is_idle() {
                return IDLE_TICK;
            }
            let pause = self.look_at.saturating_duration_since(Instant::now());
            if !pause.is_zero() && !inner.firmware_news {
                return pause;
            }
        }
        let (block, source_taken) =
            (self.block(), call_host("bell", || self.of.bell.is_heard()).flatten());
        let mut inner = shared.lock();
        inner.firmware_news = false;
        let paused = inner.is_paused();
        let seen = Observation { block, source_taken, paused };
        let now = shared.now();
        let (outcomes, step) = inner.delivery.firmware_step(&seen, now);
        shared.apply_outcomes(&mut inner, &outcomes);
        // Without the lock: writing guest memory and ringing the bell may take long. Only this thread looks at the
        // block, so no other can see the record taken before its publication is reported.
        let withdraws = inner.delivery.firmware_withdraws();
        drop(inner);
        if withdraws {
            self.withdraw();
        }
        if !matches!(step, ChannelStep::Wait(_, WaitReason::InBlock)) {
            // The block holds no record of ours, so its contents are not compared any more.
            self.record.clear();
        }
        let pause = match step {
            ChannelStep::Idle => IDLE_TICK,
            ChannelStep::Wait(first, wait) => {
                if let Some((gpa, notice)) = first {
                    shared.set_waiting(&mut shared.lock(), gpa, notice, wait);
                }
                if self.rang_at.elapsed() >= RING_AGAIN && wait == WaitReason::InBlock {
                    // A failure here changes nothing: a guest that is not notified runs out of its time for the record.
                    let _ = self.ring();
                }
                self.pause = (self.pause * 2).min(LOOK_LAST);
                self.pause
            }
            ChannelStep::Publish(publication) => {
                match self.publish(&publication) {
                    Ok(()) => shared.published(&mut shared.lock(), &publication),
                    Err(error) => {
                        warn!("cannot tell the guest by its error source: {error}");
                        let unreachable = self.block() == Block::Unreachable;
                        let why = if unreachable {
                            FallbackReason::Unreachable
                        } else {
                            FallbackReason::NotNotified
                        };
                        let mut inner = shared.lock();
                        let outcomes = inner.delivery.firmware_refused(why);
                        shared.apply_outcomes(&mut inner, &outcomes);
                        let withdraws = inner.delivery.firmware_withdraws();
                        drop(inner);
                        if withdraws {
                            self.withdraw();
                        }
                    }
                }
                self.pause
            }
        };
        self.look_at = Instant::now() + pause;
        pause
    }
}

/// How the channel's steps change the ledger, and what the observer is told of them.
impl Shared {
    fn published(&self, inner: &mut Inner, publication: &Publication) {
        let Publication { number: record, notice, ref gpas } = *publication;
        for &gpa in gpas {
            let state = State::Injected { place: Place::Ghes { record } };
            match notice {
                Notice::Predicted => self.set_predicted(inner, gpa, state),
                Notice::Lost => {
                    let Change { after_micros, forged, .. } = self.set(inner, gpa, state);
                    let by = Injection::Ghes { record, pages: gpas.len() };
                    inner.emit(Event::Injected { gpa, by, after_micros, forged });
                }
            }
        }
    }

    fn set_waiting(&self, inner: &mut Inner, gpa: u64, notice: Notice, wait: WaitReason) {
        match notice {
            Notice::Predicted => self.set_predicted(inner, gpa, State::Waiting { wait }),
            Notice::Lost => {
                self.waiting(inner, Pending { gpa, kind: FailureKind::ActionOptional }, wait);
            }
        }
    }

    fn apply_outcomes(&self, inner: &mut Inner, outcomes: &[Outcome]) {
        for outcome in outcomes {
            match *outcome {
                Outcome::Taken { gpa, notice, record } => {
                    let place = Place::Ghes { record };
                    match notice {
                        Notice::Predicted => {
                            self.set_predicted(inner, gpa, State::Acknowledged { place });
                        }
                        Notice::Lost => self.acknowledged(inner, gpa, place),
                    }
                }
                Outcome::Returned { gpa, notice: Notice::Lost, why } => {
                    // A vCPU has to be called to take it.
                    inner.news = true;
                    let error = Pending { gpa, kind: FailureKind::ActionOptional };
                    self.waiting(inner, error, WaitReason::NotByFirmware { why });
                }
                Outcome::Returned { gpa, notice: Notice::Predicted, why } => {
                    let why = UndeliverableReason::NoTaker { why };
                    self.set_predicted(inner, gpa, State::Undeliverable { why });
                }
            }
        }
    }

    fn set_predicted(&self, inner: &mut Inner, gpa: u64, state: State) {
        if inner.ledger.set_predicted(gpa, state, SystemTime::now()) {
            inner.emit(Event::Predicted { gpa, state });
        }
    }
}
