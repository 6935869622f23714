//! GGML's blocks of 32 elements: f16 scale d (a power of two of one byte in MXFP4), for some an f16 minimum m, then
//! numbers of 8, 5 or 4 bits q. In every type the low nibbles of 16 bytes are the first 16 elements.
//!   Q8_0 x = d·q   Q5_0 x = d·(q − 16)   Q5_1, Q4_1 x = d·q + m   Q4_0 x = d·(q − 8)   IQ4_NL, MXFP4 x = d·k(q)

use std::array;

use half::f16;

use crate::tensor::stored::{Q4Block, Q8Block, broken, level, q4_of, q8_of};

/// Levels of IQ4_NL and IQ4_XS: closer together near zero, where weights are.
pub(super) const IQ4_LEVELS: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The sixteen floats of E2M1, doubled so that they are whole.
const E2M1_LEVELS: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The f16 at a byte.
pub(super) fn half(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    half(bytes, at).to_f32()
}

/// The 32 nibbles of 16 bytes.
pub(super) fn nibbles(packed: &[u8]) -> [u8; 32] {
    array::from_fn(|i| (packed[i % 16] >> (4 * (i / 16))) & 15)
}

/// Nibbles of a block: the first half in the low ones.
fn packed(q: &[u8; 32]) -> [u8; 16] {
    array::from_fn(|i| q[i] | q[i + 16] << 4)
}

/// Numbers of five bits: 32 fifth bits in four bytes, then nibbles.
fn fives(bytes: &[u8]) -> [u8; 32] {
    let high = u32::from_le_bytes(array::from_fn(|i| bytes[i]));
    let low = nibbles(&bytes[4..]);
    array::from_fn(|i| low[i] | (((high >> i) & 1) << 4) as u8)
}

/// MXFP4's scale for doubled levels: 2^(e − 128). The two smallest are subnormal.
fn e8m0_half(e: u8) -> f32 {
    f32::from_bits(match e {
        0 | 1 => 0x0020_0000 << e,
        e => u32::from(e - 1) << 23,
    })
}

pub(super) fn decode_q8_0(block: &[u8; 34], out: &mut Vec<f32>) {
    let d = half_at(block, 0);
    out.extend(block[2..].iter().map(|&q| d * f32::from(q as i8)));
}

pub(super) fn decode_q4_0(block: &[u8; 18], out: &mut Vec<f32>) {
    let d = half_at(block, 0);
    out.extend(nibbles(&block[2..]).map(|q| d * (f32::from(q) - 8.0)));
}

pub(super) fn decode_q4_1(block: &[u8; 20], out: &mut Vec<f32>) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    out.extend(nibbles(&block[4..]).map(|q| d * f32::from(q) + m));
}

pub(super) fn decode_q5_0(block: &[u8; 22], out: &mut Vec<f32>) {
    let d = half_at(block, 0);
    out.extend(fives(&block[2..]).map(|q| d * (f32::from(q) - 16.0)));
}

pub(super) fn decode_q5_1(block: &[u8; 24], out: &mut Vec<f32>) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    out.extend(fives(&block[4..]).map(|q| d * f32::from(q) + m));
}

pub(super) fn decode_iq4_nl(block: &[u8; 18], out: &mut Vec<f32>) {
    let d = half_at(block, 0);
    out.extend(nibbles(&block[2..]).map(|q| d * f32::from(IQ4_LEVELS[usize::from(q)])));
}

pub(super) fn decode_mxfp4(block: &[u8; 17], out: &mut Vec<f32>) {
    let d = e8m0_half(block[0]);
    out.extend(nibbles(&block[1..]).map(|q| d * f32::from(E2M1_LEVELS[usize::from(q)])));
}

pub(super) fn q8_0(block: &[u8]) -> Q8Block {
    Q8Block { d: half(block, 0), q: array::from_fn(|i| block[2 + i] as i8) }
}

