//! Likelihoods of given text: blocks by the definition, one pass over everything for each of them; and two models
//! compared, by f64 on the host.

use demask_engine::Error;
use demask_engine::decode::{BlockOptions, Mode, Schedule, compare, score};
use demask_engine::model::{DiffusionAttention, Llama, Precision, Weights};
use demask_engine::ops::Mask;
use demask_engine::tensor::DType;
use demask_tests::{checked_gpu, golden};

const MASK_ID: u32 = 96;

fn tiny(precision: Precision) -> Option<Llama> {
    let gpu = checked_gpu()?;
    let (mut config, weights) = Weights::open(&golden("tiny")).expect("the golden model");
    config.max_position_embeddings = 2048;
    Some(Llama::from_weights(&gpu, &config, &weights, precision).expect("it loads"))
}

fn text(n: u32) -> Vec<u32> {
    (0..n).map(|i| i * i % 89).collect()
}

fn blocks(length: usize) -> Mode {
    Mode::Block(BlockOptions::new(MASK_ID, length))
}

/// ln softmax in f64.
fn log_softmax(row: &[f32]) -> Vec<f64> {
    let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&z| f64::from(z - most).exp()).sum();
    row.iter().map(|&z| f64::from(z - most) - sum.ln()).collect()
}

/// Log-probabilities [T, V], each block hidden in a pass of its own over all that comes before it.
fn by_definition(llama: &Llama, tokens: &[u32], length: usize, mask: Mask) -> Vec<Vec<f64>> {
    let mut all = Vec::new();
    for start in (0..tokens.len()).step_by(length) {
        let end = (start + length).min(tokens.len());
        let mut seen = tokens[..start].to_vec();
        seen.resize(end, MASK_ID);
        let mut cache = llama.cache(end);
        let logits = llama.logits(&llama.step(&seen, 0, mask, &mut cache));
        let logits = logits.to_vec().expect("the device works");
        all.extend(logits.chunks(llama.config().vocab_size).skip(start).map(log_softmax));
    }
    all
}

#[test]
fn blocks_are_given_the_blocks_before() {
    let Some(llama) = tiny(Precision::F32) else { return };
    for (length, n) in [(1, 5), (4, 1), (4, 16), (4, 23), (5, 31), (64, 23)] {
        let tokens = text(n);
        let want = by_definition(&llama, &tokens, length, Mask::BlockCausal(length));
        let got = score(&llama, &tokens, &blocks(length)).expect("a fine text");
        assert_eq!(got.len(), tokens.len());
        for (at, (got, want)) in got.iter().zip(&want).enumerate() {
            let (got, want) = (f64::from(got.expect("all")), want[tokens[at] as usize]);
            assert!((got - want).abs() < 1e-4, "{length} {n} {at}: {got} instead of {want}");
        }
    }
}

#[test]
fn long_texts_are_read_in_pieces_of_whole_blocks() {
    let Some(llama) = tiny(Precision::F32) else { return };
    // Pieces of 510.
    let (tokens, length) = (text(1100), 6);
    let all = score(&llama, &tokens, &blocks(length)).expect("a fine text");
    for from in [504, 510, 1014, 1098] {
        // Of a shorter text this block is the last one.
        let end = (from + length).min(tokens.len());
        let alone = score(&llama, &tokens[..end], &blocks(length)).expect("a fine text");
        for at in from..end {
            let (a, b) = (all[at].expect("all"), alone[at].expect("all"));
            assert!((a - b).abs() < 1e-4, "{at}: {a} and {b}");
        }
    }
}

#[test]
fn causal_diffusion_sees_no_block() {
    let Some(llama) = tiny(Precision::F32) else { return };
    let tokens = text(13);
    let options =
        BlockOptions { attention: DiffusionAttention::Causal, ..BlockOptions::new(MASK_ID, 4) };
    let want = by_definition(&llama, &tokens, 4, Mask::Causal);
    let got = score(&llama, &tokens, &Mode::Block(options)).expect("a fine text");
    for (at, (got, want)) in got.iter().zip(&want).enumerate() {
        assert!((f64::from(got.expect("all")) - want[tokens[at] as usize]).abs() < 1e-4);
    }
    let full =
        BlockOptions { attention: DiffusionAttention::Full, ..BlockOptions::new(MASK_ID, 4) };
    assert!(matches!(score(&llama, &tokens, &Mode::Block(full)), Err(Error::Request(_))));
    let senseless =
        BlockOptions { schedule: Schedule::Fixed { steps: 0 }, ..BlockOptions::new(MASK_ID, 4) };
    assert!(matches!(score(&llama, &tokens, &Mode::Block(senseless)), Err(Error::Request(_))));
}

#[test]
fn differences_between_two_models() {
    let Some(exact) = tiny(Precision::F32) else { return };
    let Some(rounded) = tiny(Precision::Bf16) else { return };
    let Some(halved) = tiny(Precision::F32) else { return };
    let halved = halved.cached_in(DType::F16);
    let tokens = text(37);
    for mode in [Mode::Autoregressive, blocks(4)] {
        let rows = |llama: &Llama| match mode {
            // A token is told by the row before it.
            Mode::Autoregressive => {
                let mut cache = llama.cache(tokens.len());
                let logits = llama.logits(&llama.step(&tokens, 0, Mask::Causal, &mut cache));
                let logits = logits.to_vec().expect("the device works");
                logits.chunks(97).take(36).map(log_softmax).collect()
            }
            Mode::Block(_) => by_definition(llama, &tokens, 4, Mask::BlockCausal(4)),
        };
        let (p, q): (Vec<Vec<f64>>, Vec<Vec<f64>>) = (rows(&exact), rows(&rounded));
        let mut told = Vec::new();
        let got = compare(&rounded, &exact, &tokens, &mode, |done| told.push(done));
        let got = got.expect("two models of one shape");
        assert_eq!((got.len(), told.last()), (p.len(), Some(&p.len())));
        let first = tokens.len() - p.len();
        let top = |row: &[f64]| (0..97).fold(0, |a, b| if row[b] > row[a] { b } else { a });
        for (i, got) in got.iter().enumerate() {
            let kl: f64 = p[i].iter().zip(&q[i]).map(|(p, q)| p.exp() * (p - q)).sum();
            assert!((got.kl - kl).abs() < 1e-7 + 1e-2 * kl, "{i}: {} instead of {kl}", got.kl);
            assert!(kl > 1e-9, "rounding changes something");
            assert_eq!(got.same_top, top(&p[i]) == top(&q[i]));
            let want = [&p, &q].map(|rows| rows[i][tokens[first + i] as usize]);
            assert!(got.logprobs.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-4));
        }
        let near = compare(&halved, &exact, &tokens, &mode, |_| {}).expect("one model");
        let kl = near.iter().map(|d| d.kl).fold(0.0, f64::max);
        assert!(kl > 0.0 && kl < 1e-4, "keys and values in f16 change {kl}");
        let same = compare(&exact, &exact, &tokens, &mode, |_| {}).expect("one model");
        assert!(same.iter().all(|d| d.kl == 0.0 && d.same_top));
    }
    assert!(compare(&exact, &exact, &[], &blocks(4), |_| {}).is_ok_and(|all| all.is_empty()));
    assert!(compare(&exact, &exact, &[97], &blocks(4), |_| {}).is_err());
}
