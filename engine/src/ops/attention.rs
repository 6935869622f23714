//! Grouped-query attention, flash style: scores are never stored.
//!   o[q] = Σ_k softmax_k(q·k / √H) v[k]   over the keys that the mask allows
//! Backward recomputes the weights p from the saved log-sum-exp; with dots = Σ_d dy ⊙ o:
//!   ds = p ⊙ (dy·v − dots)    dq = Σ_k ds k / √H    dk = Σ_q ds q / √H    dv = Σ_q p dy
//! q, o: [B, Tq, N, H]   k, v: [B, Tk, G, H]   N a multiple of G, query head n reads key head n / (N / G).
//! The mask is numbers (shaders/shared/mask.wgsl); tiles that it forbids whole are not visited.

use bytemuck::{Pod, Zeroable};

use crate::gpu::{Kernel, fold, kernel};
use crate::tensor::{DType, Tensor};

const FORWARD: Kernel = kernel!("attention");
const BACKWARD_DOT: Kernel = kernel!("attention_backward_dot");
const BACKWARD_Q: Kernel = kernel!("attention_backward_q");
const BACKWARD_KV: Kernel = kernel!("attention_backward_kv");

/// The largest head dimension: tiles of eight rows then take 16 KiB of workgroup memory, what every device has.
pub const MOST_HEAD_DIM: usize = 192;

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
    heads: u32,
    kv_heads: u32,
    capacity: u32,
    mask: u32,
    block: u32,
    length: u32,
    q_start: u32,
    scale: f32,
    stats: u32,
}

/// See the module's page. Gradients flow into q, k and v, unless the keys come from a cache.
///
/// # Panics
/// If shapes do not fit, a head dimension is no multiple of 4 or above [`MOST_HEAD_DIM`], or a block length is zero.
#[track_caller]
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions) -> Tensor {
    let call = Call::new(q, k, v, options);
    let (o, stats) = call.forward(q, k, v);
    let (kq, kk, kv) = (q.detach(), k.detach(), v.detach());
    let kept = o.detach();
    o.record("attention", &[q, k, v], move |dy| {
        let (dq, dk, dv) = call.backward(&kq, &kk, &kv, &kept, &stats, dy);
        vec![Some(dq), Some(dk), Some(dv)]
    })
}

