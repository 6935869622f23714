//! Matrix product, batched over leading axes:  y[z] = A[z] · B[z]
//! Backward, with dy: [Z, M, N]:
//!   NN  dA = dy · Bᵀ    dB = Aᵀ · dy            A: [Z, M, K]  B: [Z, K, N]
//!   NT  dA = dy · B     dB = dyᵀ · A            A: [Z, M, K]  B: [Z, N, K]   (a Hugging Face linear layer)
//!   TN  dA = B · dyᵀ    dB = A · dy             A: [Z, K, M]  B: [Z, K, N]
//! A B without leading axes is shared by all of A's rows. B may be bf16 or f16; sums are f32.

use bytemuck::{Pod, Zeroable};

use crate::gpu::{Gpu, Kernel, kernel};
use crate::tensor::{DType, Shape, Tensor};

const TILE: Kernel = kernel!("matmul");
const FEW: Kernel = kernel!("matmul_few");
const SUBGROUP8: Kernel = kernel!("matmul_subgroup8");
const ANY: Kernel = kernel!("matmul_any");

/// Which operand is stored transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// A: [M, K], B: [K, N].
    NN,
    /// A: [M, K], B: [N, K].
    NT,
    /// A: [K, M], B: [K, N].
    TN,
}

/// The kernels that can do the work; each is held to the same cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MatmulKernel {
    /// 64 × 64 tiles through workgroup memory.
    Tile,
    /// At most a few rows (decoding), lanes along K; NT only.
    Few,
    /// Broadcasts inside subgroups of eight, for software adapters.
    Subgroup8,
    /// Any extents.
    Any,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    m: u32,
    n: u32,
    k: u32,
    a_m: u32,
    a_k: u32,
    a_z: u32,
    b_z: u32,
    b_from: u32,
    y_from: u32,
}

/// Extents of one product, told from the operands' shapes.
#[derive(Clone, Debug)]
struct Extents {
    z: usize,
    m: usize,
    n: usize,
    k: usize,
    output: Shape,
}

/// A · B; see the module's page for shapes and gradients.
///
/// # Panics
/// If the extents do not fit, A is not f32, or A: [K, M] meets a shared B.
#[track_caller]
pub fn matmul(a: &Tensor, b: &Tensor, layout: Layout) -> Tensor {
    let extents = Extents::of(a, b, layout);
    let y = Tensor::empty(a.gpu(), &extents.output, DType::F32, "matmul");
    product(a, b, layout, &extents, &Target { y: &y, row: 0, b_row: 0, add: false });
    let (ka, kb) = (a.detach(), b.detach());
    let (need_a, need_b) = (a.is_tracked(), b.is_tracked());
    y.record("matmul", &[a, b], move |dy| {
        let da = need_a.then(|| match layout {
            Layout::NN => matmul(dy, &kb, Layout::NT),
            Layout::NT => matmul(dy, &kb, Layout::NN),
            Layout::TN => matmul(&kb, dy, Layout::NT),
        });
        let db = need_b.then(|| {
            // A shared B sums over all rows of A: leading axes fold into the contraction.
            let (a, dy) =
                if kb.shape().len() == 2 { (flat(&ka), flat(dy)) } else { (ka, dy.clone()) };
            match layout {
                Layout::NN => matmul(&a, &dy, Layout::TN),
                Layout::NT => matmul(&dy, &a, Layout::TN),
                Layout::TN => matmul(&a, &dy, Layout::NN),
            }
        });
        vec![da, db]
    })
}

/// Where a product goes when it is part of a larger tensor: the fused ops that work through a weight chunk by
/// chunk use it, and differentiate as a whole.
pub(crate) struct Target<'a> {
    /// Written, or added to.
    pub y: &'a Tensor,
    /// First row of `y` that is written.
    pub row: usize,
    /// First row of B (as stored) that is used.
    pub b_row: usize,
    /// Add to what `y` holds.
    pub add: bool,
}

/// A · B[b_row..b_row + rows] for matrices. Not recorded.
pub(crate) fn matmul_chunk(
    a: &Tensor,
    b: &Tensor,
    b_rows: usize,
    layout: Layout,
    target: &Target<'_>,
) {
    let ([a_rows, a_cols], [_, b_cols]) = (a.shape().matrix(), b.shape().matrix());
    let (m, k) = if layout == Layout::TN { (a_cols, a_rows) } else { (a_rows, a_cols) };
    let (n, kb) = if layout == Layout::NT { (b_rows, b_cols) } else { (b_cols, b_rows) };
    assert_eq!(k, kb, "matmul chunk: {} and {b_rows} rows of {}", a.shape(), b.shape());
    product(a, b, layout, &Extents { z: 1, m, n, k, output: [m, n].into() }, target);
}

