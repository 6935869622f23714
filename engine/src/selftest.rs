//! Do the kernels give right numbers on this device? Each kernel family runs once on small inputs
//! with extents off every tile, and is held against the formula in f64 on the host. `demask doctor`
//! prints the result; a driver that fails here must not be trained on. Not here: the full cases,
//! which the test suite runs (`ops::case`).

use std::time::Instant;

use half::bf16;

use crate::Result;
use crate::autograd::{Gradients, backward};
use crate::gpu::Gpu;
use crate::numerics;
use crate::ops::{
    AdamW, AttentionOptions, Layout, Mask, Supervision, adamw_step, attention, gather, grad_norm,
    linear_cross_entropy, matmul, rms_norm, softmax,
};
use crate::philox::Philox;
use crate::tensor::{DType, Tensor};

/// Largest error that rounding explains: sums of some hundred f32 products of order one, and the
/// device's exp.
const BOUND: f64 = 1e-4;

/// One kernel family's result.
#[derive(Clone, Debug)]
pub struct Check {
    /// What was run.
    pub name: &'static str,
    /// Largest |got − want| / (1 + |want|); infinite if a value is not finite.
    pub max_error: f64,
    /// What is allowed.
    pub bound: f64,
    /// `max_error` is within `bound`.
    pub ok: bool,
}

/// Runs every check. An error is a fault of the device, not a wrong number.
pub fn run(gpu: &Gpu) -> Result<Vec<Check>> {
    let check = |name, error: Result<f64>| {
        error.map(|max_error| Check { name, max_error, bound: BOUND, ok: max_error <= BOUND })
    };
    let attend = |mask, tokens| attention_error(gpu, mask, tokens);
    let [causal, causal_gradients] = attend(Mask::Causal, 37)?;
    let [two_copy, two_copy_gradients] = attend(Mask::TwoCopy(4), 40)?;
    let [loss, loss_gradients] = cross_entropy_error(gpu)?;
    vec![
        check("matmul NN", matmul_error(gpu, Layout::NN, [70, 66, 130], DType::F32)),
        check("matmul NT", matmul_error(gpu, Layout::NT, [70, 66, 132], DType::F32)),
        check("matmul TN", matmul_error(gpu, Layout::TN, [67, 65, 131], DType::F32)),
        check("matmul of one row", matmul_error(gpu, Layout::NT, [1, 130, 132], DType::F32)),
        check("matmul, bf16 weights", matmul_error(gpu, Layout::NT, [70, 66, 132], DType::Bf16)),
        check("softmax", softmax_error(gpu)),
        check("rms_norm", rms_norm_error(gpu)),
        check("attention, causal", Ok(causal)),
        check("attention, causal: gradients", Ok(causal_gradients)),
        check("attention, two-copy", Ok(two_copy)),
        check("attention, two-copy: gradients", Ok(two_copy_gradients)),
        check("linear_cross_entropy", Ok(loss)),
        check("linear_cross_entropy: gradients", Ok(loss_gradients)),
        check("adamw", adamw_error(gpu)),
        check("NaN and infinity are kept", numerics_error(gpu)),
    ]
    .into_iter()
    .collect()
}

/// GFLOP/s of an f32 product of square matrices: the best of three, waiting for the device each
/// time.
pub fn matmul_gflops(gpu: &Gpu, size: usize) -> Result<f64> {
    let operand = |seed| Tensor::from_f32(gpu, &normal(seed, size * size), [size, size]);
    let (a, b) = (operand(1), operand(2));
    // The first product compiles the kernel.
    matmul(&a, &b, Layout::NT);
    gpu.sync()?;
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let start = Instant::now();
        let y = matmul(&a, &b, Layout::NT);
        gpu.sync()?;
        best = best.min(start.elapsed().as_secs_f64());
        drop(y);
    }
    Ok(2.0 * (size as f64).powi(3) / best / 1e9)
}

/// Infinite if arithmetic does not keep what is not finite: then broken weights would go unnoticed.
fn numerics_error(gpu: &Gpu) -> Result<f64> {
    let lost = numerics::probe(gpu)?.iter().any(|row| row.needed && row.differs);
    Ok(if lost { f64::INFINITY } else { 0.0 })
}

