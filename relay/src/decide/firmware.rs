//! The pure half of the firmware-first channel: what to do next on it, as [`super::machine_check`] decides it for
//! machine checks.
//!
//! Records lie in one status block in guest memory, one at a time. The guest takes a record when it is
//! notified, or at its next poll, and zeroes the status word: that is its acknowledgement. A guest that
//! does not take records in time is told by machine check instead; see [`FallbackReason`] for when.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use crate::acpi::cper::{MAX_PAGES, Notice};
pub use crate::types::FallbackReason;
use crate::types::WaitReason;

/// Pages that Linux queues per processor (`MEMORY_FAILURE_FIFO_ORDER`, `mm/memory-failure.c`); more
/// are dropped ("buffer overflow when queuing memory failure"). A VMM cannot know which processor will take the next
/// record, so all pages that are on their way count as if one processor queued them.
pub(crate) const QUEUE: u32 = 16;
/// How long a guest that has not taken a record in time is not tried again.
const SILENCE: Duration = Duration::from_secs(60);
/// Of the time between two looks at most this much counts as time in which the guest could run: this process may have
/// been stopped, and the guest with it.
const LOOK: Duration = Duration::from_secs(1);

/// Which way AOs go. ARs are always machine checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum AoChannel {
    /// By firmware-first records to AMD-style guests that have taken the error source into use, by
    /// machine check to all others.
    #[default]
    Auto,
    /// By machine check.
    Mce,
    /// By firmware-first records to every guest that has taken the error source into use.
    Ghes,
}

impl fmt::Display for AoChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Mce => "mce",
            Self::Ghes => "ghes",
        })
    }
}

/// What lies in the status block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Block {
    /// The status word is zero.
    Empty,
    /// The record that was published last, untouched.
    Ours,
    /// Anything else.
    Foreign,
    /// It cannot be read.
    Unreachable,
}

/// What is seen of the guest's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Observation {
    /// The status block.
    pub block: Block,
    /// Whether the guest has taken the error source into use; `None` where that cannot be seen.
    pub source_taken: Option<bool>,
    /// The guest does not run.
    pub paused: bool,
}

/// A record that is to be published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publication {
    /// 1 for the first record of this channel, and so on.
    pub number: u32,
    /// What it says.
    pub notice: Notice,
    /// Guest-physical addresses of its pages, at least one and at most [`MAX_PAGES`].
    pub gpas: Vec<u64>,
}

/// What has become of a page on this channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The guest zeroed the status word of the record that named the page.
    Taken {
        /// Guest-physical address.
        gpa: u64,
        /// What it was told.
        notice: Notice,
        /// The record's number.
        record: u32,
    },
    /// The page is not told of on this channel.
    Returned {
        /// Guest-physical address.
        gpa: u64,
        /// What it was to be told.
        notice: Notice,
        /// Why not on this channel.
        why: FallbackReason,
    },
}

/// The next step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChannelStep {
    /// Nothing waits on this channel.
    Idle,
    /// Nothing can be done now. Names the next page in turn, unless a record lies in the block.
    Wait(Option<(u64, Notice)>, WaitReason),
    /// Write this into the block and notify the guest;
    /// [`Delivery::firmware_refused`](crate::decide::machine_check::Delivery::firmware_refused) if that fails.
    Publish(Publication),
}

/// The record in the block.
#[derive(Debug)]
struct InBlock {
    publication: Publication,
    /// Pages of it that the guest has touched since. It learns of them by the AR, so they are not told of again.
    touched: Vec<u64>,
}

