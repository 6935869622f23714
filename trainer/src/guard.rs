//! When a step is not trusted: judged by its gradient's norm alone, so that a resumed run judges alike.

use serde::{Deserialize, Serialize};

use crate::recipe::Guard;

/// What the last steps were like. Part of the trainer's state.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// Norms of the last steps that moved the weights, oldest first.
    norms: Vec<f64>,
    /// Steps in a row that did not.
    skipped: usize,
    /// How often the run went back.
    pub rollbacks: usize,
    /// Sequences that were passed over in doing so.
    pub passed_over: u64,
}

/// What becomes of a step.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// It moved the weights.
    Taken,
    /// It did not, for this reason.
    Skipped(String),
    /// It did not, and too many before it neither.
    GoBack(String),
}

impl History {
    /// The largest norm with which a step may move the weights: the device compares.
    pub fn limit(&self, guard: &Guard) -> f32 {
        if self.norms.len() < guard.window {
            return f32::INFINITY;
        }
        let mut sorted = self.norms.clone();
        sorted.sort_by(f64::total_cmp);
        (sorted[sorted.len() / 2] * guard.spike) as f32
    }

    /// Takes note of a step that was given [`History::limit`]. A norm of 0 is a step without any masked token.
    pub fn judge(&mut self, guard: &Guard, norm: f64) -> Verdict {
        let limit = f64::from(self.limit(guard));
        if norm.is_finite() && norm <= limit {
            self.skipped = 0;
            if norm > 0.0 {
                self.norms.push(norm);
                let surplus = self.norms.len().saturating_sub(guard.window);
                self.norms.drain(..surplus);
            }
            return Verdict::Taken;
        }
        self.skipped += 1;
        let why = match norm.is_finite() {
            true => format!("gradient norm {norm:.3e} is above {limit:.3e}"),
            false => "gradient is not finite".to_owned(),
        };
        match self.skipped >= guard.patience {
            true => Verdict::GoBack(why),
            false => Verdict::Skipped(why),
        }
    }

    /// Takes note that the run went back to where this history was written, for the n-th time, and goes on with other
    /// text: it has its whole patience again.
    pub fn went_back(&mut self, rollbacks: usize, passed_over: u64) {
        (self.rollbacks, self.passed_over, self.skipped) = (rollbacks, passed_over, 0);
    }

    /// Forgets the norms: another objective has others.
    pub fn forget(&mut self) {
        self.norms.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUARD: Guard = Guard { spike: 4.0, window: 3, patience: 2, rollbacks: 1 };

    #[test]
    fn spikes_are_skipped_once_there_is_a_median_and_then_the_run_goes_back() {
        let mut history = History::default();
        assert_eq!(history.judge(&GUARD, 100.0), Verdict::Taken, "nothing to compare with");
        assert!(matches!(history.judge(&GUARD, f64::NAN), Verdict::Skipped(_)));
        for norm in [1.0, 0.0, 1.0] {
            assert_eq!(history.judge(&GUARD, norm), Verdict::Taken);
        }
        assert_eq!(history.limit(&GUARD), 4.0, "median of 100, 1, 1");
        assert!(matches!(history.judge(&GUARD, 4.5), Verdict::Skipped(_)));
        assert_eq!(history.judge(&GUARD, 4.0), Verdict::Taken);
        assert!(matches!(history.judge(&GUARD, 5.0), Verdict::Skipped(_)));
        assert!(matches!(history.judge(&GUARD, f64::INFINITY), Verdict::GoBack(_)));
        history.forget();
        assert_eq!(history.limit(&GUARD), f32::INFINITY);
    }

    #[test]
    fn going_back_renews_the_patience() {
        let mut history = History::default();
        assert!(matches!(history.judge(&GUARD, f64::NAN), Verdict::Skipped(_)));
        // A checkpoint may be written between two skipped steps.
        history.went_back(1, 8);
        assert_eq!((history.rollbacks, history.passed_over), (1, 8));
        assert!(matches!(history.judge(&GUARD, f64::NAN), Verdict::Skipped(_)));
        assert!(matches!(history.judge(&GUARD, f64::NAN), Verdict::GoBack(_)));
    }
}
