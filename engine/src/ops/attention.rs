//! Grouped-query attention, flash style: scores are never stored.
//!   o[q] = Σ_k softmax_k(q·k / √H) v[k]   over the keys that the mask allows
//! Backward recomputes the weights p from the saved log-sum-exp; with dots = Σ_d dy ⊙ o:
//!   ds = p ⊙ (dy·v − dots)    dq = Σ_k ds k / √H    dk = Σ_q ds q / √H    dv = Σ_q p dy
//! q, o: [B, Tq, N, H]   k, v: [B, Tk, G, H]   N a multiple of G, query head n reads key head n / (N / G).
//! Decoding (`attention_cached`) has rows of several sequences for q and slots of one cache for k and v.
//! The mask is numbers (shaders/shared/mask.wgsl); tiles that it forbids whole are not visited.

use bytemuck::{Pod, Zeroable};

use crate::gpu::{Gpu, Kernel, fold, kernel};
use crate::tensor::{DType, Tensor};

const TILE: Kernel = kernel!("attention");
const FEW: Kernel = kernel!("attention_few");
const SUBGROUP8: Kernel = kernel!("attention_subgroup8");
const FEW_SUBGROUP8: Kernel = kernel!("attention_few_subgroup8");
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

/// Pieces of the keys that a GPU works on side by side for a few rows over a cache.
const PIECES: usize = 8;

/// The kernels that can do the work; each is held to the same cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionKernel {
    /// 64 query rows × 32 keys through workgroup memory.
    Tile,
    /// At most 16 query rows (decoding), lanes along the keys; its backward pass is that of `Tile`.
    Few,
    /// Broadcasts inside subgroups of eight, for software adapters; head dimensions up to 128, multiples of 8.
    Subgroup8,
    /// The same for a few rows (decoding); its backward pass is that of `Subgroup8`.
    FewSubgroup8,
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
}

impl AttentionOptions {
    /// Only a mask.
    pub fn new(mask: Mask) -> Self {
        AttentionOptions { mask, spans: None }
    }
}

/// The rows by which one sequence of a cache goes on, and where its tokens lie there. The rows' own keys must be in
/// the cache when they attend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lane {
    /// Its first row among those of all sequences.
    pub row: usize,
    /// How many rows it has, at least 1.
    pub rows: usize,
    /// The first row's position.
    pub position: usize,
    /// Tokens in a block: a row sees its own block and the ones before it. 1 is the causal mask, 0 no mask.
    pub block: usize,
    /// Slot of the sequence's first token, and how many of its tokens lie from there on: a prefix that other sequences
    /// may share.
    pub prefix: (usize, usize),
    /// Slot of the token behind the prefix.
    pub slot: usize,
    /// Tokens of the text that the rotary frequencies go by, of models where they depend on it; 0 for those up to the
    /// last row.
    pub length: usize,
}

impl Lane {
    /// Slot of the token at a position.
    pub fn slot_of(&self, position: usize) -> usize {
        let (first, n) = self.prefix;
        if position < n { first + position } else { self.slot + position - n }
    }

    /// Position behind the last row.
    pub fn end(&self) -> usize {
        self.position + self.rows
    }
}

/// The sequences of a forward pass over a cache, on the device.
#[derive(Clone, Debug)]
pub struct Lanes {
    /// u32 [S, 8], as shaders/shared/mask.wgsl reads it.
    table: Tensor,
    /// u32 [R, 2]: position and slot of each row.
    places: Tensor,
    /// Rows of all sequences.
    rows: usize,
    /// Rows of the sequence with the most.
    most_rows: usize,
    /// Slots that are reached.
    slots: usize,
    /// Rows of each sequence, and tokens of its text that the rotary frequencies go by.
    lengths: Vec<(usize, usize)>,
    /// Pieces of the keys that are worked on side by side. A fixed number, because another one is another order of
    /// sums, and a sequence's numbers should not depend on its company.
    pieces: usize,
}

