//! How large a change is, and how sure that is. All on logarithms of times, so a change is a ratio; all robust,
//! because a sample that something interrupted is no news about the kernel.
//!
//! *Paired* samples were taken in turn, so what slows the machine slows both: their differences are the change.
//! *Unpaired* samples are of two runs. Then log t = case + change · [new] + a · log fma + b · log copy is fitted to
//! both runs together: a and b say how this case feels what the two controls felt. They are known within limits only,
//! so the interval grows with what the controls moved between the runs.
//!
//! Intervals are the bootstrap's deviation times the normal quantile; blocks of neighbours are drawn together, because
//! what disturbs one sample disturbs the next.

use demask_engine::philox::Philox;

use crate::measure::Sample;

/// Samples in a block of the bootstrap.
const BLOCK: usize = 4;
/// Resamples.
const RESAMPLES: usize = 600;
/// How far the fitted sensitivity to a control may be off: a share of what that control moved joins the interval.
const SENSITIVITY_ERROR: f64 = 0.15;

/// A change as a ratio minus one, with its confidence interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    /// The best guess: 0.1 is ten per cent slower.
    pub estimate: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Change {
    fn from_log(estimate: f64, deviation: f64, extra: f64, quantile: f64) -> Change {
        let reach = quantile * deviation + extra;
        let ratio = |log: f64| log.exp() - 1.0;
        Change {
            estimate: ratio(estimate),
            low: ratio(estimate - reach),
            high: ratio(estimate + reach),
        }
    }
}

/// The middle value; of an even number the mean of the two.
///
/// # Panics
/// If there is none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    median_of(&mut sorted)
}

fn median_of(values: &mut [f64]) -> f64 {
    assert!(!values.is_empty(), "median of nothing");
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    if values.len() % 2 == 1 { values[half] } else { (values[half - 1] + values[half]) / 2.0 }
}

/// The normal quantile for a two-sided interval that covers all of `cases` at once with probability 0.95 (Bonferroni).
pub fn quantile(cases: usize) -> f64 {
    normal_quantile(1.0 - 0.025 / cases.max(1) as f64)
}

/// Inverse of the normal distribution for p in (0.5, 1): Abramowitz and Stegun 26.2.23, error below 4.5e-4.
fn normal_quantile(p: f64) -> f64 {
    let t = (-2.0 * (1.0 - p).ln()).sqrt();
    let above = 2.515517 + t * (0.802853 + t * 0.010328);
    let below = 1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308));
    t - above / below
}

/// Change of pairs taken in turn; the order within a pair alternates, so two neighbours make one difference from
/// which a steady drift is gone.
pub fn paired(base: &[Sample], new: &[Sample], quantile: f64) -> Change {
    let differences: Vec<f64> =
        base.iter().zip(new).map(|(a, b)| b.seconds.ln() - a.seconds.ln()).collect();
    let quads: Vec<f64> = match differences.len() {
        0..8 => differences,
        _ => differences.chunks_exact(2).map(|d| (d[0] + d[1]) / 2.0).collect(),
    };
    let estimate = median(&quads);
    let mut random = Philox::new(3, [quads.len() as u32, 0, 0]);
    let mut draw = Vec::new();
    let medians = (0..RESAMPLES).map(|_| {
        draw.clear();
        draw.extend(blocks(quads.len(), &mut random).map(|i| quads[i]));
        median_of(&mut draw)
    });
    Change::from_log(estimate, deviation(&medians.collect::<Vec<_>>()), 0.0, quantile)
}

/// One sample's logarithms: time, multiply-adds, copy.
type Logs = [f64; 3];

