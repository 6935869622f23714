//! AdamW whose moments rest in 8 bits, in blocks of 256 elements that share a scale: 2.03 bytes a parameter for both
//! instead of 8. The step is [`adamw_step`](super::adamw_step)'s, on moments decoded to f32; only what is put back
//! is rounded. One kernel, one pass over memory.
//!
//! Blocks come from Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861); the format is
//! ours. A code counts units of its block's largest magnitude, as a float of three bits of mantissa with zero and
//! subnormal numbers:  c < 8: c,  else (8 + c mod 8) · 2^(⌊c / 8⌋ − 1).
//!   m   a sign and 7 bits (4 of exponent), largest = 15 · 2¹⁴ units
//!   v   8 bits (5 of exponent), largest = 15 · 2³⁰ units: the same range as m's, once under the root
//! so neighbours are 1/15 to 1/8 apart over five decades of gradient, and linear below.
//!
//! Rounding goes up with the probability of the fraction that is cut off, so that it is right on average: with
//! β₂ = 0.999 a step changes v by less than the distance of two codes, and rounding to the nearest would leave it
//! where it is. The one exception is below v's first unit, which is 8e-6 of the block's largest once under the root:
//! there v is rounded up, because it divides, and a step by a rest of m over zero would be boundless. Random numbers
//! are a function of (seed, step, element), so a resumed run is the unbroken one.
//!
//! What it costs: under gradients that are noise v wanders about its mean by 21 % (β₂ = 0.999) or 13 % (0.95), which
//! is half as much of a step, and m by a twelfth of its own noise; each element by itself.

use bytemuck::{Pod, Zeroable};

use super::optimizer::{AdamW, Factors};
use crate::gpu::{Gpu, Kernel, fold, kernel};
use crate::philox::philox4x32;
use crate::tensor::{DType, Tensor};

const ADAMW8: Kernel = kernel!("adamw8");

/// Elements that share a scale, and the blocks of one workgroup.
const BLOCK: usize = 256;
const BLOCKS: usize = 16;

/// Both moments of a tensor of n elements, B = ⌈n / 256⌉. A checkpoint keeps the three tensors as they are.
#[derive(Clone, Debug)]
pub struct Moments8 {
    /// Codes of the mean, u32 [B, 64]: four a word, the first lowest.
    pub m: Tensor,
    /// Codes of the mean square, u32 [B, 64].
    pub v: Tensor,
    /// f32 [B, 2]: the largest |m| and the largest v of each block.
    pub scales: Tensor,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    n: u32,
    grad_scale: f32,
    factors: Factors,
    key: [u32; 3],
}

impl Moments8 {
    /// Zero moments of `n` elements.
    pub fn zeros(gpu: &Gpu, n: usize) -> Moments8 {
        let [codes, scales] = Self::shapes(n);
        let zeros = |shape, dtype| Tensor::zeros(gpu, shape, dtype, "adamw8 moment");
        let (m, v) = (zeros(codes, DType::U32), zeros(codes, DType::U32));
        Moments8 { m, v, scales: zeros(scales, DType::F32) }
    }

    /// The shape of the codes of one moment of `n` elements, and of the scales.
    pub fn shapes(n: usize) -> [[usize; 2]; 2] {
        let blocks = n.div_ceil(BLOCK);
        [[blocks, BLOCK / 4], [blocks, 2]]
    }
}

/// One AdamW step on `param`, in place, with its moments in 8 bits; `norm_clip` is [`grad_norm`](super::grad_norm)'s
/// output for the same `grad_scale`. Where clip is 0 neither weights nor moments change.
///
/// `seed` names the rounding's random numbers together with the step: give each tensor of a run its own, and a
/// resumed run the same again.
///
/// # Panics
/// If the gradient has another shape than `param`, the moments are not of [`Moments8::shapes`] and their types,
/// another tensor is not f32, or `step` is 0.
#[track_caller]
pub fn adamw8_step(
    param: &Tensor,
    grad: &Tensor,
    moments: &Moments8,
    norm_clip: &Tensor,
    settings: AdamW,
    grad_scale: f32,
    seed: u64,
) {
    let Moments8 { m, v, scales } = moments;
    let n = param.numel();
    assert_eq!(grad.shape(), param.shape(), "adamw8_step: gradient and parameter");
    for t in [param, grad, scales, norm_clip] {
        assert_eq!(t.dtype(), DType::F32, "adamw8_step on {}", t.shape());
    }
    let [codes, largest] = Moments8::shapes(n);
    for t in [m, v] {
        let fits = t.dtype() == DType::U32 && **t.shape() == codes;
        assert!(fits, "adamw8_step: moments {t:?} of {n} elements");
    }
    assert_eq!(**scales.shape(), largest, "adamw8_step: scales of {n} elements");
    assert_eq!(**norm_clip.shape(), [2], "adamw8_step: norm and clip");
    // The kernel mixes the element in by a cheaper hash; what is the same for all of them can be mixed well here.
    let [a, b, c, _] = philox4x32([settings.step, 0, 0, 0], [seed as u32, (seed >> 32) as u32]);
    let params = Params { n: n as u32, grad_scale, factors: settings.factors(), key: [a, b, c] };
    let grid = fold(codes[0].div_ceil(BLOCKS));
    ADAMW8.run(&params, &[grad, norm_clip], &[param, m, v, scales], grid);
}

