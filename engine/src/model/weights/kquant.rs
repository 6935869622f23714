//! GGML's K blocks: 256 elements whose scales are themselves small integers under f16 scales.
//!   Q2_K    16 parts of 16: x = d·s·q − e·m,  s, m in 0..16, q in 0..4       d, e f16
//!   Q3_K    16 parts of 16: x = d·s·q,        s in −32..32, q in −4..4       d f16
//!   Q4_K    8 parts of 32: x = d·s·q − e·m,   s, m in 0..64, q in 0..16      d, e f16
//!   Q5_K    8 parts of 32: x = d·s·q − e·m,   s, m in 0..64, q in 0..32      d, e f16
//!   Q6_K    16 parts of 16: x = d·s·q,        s in −128..128, q in −32..32   d f16
//!   IQ4_XS  8 parts of 32: x = d·s·k(q),      s in −32..32, k as in IQ4_NL   d f16
//! What a file holds is read exactly; how a part is fitted when one is written is our own choice.

use half::f16;

use super::block32::{IQ4_LEVELS, nibbles};
use crate::tensor::stored::{Q4Block, Q8Block, broken, level};

/// Elements of a block.
pub(super) const ELEMENTS: usize = 256;
/// Bytes of a block of Q2_K: s and m in a byte, pairs of bits, d, e.
pub(super) const Q2_BYTES: usize = 84;
/// Bytes of a block of Q3_K: third bits, pairs of bits, 12 bytes of s, d.
pub(super) const Q3_BYTES: usize = 110;
/// Bytes of a block of Q4_K: d, e, 12 bytes of s and m, nibbles.
pub(super) const Q4_BYTES: usize = 144;
/// Bytes of a block of Q5_K: d, e, 12 bytes of s and m, fifth bits, nibbles.
pub(super) const Q5_BYTES: usize = 176;
/// Bytes of a block of Q6_K: low nibbles, high pairs of bits, s, d.
pub(super) const Q6_BYTES: usize = 210;
/// Bytes of a block of IQ4_XS: d, upper pairs of bits of s, lower nibbles of s, nibbles.
pub(super) const IQ4_BYTES: usize = 136;

/// How much finer or coarser than the plain step a part's scale is tried.
const TRIALS: [f32; 9] = [-1.2, -0.9, -0.6, -0.3, 0.0, 0.3, 0.6, 0.9, 1.2];

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// s and m of part `i` of the eight, from their 12 bytes: six bits each, the last four parts' upper bits where the
/// first four leave room.
fn scale_and_minimum(packed: &[u8], i: usize) -> (u8, u8) {
    if i < 4 {
        return (packed[i] & 63, packed[i + 4] & 63);
    }
    let low = packed[i + 4];
    ((low & 15) | (packed[i - 4] >> 6 << 4), (low >> 4) | (packed[i] >> 6 << 4))
}

fn pack_scales(scales: &[u8; 8], minima: &[u8; 8]) -> [u8; 12] {
    let mut packed = [0; 12];
    for i in 0..4 {
        packed[i] = scales[i] | (scales[i + 4] >> 4 << 6);
        packed[i + 4] = minima[i] | (minima[i + 4] >> 4 << 6);
        packed[i + 8] = (scales[i + 4] & 15) | (minima[i + 4] << 4);
    }
    packed
}

/// Appends the values of one block of Q2_K.
pub(super) fn decode_q2(block: &[u8; Q2_BYTES], out: &mut Vec<f32>) {
    let (d, e) = (half_at(block, 80), half_at(block, 82));
    for (part, sm) in block[..16].iter().enumerate() {
        let (scale, minimum) = (d * f32::from(sm & 15), e * f32::from(sm >> 4));
        let pairs = pairs_of_bits(&block[16..80], part);
        out.extend(pairs.map(|q| scale * f32::from(q) - minimum));
    }
}

/// s of a part of the sixteen of a block of Q3_K: four lower bits in the first eight of 12 bytes, two upper ones in the
/// last four.
fn q3_scale(block: &[u8], part: usize) -> i8 {
    let packed = &block[96..108];
    let low = packed[part % 8] >> (4 * (part / 8)) & 15;
    let high = packed[8 + part % 4] >> (2 * (part / 4)) & 3;
    (low | high << 4) as i8 - 32
}

/// The 16 q of a part: two bits, and a third one without which the number is 4 less.
fn q3_numbers(block: &[u8], part: usize) -> impl Iterator<Item = i8> {
    let thirds = block[16 * (part % 2)..].iter().map(move |b| b >> (part / 2) & 1);
    pairs_of_bits(&block[32..96], part).zip(thirds).map(|(q, third)| (q + 4 * third) as i8 - 4)
}

