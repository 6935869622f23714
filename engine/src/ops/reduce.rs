//! Reductions over one axis, which disappears:  x: [O, R, I] → y: [O, I]
//!   sum   y = Σ_r x          dx[o, r, i] = dy[o, i]
//!   mean  y = Σ_r x / R      dx[o, r, i] = dy[o, i] / R
//!   max   y = max_r x        dx = dy at the first r that has the maximum, 0 elsewhere
//! Sums of long axes run in stages of fixed chunks, so that they are parallel and bit-equal between runs.

use bytemuck::{Pod, Zeroable};

use crate::gpu::{Gpu, Kernel, fold, kernel};
use crate::tensor::{DType, Shape, Tensor};

const SUM: Kernel = kernel!("sum");
const SUM_COLUMNS: Kernel = kernel!("sum_columns");
const SUM_BACKWARD: Kernel = kernel!("sum_backward");
const MAX: Kernel = kernel!("max");
const MAX_BACKWARD: Kernel = kernel!("max_backward");

/// Elements of a row that one workgroup adds.
const ROW_CHUNK: usize = 4096;
/// Rows that one workgroup adds, column by column.
const COLUMN_CHUNK: usize = 256;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct SumParams {
    n: u32,
    extent: u32,
    chunk: u32,
    chunks: u32,
    scale: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ColumnsParams {
    n: u32,
    extent: u32,
    chunk: u32,
    chunks: u32,
    inner: u32,
    tiles: u32,
    scale: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct SumBackwardParams {
    n: u32,
    extent: u32,
    inner: u32,
    scale: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct MaxParams {
    n: u32,
    extent: u32,
    inner: u32,
}

/// A tensor seen as [O, R, I] around one axis.
#[derive(Clone, Copy)]
struct View {
    outer: usize,
    extent: usize,
    inner: usize,
}

impl View {
    /// The view, and the shape without the axis.
    #[track_caller]
    fn around(name: &str, x: &Tensor, axis: usize) -> (View, Shape) {
        let shape = x.shape();
        assert!(axis < shape.len(), "{name}: {shape} has no axis {axis}");
        assert_eq!(x.dtype(), DType::F32, "{name} of {shape}");
        let outer = shape[..axis].iter().product();
        let inner = shape[axis + 1..].iter().product();
        let rest = [&shape[..axis], &shape[axis + 1..]].concat();
        (View { outer, extent: shape[axis], inner }, rest.into())
    }
}

/// Lanes for workgroups that share a row: short rows would leave most of 256 idle at every barrier. Software adapters
/// pay for each subgroup at each barrier, so there a row has one subgroup.
pub(crate) fn row_lanes(gpu: &Gpu, columns: usize) -> (&'static str, u32) {
    let lanes = match columns {
        _ if gpu.adapter().is_software() => 8,
        0..=1024 => 64,
        _ => 256,
    };
    ("WG", lanes)
}

/// How rows of this length go through bindings of quads (shaders/shared/quad.wgsl): pieces in a row, and the constant.
pub(crate) fn pieces(columns: usize) -> (usize, (&'static str, u32)) {
    let wide = columns.is_multiple_of(4);
    (if wide { columns / 4 } else { columns }, ("WIDE", u32::from(wide)))
}

/// Σ over `axis`, which disappears; 0 where it is empty.
#[track_caller]
pub fn sum(x: &Tensor, axis: usize) -> Tensor {
    scaled_sum("sum", x, axis, 1.0)
}

/// The mean over `axis`, which disappears.
///
/// # Panics
/// If the axis is empty.
#[track_caller]
pub fn mean(x: &Tensor, axis: usize) -> Tensor {
    let (view, _) = View::around("mean", x, axis);
    assert!(view.extent > 0, "mean: axis {axis} of {} is empty", x.shape());
    scaled_sum("mean", x, axis, 1.0 / view.extent as f32)
}

/// Σ of everything: [1].
#[track_caller]
pub fn sum_all(x: &Tensor) -> Tensor {
    sum(&x.reshape([x.numel()]), 0).reshape([1])
}

/// Adds up what broadcasting `shape` to `x`'s shape repeats; the way back of broadcasting.
///
/// # Panics
/// If `shape` does not broadcast to `x`'s.
#[track_caller]
pub fn sum_to(x: &Tensor, shape: &Shape) -> Tensor {
    let from = x.shape().clone();
    let lead = from.len().checked_sub(shape.len());
    let fits =
        lead.is_some_and(|l| from[l..].iter().zip(shape.iter()).all(|(f, t)| f == t || *t == 1));
    assert!(fits, "sum_to: {shape} does not broadcast to {from}");
    let lead = lead.expect("it fits");
    let repeated = |axis: usize| axis < lead || shape[axis - lead] != from[axis];
    let mut y = x.clone();
    let mut inner = 1;
    let mut end = from.len();
    // From the last axis on, each run of repeated axes is one sum.
    while end > 0 {
        let mut start = end;
        while start > 0 && repeated(start - 1) {
            start -= 1;
        }
        let extent: usize = from[start..end].iter().product();
        if start < end && extent != 1 {
            let outer = from[..start].iter().product();
            y = sum(&y.reshape([outer, extent, inner]), 1);
        }
        if start > 0 {
            inner *= from[start - 1];
        }
        end = start.saturating_sub(1);
    }
    if y.shape() == shape { y } else { y.reshape(shape) }
}

#[track_caller]
fn scaled_sum(name: &'static str, x: &Tensor, axis: usize, scale: f32) -> Tensor {
    let (view, shape) = View::around(name, x, axis);
    let from = x.shape().clone();
    let y = Tensor::empty(x.gpu(), &shape, DType::F32, name);
    if view.extent == 0 {
        x.gpu().zero(y.buffer());
    } else {
        sum_stages(x, view, scale, &y);
    }
    y.record(name, &[x], move |dy| {
        let dx = Tensor::empty(dy.gpu(), &from, DType::F32, name);
        let n = from.numel();
        let (extent, inner) = (view.extent as u32, view.inner as u32);
        let params = SumBackwardParams { n: n as u32, extent, inner, scale };
        SUM_BACKWARD.run(&params, &[dy], &[&dx], fold(n.div_ceil(256)));
        vec![Some(dx)]
    })
}

/// Writes scale · Σ_r x to `y`, chunk by chunk until one is left.
fn sum_stages(x: &Tensor, view: View, scale: f32, y: &Tensor) {
    let View { outer, extent, inner } = view;
    let chunk = if inner == 1 { ROW_CHUNK } else { COLUMN_CHUNK };
    let chunks = extent.div_ceil(chunk);
    if chunks == 1 {
        return sum_chunks(x, view, extent, scale, y);
    }
    let partial = Tensor::empty(x.gpu(), [outer, chunks, inner], DType::F32, "sum");
    sum_chunks(x, view, chunk, 1.0, &partial);
    sum_stages(&partial, View { outer, extent: chunks, inner }, scale, y);
}

fn sum_chunks(x: &Tensor, view: View, chunk: usize, scale: f32, y: &Tensor) {
    let View { outer, extent, inner } = view;
    let chunks = extent.div_ceil(chunk);
    let (extent, chunk, n_chunks) = (extent as u32, chunk as u32, chunks as u32);
    if inner == 1 {
        let n = outer * chunks;
        let params = SumParams { n: n as u32, extent, chunk, chunks: n_chunks, scale };
        let lanes = [row_lanes(x.gpu(), chunk as usize)];
        SUM.with(&lanes).run(&params, &[x], &[y], fold(n));
    } else {
        let tiles = inner.div_ceil(32);
        let n = outer * chunks * tiles;
        let (inner, tiles) = (inner as u32, tiles as u32);
        let params =
            ColumnsParams { n: n as u32, extent, chunk, chunks: n_chunks, inner, tiles, scale };
        SUM_COLUMNS.run(&params, &[x], &[y], fold(n));
    }
}

/// The maximum over `axis`, which disappears; the gradient goes to its first place. NaN is not looked for.
///
/// # Panics
/// If the axis is empty.
#[track_caller]
pub fn max(x: &Tensor, axis: usize) -> Tensor {
    let (view, shape) = View::around("max", x, axis);
    let from = x.shape().clone();
    assert!(view.extent > 0, "max: axis {axis} of {from} is empty");
    let y = Tensor::empty(x.gpu(), &shape, DType::F32, "max");
    let first = Tensor::empty(x.gpu(), &shape, DType::U32, "max");
    let n = shape.numel();
    let (extent, inner) = (view.extent as u32, view.inner as u32);
    let params = MaxParams { n: n as u32, extent, inner };
    MAX.run(&params, &[x], &[&y, &first], fold(n));
    y.record("max", &[x], move |dy| {
        let dx = Tensor::zeros(dy.gpu(), &from, DType::F32, "max");
        MAX_BACKWARD.run(&params, &[dy, &first], &[&dx], fold(n.div_ceil(256)));
        vec![Some(dx)]
    })
}

#[cfg(feature = "cases")]
pub use cases::cases;

#[cfg(feature = "cases")]
mod cases {
    use super::*;
    use crate::autograd::{Gradients, backward};
    use crate::ops::case::{Case, Input, Tolerance};
    use crate::ops::scale;
    use crate::tensor::host::{Array, unravel};

    /// y[o, i] = f over the axis.
    fn reduce(x: &Array, axis: usize, f: impl Fn(&[f64]) -> f64) -> Array {
        let outer: usize = x.shape[..axis].iter().product();
        let inner: usize = x.shape[axis + 1..].iter().product();
        let extent = x.shape[axis];
        let shape = [&x.shape[..axis], &x.shape[axis + 1..]].concat();
        assert_eq!(outer * inner, shape.iter().product::<usize>());
        Array::from_fn(shape, |at| {
            let (o, i) = (at / inner, at % inner);
            let line: Vec<f64> =
                (0..extent).map(|r| x.data[(o * extent + r) * inner + i]).collect();
            f(&line)
        })
    }

    type Op = (&'static str, fn(&Tensor, usize) -> Tensor, fn(&[f64]) -> f64);

    fn case((name, op, f): Op, shape: &[usize], axis: usize) -> Case {
        Case::new(
            format!("{name} {shape:?} axis {axis}"),
            vec![Input::Normal(shape.into())],
            move |t| op(&t[0], axis),
            move |x| reduce(&x[0], axis, f),
        )
        .tolerance(Tolerance::SUM)
    }

    fn sum_to_case(from: &[usize], to: &'static [usize]) -> Case {
        Case::new(
            format!("sum_to {from:?} {to:?}"),
            vec![Input::Normal(from.into())],
            move |t| sum_to(&t[0], &to.into()),
            move |x| {
                let mut y = Array::from_fn(to, |_| 0.0);
                for (i, v) in x[0].data.iter().enumerate() {
                    let index = unravel(i, &x[0].shape);
                    let own = &index[index.len() - to.len()..];
                    let at = own.iter().zip(to).fold(0, |at, (&i, &e)| at * e + i.min(e - 1));
                    y.data[at] += v;
                }
                y
            },
        )
        .tolerance(Tolerance::SUM)
    }

    /// The gradient of a maximum of equals, as the output: it goes to the first one.
    fn first_of_equals() -> Case {
        let gradient = |t: &[Tensor]| {
            let x = scale(&t[0].detach(), 0.0).trainable();
            let y = max(&x, 1);
            let ones = Tensor::from_f32(x.gpu(), &[1.0; 4], [4]);
            let mut gradients = Gradients::new();
            backward(&y, &ones, &mut gradients);
            gradients.get(&x).expect("x is a leaf").clone()
        };
        Case::new("max of equals", vec![Input::Away([4, 300].into())], gradient, |_| {
            Array::from_fn([4, 300], |i| if i % 300 == 0 { 1.0 } else { 0.0 })
        })
    }

    /// The cases of all reductions.
    pub fn cases() -> Vec<Case> {
        let total = |line: &[f64]| line.iter().sum::<f64>();
        let all: [Op; 3] = [
            ("sum", sum, total),
            ("mean", mean, |line| line.iter().sum::<f64>() / line.len() as f64),
            ("max", max, |line| line.iter().copied().fold(f64::NEG_INFINITY, f64::max)),
        ];
        let mut cases = Vec::new();
        for op in all {
            for axis in 0..3 {
                cases.push(case(op, &[3, 7, 5], axis));
            }
            cases.push(case(op, &[1], 0));
            cases.push(case(op, &[2, 1000], 1));
            cases.push(case(op, &[257, 33], 0));
            cases.push(case(op, &[0, 3], 1));
            cases.push(case(op, &[2, 3, 0], 1));
        }
        let all_of = |x: &[Array]| Array::new([1], vec![x[0].data.iter().sum()]);
        cases.extend([
            case(all[0], &[0, 3], 0),
            // More than one stage, by rows and by columns.
            case(all[0], &[2, 9001], 1),
            case(all[0], &[1000, 3], 0),
            case(all[2], &[2, 9001], 1),
            Case::new("sum_all", vec![Input::Normal([3, 5, 7].into())], |t| sum_all(&t[0]), all_of)
                .tolerance(Tolerance::SUM),
            sum_to_case(&[2, 3, 4, 5], &[5]),
            sum_to_case(&[2, 3, 4, 5], &[3, 1, 5]),
            sum_to_case(&[2, 3, 4, 5], &[2, 1, 4, 1]),
            sum_to_case(&[2, 3], &[1]),
            sum_to_case(&[2, 3], &[2, 3]),
            sum_to_case(&[0, 3], &[3]),
            first_of_equals(),
        ]);
        let (rows, d, v) = (512, 576, 49152);
        let n = (rows * d) as f64;
        cases.push(case(all[0], &[rows, d], 0).cost(n, 4.0 * n));
        cases.push(case(all[0], &[rows, d], 1).cost(n, 4.0 * n));
        let n = (64 * v) as f64;
        cases.push(case(all[2], &[64, v], 1).cost(n, 4.0 * n));
        cases
    }
}
