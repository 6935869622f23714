//! Attention's cases: masks, documents, and sequences over a cache, through every kernel.

use super::{AttentionKernel, AttentionOptions, Call, Lane, Lanes, Mask};
use super::{attention, attention_cached, attention_with};
use crate::gpu::Gpu;
use crate::ops::case::{Case, Input, Tolerance};
use crate::tensor::host::Array;
use crate::tensor::{DType, Shape};

/// Who sees whom, by brute force.
#[derive(Clone)]
enum View {
    /// A mask, with the spans of documents.
    Mask(Mask, Option<Vec<u32>>),
    /// Sequences over a cache.
    Lanes(Vec<Lane>),
}

impl View {
    /// The keys that query row `i` of batch entry `b` sees, of `tk`.
    fn keys(&self, b: usize, i: usize, tk: usize) -> Vec<usize> {
        match self {
            View::Mask(mask, spans) => {
                let length = if matches!(mask, Mask::TwoCopy(_)) { tk / 2 } else { tk };
                let in_document = |j: usize| {
                    spans.as_ref().is_none_or(|s| {
                        let s = &s[(b * length + i % length) * 2..][..2];
                        (s[0] as usize..s[1] as usize).contains(&(j % length))
                    })
                };
                (0..tk).filter(|&j| allowed(*mask, length, i, j) && in_document(j)).collect()
            }
            View::Lanes(lanes) => {
                let lane = lanes.iter().find(|l| (l.row..l.row + l.rows).contains(&i));
                let lane = lane.expect("each row is of a lane");
                let at = lane.position + i - lane.row;
                let seen = |j: &usize| lane.block == 0 || at / lane.block >= j / lane.block;
                (0..lane.end()).filter(seen).map(|j| lane.slot_of(j)).collect()
            }
        }
    }
}

