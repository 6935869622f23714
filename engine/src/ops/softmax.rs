//! Softmax over the last axis:  y[r, c] = exp(x[r, c] − m_r) / Σ_c exp(x[r, c] − m_r),  m_r = max_c x[r, c]
//! Backward:                    dx = y ⊙ (dy − Σ_c y ⊙ dy)              x, y, dy, dx: [.., C]

use bytemuck::{Pod, Zeroable};

use crate::gpu::{Kernel, fold, kernel};
use crate::ops::reduce::row_lanes;
use crate::tensor::{DType, Tensor};

const FORWARD: Kernel = kernel!("softmax");
const BACKWARD: Kernel = kernel!("softmax_backward");

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    rows: u32,
    columns: u32,
    zero: f32,
}

/// Softmax of each row.
///
/// # Panics
/// If `x` is not f32 or has no axis.
#[track_caller]
pub fn softmax(x: &Tensor) -> Tensor {
    assert_eq!(x.dtype(), DType::F32, "softmax of {}", x.shape());
    assert!(!x.shape().is_empty(), "softmax of a scalar");
    let [rows, columns] = x.shape().matrix();
    let params = Params { rows: rows as u32, columns: columns as u32, zero: 0.0 };
    let y = x.empty_like("softmax");
    FORWARD.with(&[row_lanes(x.gpu(), columns)]).run(&params, &[x], &[&y], fold(rows));
    let kept = y.detach();
    y.record("softmax", &[x], move |dy| {
        let dx = kept.empty_like("softmax");
        BACKWARD.with(&[row_lanes(dy.gpu(), columns)]).run(
            &params,
            &[&kept, dy],
            &[&dx],
            fold(rows),
        );
        vec![Some(dx)]
    })
}

#[cfg(feature = "cases")]
pub use cases::cases;

#[cfg(feature = "cases")]
mod cases {
    use super::*;
    use crate::ops::case::{Case, Input};
    use crate::ops::scale;
    use crate::tensor::host::Array;

    fn row(x: &[f64]) -> Vec<f64> {
        let m = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = x.iter().map(|x| (x - m).exp()).sum();
        x.iter().map(|x| (x - m).exp() / sum).collect()
    }

    fn case(shape: &[usize]) -> Case {
        Case::new(
            format!("softmax {shape:?}"),
            vec![Input::Normal(shape.into())],
            |t| softmax(&t[0]),
            |x| x[0].map_rows(row),
        )
    }

    /// Softmax's cases.
    pub fn cases() -> Vec<Case> {
        let shapes = [&[1][..], &[3, 5], &[2, 7, 1000], &[4, 257], &[2, 3000], &[0, 3], &[3, 0]];
        let mut cases: Vec<_> = shapes.into_iter().map(case).collect();
        // Logits in the thousands: exp overflows without the maximum taken off.
        cases.push(Case::new(
            "softmax far out",
            vec![Input::Normal([5, 33].into())],
            |t| softmax(&scale(&t[0], 256.0)),
            |x| {
                let far: Array = x[0].map(|x| 256.0 * x);
                far.map_rows(row)
            },
        ));
        // More rows than one grid dimension has workgroups.
        cases.push(case(&[70_000, 2]));
        let n = 64.0 * 49152.0;
        cases.push(case(&[64, 49152]).cost(5.0 * n, 8.0 * n).derivative(4.0 * n, 12.0 * n));
        cases
    }
}