/// Appends the values of one block of Q3_K.
pub(super) fn decode_q3(block: &[u8; Q3_BYTES], out: &mut Vec<f32>) {
    let d = half_at(block, 108);
    for part in 0..16 {
        let scale = d * f32::from(q3_scale(block, part));
        out.extend(q3_numbers(block, part).map(|q| scale * f32::from(q)));
    }
}

/// A block of Q3_K as eight, exactly: −s·q lies in −128..=124, so it is a number of eight bits under the scale −d.
pub(super) fn q3_blocks(block: &[u8], out: &mut Vec<Q8Block>) {
    let d = -f16::from_le_bytes([block[108], block[109]]);
    for pair in 0..8 {
        let mut q = [0; 32];
        for (part, half) in q.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let part = 2 * pair + part;
            let s = i16::from(q3_scale(block, part));
            let numbers = q3_numbers(block, part);
            half.iter_mut().zip(numbers).for_each(|(q, n)| *q = -(s * i16::from(n)) as i8);
        }
        out.push(Q8Block { d, q });
    }
}

/// The 16 numbers of two bits of a part: four parts of 32 share 32 bytes, the first in the lowest bits.
fn pairs_of_bits(packed: &[u8], part: usize) -> impl Iterator<Item = u8> {
    let bytes = &packed[32 * (part / 8) + 16 * (part % 2)..][..16];
    bytes.iter().map(move |b| b >> (2 * (part % 8 / 2)) & 3)
}

/// Appends the values of one block of Q5_K.
pub(super) fn decode_q5(block: &[u8; Q5_BYTES], out: &mut Vec<f32>) {
    let (d, e) = (half_at(block, 0), half_at(block, 2));
    let (fifths, nibbles) = block[16..].split_at(32);
    for part in 0..8 {
        let (s, m) = scale_and_minimum(&block[4..16], part);
        let (scale, minimum) = (d * f32::from(s), e * f32::from(m));
        let bytes = nibbles[32 * (part / 2)..].iter().zip(fifths);
        let q = bytes.map(|(b, high)| (b >> (4 * (part % 2)) & 15) | (high >> part & 1) << 4);
        out.extend(q.map(|q| scale * f32::from(q) - minimum));
    }
}

/// The signed s of part `i` of the eight of a block of IQ4_XS.
fn iq4_scale(block: &[u8], i: usize) -> f32 {
    let low = block[4 + i / 2] >> (4 * (i % 2)) & 15;
    let high = u16::from_le_bytes([block[2], block[3]]) >> (2 * i) & 3;
    f32::from(low | (high as u8) << 4) - 32.0
}

/// Appends the values of one block of IQ4_XS.
pub(super) fn decode_iq4(block: &[u8; IQ4_BYTES], out: &mut Vec<f32>) {
    let d = half_at(block, 0);
    for (i, bytes) in block[8..].as_chunks::<16>().0.iter().enumerate() {
        let scale = d * iq4_scale(block, i);
        out.extend(nibbles(bytes).map(|q| scale * f32::from(IQ4_LEVELS[usize::from(q)])));
    }
}

/// A block of IQ4_XS as eight with a scale of their own, rounded to f16.
pub(super) fn iq4_blocks(block: &[u8], out: &mut Vec<Q8Block>) {
    let d = half_at(block, 0);
    out.extend(block[8..].as_chunks::<16>().0.iter().enumerate().map(|(i, bytes)| Q8Block {
        d: f16::from_f32(d * iq4_scale(block, i)),
        q: nibbles(bytes).map(|q| IQ4_LEVELS[usize::from(q)]),
    }));
}

/// Appends the values of one block of Q4_K.
pub(super) fn decode_q4(block: &[u8; Q4_BYTES], out: &mut Vec<f32>) {
    let (d, e) = (half_at(block, 0), half_at(block, 2));
    for (pair, bytes) in block[16..].as_chunks::<32>().0.iter().enumerate() {
        for high in 0..2 {
            let (s, m) = scale_and_minimum(&block[4..16], 2 * pair + high);
            let (scale, minimum) = (d * f32::from(s), e * f32::from(m));
            out.extend(bytes.iter().map(|b| scale * f32::from(b >> (4 * high) & 15) - minimum));
        }
    }
}

/// A block of Q4_K as eight with scale and minimum of their own, rounded to f16.
pub(super) fn q4_blocks(block: &[u8], out: &mut Vec<Q4Block>) {
    let (d, e) = (half_at(block, 0), half_at(block, 2));
    out.extend((0..8).map(|i| {
        let (s, m) = scale_and_minimum(&block[4..16], i);
        let bytes = &block[16 + 32 * (i / 2)..][..32];
        Q4Block {
            d: f16::from_f32(d * f32::from(s)),
            m: f16::from_f32(-e * f32::from(m)),
            q: std::array::from_fn(|l| bytes[l] >> (4 * (i % 2)) & 15),
        }
    }));
}

