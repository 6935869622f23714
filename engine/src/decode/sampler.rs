//! Choosing a token from one row of logits, on the host: what `canvas.rs` does on the device is held to this. Pure
//! functions: a choice depends on the logits, the seed, the position and the pass, never on what was drawn before or on
//! other rows. Not here: which positions are committed.

use super::Sampling;
use crate::philox::philox4x32;

/// No Gumbel draw is larger: the smallest of 2³² probabilities gives 33 ln 2 = 22.87.
const LARGEST_GUMBEL: f32 = 23.0;

/// What a draw is for; different purposes never share random words.
#[derive(Clone, Copy)]
enum Stream {
    Token = 0,
    Order = 1,
}

/// Chooses tokens of one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampler {
    /// How a token is drawn.
    pub sampling: Sampling,
    /// The token of an open position, which is never chosen. It keeps its share of the confidence's denominator, as
    /// forbidden tokens do.
    pub hole: Option<u32>,
    /// What the repetition penalty counts as seen.
    pub text: Vec<u32>,
}

/// A chosen token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Its id.
    pub token: u32,
    /// Its probability under softmax of the raw logits, whatever is asked of the choice.
    pub confidence: f32,
    /// The probability of the likeliest token less that of the second.
    pub margin: f32,
    /// Of the raw distribution, in nats.
    pub entropy: f32,
}

impl Sampler {
    /// Nothing but how a token is drawn.
    pub fn new(sampling: Sampling) -> Self {
        Sampler { sampling, hole: None, text: Vec::new() }
    }

    /// Chooses from `logits`, `[V]`, for a position in a pass. `None` if the logits are no
    /// distribution: empty, NaN, infinite, or nothing is left beside the forbidden tokens.
    pub fn choose(&self, logits: &[f32], position: usize, pass: usize) -> Option<Choice> {
        if !logits.iter().all(|logit| logit.is_finite()) {
            return None;
        }
        let weighed: Vec<f32> = logits
            .iter()
            .enumerate()
            .map(|(id, &logit)| self.penalised(id as u32, logit))
            .collect();
        let allowed = |id: &usize| {
            let id = *id as u32;
            self.hole != Some(id) && !self.sampling.forbidden.contains(&id)
        };
        let best = argmax(&weighed, allowed)?;
        let Sampling { temperature, top_k, top_p, .. } = self.sampling;
        let token = if temperature > 0.0 {
            let noisy = |token: usize| {
                let word = self.word(Stream::Token, token as u32, position, pass);
                weighed[token] + temperature * gumbel(word)
            };
            let all = (0..logits.len()).filter(allowed);
            if top_k.is_some() || top_p.is_some() {
                self.gumbel_max(
                    &weighed,
                    best,
                    self.kept(&weighed, all.collect()).into_iter(),
                    noisy,
                )
            } else {
                self.gumbel_max(&weighed, best, all, noisy)
            }
        } else {
            best
        };
        let total = log_sum_exp(logits);
        let mut sorted: Vec<f64> = logits.iter().map(|&x| f64::from(x - total).exp()).collect();
        let entropy = sorted.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum::<f64>() as f32;
        sorted.sort_by(|a, b| b.total_cmp(a));
        let margin = (sorted[0] - sorted.get(1).copied().unwrap_or(0.0)) as f32;
        let confidence = (logits[token] - total).exp();
        let choice = Choice { token: token as u32, confidence, margin, entropy };
        confidence.is_finite().then_some(choice)
    }

    fn penalised(&self, id: u32, logit: f32) -> f32 {
        let penalty = self.sampling.repetition_penalty;
        match self.text.contains(&id) && penalty != 1.0 {
            true if logit > 0.0 => logit / penalty,
            true => logit * penalty,
            false => logit,
        }
    }