fn flat(t: &Tensor) -> Tensor {
    t.reshape(t.shape().matrix())
}

impl Extents {
    #[track_caller]
    fn of(a: &Tensor, b: &Tensor, layout: Layout) -> Extents {
        let fail = || panic!("matmul {layout:?}: {} and {} do not fit", a.shape(), b.shape());
        assert_eq!(a.dtype(), DType::F32, "matmul: A must be f32");
        let (sa, sb) = (a.shape(), b.shape());
        if sa.len() < 2 || sb.len() < 2 {
            fail();
        }
        let (a_rows, a_cols) = (sa[sa.len() - 2], sa[sa.len() - 1]);
        let (b_rows, b_cols) = (sb[sb.len() - 2], sb[sb.len() - 1]);
        let (m, ka) = if layout == Layout::TN { (a_cols, a_rows) } else { (a_rows, a_cols) };
        let (n, kb) = if layout == Layout::NT { (b_rows, b_cols) } else { (b_cols, b_rows) };
        let (lead_a, lead_b) = (&sa[..sa.len() - 2], &sb[..sb.len() - 2]);
        if ka != kb || (lead_b != lead_a && !(lead_b.is_empty() && layout != Layout::TN)) {
            fail();
        }
        let output = [lead_a, &[m, n]].concat().into();
        let lead: usize = lead_a.iter().product();
        // A shared B: all leading axes of A are rows.
        let (z, m) = if lead_b.is_empty() { (1, lead * m) } else { (lead, m) };
        Extents { z, m, n, k: ka, output }
    }
}

/// The kernel for these extents on this device.
fn choose(gpu: &Gpu, layout: Layout, e: &Extents) -> MatmulKernel {
    let contiguous = if layout == Layout::TN { e.m } else { e.k };
    let quads = [e.n, e.k, contiguous].iter().all(|extent| extent.is_multiple_of(4));
    let info = &gpu.adapter().info;
    if !quads {
        MatmulKernel::Any
    } else if gpu.has(wgpu::Features::SUBGROUP)
        && (info.subgroup_min_size, info.subgroup_max_size) == (8, 8)
    {
        MatmulKernel::Subgroup8
    } else if e.m <= 16 && layout == Layout::NT && e.z == 1 {
        MatmulKernel::Few
    } else {
        MatmulKernel::Tile
    }
}

fn product(a: &Tensor, b: &Tensor, layout: Layout, e: &Extents, target: &Target<'_>) {
    product_with(choose(a.gpu(), layout, e), a, b, layout, e, target);
}

fn product_with(
    kernel: MatmulKernel,
    a: &Tensor,
    b: &Tensor,
    layout: Layout,
    e: &Extents,
    target: &Target<'_>,
) {
    let y = target.y;
    if e.k == 0 {
        if !target.add {
            a.gpu().zero(y.buffer());
        }
        return;
    }
    let Extents { z, m, n, k, .. } = *e;
    let (a_m, a_k) = if layout == Layout::TN { (1, m) } else { (k, 1) };
    let params = Params {
        m: m as u32,
        n: n as u32,
        k: k as u32,
        a_m: a_m as u32,
        a_k: a_k as u32,
        a_z: (m * k) as u32,
        b_z: (n * k) as u32,
        b_from: (target.b_row * b.shape().last()) as u32,
        y_from: (target.row * n) as u32,
    };
    let add = ("ADD", u32::from(target.add));
    let a_transposed = ("A_TRANSPOSED", u32::from(layout == Layout::TN));
    let b_transposed = ("B_TRANSPOSED", u32::from(layout == Layout::NT));
    let imports = [("weight", b.dtype().weight_import())];
    let grid = |tile_n: usize, tile_m: usize| {
        [n.div_ceil(tile_n) as u32, m.div_ceil(tile_m) as u32, z as u32]
    };
    let (reads, writes): (&[&Tensor], &[&Tensor]) = (&[a, b], &[y]);
    match kernel {
        MatmulKernel::Tile => TILE.with(&[a_transposed, b_transposed, add]).import(&imports).run(
            &params,
            reads,
            writes,
            grid(64, 64),
        ),
        MatmulKernel::Few => {
            FEW.with(&[add]).import(&imports).run(&params, reads, writes, grid(4, 8))
        }
        MatmulKernel::Subgroup8 => SUBGROUP8.with(&[b_transposed, add]).import(&imports).run(
            &params,
            reads,
            writes,
            grid(32, 32),
        ),
        MatmulKernel::Any => ANY.with(&[b_transposed, add]).import(&imports).run(
            &params,
            reads,
            writes,
            grid(16, 16),
        ),
    }
}