fn normal(seed: u64, n: usize) -> Vec<f32> {
    let mut random = Philox::new(seed, [0; 3]);
    (0..n).map(|_| random.normal()).collect()
}

fn max_error(got: &[f32], want: &[f64]) -> f64 {
    if got.len() != want.len() {
        return f64::INFINITY;
    }
    let error = |(&got, &want): (&f32, &f64)| {
        let error = (f64::from(got) - want).abs() / (1.0 + want.abs());
        // `f64::max` would pass over NaN.
        if error.is_nan() { f64::INFINITY } else { error }
    };
    worst(got.iter().zip(want).map(error))
}

fn worst(errors: impl IntoIterator<Item = f64>) -> f64 {
    errors.into_iter().fold(0.0, f64::max)
}

fn matmul_error(gpu: &Gpu, layout: Layout, [m, n, k]: [usize; 3], dtype: DType) -> Result<f64> {
    let a = normal(3, m * k);
    let (a_shape, b_shape) = match layout {
        Layout::NN => ([m, k], [k, n]),
        Layout::NT => ([m, k], [n, k]),
        Layout::TN => ([k, m], [k, n]),
    };
    let halves: Vec<bf16> = normal(4, k * n).into_iter().map(bf16::from_f32).collect();
    // Both types hold the same values, so that the reference needs no second case.
    let b: Vec<f32> = halves.iter().map(|h| h.to_f32()).collect();
    let right = match dtype {
        DType::Bf16 => {
            let bytes: Vec<u8> = halves.iter().flat_map(|h| h.to_le_bytes()).collect();
            Tensor::from_bytes(gpu, &bytes, b_shape, dtype, "selftest")
        }
        _ => Tensor::from_f32(gpu, &b, b_shape),
    };
    let got = matmul(&Tensor::from_f32(gpu, &a, a_shape), &right, layout).to_vec()?;
    let at_a = |i: usize, c: usize| a[if layout == Layout::TN { c * m + i } else { i * k + c }];
    let at_b = |c: usize, j: usize| b[if layout == Layout::NT { j * k + c } else { c * n + j }];
    let product = |c, i, j| f64::from(at_a(i, c)) * f64::from(at_b(c, j));
    let want = (0..m * n).map(|ij| (0..k).map(|c| product(c, ij / n, ij % n)).sum());
    Ok(max_error(&got, &want.collect::<Vec<f64>>()))
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

fn softmax_of(row: &[f64]) -> Vec<f64> {
    let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = row.iter().map(|x| (x - most).exp()).sum();
    row.iter().map(|x| (x - most).exp() / sum).collect()
}

fn softmax_error(gpu: &Gpu) -> Result<f64> {
    // Far out, so that a missing maximum overflows.
    let x: Vec<f32> = normal(5, 5 * 257).into_iter().map(|x| 40.0 * x).collect();
    let got = softmax(&Tensor::from_f32(gpu, &x, [5, 257])).to_vec()?;
    let want: Vec<f64> = wide(&x).chunks(257).flat_map(softmax_of).collect();
    Ok(max_error(&got, &want))
}

fn rms_norm_error(gpu: &Gpu) -> Result<f64> {
    let (x, w) = (normal(6, 7 * 130), normal(7, 130));
    let (tx, tw) = (Tensor::from_f32(gpu, &x, [7, 130]), Tensor::from_f32(gpu, &w, [130]));
    let got = rms_norm(&tx, &tw, 1e-5).to_vec()?;
    let w = wide(&w);
    let row = |row: &[f64]| -> Vec<f64> {
        let scale = 1.0 / (row.iter().map(|x| x * x).sum::<f64>() / 130.0 + 1e-5).sqrt();
        row.iter().zip(&w).map(|(x, w)| x * scale * w).collect()
    };
    let want: Vec<f64> = wide(&x).chunks(130).flat_map(row).collect();
    Ok(max_error(&got, &want))
}

/// Does row `q` see row `k`? `tokens` rows, of which the two-copy layout has a noisy and a clean
/// half.
fn sees(mask: Mask, tokens: usize, q: usize, k: usize) -> bool {
    let Mask::TwoCopy(block) = mask else { return k <= q };
    let half = tokens / 2;
    let (bq, bk) = (q % half / block, k % half / block);
    match (q < half, k < half) {
        (true, true) => bq == bk,
        (true, false) => bk < bq,
        (false, true) => false,
        (false, false) => bk <= bq,
    }
}

/// Errors of the output and of the worst of the three gradients.
fn attention_error(gpu: &Gpu, mask: Mask, t: usize) -> Result<[f64; 2]> {
    let (heads, kv_heads, h) = (4, 2, 16);
    let (nq, nk) = (t * heads * h, t * kv_heads * h);
    let (q, k, v, dy) = (normal(8, nq), normal(9, nk), normal(10, nk), normal(11, nq));
    let upload = |x: &[f32], n| Tensor::from_f32(gpu, x, [1, t, n, h]).trainable();
    let (tq, tk, tv) = (upload(&q, heads), upload(&k, kv_heads), upload(&v, kv_heads));
    let y = attention(&tq, &tk, &tv, &AttentionOptions::new(mask));
    let got = y.to_vec()?;
    let mut gradients = Gradients::new();
    backward(&y, &Tensor::from_f32(gpu, &dy, [1, t, heads, h]), &mut gradients);

    let (q, k, v, dy) = (wide(&q), wide(&k), wide(&v), wide(&dy));
    let (mut o, mut dq) = (vec![0.0; nq], vec![0.0; nq]);
    let (mut dk, mut dv) = (vec![0.0; nk], vec![0.0; nk]);
    let scale = 1.0 / (h as f64).sqrt();
    for row in 0..t * heads {
        let (i, head) = (row / heads, row % heads);
        let at = row * h..(row + 1) * h;
        let key = |j: usize| (j * kv_heads + head / (heads / kv_heads)) * h;
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
        let seen: Vec<usize> = (0..t).filter(|&j| sees(mask, t, i, j)).map(key).collect();
        let scores: Vec<f64> =
            seen.iter().map(|&j| scale * dot(&q[at.clone()], &k[j..j + h])).collect();
        let p = softmax_of(&scores);
        for (&j, p) in seen.iter().zip(&p) {
            at.clone().zip(j..).for_each(|(x, j)| o[x] += p * v[j]);
        }
        let mean = dot(&o[at.clone()], &dy[at.clone()]);
        for (&j, p) in seen.iter().zip(&p) {
            let ds = scale * p * (dot(&dy[at.clone()], &v[j..j + h]) - mean);
            for (x, j) in at.clone().zip(j..) {
                dq[x] += ds * k[j];
                dk[j] += ds * q[x];
                dv[j] += p * dy[x];
            }
        }
    }
    let error = |leaf: &Tensor, want: &[f64]| -> Result<f64> {
        gradients.get(leaf).map_or(Ok(f64::INFINITY), |g| Ok(max_error(&g.to_vec()?, want)))
    };
    let gradient = worst([error(&tq, &dq)?, error(&tk, &dk)?, error(&tv, &dv)?]);
    Ok([max_error(&got, &o), gradient])
}

/// Errors of loss and rows, and of the worse of the two gradients.
fn cross_entropy_error(gpu: &Gpu) -> Result<[f64; 2]> {
    let (t, d, vocab) = (9, 36, 101);
    let (rows, targets, weights) = ([1u32, 2, 5, 8], [0u32, 100, 37, 64], [1.0f32, 0.25, 4.0, 2.0]);
    let (x, w) = (normal(12, t * d), normal(13, vocab * d));
    let tx = Tensor::from_f32(gpu, &x, [t, d]).trainable();
    let tw = Tensor::from_f32(gpu, &w, [vocab, d]).trainable();
    let supervision = Supervision {
        targets: Tensor::from_u32(gpu, &targets, [4]),
        weights: Tensor::from_f32(gpu, &weights, [4]),
        divisor: 5.0,
    };
    let picked = gather(&tx, &Tensor::from_u32(gpu, &rows, [4]));
    let ce = linear_cross_entropy(&picked, std::slice::from_ref(&tw), &supervision);
    let mut gradients = Gradients::new();
    backward(&ce.loss, &Tensor::from_f32(gpu, &[1.0], [1]), &mut gradients);

    let (x, w) = (wide(&x), wide(&w));
    let (mut dx, mut dw) = (vec![0.0; t * d], vec![0.0; vocab * d]);
    let (mut loss, mut per_row) = (0.0, Vec::new());
    for ((&row, &target), &weight) in rows.iter().zip(&targets).zip(&weights) {
        let (row, target) = (row as usize * d, target as usize);
        let logits: Vec<f64> =
            w.chunks(d).map(|w| w.iter().zip(&x[row..]).map(|(w, x)| w * x).sum()).collect();
        let p = softmax_of(&logits);
        per_row.push(-p[target].ln());
        loss -= p[target].ln() * f64::from(weight) / 5.0;
        for (token, p) in p.iter().enumerate() {
            let hit = if token == target { 1.0 } else { 0.0 };
            let g = (p - hit) * f64::from(weight) / 5.0;
            for c in 0..d {
                dx[row + c] += g * w[token * d + c];
                dw[token * d + c] += g * x[row + c];
            }
        }
    }
    let error = |leaf: &Tensor, want: &[f64]| -> Result<f64> {
        gradients.get(leaf).map_or(Ok(f64::INFINITY), |g| Ok(max_error(&g.to_vec()?, want)))
    };
    let loss = max_error(&ce.loss.to_vec()?, &[loss]);
    let forward = loss.max(max_error(&ce.per_row.to_vec()?, &per_row));
    Ok([forward, worst([error(&tx, &dx)?, error(&tw, &dw)?])])
}

fn adamw_error(gpu: &Gpu) -> Result<f64> {
    let n = 301;
    let (w, g, m) = (normal(14, n), normal(15, n), normal(16, n));
    let v: Vec<f32> = normal(17, n).into_iter().map(|v| 0.1 + v * v).collect();
    let [tw, tg, tm, tv] = [&w, &g, &m, &v].map(|x| Tensor::from_f32(gpu, x, [n]));
    let settings =
        AdamW { lr: 0.01, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 3 };
    let norm_clip = grad_norm(&[&tg], 1.0, 1.0);
    adamw_step(&tw, &tg, &tm, &tv, &norm_clip, settings, 1.0);
    let (w, g, m, v) = (wide(&w), wide(&g), wide(&m), wide(&v));
    let norm = g.iter().map(|g| g * g).sum::<f64>().sqrt();
    let clip = (1.0 / (norm + 1e-6)).min(1.0);
    let step = |i: usize| {
        let g = clip * g[i];
        let (m, v) = (0.9 * m[i] + 0.1 * g, 0.95 * v[i] + 0.05 * g * g);
        let move_by = (m / (1.0 - 0.9f64.powi(3))) / ((v / (1.0 - 0.95f64.powi(3))).sqrt() + 1e-8);
        [w[i] * (1.0 - 0.01 * 0.1) - 0.01 * move_by, m, v]
    };
    let want: Vec<[f64; 3]> = (0..n).map(step).collect();
    let column = |c: usize| want.iter().map(|x| x[c]).collect::<Vec<_>>();
    let norm_error = max_error(&norm_clip.to_vec()?, &[norm, clip]);
    let mut most = norm_error;
    for (c, tensor) in [tw, tm, tv].iter().enumerate() {
        most = most.max(max_error(&tensor.to_vec()?, &column(c)));
    }
    Ok(most)
}

#[cfg(test)]
mod tests {
    use super::max_error;

    #[test]
    fn a_wrong_or_absent_number_is_an_error() {
        assert_eq!(max_error(&[1.0, 2.0], &[1.0, 2.0]), 0.0);
        assert!((max_error(&[1.0, 2.5], &[1.0, 2.0]) - 0.5 / 3.0).abs() < 1e-12);
        assert_eq!(max_error(&[1.0], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(max_error(&[f32::NAN, 1.0], &[1.0, 1.0]), f64::INFINITY);
        assert_eq!(max_error(&[f32::INFINITY], &[1.0]), f64::INFINITY);
    }
}
