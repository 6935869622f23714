//! Root-mean-square norm over the last axis:  y = x s w,  s = 1 / √(mean_d x² + ε)
//! Backward:  dx = s (dy w − x s² mean_d(dy w x))      x, y, dy, dx: [.., D]   s: [..]
//!            dw = Σ over rows of dy x s, 32 rows at a time, then the chunks    w, dw: [D]

use bytemuck::{Pod, Zeroable};

use crate::gpu::{Kernel, fold, kernel};
use crate::ops::reduce::{pieces, row_lanes, sum};
use crate::tensor::{DType, Tensor};

const FORWARD: Kernel = kernel!("rms_norm");
const DX: Kernel = kernel!("rms_norm_dx");
const DW: Kernel = kernel!("rms_norm_dw");

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    rows: u32,
    pieces: u32,
    d: u32,
    eps: f32,
}

/// x / √(mean(x²) + eps) ⊙ w, row by row.
///
/// # Panics
/// If `w` is not [D] for `x`: [.., D], or one of them is not f32.
#[track_caller]
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f32) -> Tensor {
    let [rows, d] = x.shape().matrix();
    let fits = !x.shape().is_empty() && **w.shape() == [d];
    assert!(fits, "rms_norm: x {} and w {} do not fit", x.shape(), w.shape());
    let floats = (x.dtype(), w.dtype()) == (DType::F32, DType::F32);
    assert!(floats, "rms_norm: {:?} and {:?} must be f32", x.dtype(), w.dtype());
    let (n, wide) = pieces(d);
    let params = Params { rows: rows as u32, pieces: n as u32, d: d as u32, eps };
    let lanes = row_lanes(x.gpu(), d);
    let y = x.empty_like("rms_norm");
    let s = Tensor::empty(x.gpu(), [rows], DType::F32, "rms_norm");
    FORWARD.with(&[lanes, wide]).run(&params, &[x, w], &[&y, &s], fold(rows));
    let (kx, kw) = (x.detach(), w.detach());
    let (need_x, need_w) = (x.is_tracked(), w.is_tracked());
    y.record("rms_norm", &[x, w], move |dy| {
        let dx = need_x.then(|| {
            let dx = kx.empty_like("rms_norm");
            DX.with(&[lanes, wide]).run(&params, &[&kx, &kw, &s, dy], &[&dx], fold(rows));
            dx
        });
        let dw = need_w.then(|| {
            let chunks = rows.div_ceil(32);
            let partial = Tensor::empty(kx.gpu(), [chunks, d], DType::F32, "rms_norm");
            let grid = fold(chunks * n.div_ceil(64));
            DW.with(&[wide]).run(&params, &[&kx, &s, dy], &[&partial], grid);
            sum(&partial, 0)
        });
        vec![dx, dw]
    })
}

#[cfg(feature = "cases")]
pub use cases::cases;

#[cfg(feature = "cases")]
mod cases {
    use super::*;
    use crate::ops::case::{Case, Input, Tolerance};
    use crate::tensor::host::Array;

    const EPS: f64 = 1e-5;

    fn reference(x: &Array, w: &Array) -> Array {
        x.map_rows(|row| {
            let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
            let s = 1.0 / (mean + EPS).sqrt();
            row.iter().zip(&w.data).map(|(x, w)| x * s * w).collect()
        })
    }

    fn case(shape: &[usize]) -> Case {
        let d = *shape.last().expect("a last axis");
        Case::new(
            format!("rms_norm {shape:?}"),
            vec![Input::Normal(shape.into()), Input::Normal([d].into())],
            |t| rms_norm(&t[0], &t[1], EPS as f32),
            |x| reference(&x[0], &x[1]),
        )
        // Gradients are sums over a row or over all rows.
        .tolerance(Tolerance::SUM)
    }

    /// Root-mean-square norm's cases.
    pub fn cases() -> Vec<Case> {
        let shapes = [&[1][..], &[3, 5], &[2, 33, 7], &[4, 257], &[3, 3000], &[70, 130], &[0, 3]];
        let mut cases: Vec<_> = shapes.into_iter().map(case).collect();
        for d in [576, 4096] {
            let n = (512 * d) as f64;
            // dx reads x and dy and is written; dw reads them again.
            cases.push(case(&[512, d]).cost(4.0 * n, 8.0 * n).derivative(9.0 * n, 20.0 * n));
        }
        cases
    }
}