#[cfg(feature = "cases")]
pub use cases::cases;

#[cfg(feature = "cases")]
mod cases {
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

    fn shapes(
        layout: Layout,
        z: &[usize],
        m: usize,
        n: usize,
        k: usize,
    ) -> (Shape, Shape, Extents) {
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
    fn forced(
        kernel: MatmulKernel,
        layout: Layout,
        z: &[usize],
        m: usize,
        n: usize,
        k: usize,
    ) -> Case {
        let (a, b, e) = shapes(layout, z, m, n, k);
        let extents = e.clone();
        let run = move |t: &[Tensor]| {
            let y = Tensor::empty(t[0].gpu(), &extents.output, DType::F32, "matmul");
            let target = Target { y: &y, row: 0, b_row: 0, add: false };
            product_with(kernel, &t[0], &t[1], layout, &extents, &target);
            y
        };
        Case::new(
            format!("matmul {kernel:?} {layout:?} {z:?} {m}x{n}x{k}"),
            vec![Input::Normal(a), Input::Normal(b)],
            run,
            move |x| reference(&x[0], &x[1], layout, &e),
        )
        .tolerance(Tolerance::SUM)
        .needs(if kernel == MatmulKernel::Subgroup8 { Some(8) } else { None })
    }

    fn bench(layout: Layout, m: usize, n: usize, k: usize) -> Case {
        let flops = 2.0 * (m * n * k) as f64;
        let bytes = 4.0 * (m * k + k * n + m * n) as f64;
        let (_, _, e) = shapes(layout, &[], m, n, k);
        case(layout, &[], m, n, k).cost(flops, bytes).sampled(move |x, at| {
            at.iter().map(|&i| element(&x[0], &x[1], layout, &e, i)).collect()
        })
    }

    /// Matmul's cases.
    pub fn cases() -> Vec<Case> {
        use Layout::{NN, NT, TN};
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
            for kernel in [MatmulKernel::Tile, MatmulKernel::Subgroup8, MatmulKernel::Any] {
                cases.push(forced(kernel, layout, &[], 68, 132, 20));
                cases.push(forced(kernel, layout, &[3], 4, 4, 4));
            }
        }
        cases.extend([1, 4, 9].map(|m| forced(MatmulKernel::Few, NT, &[], m, 30, 260)));
        for (m, n, k) in [(512, 512, 512), (128, 1536, 576), (128, 576, 1536), (4, 1536, 576)] {
            cases.push(bench(NT, m, n, k));
        }
        cases.extend([bench(NN, 128, 576, 1536), bench(TN, 576, 1536, 128)]);
        for (dtype, name) in [(DType::Bf16, "bf16"), (DType::F16, "f16")] {
            for (m, n, k) in [(3, 7, 5), (33, 36, 40), (5, 64, 64)] {
                cases.push(half(dtype, name, m, n, k));
            }
        }
        cases
    }

    /// A weight at rest in a half type: the reference rounds it the same way. Only A is differentiated.
    fn half(dtype: DType, name: &str, m: usize, n: usize, k: usize) -> Case {
        let weight: Vec<f32> = (0..n * k).map(|i| ((i * 37 % 101) as f32 - 50.0) / 31.0).collect();
        let bits: Vec<u16> = weight
            .iter()
            .map(|&w| match dtype {
                DType::Bf16 => half::bf16::from_f32(w).to_bits(),
                _ => half::f16::from_f32(w).to_bits(),
            })
            .collect();
        let rounded = Array::from_fn([n, k], |i| match dtype {
            DType::Bf16 => half::bf16::from_bits(bits[i]).to_f64(),
            _ => half::f16::from_bits(bits[i]).to_f64(),
        });
        let (_, _, e) = shapes(Layout::NT, &[], m, n, k);
        Case::new(
            format!("matmul NT {name} weight {m}x{n}x{k}"),
            vec![Input::Normal([m, k].into())],
            move |t| {
                let b = bytemuck::cast_slice(&bits);
                let b = Tensor::from_bytes(t[0].gpu(), b, [n, k], dtype, "weight");
                matmul(&t[0], &b, Layout::NT)
            },
            move |x| reference(&x[0], &rounded, Layout::NT, &e),
        )
        .tolerance(Tolerance::SUM)
    }
}
