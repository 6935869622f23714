//! Rotary position embedding, rotate-half as in Hugging Face's Llama: pairs are (i, i + H/2).
//!   y_i = x_i cos a − x_{i+H/2} sin a,  y_{i+H/2} = x_{i+H/2} cos a + x_i sin a,  a = position · inv_freq_i
//! Backward: the rotation by −a.      x, y: [B, T, N, H]   positions: [B, T] or [T]   inv_freq: [H / 2]
//! The angle is the product rounded to f32, as Hugging Face has it; sine and cosine are computed in the
//! kernel, because WGSL promises only 2⁻¹¹ of its own.

use bytemuck::{Pod, Zeroable};

use crate::gpu::{Kernel, fold, kernel};
use crate::ops::reduce::pieces;
use crate::tensor::{DType, Tensor};

const ROPE: Kernel = kernel!("rope");
const ROPE_CACHE: Kernel = kernel!("rope_cache");

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    n: u32,
    pieces: u32,
    heads: u32,
    positions: u32,
    sign: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct CacheParams {
    tokens: u32,
    heads: u32,
    kv_heads: u32,
    half: u32,
}

/// Rotates each head of `x` by its token's position. Angles (position · inv_freq) up to 100 000 are exact to a
/// few roundings; inv_freq must not be negative, and gets no gradient.
///
/// # Panics
/// If the shapes or types do not fit.
#[track_caller]
pub fn rope(x: &Tensor, positions: &Tensor, inv_freq: &Tensor) -> Tensor {
    let (sx, sp, sf) = (x.shape(), positions.shape(), inv_freq.shape());
    let fits = match **sx {
        [b, t, _, h] => (**sp == [b, t] || **sp == [t]) && h % 2 == 0 && **sf == [h / 2],
        _ => false,
    };
    assert!(fits, "rope: x {sx}, positions {sp} and inv_freq {sf} do not fit");
    let types = (x.dtype(), positions.dtype(), inv_freq.dtype());
    assert_eq!(types, (DType::F32, DType::U32, DType::F32), "rope: types");
    assert!(!inv_freq.is_tracked(), "rope: inv_freq gets no gradient");
    let y = rotate(x, positions, inv_freq, 1.0);
    let (positions, inv_freq) = (positions.detach(), inv_freq.detach());
    y.record("rope", &[x], move |dy| vec![Some(rotate(dy, &positions, &inv_freq, -1.0))])
}

fn rotate(x: &Tensor, positions: &Tensor, inv_freq: &Tensor, sign: f32) -> Tensor {
    let y = x.empty_like("rope");
    let [b, t, heads, h] = **x.shape() else { unreachable!("rope has checked the shape") };
    let (pieces, wide) = pieces(h / 2);
    let n = b * t * heads.div_ceil(8) * pieces;
    let params = Params {
        n: n as u32,
        pieces: pieces as u32,
        heads: heads as u32,
        positions: positions.numel() as u32,
        sign,
    };
    let reads = [x, positions, inv_freq];
    ROPE.with(&[wide]).run(&params, &reads, &[&y], fold(n.div_ceil(256)));
    y
}

/// A decoding step's rotation and cache write in one: `x` holds each token's N queries, G keys and G values. Returns
/// the queries rotated, [1, T, N, H], and writes keys rotated and values as they are into `keys` and `values`. Each
/// token's position and slot of the cache are in `places`, and the caller sees to it that there are such slots. Has no
/// derivative.
///
/// # Panics
/// If shapes or types do not fit. x: [T, (N + 2 G) H], H a multiple of 4, places: u32 [T, 2], inv_freq: [H / 2],
/// keys, values: f32 or f16 [1, slots, G, H].
#[track_caller]
pub fn rope_into_cache(
    x: &Tensor,
    places: &Tensor,
    inv_freq: &Tensor,
    keys: &Tensor,
    values: &Tensor,
) -> Tensor {
    let all = [x, inv_freq, keys, values];
    let heads = match (&**x.shape(), &**keys.shape()) {
        (&[t, row], &[1, _, g, h]) if h > 0 && row % h == 0 && **places.shape() == [t, 2] => {
            (row / h).checked_sub(2 * g)
        }
        _ => None,
    };
    let fits = keys.shape() == values.shape()
        && keys.dtype() == values.dtype()
        && keys.shape().last().is_multiple_of(4)
        && **inv_freq.shape() == [keys.shape().last() / 2]
        && places.dtype() == DType::U32
        && [x, inv_freq].iter().all(|t| t.dtype() == DType::F32);
    let Some(heads) = heads.filter(|_| fits) else {
        panic!("rope_into_cache: {all:?} and places {} do not fit", places.shape());
    };
    let [tokens, kv_heads, h] = [x.shape()[0], keys.shape()[2], keys.shape()[3]];
    let params = CacheParams {
        tokens: tokens as u32,
        heads: heads as u32,
        kv_heads: kv_heads as u32,
        half: (h / 2) as u32,
    };
    let units = tokens * (heads + 2 * kv_heads) * (h / 4);
    let y = Tensor::empty(x.gpu(), [1, tokens, heads, h], DType::F32, "rope_into_cache");
    let imports = [("keys", keys.dtype().keys_import())];
    let (reads, writes) = ([x, inv_freq, places], [&y, keys, values]);
    ROPE_CACHE.with(&[]).import(&imports).run(&params, &reads, &writes, fold(units.div_ceil(256)));
    y.record_none("rope_into_cache", &[x])
}

#[cfg(feature = "cases")]
pub use cases::cases;

#[cfg(feature = "cases")]
mod cases {
    use super::*;
    use crate::ops::case::{Case, Input, Tolerance};
    use crate::ops::embedding;
    use crate::tensor::Shape;
    use crate::tensor::host::Array;

