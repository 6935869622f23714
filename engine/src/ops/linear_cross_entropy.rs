//! The language-model head and its loss in one op, on rows that are all supervised (`gather` picks them):
//!   loss = Σ_r w[r] · (ln Σ_v exp(z[r, v]) − z[r, target[r]]) / divisor,   z = x · Wᵀ
//! Backward: g = (softmax(z) − onehot) · w / divisor · dy,   dx = g · W,   dW = gᵀ · x
//! The vocabulary is walked in chunks, so no [tokens × vocabulary] tensor exists: a chunk of logits takes at most
//! [`CHUNK_BYTES`]. Backward computes each chunk again, unless there was only one and it was kept.

use bytemuck::{Pod, Zeroable};

use super::matmul::{Layout, Target, matmul_chunk};
use crate::autograd::{Gradient, Totals};
use crate::gpu::{Kernel, fold, kernel};
use crate::ops::reduce::{pieces, row_lanes};
use crate::tensor::{DType, Tensor};

const CHUNK: Kernel = kernel!("cross_entropy_chunk");
const LOSS: Kernel = kernel!("cross_entropy_loss");
const BACKWARD: Kernel = kernel!("cross_entropy_backward");

/// Logits of one vocabulary chunk take at most this many bytes.
pub const CHUNK_BYTES: usize = 32 << 20;

/// What the rows should say.
#[derive(Clone, Debug)]
pub struct Supervision {
    /// u32 [R], each below the vocabulary.
    pub targets: Tensor,
    /// f32 [R].
    pub weights: Tensor,
    /// What the weighted sum is divided by.
    pub divisor: f32,
}

/// The loss, and what it is made of.
pub struct CrossEntropy {
    /// f32 [1], differentiable.
    pub loss: Tensor,
    /// f32 [R]: unweighted cross-entropy of each supervised row, in nats, for logs and scores.
    pub per_row: Tensor,
}

/// See the module's page. x: [.., D], R rows in all; `weight`: row shards [V_i, D] of the head, in order.
///
/// # Panics
/// If shapes or element types do not fit.
#[track_caller]
pub fn linear_cross_entropy(
    x: &Tensor,
    weight: &[Tensor],
    supervision: &Supervision,
) -> CrossEntropy {
    linear_cross_entropy_in_chunks(x, weight, supervision, CHUNK_BYTES)
}

#[track_caller]
fn linear_cross_entropy_in_chunks(
    x: &Tensor,
    weight: &[Tensor],
    supervision: &Supervision,
    chunk_bytes: usize,
) -> CrossEntropy {
    let Supervision { targets, weights, .. } = supervision;
    let [r, d] = x.shape().matrix();
    let fits = weight.iter().all(|w| w.shape().len() == 2 && w.shape().last() == d)
        && (targets.numel(), weights.numel()) == (r, r)
        && targets.dtype() == DType::U32;
    assert!(fits, "linear_cross_entropy: x {}, weight {weight:?}, {supervision:?}", x.shape());
    let op = "linear_cross_entropy";
    let gpu = x.gpu();
    let head = Head {
        shards: weight.iter().map(Tensor::detach).collect(),
        supervision: supervision.clone(),
        x: x.detach().reshape([r, d]),
        state: Tensor::empty(gpu, [r, 3], DType::F32, op),
        chunk_bytes,
    };
    let mut kept = None;
    let chunks = head.chunks();
    for chunk in &chunks {
        let logits = head.logits(chunk);
        let (n, wide) = pieces(chunk.len);
        let (columns, first) = (chunk.len as u32, chunk.first as u32);
        let params = ChunkParams { rows: r as u32, pieces: n as u32, columns, first, zero: 0.0 };
        let constants = [row_lanes(gpu, chunk.len), wide];
        CHUNK.with(&constants).run(&params, &[&logits, targets], &[&head.state], fold(r));
        kept = (chunks.len() == 1).then_some(logits);
    }
    let per_row = Tensor::empty(gpu, [r], DType::F32, op);
    let loss = Tensor::zeros(gpu, [1], DType::F32, op);
    let params = LossParams { rows: r as u32, scale: 1.0 / supervision.divisor, zero: 0.0 };
    LOSS.run(&params, &[&head.state, weights], &[&per_row, &loss], [1, 1, 1]);
    let shape = x.shape().clone();
    let tracked: Vec<bool> = weight.iter().map(Tensor::is_tracked).collect();
    let inputs: Vec<&Tensor> = [x].into_iter().chain(weight).collect();
    let loss = loss.record_onto(op, &inputs, move |dy, totals| {
        let (dx, dw) = head.backward(dy, kept, &tracked, &totals[1..]);
        [Some(Gradient::Own(dx.reshape(shape)))].into_iter().chain(dw).collect()
    });
    CrossEntropy { loss, per_row }
}

