//! Grouped-query attention, flash style: scores are never stored.
//!   o[q] = Σ_k softmax_k(q·k / √H) v[k]   over the keys that the mask allows
//! Backward recomputes the weights p from the saved log-sum-exp; with dots = Σ_d dy ⊙ o:
//!   ds = p ⊙ (dy·v − dots)    dq = Σ_k ds k / √H    dk = Σ_q ds q / √H    dv = Σ_q p dy
//! q, o: [B, Tq, N, H]   k, v: [B, Tk, G, H]   N a multiple of G, query head n reads key head n / (N / G).
//! The mask is numbers (shaders/shared/mask.wgsl); tiles that it forbids whole are not visited.

use bytemuck::{Pod, Zeroable};

use crate::gpu::{Gpu, Kernel, fold, kernel};
use crate::tensor::{DType, Tensor};

const TILE: Kernel = kernel!("attention");
const FEW: Kernel = kernel!("attention_few");
const SUBGROUP8: Kernel = kernel!("attention_subgroup8");
const COMBINE: Kernel = kernel!("attention_combine");
const BACKWARD_DOT: Kernel = kernel!("attention_backward_dot");
const BACKWARD_Q: Kernel = kernel!("attention_backward_q");
const BACKWARD_KV: Kernel = kernel!("attention_backward_kv");
const BACKWARD_Q_SUBGROUP8: Kernel = kernel!("attention_backward_q_subgroup8");
const BACKWARD_KV_SUBGROUP8: Kernel = kernel!("attention_backward_kv_subgroup8");

/// The largest head dimension.
pub const MOST_HEAD_DIM: usize = 192;
/// Rows and the largest head dimension of [`AttentionKernel::Few`]: what 16 KiB of workgroup memory hold.
const FEW_ROWS: usize = 16;
const FEW_HEAD_DIM: usize = 128;
/// The largest head dimension of [`AttentionKernel::Subgroup8`], whose accumulators are written out.
const SUBGROUP8_HEAD_DIM: usize = 128;

/// The kernels that can do the work; each is held to the same cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionKernel {
    /// 64 query rows × 32 keys through workgroup memory.
    Tile,
    /// At most 16 query rows (decoding), lanes along the keys; its backward pass is that of `Tile`.
    Few,
    /// Broadcasts inside subgroups of eight, for software adapters; head dimensions up to 128, multiples of 8.
    Subgroup8,
}

/// Which keys a query may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// All of them.
    Full,
    /// Those at its own position and before.
    Causal,
    /// Those of its own block and before; blocks of this many tokens at absolute positions.
    BlockCausal(usize),
    /// Training layout of block diffusion (arXiv 2601.15892 §2.2): rows are L noisy then L clean tokens; a
    /// noisy block sees itself and the clean blocks before it, a clean block the clean ones up to itself.
    TwoCopy(usize),
}

/// What beside q, k and v an attention call needs.
#[derive(Clone, Debug)]
pub struct AttentionOptions {
    /// Which keys a query may see.
    pub mask: Mask,
    /// [B, L, 2] u32: first and end position of each token's document, both nondecreasing; L is Tk, or half
    /// of it for the two-copy mask. `None` leaves documents mutually visible.
    pub spans: Option<Tensor>,
    /// Position of the first query row, for queries that continue a cache (not with two-copy).
    pub q_start: usize,
    /// Rows of k and v that hold keys, for a cache with room to spare; `None` for all.
    pub keys: Option<usize>,
}

impl AttentionOptions {
    /// Only a mask.
    pub fn new(mask: Mask) -> Self {
        AttentionOptions { mask, spans: None, q_start: 0, keys: None }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    tq: u32,
    tk: u32,
    kv_heads: u32,
    capacity: u32,
    mask: u32,
    block: u32,
    length: u32,
    q_start: u32,
    scale: f32,
    rows: u32,
    splits: u32,
}

/// See the module's page. Gradients flow into q, k and v, unless the keys come from a cache.
///
/// # Panics
/// If shapes do not fit, a head dimension is no multiple of 4 or above [`MOST_HEAD_DIM`], or a block length is zero.
#[track_caller]
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions) -> Tensor {
    let call = Call::new(q, k, v, options);
    let kernel = choose(q.gpu(), &call);
    let splits = call.splits(q.gpu(), kernel);
    attention_with(kernel, splits, call, q, k, v)
}

