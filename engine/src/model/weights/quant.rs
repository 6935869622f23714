//! How weights are stored, and how each type becomes f32. Not here: where they lie (`weights.rs`).

use std::array;

use half::{bf16, f16};

use super::kquant;
use crate::tensor::stored::{Q4Block, Q8Block, q4_of, q4_rows, q8_of, q8_rows};

/// Type of a stored tensor. The quantised ones are those of GGML; all bytes are little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "the names every tool around GGUF prints")]
pub enum StoredType {
    /// 4 bytes an element.
    F32,
    /// IEEE half, 2 bytes an element.
    F16,
    /// Upper half of an f32, 2 bytes an element.
    BF16,
    /// 32 elements in 34 bytes: f16 scale d, 32 × i8 q; x = d·q.
    Q8_0,
    /// 32 elements in 18 bytes: f16 scale d, 16 bytes of nibbles q (low nibbles first); x = d·(q −
    /// 8).
    Q4_0,
    /// 32 elements in 20 bytes: f16 scale d, f16 minimum m, 16 bytes of nibbles q; x = d·q + m.
    Q4_1,
    /// 256 elements in 144 bytes, see `kquant.rs`.
    Q4_K,
    /// 256 elements in 210 bytes, see `kquant.rs`.
    Q6_K,
}

impl StoredType {
    /// Elements that are stored together.
    pub fn block_elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 => 32,
            Self::Q4_K | Self::Q6_K => kquant::ELEMENTS,
        }
    }

    /// Bytes that `block_elements` take.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q4_K => kquant::Q4_BYTES,
            Self::Q6_K => kquant::Q6_BYTES,
        }
    }

    /// Every type.
    pub const ALL: [Self; 8] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q4_K,
        Self::Q6_K,
    ];

    /// Its name in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q4_K => "q4_k",
            Self::Q6_K => "q6_k",
        }
    }

    /// GGML's number of it, which GGUF files carry.
    pub fn ggml_number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 8,
            Self::Q4_K => 12,
            Self::Q6_K => 14,
            Self::BF16 => 30,
        }
    }

    /// Whether elements are plain floats rather than blocks.
    pub fn is_float(self) -> bool {
        self.block_elements() == 1
    }

    /// Bytes of `elements` elements; `None` where they do not fill whole blocks, or overflow.
    pub(crate) fn bytes(self, elements: u64) -> Option<u64> {
        let block = self.block_elements() as u64;
        match elements.is_multiple_of(block) {
            true => (elements / block).checked_mul(self.block_bytes() as u64),
            false => None,
        }
    }

    /// Name that HF `config.json` uses for a float type; `float32` for quantised ones.
    pub fn torch_dtype(self) -> &'static str {
        match self {
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
            _ => "float32",
        }
    }
}

/// Appends the f32 values of whole blocks in `bytes` to `out`. The bytes need no alignment.
pub(crate) fn dequantise(dtype: StoredType, bytes: &[u8], out: &mut Vec<f32>) {
    match dtype {
        StoredType::F32 => out.extend(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b))),
        StoredType::F16 => {
            out.extend(bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()))
        }
        StoredType::BF16 => {
            out.extend(bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()))
        }
        StoredType::Q8_0 => {
            for block in bytes.as_chunks::<34>().0 {
                let d = half_at(block, 0);
                out.extend(block[2..].iter().map(|&q| d * f32::from(q as i8)));
            }
        }
        StoredType::Q4_0 => {
            for block in bytes.as_chunks::<18>().0 {
                let d = half_at(block, 0);
                out.extend(nibbles(&block[2..]).map(|q| d * (q - 8.0)));
            }
        }
        StoredType::Q4_1 => {
            for block in bytes.as_chunks::<20>().0 {
                let (d, m) = (half_at(block, 0), half_at(block, 2));
                out.extend(nibbles(&block[4..]).map(|q| d * q + m));
            }
        }
        StoredType::Q4_K => {
            bytes.as_chunks().0.iter().for_each(|block| kquant::decode_q4(block, out));
        }
        StoredType::Q6_K => {
            bytes.as_chunks().0.iter().for_each(|block| kquant::decode_q6(block, out));
        }
    }
}

/// The little-endian bytes of values as a type, rounded to the nearest for floats. A block of [`StoredType::Q4_0`] has
/// the scale that its largest magnitude needs, with the sign that puts it on -8; for the other types see
/// `tensor::stored` and `kquant.rs`.
///
/// # Panics
/// If the values are no whole blocks.
pub(crate) fn quantise(dtype: StoredType, values: &[f32]) -> Vec<u8> {
    assert!(values.len().is_multiple_of(dtype.block_elements()), "{} values", values.len());
    let blocks = values.as_chunks::<32>().0.iter();
    match dtype {
        StoredType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        StoredType::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        StoredType::BF16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        StoredType::Q8_0 => {
            let bytes = |b: Q8Block| b.d.to_le_bytes().into_iter().chain(b.q.map(|q| q as u8));
            blocks.map(q8_of).flat_map(bytes).collect()
        }
        StoredType::Q4_0 => blocks
            .flat_map(|block| {
                let most = block.iter().fold(0.0f32, |a, x| if x.abs() > a.abs() { *x } else { a });
                let d = f16::from_f32(most / -8.0);
                let inverse = if d.to_f32() == 0.0 { 0.0 } else { 1.0 / d.to_f32() };
                let q = block.map(|x| (x * inverse + 8.0).round().clamp(0.0, 15.0) as u8);
                d.to_le_bytes().into_iter().chain(packed(&q))
            })
            .collect(),
        StoredType::Q4_1 => {
            let bytes = |b: Q4Block| {
                let numbers = b.d.to_le_bytes().into_iter().chain(b.m.to_le_bytes());
                numbers.chain(packed(&b.q))
            };
            blocks.map(q4_of).flat_map(bytes).collect()
        }
        StoredType::Q4_K => values.as_chunks().0.iter().flat_map(kquant::encode_q4).collect(),
        StoredType::Q6_K => values.as_chunks().0.iter().flat_map(kquant::encode_q6).collect(),
    }
}