/// A mask straight from its definition.
fn allowed(mask: Mask, length: usize, q: usize, k: usize) -> bool {
    match mask {
        Mask::Full => true,
        Mask::Causal => q >= k,
        Mask::BlockCausal(b) => q / b >= k / b,
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

fn reference(x: &[Array], view: &View) -> Array {
    let rows = 0..x[0].data.len() / x[0].shape.last().max(1);
    let out = rows.flat_map(|row| row_of(x, view, row)).collect();
    Array::new(&x[0].shape, out)
}

/// One query head's output, [H].
fn row_of(x: &[Array], view: &View, row: usize) -> Vec<f64> {
    let (q, k, v) = (&x[0], &x[1], &x[2]);
    let &[_, tq, n, h] = &*q.shape else { panic!("four axes") };
    let &[_, tk, g, _] = &*k.shape else { panic!("four axes") };
    let (b, i, head) = (row / (tq * n), row / n % tq, row % n);
    let at = |j: usize| ((b * tk + j) * g + head / (n / g)) * h;
    let keys = view.keys(b, i, tk);
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

/// Outliers make scores of some hundreds, whose f32 rounding the exponential magnifies.
const TOLERANCE: Tolerance = Tolerance { absolute: 1e-3, relative: 1e-3 };

/// Extents of one case: batch, query rows, key rows, heads, key heads, head dimension.
type Extents = [usize; 6];

fn inputs([b, tq, tk, n, g, h]: Extents) -> Vec<Input> {
    [[b, tq, n, h], [b, tk, g, h], [b, tk, g, h]].map(|s| Input::Normal(s.into())).to_vec()
}

fn case(mask: Mask, extents: Extents) -> Case {
    let [b, tq, tk, n, g, h] = extents;
    let view = View::Mask(mask, None);
    Case::new(
        format!("attention {mask:?} b{b} q{tq} k{tk} heads {n}/{g}x{h}"),
        inputs(extents),
        move |t| attention(&t[0], &t[1], &t[2], &AttentionOptions::new(mask)),
        move |x| reference(x, &view),
    )
    .tolerance(TOLERANCE)
}

fn documents(mask: Mask, lengths: &[u32], extents: Extents) -> Case {
    let [b, _, _, n, g, h] = extents;
    let mut row = Vec::new();
    for &length in lengths {
        let first = row.len() as u32 / 2;
        row.extend((0..length).flat_map(|_| [first, first + length]));
    }
    let spans = row.repeat(b);
    let base = row.len() / 2;
    let mut inputs = inputs(extents);
    inputs.push(Input::Integers(Shape::from([b, base, 2]), spans.clone()));
    let view = View::Mask(mask, Some(spans));
    Case::new(
        format!("attention {mask:?} documents {lengths:?} b{b} heads {n}/{g}x{h}"),
        inputs,
        move |t| {
            let options = AttentionOptions { mask, spans: Some(t[3].clone()) };
            attention(&t[0], &t[1], &t[2], &options)
        },
        move |x| reference(x, &view),
    )
    .tolerance(TOLERANCE)
}

/// Whether a device has what a kernel is made of.
fn runs(kernel: AttentionKernel, gpu: &Gpu) -> bool {
    use AttentionKernel::{Few, FewSubgroup8, Subgroup8, Tile};
    match kernel {
        Tile | Few => true,
        Subgroup8 | FewSubgroup8 => gpu.has_subgroups_of(8),
    }
}

/// The same call forced through one kernel, with its keys in so many pieces.
fn forced(kernel: AttentionKernel, splits: usize, mask: Mask, extents: Extents) -> Case {
    let plain = case(mask, extents);
    Case {
        name: format!("{} by {kernel:?} in {splits}", plain.name),
        run: Box::new(move |t| {
            let call = Call::new(&t[0], &t[1], &t[2], &AttentionOptions::new(mask));
            attention_with(kernel, splits, call, &t[0], &t[1], &t[2])
        }),
        ..plain
    }
    .needs(move |gpu| runs(kernel, gpu))
}

/// Rows, position, block, prefix and slot of each sequence.
type Told<'a> = &'a [(usize, usize, usize, (usize, usize), usize)];

fn lanes(told: Told<'_>) -> Vec<Lane> {
    let mut row = 0;
    let lane = |&(rows, position, block, prefix, slot): &_| {
        row += rows;
        Lane { row: row - rows, rows, position, block, prefix, slot, length: 0 }
    };
    told.iter().map(lane).collect()
}

/// Rows of sequences over a cache, forced through one kernel with the keys in so many pieces if told so.
fn cached(told: Told<'_>, [n, g, h]: [usize; 3], by: Option<(AttentionKernel, usize)>) -> Case {
    let lanes = lanes(told);
    let rows = lanes.iter().map(|l| l.rows).sum();
    let reached = lanes.iter().map(|l| l.slot_of(l.end() - 1).max(l.prefix.0 + l.prefix.1));
    let slots = reached.max().unwrap_or(0) + 3;
    let view = View::Lanes(lanes.clone());
    Case::new(
        format!("attention_cached {told:?} heads {n}/{g}x{h} by {by:?}"),
        inputs([1, rows, slots, n, g, h]),
        move |t| {
            let [q, k, v] = [0, 1, 2].map(|i| t[i].detach());
            let lanes = Lanes::new(q.gpu(), &lanes);
            let Some((kernel, splits)) = by else { return attention_cached(&q, &k, &v, &lanes) };
            let (o, _) = Call::cached(&q, &k, &v, &lanes).forward(kernel, splits, &q, &k, &v);
            o.record_none("attention_cached", &[&q, &k, &v])
        },
        move |x| reference(x, &view),
    )
    .tolerance(TOLERANCE)
    .needs(move |gpu| by.is_none_or(|(kernel, _)| runs(kernel, gpu)))
}

/// The same over a cache in f16.
fn cached_in_f16(told: Told<'_>, heads: [usize; 3], by: Option<(AttentionKernel, usize)>) -> Case {
    let mut case = cached(told, heads, by);
    for input in &mut case.inputs[1..] {
        let Input::Normal(shape) = input else { unreachable!("keys and values are drawn") };
        *input = Input::Weight(shape.clone(), DType::F16);
    }
    Case { name: format!("{} in f16", case.name), ..case }
}

/// A bench: pairs of a query and a key that it sees, times the heads, cost 4 H operations each.
fn priced(case: Case, view: View, pairs: usize, [b, tq, tk, n, g, h]: Extents) -> Case {
    let flops = 4.0 * (b * pairs * n * h) as f64;
    let bytes = 4.0 * (b * (2 * tq * n + 2 * tk * g) * h) as f64;
    let mut case = case.cost(flops, bytes);
    if tq == tk && tq <= 512 {
        // Five products instead of two; o and its cotangent besides, and three gradients.
        case = case.derivative(2.5 * flops, 2.0 * bytes + 4.0 * (b * tq * n * h) as f64);
    }
    case.sampled(move |x, at| at.iter().map(|&i| row_of(x, &view, i / h)[i % h]).collect())
}

fn bench(mask: Mask, extents: Extents) -> Case {
    let [_, tq, tk, ..] = extents;
    let pairs = match mask {
        Mask::Full => tq * tk,
        Mask::Causal => (0..tq).map(|q| q + 1).sum(),
        Mask::BlockCausal(k) => (0..tq).map(|q| (q / k + 1) * k).sum(),
        // Rows q of both copies together: the block before, itself, and its own noisy block.
        Mask::TwoCopy(k) => (0..tk / 2).map(|q| 2 * (q / k * k) + 2 * k).sum(),
    };
    priced(case(mask, extents), View::Mask(mask, None), pairs, extents)
}

/// One block of `rows` tokens at the end of `keys`, for each of `sequences`.
fn bench_cached(sequences: usize, rows: usize, keys: usize, heads: [usize; 3]) -> Case {
    let told: Vec<_> =
        (0..sequences).map(|s| (rows, keys - rows, rows, (0, 0), s * keys)).collect();
    let [n, g, h] = heads;
    let extents = [1, sequences * rows, sequences * keys, n, g, h];
    let case = cached(&told, heads, None);
    let case = Case {
        name: format!("attention_cached {sequences}x{rows} over {keys} heads {n}/{g}x{h}"),
        ..case
    };
    priced(case, View::Lanes(lanes(&told)), sequences * rows * keys, extents)
}

/// Attention's cases.
pub fn cases() -> Vec<Case> {
    use AttentionKernel::{Few, FewSubgroup8, Subgroup8, Tile};
    use Mask::{BlockCausal, Causal, Full, TwoCopy};
    let mut cases = vec![
        case(Full, [1, 1, 1, 1, 1, 4]),
        case(Full, [2, 5, 70, 2, 1, 8]),
        case(Full, [1, 0, 3, 1, 1, 4]),
        case(Causal, [2, 19, 19, 4, 2, 8]),
        case(Causal, [1, 131, 131, 1, 1, 4]),
        case(Causal, [1, 11, 11, 3, 3, 4]),
        case(BlockCausal(4), [1, 18, 18, 2, 1, 8]),
        documents(Causal, &[3, 9, 1, 7], [2, 20, 20, 2, 1, 8]),
        documents(BlockCausal(4), &[4, 12, 4], [1, 20, 20, 2, 1, 8]),
        documents(TwoCopy(4), &[4, 8, 12], [2, 48, 48, 2, 1, 8]),
        documents(TwoCopy(4), &[5, 6, 13], [1, 48, 48, 2, 1, 8]),
        documents(TwoCopy(2), &[70, 10], [1, 160, 160, 1, 1, 4]),
    ];
    for block in [1, 2, 4, 8, 32] {
        cases.push(case(TwoCopy(block), [1, 74, 74, 2, 1, 8]));
    }
    cases.push(cached_in_f16(&[(8, 69, 4, (0, 0), 0)], [4, 2, 72], None));
    // Few combinations of head dimension and shared heads: each is compiled anew, which takes the driver seconds.
    for (kernel, h) in [(Tile, 136), (Subgroup8, 72)] {
        cases.push(forced(kernel, 1, Causal, [2, 71, 71, 4, 2, 8]));
        cases.push(forced(kernel, 1, BlockCausal(4), [1, 37, 37, 4, 2, h]));
        cases.push(forced(kernel, 1, TwoCopy(4), [1, 140, 140, 2, 1, 8]));
        cases.push(forced(kernel, 1, TwoCopy(4), [1, 24, 24, 2, 1, h]));
        cases.push(forced(kernel, 3, BlockCausal(4), [2, 24, 150, 2, 1, 8]));
    }
    cases.push(forced(Few, 1, Full, [1, 6, 70, 4, 2, 72]));
    // One to four row quads in a tile, and more tiles than one.
    for (tq, h) in [(1, 8), (4, 128), (5, 72), (8, 8)] {
        cases.push(forced(FewSubgroup8, 1, Full, [1, tq, 70, 4, 2, h]));
    }
    cases.push(forced(FewSubgroup8, 1, Causal, [2, 71, 71, 4, 2, 8]));
    cases.push(forced(FewSubgroup8, 3, TwoCopy(4), [1, 140, 140, 2, 1, 8]));
    // One sequence: blocks, a last block that is cut, the causal mask, none.
    cases.push(cached(&[(8, 69, 4, (0, 0), 0)], [2, 1, 8], None));
    cases.push(cached(&[(3, 0, 4, (0, 0), 5)], [2, 1, 8], None));
    cases.push(cached(&[(5, 65, 1, (0, 0), 0)], [4, 2, 8], None));
    cases.push(cached(&[(40, 0, 0, (0, 0), 0)], [2, 1, 8], None));
    // Several of different lengths; two of them share a prefix, which lies behind their own slots for one.
    let ragged: Told<'_> = &[
        (4, 276, 4, (0, 0), 0),
        (1, 70, 1, (290, 64), 400),
        (19, 64, 4, (290, 64), 360),
        (2, 3, 0, (0, 0), 284),
        (70, 0, 1, (0, 0), 420),
    ];
    cases.push(cached(ragged, [2, 1, 8], None));
    for kernel in [Tile, Few, Subgroup8, FewSubgroup8] {
        cases.push(cached(ragged, [2, 1, 8], Some((kernel, 1))));
        // More pieces than tiles of keys: some are empty.
        cases.push(cached(ragged, [4, 2, 8], Some((kernel, 5))));
        cases.push(cached_in_f16(ragged, [4, 2, 8], Some((kernel, 1))));
    }
    // A training sequence, a block-diffusion pass over it, a short sequence.
    for (mask, t) in [(Causal, 512), (TwoCopy(4), 1024), (Causal, 192)] {
        cases.push(bench(mask, [1, t, t, 9, 3, 64]));
    }
    // A decode step of one block, and of eight sequences at once.
    cases.push(bench_cached(1, 4, 512, [9, 3, 64]));
    cases.push(bench_cached(8, 4, 512, [9, 3, 64]));
    // What the two-copy pass costs beside a causal one over the same sequence, where both are long.
    cases.push(bench(Causal, [1, 8192, 8192, 8, 2, 64]));
    cases.push(bench(TwoCopy(4), [1, 16_384, 16_384, 8, 2, 64]));
    for h in [64, 128] {
        let mut more = Vec::new();
        for t in [512, 1024, 2048, 4096] {
            more.push(bench(Causal, [1, t, t, 8, 2, h]));
            more.push(bench(TwoCopy(4), [1, t, t, 8, 2, h]));
        }
        for rows in [4, 16] {
            more.push(bench_cached(1, rows, 4096, [8, 2, h]));
        }
        let compiled_anew = h > 64;
        let quick = |case: Case| if compiled_anew { case.full_only() } else { case };
        cases.extend(more.into_iter().map(quick));
    }
    cases
}
