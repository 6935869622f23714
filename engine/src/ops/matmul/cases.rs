//! What matrix products must withstand: each layout, each kernel at ragged extents, each weight type.

use super::kernels::{Around, MatmulKernel};
use super::*;
use crate::ops::case::{Case, Input, Tolerance};
use crate::tensor::host::Array;

/// Element `i` of the product.
fn element(a: &Array, b: &Array, layout: Layout, e: &Extents, i: usize) -> f64 {
    let Extents { z, m, n, k, .. } = *e;
    let (zi, mi, ni) = (i / (m * n) % z.max(1), i / n % m, i % n);
    let at = |ki: usize| match layout {
        Layout::NN => ((zi * m + mi) * k + ki, (zi * k + ki) * n + ni),
        Layout::NT => ((zi * m + mi) * k + ki, (zi * n + ni) * k + ki),
        Layout::TN => ((zi * k + ki) * m + mi, (zi * k + ki) * n + ni),
    };
    (0..k).map(at).map(|(ai, bi)| a.data[ai] * b.data[bi]).sum()
}

fn reference(a: &Array, b: &Array, layout: Layout, e: &Extents) -> Array {
    Array::from_fn(&e.output, |i| element(a, b, layout, e, i))
}

fn shapes(layout: Layout, z: &[usize], m: usize, n: usize, k: usize) -> (Shape, Shape, Extents) {
    let (a, b) = match layout {
        Layout::NN => ([m, k], [k, n]),
        Layout::NT => ([m, k], [n, k]),
        Layout::TN => ([k, m], [k, n]),
    };
    let output = [z, &[m, n]].concat().into();
    let e = Extents { z: z.iter().product(), m, n, k, output };
    ([z, &a].concat().into(), [z, &b].concat().into(), e)
}

fn case(layout: Layout, z: &[usize], m: usize, n: usize, k: usize) -> Case {
    let (a, b, e) = shapes(layout, z, m, n, k);
    Case::new(
        format!("matmul {layout:?} {z:?} {m}x{n}x{k}"),
        vec![Input::Normal(a), Input::Normal(b)],
        move |t| matmul(&t[0], &t[1], layout),
        move |x| reference(&x[0], &x[1], layout, &e),
    )
    .tolerance(Tolerance::SUM)
}

/// The same product forced through one kernel; without a derivative, which the plain cases check.
fn forced(kernel: MatmulKernel, layout: Layout, z: &[usize], m: usize, n: usize, k: usize) -> Case {
    let (a, b, e) = shapes(layout, z, m, n, k);
    let extents = e.clone();
    let run = move |t: &[Tensor]| {
        let y = Tensor::empty(t[0].gpu(), &extents.output, DType::F32, "matmul");
        let target = Target { y: &y, row: 0, b_row: 0, add: false };
        kernel.run(&t[0], &t[1], layout, &extents, &target, &Around::default());
        y
    };
    Case::new(
        format!("matmul {kernel:?} {layout:?} {z:?} {m}x{n}x{k}"),
        vec![Input::Normal(a), Input::Normal(b)],
        run,
        move |x| reference(&x[0], &x[1], layout, &e),
    )
    .tolerance(tolerance(kernel))
    .needs(move |gpu| kernel.runs_on(gpu))
}

fn bench(layout: Layout, m: usize, n: usize, k: usize) -> Case {
    let flops = 2.0 * (m * n * k) as f64;
    let bytes = 4.0 * (m * k + k * n + m * n) as f64;
    let (_, _, e) = shapes(layout, &[], m, n, k);
    case(layout, &[], m, n, k)
        .cost(flops, bytes)
        .sampled(move |x, at| at.iter().map(|&i| element(&x[0], &x[1], layout, &e, i)).collect())
}

/// residual + A · B, through each kernel's way of adding it.
fn residual(kernel: MatmulKernel, m: usize, n: usize, k: usize) -> Case {
    let (a, b, e) = shapes(Layout::NT, &[], m, n, k);
    let (extents, output) = (e.clone(), e.output.clone());
    let run = move |t: &[Tensor]| {
        let y = Tensor::empty(t[0].gpu(), &extents.output, DType::F32, "matmul");
        let target = Target { y: &y, row: 0, b_row: 0, add: false };
        let around = Around { residual: Some(&t[2]), ..Around::default() };
        kernel.run(&t[0], &t[1], Layout::NT, &extents, &target, &around);
        y
    };
    Case::new(
        format!("matmul {kernel:?} with residual {m}x{n}x{k}"),
        vec![Input::Normal(a), Input::Normal(b), Input::Normal(output)],
        run,
        move |x| {
            let product = reference(&x[0], &x[1], Layout::NT, &e);
            Array::from_fn(&e.output, |i| product.data[i] + x[2].data[i])
        },
    )
    .tolerance(tolerance(kernel))
    .needs(move |gpu| kernel.runs_on(gpu))
}