    /// Uniform in [0, 1): the place of a position in a random order of commits.
    pub fn order(&self, position: usize, pass: usize) -> f32 {
        (self.word(Stream::Order, 0, position, pass) >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    fn word(&self, stream: Stream, token: u32, position: usize, pass: usize) -> u32 {
        let key = [self.sampling.seed as u32, (self.sampling.seed >> 32) as u32];
        philox4x32([token, position as u32, pass as u32, stream as u32], key)[0]
    }

    /// argmax(logit + T · g): a sample from softmax(logits / T). Tokens that even the largest draw
    /// could not lift above the best so far are skipped, which changes nothing but the time.
    fn gumbel_max(
        &self,
        logits: &[f32],
        best: usize,
        among: impl Iterator<Item = usize>,
        noisy: impl Fn(usize) -> f32,
    ) -> usize {
        let (mut best, mut top) = (best, noisy(best));
        for token in among {
            if logits[token] + self.sampling.temperature * LARGEST_GUMBEL < top {
                continue;
            }
            let value = noisy(token);
            if value > top || (value == top && token < best) {
                (best, top) = (token, value);
            }
        }
        best
    }

    /// The tokens that `top_k` and `top_p` leave, and those that tie with the last of them.
    fn kept(&self, logits: &[f32], mut kept: Vec<usize>) -> Vec<usize> {
        kept.sort_unstable_by(|&a: &usize, &b: &usize| logits[b].total_cmp(&logits[a]));
        let cut = |kept: &mut Vec<usize>, n: usize| {
            if let Some(last) = kept.get(n.max(1) - 1).map(|&i| logits[i]) {
                kept.retain(|&i| logits[i] >= last);
            }
        };
        if let Some(k) = self.sampling.top_k {
            cut(&mut kept, k);
        }
        let Some(p) = self.sampling.top_p.map(f64::from).filter(|&p| p < 1.0) else { return kept };
        let top = kept.first().map_or(0.0, |&i| logits[i]);
        let weight = |i: usize| f64::from((logits[i] - top) / self.sampling.temperature).exp();
        let total: f64 = kept.iter().map(|&i| weight(i)).sum();
        let mut sum = 0.0;
        let open = |&&i: &&usize| {
            let open = sum < p * total;
            sum += weight(i);
            open
        };
        let n = kept.iter().take_while(open).count();
        cut(&mut kept, n);
        kept
    }
}

/// Index of the largest value, the lowest among equals; NaN loses.
fn argmax(values: &[f32], allowed: impl Fn(&usize) -> bool) -> Option<usize> {
    let mut best = None;
    for (i, &value) in values.iter().enumerate() {
        let wins = best.is_none_or(|b: usize| value > values[b] || values[b].is_nan());
        if wins && allowed(&i) {
            best = Some(i);
        }
    }
    best
}

/// ln Σ exp(x), without overflow; exponentials in f32, their sum in f64. NaN if any x is NaN or +∞.
fn log_sum_exp(x: &[f32]) -> f32 {
    let top = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = x.iter().map(|&x| f64::from((x - top).exp())).sum();
    top + sum.ln() as f32
}

/// −ln(−ln U) for a random word: U = 1 − v, where v is fine near 0, so that large draws, which
/// decide a maximum over a vocabulary, are not coarse.
fn gumbel(word: u32) -> f32 {
    let v = (f64::from(word) + 0.5) / 4_294_967_296.0;
    -(-(-v).ln_1p()).ln() as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(temperature: f32) -> Sampler {
        Sampler::new(Sampling { temperature, seed: 3, ..Sampling::greedy() })
    }

    fn with(temperature: f32, change: impl FnOnce(&mut Sampling)) -> Sampler {
        let mut sampler = sampler(temperature);
        change(&mut sampler.sampling);
        sampler
    }

    /// How often each token is chosen over many positions.
    fn frequencies(sampler: &Sampler, logits: &[f32], n: usize) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for position in 0..n {
            let choice = sampler.choose(logits, position, 7).expect("finite logits");
            counts[choice.token as usize] += 1.0 / n as f64;
        }
        counts
    }

    fn softmax(logits: &[f32], temperature: f64) -> Vec<f64> {
        let w: Vec<f64> = logits.iter().map(|&l| (f64::from(l) / temperature).exp()).collect();
        let total: f64 = w.iter().sum();
        w.iter().map(|w| w / total).collect()
    }

    fn assert_close(got: &[f64], want: &[f64]) {
        for (g, w) in got.iter().zip(want) {
            // Five standard deviations of 20 000 draws are at most 0.018.
            assert!((g - w).abs() < 0.018, "{got:?} instead of {want:?}");
        }
    }

    const LOGITS: [f32; 5] = [1.0, -0.5, 2.0, 0.0, -3.0];

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let logits = [0.0, 3.0, -1.0, 3.0];
        let choice = Sampler::new(Sampling::greedy()).choose(&logits, 0, 0).expect("finite logits");
        assert_eq!(choice.token, 1);
        let want = softmax(&logits, 1.0)[1];
        assert!((f64::from(choice.confidence) - want).abs() < 1e-6);
    }

