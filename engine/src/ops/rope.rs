//! Rotary position embedding, rotate-half as in Hugging Face's Llama: pairs are (i, i + H/2).
//!   y_i = (x_i cos a − x_{i+H/2} sin a) s,  y_{i+H/2} = (x_{i+H/2} cos a + x_i sin a) s,  a = position · inv_freq_i
//! Backward: the rotation by −a, times s.      x, y: [B, T, N, H]   positions: [B, T] or [T]   inv_freq: [H / 2]
//! The scale s is 1 but for models whose context was stretched (YaRN, LongRoPE).
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
    scale: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct CacheParams {
    tokens: u32,
    heads: u32,
    kv_heads: u32,
    half: u32,
    own: u32,
    scale: f32,
}

/// Rotates each head of `x` by its token's position. Angles (position · inv_freq) up to 100 000 are exact to a
/// few roundings; inv_freq must not be negative, and gets no gradient. `rotary` is inv_freq and the scale.
///
/// # Panics
/// If the shapes or types do not fit.
#[track_caller]
pub fn rope(x: &Tensor, positions: &Tensor, rotary: (&Tensor, f32)) -> Tensor {
    let (inv_freq, scale) = rotary;
    let (sx, sp, sf) = (x.shape(), positions.shape(), inv_freq.shape());
    let fits = match **sx {
        [b, t, _, h] => (**sp == [b, t] || **sp == [t]) && h % 2 == 0 && **sf == [h / 2],
        _ => false,
    };
    assert!(fits, "rope: x {sx}, positions {sp} and inv_freq {sf} do not fit");
    let types = (x.dtype(), positions.dtype(), inv_freq.dtype());
    assert_eq!(types, (DType::F32, DType::U32, DType::F32), "rope: types");
    assert!(!inv_freq.is_tracked(), "rope: inv_freq gets no gradient");
    let y = rotate(x, positions, rotary, 1.0);
    let (positions, inv_freq) = (positions.detach(), inv_freq.detach());
    y.record("rope", &[x], move |dy| vec![Some(rotate(dy, &positions, (&inv_freq, scale), -1.0))])
}

fn rotate(x: &Tensor, positions: &Tensor, (inv_freq, scale): (&Tensor, f32), sign: f32) -> Tensor {
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
        scale,
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
/// If shapes or types do not fit. x: [T, (N + 2 G) H], H a multiple of 4, places: u32 [T, 2], inv_freq: [H / 2], or
/// [T, H / 2] for tokens of texts that have frequencies of their own, keys, values: f32 or f16 [1, slots, G, H].
#[track_caller]
pub fn rope_into_cache(
    x: &Tensor,
    places: &Tensor,
    (inv_freq, scale): (&Tensor, f32),
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
    let (half, own) = (keys.shape().last() / 2, inv_freq.shape().len() == 2);
    let frequencies: &[usize] = if own { &[x.shape()[0], half] } else { &[half] };
    let fits = keys.shape() == values.shape()
        && keys.dtype() == values.dtype()
        && keys.shape().last().is_multiple_of(4)
        && **inv_freq.shape() == *frequencies
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
        half: half as u32,
        own: u32::from(own),
        scale,
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

    /// Rotated by frequencies [H / 2], or by each token's own, [T, H / 2].
    fn reference(x: &Array, positions: &Array, frequencies: &[f32], scale: f64) -> Array {
        let [_, _, heads, h] = <[usize; 4]>::try_from(&*x.shape).expect("four axes");
        let half = h / 2;
        Array::from_fn(&x.shape, |at| {
            let (token, i) = (at / h / heads, at % h);
            let position = positions.data[token % positions.data.len()];
            let own = token * half % frequencies.len();
            let angle = f64::from(position as f32 * frequencies[own + i % half]);
            let (sin, cos) = (scale * angle.sin(), scale * angle.cos());
            if i < half {
                x.data[at] * cos - x.data[at + half] * sin
            } else {
                x.data[at] * cos + x.data[at - half] * sin
            }
        })
    }

    /// Positions from `first` on; per token of each sequence when `per_sequence`.
    fn case(shape: [usize; 4], first: u32, per_sequence: bool) -> Case {
        scaled(shape, first, per_sequence, 1.0)
    }

    fn scaled(shape: [usize; 4], first: u32, per_sequence: bool, scale: f32) -> Case {
        let [b, t, _, h] = shape;
        let rows: Shape = if per_sequence { [b, t].into() } else { [t].into() };
        let positions = (0..rows.numel() as u32).map(|i| first + i * 7 % 64).collect();
        Case::new(
            format!("rope {shape:?} from {first} as {rows} times {scale}"),
            vec![Input::Normal(shape.into()), Input::Integers(rows, positions)],
            move |t| {
                let inv_freq = Tensor::from_f32(t[0].gpu(), &frequencies(h / 2), [h / 2]);
                rope(&t[0], &t[1], (&inv_freq, scale))
            },
            move |x| reference(&x[0], &x[1], &frequencies(h / 2), f64::from(scale)),
        )
    }

    /// One of the three results (queries, the keys, the values of a cache of zeros) of the fused op. Tokens lie in
    /// every other slot, backwards. With `own`, each has frequencies of its own, and the scale is not 1.
    fn cached(
        which: usize,
        dtype: DType,
        [t, heads, kv_heads, h]: [usize; 4],
        start: usize,
        own: bool,
    ) -> Case {
        let (rows, scale) = if own { (t, 1.25) } else { (1, 1.0) };
        let own_of =
            |token: usize| frequencies(h / 2).into_iter().map(move |f| f / (1 + token) as f32);
        let rotary: Vec<f32> = (0..rows).flat_map(own_of).collect();
        let by = rotary.clone();
        let slots = 2 * t + 2;
        let slot_of = move |token: usize| 2 * (t - token);
        let result = ["queries", "keys", "values"][which];
        let row = (heads + 2 * kv_heads) * h;
        Case::new(
            format!(
                "rope_into_cache {result} {dtype:?} {t}x{heads}x{h} over {kv_heads} from {start} own {own}"
            ),
            vec![Input::Normal([t, row].into())],
            move |x| {
                let gpu = x[0].gpu();
                let empty = || Tensor::zeros(gpu, [1, slots, kv_heads, h], dtype, "cache");
                let (keys, values) = (empty(), empty());
                let extents = if own { vec![t, h / 2] } else { vec![h / 2] };
                let inv_freq = Tensor::from_f32(gpu, &rotary, extents);
                let places = (0..t).flat_map(|i| [(start + i) as u32, slot_of(i) as u32]);
                let places = Tensor::from_u32(gpu, &places.collect::<Vec<_>>(), [t, 2]);
                let q = rope_into_cache(&x[0].detach(), &places, (&inv_freq, scale), &keys, &values);
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
                let rows = match which {
                    2 => part,
                    _ => reference(&part, &positions, &by, f64::from(scale)),
                };
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
            scaled([2, 5, 3, 8], 3, true, 1.25),
            scaled([2, 5, 3, 6], 3, true, 0.5),
            bench(9, 64),
            bench(32, 128),
        ];
        for which in 0..3 {
            cases.push(cached(which, DType::F32, [1, 1, 1, 4], 0, false));
            cases.push(cached(which, DType::F32, [5, 6, 2, 12], 3, false));
            cases.push(cached(which, DType::F16, [5, 6, 2, 12], 3, false));
            cases.push(cached(which, DType::F32, [0, 2, 1, 8], 1, false));
            cases.push(cached(which, DType::F32, [5, 6, 2, 12], 3, true));
        }
        cases
    }
}
