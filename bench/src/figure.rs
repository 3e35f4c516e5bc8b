//! A measured figure: one series of values for us, and one for each that it is held against.

use serde::{Deserialize, Serialize};

/// The name of our series.
pub const US: &str = "mce-relay";

/// What was measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Figure {
    /// What it is, in a few words.
    pub what: String,
    /// Of its values.
    pub unit: String,
    /// Ours first.
    pub series: Vec<Series>,
    /// What ours is to be.
    pub goal: Goal,
    /// What measures it again.
    pub command: String,
    /// What a reader has to know beside.
    #[serde(default)]
    pub note: String,
}

/// The values of one that was measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Series {
    /// Who.
    pub name: String,
    /// Each measurement, in the order in which they were made.
    pub values: Vec<f64>,
}

/// What our median is to be.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Goal {
    /// This much at most.
    AtMost(f64),
    /// This many times the median of the series called so, at most.
    AtMostTimes(f64, String),
    /// Both.
    Both(f64, f64, String),
    /// This many times the median of the series called so, at least: it has to show as slower.
    AtLeastTimes(f64, String),
    /// Equal to this.
    Exactly(f64),
    /// Within the spread of the series called so: no difference can be measured.
    NoDifference(String),
    /// None; it is shown.
    Shown,
}

/// How far a figure is from its goal.
#[derive(Debug, Clone, PartialEq)]
pub enum Judgement {
    /// It is there.
    Met,
    /// It is not; by how much.
    Missed(String),
    /// There is no goal.
    Shown,
    /// A series is missing or empty.
    NotMeasured(String),
}

impl Series {
    /// A series.
    #[must_use]
    pub fn new(name: &str, values: Vec<f64>) -> Self {
        Self { name: name.to_owned(), values }
    }

    /// The value of which a share of `part`, 0 to 1, is no larger.
    #[must_use]
    pub fn quantile(&self, part: f64) -> Option<f64> {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "an index of a list that is short"
        )]
        let at = ((sorted.len().checked_sub(1)?) as f64 * part).round() as usize;
        sorted.get(at).copied()
    }

    /// The value in the middle.
    #[must_use]
    pub fn median(&self) -> Option<f64> {
        self.quantile(0.5)
    }

    /// The first and the third quarter.
    #[must_use]
    pub fn quarters(&self) -> Option<(f64, f64)> {
        Some((self.quantile(0.25)?, self.quantile(0.75)?))
    }
}

impl Figure {
    /// Our median.
    #[must_use]
    pub fn ours(&self) -> Option<f64> {
        self.of(US)
    }

    /// The median of the series called `name`.
    #[must_use]
    pub fn of(&self, name: &str) -> Option<f64> {
        self.find(name)?.median()
    }

    fn find(&self, name: &str) -> Option<&Series> {
        self.series.iter().find(|series| series.name == name)
    }

    /// Whether the goal is met.
    #[must_use]
    pub fn judge(&self) -> Judgement {
        if matches!(self.goal, Goal::Shown) {
            return Judgement::Shown;
        }
        let Some(ours) = self.ours() else {
            return Judgement::NotMeasured(US.to_owned());
        };
        let unit = &self.unit;
        let at_most = |most: f64| match ours <= most {
            true => Judgement::Met,
            false => Judgement::Missed(format!("{ours:.4} {unit} where {most:.4} was the goal")),
        };
        let times = |factor: f64, name: &str| match self.of(name) {
            None => Judgement::NotMeasured(name.to_owned()),
            Some(theirs) if ours <= factor * theirs => Judgement::Met,
            Some(theirs) => Judgement::Missed(format!(
                "{:.2} times {name} where {factor} was the goal",
                ours / theirs
            )),
        };
        match &self.goal {
            Goal::AtLeastTimes(factor, name) => match self.of(name) {
                None => Judgement::NotMeasured(name.clone()),
                Some(theirs) if ours >= factor * theirs => Judgement::Met,
                Some(theirs) => Judgement::Missed(format!(
                    "{:.2} times {name} where {factor} at least was to show",
                    ours / theirs
                )),
            },
            Goal::AtMost(most) => at_most(*most),
            Goal::AtMostTimes(factor, name) => times(*factor, name),
            Goal::Both(most, factor, name) => match at_most(*most) {
                Judgement::Met => times(*factor, name),
                missed => missed,
            },
            Goal::Exactly(value) if (ours - value).abs() < f64::EPSILON => Judgement::Met,
            Goal::Exactly(value) => {
                Judgement::Missed(format!("{ours} {unit} where {value} was the goal"))
            }
            Goal::NoDifference(name) => match (self.find(US), self.find(name)) {
                (Some(own), Some(other)) => no_difference(own, other, unit),
                _ => Judgement::NotMeasured(name.clone()),
            },
            Goal::Shown => Judgement::Shown,
        }
    }
}

/// The medians are no further apart than the wider of the two spreads (between the first and the third
/// quarter).
fn no_difference(own: &Series, other: &Series, unit: &str) -> Judgement {
    let (Some(a), Some(b)) = (own.median(), other.median()) else {
        return Judgement::NotMeasured(other.name.clone());
    };
    let spread = |series: &Series| series.quarters().map_or(0.0, |(low, high)| high - low);
    let noise = spread(own).max(spread(other));
    match (a - b).abs() <= noise {
        true => Judgement::Met,
        false => Judgement::Missed(format!(
            "{a:.4} and {b:.4} {unit}: further apart than the spread of {noise:.4}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(ours: &[f64], theirs: &[f64], goal: Goal) -> Figure {
        Figure {
            what: "x".into(),
            unit: "s".into(),
            series: vec![Series::new(US, ours.to_vec()), Series::new("other", theirs.to_vec())],
            goal,
            command: String::new(),
            note: String::new(),
        }
    }

    #[test]
    fn a_slower_one_misses_its_goal() {
        let other = || "other".to_owned();
        let met = |f: Figure| f.judge() == Judgement::Met;
        assert!(met(figure(&[1.0, 2.0, 9.0], &[], Goal::AtMost(2.0))));
        assert!(!met(figure(&[1.0, 2.1, 9.0], &[], Goal::AtMost(2.0))));
        assert!(met(figure(&[7.0], &[10.0], Goal::AtMostTimes(0.7, other()))));
        assert!(!met(figure(&[7.1], &[10.0], Goal::AtMostTimes(0.7, other()))));
        assert!(met(figure(&[2.0], &[1.0], Goal::AtLeastTimes(2.0, other()))));
        assert!(!met(figure(&[1.9], &[1.0], Goal::AtLeastTimes(2.0, other()))));
        assert!(!met(figure(&[7.0], &[10.0], Goal::Both(6.0, 0.7, other()))));
        assert!(met(figure(&[10.0, 11.0, 12.0], &[10.5, 11.5, 12.5], Goal::NoDifference(other()))));
        assert!(!met(figure(
            &[20.0, 21.0, 22.0],
            &[10.0, 11.0, 12.0],
            Goal::NoDifference(other())
        )));
        assert!(met(figure(&[512.0], &[], Goal::Exactly(512.0))));
        assert!(!met(figure(&[511.0], &[], Goal::Exactly(512.0))));
    }

    #[test]
    fn what_was_not_measured_is_not_met() {
        let missing = figure(&[1.0], &[], Goal::AtMostTimes(2.0, "other".into())).judge();
        assert_eq!(missing, Judgement::NotMeasured("other".into()));
        assert_eq!(
            figure(&[], &[1.0], Goal::AtMost(1.0)).judge(),
            Judgement::NotMeasured(US.into())
        );
    }
}
