//! What the benchmarks of the component measure with: guest RAM of many regions, a vCPU that takes every
//! record at once, and the simplest structures that answer the same questions.
#![allow(clippy::unwrap_used, reason = "a benchmark that cannot be set up has nothing to say")]

pub mod figure;

use std::io;

use mce_relay::mca::{BANKS, Caps, McaState, Record, Vendor, cap};
use mce_relay::{Mca, RamRegion};

/// A stretch of addresses where nothing is mapped, or where there is memory that is this program's for this alone.
fn region(hva: u64, gpa: u64, len: u64) -> RamRegion {
    // SAFETY: no reference of Rust's leads there.
    unsafe { RamRegion::new(hva, gpa, len) }
}

/// Says what is being measured, to whoever waits.
pub fn progress(what: &str) {
    eprintln!("bench: {what}");
}

/// Length of a region.
pub const LEN: u64 = 2 << 20;

/// `n` regions such as memory that was plugged in piece by piece has: ascending in guest-physical addresses,
/// with a gap behind each, anywhere in the host's.
#[must_use]
pub fn regions(n: u64) -> Vec<RamRegion> {
    let mut places: Vec<u64> = (0..n).collect();
    fastrand::Rng::with_seed(7).shuffle(&mut places);
    let hva = |place: u64| 0x7f00_0000_0000 + place * 2 * LEN;
    (0..).zip(places).map(|(index, at)| region(hva(at), index * 2 * LEN, LEN)).collect()
}

/// Addresses within `regions`, in no order.
#[must_use]
pub fn addresses(regions: &[RamRegion]) -> Vec<u64> {
    let mut random = fastrand::Rng::with_seed(11);
    (0..4096)
        .map(|_| regions[random.usize(..regions.len())].hva() + (random.u64(..LEN) & !4095))
        .collect()
}

/// Regions by host address, for binary search: what a VMM would write without aliases in mind.
#[derive(Debug)]
pub struct SortedArray(Vec<RamRegion>);

impl SortedArray {
    /// Of `regions`, which do not overlap.
    #[must_use]
    pub fn new(regions: &[RamRegion]) -> Self {
        let mut regions = regions.to_vec();
        regions.sort_unstable_by_key(|region| region.hva());
        Self(regions)
    }

    /// The guest-physical address that shows `hva`.
    #[must_use]
    #[inline]
    pub fn gpa(&self, hva: u64) -> Option<u64> {
        let at = self.0.partition_point(|region| region.hva() <= hva).checked_sub(1)?;
        let region = &self.0[at];
        (hva - region.hva() < region.len()).then(|| region.gpa() + (hva - region.hva()))
    }
}

/// An Intel-style guest that has machine checks on, with local ones or without.
#[must_use]
pub fn caps(lmce: bool) -> Caps {
    let lmce = if lmce { cap::LMCE_P } else { 0 };
    let mcg_cap = u64::from(BANKS) | cap::CTL_P | cap::SER_P | lmce;
    Caps { vendor: Vendor::Intel, mcg_cap, succor: false }
}

/// A vCPU whose guest has handled what it was given when anybody looks at its state.
#[derive(Debug, Clone)]
pub struct Quick {
    state: McaState,
    given: Option<Record>,
}

impl Quick {
    /// One that takes local machine checks if `lmce`.
    #[must_use]
    pub fn new(lmce: bool) -> Self {
        Self { state: McaState { lmce, ..McaState::up() }, given: None }
    }

    /// Its state with nothing in its banks.
    #[must_use]
    pub fn empty(&self) -> &McaState {
        &self.state
    }
}

impl Mca for Quick {
    fn state(&mut self) -> io::Result<McaState> {
        Ok(self.state)
    }

    fn inject(&mut self, record: &Record) -> io::Result<()> {
        self.given = Some(*record);
        Ok(())
    }

    fn read_back(&mut self, _: u8) -> io::Result<(u64, u64)> {
        Ok(self.given.take().map_or((0, 0), |record| (record.status, record.mcg_status)))
    }
}