fn attention_with(
    kernel: AttentionKernel,
    splits: usize,
    call: Call,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
) -> Tensor {
    let (o, stats) = call.forward(kernel, splits, q, k, v);
    let (kq, kk, kv) = (q.detach(), k.detach(), v.detach());
    let kept = o.detach();
    o.record("attention", &[q, k, v], move |dy| {
        let (dq, dk, dv) = call.backward(kernel, [&kq, &kk, &kv], &kept, &stats, dy);
        vec![Some(dq), Some(dk), Some(dv)]
    })
}

/// The kernel for this call on this device.
fn choose(gpu: &Gpu, call: &Call) -> AttentionKernel {
    let info = &gpu.adapter().info;
    let eights = gpu.has(wgpu::Features::SUBGROUP)
        && (info.subgroup_min_size, info.subgroup_max_size) == (8, 8);
    let rows = call.params.tq as usize * call.shared as usize;
    if eights && call.head_dim.is_multiple_of(8) && call.head_dim <= SUBGROUP8_HEAD_DIM {
        AttentionKernel::Subgroup8
    } else if rows <= FEW_ROWS && call.head_dim <= FEW_HEAD_DIM {
        AttentionKernel::Few
    } else {
        AttentionKernel::Tile
    }
}

/// One call's numbers, kept for the backward pass.
struct Call {
    params: Params,
    batch: usize,
    head_dim: usize,
    /// Query heads that share a key head.
    shared: u32,
    spans: Option<Tensor>,
}

impl Call {
    #[track_caller]
    fn new(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions) -> Call {
        let fail = |why: &str| -> ! {
            panic!(
                "attention: {why}: q {}, k {}, v {}, {options:?}",
                q.shape(),
                k.shape(),
                v.shape()
            )
        };
        let (&[batch, tq, heads, h], &[kb, capacity, kv_heads, kh]) = (&**q.shape(), &**k.shape())
        else {
            fail("q, k and v have four axes")
        };
        if k.shape() != v.shape() || (kb, kh) != (batch, h) {
            fail("shapes do not fit");
        }
        if kv_heads == 0 || heads % kv_heads != 0 || h % 4 != 0 || h > MOST_HEAD_DIM {
            fail("heads must be a multiple of key heads, head dimension a multiple of 4 up to 192");
        }
        let tk = options.keys.unwrap_or(capacity);
        let (mask, block, length) = match options.mask {
            Mask::Full => (0, 1, tk),
            Mask::Causal => (1, 1, tk),
            Mask::BlockCausal(block) => (1, block, tk),
            Mask::TwoCopy(block) => (2, block, tk / 2),
        };
        let two_copy = mask == 2;
        if block == 0
            || tk > capacity
            || (two_copy && (tq != tk || !tk.is_multiple_of(2) || options.q_start != 0))
        {
            fail("mask does not fit");
        }
        if !two_copy && options.q_start + tq > tk && tq > 0 && mask == 1 {
            fail("queries run past the keys");
        }
        if let Some(spans) = &options.spans
            && (**spans.shape() != [batch, length, 2] || spans.dtype() != DType::U32)
        {
            fail("spans must be u32 [B, L, 2]");
        }
        let params = Params {
            tq: tq as u32,
            tk: tk as u32,
            kv_heads: kv_heads as u32,
            capacity: capacity as u32,
            mask,
            block: block as u32,
            length: length as u32,
            q_start: options.q_start as u32,
            scale: 1.0 / (h as f32).sqrt(),
            rows: (batch * tq * heads) as u32,
            splits: 1,
        };
        let shared = (heads / kv_heads) as u32;
        Call { params, batch, head_dim: h, shared, spans: options.spans.clone() }
    }

