//! Rows of a table:  y[t, c] = table[tokens[t], c]          tokens: [..]   table: [V, D]   y: [.., D]
//! Backward:         dtable[v, c] = Σ of dy[t, c] over the t with tokens[t] = v, in order of t
//! The table comes in row shards (a weight larger than one binding). f32, bf16 or f16; only f32 shards are
//! trainable. The host has checked the tokens; one outside the table gives zeros and no gradient.

use bytemuck::{Pod, Zeroable};

use crate::autograd::Gradient;
use crate::gpu::{Kernel, fold, kernel};
use crate::ops::reduce::pieces;
use crate::tensor::{DType, Shape, Tensor};

const FORWARD: Kernel = kernel!("embedding");
const SORT: Kernel = kernel!("embedding_sort");
const BACKWARD: Kernel = kernel!("embedding_backward");
const JOIN: Kernel = kernel!("embedding_join");

/// Sorted tokens that one workgroup of the backward pass adds.
const CHUNK: usize = 64;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    n: u32,
    pieces: u32,
    first: u32,
    rows: u32,
}

/// The rows that `tokens` name, out of a table given as row shards [rows_i, D].
///
/// # Panics
/// If there is no shard, the shards differ in D, tokens are not u32, or a tracked shard is not f32.
#[track_caller]
pub fn embedding(tokens: &Tensor, table: &[Tensor]) -> Tensor {
    let d = table.first().expect("embedding: a table has a shard").shape().last();
    assert_eq!(tokens.dtype(), DType::U32, "embedding of {}", tokens.shape());
    for shard in table {
        let fits = matches!(**shard.shape(), [_, last] if last == d);
        assert!(fits, "embedding: shard {} of a table of width {d}", shard.shape());
        let trainable = shard.dtype() == DType::F32 || !shard.is_tracked();
        assert!(trainable, "embedding: a trainable shard must be f32, not {:?}", shard.dtype());
    }
    let n = tokens.numel();
    let shape: Shape = [&tokens.shape()[..], &[d]].concat().into();
    let y = Tensor::empty(tokens.gpu(), shape, DType::F32, "embedding");
    let (pieces, wide) = pieces(d);
    let mut shards = Vec::new();
    let mut first = 0;
    for shard in table {
        let rows = shard.shape()[0] as u32;
        let params = Params { n: n as u32, pieces: pieces as u32, first, rows };
        FORWARD.with(&[wide]).import(&[("weight", shard.dtype().weight_import())]).run(
            &params,
            &[tokens, shard],
            &[&y],
            fold(n),
        );
        shards.push((params, shard.shape().clone(), shard.is_tracked()));
        first += rows;
    }
    let tokens = tokens.detach();
    let inputs: Vec<&Tensor> = table.iter().collect();
    y.record_onto("embedding", &inputs, move |dy, totals| {
        let tracked = shards.iter().any(|(.., tracked)| *tracked) && n > 0;
        let order = Tensor::empty(dy.gpu(), [2, n], DType::U32, "embedding");
        let chunks = n.div_ceil(CHUNK);
        let partial = Tensor::empty(dy.gpu(), [2 * chunks, d], DType::F32, "embedding");
        if tracked {
            // Four bits a pass, as many as the number of rows has.
            let passes = (u32::BITS - first.leading_zeros()).div_ceil(4);
            SORT.run(&[n as u32, passes, first], &[&tokens], &[&order], [1, 1, 1]);
        }
        let gradient =
            |((params, shape, tracked), total): (&(Params, Shape, bool), &Option<Tensor>)| {
                tracked.then(|| {
                    // Most rows get nothing: a tied head's gradient is there already and is added to.
                    let fresh = || Tensor::zeros(dy.gpu(), shape, DType::F32, "embedding");
                    let dtable = total.clone().unwrap_or_else(fresh);
                    let [x, y, _] = fold(chunks);
                    let grid = [x, y, pieces.div_ceil(256) as u32];
                    let reads = [&tokens, &order, dy];
                    BACKWARD.with(&[wide]).run(params, &reads, &[&dtable, &partial], grid);
                    let grid = [x, y, pieces.div_ceil(64) as u32];
                    JOIN.with(&[wide]).run(params, &[&tokens, &order, &partial], &[&dtable], grid);
                    if total.is_some() { Gradient::Added } else { Gradient::Own(dtable) }
                })
            };
        shards.iter().zip(totals).map(gradient).collect()
    })
}