/// A piece of one shard: `len` rows from `row`, whose first is `first` of the whole vocabulary.
struct Chunk {
    shard: usize,
    row: usize,
    len: usize,
    first: usize,
}

struct Head {
    shards: Vec<Tensor>,
    supervision: Supervision,
    /// [R, D]
    x: Tensor,
    state: Tensor,
    chunk_bytes: usize,
}

impl Head {
    /// Chunks never cross shards; their lengths are multiples of four where the shard allows.
    fn chunks(&self) -> Vec<Chunk> {
        let rows = self.x.shape()[0].max(1);
        let binding = self.x.gpu().max_binding() as usize;
        let most = (self.chunk_bytes.min(binding) / (4 * rows)).max(4) & !3;
        let mut chunks = Vec::new();
        let mut before = 0;
        for (shard, weight) in self.shards.iter().enumerate() {
            let rows = weight.shape()[0];
            for row in (0..rows).step_by(most) {
                chunks.push(Chunk { shard, row, len: most.min(rows - row), first: before + row });
            }
            before += rows;
        }
        chunks
    }

    fn logits(&self, chunk: &Chunk) -> Tensor {
        let x = &self.x;
        let shape = [x.shape()[0], chunk.len];
        let y = Tensor::empty(x.gpu(), shape, DType::F32, "linear_cross_entropy");
        let target = Target { y: &y, row: 0, b_row: chunk.row, add: false };
        matmul_chunk(x, &self.shards[chunk.shard], chunk.len, Layout::NT, &target);
        y
    }

