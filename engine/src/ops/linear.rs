//! Linear layer over row shards:  y = x · Wᵀ,  x: [.., D],  W: [O, D] as shards [O_i, D] in order,  y: [.., O]
//! Backward: dx = Σ_i dy_i · W_i,  dW_i = dy_iᵀ · x,  dy_i the columns of shard i.
//! One shard is a plain matrix product; several exist where a weight is larger than one storage binding.

use bytemuck::{Pod, Zeroable};

use super::elementwise::add;
use super::matmul::{Layout, Target, gradient, matmul, matmul_chunk, matmul_onto};
use crate::autograd::Gradient;
use crate::gpu::{Kernel, fold, kernel};
use crate::tensor::{DType, Tensor};

const COLUMNS: Kernel = kernel!("columns");

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    n: u32,
    narrow: u32,
    wide: u32,
    start: u32,
}

/// See the module's page.
///
/// # Panics
/// If a shard is no matrix with D columns, or there is none.
#[track_caller]
pub fn linear(x: &Tensor, weight: &[Tensor]) -> Tensor {
    let [rows, d] = x.shape().matrix();
    let fits = weight.iter().all(|w| w.shape().len() == 2 && w.shape().last() == d);
    assert!(fits && !weight.is_empty(), "linear: x {}, weight {weight:?}", x.shape());
    if let [whole] = weight
        && x.shape().len() > 1
    {
        return matmul(x, whole, Layout::NT);
    }
    let outputs: usize = weight.iter().map(|w| w.shape()[0]).sum();
    let y = Tensor::empty(x.gpu(), x.shape().with_last(outputs), DType::F32, "linear");
    let mut start = 0;
    for w in weight {
        let part = Tensor::empty(x.gpu(), [rows, w.shape()[0]], DType::F32, "linear");
        let target = Target { y: &part, row: 0, b_row: 0, add: false };
        matmul_chunk(x, w, w.shape()[0], Layout::NT, &target);
        copy_columns(&part, &y, w.shape()[0], start, false);
        start += w.shape()[0];
    }
    let kept = x.detach();
    let shards: Vec<Tensor> = weight.iter().map(Tensor::detach).collect();
    let tracked: Vec<bool> = weight.iter().map(Tensor::is_tracked).collect();
    let inputs: Vec<&Tensor> = [x].into_iter().chain(weight).collect();
    y.record_onto("linear", &inputs, move |dy, totals| {
        let dx = kept.empty_like("linear");
        let mut gradients = Vec::new();
        let mut start = 0;
        for (i, (w, tracked)) in shards.iter().zip(tracked).enumerate() {
            let columns = w.shape()[0];
            let part = Tensor::empty(dy.gpu(), [rows, columns], DType::F32, "linear");
            copy_columns(dy, &part, columns, start, true);
            let into = Target { y: &dx, row: 0, b_row: 0, add: i > 0 };
            matmul_chunk(&part, w, columns, Layout::NN, &into);
            let x = kept.reshape([rows, d]);
            let total = &totals[1 + i];
            gradients.push(tracked.then(|| gradient(&part, &x, Layout::TN, total)));
            start += columns;
        }
        [Some(Gradient::Own(dx))].into_iter().chain(gradients).collect()
    })
}

/// residual + [`linear`]`(x, weight)`: [.., O], in one pass over memory where the weight is one shard.
///
/// # Panics
/// As [`linear`], and if the residual has another shape.
#[track_caller]
pub fn linear_onto(residual: &Tensor, x: &Tensor, weight: &[Tensor]) -> Tensor {
    let [whole] = weight else { return add(residual, &linear(x, weight)) };
    if x.shape().len() < 2 {
        return add(residual, &linear(x, weight));
    }
    matmul_onto(x, whole, Layout::NT, Some(residual))
}