/// Appends the values of one block of Q6_K.
pub(super) fn decode_q6(block: &[u8; Q6_BYTES], out: &mut Vec<f32>) {
    let (low, rest) = block.split_at(128);
    let (high, rest) = rest.split_at(64);
    let d = half_at(rest, 16);
    for i in 0..ELEMENTS {
        let (part, four, l) = (i / 128, i % 128 / 32, i % 32);
        let nibbles = low[64 * part + 32 * (four % 2) + l] >> (4 * (four / 2)) & 15;
        let bits = high[32 * part + l] >> (2 * four) & 3;
        let q = i16::from(nibbles | bits << 4) - 32;
        out.push(d * f32::from(rest[i / 16] as i8) * f32::from(q));
    }
}

/// How much an error at an element weighs: large elements matter more, small ones not nothing.
fn weights(part: &[f32]) -> impl Fn(f32) -> f32 + use<> {
    let square = part.iter().map(|x| x * x).sum::<f32>() / part.len() as f32;
    let usual = square.sqrt();
    move |x: f32| usual + x.abs()
}

/// The s and m, neither negative, that fit x ≈ s·q − m best with whole q in 0..=15.
fn fit_q4(part: &[f32]) -> (f32, f32) {
    let weight = weights(part);
    let low = part.iter().copied().fold(0.0, f32::min);
    let high = part.iter().copied().fold(low, f32::max);
    if high - low <= f32::MIN_POSITIVE {
        return (0.0, -low);
    }
    let mut best = (f32::INFINITY, 0.0, 0.0);
    for trial in TRIALS {
        let inverse = (15.0 + trial) / (high - low);
        // Least squares over (q, −1) for the q of this step.
        let [mut w, mut wq, mut wqq, mut wx, mut wxq] = [0.0f64; 5];
        let level = |x: f32| level(inverse * (x - low), 0.0, 15.0) as f32;
        for &x in part {
            let (f, q, x) = (f64::from(weight(x)), f64::from(level(x)), f64::from(x));
            (w, wq, wqq) = (w + f, wq + f * q, wqq + f * q * q);
            (wx, wxq) = (wx + f * x, wxq + f * x * q);
        }
        let determinant = w * wqq - wq * wq;
        let (mut s, mut m) = (1.0 / f64::from(inverse), f64::from(-low));
        if determinant > 0.0 {
            s = (w * wxq - wx * wq) / determinant;
            m = (s * wq - wx) / w;
        }
        if m < 0.0 && wqq > 0.0 {
            (s, m) = (wxq / wqq, 0.0);
        }
        let (s, m) = (s.max(0.0) as f32, m as f32);
        let error: f32 =
            part.iter().map(|&x| weight(x) * (s * level(x) - m - x) * (s * level(x) - m - x)).sum();
        if error < best.0 {
            best = (error, s, m);
        }
    }
    (best.1, best.2)
}

/// The s that fits x ≈ s·q best with whole q in −32..=31.
fn fit_q6(part: &[f32]) -> f32 {
    let weight = weights(part);
    let largest = part.iter().copied().fold(0.0f32, |a, x| if x.abs() > a.abs() { x } else { a });
    if largest.abs() <= f32::MIN_POSITIVE {
        return 0.0;
    }
    let mut best = (f32::INFINITY, 0.0);
    for trial in TRIALS {
        // −32 is the level of the largest magnitude, which has one step more than the other side.
        let inverse = -(32.0 + trial) / largest;
        let level = |x: f32| level(inverse * x, -32.0, 31.0) as f32;
        let (mut wqq, mut wxq) = (0.0f64, 0.0f64);
        for &x in part {
            let (f, q) = (f64::from(weight(x)), f64::from(level(x)));
            (wqq, wxq) = (wqq + f * q * q, wxq + f * q * f64::from(x));
        }
        let s = if wqq > 0.0 { (wxq / wqq) as f32 } else { 0.0 };
        let error: f32 =
            part.iter().map(|&x| weight(x) * (s * level(x) - x) * (s * level(x) - x)).sum();
        if error < best.0 {
            best = (error, s);
        }
    }
    best.1
}