/// The channel of one virtual machine.
#[derive(Debug)]
pub(crate) struct Channel {
    /// Whether this channel carries AOs, or only predicted failures.
    pub(crate) carries_aos: bool,
    /// How long a guest may take to use the source after boot, or to take a record.
    patience: Duration,
    lost: VecDeque<u64>,
    predicted: VecDeque<u64>,
    current: Option<InBlock>,
    /// Records published so far.
    records: u32,
    /// For how long the guest could have done what is expected next of it (use the source, take the record).
    waited: Duration,
    looked_at: Option<Duration>,
    source_taken: Option<bool>,
    silent_until: Option<Duration>,
    broken: Option<FallbackReason>,
    /// The status word is to be zeroed by the relay.
    withdraw: bool,
    /// The relay has to observe when the guest opens its machine-check handler.
    pub(crate) watches_boot: bool,
}

impl Channel {
    pub(crate) fn new(carries_aos: bool, patience: Duration) -> Self {
        Self {
            carries_aos,
            patience,
            lost: VecDeque::new(),
            predicted: VecDeque::new(),
            current: None,
            records: 0,
            waited: Duration::ZERO,
            looked_at: None,
            source_taken: None,
            silent_until: None,
            broken: None,
            withdraw: false,
            watches_boot: false,
        }
    }

    /// A page that is bad, or predicted to fail.
    pub(crate) fn push(&mut self, notice: Notice, gpa: u64) {
        match notice {
            Notice::Lost => {
                // The contents are lost already, so a prediction is of no use any more.
                self.predicted.retain(|waiting| *waiting != gpa);
                self.lost.push_back(gpa);
            }
            Notice::Predicted => self.predicted.push_back(gpa),
        }
    }

    /// The guest has touched the page: it learns of it by the AR.
    pub(crate) fn touched(&mut self, gpa: u64) {
        self.lost.retain(|waiting| *waiting != gpa);
        self.predicted.retain(|waiting| *waiting != gpa);
        if let Some(current) = self.current.as_mut()
            && current.publication.gpas.contains(&gpa)
        {
            current.touched.push(gpa);
        }
    }

    /// The AR for this page was dropped, so the guest was not told by it.
    pub(crate) fn touch_dropped(&mut self, gpa: u64) {
        if let Some(current) = self.current.as_mut() {
            current.touched.retain(|touched| *touched != gpa);
        }
    }

    /// The pages that `is_gone` accepts are no longer part of the guest's memory.
    pub(crate) fn gone(&mut self, is_gone: &dyn Fn(u64) -> bool) {
        self.lost.retain(|waiting| !is_gone(*waiting));
        self.predicted.retain(|waiting| !is_gone(*waiting));
        if let Some(current) = self.current.as_mut() {
            let gone = current.publication.gpas.iter().copied().filter(|gpa| is_gone(*gpa));
            current.touched.extend(gone);
        }
    }

    /// Whether this channel has nothing to do: no page waits to be told, no record to be taken.
    pub(crate) fn is_idle(&self) -> bool {
        self.lost.is_empty()
            && self.predicted.is_empty()
            && self.current.is_none()
            && !self.withdraw
    }

    /// Whether a page waits to be told of on this channel.
    pub(crate) fn has_waiting(&self) -> bool {
        !(self.lost.is_empty() && self.predicted.is_empty())
    }

    /// Whether the record in the block names the page at `gpa`.
    pub(crate) fn names(&self, gpa: u64) -> bool {
        self.current.as_ref().is_some_and(|current| current.publication.gpas.contains(&gpa))
    }

    /// Pages in the block that the guest will queue once it takes the record.
    pub(crate) fn in_block(&self) -> usize {
        self.current.as_ref().map_or(0, |current| current.publication.gpas.len())
    }