/// Change between two runs, each sample beside its controls.
pub fn unpaired(base: &[Sample], new: &[Sample], quantile: f64) -> Change {
    let logs = |samples: &[Sample]| -> Vec<Logs> {
        samples.iter().map(|s| [s.seconds.ln(), s.fma.ln(), s.copy.ln()]).collect()
    };
    let (base, new) = (logs(base), logs(new));
    let estimate = fit(&base, &new);
    let mut random = Philox::new(4, [base.len() as u32, new.len() as u32, 0]);
    let mut redraw =
        |from: &[Logs]| -> Vec<Logs> { blocks(from.len(), &mut random).map(|i| from[i]).collect() };
    let estimates: Vec<f64> = (0..RESAMPLES).map(|_| fit(&redraw(&base), &redraw(&new))).collect();
    let moved = |of: usize| {
        let middle = |run: &[Logs]| median(&run.iter().map(|l| l[of]).collect::<Vec<_>>());
        (middle(&new) - middle(&base)).abs()
    };
    let extra = SENSITIVITY_ERROR * (moved(1) + moved(2));
    Change::from_log(estimate, deviation(&estimates), extra, quantile)
}

/// The change in log t at equal controls: least squares with weights that fall for what is far off (Huber), the
/// sensitivities drawn towards a half each, from where few samples do not move them.
fn fit(base: &[Logs], new: &[Logs]) -> f64 {
    const PRIOR: f64 = 0.5;
    const RIDGE: f64 = 0.1;
    let n = (base.len() + new.len()) as f64;
    let mean = |of: usize| base.iter().chain(new).map(|l| l[of]).sum::<f64>() / n;
    let (fma, copy) = (mean(1), mean(2));
    let row = |is_new: f64, l: &Logs| -> ([f64; 4], f64) {
        (
            [1.0, is_new, l[1] - fma, l[2] - copy],
            l[0] - PRIOR * (l[1] - fma) - PRIOR * (l[2] - copy),
        )
    };
    let rows: Vec<_> =
        base.iter().map(|l| row(0.0, l)).chain(new.iter().map(|l| row(1.0, l))).collect();
    let mut weights = vec![1.0; rows.len()];
    let mut solution = [0.0; 4];
    for _ in 0..8 {
        let mut a = [[0.0; 5]; 4];
        for ((x, y), w) in rows.iter().zip(&weights) {
            for i in 0..4 {
                for j in 0..4 {
                    a[i][j] += w * x[i] * x[j];
                }
                a[i][4] += w * x[i] * y;
            }
        }
        a[2][2] += RIDGE;
        a[3][3] += RIDGE;
        solution = solve(a);
        let errors: Vec<f64> = rows
            .iter()
            .map(|(x, y)| (y - x.iter().zip(&solution).map(|(x, s)| x * s).sum::<f64>()).abs())
            .collect();
        let scale = (1.4826 * median(&errors)).max(1e-9);
        weights = errors.iter().map(|e| 1.0 / (e / scale).max(1.0)).collect();
    }
    solution[1]
}

/// Gauss with pivots; the matrix is positive definite.
fn solve(mut a: [[f64; 5]; 4]) -> [f64; 4] {
    for i in 0..4 {
        let pivot = (i..4).max_by(|&x, &y| a[x][i].abs().total_cmp(&a[y][i].abs())).unwrap_or(i);
        a.swap(i, pivot);
        let top = a[i];
        for (j, row) in a.iter_mut().enumerate().filter(|(j, _)| *j != i) {
            let factor = row[i] / top[i];
            debug_assert!(i != j);
            row.iter_mut().zip(&top).skip(i).for_each(|(x, t)| *x -= factor * t);
        }
    }
    [0, 1, 2, 3].map(|i| a[i][4] / a[i][i])
}

/// `n` indices below `n`, in blocks of neighbours that wrap around.
fn blocks(n: usize, random: &mut Philox) -> impl Iterator<Item = usize> {
    let size = BLOCK.min(n.div_ceil(8));
    let starts: Vec<usize> =
        (0..n.div_ceil(size)).map(|_| random.below(n as u32) as usize).collect();
    starts.into_iter().flat_map(move |start| (start..start + size).map(move |i| i % n)).take(n)
}

