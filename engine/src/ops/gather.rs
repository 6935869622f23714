//! Rows by number:  y[r] = x[rows[r]]      x: [.., D], as [T, D]   rows: u32 [R], distinct   y: [R, D]
//! Backward: dx[rows[r]] = dy[r], and zero elsewhere.

use bytemuck::{Pod, Zeroable};

use crate::gpu::{Kernel, fold, kernel};
use crate::ops::reduce::pieces;
use crate::tensor::{DType, Tensor};

const GATHER: Kernel = kernel!("gather_rows");
const SCATTER: Kernel = kernel!("scatter_rows");

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    rows: u32,
    pieces: u32,
}

/// See the module's page. The caller sees to it that the rows are there, and distinct.
///
/// # Panics
/// If x is not f32, or `rows` are no u32 [R].
#[track_caller]
pub fn gather(x: &Tensor, rows: &Tensor) -> Tensor {
    let types = (x.dtype(), rows.dtype());
    let fits = types == (DType::F32, DType::U32) && rows.shape().len() == 1;
    assert!(fits, "gather: x {}, rows {}", x.shape(), rows.shape());
    let (r, d) = (rows.numel(), x.shape().last());
    let y = Tensor::empty(x.gpu(), [r, d], DType::F32, "gather");
    let (pieces, wide) = pieces(d);
    let params = Params { rows: r as u32, pieces: pieces as u32 };
    GATHER.with(&[wide]).run(&params, &[x, rows], &[&y], fold(r));
    let (shape, rows) = (x.shape().clone(), rows.detach());
    y.record("gather", &[x], move |dy| {
        let dx = Tensor::zeros(dy.gpu(), shape, DType::F32, "gather");
        SCATTER.with(&[wide]).run(&params, &[dy, &rows], &[&dx], fold(r));
        vec![Some(dx)]
    })
}

#[cfg(feature = "cases")]
pub use cases::cases;

#[cfg(feature = "cases")]
mod cases {
    use super::*;
    use crate::ops::case::{Case, Input};
    use crate::tensor::host::Array;

    fn case(leading: &[usize], d: usize, r: usize) -> Case {
        let t: usize = leading.iter().product();
        // Distinct rows in no order.
        let rows: Vec<u32> = (0..r).map(|i| ((i * 5 + 3) % t) as u32).collect();
        let shape = [leading, &[d]].concat();
        let told = rows.clone();
        Case::new(
            format!("gather {r} rows of {leading:?}x{d}"),
            vec![Input::Normal(shape.into())],
            move |x| gather(&x[0], &Tensor::from_u32(x[0].gpu(), &told, [r])),
            move |x| Array::from_fn([r, d], |i| x[0].data[rows[i / d] as usize * d + i % d]),
        )
    }

    /// The cases of rows by number.
    pub fn cases() -> Vec<Case> {
        let n = (512 * 576) as f64;
        vec![
            case(&[1], 1, 1),
            case(&[3, 7], 6, 20),
            case(&[9], 8, 9),
            case(&[4], 4, 0),
            case(&[1024], 576, 512).cost(n, 8.0 * n).derivative(n, 16.0 * n),
        ]
    }
}
