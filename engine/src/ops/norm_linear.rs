//! Linear layers behind a norm, for decoding: what stands around a product of a few rows is done in the product's own
//! kernel, because a step is bound by its number of dispatches and each of these was one. No derivatives.
//!   norm_linear  y = n · Wᵀ                        n = rms_norm(x) under g     x: [T, D]  g: [D]  W: [O, D]  y: [T, O]
//!   norm_swiglu  y = silu(n · gateᵀ) ⊙ (n · upᵀ)                               gate, up: [F, D]             y: [T, F]

use super::matmul::{Around, Extents, Layout, MatmulKernel, Target};
use super::{linear, rms_norm, swiglu};
use crate::tensor::{DType, Tensor};

/// rms_norm(x) under (g, epsilon), times a weight in row shards.
///
/// # Panics
/// If the shapes do not fit.
#[track_caller]
pub fn norm_linear(x: &Tensor, norm: (&Tensor, f32), weight: &[Tensor]) -> Tensor {
    if let [whole] = weight
        && let Some(y) = fused(x, norm, whole, false)
    {
        return y;
    }
    linear(&rms_norm(x, norm.0, norm.1), weight)
}

/// The first half of a feed-forward layer over rms_norm(x). `joined` is gate and up as one tensor, [2 F, D], where
/// memory has them so.
///
/// # Panics
/// If the shapes do not fit.
#[track_caller]
pub fn norm_swiglu(
    x: &Tensor,
    norm: (&Tensor, f32),
    gate: &[Tensor],
    up: &[Tensor],
    joined: Option<&Tensor>,
) -> Tensor {
    if let Some(y) = joined.and_then(|joined| fused(x, norm, joined, true)) {
        return y;
    }
    let h = rms_norm(x, norm.0, norm.1);
    swiglu(&linear(&h, gate), &linear(&h, up))
}

/// In one kernel, if the one that was chosen for the product can do it.
#[track_caller]
fn fused(x: &Tensor, norm: (&Tensor, f32), w: &Tensor, gated: bool) -> Option<Tensor> {
    let ([t, d], [rows, columns]) = (x.shape().matrix(), w.shape().matrix());
    let fits = columns == d && **norm.0.shape() == [d] && (!gated || rows.is_multiple_of(2));
    assert!(fits, "norm_linear: x {}, norm {}, weight {}", x.shape(), norm.0.shape(), w.shape());
    let floats = (x.dtype(), norm.0.dtype()) == (DType::F32, DType::F32);
    assert!(floats, "norm_linear: {:?} and {:?} must be f32", x.dtype(), norm.0.dtype());
    let whole = Extents { z: 1, m: t, n: rows, k: d, output: [t, rows].into() };
    let kernel = MatmulKernel::choose(x.gpu(), Layout::NT, w.dtype(), &whole);
    if !kernel.does_around() || x.numel() == 0 {
        return None;
    }
    let n = if gated { rows / 2 } else { rows };
    let y = Tensor::empty(x.gpu(), [t, n], DType::F32, "norm_linear");
    let target = Target { y: &y, row: 0, b_row: 0, add: false };
    let extents = Extents { n, output: [t, n].into(), ..whole };
    let around = Around { norm: Some(norm), gated, residual: None };
    kernel.run(x, w, Layout::NT, &extents, &target, &around);
    Some(y.record_none("norm_linear", &[x, norm.0, w]))
}

#[cfg(feature = "cases")]
pub use cases::cases;

#[cfg(feature = "cases")]
mod cases {
    use super::*;
    use crate::ops::case::{Case, Input, Tolerance};
    use crate::tensor::host::Array;

    const EPS: f64 = 1e-5;

    /// rms_norm(x) · Wᵀ, row by row.
    fn products(x: &Array, g: &Array, w: &Array) -> Vec<Vec<f64>> {
        let d = g.data.len();
        let rows = x.rows().map(|row| {
            let s = 1.0 / (row.iter().map(|x| x * x).sum::<f64>() / d as f64 + EPS).sqrt();
            let dot = |w: &[f64]| (0..d).map(|i| row[i] * s * g.data[i] * w[i]).sum::<f64>();
            w.rows().map(dot).collect()
        });
        rows.collect()
    }

    fn gated(row: &[f64]) -> Vec<f64> {
        let (gate, up) = row.split_at(row.len() / 2);
        gate.iter().zip(up).map(|(g, up)| g / (1.0 + (-g).exp()) * up).collect()
    }

