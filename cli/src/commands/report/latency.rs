//! How long things took, on a logarithmic scale.

use serde::Serialize;

/// Upper ends of the bars, in microseconds: 1, 2 and 5 of each power of ten up to 1000 s.
const ENDS: [u64; 28] = {
    let (mut ends, mut at, mut ten) = ([0; 28], 0, 1);
    while at < ends.len() {
        ends[at] = ten * [1, 2, 5][at % 3];
        if at % 3 == 2 {
            ten *= 10;
        }
        at += 1;
    }
    ends
};

/// The latencies of a report.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Latencies {
    /// From the signal (or, if there was none, from when the page became known) to its record's being where the guest
    /// finds it.
    pub injected: Spread,
    /// From then until the guest had taken it.
    pub acknowledged: Spread,
}

/// One bar.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Bar {
    /// More than this many microseconds, or exactly 0 in the first bar.
    pub from: u64,
    /// Up to this many; `None` in the bar of all that took longer.
    pub to: Option<u64>,
    /// How many.
    pub count: u64,
}

/// Times and how often they occurred. All in microseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Spread {
    /// How many.
    pub count: u64,
    /// The shortest.
    pub least: u64,
    /// Half took no longer.
    pub median: u64,
    /// 95 of a hundred took no longer.
    pub most_of: u64,
    /// The longest.
    pub most: u64,
    /// The bars, from the first that has any to the last.
    pub bars: Vec<Bar>,
}

impl Spread {
    /// The spread of these times.
    #[must_use]
    pub fn of(mut times: Vec<u64>) -> Self {
        times.sort_unstable();
        let (Some(&least), Some(&most)) = (times.first(), times.last()) else {
            return Self::default();
        };
        // The rank of nearest-rank percentiles, which are times that occurred.
        let percentile = |of: usize| times[(times.len() * of).div_ceil(100).max(1) - 1];
        let mut counts = [0_u64; ENDS.len() + 1];
        for time in &times {
            counts[ENDS.partition_point(|end| end < time)] += 1;
        }
        let bars = counts.iter().enumerate().map(|(at, &count)| Bar {
            from: if at == 0 { 0 } else { ENDS[at - 1] },
            to: ENDS.get(at).copied(),
            count,
        });
        let first = counts.iter().position(|count| *count > 0).unwrap_or_default();
        let last = counts.iter().rposition(|count| *count > 0).unwrap_or_default();
        Self {
            count: times.len() as u64,
            least,
            median: percentile(50),
            most_of: percentile(95),
            most,
            bars: bars.skip(first).take(last + 1 - first).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn none_at_all() {
        assert_eq!(Spread::of(Vec::new()), Spread::default());
    }

    #[test]
    fn one() {
        let spread = Spread::of(vec![2214]);
        assert_eq!(
            (spread.least, spread.median, spread.most_of, spread.most),
            (2214, 2214, 2214, 2214)
        );
        assert_eq!(spread.bars, [Bar { from: 2000, to: Some(5000), count: 1 }]);
    }

    #[test]
    fn ends_belong_to_the_bar_below_and_gaps_are_bars() {
        let spread = Spread::of(vec![0, 1, 2, 10, u64::MAX]);
        let counts: Vec<u64> = spread.bars.iter().map(|bar| bar.count).collect();
        assert_eq!(counts[..5], [2, 1, 0, 1, 0]);
        let last = spread.bars.last().unwrap();
        assert_eq!((last.from, last.to, last.count), (1_000_000_000, None, 1));
        assert_eq!(spread.median, 2);
    }

    #[test]
    fn percentiles_are_times_that_occurred() {
        let spread = Spread::of((1..=100).rev().collect());
        assert_eq!((spread.median, spread.most_of, spread.most), (50, 95, 100));
    }
}