fn copy_columns(from: &Tensor, to: &Tensor, narrow: usize, start: usize, out: bool) {
    let (few, many) = if out { (to, from) } else { (from, to) };
    let params = Params {
        n: few.numel() as u32,
        narrow: narrow as u32,
        wide: many.shape().last() as u32,
        start: start as u32,
    };
    let grid = fold(few.numel().div_ceil(256));
    COLUMNS.with(&[("OUT", u32::from(out))]).run(&params, &[from], &[to], grid);
}

/// Matrices [T, O_i] beside each other: [T, Σ O_i]. Not differentiable.
///
/// # Panics
/// If there is none, or their rows differ in number.
#[track_caller]
pub fn beside(parts: &[Tensor]) -> Tensor {
    let rows = parts[0].shape().matrix()[0];
    assert!(parts.iter().all(|p| p.shape().matrix()[0] == rows), "beside: {parts:?}");
    let wide: usize = parts.iter().map(|p| p.shape().last()).sum();
    let y = Tensor::empty(parts[0].gpu(), [rows, wide], DType::F32, "beside");
    let mut start = 0;
    for part in parts {
        copy_columns(part, &y, part.shape().last(), start, false);
        start += part.shape().last();
    }
    y.record_none("beside", &parts.iter().collect::<Vec<_>>())
}

/// Rows first .. first + n of x: [T, D]. Not differentiable.
///
/// # Panics
/// If they are not all there.
#[track_caller]
pub fn rows(x: &Tensor, first: usize, n: usize) -> Tensor {
    let [t, d] = x.shape().matrix();
    assert!(first + n <= t, "rows {first}..{} of {}", first + n, x.shape());
    let y = Tensor::empty(x.gpu(), [n, d], x.dtype(), "rows");
    let size = x.dtype().row_bytes(d) as u64;
    x.gpu().copy(x.buffer(), first as u64 * size, y.buffer(), 0, n as u64 * size);
    y.record_none("rows", &[x])
}

#[cfg(feature = "cases")]
pub use cases::cases;

#[cfg(feature = "cases")]
mod cases {
    use super::*;
    use crate::ops::case::{Case, Input, Tolerance};
    use crate::tensor::host::Array;

    fn case(leading: &[usize], d: usize, shards: &[usize]) -> Case {
        let mut inputs = vec![Input::Normal([leading, &[d]].concat().into())];
        inputs.extend(shards.iter().map(|&o| Input::Normal([o, d].into())));
        let output = [leading, &[shards.iter().sum()]].concat();
        Case::new(
            format!("linear {leading:?}x{d} shards {shards:?}"),
            inputs,
            |t| linear(&t[0], &t[1..]),
            move |x| {
                let weight: Vec<&[f64]> = x[1..].iter().flat_map(Array::rows).collect();
                let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                let y = x[0].rows().flat_map(|row| weight.iter().map(move |w| dot(row, w)));
                Array::new(output.clone(), y.collect())
            },
        )
        .tolerance(Tolerance::SUM)
    }

    fn onto(d: usize, shards: &[usize]) -> Case {
        let plain = case(&[2, 3], d, shards);
        let mut inputs = vec![Input::Normal([2, 3, shards.iter().sum()].into())];
        inputs.extend(plain.inputs.iter().cloned());
        let product = plain.reference;
        Case::new(
            format!("linear onto a residual {d} shards {shards:?}"),
            inputs,
            |t| linear_onto(&t[0], &t[1], &t[2..]),
            move |x| {
                let y = product(&x[1..]);
                Array::from_fn(&*y.shape, |i| y.data[i] + x[0].data[i])
            },
        )
        .tolerance(Tolerance::SUM)
    }

    /// The linear layer's cases.
    pub fn cases() -> Vec<Case> {
        vec![
            onto(8, &[12]),
            onto(5, &[7]),
            onto(8, &[12, 4]),
            case(&[2, 3], 8, &[12]),
            case(&[2, 3], 8, &[12, 5, 8]),
            case(&[37], 12, &[8, 8]),
            case(&[1], 1, &[1, 1]),
            case(&[0], 4, &[3, 4]),
        ]
    }
}