    fn reference(gate: bool, i: &[Array], shape: [usize; 2]) -> Array {
        let y = products(&i[0], &i[1], &i[2]).into_iter();
        Array::new(shape, y.flat_map(|row| if gate { gated(&row) } else { row }).collect())
    }

    /// Through whatever kernel the device has for it, with a weight of one piece.
    fn case(gate: bool, dtype: DType, [t, rows, d]: [usize; 3]) -> Case {
        let n = if gate { rows / 2 } else { rows };
        let name = if gate { "norm_swiglu" } else { "norm_linear" };
        let (x, norm) = (Input::Normal([t, d].into()), Input::Normal([d].into()));
        Case::new(
            format!("{name} {dtype:?} {t}x{rows}x{d}"),
            vec![x, norm, Input::Weight([rows, d].into(), dtype)],
            move |i| {
                let (x, whole) = (i[0].detach(), i[2].detach());
                let norm = (&i[1].detach(), EPS as f32);
                if !gate {
                    return norm_linear(&x, norm, &[whole]);
                }
                let [gate, up] = [0, n].map(|first| [whole.part(first, n)]);
                norm_swiglu(&x, norm, &gate, &up, Some(&whole))
            },
            move |i| reference(gate, i, [t, n]),
        )
        .tolerance(tolerance(gate, d))
    }

    /// Behind a gate the error of one sum is multiplied by the other, which is some dozens where D is some hundreds.
    fn tolerance(gate: bool, d: usize) -> Tolerance {
        match gate {
            true => Tolerance { absolute: if d > 300 { 2e-2 } else { 2e-3 }, relative: 1e-4 },
            false => Tolerance::SUM,
        }
    }

    /// Through one kernel.
    fn forced(kernel: MatmulKernel, gate: bool, [t, rows, d]: [usize; 3]) -> Case {
        let n = if gate { rows / 2 } else { rows };
        Case::new(
            format!("norm_linear {kernel:?} gated {gate} {t}x{rows}x{d}"),
            vec![
                Input::Normal([t, d].into()),
                Input::Normal([d].into()),
                Input::Normal([rows, d].into()),
            ],
            move |i| {
                let y = Tensor::empty(i[0].gpu(), [t, n], DType::F32, "norm_linear");
                let target = Target { y: &y, row: 0, b_row: 0, add: false };
                let extents = Extents { z: 1, m: t, n, k: d, output: [t, n].into() };
                let norm = Some((&i[1], EPS as f32));
                let around = Around { norm, gated: gate, residual: None };
                kernel.run(&i[0], &i[2], Layout::NT, &extents, &target, &around);
                y
            },
            move |i| reference(gate, i, [t, n]),
        )
        .tolerance(tolerance(gate, d))
        .needs(move |gpu| kernel.runs_on(gpu))
    }

    /// Both ops: every kernel for a few rows at ragged extents, and the way around them for many rows.
    pub fn cases() -> Vec<Case> {
        let mut cases = Vec::new();
        for gate in [false, true] {
            for kernel in
                [MatmulKernel::Few, MatmulKernel::FewSubgroup8, MatmulKernel::OneSubgroup8]
            {
                let sizes = [[1, 46, 40], [3, 34, 264], [9, 2, 8], [16, 70, 72]];
                let one = kernel == MatmulKernel::OneSubgroup8;
                let sizes = sizes.into_iter().filter(|[t, ..]| !one || *t == 1);
                cases.extend(sizes.map(|size| forced(kernel, gate, size)));
            }
            // Halves of whole 256 bytes, where parts may begin.
            for size in [[1, 128, 96], [4, 256, 64], [33, 256, 32], [0, 256, 32]] {
                cases.extend([DType::F32, DType::Q4].map(|dtype| case(gate, dtype, size)));
            }
            cases.push(case(gate, DType::F32, [2, 256, 7]));
            for dtype in [DType::F16, DType::Q4] {
                let [t, rows, d] = [1, 3072, 576];
                let bytes = (rows * dtype.row_bytes(d)) as f64;
                let case = case(gate, dtype, [t, rows, d]).cost(2.0 * (rows * d) as f64, bytes);
                cases.push(if dtype == DType::Q4 { case } else { case.full_only() });
            }
        }
        cases
    }
}