impl Lanes {
    /// Uploads them. Their rows lie one behind the other.
    ///
    /// # Panics
    /// If a lane has no rows, or the rows are not in order.
    #[track_caller]
    pub fn new(gpu: &Gpu, lanes: &[Lane]) -> Lanes {
        let mut rows = 0;
        let (mut table, mut places) = (Vec::new(), Vec::new());
        for lane in lanes {
            assert!(lane.rows > 0 && lane.row == rows, "lanes {lanes:?}");
            rows += lane.rows;
            places.extend(
                (lane.position..lane.end()).flat_map(|at| [at as u32, lane.slot_of(at) as u32]),
            );
            let Lane { row, rows, position, block, prefix, slot, .. } = *lane;
            table.extend(
                [row, rows, position, block, prefix.0, prefix.1, slot, 0].map(|n| n as u32),
            );
        }
        let reached =
            |lane: &Lane| (lane.prefix.0 + lane.prefix.1).max(lane.slot_of(lane.end() - 1) + 1);
        Lanes {
            table: Tensor::from_u32(gpu, &table, [lanes.len(), 8]),
            places: Tensor::from_u32(gpu, &places, [rows, 2]),
            rows,
            most_rows: lanes.iter().map(|lane| lane.rows).max().unwrap_or(0),
            slots: lanes.iter().map(reached).max().unwrap_or(0),
            lengths: lanes.iter().map(|lane| (lane.rows, lane.length.max(lane.end()))).collect(),
            pieces: if gpu.adapter().is_software() { 1 } else { PIECES },
        }
    }

    /// The same with the keys in one piece, for passes of many rows: where pieces end depends on which rows lie in a
    /// tile, hence on where a prompt's reading began.
    pub fn of_many_rows(self) -> Lanes {
        Lanes { pieces: 1, ..self }
    }

    /// Position and slot of each row: u32 [R, 2].
    pub fn places(&self) -> &Tensor {
        &self.places
    }

    /// Rows of each sequence, and tokens of its text that the rotary frequencies go by.
    pub fn lengths(&self) -> &[(usize, usize)] {
        &self.lengths
    }

    /// Slots that are reached.
    pub fn slots(&self) -> usize {
        self.slots
    }
}