#[cfg(feature = "cases")]
pub use cases::cases;

#[cfg(feature = "cases")]
mod cases {
    use super::*;
    use crate::ops::case::{Case, Input, Tolerance};
    use crate::tensor::host::Array;
    use crate::tensor::stored::{decode, encode};

    fn reference(tokens: &Array, shards: &[Array]) -> Array {
        let d = shards[0].shape.last();
        let table: Vec<f64> = shards.iter().flat_map(|s| s.data.clone()).collect();
        let shape: Shape = [&tokens.shape[..], &[d]].concat().into();
        Array::from_fn(shape, |i| {
            let at = tokens.data[i / d] as usize * d + i % d;
            table.get(at).copied().unwrap_or(0.0)
        })
    }

    /// Repeated tokens, and every tenth out of the table when `outside`.
    fn case(tokens: &[usize], rows: &[usize], d: usize, outside: bool) -> Case {
        let n: usize = tokens.iter().product();
        let v: usize = rows.iter().sum();
        let ids = (0..n)
            .map(|i| if outside && i % 10 == 9 { v + i } else { (i * i + 3 * i) % v.min(n + 1) })
            .map(|id| id as u32)
            .collect();
        let mut inputs = vec![Input::Integers(tokens.into(), ids)];
        inputs.extend(rows.iter().map(|&rows| Input::Normal([rows, d].into())));
        Case::new(
            format!("embedding {tokens:?} of {rows:?}x{d}"),
            inputs,
            |t| embedding(&t[0], &t[1..]),
            |x| reference(&x[0], &x[1..]),
        )
        // A gradient sums over all places of a token.
        .tolerance(Tolerance::SUM)
    }

    /// A table at rest in another type: the reference reads it back the same way.
    fn stored(dtype: DType, d: usize) -> Case {
        let rows = 9;
        let values: Vec<f32> = (0..rows * d).map(|i| (i * 37 % 101) as f32 / 8.0 - 6.0).collect();
        let bytes = encode(&values, d, dtype);
        let decoded = decode(&bytes, d, dtype).into_iter().map(f64::from).collect();
        let table = Array::new([rows, d], decoded);
        Case::new(
            format!("embedding of a {dtype:?} table {rows}x{d}"),
            vec![Input::Integers([2, 3].into(), vec![8, 0, 3, 3, 1, 7])],
            move |t| {
                let table = Tensor::from_bytes(t[0].gpu(), &bytes, [rows, d], dtype, "table");
                embedding(&t[0], &[table])
            },
            move |x| reference(&x[0], std::slice::from_ref(&table)),
        )
    }

    /// The table's cases.
    pub fn cases() -> Vec<Case> {
        let mut cases = vec![
            case(&[1], &[1], 1, false),
            case(&[2, 7], &[5], 3, false),
            case(&[3, 7], &[4, 1, 6], 5, true),
            case(&[600], &[40, 3], 4, true),
            // Tokens repeat over more than one tile of the scan.
            case(&[2500], &[20, 17], 3, true),
            case(&[11], &[30], 300, false),
            case(&[2, 0], &[5], 3, false),
        ];
        for d in [5, 8] {
            cases.extend([DType::Bf16, DType::F16].map(|dtype| stored(dtype, d)));
        }
        cases.extend([DType::Q8, DType::Q4].map(|dtype| stored(dtype, 96)));
        for (tokens, rows) in [(512, 4096), (2048, 49_152)] {
            let (read, table) = ((4 * tokens * 576) as f64, (4 * rows * 576) as f64);
            let case = case(&[tokens], &[rows], 576, false).cost(0.0, 2.0 * read);
            // The gradient is filled with zeros; then rows of dy are read, and those they belong to read and written.
            cases.push(case.derivative(0.0, 3.0 * read + table));
        }
        cases
    }
}