    /// What has become of the record in the block, according to `seen`.
    pub(crate) fn settle(&mut self, seen: &Observation, now: Duration) -> Vec<Outcome> {
        let since = self.looked_at.map_or(Duration::ZERO, |at| now.saturating_sub(at));
        self.looked_at = Some(now);
        if !seen.paused {
            self.waited = self.waited.saturating_add(since.min(LOOK));
        }
        // A guest that has just begun to use the source is tried at once, even if an earlier record timed out.
        if seen.source_taken == Some(true) && self.source_taken != Some(true) {
            self.silent_until = None;
        }
        self.source_taken = seen.source_taken;
        if seen.block == Block::Unreachable {
            self.broken = Some(FallbackReason::Unreachable);
        }
        let late = self.waited >= self.patience;
        let why = match seen.block {
            Block::Empty => None,
            Block::Ours if !late => return Vec::new(),
            Block::Ours => Some(FallbackReason::NotTaken),
            Block::Foreign => Some(FallbackReason::Overwritten),
            Block::Unreachable => Some(FallbackReason::Unreachable),
        };
        let Some(current) = self.current.take() else { return Vec::new() };
        self.waited = Duration::ZERO;
        let InBlock { publication: Publication { number: record, notice, gpas }, touched } =
            current;
        match why {
            None => {
                self.silent_until = None;
                let taken = |gpa| Outcome::Taken { gpa, notice, record };
                gpas.into_iter().map(taken).collect()
            }
            Some(why) => {
                self.silent_until = Some(now.saturating_add(SILENCE));
                self.withdraw = why != FallbackReason::Unreachable;
                // Pages that were touched meanwhile have had their AR, and are not told of once more.
                let left = gpas.into_iter().filter(|gpa| !touched.contains(gpa));
                left.map(|gpa| Outcome::Returned { gpa, notice, why }).collect()
            }
        }
    }

    /// The next step where there is room for `room` more pages in the guest's queue. Call it after [`Self::settle`]
    /// with the same `seen`. `up_since` is when the guest opened its machine-check handler. Pages that come back as
    /// outcomes are told by machine check, or not at all.
    pub(crate) fn step(
        &mut self,
        seen: &Observation,
        now: Duration,
        up_since: Option<Duration>,
        room: u32,
    ) -> (Vec<Outcome>, ChannelStep) {
        self.watches_boot = false;
        if self.current.is_some() {
            return (Vec::new(), ChannelStep::Wait(None, WaitReason::InBlock));
        }
        let Some((notice, first)) = self.first() else { return (Vec::new(), ChannelStep::Idle) };
        let up = up_since.is_some_and(|at| now.saturating_sub(at) >= self.patience);
        let silent = self.silent_until.is_some_and(|until| now < until);
        let why = match (self.broken, seen.source_taken) {
            (Some(why), _) => Some(why),
            (None, Some(false)) if up => Some(FallbackReason::NoSource),
            (None, Some(false)) => {
                self.watches_boot = true;
                return (
                    Vec::new(),
                    ChannelStep::Wait(Some((first, notice)), WaitReason::NoSourceYet),
                );
            }
            (None, _) if silent => Some(FallbackReason::Silent),
            (None, _) if seen.block != Block::Empty => Some(FallbackReason::Overwritten),
            (None, _) => None,
        };
        if let Some(why) = why {
            if why == FallbackReason::Overwritten {
                self.withdraw = true;
                self.silent_until = Some(now.saturating_add(SILENCE));
            }
            return (self.give_up(why), ChannelStep::Idle);
        }
        // At most MAX_PAGES, which fits.
        let room = (room as usize).min(MAX_PAGES);
        if room == 0 {
            return (Vec::new(), ChannelStep::Wait(Some((first, notice)), WaitReason::Pace));
        }
        let queue = match notice {
            Notice::Lost => &mut self.lost,
            Notice::Predicted => &mut self.predicted,
        };
        let gpas: Vec<u64> = queue.drain(..room.min(queue.len())).collect();
        // It may wrap after 4,294,967,295 records: 13 years at ten a second.
        self.records = self.records.wrapping_add(1);
        self.waited = Duration::ZERO;
        let publication = Publication { number: self.records, notice, gpas };
        self.current = Some(InBlock { publication: publication.clone(), touched: Vec::new() });
        (Vec::new(), ChannelStep::Publish(publication))
    }