impl Mask {
    /// Tokens in a block, as a [`Lane`] has it; `None` for the two-copy mask.
    pub fn block(self) -> Option<usize> {
        match self {
            Mask::Full => Some(0),
            Mask::Causal => Some(1),
            Mask::BlockCausal(block) => Some(block),
            Mask::TwoCopy(_) => None,
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    tq: u32,
    tk: u32,
    kv_heads: u32,
    mask: u32,
    block: u32,
    length: u32,
    scale: f32,
    rows: u32,
    splits: u32,
    /// 0, for `weigh`.
    zero: f32,
}

/// See the module's page. Gradients flow into q, k and v.
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

/// Attention of rows that continue sequences, over a cache that holds their keys and values: q, o: [1, R, N, H],
/// k, v: [1, slots, G, H], f32 or f16. Not differentiable.
///
/// # Panics
/// As [`attention`], and if the lanes' rows are not those of q or reach past the cache.
#[track_caller]
pub fn attention_cached(q: &Tensor, k: &Tensor, v: &Tensor, lanes: &Lanes) -> Tensor {
    let call = Call::cached(q, k, v, lanes);
    let kernel = choose(q.gpu(), &call);
    let (o, _) = call.forward(kernel, lanes.pieces, q, k, v);
    o.record_none("attention_cached", &[q, k, v])
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
    assert_eq!(k.dtype(), DType::F32, "attention: only cached keys may be of another type");
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
    let tokens = gpu.rows().unwrap_or(call.tile_tokens as usize);
    let rows = tokens * call.shared as usize;
    if eights && call.head_dim.is_multiple_of(8) && call.head_dim <= SUBGROUP8_HEAD_DIM {
        // A row has the same bits whatever tile it lies in.
        let few = if call.cached { tokens <= FEW_ROWS } else { rows <= FEW_ROWS };
        if few { AttentionKernel::FewSubgroup8 } else { AttentionKernel::Subgroup8 }
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
    /// Whether the rows are those of sequences, told by `spans`.
    cached: bool,
    /// Query tokens that one batch entry, or one sequence, has at most.
    tile_tokens: u32,
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
        let (&[batch, tq, heads, h], &[kb, tk, kv_heads, kh]) = (&**q.shape(), &**k.shape()) else {
            fail("q, k and v have four axes")
        };
        if k.shape() != v.shape() || (kb, kh) != (batch, h) {
            fail("shapes do not fit");
        }
        if q.dtype() != DType::F32 || k.dtype() != v.dtype() {
            fail("q must be f32, k and v of one type");
        }
        if kv_heads == 0 || heads % kv_heads != 0 || h % 4 != 0 || h > MOST_HEAD_DIM {
            fail("heads must be a multiple of key heads, head dimension a multiple of 4 up to 192");
        }
        let (mask, block, length) = match options.mask {
            Mask::Full => (0, 1, tk),
            Mask::Causal => (1, 1, tk),
            Mask::BlockCausal(block) => (1, block, tk),
            Mask::TwoCopy(block) => (2, block, tk / 2),
        };
        let two_copy = mask == 2;
        if block == 0 || (two_copy && (tq != tk || !tk.is_multiple_of(2))) {
            fail("mask does not fit");
        }
        if tq > tk && mask == 1 {
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
            mask,
            block: block as u32,
            length: length as u32,
            scale: 1.0 / (h as f32).sqrt(),
            rows: (batch * tq * heads) as u32,
            splits: 1,
            zero: 0.0,
        };
        let shared = (heads / kv_heads) as u32;
        let spans = options.spans.clone();
        Call { params, batch, head_dim: h, shared, spans, cached: false, tile_tokens: tq as u32 }
    }

    #[track_caller]
    fn cached(q: &Tensor, k: &Tensor, v: &Tensor, lanes: &Lanes) -> Call {
        let call = Call::new(q, k, v, &AttentionOptions::new(Mask::Full));
        let [_, rows, ..] = **q.shape() else { unreachable!("four axes") };
        let fits = call.batch == 1 && rows == lanes.rows && lanes.slots <= call.params.tk as usize;
        assert!(fits, "attention_cached: q {}, k {}, {lanes:?}", q.shape(), k.shape());
        Call {
            batch: lanes.table.shape()[0],
            spans: Some(lanes.table.clone()),
            cached: true,
            tile_tokens: lanes.most_rows as u32,
            ..call
        }
    }

    fn constants(&self) -> [(&'static str, u32); 3] {
        let spans = if self.cached { 2 } else { u32::from(self.spans.is_some()) };
        [("H", self.head_dim as u32), ("SPANS", spans), ("SHARED", self.shared)]
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
            AttentionKernel::FewSubgroup8 => 4 * self.quads(),
        };
        self.grid(self.tile_tokens * self.shared, rows)
    }

    /// Row quads in a tile of [`AttentionKernel::FewSubgroup8`]: at most four, and as few idle ones as may be.
    fn quads(&self) -> u32 {
        let quads = (self.tile_tokens * self.shared).div_ceil(4).max(1);
        quads.div_ceil(quads.div_ceil(4))
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
            AttentionKernel::FewSubgroup8 => FEW_SUBGROUP8,
        };
        let [h, spans, shared] = self.constants();
        let constants = [h, spans, shared, ("QUADS", self.quads())];
        let own = usize::from(kernel == AttentionKernel::FewSubgroup8);
        let keys = [("keys", k.dtype().keys_import())];
        let shader = shader.with(&constants[..3 + own]).import(&keys);
        // Without documents the binding is never read; any tensor may stand in.
        let spans = self.spans.as_ref().unwrap_or(k);
        let reads = [q, k, v, spans];
        let [x, y, z] = self.forward_grid(kernel);
        let grid = [x * p.splits, y, z];
        if splits == 1 {
            shader.run(p, &reads, &[&o, &stats], grid);
            return (o, stats);
        }
        let h = self.head_dim;
        let parts = Tensor::empty(gpu, [splits, rows, h], DType::F32, "attention parts");
        let lse = Tensor::empty(gpu, [splits, rows], DType::F32, "attention parts");
        shader.run(p, &reads, &[&parts, &lse], grid);
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
            AttentionKernel::Subgroup8 | AttentionKernel::FewSubgroup8 => {
                (BACKWARD_Q_SUBGROUP8, BACKWARD_KV_SUBGROUP8, 32, 32)
            }
            AttentionKernel::Tile | AttentionKernel::Few => (BACKWARD_Q, BACKWARD_KV, 64, 64),
        };
        let constants = self.constants();
        to_q.with(&constants).run(p, &reads, &[&dq], self.grid(p.tq * self.shared, rows));
        to_kv.with(&constants).run(p, &reads, &[&dk, &dv], self.grid(p.tk, keys));
        (dq, dk, dv)
    }
}

#[cfg(feature = "cases")]
mod cases;
#[cfg(feature = "cases")]
pub use cases::cases;