    #[test]
    fn confidence_is_of_the_raw_logits_and_does_not_overflow() {
        for temperature in [0.0, 0.3, 2.0] {
            let choice = sampler(temperature).choose(&LOGITS, 4, 1).expect("finite logits");
            let want = softmax(&LOGITS, 1.0)[choice.token as usize];
            assert!((f64::from(choice.confidence) - want).abs() < 1e-6);
        }
        let large = [3e38, -3e38, 1e5];
        assert_eq!(
            Sampler::new(Sampling::greedy()).choose(&large, 0, 0).map(|c| c.confidence),
            Some(1.0)
        );
        let flat = vec![-7.25; 155_136];
        let choice = Sampler::new(Sampling::greedy()).choose(&flat, 0, 0).expect("finite logits");
        assert!((choice.confidence * 155_136.0 - 1.0).abs() < 1e-4, "{choice:?}");
    }

    #[test]
    fn samples_follow_the_softmax() {
        for temperature in [0.5, 1.0, 3.0] {
            let got = frequencies(&sampler(temperature), &LOGITS, 20_000);
            assert_close(&got, &softmax(&LOGITS, f64::from(temperature)));
        }
    }

    #[test]
    fn skipping_changes_no_choice() {
        let logits: Vec<f32> = (0..400).map(|i| ((i * 37) % 101) as f32 * 0.4 - 20.0).collect();
        let s = sampler(0.9);
        for position in 0..200 {
            let noisy =
                |i: usize| logits[i] + 0.9 * gumbel(s.word(Stream::Token, i as u32, position, 2));
            let all: Vec<f32> = (0..logits.len()).map(noisy).collect();
            let got = s.choose(&logits, position, 2).map(|c| c.token as usize);
            assert_eq!(got, argmax(&all, |_| true));
        }
    }

    #[test]
    fn top_k_and_top_p_renormalise() {
        let kept = |s: &Sampler, logits: &[f32]| s.kept(logits, (0..logits.len()).collect());
        let two = with(1.0, |s| s.top_k = Some(2));
        let e = 1f64.exp();
        let want = [1.0 / (1.0 + e), 0.0, e / (1.0 + e), 0.0, 0.0];
        assert_close(&frequencies(&two, &LOGITS, 20_000), &want);
        // The two best tokens have probability 0.628 + 0.231 = 0.859.
        for (p, n) in [(0.6, 1), (0.7, 2), (0.85, 2), (0.87, 3), (1.0, 5)] {
            assert_eq!(kept(&with(1.0, |s| s.top_p = Some(p)), &LOGITS).len(), n, "top_p {p}");
        }
        // Temperature comes first: hotter is flatter.
        assert_eq!(kept(&with(100.0, |s| s.top_p = Some(0.7)), &LOGITS).len(), 4);
        assert_eq!(kept(&with(1.0, |s| s.top_p = Some(1e-30)), &LOGITS), [2]);
        // What ties with the last stays.
        assert_eq!(kept(&with(1.0, |s| s.top_p = Some(1e-9)), &[0.5; 10]).len(), 10);
        assert_eq!(kept(&with(1.0, |s| s.top_k = Some(2)), &[1.0, 0.0, 0.0, -1.0]).len(), 3);
    }