fn tolerance(kernel: MatmulKernel) -> Tolerance {
    match kernel {
        // Factors of 11 bits, some of them outliers, and sums of some dozens of products.
        MatmulKernel::CoopF16 | MatmulKernel::CoopF16Wide => {
            Tolerance { absolute: 0.1, relative: 4e-3 }
        }
        _ => Tolerance::SUM,
    }
}

/// Matmul's cases.
pub fn cases() -> Vec<Case> {
    use Layout::{NN, NT, TN};
    use MatmulKernel::{
        Any, CoopF16, CoopF16Wide, CoopF32, Few, FewSubgroup8, OneSubgroup8, Sliced, Subgroup8,
        Tile, Wide,
    };
    let mut cases = Vec::new();
    for layout in [NN, NT, TN] {
        cases.extend([
            case(layout, &[], 1, 1, 1),
            case(layout, &[], 33, 36, 40),
            case(layout, &[], 7, 5, 3),
            case(layout, &[2, 3], 5, 8, 12),
            case(layout, &[], 4, 8, 0),
            case(layout, &[], 0, 8, 4),
        ]);
        for kernel in [Tile, Wide, Subgroup8, CoopF32, CoopF16, CoopF16Wide, Any] {
            cases.push(forced(kernel, layout, &[], 68, 132, 20));
            cases.push(forced(kernel, layout, &[3], 4, 4, 4));
        }
        cases.push(forced(Sliced, layout, &[], 68, 132, 300));
    }
    cases.push(forced(Tile, NT, &[], 67, 132, 36));
    for kernel in [Few, FewSubgroup8, OneSubgroup8] {
        cases.extend([1, 4, 9, 16].map(|m| forced(kernel, NT, &[], m, 30, 264)));
        cases.push(residual(kernel, 5, 34, 40));
    }
    cases.extend([Tile, Wide, Subgroup8, CoopF16, Any].map(|kernel| residual(kernel, 36, 68, 24)));
    cases.push(residual(Sliced, 36, 68, 260));
    for (m, n, k) in [(512, 512, 512), (128, 1536, 576), (128, 576, 1536), (4, 1536, 576)] {
        cases.push(bench(NT, m, n, k));
    }
    cases.extend([bench(NN, 128, 576, 1536), bench(TN, 576, 1536, 128)]);
    for dtype in [DType::Bf16, DType::F16] {
        cases.extend([(3, 7, 5), (33, 36, 40), (5, 64, 64)].map(|e| stored(dtype, e)));
    }
    for dtype in [DType::Q8, DType::Q4] {
        cases.extend(
            [(3, 7, 96), (33, 36, 64), (5, 64, 32), (17, 33, 32), (1, 40, 96)]
                .map(|e| stored(dtype, e)),
        );
    }
    for dtype in [DType::F16, DType::Q8, DType::Q4] {
        for (m, n, k) in [(16, 1536, 576), (4, 1536, 576), (1, 1536, 576), (1, 49_152, 576)] {
            let bytes = 4.0 * (m * (k + n)) as f64 + (n * dtype.row_bytes(k)) as f64;
            let case = stored(dtype, (m, n, k)).cost(2.0 * (m * n * k) as f64, bytes);
            let stands_for_it = m == 4 || (m, n, dtype) == (1, 1536, DType::Q4);
            cases.push(if stands_for_it { case } else { case.full_only() });
        }
    }
    cases
}

/// A weight at rest in another type: the reference reads it back the same way. Only A is differentiated.
fn stored(dtype: DType, (m, n, k): (usize, usize, usize)) -> Case {
    let (_, _, e) = shapes(Layout::NT, &[], m, n, k);
    let sampled = e.clone();
    Case::new(
        format!("matmul NT {dtype:?} weight {m}x{n}x{k}"),
        vec![Input::Normal([m, k].into()), Input::Weight([n, k].into(), dtype)],
        move |t| matmul(&t[0], &t[1], Layout::NT),
        move |x| reference(&x[0], &x[1], Layout::NT, &e),
    )
    .sampled(move |x, at| {
        at.iter().map(|&i| element(&x[0], &x[1], Layout::NT, &sampled, i)).collect()
    })
    .tolerance(Tolerance::SUM)
}
