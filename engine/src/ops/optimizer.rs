//! The optimiser's two steps, both on the device, so that a training step waits for nothing.
//!   grad_norm   norm = ‖grad_scale · gradients‖₂,  clip = min(1, max_norm / (norm + 1e-6)),  0 for a norm that is not
//!               finite, or above a limit
//!   adamw_step  g = grad · grad_scale · clip,  m ← β₁ m + (1 − β₁) g,  v ← β₂ v + (1 − β₂) g²
//!               w ← (1 − lr λ) w − lr m / (1 − β₁ᵗ) / (√v / √(1 − β₂ᵗ) + ε)
//! as PyTorch's `clip_grad_norm_` and `AdamW` have them. Where clip is 0 the step changes nothing.
//! Neither is differentiable: they work on gradients.

use bytemuck::{Pod, Zeroable};

use crate::gpu::{Kernel, fold, kernel};
use crate::tensor::{DType, Tensor};

const SUM_SQUARES: Kernel = kernel!("sum_squares");
const GRAD_NORM: Kernel = kernel!("grad_norm");
const ADAMW: Kernel = kernel!("adamw");

/// Elements that one workgroup squares at least, and the most workgroups of one tensor.
const SHARE: usize = 16_384;
const MOST_SHARES: usize = 256;

/// The settings of one step; PyTorch's names.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the mean.
    pub beta1: f64,
    /// Decay of the mean square.
    pub beta2: f64,
    /// Added to the root of the mean square.
    pub eps: f64,
    /// Decoupled decay of the parameter, times `lr`.
    pub weight_decay: f64,
    /// Counts steps from 1.
    pub step: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct SquaresParams {
    n: u32,
    first: u32,
    groups: u32,
    scale: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct NormParams {
    n: u32,
    max_norm: f32,
    limit: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct AdamWParams {
    quads: u32,
    grad_scale: f32,
    factors: Factors,
    zero: f32,
}

/// What a step's kernels make of [`AdamW`].
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Factors {
    decay: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    step: f32,
    bias2: f32,
    eps: f32,
}

impl AdamW {
    #[track_caller]
    pub(super) fn factors(self) -> Factors {
        let AdamW { lr, beta1, beta2, eps, weight_decay, step } = self;
        assert!(step > 0, "adamw: steps count from 1");
        Factors {
            decay: (1.0 - lr * weight_decay) as f32,
            rest1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            rest2: (1.0 - beta2) as f32,
            step: (lr / (1.0 - beta1.powf(f64::from(step)))) as f32,
            bias2: (1.0 - beta2.powf(f64::from(step))).sqrt() as f32,
            eps: eps as f32,
        }
    }
}

/// [norm, clip] of all gradients together, each times `grad_scale`. Infinite `max_norm` does not clip.
///
/// # Panics
/// If there is no gradient, or one is not f32.
#[track_caller]
pub fn grad_norm(gradients: &[&Tensor], grad_scale: f32, max_norm: f32) -> Tensor {
    grad_norm_within(gradients, grad_scale, max_norm, f32::INFINITY)
}

/// As [`grad_norm`], with clip 0 for a norm above `limit`: the device decides whether the step is taken.
///
/// # Panics
/// As [`grad_norm`].
#[track_caller]
pub fn grad_norm_within(
    gradients: &[&Tensor],
    grad_scale: f32,
    max_norm: f32,
    limit: f32,
) -> Tensor {
    let gpu = gradients.first().expect("grad_norm: at least one gradient").gpu();
    let shares = |g: &Tensor| g.numel().div_ceil(SHARE).min(MOST_SHARES);
    let n: usize = gradients.iter().map(|g| shares(g)).sum();
    let partial = Tensor::empty(gpu, [n], DType::F32, "grad_norm");
    let mut first = 0;
    for gradient in gradients {
        assert_eq!(gradient.dtype(), DType::F32, "grad_norm of {}", gradient.shape());
        let n = gradient.numel() as u32;
        let groups = shares(gradient) as u32;
        let params = SquaresParams { n, first, groups, scale: grad_scale };
        SUM_SQUARES.run(&params, &[gradient], &[&partial], [groups, 1, 1]);
        first += groups;
    }
    let y = Tensor::empty(gpu, [2], DType::F32, "grad_norm");
    let params =
        NormParams { n: n as u32, max_norm: max_norm.min(f32::MAX), limit: limit.min(f32::MAX) };
    GRAD_NORM.run(&params, &[&partial], &[&y], [1, 1, 1]);
    y
}

/// One AdamW step on `param`, in place; `m` and `v` are its moments, `norm_clip` is [`grad_norm`]'s output for
/// the same `grad_scale`.
///
/// # Panics
/// If the shapes differ, one is not f32, or `step` is 0.
#[track_caller]
pub fn adamw_step(
    param: &Tensor,
    grad: &Tensor,
    m: &Tensor,
    v: &Tensor,
    norm_clip: &Tensor,
    settings: AdamW,
    grad_scale: f32,
) {
    for t in [grad, m, v] {
        assert_eq!(t.shape(), param.shape(), "adamw_step: gradient, moments and parameter");
    }
    for t in [param, grad, m, v, norm_clip] {
        assert_eq!(t.dtype(), DType::F32, "adamw_step on {}", t.shape());
    }
    assert_eq!(**norm_clip.shape(), [2], "adamw_step: norm and clip");
    // A buffer ends with a whole quad, so the last one needs no care.
    let quads = param.numel().div_ceil(4);
    let factors = settings.factors();
    let params = AdamWParams { quads: quads as u32, grad_scale, factors, zero: 0.0 };
    ADAMW.run(&params, &[grad, norm_clip], &[param, m, v], fold(quads.div_ceil(256)));
}

#[cfg(feature = "cases")]
pub use cases::cases;

#[cfg(feature = "cases")]
pub(super) mod cases {
    use super::*;
    use crate::ops::case::{Case, Input};
    use crate::ops::scale;
    use crate::tensor::Shape;
    use crate::tensor::host::Array;

    pub(in crate::ops) const SCALE: f64 = 0.25;

    pub(in crate::ops) fn norm_and_clip(gradients: &[Array], max_norm: f64) -> [f64; 2] {
        let squares = gradients.iter().flat_map(|g| &g.data).map(|g| (SCALE * g) * (SCALE * g));
        let norm = squares.sum::<f64>().sqrt();
        [norm, (max_norm / (norm + 1e-6)).min(1.0)]
    }

    fn norm_case(name: &str, shapes: &[&[usize]], max_norm: f32) -> Case {
        Case::new(
            format!("grad_norm {name}"),
            shapes.iter().map(|&s| Input::Normal(s.into())).collect(),
            move |t| grad_norm(&t.iter().collect::<Vec<_>>(), SCALE as f32, max_norm),
            move |x| Array::new([2], norm_and_clip(x, f64::from(max_norm)).to_vec()),
        )
    }

    /// A norm above the limit takes no step.
    fn limited(limit: f32) -> Case {
        let shape: &[usize] = &[70];
        Case::new(
            format!("grad_norm within {limit}"),
            vec![Input::Normal(shape.into())],
            move |t| grad_norm_within(&[&t[0]], SCALE as f32, 1.0, limit),
            move |x| {
                let [norm, clip] = norm_and_clip(x, 1.0);
                Array::new([2], vec![norm, if norm > f64::from(limit) { 0.0 } else { clip }])
            },
        )
    }

    /// By a kernel, so that it is timed like the rest.
    pub(in crate::ops) fn copy(t: &Tensor) -> Tensor {
        scale(&t.detach(), 1.0)
    }

    pub(in crate::ops) const SETTINGS: AdamW =
        AdamW { lr: 0.01, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 3 };

    /// One of the three tensors that a step changes.
    fn step_case(name: &str, shape: &[usize], which: usize) -> Case {
        let shape: Shape = shape.into();
        let inputs = vec![
            Input::Normal(shape.clone()),
            Input::Normal(shape.clone()),
            Input::Normal(shape.clone()),
            Input::Positive(shape.clone()),
        ];
        let run = move |t: &[Tensor]| {
            let changed = [copy(&t[0]), copy(&t[2]), copy(&t[3])];
            let [w, m, v] = &changed;
            let norm_clip = grad_norm(&[&t[1]], SCALE as f32, 1.0);
            adamw_step(w, &t[1], m, v, &norm_clip, SETTINGS, SCALE as f32);
            changed[which].clone()
        };
        let reference = move |x: &[Array]| {
            let AdamW { lr, beta1, beta2, eps, weight_decay, step } = SETTINGS;
            let [_, clip] = norm_and_clip(&x[1..2], 1.0);
            let (bias1, bias2) = (1.0 - beta1.powi(step as i32), 1.0 - beta2.powi(step as i32));
            Array::from_fn(&x[0].shape, |i| {
                let g = x[1].data[i] * SCALE * clip;
                let m = beta1 * x[2].data[i] + (1.0 - beta1) * g;
                let v = beta2 * x[3].data[i] + (1.0 - beta2) * g * g;
                let w = x[0].data[i] * (1.0 - lr * weight_decay);
                [w - lr * (m / bias1) / ((v / bias2).sqrt() + eps), m, v][which]
            })
        };
        Case::new(format!("adamw {name}"), inputs, run, reference)
    }

    /// The gradient overflows: clip is 0 and the parameter stays.
    fn overflow_cases() -> [Case; 2] {
        let inputs = || vec![Input::Normal([33].into()), Input::Normal([33].into())];
        let skipped = |t: &[Tensor]| {
            let (w, grad) = (copy(&t[0]), scale(&t[1], 1e30));
            let (m, v) = (copy(&t[0]), copy(&t[0]));
            let norm_clip = grad_norm(&[&grad], 1.0, 1.0);
            adamw_step(&w, &grad, &m, &v, &norm_clip, SETTINGS, 1.0);
            w.detach()
        };
        let clip = |t: &[Tensor]| {
            let y = grad_norm(&[&t[1], &scale(&t[0].detach(), 1e30)], 1.0, 1.0);
            let clip = Tensor::empty(y.gpu(), [1], DType::F32, "clip");
            y.gpu().copy(y.buffer(), 4, clip.buffer(), 0, 4);
            clip
        };
        [
            Case::new("adamw skips an overflow", inputs(), skipped, |x| x[0].clone()),
            Case::new("grad_norm of an overflow", inputs(), clip, |_| Array::new([1], vec![0.0])),
        ]
    }

    /// The optimiser's cases.
    pub fn cases() -> Vec<Case> {
        let n = 576 * 1536;
        let mut cases = vec![
            norm_case("of one", &[&[1]], 1.0),
            norm_case("of several", &[&[3, 5], &[0], &[257], &[2, 20_000]], 1.0),
            norm_case("below the bound", &[&[7], &[2, 3]], 1e6),
            norm_case("without a bound", &[&[7], &[2, 3]], f32::INFINITY),
            norm_case("of none", &[&[0]], 1.0),
            limited(0.1),
            limited(100.0),
            step_case("parameter", &[3, 257], 0),
            step_case("mean", &[3, 257], 1),
            step_case("mean square", &[3, 257], 2),
            step_case("empty", &[0, 5], 0),
            norm_case("bench", &[&[n]], 1.0).cost(3.0 * n as f64, 4.0 * n as f64),
            // Three copies (8 bytes an element each), the norm (4), and the step itself (28).
            step_case("bench", &[n], 0).cost(20.0 * n as f64, 56.0 * n as f64),
        ];
        cases.extend(overflow_cases());
        cases
    }
}