    /// The record could not be published, or the guest could not be told of it.
    pub(crate) fn refused(&mut self, why: FallbackReason) -> Vec<Outcome> {
        self.broken = Some(why);
        let mut outcomes = Vec::new();
        if let Some(InBlock { publication, touched }) = self.current.take() {
            let Publication { notice, gpas, .. } = publication;
            self.withdraw = true;
            let left = gpas.into_iter().filter(|gpa| !touched.contains(gpa));
            outcomes.extend(left.map(|gpa| Outcome::Returned { gpa, notice, why }));
        }
        outcomes.extend(self.give_up(why));
        outcomes
    }

    /// Whether the relay has to zero the status word now. True once for each withdrawal.
    pub(crate) fn take_withdrawal(&mut self) -> bool {
        std::mem::take(&mut self.withdraw)
    }

    fn first(&self) -> Option<(Notice, u64)> {
        let lost = self.lost.front().map(|gpa| (Notice::Lost, *gpa));
        lost.or_else(|| self.predicted.front().map(|gpa| (Notice::Predicted, *gpa)))
    }

    /// Returns every page that waits: none of them is told of on this channel now.
    fn give_up(&mut self, why: FallbackReason) -> Vec<Outcome> {
        let returned = |notice| move |gpa| Outcome::Returned { gpa, notice, why };
        let lost = self.lost.drain(..).map(returned(Notice::Lost));
        let predicted = self.predicted.drain(..).map(returned(Notice::Predicted));
        lost.chain(predicted).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);
    const MILLI: Duration = Duration::from_millis(1);
    const ALL: u32 = u32::MAX;

    /// Of a guest that has taken the source and has nothing in its block.
    fn idle() -> Observation {
        Observation { block: Block::Empty, source_taken: Some(true), paused: false }
    }

    fn with(change: impl FnOnce(&mut Observation)) -> Observation {
        let mut seen = idle();
        change(&mut seen);
        seen
    }

    fn holding(gpas: impl IntoIterator<Item = u64>) -> Channel {
        let mut channel = Channel::new(true, PATIENCE);
        gpas.into_iter().for_each(|gpa| channel.push(Notice::Lost, gpa));
        channel
    }

    fn look(
        channel: &mut Channel,
        seen: Observation,
        now: Duration,
    ) -> (Vec<Outcome>, ChannelStep) {
        let mut outcomes = channel.settle(&seen, now);
        let (more, step) = channel.step(&seen, now, Some(Duration::ZERO), ALL);
        outcomes.extend(more);
        (outcomes, step)
    }

    fn published(step: ChannelStep) -> Publication {
        let ChannelStep::Publish(publication) = step else { panic!("a record, not {step:?}") };
        publication
    }

    fn returned(gpa: u64, why: FallbackReason) -> Outcome {
        Outcome::Returned { gpa, notice: Notice::Lost, why }
    }

    /// Looks every half second, as the relay's thread does at the least, until something comes of it.
    fn wait(channel: &mut Channel, seen: Observation, now: &mut Duration) -> Vec<Outcome> {
        for _ in 0..1000 {
            *now += Duration::from_millis(500);
            let (outcomes, _) = look(channel, seen, *now);
            if !outcomes.is_empty() {
                return outcomes;
            }
        }
        Vec::new()
    }

    #[test]
    fn pages_go_in_order_as_many_at_once_as_there_is_room_for() {
        let mut channel = holding(0..40);
        let seen = idle();
        let step = channel.step(&seen, MILLI, None, 3).1;
        assert_eq!(published(step).gpas, [0, 1, 2]);
        let waits = ChannelStep::Wait(None, WaitReason::InBlock);
        assert_eq!(look(&mut channel, with(|s| s.block = Block::Ours), 2 * MILLI).1, waits);
        let taken = channel.settle(&seen, 3 * MILLI);
        let expected = [0, 1, 2].map(|gpa| Outcome::Taken { gpa, notice: Notice::Lost, record: 1 });
        assert_eq!(taken, expected);
        let none = channel.step(&seen, 3 * MILLI, None, 0).1;
        assert_eq!(none, ChannelStep::Wait(Some((3, Notice::Lost)), WaitReason::Pace));
        let all = published(channel.step(&seen, 3 * MILLI, None, ALL).1);
        assert_eq!((all.number, all.gpas), (2, (3..18).collect()));
    }

