//! The learning rate as a pure function of the step: linear warm-up, then a constant or a cosine
//! decay. The warm-up of the *corruption* is another thing and lives in [`crate::noise`].

use serde::{Deserialize, Serialize};

/// What follows the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// The peak rate to the end: for a run that hands its weights to another one before annealing
    /// (arXiv 2601.15892 §4.1).
    Constant,
    /// Half a cosine from the peak to `min_ratio` × peak at the last step, `total_steps − 1`.
    Cosine {
        /// Steps of the whole run, warm-up included.
        total_steps: u64,
        /// Final rate as a fraction of the peak, in [0, 1].
        min_ratio: f32,
    },
}

/// A learning-rate schedule.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LearningRate {
    /// The highest rate, reached at step `warmup_steps − 1`.
    pub peak: f32,
    /// Steps of linear warm-up; 0 starts at the peak.
    pub warmup_steps: u64,
    /// What follows the warm-up.
    pub decay: Decay,
}

impl LearningRate {
    /// The rate of `step`, counted from 0. The first step is already trained with a rate above zero
    /// (peak / warm-up steps), since a step at rate zero would only cost time.
    pub fn lr(&self, step: u64) -> f32 {
        let done = step + 1;
        if done < self.warmup_steps {
            return (f64::from(self.peak) * done as f64 / self.warmup_steps as f64) as f32;
        }
        match self.decay {
            Decay::Constant => self.peak,
            Decay::Cosine { total_steps, min_ratio } => {
                let span = total_steps.saturating_sub(self.warmup_steps).max(1);
                let progress = ((done - self.warmup_steps) as f64 / span as f64).min(1.0);
                let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
                let floor = f64::from(min_ratio);
                (f64::from(self.peak) * (floor + (1.0 - floor) * cosine)) as f32
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COSINE: LearningRate = LearningRate {
        peak: 2.0,
        warmup_steps: 10,
        decay: Decay::Cosine { total_steps: 110, min_ratio: 0.1 },
    };

    #[test]
    fn corners_of_the_cosine() {
        assert_eq!(COSINE.lr(0), 0.2);
        assert_eq!(COSINE.lr(4), 1.0);
        assert_eq!(COSINE.lr(9), 2.0);
        assert_eq!(COSINE.lr(59), 1.1, "half way between the peak and the floor");
        assert_eq!(COSINE.lr(109), 0.2);
        assert_eq!(COSINE.lr(u64::MAX - 1), 0.2, "held after the end");
        assert!((0..109).all(|s| s < 9 || COSINE.lr(s + 1) < COSINE.lr(s)));
    }

    #[test]
    fn no_warmup_and_no_decay() {
        let flat = LearningRate { peak: 3e-4, warmup_steps: 0, decay: Decay::Constant };
        assert_eq!([flat.lr(0), flat.lr(1_000_000)], [3e-4; 2]);
        let cosine = LearningRate { warmup_steps: 0, ..COSINE };
        assert!(cosine.lr(0) < 2.0 && cosine.lr(0) > 1.99);
    }

    /// A run shorter than its warm-up is a recipe's mistake, but not one to divide by zero over.
    #[test]
    fn warmup_longer_than_the_run() {
        let short =
            LearningRate { decay: Decay::Cosine { total_steps: 5, min_ratio: 0.0 }, ..COSINE };
        assert!((0..20).all(|s| short.lr(s).is_finite()));
    }
}