/// One block of Q4_K.
pub(super) fn encode_q4(values: &[f32; ELEMENTS]) -> [u8; Q4_BYTES] {
    let parts = values.as_chunks::<32>().0;
    let fits: Vec<(f32, f32)> = parts.iter().map(|part| fit_q4(part)).collect();
    let most = |of: fn(&(f32, f32)) -> f32| fits.iter().map(of).fold(0.0, f32::max);
    let d = f16::from_f32(most(|f| f.0) / 63.0 + broken(values));
    let e = f16::from_f32(most(|f| f.1) / 63.0);
    let of = |x: f32, unit: f16| match unit.to_f32() {
        unit if unit > 0.0 => level(x / unit, 0.0, 63.0) as u8,
        _ => 0,
    };
    let (mut scales, mut minima) = ([0; 8], [0; 8]);
    let mut block = [0; Q4_BYTES];
    for (i, (part, (s, m))) in parts.iter().zip(fits).enumerate() {
        (scales[i], minima[i]) = (of(s, d), of(m, e));
        let scale = d.to_f32() * f32::from(scales[i]);
        let minimum = e.to_f32() * f32::from(minima[i]);
        for (l, x) in part.iter().enumerate() {
            let q = if scale > 0.0 { level((x + minimum) / scale, 0.0, 15.0) } else { 0 };
            block[16 + 32 * (i / 2) + l] |= (q as u8) << (4 * (i % 2));
        }
    }
    block[..2].copy_from_slice(&d.to_le_bytes());
    block[2..4].copy_from_slice(&e.to_le_bytes());
    block[4..16].copy_from_slice(&pack_scales(&scales, &minima));
    block
}

/// One block of Q6_K.
pub(super) fn encode_q6(values: &[f32; ELEMENTS]) -> [u8; Q6_BYTES] {
    let parts = values.as_chunks::<16>().0;
    let fits: Vec<f32> = parts.iter().map(|part| fit_q6(part)).collect();
    let largest = fits.iter().copied().fold(0.0f32, |a, s| if s.abs() > a.abs() { s } else { a });
    let d = f16::from_f32(largest / -128.0 + broken(values));
    let unit = d.to_f32();
    let mut block = [0; Q6_BYTES];
    for (i, (part, s)) in parts.iter().zip(fits).enumerate() {
        let s = if unit == 0.0 { 0 } else { level(s / unit, -128.0, 127.0) };
        block[192 + i] = s as i8 as u8;
        let scale = unit * s as f32;
        for (j, x) in part.iter().enumerate() {
            let q = if scale == 0.0 { 0 } else { level(x / scale, -32.0, 31.0) };
            let q = (q + 32) as u8;
            let at = 16 * i + j;
            let (part, four, l) = (at / 128, at % 128 / 32, at % 32);
            block[64 * part + 32 * (four % 2) + l] |= (q & 15) << (4 * (four / 2));
            block[128 + 32 * part + l] |= (q >> 4) << (2 * four);
        }
    }
    block[208..].copy_from_slice(&d.to_le_bytes());
    block
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::philox::Philox;

    fn values(scale: f32) -> [f32; ELEMENTS] {
        let mut random = Philox::new(3, [0; 3]);
        [(); ELEMENTS].map(|()| scale * random.normal())
    }

    #[test]
    fn scales_come_back_from_their_twelve_bytes() {
        let scales = [0, 1, 15, 16, 31, 32, 62, 63];
        let minima = [63, 48, 47, 33, 17, 16, 1, 0];
        let packed = pack_scales(&scales, &minima);
        for i in 0..8 {
            assert_eq!(scale_and_minimum(&packed, i), (scales[i], minima[i]));
        }
    }

    #[test]
    fn a_decoded_block_is_encoded_to_itself_or_nearly() {
        for scale in [1e-3, 1.0, 300.0] {
            let x = values(scale);
            let rms = |a: &[f32], b: &[f32]| {
                let sum: f32 = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum();
                (sum / a.len() as f32).sqrt() / scale
            };
            let (mut four, mut six) = (Vec::new(), Vec::new());
            decode_q4(&encode_q4(&x), &mut four);
            decode_q6(&encode_q6(&x), &mut six);
            // A uniform error in steps of (high − low) / 15 and / 64 of a normal sample.
            let (four, six) = (rms(&x, &four), rms(&x, &six));
            assert!(four < 0.09 && six < 0.025, "{four} {six}");
        }
    }

    #[test]
    fn a_block_tells_of_what_is_not_finite() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = values(1.0);
            x[77] = value;
            let (mut four, mut six) = (Vec::new(), Vec::new());
            decode_q4(&encode_q4(&x), &mut four);
            decode_q6(&encode_q6(&x), &mut six);
            assert!(!four[77].is_finite() && !six[77].is_finite(), "{value}");
        }
    }

    #[test]
    fn zeros_and_constants_are_nearly_exact() {
        for constant in [0.0, 2.0, -2.0] {
            let x = [constant; ELEMENTS];
            let (mut four, mut six) = (Vec::new(), Vec::new());
            decode_q4(&encode_q4(&x), &mut four);
            decode_q6(&encode_q6(&x), &mut six);
            let near = |y: &Vec<f32>| y.iter().all(|y| (y - constant).abs() <= 2e-3);
            assert!(near(&four) && near(&six), "{constant}: {four:?} {six:?}");
        }
    }
}