    /// Gradients of the rows and of each tracked shard.
    fn backward(
        &self,
        dy: &Tensor,
        mut kept: Option<Tensor>,
        tracked: &[bool],
        totals: Totals<'_>,
    ) -> (Tensor, Vec<Option<Gradient>>) {
        let Supervision { targets, weights, divisor, .. } = &self.supervision;
        let dx = self.x.empty_like("linear_cross_entropy");
        let fresh =
            |w: &Tensor| Tensor::empty(w.gpu(), w.shape(), DType::F32, "linear_cross_entropy");
        let shards = self.shards.iter().zip(totals).zip(tracked);
        let dw: Vec<Option<Tensor>> = shards
            .map(|((w, total), t)| t.then(|| total.clone().unwrap_or_else(|| fresh(w))))
            .collect();
        for chunk in self.chunks() {
            let g = kept.take().unwrap_or_else(|| self.logits(&chunk));
            let (pieces, wide) = pieces(chunk.len);
            let params = BackwardParams {
                rows: g.shape()[0] as u32,
                pieces: pieces as u32,
                first: chunk.first as u32,
                scale: 1.0 / divisor,
            };
            let reads = [&self.state, targets, weights, dy];
            let [x, y, _] = fold(g.shape()[0]);
            BACKWARD.with(&[wide]).run(
                &params,
                &reads,
                &[&g],
                [x, y, pieces.div_ceil(1024) as u32],
            );
            let w = &self.shards[chunk.shard];
            let into = Target { y: &dx, row: 0, b_row: chunk.row, add: chunk.first > 0 };
            matmul_chunk(&g, w, chunk.len, Layout::NN, &into);
            if let Some(dw) = &dw[chunk.shard] {
                let add = totals[chunk.shard].is_some();
                let into = Target { y: dw, row: chunk.row, b_row: 0, add };
                matmul_chunk(&g, &self.x, self.x.shape()[0], Layout::TN, &into);
            }
        }
        let gradient = |(dw, total): (Tensor, &Option<Tensor>)| match total {
            Some(_) => Gradient::Added,
            None => Gradient::Own(dw),
        };
        (dx, dw.into_iter().zip(totals).map(|(dw, t)| Some(gradient((dw?, t)))).collect())
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ChunkParams {
    rows: u32,
    pieces: u32,
    columns: u32,
    first: u32,
    /// 0, which compilers do not know.
    zero: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct LossParams {
    rows: u32,
    scale: f32,
    /// 0, which compilers do not know.
    zero: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct BackwardParams {
    rows: u32,
    pieces: u32,
    first: u32,
    scale: f32,
}

#[cfg(feature = "cases")]
pub use cases::cases;

#[cfg(feature = "cases")]
mod cases {
    use super::*;
    use crate::ops::case::{Case, Input, Tolerance};
    use crate::tensor::host::Array;

    /// Extents of one case: rows, D, the head's shards, bytes of a chunk.
    fn case(r: usize, d: usize, shards: &[usize], chunk_bytes: usize) -> Case {
        let vocabulary: usize = shards.iter().sum();
        // Targets all over the vocabulary, its ends included.
        let targets: Vec<u32> = (0..r).map(|i| (i * 7 % vocabulary) as u32).collect();
        let weights: Vec<f32> = (0..r).map(|i| [1.0, 4.0, 0.0, 1.5][i % 4]).collect();
        let divisor = r as f32 + 2.0;
        let mut inputs = vec![Input::Normal([r, d].into())];
        inputs.extend(shards.iter().map(|&v| Input::Normal([v, d].into())));
        let (targets_u32, weights_f32) = (targets.clone(), weights.clone());
        let run = move |inputs: &[Tensor]| {
            let gpu = inputs[0].gpu();
            let supervision = Supervision {
                targets: Tensor::from_u32(gpu, &targets_u32, [r]),
                weights: Tensor::from_f32(gpu, &weights_f32, [r]),
                divisor,
            };
            linear_cross_entropy_in_chunks(&inputs[0], &inputs[1..], &supervision, chunk_bytes).loss
        };
        let reference = move |x: &[Array]| {
            let head: Vec<&[f64]> = x[1..].iter().flat_map(Array::rows).collect();
            let mut loss = 0.0;
            for ((hidden, &target), &w) in x[0].rows().zip(&targets).zip(&weights) {
                let dot = |v: &&[f64]| v.iter().zip(hidden).map(|(a, b)| a * b).sum::<f64>();
                let z: Vec<f64> = head.iter().map(dot).collect();
                let top = z.iter().copied().fold(f64::MIN, f64::max);
                let lse = top + z.iter().map(|z| (z - top).exp()).sum::<f64>().ln();
                loss += f64::from(w) * (lse - z[target as usize]);
            }
            Array::new([1], vec![loss / f64::from(divisor)])
        };
        Case::new(
            format!("linear_cross_entropy {r} rows d{d} shards {shards:?} chunk {chunk_bytes}"),
            inputs,
            run,
            reference,
        )
        .tolerance(Tolerance::SUM)
    }

    /// The cases of the fused head and loss.
    pub fn cases() -> Vec<Case> {
        let bench = |r: usize, d: usize, shards: &[usize]| {
            let v = shards.iter().sum::<usize>();
            let (flops, weight) = (2.0 * (r * d * v) as f64, 4.0 * (d * v) as f64);
            let case = case(r, d, shards, CHUNK_BYTES).cost(flops, weight);
            // Logits are computed once more where they are not kept; two products, and dW is written.
            let kept = 4 * r * v <= CHUNK_BYTES;
            let again = if kept { 2.0 } else { 3.0 };
            // Beyond, the reference for the check takes minutes.
            if v <= 49_152 { case.derivative(again * flops, 2.0 * weight) } else { case }
        };
        vec![
            case(1, 4, &[1], CHUNK_BYTES),
            case(7, 8, &[24], CHUNK_BYTES),
            case(7, 6, &[23], CHUNK_BYTES),
            case(4, 8, &[13, 8, 20], CHUNK_BYTES),
            case(4, 8, &[29, 12], 4 * 4 * 8),
            case(0, 8, &[12], CHUNK_BYTES),
            bench(256, 576, &[49_152]),
            // The vocabulary of Seed-Coder: memory must be that of the smaller one.
            bench(256, 576, &[51_712; 3]),
            bench(24, 576, &[8192]),
        ]
    }
}
