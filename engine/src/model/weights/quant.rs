//! How weights are stored, and how each type becomes f32. Not here: where they lie (`weights.rs`).

use half::{bf16, f16};

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
}

impl StoredType {
    /// Elements that are stored together.
    pub fn block_elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 => 32,
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
            Self::F32 | Self::Q8_0 | Self::Q4_0 | Self::Q4_1 => "float32",
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
}
