//! Statistics of the corruption against closed forms and the published table, and its invariants.

use super::*;

const MASK: u32 = 1;

fn corruption(block_length: usize, schedule: Schedule) -> Corruption {
    Corruption { block_length, mask_id: MASK, schedule, strata: Strata::Independent }
}

fn key(step: u32, sequence: u32) -> NoiseKey {
    NoiseKey { seed: 7, step, sequence }
}

/// Sample mean and its standard error.
fn mean_and_error(samples: &[f64]) -> (f64, f64) {
    let n = samples.len() as f64;
    let mean = samples.iter().sum::<f64>() / n;
    let variance = samples.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (mean, (variance / n).sqrt())
}

/// The mean must lie within 4 standard errors of the table, plus half a unit of its last digit:
/// over the 20 checks a right implementation fails for one seed in 800, and the seed is fixed.
fn check(what: &str, samples: &[f64], expected: f64, last_digit: f64) {
    let (mean, error) = mean_and_error(samples);
    let tolerance = 4.0 * error + last_digit / 2.0;
    assert!((mean - expected).abs() < tolerance, "{what}: {mean} ± {error}, expected {expected}");
}

/// 200 000 blocks of `block_length` tokens, as (masked count, Σ weight, forced) each.
fn blocks(block_length: usize, schedule: Schedule) -> Vec<(f64, f64, f64)> {
    let x0 = vec![9; block_length];
    let maskable = vec![true; block_length];
    let corruption = corruption(block_length, schedule);
    let draw = |i: u32| {
        let out = corruption.corrupt(&x0, &maskable, key(i / 100, i % 100));
        let masked = out.tokens.iter().filter(|&&t| t == MASK).count();
        assert_eq!(masked, out.weights.iter().filter(|&&w| w > 0.0).count());
        let weight: f32 = out.weights.iter().sum();
        (masked as f64, f64::from(weight), out.n_forced as f64)
    };
    (0..200_000).map(draw).collect()
}

#[test]
fn clipped_and_unclipped_statistics() {
    // B, P(no mask) before the fallback clipped and unclipped, E[masked], E[Σw] after it.
    let table = [
        (2, 0.16667, 0.3333, 1.4167, 2.318),
        (4, 0.12656, 0.2000, 2.2516, 4.452),
        (8, 0.07636, 0.1111, 4.1389, 8.519),
        (16, 0.04189, 0.0588, 8.0731, 16.553),
        (32, 0.02194, 0.0303, 16.0376, 32.570),
    ];
    for (b, none_clipped, none_unclipped, masked, weight) in table {
        let clipped = blocks(b, Schedule::Clipped);
        let column = |f: fn(&(f64, f64, f64)) -> f64| clipped.iter().map(f).collect::<Vec<f64>>();
        check(&format!("B={b}: forced"), &column(|c| c.2), none_clipped, 1e-5);
        check(&format!("B={b}: masked"), &column(|c| c.0), masked, 1e-4);
        check(&format!("B={b}: weight"), &column(|c| c.1), weight, 1e-3);
        assert!(clipped.iter().all(|c| c.0 >= 1.0), "a block without signal at B={b}");
        assert!(clipped.iter().all(|c| c.1 <= c.0 * b as f64 + 1e-3), "a weight above B={b}");
        let empty: Vec<f64> = blocks(b, Schedule::Unclipped)
            .iter()
            .map(|c| if c.0 == 0.0 { 1.0 } else { 0.0 })
            .collect();
        check(&format!("B={b}: unclipped"), &empty, none_unclipped, 1e-4);
    }
}

/// Kolmogorov–Smirnov distance of the samples from U(0,1), times √n; above 1.95 for one sample in a
/// thousand.
fn kolmogorov_smirnov(mut samples: Vec<f32>) -> f64 {
    samples.sort_by(f32::total_cmp);
    let n = samples.len() as f64;
    let distance = |(i, &x): (usize, &f32)| {
        (f64::from(x) - i as f64 / n).abs().max((f64::from(x) - (i + 1) as f64 / n).abs())
    };
    samples.iter().enumerate().map(distance).fold(0.0, f64::max) * n.sqrt()
}