/// Nibbles of a block: the first half in the low ones.
fn packed(q: &[u8; 32]) -> [u8; 16] {
    array::from_fn(|i| q[i] | q[i + 16] << 4)
}

/// GGML blocks as the rows of `columns` that kernels read: Q8_0 as [`crate::tensor::DType::Q8`], Q4_0 and Q4_1 as
/// [`crate::tensor::DType::Q4`], exactly; Q4_K as the latter, with scales and minima rounded to f16.
///
/// # Panics
/// On another type.
pub(crate) fn repack(dtype: StoredType, bytes: &[u8], columns: usize) -> Vec<u8> {
    let half = |b: &[u8]| f16::from_le_bytes([b[0], b[1]]);
    let q4 = |block: &[u8], m: f16, packed: &[u8]| Q4Block {
        d: half(block),
        m,
        q: array::from_fn(|i| (packed[i % 16] >> (4 * (i / 16))) & 15),
    };
    match dtype {
        StoredType::Q8_0 => {
            let block =
                |b: &[u8; 34]| Q8Block { d: half(b), q: array::from_fn(|i| b[2 + i] as i8) };
            q8_rows(columns, bytes.as_chunks().0.iter().map(block))
        }
        StoredType::Q4_0 => {
            // x = d (q - 8): the minimum is -8 d, exact but where it overflows f16.
            let block = |b: &[u8; 18]| q4(b, f16::from_f32(-8.0 * half(b).to_f32()), &b[2..]);
            q4_rows(columns, bytes.as_chunks().0.iter().map(block))
        }
        StoredType::Q4_1 => {
            let block = |b: &[u8; 20]| q4(b, half(&b[2..]), &b[4..]);
            q4_rows(columns, bytes.as_chunks().0.iter().map(block))
        }
        StoredType::Q4_K => {
            let blocks = bytes.as_chunks().0.iter().flat_map(kquant::q4_blocks);
            q4_rows(columns, blocks)
        }
        other => panic!("{other:?} has no blocks that a kernel reads as they are"),
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The low nibbles of all bytes are the first half of a block, the high ones the second.
fn nibbles(packed: &[u8]) -> impl Iterator<Item = f32> {
    let low = packed.iter().map(|b| f32::from(b & 15));
    low.chain(packed.iter().map(|b| f32::from(b >> 4)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_decode_as_ggml_defines_them() {
        let packed: Vec<u8> = (0..16).map(|i| i | (15 - i) << 4).collect();
        let half = |x: f32| f16::from_f32(x).to_le_bytes();
        let expect = |x: fn(f32) -> f32| -> Vec<f32> {
            (0..16).map(|i| x(i as f32)).chain((0..16).map(|i| x(15.0 - i as f32))).collect()
        };
        let decode = |dtype, bytes: Vec<u8>| {
            let mut out = vec![];
            dequantise(dtype, &bytes, &mut out);
            out
        };
        let q4_0 = [&half(0.5)[..], &packed].concat();
        assert_eq!(decode(StoredType::Q4_0, q4_0), expect(|q| 0.5 * (q - 8.0)));
        let q4_1 = [&half(0.5)[..], &half(-3.0), &packed].concat();
        assert_eq!(decode(StoredType::Q4_1, q4_1), expect(|q| 0.5 * q - 3.0));
        let bytes: Vec<u8> = (0..32).map(|i| (i - 16) as i8 as u8).collect();
        let q8_0 = decode(StoredType::Q8_0, [&half(0.25)[..], &bytes].concat());
        assert_eq!(q8_0, (0..32).map(|i| 0.25 * (i - 16) as f32).collect::<Vec<_>>());
        assert_eq!(decode(StoredType::BF16, vec![0x80, 0x3f, 0, 0xc0]), [1.0, -2.0]);
        assert_eq!(decode(StoredType::F16, half(1.5).to_vec()), [1.5]);
    }

    #[test]
    fn repacked_blocks_keep_their_values() {
        use crate::tensor::{DType, stored};
        let noise: Vec<u8> = (0..2 * 3 * 34).map(|i| (i * 89 + 7) as u8).collect();
        for (dtype, block, to) in [
            (StoredType::Q8_0, 34, DType::Q8),
            (StoredType::Q4_0, 18, DType::Q4),
            (StoredType::Q4_1, 20, DType::Q4),
        ] {
            let mut bytes = noise[..2 * 3 * block].to_vec();
            for b in bytes.chunks_mut(block) {
                // Finite scales.
                let d = f16::from_f32(f32::from(b[5]) / 64.0);
                b[..2].copy_from_slice(&d.to_le_bytes());
                if dtype == StoredType::Q4_1 {
                    b[2..4].copy_from_slice(&f16::from_f32(-1.5).to_le_bytes());
                }
            }
            let mut expected = vec![];
            dequantise(dtype, &bytes, &mut expected);
            let rows = repack(dtype, &bytes, 96);
            assert_eq!(stored::decode(&rows, 96, to), expected, "{dtype:?}");
        }
    }
}