    #[test]
    fn a_guest_that_is_coming_up_is_waited_for_and_one_that_is_up_is_not() {
        let deaf = with(|s| s.source_taken = Some(false));
        for up_since in [None, Some(Duration::from_secs(95))] {
            let mut channel = holding([1]);
            let (outcomes, step) = channel.step(&deaf, Duration::from_secs(100), up_since, ALL);
            assert!(outcomes.is_empty());
            assert_eq!(step, ChannelStep::Wait(Some((1, Notice::Lost)), WaitReason::NoSourceYet));
            assert!(channel.watches_boot);
            let step = channel.step(&idle(), Duration::from_secs(101), up_since, ALL).1;
            assert_eq!(published(step).gpas, [1]);
        }
        let mut channel = holding([1, 2]);
        channel.push(Notice::Predicted, 3);
        let up_since = Some(Duration::from_secs(90));
        let (outcomes, step) = channel.step(&deaf, Duration::from_secs(100), up_since, ALL);
        let predicted =
            Outcome::Returned { gpa: 3, notice: Notice::Predicted, why: FallbackReason::NoSource };
        let [one, two] = [1, 2].map(|gpa| returned(gpa, FallbackReason::NoSource));
        assert_eq!((outcomes, step), (vec![one, two, predicted], ChannelStep::Idle));
        assert!(channel.is_idle() && !channel.watches_boot);
    }

    #[test]
    fn a_record_that_is_not_taken_is_withdrawn_and_the_guest_left_alone_for_a_while() {
        let mut channel = holding([1, 2]);
        let mut now = MILLI;
        published(look(&mut channel, idle(), now).1);
        let ours = with(|s| s.block = Block::Ours);
        assert!(look(&mut channel, ours, now + MILLI).0.is_empty());
        let expected = [1, 2].map(|gpa| returned(gpa, FallbackReason::NotTaken));
        assert_eq!(wait(&mut channel, ours, &mut now), expected);
        assert!(now >= PATIENCE && now < PATIENCE + Duration::from_secs(2), "{now:?}");
        assert!(channel.take_withdrawal() && !channel.take_withdrawal());

        channel.push(Notice::Lost, 3);
        let (outcomes, step) = look(&mut channel, idle(), now + Duration::from_secs(59));
        assert_eq!(
            (outcomes, step),
            (vec![returned(3, FallbackReason::Silent)], ChannelStep::Idle)
        );
        channel.push(Notice::Lost, 4);
        assert_eq!(published(look(&mut channel, idle(), now + SILENCE).1).gpas, [4]);
    }

    #[test]
    fn a_guest_that_takes_the_source_up_again_is_tried_at_once() {
        let mut channel = holding([1]);
        let mut now = MILLI;
        published(look(&mut channel, idle(), now).1);
        wait(&mut channel, with(|s| s.block = Block::Ours), &mut now);
        look(&mut channel, with(|s| s.source_taken = Some(false)), now);
        channel.push(Notice::Lost, 2);
        assert_eq!(published(look(&mut channel, idle(), now + MILLI).1).gpas, [2]);
    }

    #[test]
    fn time_counts_only_while_the_guest_runs() {
        let mut channel = holding([1]);
        published(look(&mut channel, idle(), MILLI).1);
        let mut now = MILLI;
        let paused = with(|s| (s.block, s.paused) = (Block::Ours, true));
        assert!(wait(&mut channel, paused, &mut now).is_empty(), "for minutes");
        // This process was stopped for an hour, and looks three times after that.
        now += Duration::from_secs(3600);
        for _ in 0..3 {
            now += Duration::from_secs(1);
            assert!(look(&mut channel, with(|s| s.block = Block::Ours), now).0.is_empty());
        }
        assert_eq!(channel.settle(&idle(), now).len(), 1, "and is acknowledged after all");
    }