    fn constants(&self) -> [(&'static str, u32); 3] {
        let has_spans = u32::from(self.spans.is_some());
        [("H", self.head_dim as u32), ("HAS_SPANS", has_spans), ("SHARED", self.shared)]
    }

    /// Workgroups over tiles of so many rows; tiles do not cross the border of the two copies.
    fn grid(&self, rows: u32, size: u32) -> [u32; 3] {
        let halves = if self.params.mask == 2 { 2 } else { 1 };
        [(rows / halves).div_ceil(size) * halves, self.params.kv_heads, self.batch as u32]
    }

    fn forward_grid(&self, kernel: AttentionKernel) -> [u32; 3] {
        let rows = match kernel {
            AttentionKernel::Tile => 64,
            AttentionKernel::Few => FEW_ROWS as u32,
            AttentionKernel::Subgroup8 => 32,
        };
        self.grid(self.params.tq * self.shared, rows)
    }

    /// Pieces of the keys that are worked on side by side: more than one where a few query rows would leave most of
    /// the device idle.
    fn splits(&self, gpu: &Gpu, kernel: AttentionKernel) -> usize {
        const LEAST_KEYS: usize = 256;
        let busy = if gpu.adapter().is_software() { 16 } else { 256 };
        let workgroups: u32 = self.forward_grid(kernel).iter().product();
        let most = (self.params.tk as usize / LEAST_KEYS).max(1);
        (busy / (workgroups as usize).max(1)).clamp(1, most)
    }

    fn forward(
        &self,
        kernel: AttentionKernel,
        splits: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> (Tensor, Tensor) {
        let (gpu, p) = (q.gpu(), &Params { splits: splits as u32, ..self.params });
        let o = q.empty_like("attention");
        let rows = p.rows as usize;
        let stats = Tensor::empty(gpu, [2, rows], DType::F32, "attention");
        if p.tk == 0 {
            gpu.zero(o.buffer());
            return (o, stats);
        }
        let shader = match kernel {
            AttentionKernel::Tile => TILE,
            AttentionKernel::Few => FEW,
            AttentionKernel::Subgroup8 => SUBGROUP8,
        };
        // Without documents the binding is never read; any tensor may stand in.
        let spans = self.spans.as_ref().unwrap_or(k);
        let reads = [q, k, v, spans];
        let [x, y, z] = self.forward_grid(kernel);
        let grid = [x * p.splits, y, z];
        if splits == 1 {
            shader.with(&self.constants()).run(p, &reads, &[&o, &stats], grid);
            return (o, stats);
        }
        let h = self.head_dim;
        let parts = Tensor::empty(gpu, [splits, rows, h], DType::F32, "attention parts");
        let lse = Tensor::empty(gpu, [splits, rows], DType::F32, "attention parts");
        shader.with(&self.constants()).run(p, &reads, &[&parts, &lse], grid);
        let sizes = [p.rows, h as u32 / 4, p.splits];
        let quads = rows * h / 4;
        COMBINE.run(&sizes, &[&parts, &lse], &[&o, &stats], fold(quads.div_ceil(64)));
        (o, stats)
    }

    fn backward(
        &self,
        kernel: AttentionKernel,
        [q, k, v]: [&Tensor; 3],
        o: &Tensor,
        stats: &Tensor,
        dy: &Tensor,
    ) -> (Tensor, Tensor, Tensor) {
        let p = &self.params;
        assert_eq!(p.capacity, p.tk, "attention: a cache has no gradient");
        let dq = q.empty_like("attention_backward_q");
        let dk = k.empty_like("attention_backward_kv");
        let dv = v.empty_like("attention_backward_kv");
        if p.tk == 0 || p.tq == 0 {
            [&dq, &dk, &dv].into_iter().for_each(|t| q.gpu().zero(t.buffer()));
            return (dq, dk, dv);
        }
        let sizes = [p.rows, self.head_dim as u32 / 4];
        BACKWARD_DOT.run(&sizes, &[dy, o], &[stats], fold((p.rows as usize).div_ceil(64)));
        let spans = self.spans.as_ref().unwrap_or(k);
        let reads = [q, k, v, spans, dy, stats];
        let (to_q, to_kv, rows, keys) = match kernel {
            AttentionKernel::Subgroup8 => (BACKWARD_Q_SUBGROUP8, BACKWARD_KV_SUBGROUP8, 32, 32),
            AttentionKernel::Tile | AttentionKernel::Few => (BACKWARD_Q, BACKWARD_KV, 64, 64),
        };
        let constants = self.constants();
        to_q.with(&constants).run(p, &reads, &[&dq], self.grid(p.tq * self.shared, rows));
        to_kv.with(&constants).run(p, &reads, &[&dk, &dv], self.grid(p.tk, keys));
        (dq, dk, dv)
    }
}

#[cfg(feature = "cases")]
pub use cases::cases;

#[cfg(feature = "cases")]
mod cases {
    use super::*;
    use crate::ops::case::{Case, Input, Tolerance};
    use crate::tensor::host::Array;

    /// The mask by brute force, straight from its definition.
    pub fn allowed(mask: Mask, length: usize, q_start: usize, q: usize, k: usize) -> bool {
        match mask {
            Mask::Full => true,
            Mask::Causal => q + q_start >= k,
            Mask::BlockCausal(b) => (q + q_start) / b >= k / b,
            Mask::TwoCopy(b) => {
                let (bq, bk) = (q % length / b, k % length / b);
                match (q < length, k < length) {
                    (true, true) => bq == bk,
                    (true, false) => bq > bk,
                    (false, false) => bq >= bk,
                    (false, true) => false,
                }
            }
        }
    }

    fn reference(x: &[Array], mask: Mask, q_start: usize, spans: Option<&[u32]>) -> Array {
        let rows = 0..x[0].data.len() / x[0].shape.last().max(1);
        let out = rows.flat_map(|row| row_of(x, mask, q_start, spans, row)).collect();
        Array::new(&x[0].shape, out)
    }

    /// One query head's output, [H].
    fn row_of(
        x: &[Array],
        mask: Mask,
        q_start: usize,
        spans: Option<&[u32]>,
        row: usize,
    ) -> Vec<f64> {
        let (q, k, v) = (&x[0], &x[1], &x[2]);
        let &[_, tq, n, h] = &*q.shape else { panic!("four axes") };
        let &[_, tk, g, _] = &*k.shape else { panic!("four axes") };
        let length = if matches!(mask, Mask::TwoCopy(_)) { tk / 2 } else { tk };
        let sees = |b: usize, i: usize, j: usize| {
            let at = (i + q_start) % length.max(1);
            let in_document = spans.is_none_or(|s| {
                let s = &s[(b * length + at) * 2..][..2];
                (s[0] as usize..s[1] as usize).contains(&(j % length))
            });
            in_document && allowed(mask, length, q_start, i, j)
        };
        let (b, i, head) = (row / (tq * n), row / n % tq, row % n);
        let at = |j: usize| ((b * tk + j) * g + head / (n / g)) * h;
        let keys: Vec<usize> = (0..tk).filter(|&j| sees(b, i, j)).collect();
        let query = &q.data[row * h..][..h];
        let dot = |j: usize| -> f64 {
            query.iter().zip(&k.data[at(j)..][..h]).map(|(a, b)| a * b).sum::<f64>()
        };
        let scores: Vec<f64> = keys.iter().map(|&j| dot(j) / (h as f64).sqrt()).collect();
        let top = scores.iter().copied().fold(f64::MIN, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
        let total: f64 = weights.iter().sum();
        let sum = |d: usize| {
            let weighed = keys.iter().zip(&weights).map(|(&j, w)| w / total * v.data[at(j) + d]);
            weighed.sum::<f64>()
        };
        (0..h).map(sum).collect()
    }

    /// Extents of one case: batch, query rows, key rows, heads, key heads, head dimension.
    type Extents = [usize; 6];

    fn case(mask: Mask, [b, tq, tk, n, g, h]: Extents, q_start: usize) -> Case {
        let inputs = [[b, tq, n, h], [b, tk, g, h], [b, tk, g, h]];
        Case::new(
            format!("attention {mask:?} b{b} q{tq}+{q_start} k{tk} heads {n}/{g}x{h}"),
            inputs.map(|s| Input::Normal(s.into())).to_vec(),
            move |t| {
                let options = AttentionOptions { q_start, ..AttentionOptions::new(mask) };
                attention(&t[0], &t[1], &t[2], &options)
            },
            move |x| reference(x, mask, q_start, None),
        )
        // Outliers make scores of some hundreds, whose f32 rounding the exponential magnifies.
        .tolerance(Tolerance { absolute: 1e-3, relative: 1e-3 })
    }

    fn documents(mask: Mask, lengths: &[u32], [b, tq, tk, n, g, h]: Extents) -> Case {
        let mut row = Vec::new();
        for &length in lengths {
            let first = row.len() as u32 / 2;
            row.extend((0..length).flat_map(|_| [first, first + length]));
        }
        let spans = row.repeat(b);
        let base = row.len() / 2;
        let values = spans.clone();
        let inputs = [[b, tq, n, h], [b, tk, g, h], [b, tk, g, h]];
        let mut inputs = inputs.map(|s| Input::Normal(s.into())).to_vec();
        inputs.push(Input::Integers([b, base, 2].into(), values));
        Case::new(
            format!("attention {mask:?} documents {lengths:?} b{b} heads {n}/{g}x{h}"),
            inputs,
            move |t| {
                let options =
                    AttentionOptions { spans: Some(t[3].clone()), ..AttentionOptions::new(mask) };
                attention(&t[0], &t[1], &t[2], &options)
            },
            move |x| reference(x, mask, 0, Some(&spans)),
        )
        .tolerance(Tolerance { absolute: 1e-3, relative: 1e-3 })
    }

    /// The same call forced through one kernel, with its keys in so many pieces.
    fn forced(
        kernel: AttentionKernel,
        splits: usize,
        mask: Mask,
        extents: Extents,
        q_start: usize,
    ) -> Case {
        let plain = case(mask, extents, q_start);
        Case {
            name: format!("{} by {kernel:?} in {splits}", plain.name),
            run: Box::new(move |t| {
                let options = AttentionOptions { q_start, ..AttentionOptions::new(mask) };
                let call = Call::new(&t[0], &t[1], &t[2], &options);
                attention_with(kernel, splits, call, &t[0], &t[1], &t[2])
            }),
            ..plain
        }
        .needs(move |gpu| kernel != AttentionKernel::Subgroup8 || gpu.has_subgroups_of(8))
    }

    /// A bench: pairs of a query and a key that it sees, times the heads, cost 4 H operations each.
    fn bench(mask: Mask, [b, tq, tk, n, g, h]: Extents, q_start: usize) -> Case {
        let pairs = match mask {
            Mask::Full => tq * tk,
            Mask::Causal => (0..tq).map(|q| q + q_start + 1).sum(),
            Mask::BlockCausal(k) => (0..tq).map(|q| ((q + q_start) / k + 1) * k).sum(),
            // Rows q of both copies together: the block before, itself, and its own noisy block.
            Mask::TwoCopy(k) => (0..tk / 2).map(|q| 2 * (q / k * k) + 2 * k).sum(),
        };
        let flops = 4.0 * (b * pairs * n * h) as f64;
        let bytes = 4.0 * (b * (2 * tq * n + 2 * tk * g) * h) as f64;
        let mut case = case(mask, [b, tq, tk, n, g, h], q_start).cost(flops, bytes);
        if tq == tk && tq <= 512 {
            // Five products instead of two; o and its cotangent besides, and three gradients.
            case = case.derivative(2.5 * flops, 2.0 * bytes + 4.0 * (b * tq * n * h) as f64);
        }
        case.sampled(move |x, at| {
            at.iter().map(|&i| row_of(x, mask, q_start, None, i / h)[i % h]).collect()
        })
    }

    /// Attention's cases.
    pub fn cases() -> Vec<Case> {
        use AttentionKernel::{Few, Subgroup8, Tile};
        use Mask::{BlockCausal, Causal, Full, TwoCopy};
        let mut cases = vec![
            case(Full, [1, 1, 1, 1, 1, 4], 0),
            case(Full, [2, 5, 70, 2, 1, 8], 0),
            case(Full, [1, 0, 3, 1, 1, 4], 0),
            case(Causal, [2, 19, 19, 4, 2, 8], 0),
            case(Causal, [1, 131, 131, 1, 1, 4], 0),
            case(Causal, [1, 11, 11, 3, 3, 4], 0),
            case(BlockCausal(4), [1, 8, 77, 2, 1, 8], 69),
            case(BlockCausal(4), [1, 18, 18, 2, 1, 8], 0),
            documents(Causal, &[3, 9, 1, 7], [2, 20, 20, 2, 1, 8]),
            documents(BlockCausal(4), &[4, 12, 4], [1, 20, 20, 2, 1, 8]),
            documents(TwoCopy(4), &[4, 8, 12], [2, 48, 48, 2, 1, 8]),
            documents(TwoCopy(4), &[5, 6, 13], [1, 48, 48, 2, 1, 8]),
            documents(TwoCopy(2), &[70, 10], [1, 160, 160, 1, 1, 4]),
        ];
        for block in [1, 2, 4, 8, 32] {
            cases.push(case(TwoCopy(block), [1, 74, 74, 2, 1, 8], 0));
        }
        // Few combinations of head dimension and shared heads: each is compiled anew, which takes the driver seconds.
        for (kernel, h) in [(Tile, 136), (Subgroup8, 72)] {
            cases.push(forced(kernel, 1, Causal, [2, 71, 71, 4, 2, 8], 0));
            cases.push(forced(kernel, 1, BlockCausal(4), [1, 37, 37, 4, 2, h], 0));
            cases.push(forced(kernel, 1, TwoCopy(4), [1, 140, 140, 2, 1, 8], 0));
            cases.push(forced(kernel, 1, TwoCopy(4), [1, 24, 24, 2, 1, h], 0));
            cases.push(forced(kernel, 3, BlockCausal(4), [2, 24, 150, 2, 1, 8], 126));
        }
        for kernel in [Tile, Few, Subgroup8] {
            cases.push(forced(kernel, 4, BlockCausal(4), [1, 4, 280, 2, 1, 8], 276));
            // More pieces than tiles of keys: some are empty.
            cases.push(forced(kernel, 5, Causal, [2, 5, 70, 4, 2, 8], 65));
        }
        cases.push(forced(Few, 1, Full, [1, 6, 70, 4, 2, 72], 0));
        // A training sequence, a block-diffusion pass over it, a decode step of one block, and a short sequence.
        for (mask, tq, tk) in [
            (Causal, 512, 512),
            (TwoCopy(4), 1024, 1024),
            (BlockCausal(4), 4, 512),
            (Causal, 192, 192),
        ] {
            cases.push(bench(mask, [1, tq, tk, 9, 3, 64], tk - tq));
        }
        // What the two-copy pass costs beside a causal one over the same sequence, where both are long.
        cases.push(bench(Causal, [1, 8192, 8192, 8, 2, 64], 0));
        cases.push(bench(TwoCopy(4), [1, 16_384, 16_384, 8, 2, 64], 0));
        for h in [64, 128] {
            let mut more = Vec::new();
            for t in [512, 1024, 2048, 4096] {
                more.push(bench(Causal, [1, t, t, 8, 2, h], 0));
                more.push(bench(TwoCopy(4), [1, t, t, 8, 2, h], 0));
            }
            for rows in [4, 16] {
                more.push(bench(BlockCausal(rows), [1, rows, 4096, 8, 2, h], 4096 - rows));
            }
            let compiled_anew = h > 64;
            let quick = |case: Case| if compiled_anew { case.full_only() } else { case };
            cases.extend(more.into_iter().map(quick));
        }
        cases
    }
}