/// One call's numbers, kept for the backward pass.
struct Call {
    params: Params,
    batch: usize,
    head_dim: usize,
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
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            capacity: capacity as u32,
            mask,
            block: block as u32,
            length: length as u32,
            q_start: options.q_start as u32,
            scale: 1.0 / (h as f32).sqrt(),
            stats: (batch * tq * heads) as u32,
        };
        Call { params, batch, head_dim: h, spans: options.spans.clone() }
    }

    fn constants(&self) -> [(&'static str, u32); 2] {
        [("H", self.head_dim as u32), ("HAS_SPANS", u32::from(self.spans.is_some()))]
    }

    /// Workgroups over tiles of eight rows; tiles do not cross the border of the two copies.
    fn grid(&self, rows: u32, heads: u32) -> [u32; 3] {
        let halves = if self.params.mask == 2 { 2 } else { 1 };
        [(rows / halves).div_ceil(8) * halves, heads, self.batch as u32]
    }

    fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> (Tensor, Tensor) {
        let p = &self.params;
        let o = q.empty_like("attention");
        let rows = [2, self.batch, p.tq as usize, p.heads as usize];
        let stats = Tensor::empty(q.gpu(), rows, DType::F32, "attention");
        if p.tk == 0 {
            q.gpu().zero(o.buffer());
            return (o, stats);
        }
        // Without documents the binding is never read; any tensor may stand in.
        let spans = self.spans.as_ref().unwrap_or(k);
        FORWARD.with(&self.constants()).run(
            p,
            &[q, k, v, spans],
            &[&o, &stats],
            self.grid(p.tq, p.heads),
        );
        (o, stats)
    }

    fn backward(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        o: &Tensor,
        stats: &Tensor,
        dy: &Tensor,
    ) -> (Tensor, Tensor, Tensor) {
        let p = &self.params;
        assert_eq!(p.capacity, p.tk, "attention: a cache has no gradient");
        let dq = q.empty_like("attention_backward_q");
        let dk = k.empty_like("attention_backward_kv");
        let dv = v.empty_like("attention_backward_kv");
        if p.tk == 0 {
            q.gpu().zero(dq.buffer());
            return (dq, dk, dv);
        }
        let rows = p.stats as usize;
        let sizes = [rows as u32, self.head_dim as u32 / 4];
        BACKWARD_DOT.run(&sizes, &[dy, o], &[stats], fold(rows.div_ceil(64)));
        let spans = self.spans.as_ref().unwrap_or(k);
        let reads = [q, k, v, spans, dy, stats];
        let constants = self.constants();
        BACKWARD_Q.with(&constants).run(p, &reads, &[&dq], self.grid(p.tq, p.heads));
        BACKWARD_KV.with(&constants).run(p, &reads, &[&dk, &dv], self.grid(p.tk, p.kv_heads));
        if p.tq == 0 {
            q.gpu().zero(dk.buffer());
            q.gpu().zero(dv.buffer());
        }
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

    /// A case with a cost: `pairs` queries and keys of one head that see each other.
    fn bench(mask: Mask, extents: Extents, q_start: usize, pairs: f64) -> Case {
        let [b, tq, tk, n, g, h] = extents;
        let flops = 4.0 * pairs * (b * n * h) as f64;
        let bytes = 8.0 * (b * h * (tq * n + tk * g)) as f64;
        case(mask, extents, q_start).cost(flops, bytes).sampled(move |x, at| {
            let one = |&i: &usize| row_of(x, mask, q_start, None, i / h)[i % h];
            at.iter().map(one).collect()
        })
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

    /// Attention's cases.
    pub fn cases() -> Vec<Case> {
        use Mask::{BlockCausal, Causal, Full, TwoCopy};
        let mut cases = vec![
            case(Full, [1, 1, 1, 1, 1, 4], 0),
            case(Full, [2, 5, 70, 2, 1, 8], 0),
            case(Full, [1, 0, 3, 1, 1, 4], 0),
            case(Causal, [2, 19, 19, 4, 2, 8], 0),
            case(Causal, [1, 131, 131, 1, 1, 4], 0),
            case(Causal, [1, 9, 9, 3, 1, 132], 0),
            case(Causal, [1, 11, 11, 3, 3, 64], 0),
            case(BlockCausal(4), [1, 8, 77, 2, 1, 8], 69),
            case(BlockCausal(4), [1, 18, 18, 2, 1, 8], 0),
            documents(Causal, &[3, 9, 1, 7], [2, 20, 20, 2, 1, 8]),
            documents(BlockCausal(4), &[4, 12, 4], [1, 20, 20, 2, 1, 8]),
            documents(TwoCopy(4), &[4, 8, 12], [2, 48, 48, 2, 1, 8]),
            documents(TwoCopy(2), &[70, 10], [1, 160, 160, 1, 1, 4]),
        ];
        for block in [1, 2, 4, 8, 32] {
            cases.push(case(TwoCopy(block), [1, 74, 74, 2, 1, 8], 0));
        }
        // A training sequence, a block-diffusion pass over it, a decode step of one block, and a short sequence.
        let extents = |tq, tk| [1, tq, tk, 9, 3, 64];
        cases.extend([
            bench(Causal, extents(512, 512), 0, (512 * 513 / 2) as f64),
            bench(TwoCopy(4), extents(1024, 1024), 0, (512 * (512 + 4)) as f64),
            bench(BlockCausal(4), extents(4, 512), 508, (4 * 512) as f64),
            bench(Causal, extents(192, 192), 0, (192 * 193 / 2) as f64),
        ]);
        cases
    }
}
