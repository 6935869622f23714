//! f32 values to the bytes of each weight type and back, row by row, as the kernels read them.

use half::{bf16, f16};

use super::{DType, QUANT_BLOCK};

/// The bytes of `values`, rows of `columns`, as `dtype`. Halves round to nearest even; a quantised block gets the
/// scale (and minimum) that reaches its extremes.
///
/// # Panics
/// If a quantised row is no whole number of blocks.
pub fn encode(values: &[f32], columns: usize, dtype: DType) -> Vec<u8> {
    match dtype {
        DType::Bf16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        DType::Q8 => q8_rows(columns, values.as_chunks().0.iter().map(q8_of)),
        DType::Q4 => q4_rows(columns, values.as_chunks().0.iter().map(q4_of)),
        DType::F32 | DType::U32 => bytemuck::cast_slice(values).to_vec(),
    }
}

/// The f32 values of bytes that [`encode`] made, or that a kernel would read.
pub fn decode(bytes: &[u8], columns: usize, dtype: DType) -> Vec<f32> {
    let halves = || bytes.as_chunks::<2>().0.iter().copied();
    match dtype {
        DType::Bf16 => halves().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
        DType::F16 => halves().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
        DType::Q8 | DType::Q4 => {
            let rows = bytes.chunks_exact(dtype.row_bytes(columns).max(1));
            rows.flat_map(|row| decode_row(row, columns, dtype)).collect()
        }
        DType::F32 | DType::U32 => bytemuck::pod_collect_to_vec(bytes),
    }
}

fn decode_row(row: &[u8], columns: usize, dtype: DType) -> Vec<f32> {
    let half_at = |i: usize| f16::from_le_bytes([row[i], row[i + 1]]).to_f32();
    let value = |i: usize| match dtype {
        DType::Q8 => half_at(columns + 2 * (i / QUANT_BLOCK)) * f32::from(row[i] as i8),
        _ => {
            let pair = columns / 2 + 4 * (i / QUANT_BLOCK);
            let q = (row[i / 2] >> (4 * (i % 2))) & 15;
            half_at(pair).mul_add(f32::from(q), half_at(pair + 2))
        }
    };
    (0..columns).map(value).collect()
}

/// A block of [`DType::Q8`]: x = d q.
pub(crate) struct Q8Block {
    pub d: f16,
    pub q: [i8; QUANT_BLOCK],
}

/// A block of [`DType::Q4`]: x = d q + m, q in 0..16.
pub(crate) struct Q4Block {
    pub d: f16,
    pub m: f16,
    pub q: [u8; QUANT_BLOCK],
}

/// −0, or NaN if a value is not finite: added to a block's scale, it changes nothing, or makes the whole block tell of
/// it.
pub(crate) fn broken(values: &[f32]) -> f32 {
    // Whole numbers, so that the compiler may take many at a time.
    let most = values.iter().fold(0, |most, v| (v.to_bits() & !(1 << 31)).max(most));
    if most < f32::INFINITY.to_bits() { -0.0 } else { f32::NAN }
}

pub(crate) fn q8_of(values: &[f32; QUANT_BLOCK]) -> Q8Block {
    // In eight lanes, which the compiler may not make of one on its own.
    let mut most = [0.0f32; 8];
    for eight in values.as_chunks::<8>().0 {
        most.iter_mut().zip(eight).for_each(|(most, v)| *most = most.max(v.abs()));
    }
    let most = most.into_iter().fold(0.0, f32::max);
    let d = f16::from_f32(most / 127.0 + broken(values));
    let inverse = if d.to_f32() > 0.0 { 1.0 / d.to_f32() } else { 0.0 };
    let mut q = [0; QUANT_BLOCK];
    q.iter_mut().zip(values).for_each(|(q, v)| *q = level(v * inverse, -127.0, 127.0) as i8);
    Q8Block { d, q }
}

pub(crate) fn q4_of(values: &[f32; QUANT_BLOCK]) -> Q4Block {
    let low = values.iter().copied().fold(f32::INFINITY, f32::min);
    let high = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let (d, m) = (f16::from_f32((high - low) / 15.0 + broken(values)), f16::from_f32(low));
    let inverse = if d.to_f32() > 0.0 { 1.0 / d.to_f32() } else { 0.0 };
    let least = m.to_f32();
    let mut q = [0; QUANT_BLOCK];
    q.iter_mut().zip(values).for_each(|(q, v)| *q = level((v - least) * inverse, 0.0, 15.0) as u8);
    Q4Block { d, m, q }
}