#[test]
fn strata_are_filled_once_and_leave_the_marginal_law_uniform() {
    let n_blocks = 7;
    let corruption = Corruption { strata: Strata::Blocks, ..corruption(4, Schedule::Unclipped) };
    let rates: Vec<Vec<f32>> = (0..20_000)
        .map(|step| corruption.corrupt(&[9; 28], &[true; 28], key(step, 3)).rates)
        .collect();
    for of_sequence in &rates {
        let mut strata: Vec<usize> =
            of_sequence.iter().map(|t| (t * n_blocks as f32) as usize).collect();
        strata.sort_unstable();
        assert_eq!(strata, (0..n_blocks).collect::<Vec<_>>());
    }
    for block in 0..n_blocks {
        let ks = kolmogorov_smirnov(rates.iter().map(|r| r[block]).collect());
        assert!(ks < 1.95, "block {block}: t is not U(0,1), KS {ks}");
    }
}

#[test]
fn a_sequence_is_corrupted_alike_alone_and_in_a_batch() {
    let corruption = Corruption { strata: Strata::Blocks, ..corruption(4, Schedule::Clipped) };
    let x0: Vec<u32> = (10..74).collect();
    let draw = |sequence| corruption.corrupt(&x0, &[true; 64], key(2, sequence));
    let alone = draw(5);
    let batch: Vec<Corrupted> = (0..8).map(draw).collect();
    assert_eq!(batch[5], alone);
    assert!((0..8).filter(|&i| i != 5).all(|i| batch[i] != alone));
    assert_ne!(corruption.corrupt(&x0, &[true; 64], key(3, 5)), alone, "steps must differ");
}

#[test]
fn warmup_masks_half_of_u_max_on_average_with_weight_one() {
    for u_max in [0.02, 0.5] {
        let drawn = blocks(8, Schedule::Warmup { u_max });
        let fraction: Vec<f64> = drawn.iter().map(|d| d.0 / 8.0).collect();
        check("warm-up rate", &fraction, f64::from(u_max) / 2.0, 0.0);
        assert!(drawn.iter().all(|d| d.1 == d.0 && d.2 == 0.0), "weight 1, nothing forced");
        assert!(drawn.iter().any(|d| d.0 == 0.0), "empty blocks are allowed");
    }
}

#[test]
fn warmup_ends_at_its_last_step() {
    assert_eq!(u_max(0, 1000, 1e-3), Some(1e-3));
    assert_eq!(u_max(500, 1000, 0.0), Some(0.5));
    assert!(u_max(999, 1000, 1e-3).is_some_and(|u| u < 1.0 && u > 0.998));
    assert_eq!(u_max(1000, 1000, 1e-3), None);
    assert_eq!(Schedule::at(0, 0, 1e-3, true), Schedule::Clipped);
}

#[test]
fn a_prompt_is_never_masked() {
    let maskable: Vec<bool> = (0..32).map(|i| i >= 11).collect();
    let x0: Vec<u32> = (100..132).collect();
    for schedule in [Schedule::Clipped, Schedule::Unclipped, Schedule::Warmup { u_max: 0.9 }] {
        for step in 0..2000 {
            let out = corruption(4, schedule).corrupt(&x0, &maskable, key(step, 0));
            assert_eq!(out.tokens[..11], x0[..11]);
            assert_eq!(out.rates[..2], [0.0; 2]);
            assert!(schedule != Schedule::Clipped || out.tokens[11] == MASK, "block's one token");
        }
    }
}

#[test]
fn a_complement_masks_what_was_visible_at_the_rate_that_is_left() {
    let x0: Vec<u32> = (100..132).collect();
    let maskable: Vec<bool> = (0..32).map(|i| i >= 11).collect();
    for schedule in [Schedule::Clipped, Schedule::Unclipped] {
        let corruption = corruption(4, schedule);
        for step in 0..2000 {
            let first = corruption.corrupt(&x0, &maskable, key(step, 0));
            let second = corruption.complement(&x0, &maskable, &first);
            assert_eq!(second.rates[..2], [0.0; 2], "prompt alone");
            for (i, (&a, &b)) in first.weights.iter().zip(&second.weights).enumerate() {
                assert_eq!((a > 0.0) != (b > 0.0), maskable[i], "once of twice, and no prompt");
                assert_eq!(second.tokens[i], if b > 0.0 { MASK } else { x0[i] });
                let (u, rate) = (first.rates[i / 4], second.rates[i / 4]);
                assert!(!maskable[i] || rate == 1.0 - u);
                let floor = if schedule == Schedule::Clipped { 0.25 } else { 0.0 };
                assert!(b == 0.0 || b == 1.0 / rate.max(floor), "weight {b} at rate {rate}");
            }
        }
    }
}