#[cfg(feature = "cases")]
pub use cases::{cases, decode_moments};

#[cfg(feature = "cases")]
mod cases {
    use super::*;
    use crate::ops::case::{Case, Input, Tolerance};
    use crate::ops::grad_norm;
    use crate::ops::optimizer::cases::{SCALE, SETTINGS, copy, norm_and_clip};
    use crate::tensor::Shape;
    use crate::tensor::host::Array;

    /// The units of a code without its sign.
    fn units(code: u32) -> f64 {
        let mantissa = if code < 8 { code } else { 8 + code % 8 };
        f64::from(mantissa) * 2f64.powi((code as i32 / 8 - 1).max(0))
    }

    /// The `n` elements of both moments, each with the size of its unit, from the formula.
    pub fn decode_moments(moments: &Moments8, n: usize) -> crate::Result<[Vec<[f64; 2]>; 2]> {
        let [m, v] = [moments.m.to_bytes()?, moments.v.to_bytes()?];
        let scales = moments.scales.to_vec()?;
        let unit = |i: usize, which: usize, most: u32| {
            f64::from(scales[i / BLOCK * 2 + which]) / units(most)
        };
        let mean = |i: usize| {
            let (unit, code) = (unit(i, 0, 127), u32::from(m[i]));
            let sign = if code > 127 { -1.0 } else { 1.0 };
            [sign * units(code % 128) * unit, unit]
        };
        let square = |i: usize| {
            let unit = unit(i, 1, 255);
            [units(u32::from(v[i])) * unit, unit]
        };
        Ok([(0..n).map(mean).collect(), (0..n).map(square).collect()])
    }

    /// What a first step makes of the parameter or, decoded, of a moment.
    fn step_case(name: &str, shape: &[usize], which: usize) -> Case {
        let shape: Shape = shape.into();
        let settings = AdamW { step: 1, ..SETTINGS };
        let run = move |t: &[Tensor]| {
            let w = copy(&t[0]);
            let moments = Moments8::zeros(w.gpu(), w.numel());
            let norm_clip = grad_norm(&[&t[1]], SCALE as f32, 1.0);
            adamw8_step(&w, &t[1], &moments, &norm_clip, settings, SCALE as f32, 7);
            if which == 0 {
                return w;
            }
            let decoded = decode_moments(&moments, w.numel()).expect("the device computes");
            let moment: Vec<f32> = decoded[which - 1].iter().map(|x| x[0] as f32).collect();
            Tensor::from_f32(w.gpu(), &moment, w.shape())
        };
        let reference = move |x: &[Array]| {
            let AdamW { lr, beta1, beta2, eps, weight_decay, .. } = settings;
            let [_, clip] = norm_and_clip(&x[1..2], 1.0);
            Array::from_fn(&x[0].shape, |i| {
                let g = x[1].data[i] * SCALE * clip;
                let w = x[0].data[i] * (1.0 - lr * weight_decay);
                [w - lr * g / (g.abs() + eps), (1.0 - beta1) * g, (1.0 - beta2) * g * g][which]
            })
        };
        let inputs = vec![Input::Normal(shape.clone()), Input::Normal(shape)];
        // Moments are off by less than the distance to the next code, an eighth at most; by a unit near zero.
        let coarse = Tolerance { absolute: [2e-5, 1e-6, 1e-10][which], relative: 0.125 };
        let tolerance = if which == 0 { Tolerance::F32 } else { coarse };
        Case::new(format!("adamw8 {name}"), inputs, run, reference).tolerance(tolerance)
    }

    /// The cases of the step on moments in 8 bits.
    pub fn cases() -> Vec<Case> {
        let n = 576 * 1536;
        let mut cases = vec![
            step_case("empty", &[0, 5], 0),
            // The state's zeros (2 bytes an element), a copy (8), the norm (4), and the step itself (16).
            step_case("bench", &[n], 0).cost(25.0 * n as f64, 30.0 * n as f64),
        ];
        // One element, a block's borders, and more blocks than one workgroup has.
        for n in [1, 255, 256, 257, 1000, 3 * 1537] {
            cases.push(step_case(&format!("parameter [{n}]"), &[n], 0));
            cases.push(step_case(&format!("mean [{n}]"), &[n], 1));
            cases.push(step_case(&format!("mean square [{n}]"), &[n], 2));
        }
        cases
    }
}