    fn frequencies(half: usize) -> Vec<f32> {
        (0..half).map(|i| 10_000f32.powf(-(i as f32) / half as f32)).collect()
    }

    fn reference(x: &Array, positions: &Array) -> Array {
        let [_, _, heads, h] = <[usize; 4]>::try_from(&*x.shape).expect("four axes");
        let half = h / 2;
        let inv_freq = frequencies(half);
        Array::from_fn(&x.shape, |at| {
            let (token, i) = (at / h / heads, at % h);
            let position = positions.data[token % positions.data.len()];
            let angle = f64::from(position as f32 * inv_freq[i % half]);
            let (sin, cos) = angle.sin_cos();
            if i < half {
                x.data[at] * cos - x.data[at + half] * sin
            } else {
                x.data[at] * cos + x.data[at - half] * sin
            }
        })
    }

    /// Positions from `first` on; per token of each sequence when `per_sequence`.
    fn case(shape: [usize; 4], first: u32, per_sequence: bool) -> Case {
        let [b, t, _, h] = shape;
        let rows: Shape = if per_sequence { [b, t].into() } else { [t].into() };
        let positions = (0..rows.numel() as u32).map(|i| first + i * 7 % 64).collect();
        Case::new(
            format!("rope {shape:?} from {first} as {rows}"),
            vec![Input::Normal(shape.into()), Input::Integers(rows, positions)],
            move |t| {
                let inv_freq = Tensor::from_f32(t[0].gpu(), &frequencies(h / 2), [h / 2]);
                rope(&t[0], &t[1], &inv_freq)
            },
            |x| reference(&x[0], &x[1]),
        )
    }

    /// One of the three results (queries, the keys, the values of a cache of zeros) of the fused op. Tokens lie in
    /// every other slot, backwards.
    fn cached(
        which: usize,
        dtype: DType,
        t: usize,
        heads: usize,
        kv_heads: usize,
        h: usize,
        start: usize,
    ) -> Case {
        let slots = 2 * t + 2;
        let slot_of = move |token: usize| 2 * (t - token);
        let result = ["queries", "keys", "values"][which];
        let row = (heads + 2 * kv_heads) * h;
        Case::new(
            format!(
                "rope_into_cache {result} {dtype:?} {t}x{heads}x{h} over {kv_heads} from {start}"
            ),
            vec![Input::Normal([t, row].into())],
            move |x| {
                let gpu = x[0].gpu();
                let empty = || Tensor::zeros(gpu, [1, slots, kv_heads, h], dtype, "cache");
                let (keys, values) = (empty(), empty());
                let inv_freq = Tensor::from_f32(gpu, &frequencies(h / 2), [h / 2]);
                let places = (0..t).flat_map(|i| [(start + i) as u32, slot_of(i) as u32]);
                let places = Tensor::from_u32(gpu, &places.collect::<Vec<_>>(), [t, 2]);
                let q = rope_into_cache(&x[0].detach(), &places, &inv_freq, &keys, &values);
                if which == 0 {
                    return q;
                }
                // A table of embeddings of any type is read as f32.
                let table = [keys, values][which - 1].reshape([slots, kv_heads * h]);
                let all: Vec<u32> = (0..slots as u32).collect();
                let all = Tensor::from_u32(gpu, &all, [slots]);
                embedding(&all, &[table]).reshape([1, slots, kv_heads, h])
            },
            move |x| {
                // The columns of each row that the result is made of.
                let (first, n) = [
                    (0, heads * h),
                    (heads * h, kv_heads * h),
                    ((heads + kv_heads) * h, kv_heads * h),
                ][which];
                let part = x[0].rows().flat_map(|row| row[first..first + n].to_vec()).collect();
                let part = Array::new([1, t, n / h, h], part);
                let positions = Array::from_fn([t], |i| (start + i) as f64);
                let rows = if which == 2 { part } else { reference(&part, &positions) };
                if which == 0 {
                    return rows;
                }
                let token_at = |slot: usize| (0..t).find(|&token| slot_of(token) == slot);
                let value =
                    |i: usize| token_at(i / n).map_or(0.0, |token| rows.data[token * n + i % n]);
                Array::from_fn([1, slots, kv_heads, h], value)
            },
        )
        .tolerance(match dtype {
            DType::F32 => Tolerance::F32,
            // Half a place of 11 bits.
            _ => Tolerance { absolute: 1e-6, relative: 4.9e-4 },
        })
    }

    /// The rotation's cases.
    pub fn cases() -> Vec<Case> {
        let bench = |heads: usize, h: usize| {
            let n = (512 * heads * h) as f64;
            let case = case([1, 512, heads, h], 0, true);
            case.cost(3.0 * n, 8.0 * n).derivative(3.0 * n, 8.0 * n)
        };
        let mut cases = vec![
            case([1, 1, 1, 2], 0, true),
            case([2, 5, 3, 6], 0, true),
            case([2, 5, 3, 6], 3, false),
            case([3, 33, 2, 10], 8000, true),
            case([1, 64, 1, 64], 8190, false),
            // The last angles with a bound: a turn is taken off 16 000 times.
            case([1, 64, 1, 64], 99_900, false),
            case([0, 4, 2, 8], 0, true),
            case([2, 0, 2, 8], 0, false),
            case([1, 5, 19, 8], 0, true),
            bench(9, 64),
            bench(32, 128),
        ];
        for which in 0..3 {
            cases.push(cached(which, DType::F32, 1, 1, 1, 4, 0));
            cases.push(cached(which, DType::F32, 5, 6, 2, 12, 3));
            cases.push(cached(which, DType::F16, 5, 6, 2, 12, 3));
            cases.push(cached(which, DType::F32, 0, 2, 1, 8, 1));
        }
        cases
    }
}