    #[test]
    fn the_forbidden_token_is_never_chosen() {
        let s = Sampler { hole: Some(2), ..sampler(1.0) };
        let got = frequencies(&s, &LOGITS, 20_000);
        let others: f64 = 1.0 - softmax(&LOGITS, 1.0)[2];
        let mut want: Vec<f64> = softmax(&LOGITS, 1.0).iter().map(|p| p / others).collect();
        want[2] = 0.0;
        assert_close(&got, &want);
        let limited = with(1.0, |s| (s.top_k, s.forbidden) = (Some(1), vec![2]));
        for s in [with(0.0, |s| s.forbidden = vec![2]), limited] {
            assert_eq!(s.choose(&LOGITS, 0, 0).map(|c| c.token), Some(0));
        }
    }

    #[test]
    fn what_was_said_is_less_likely() {
        let mut s = with(0.0, |s| s.repetition_penalty = 3.0);
        s.text = vec![2, 3, 4];
        // 2 / 3 is less than 1, and −3 · 3 than −3.
        assert_eq!(s.choose(&LOGITS, 0, 0).map(|c| c.token), Some(0));
        assert_eq!((s.penalised(4, -3.0), s.penalised(1, -0.5)), (-9.0, -0.5));
    }

    #[test]
    fn margin_and_entropy_are_of_the_raw_logits() {
        let choice = with(1.0, |s| s.top_k = Some(1)).choose(&[0.0, 0.0, 3f32.ln()], 0, 0);
        let choice = choice.expect("finite logits");
        assert!((choice.margin - 0.4).abs() < 1e-6);
        let want = 0.4 * 5f32.ln() + 0.6 * (5.0f32 / 3.0).ln();
        assert!((choice.entropy - want).abs() < 1e-6, "{choice:?}");
    }

    #[test]
    fn draws_are_named_by_seed_position_and_pass() {
        let flat = [0.0; 4096];
        let token = |seed, position, pass| {
            let s = with(1.0, |s| s.seed = seed);
            s.choose(&flat, position, pass).map(|c| c.token)
        };
        assert_eq!(token(1, 2, 3), token(1, 2, 3));
        let others = [token(1 << 32, 2, 3), token(1, 3, 2), token(1, 2, 4), token(2, 2, 3)];
        assert!(others.iter().all(|&t| t != token(1, 2, 3)));
        let order = sampler(0.0).order(5, 6);
        assert!((0.0..1.0).contains(&order) && order != sampler(0.0).order(6, 5));
    }

    #[test]
    fn gumbel_draws_have_the_known_mean_and_bounds() {
        let n = 1 << 16;
        let mean = (0..n).map(|i| f64::from(gumbel(i << 16 | 0x8000))).sum::<f64>() / f64::from(n);
        assert!((mean - 0.577_215_66).abs() < 1e-3, "{mean}");
        assert!(gumbel(0) < LARGEST_GUMBEL && gumbel(u32::MAX).is_finite());
    }

    #[test]
    fn broken_logits_give_nothing() {
        let greedy = Sampler::new(Sampling::greedy());
        assert_eq!(greedy.choose(&[], 0, 0), None);
        assert_eq!(greedy.choose(&[f32::NAN; 3], 0, 0), None);
        assert_eq!(greedy.choose(&[0.0, f32::NAN, 1.0], 0, 0), None);
        assert_eq!(greedy.choose(&[0.0, f32::INFINITY], 0, 0), None);
        assert_eq!(greedy.choose(&[f32::NEG_INFINITY; 2], 0, 0), None);
        assert_eq!(greedy.choose(&[0.0, f32::NEG_INFINITY], 0, 0), None);
    }
}
