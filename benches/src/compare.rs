//! Two records, case by case: what changed, how surely, and whether the two may be compared at all.

use crate::record::{CaseRecord, Record};
use crate::stats::{self, Change};

/// What a case came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The interval lies within the threshold, or around zero.
    Same,
    /// The whole interval lies above the threshold: slower.
    Regression,
    /// The whole interval lies below minus the threshold: faster.
    Improvement,
    /// The best guess lies above the threshold, a part of the interval does not: more samples would tell.
    Unclear,
    /// The new result is wrong, so it has no time.
    Wrong,
    /// Not in both records, or of different work.
    Missing,
}

impl Verdict {
    /// For people.
    pub fn describe(self) -> &'static str {
        match self {
            Verdict::Same => "same",
            Verdict::Regression => "REGRESSION",
            Verdict::Improvement => "faster",
            Verdict::Unclear => "unclear",
            Verdict::Wrong => "WRONG RESULT",
            Verdict::Missing => "not compared",
        }
    }

    /// From a change and the largest regression that is let pass.
    pub fn of(change: Change, threshold: f64) -> Verdict {
        match change {
            c if c.low > threshold => Verdict::Regression,
            c if c.high < -threshold => Verdict::Improvement,
            c if c.estimate > threshold => Verdict::Unclear,
            _ => Verdict::Same,
        }
    }
}

/// One case in both records.
#[derive(Clone, Debug)]
pub struct Row {
    /// The case.
    pub name: String,
    /// Median seconds in the base record.
    pub base: Option<f64>,
    /// Median seconds in the new record.
    pub new: Option<f64>,
    /// What lies between them once the machine's state is taken out; not the ratio of the two medians.
    pub change: Option<Change>,
    /// What it came to.
    pub verdict: Verdict,
    /// What a reader should know.
    pub note: String,
}

/// All cases, and what stands against the comparison.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// Reasons why times of the two mean nothing against each other; empty where they can be compared.
    pub unlike: Vec<String>,
    /// Whether samples were taken in turn.
    pub paired: bool,
    /// The largest regression that is let pass, 0.05 for five per cent.
    pub threshold: f64,
    /// Cases of either record.
    pub rows: Vec<Row>,
}

impl Comparison {
    /// True if a case became slower than the threshold allows, or wrong.
    pub fn failed(&self) -> bool {
        self.rows.iter().any(|r| matches!(r.verdict, Verdict::Regression | Verdict::Wrong))
    }

    /// How many cases came to this.
    pub fn count(&self, verdict: Verdict) -> usize {
        self.rows.iter().filter(|r| r.verdict == verdict).count()
    }
}

/// Compares every case.
pub fn compare(base: &Record, new: &Record, threshold: f64) -> Comparison {
    let paired = base.made.session.is_some() && base.made.session == new.made.session;
    let mut unlike = base.device.unlike(&new.device);
    if base.clock != new.clock {
        unlike.push(format!("clock: {} against {}", base.clock.describe(), new.clock.describe()));
    }
    let timed = |c: &&CaseRecord| c.wrong.is_none();
    let n = base.cases.iter().filter(timed).count();
    let quantile = stats::quantile(n);
    let mut rows = Vec::new();
    for a in &base.cases {
        let b = new.cases.iter().find(|b| b.name == a.name);
        let row = row(a, b, paired, threshold, quantile);
        if row.verdict == Verdict::Missing {
            unlike.push(format!("case {:?}: {}", a.name, row.note));
        } else if let Some(b) = b.filter(|b| b.wrong.is_none() && !paired)
            && let Some(why) = other_kernels(a, b)
        {
            unlike.push(format!("case {:?}: {why}", a.name));
        }
        rows.push(row);
    }
    let known = |name: &str| base.cases.iter().any(|a| a.name == name);
    for b in new.cases.iter().filter(|b| !known(&b.name)) {
        rows.push(Row {
            name: b.name.clone(),
            base: None,
            new: b.wrong.is_none().then_some(b.seconds),
            change: None,
            verdict: if b.wrong.is_some() { Verdict::Wrong } else { Verdict::Missing },
            note: b.wrong.clone().unwrap_or_else(|| "not in the base".into()),
        });
    }
    Comparison { unlike, paired, threshold, rows }
}

/// Which kernels a case used decides what its time means; their text may differ, for that is what is compared.
fn other_kernels(a: &CaseRecord, b: &CaseRecord) -> Option<String> {
    let set = |c: &CaseRecord| c.kernels.iter().map(|k| k.variant.clone()).collect::<Vec<_>>();
    let (a, b) = (set(a), set(b));
    (a != b).then(|| format!("kernels {} against {}", a.join(", "), b.join(", ")))
}