fn deviation(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    (values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A noisy machine: its speed drifts and jumps, single samples are interrupted, each control feels it in its own
    /// way.
    struct Machine {
        random: Philox,
        state: f64,
        at: usize,
    }

    impl Machine {
        fn new(seed: u64) -> Machine {
            Machine { random: Philox::new(seed, [0; 3]), state: 0.0, at: 0 }
        }

        fn noise(&mut self, size: f64) -> f64 {
            size * f64::from(self.random.normal())
        }

        /// One sample of a case that takes `seconds` on the quiet machine.
        fn sample(&mut self, seconds: f64) -> Sample {
            self.at += 1;
            self.state = 0.95 * self.state + self.noise(0.03);
            if self.random.below(20) == 0 {
                self.state += 0.2;
            }
            let drift = self.state + 1e-4 * self.at as f64;
            let interrupted = if self.random.below(25) == 0 { 1.0 } else { 0.0 };
            Sample {
                seconds: seconds * (0.7 * drift + self.noise(0.05) + interrupted).exp(),
                fma: 1e-3 * (0.4 * drift + self.noise(0.02)).exp(),
                copy: 1e-3 * (1.0 * drift + self.noise(0.04)).exp(),
            }
        }

        fn run(&mut self, seconds: f64, n: usize) -> Vec<Sample> {
            (0..n).map(|_| self.sample(seconds)).collect()
        }

        fn pairs(&mut self, base: f64, new: f64, n: usize) -> (Vec<Sample>, Vec<Sample>) {
            let mut pairs = (Vec::new(), Vec::new());
            for i in 0..n {
                let first = self.sample(if i % 2 == 0 { base } else { new });
                let second = self.sample(if i % 2 == 0 { new } else { base });
                let (a, b) = if i % 2 == 0 { (first, second) } else { (second, first) };
                pairs.0.push(a);
                pairs.1.push(b);
            }
            pairs
        }
    }

    /// How often of forty the interval lies above the threshold.
    fn flagged(measure: impl Fn(&mut Machine) -> Change, threshold: f64) -> usize {
        (0..40).filter(|&seed| measure(&mut Machine::new(seed)).low > threshold).count()
    }

    #[test]
    fn pairs_find_ten_per_cent_and_nothing_else() {
        let z = quantile(20);
        let of = |new: f64| {
            flagged(
                move |m| {
                    let (a, b) = m.pairs(1.0, new, 400);
                    paired(&a, &b, z)
                },
                0.05,
            )
        };
        assert_eq!(of(1.0), 0);
        assert_eq!(of(1.02), 0);
        assert!(of(1.10) >= 38, "{} of 40", of(1.10));
    }

    #[test]
    fn runs_find_fifteen_per_cent_and_nothing_else() {
        let z = quantile(20);
        let of = |new: f64| {
            flagged(
                move |m| {
                    let a = m.run(1.0, 300);
                    // Between the runs the machine has become slower for good.
                    m.state += 0.1;
                    m.at += 500;
                    let b = m.run(new, 300);
                    unpaired(&a, &b, z)
                },
                0.05,
            )
        };
        assert_eq!(of(1.0), 0);
        assert_eq!(of(1.02), 0);
        assert!(of(1.15) >= 36, "{} of 40", of(1.15));
    }

    #[test]
    fn intervals_cover_what_is_true() {
        let covers = |seed: u64| {
            let (a, b) = Machine::new(seed + 100).pairs(1.0, 1.07, 160);
            let change = paired(&a, &b, quantile(1));
            (change.low..change.high).contains(&0.07)
        };
        let covered = (0..60).filter(|&seed| covers(seed)).count();
        assert!(covered >= 52, "{covered} of 60 at 95 %");
    }

    #[test]
    fn known_values() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!((quantile(1) - 1.96).abs() < 1e-3);
        assert!((quantile(20) - 3.023).abs() < 1e-3);
        let a = [
            [4., 1., 0., 0., 9.],
            [1., 3., 1., 0., 8.],
            [0., 1., 5., 2., 2.],
            [0., 0., 2., 6., 7.],
        ];
        for (row, x) in a.iter().zip([0; 4].map(|_: i32| solve(a))) {
            let sum: f64 = row.iter().zip(&x).map(|(a, x)| a * x).sum();
            assert!((sum - row[4]).abs() < 1e-12);
        }
        // One sample each is an answer too, if a poor one.
        let one = [Sample { seconds: 1.0, fma: 1.0, copy: 1.0 }];
        assert!(unpaired(&one, &one, 2.0).estimate.abs() < 1e-9);
        assert!(paired(&one, &one, 2.0).estimate.abs() < 1e-9);
    }
}
