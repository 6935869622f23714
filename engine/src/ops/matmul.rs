//! Matrix product, batched over leading axes:  y[z] = A[z] · B[z]
//! Backward, with dy: [Z, M, N]:
//!   NN  dA = dy · Bᵀ    dB = Aᵀ · dy            A: [Z, M, K]  B: [Z, K, N]
//!   NT  dA = dy · B     dB = dyᵀ · A            A: [Z, M, K]  B: [Z, N, K]   (a Hugging Face linear layer)
//!   TN  dA = B · dyᵀ    dB = A · dy             A: [Z, K, M]  B: [Z, K, N]
//! A B without leading axes is shared by all of A's rows. B may be bf16 or f16; sums are f32.

mod kernels;

use crate::autograd::Gradient;
use crate::tensor::{DType, Shape, Tensor};

pub(crate) use kernels::Around;
pub use kernels::{MatmulKernel, Product};

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

/// Extents of one product, told from the operands' shapes.
#[derive(Clone, Debug)]
pub(crate) struct Extents {
    /// Matrices.
    pub z: usize,
    /// Rows of the output.
    pub m: usize,
    /// Columns of the output.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
    /// The output's shape.
    pub output: Shape,
}

/// A · B; see the module's page for shapes and gradients.
///
/// # Panics
/// If the extents do not fit, A is not f32, or A: [K, M] meets a shared B.
#[track_caller]
pub fn matmul(a: &Tensor, b: &Tensor, layout: Layout) -> Tensor {
    matmul_onto(a, b, layout, None)
}

/// A · B, or residual + A · B in the same pass over memory; the residual has the product's shape.
///
/// # Panics
/// As [`matmul`], and if the residual has another shape.
#[track_caller]
pub(crate) fn matmul_onto(
    a: &Tensor,
    b: &Tensor,
    layout: Layout,
    residual: Option<&Tensor>,
) -> Tensor {
    let extents = Extents::of(a, b, layout);
    let output = &extents.output;
    if let Some(r) = residual {
        assert_eq!(r.shape(), output, "matmul {layout:?}: a residual for {output}");
    }
    let y = Tensor::empty(a.gpu(), output, DType::F32, "matmul");
    let target = Target { y: &y, row: 0, b_row: 0, add: false };
    product(a, b, layout, &extents, &target, residual);
    let (ka, kb) = (a.detach(), b.detach());
    let (need_a, need_b) = (a.is_tracked(), b.is_tracked());
    let need_r = residual.map(Tensor::is_tracked);
    let inputs: Vec<&Tensor> = [a, b].into_iter().chain(residual).collect();
    y.record_onto("matmul", &inputs, move |dy, totals| {
        let da = need_a.then(|| match layout {
            Layout::NN => gradient(dy, &kb, Layout::NT, &totals[0]),
            Layout::NT => gradient(dy, &kb, Layout::NN, &totals[0]),
            Layout::TN => gradient(&kb, dy, Layout::NT, &totals[0]),
        });
        let db = need_b.then(|| {
            // A shared B sums over all rows of A: leading axes fold into the contraction.
            let (a, dy) =
                if kb.shape().len() == 2 { (flat(&ka), flat(dy)) } else { (ka, dy.clone()) };
            match layout {
                Layout::NN => gradient(&a, &dy, Layout::TN, &totals[1]),
                Layout::NT => gradient(&dy, &a, Layout::TN, &totals[1]),
                Layout::TN => gradient(&a, &dy, Layout::NN, &totals[1]),
            }
        });
        let dr = need_r.map(|need| need.then(|| Gradient::Shared(dy.clone())));
        [da, db].into_iter().chain(dr).collect()
    })
}

/// A · B as a gradient: added to the total where there is one.
pub(crate) fn gradient(a: &Tensor, b: &Tensor, layout: Layout, total: &Option<Tensor>) -> Gradient {
    let Some(total) = total else { return Gradient::Own(matmul(a, b, layout)) };
    let target = Target { y: total, row: 0, b_row: 0, add: true };
    product(a, b, layout, &Extents::of(a, b, layout), &target, None);
    Gradient::Added
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
    let extents = Extents { z: 1, m, n, k, output: [m, n].into() };
    product(a, b, layout, &extents, target, None);
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

fn product(
    a: &Tensor,
    b: &Tensor,
    layout: Layout,
    e: &Extents,
    target: &Target<'_>,
    residual: Option<&Tensor>,
) {
    if e.k > 0 {
        let kernel = MatmulKernel::choose(a.gpu(), layout, b.dtype(), e);
        kernel.run(a, b, layout, e, target, &Around { residual, ..Around::default() });
    } else if let Some(r) = residual {
        a.gpu().copy(r.buffer(), 0, target.y.buffer(), 0, r.buffer().bytes());
    } else if !target.add {
        a.gpu().zero(target.y.buffer());
    }
}

#[cfg(feature = "cases")]
mod cases;
#[cfg(feature = "cases")]
pub use cases::cases;