fn row(a: &CaseRecord, b: Option<&CaseRecord>, paired: bool, threshold: f64, quantile: f64) -> Row {
    let mut row = Row {
        name: a.name.clone(),
        base: a.wrong.is_none().then_some(a.seconds),
        new: b.filter(|b| b.wrong.is_none()).map(|b| b.seconds),
        change: None,
        verdict: Verdict::Missing,
        note: String::new(),
    };
    let Some(b) = b else {
        row.note = "not in the new record".into();
        return row;
    };
    if let Some(why) = &b.wrong {
        (row.verdict, row.note) = (Verdict::Wrong, why.clone());
        return row;
    }
    if let Some(why) = &a.wrong {
        row.note = format!("the base's result was wrong: {why}");
        return row;
    }
    if (a.flops, a.bytes) != (b.flops, b.bytes) {
        row.note = "the work itself differs".into();
        return row;
    }
    let change = match paired {
        true => stats::paired(&a.samples, &b.samples, quantile),
        false => stats::unpaired(&a.samples, &b.samples, quantile),
    };
    row.change = Some(change);
    row.verdict = Verdict::of(change, threshold);
    let changed: Vec<&str> = b
        .kernels
        .iter()
        .filter(|k| !a.kernels.iter().any(|o| (&o.variant, &o.hash) == (&k.variant, &k.hash)))
        .map(|k| k.variant.split(' ').next().unwrap_or(&k.variant))
        .collect();
    if !changed.is_empty() {
        row.note = format!("other WGSL: {}", changed.join(", "));
    }
    row
}

#[cfg(test)]
mod tests {
    use demask_engine::philox::Philox;

    use super::*;
    use crate::record::tests::record;

    /// Times around `middle`, a little apart.
    fn around(middle: f64) -> Vec<f64> {
        (0..40).map(|i| middle * (1.0 + 0.002 * f64::from(i % 7))).collect()
    }

    #[test]
    fn a_slower_case_fails_a_faster_or_noisy_one_does_not() {
        let base = record(&around(1e-3));
        let against = |times: &[f64]| compare(&base, &record(times), 0.05);
        let same = against(&around(1.001e-3));
        assert_eq!((same.failed(), same.rows[0].verdict), (false, Verdict::Same));
        let slow = against(&around(1.1e-3));
        assert_eq!((slow.failed(), slow.rows[0].verdict), (true, Verdict::Regression));
        let change = slow.rows[0].change.unwrap();
        assert!((change.estimate - 0.1).abs() < 0.01 && change.low > 0.05, "{change:?}");
        assert_eq!(against(&around(0.9e-3)).rows[0].verdict, Verdict::Improvement);
        // Three per cent are there, and let pass.
        assert_eq!(against(&around(1.03e-3)).rows[0].verdict, Verdict::Same);
        // Ten per cent slower in the middle, and thirty apart.
        let mut random = Philox::new(1, [0; 3]);
        let wild: Vec<f64> =
            (0..40).map(|_| 1.1e-3 * (0.3 * f64::from(random.normal())).exp()).collect();
        let wild = against(&wild);
        assert_eq!((wild.failed(), wild.rows[0].verdict), (false, Verdict::Unclear));
    }

    #[test]
    fn unlike_records_say_why() {
        let base = record(&around(1e-3));
        let unlike = |change: &dyn Fn(&mut Record)| {
            let mut new = base.clone();
            change(&mut new);
            compare(&base, &new, 0.05).unlike.join("; ")
        };
        assert_eq!(unlike(&|_| ()), "");
        assert!(unlike(&|r| r.device.driver_info = "2".into()).contains("driver version"));
        assert!(unlike(&|r| r.clock = crate::measure::Clock::Wall).contains("clock"));
        assert!(unlike(&|r| r.cases[0].name = "other".into()).contains("not in the new record"));
        assert!(unlike(&|r| r.cases[0].flops = 1.0).contains("the work itself differs"));
        let variant = unlike(&|r| r.cases[0].kernels[0].variant = "swiglu WG=64".into());
        assert!(variant.contains("kernels swiglu against swiglu WG=64"), "{variant}");
        // Another text under the same name is what a comparison is for.
        assert_eq!(unlike(&|r| r.cases[0].kernels[0].hash = "f".into()), "");
    }

    #[test]
    fn a_wrong_result_fails_whatever_its_time() {
        let base = record(&around(1e-3));
        let mut new = base.clone();
        new.cases[0] =
            CaseRecord::wrong(base.cases[0].name.clone(), "[0] is 1 instead of 2".into());
        let comparison = compare(&base, &new, 0.05);
        assert!(comparison.failed() && comparison.unlike.is_empty());
        assert!(!compare(&new, &base, 0.05).unlike.is_empty());
    }

    #[test]
    fn samples_taken_in_turn_are_compared_in_pairs() {
        // A machine that becomes three times slower on the way, and a change of ten per cent.
        let slowing: Vec<f64> = (0..60).map(|i| 1e-3 * (1.0 + f64::from(i) / 30.0)).collect();
        let mut base = record(&slowing);
        let mut new = record(&slowing.iter().map(|t| t * 1.1).collect::<Vec<_>>());
        assert_eq!(compare(&base, &new, 0.05).rows[0].verdict, Verdict::Unclear);
        (base.made.session, new.made.session) = (Some(7), Some(7));
        let paired = compare(&base, &new, 0.05);
        assert!(paired.paired);
        assert_eq!(paired.rows[0].verdict, Verdict::Regression);
    }
}