    #[test]
    fn what_is_not_known_to_have_been_read_is_told_elsewhere() {
        for (block, why, withdrawn) in [
            (Block::Foreign, FallbackReason::Overwritten, true),
            (Block::Unreachable, FallbackReason::Unreachable, false),
        ] {
            let mut channel = holding([1]);
            published(look(&mut channel, idle(), MILLI).1);
            channel.push(Notice::Lost, 2);
            let (outcomes, _) = look(&mut channel, with(|s| s.block = block), 2 * MILLI);
            assert_eq!(outcomes[0], returned(1, why));
            assert_eq!(outcomes.len(), 2, "nor does what waits go into it: {outcomes:?}");
            assert_eq!(channel.take_withdrawal(), withdrawn);
        }
        // What lies there before anything of ours does.
        let mut channel = holding([1]);
        let (outcomes, _) = look(&mut channel, with(|s| s.block = Block::Foreign), MILLI);
        assert_eq!(outcomes, [returned(1, FallbackReason::Overwritten)]);
        assert!(channel.take_withdrawal());
    }

    #[test]
    fn a_page_that_was_touched_is_not_told_of_again() {
        let mut channel = holding([1, 2, 3]);
        let step = channel.step(&idle(), MILLI, None, 2).1;
        assert_eq!(published(step).gpas, [1, 2]);
        channel.touched(1);
        channel.touched(3);
        assert_eq!(
            channel.refused(FallbackReason::NotNotified),
            [returned(2, FallbackReason::NotNotified)]
        );
        assert!(channel.take_withdrawal() && channel.is_idle());
        channel.push(Notice::Lost, 4);
        let (outcomes, _) = look(&mut channel, idle(), MILLI);
        assert_eq!(outcomes, [returned(4, FallbackReason::NotNotified)], "it stays so");
    }

    #[test]
    fn bad_pages_go_before_those_that_may_become_so_and_never_with_them() {
        let mut channel = Channel::new(true, PATIENCE);
        channel.push(Notice::Predicted, 1);
        channel.push(Notice::Predicted, 2);
        channel.push(Notice::Lost, 3);
        // It has gone bad before the guest was told that it would.
        channel.push(Notice::Lost, 2);
        for (notice, gpas) in [(Notice::Lost, vec![3, 2]), (Notice::Predicted, vec![1])] {
            let publication = published(look(&mut channel, idle(), MILLI).1);
            assert_eq!((publication.notice, publication.gpas), (notice, gpas));
        }
    }