/// The whole number nearest to x within whole bounds below 2²³, halves away from zero, a NaN as 0. As
/// `x.round().clamp(least, most)`, without the call into a library that `round` is where a processor's least has no
/// instruction for it; so loops over it become vector code.
pub(crate) fn level(x: f32, least: f32, most: f32) -> i32 {
    let x = x.clamp(least, most);
    let whole = x as i32;
    let rest = x - whole as f32;
    whole + i32::from(rest >= 0.5) - i32::from(rest <= -0.5)
}

/// Rows of [`DType::Q8`] from their blocks in order.
pub(crate) fn q8_rows(columns: usize, blocks: impl Iterator<Item = Q8Block>) -> Vec<u8> {
    let row_bytes = DType::Q8.row_bytes(columns);
    let per_row = columns / QUANT_BLOCK;
    let mut rows = Vec::new();
    for (i, block) in blocks.enumerate() {
        let (row, at) = (i / per_row * row_bytes, i % per_row);
        rows.resize(row + row_bytes, 0);
        let q = row + at * QUANT_BLOCK;
        rows[q..q + QUANT_BLOCK].copy_from_slice(bytemuck::cast_slice(&block.q));
        let d = row + columns + 2 * at;
        rows[d..d + 2].copy_from_slice(&block.d.to_le_bytes());
    }
    rows
}

/// Rows of [`DType::Q4`] from their blocks in order.
pub(crate) fn q4_rows(columns: usize, blocks: impl Iterator<Item = Q4Block>) -> Vec<u8> {
    let row_bytes = DType::Q4.row_bytes(columns);
    let per_row = columns / QUANT_BLOCK;
    let mut rows = Vec::new();
    for (i, block) in blocks.enumerate() {
        let (row, at) = (i / per_row * row_bytes, i % per_row);
        rows.resize(row + row_bytes, 0);
        let bytes = block.q.as_chunks::<2>().0.iter().map(|[low, high]| low | (high << 4));
        for (j, byte) in bytes.enumerate() {
            rows[row + at * QUANT_BLOCK / 2 + j] = byte;
        }
        let pair = row + columns / 2 + 4 * at;
        rows[pair..pair + 2].copy_from_slice(&block.d.to_le_bytes());
        rows[pair + 2..pair + 4].copy_from_slice(&block.m.to_le_bytes());
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_decodes_within_its_step() {
        let values: Vec<f32> = (0..3 * 96).map(|i| ((i * 37 % 101) as f32 - 40.0) / 7.0).collect();
        for (dtype, bound) in [
            (DType::F32, 0.0),
            (DType::F16, 0.01),
            (DType::Bf16, 0.05),
            (DType::Q8, 0.04),
            (DType::Q4, 0.5),
        ] {
            let bytes = encode(&values, 96, dtype);
            assert_eq!(bytes.len(), 3 * dtype.row_bytes(96), "{dtype:?}");
            let back = decode(&bytes, 96, dtype);
            let worst = values.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= bound, "{dtype:?}: {worst}");
            assert_eq!(back.len(), values.len());
        }
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = [0.5; 64];
            values[40] = value;
            for dtype in [DType::F32, DType::F16, DType::Bf16, DType::Q8, DType::Q4] {
                let back = decode(&encode(&values, 64, dtype), 64, dtype);
                assert!(
                    !back[40].is_finite() && back[..32].iter().all(|v| v.is_finite()),
                    "{dtype:?}"
                );
            }
        }
    }

    #[test]
    fn a_constant_block_is_exact() {
        for dtype in [DType::Q8, DType::Q4] {
            let zeros = decode(&encode(&[0.0; 32], 32, dtype), 32, dtype);
            assert_eq!(zeros, [0.0; 32], "{dtype:?}");
        }
        let halves = decode(&encode(&[-0.5; 64], 64, DType::Q4), 64, DType::Q4);
        assert_eq!(halves, [-0.5; 64]);
    }
}