/// x = d (q − 8): the minimum is −8 d, exact but where it overflows f16.
pub(super) fn q4_0(block: &[u8]) -> Q4Block {
    let m = f16::from_f32(-8.0 * half_at(block, 0));
    Q4Block { d: half(block, 0), m, q: nibbles(&block[2..]) }
}

pub(super) fn q4_1(block: &[u8]) -> Q4Block {
    Q4Block { d: half(block, 0), m: half(block, 2), q: nibbles(&block[4..]) }
}

pub(super) fn q5_0(block: &[u8]) -> Q8Block {
    Q8Block { d: half(block, 0), q: fives(&block[2..]).map(|q| q as i8 - 16) }
}

pub(super) fn iq4_nl(block: &[u8]) -> Q8Block {
    Q8Block { d: half(block, 0), q: nibbles(&block[2..]).map(|q| IQ4_LEVELS[usize::from(q)]) }
}

/// Exact for scales from 2⁻²⁴, the least of f16, to 2¹⁸; below, rounded to multiples of that; above, infinite.
pub(super) fn mxfp4(block: &[u8]) -> Q8Block {
    let scale = e8m0_half(block[0]);
    let held = scale.clamp(f16::MIN_POSITIVE_SUBNORMAL.to_f32(), 32768.0);
    let level_of = |q: u8| f32::from(E2M1_LEVELS[usize::from(q)]) * (scale / held);
    let levels = nibbles(&block[1..]).map(level_of);
    let fits = levels.iter().all(|k| k.abs() <= 127.0);
    let d = if fits { f16::from_f32(held) } else { f16::INFINITY };
    Q8Block { d, q: levels.map(|k| level(k, -127.0, 127.0) as i8) }
}

pub(super) fn encode_q8_0(values: &[f32; 32]) -> [u8; 34] {
    let Q8Block { d, q } = q8_of(values);
    let mut block = [0; 34];
    block[..2].copy_from_slice(&d.to_le_bytes());
    block[2..].copy_from_slice(bytemuck::cast_slice(&q));
    block
}

/// The scale is what the largest magnitude needs, with the sign that puts it on −8.
pub(super) fn encode_q4_0(values: &[f32; 32]) -> [u8; 18] {
    let d = f16::from_f32(extreme(values) / -8.0 + broken(values));
    let inverse = if d.to_f32() == 0.0 { 0.0 } else { 1.0 / d.to_f32() };
    let mut q = [0; 32];
    q.iter_mut().zip(values).for_each(|(q, x)| *q = level(x * inverse + 8.0, 0.0, 15.0) as u8);
    let mut block = [0; 18];
    block[..2].copy_from_slice(&d.to_le_bytes());
    block[2..].copy_from_slice(&packed(&q));
    block
}

pub(super) fn encode_q4_1(values: &[f32; 32]) -> [u8; 20] {
    let Q4Block { d, m, q } = q4_of(values);
    let mut block = [0; 20];
    block[..2].copy_from_slice(&d.to_le_bytes());
    block[2..4].copy_from_slice(&m.to_le_bytes());
    block[4..].copy_from_slice(&packed(&q));
    block
}

/// The value of largest magnitude; of several, the first.
fn extreme(values: &[f32; 32]) -> f32 {
    // In eight lanes, which the compiler may not make of one on its own.
    let (mut highs, mut lows) = ([0.0f32; 8], [0.0f32; 8]);
    for eight in values.as_chunks::<8>().0 {
        for ((high, low), &x) in highs.iter_mut().zip(&mut lows).zip(eight) {
            *high = if x > *high { x } else { *high };
            *low = if x < *low { x } else { *low };
        }
    }
    let high = highs.into_iter().fold(0.0, f32::max);
    let low = lows.into_iter().fold(0.0, f32::min);
    match high == -low {
        // Both signs reach it, or there is nothing but zeros: whichever comes first.
        true => values.iter().copied().find(|x| x.abs() == high && high > 0.0).unwrap_or(0.0),
        false if high > -low => high,
        false => low,
    }
}