    /// What may happen next to a channel.
    #[derive(Debug, Clone)]
    enum Op {
        Push(Notice),
        /// The guest touches the page pushed that many pages ago.
        Touch(usize),
        /// The guest does this to the block, if a record lies there.
        Guest(Block),
        Source(Option<bool>),
        Pause(bool),
        /// So many milliseconds pass, and the relay looks; there is room for so many pages.
        Look(u64, u32),
        /// The next publication fails.
        Fail,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            6 => Just(Op::Push(Notice::Lost)),
            2 => Just(Op::Push(Notice::Predicted)),
            1 => (0..20_usize).prop_map(Op::Touch),
            4 => Just(Op::Guest(Block::Empty)),
            1 => prop_oneof![Just(Block::Foreign), Just(Block::Unreachable)].prop_map(Op::Guest),
            1 => prop::option::of(any::<bool>()).prop_map(Op::Source),
            1 => any::<bool>().prop_map(Op::Pause),
            12 => (0..3000_u64, 0..20_u32).prop_map(|(millis, room)| Op::Look(millis, room)),
            1 => Just(Op::Fail),
        ]
    }

    proptest! {
        /// Whatever the guest does: a page is told of here or elsewhere, not both, and not twice.
        #[test]
        fn every_page_ends_in_one_place(ops in prop::collection::vec(op(), 1..200)) {
            let mut channel = Channel::new(true, PATIENCE);
            let mut seen = idle();
            let mut now = Duration::ZERO;
            let mut fail = false;
            let (mut pushed, mut touched) = (Vec::new(), BTreeSet::new());
            // Pages that the channel has answered for.
            let mut done = BTreeSet::new();
            let mut in_block: Option<Publication> = None;
            // In the end a guest that responds has all the time it needs.
            let end = (0..60).flat_map(|_| [Op::Guest(Block::Empty), Op::Look(1000, 16)]);
            let idle_again = [Op::Source(Some(true)), Op::Pause(false), Op::Look(0, 0)];
            for op in ops.into_iter().chain(idle_again).chain(end) {
                match op {
                    Op::Push(notice) => {
                        let gpa = (pushed.len() as u64) << 12;
                        pushed.push((gpa, notice));
                        channel.push(notice, gpa);
                    }
                    Op::Touch(ago) => {
                        let touched_now = pushed.len().checked_sub(ago + 1).map(|at| pushed[at].0);
                        if let Some(gpa) = touched_now {
                            touched.insert(gpa);
                            channel.touched(gpa);
                        }
                    }
                    Op::Guest(block) if in_block.is_some() || block == Block::Empty => {
                        seen.block = block;
                    }
                    Op::Guest(_) => {}
                    Op::Source(taken) => seen.source_taken = taken,
                    Op::Pause(paused) => seen.paused = paused,
                    Op::Fail => fail = true,
                    Op::Look(millis, room) => {
                        now += Duration::from_millis(millis);
                        let mut outcomes = channel.settle(&seen, now);
                        if !outcomes.is_empty() {
                            let gone = in_block.take().expect("nothing comes of no record");
                            for outcome in &outcomes {
                                let (Outcome::Taken { gpa, .. } | Outcome::Returned { gpa, .. }) = outcome;
                                prop_assert!(gone.gpas.contains(gpa));
                                if matches!(outcome, Outcome::Taken { .. }) {
                                    prop_assert_eq!(seen.block, Block::Empty);
                                }
                            }
                        } else if channel.in_block() == 0 {
                            // All of its pages were touched, so nothing comes of them.
                            in_block = None;
                        }
                        let (more, step) = channel.step(&seen, now, Some(Duration::ZERO), room);
                        outcomes.extend(more);
                        if let ChannelStep::Publish(publication) = step {
                            prop_assert!(in_block.is_none() && seen.block == Block::Empty);
                            prop_assert!(seen.source_taken != Some(false));
                            let count = publication.gpas.len();
                            prop_assert!((1..=MAX_PAGES.min(room as usize)).contains(&count));
                            if std::mem::take(&mut fail) {
                                outcomes.extend(channel.refused(FallbackReason::NotNotified));
                            } else {
                                seen.block = Block::Ours;
                                in_block = Some(publication);
                            }
                        }
                        if channel.take_withdrawal() {
                            seen.block = Block::Empty;
                        }
                        for outcome in outcomes {
                            match outcome {
                                Outcome::Taken { gpa, .. } => prop_assert!(done.insert(gpa)),
                                Outcome::Returned { gpa, .. } => {
                                    prop_assert!(!touched.contains(&gpa), "told by AR already");
                                    prop_assert!(done.insert(gpa));
                                }
                            }
                        }
                    }
                }
            }
            prop_assert!(channel.is_idle(), "{:?}", channel);
            for (gpa, _) in pushed {
                prop_assert!(done.contains(&gpa) || touched.contains(&gpa), "{:#x} is lost", gpa);
            }
        }
    }
}