/// Where u is drawn as 0 nothing is masked, and its complement masks everything, at weight 1; and the other way round.
#[test]
fn the_complement_of_nothing_is_everything() {
    let corruption = corruption(4, Schedule::Unclipped);
    let (x0, maskable) = ([9; 8], [false, false, true, true, true, true, true, true]);
    let nothing = Corrupted {
        tokens: x0.to_vec(),
        weights: vec![0.0; 8],
        rates: vec![0.0; 2],
        n_forced: 0,
        block_length: 4,
    };
    let everything = corruption.complement(&x0, &maskable, &nothing);
    assert_eq!(everything.tokens, [9, 9, 1, 1, 1, 1, 1, 1]);
    assert_eq!(everything.weights, [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
    assert_eq!(everything.rates, [1.0; 2]);
    assert_eq!(corruption.complement(&x0, &maskable, &everything), nothing);
}

#[test]
fn strata_of_sequences_are_filled_once_a_step_and_leave_the_marginal_law_uniform() {
    let n = 6;
    let corruption =
        Corruption { strata: Strata::Sequences(n), ..corruption(16, Schedule::Unclipped) };
    let rate = |step, i| corruption.corrupt(&[9; 16], &[true; 16], key(step, i)).rates[0];
    let steps: Vec<Vec<f32>> =
        (0..20_000).map(|step| (0..n).map(|i| rate(step, i)).collect()).collect();
    for rates in &steps {
        let mut strata: Vec<u32> = rates.iter().map(|t| (t * n as f32) as u32).collect();
        strata.sort_unstable();
        assert_eq!(strata, (0..n).collect::<Vec<_>>());
    }
    for i in 0..n as usize {
        let ks = kolmogorov_smirnov(steps.iter().map(|rates| rates[i]).collect());
        assert!(ks < 1.95, "sequence {i}: t is not U(0,1), KS {ks}");
    }
}

#[test]
fn a_short_last_block_keeps_the_floor() {
    for step in 0..2000 {
        let out = corruption(4, Schedule::Clipped).corrupt(&[9; 6], &[true; 6], key(step, 0));
        assert_eq!(out.rates.len(), 2);
        assert!(out.rates[1] >= 0.25 && out.tokens[4..].contains(&MASK));
    }
    let empty = corruption(4, Schedule::Clipped).corrupt(&[], &[], key(0, 0));
    assert!(empty.tokens.is_empty() && empty.rates.is_empty());
}

#[test]
fn two_copies_share_positions_and_predict_in_place() {
    let x0: Vec<u32> = (10..18).collect();
    let maskable: Vec<bool> = (0..8).map(|i| i > 0).collect();
    let xt = corruption(4, Schedule::Clipped).corrupt(&x0, &maskable, key(1, 1));
    let example = Example::two_copy(&x0, &maskable, vec![[0, 8]; 8], &xt);
    assert_eq!(example.tokens[..8], xt.tokens);
    assert_eq!(example.tokens[8..], x0);
    assert_eq!(example.positions, [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(example.divisor, 7.0);
    assert!(example.n_supervised() >= 2, "one masked token per block at least");
    for (i, &row) in example.supervised.iter().enumerate() {
        assert_eq!(example.tokens[row as usize], MASK);
        assert_eq!(example.targets[i], x0[row as usize]);
        assert_eq!(example.weights[i], 1.0 / xt.rates[row as usize / 4]);
    }
}

#[test]
fn next_tokens_stop_at_prompts_and_documents() {
    let x0 = [10, 11, 12, 13, 14];
    let spans = vec![[0, 3], [0, 3], [0, 3], [3, 5], [3, 5]];
    let example = Example::autoregressive(&x0, &[true, false, true, true, true], spans);
    assert_eq!(example.supervised, [1, 3]);
    assert_eq!(example.targets, [12, 14]);
    assert_eq!((example.weights.as_slice(), example.divisor), ([1.0; 2].as_slice(), 2.0));
}
