//! How weights are stored: every type is one row of [`FORMATS`], which says how it is named, how long its blocks are,
//! how they become f32 and back, and as what they rest in device memory. Not here: the blocks themselves (`block32.rs`,
//! `kquant.rs`), and where weights lie (`weights.rs`).

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::{block32, kquant};
use crate::tensor::DType;
use crate::tensor::stored::{Q4Block, Q8Block, encode, q4_rows, q8_rows};

/// Type of a stored tensor. The quantised ones are those of GGML; all bytes are little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
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
    /// 32 elements in 22 bytes: f16 scale d, 5 bits q; x = d·(q − 16).
    Q5_0,
    /// 32 elements in 24 bytes: f16 scale d, f16 minimum m, 5 bits q; x = d·q + m.
    Q5_1,
    /// 256 elements in 176 bytes, see `kquant.rs`.
    Q5_K,
    /// 256 elements in 84 bytes, see `kquant.rs`.
    Q2_K,
    /// 256 elements in 110 bytes, see `kquant.rs`.
    Q3_K,
    /// 32 elements in 18 bytes: f16 scale d, nibbles that choose among 16 uneven levels k; x = d·k.
    IQ4_NL,
    /// 256 elements in 136 bytes: the levels of IQ4_NL, see `kquant.rs`.
    IQ4_XS,
    /// 32 elements in 17 bytes: a power of two d, nibbles that are floats of 4 bits k; x = d·k.
    MXFP4,
}

/// What a type is.
struct Format {
    dtype: StoredType,
    name: &'static str,
    /// GGML's number of it.
    ggml: u32,
    /// Elements of a block, and its bytes.
    block: (usize, usize),
    /// Appends the values of whole blocks.
    decode: fn(&[u8], &mut Vec<f32>),
    /// `None` for a type that is only read.
    written: Option<Written>,
    held: Held,
}

/// How a type is written.
struct Written {
    /// Appends the blocks of values.
    encode: fn(&[f32], &mut Vec<u8>),
    /// llama.cpp's `LLAMA_FTYPE` of a file that is mostly of this type; it only prints it.
    file_type: u32,
}

const fn written(file_type: u32, encode: fn(&[f32], &mut Vec<u8>)) -> Option<Written> {
    Some(Written { encode, file_type })
}

/// As what a matrix of a type rests in device memory, where nobody asks for another precision.
enum Held {
    /// As the same bytes.
    Same(DType),
    /// As [`DType::Q8`]: appends one stored block as blocks of 32.
    Q8(fn(&[u8], &mut Vec<Q8Block>), Fidelity),
    /// As [`DType::Q4`]: the same.
    Q4(fn(&[u8], &mut Vec<Q4Block>), Fidelity),
    /// As blocks of 32 with scales of their own, found anew.
    Rounded(DType),
}

/// What another type on the device makes of the values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fidelity {
    /// The same numbers under the same scales, at most in another order.
    Same,
    /// Other numbers that give the same values.
    Exact,
    /// The same numbers under scales that are products, rounded to f16 (by 2⁻¹² at most).
    ScalesRounded,
    /// Other numbers, within half a step of the new type.
    Rounded,
}

/// In the order of [`StoredType`].
const FORMATS: &[Format] = &[
    Format {
        dtype: StoredType::F32,
        name: "f32",
        ggml: 0,
        block: (1, 4),
        decode: |bytes, out| out.extend(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b))),
        written: written(0, |values, out| out.extend_from_slice(bytemuck::cast_slice(values))),
        held: Held::Same(DType::F32),
    },
    Format {
        dtype: StoredType::F16,
        name: "f16",
        ggml: 1,
        block: (1, 2),
        decode: decode_f16,
        written: written(1, |values, out| {
            out.extend(values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()))
        }),
        held: Held::Same(DType::F16),
    },
    Format {
        dtype: StoredType::BF16,
        name: "bf16",
        ggml: 30,
        block: (1, 2),
        decode: |bytes, out| {
            out.extend(bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()))
        },
        written: written(32, |values, out| {
            out.extend(values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()))
        }),
        held: Held::Same(DType::Bf16),
    },
    Format {
        dtype: StoredType::Q8_0,
        name: "q8_0",
        ggml: 8,
        block: (32, 34),
        decode: |bytes, out| each(bytes, out, block32::decode_q8_0),
        written: written(7, |values, out| each_32(values, out, block32::encode_q8_0)),
        held: Held::Q8(|block, out| out.push(block32::q8_0(block)), Fidelity::Same),
    },
    Format {
        dtype: StoredType::Q4_0,
        name: "q4_0",
        ggml: 2,
        block: (32, 18),
        decode: |bytes, out| each(bytes, out, block32::decode_q4_0),
        written: written(2, |values, out| each_32(values, out, block32::encode_q4_0)),
        held: Held::Q4(|block, out| out.push(block32::q4_0(block)), Fidelity::Same),
    },
    Format {
        dtype: StoredType::Q4_1,
        name: "q4_1",
        ggml: 3,
        block: (32, 20),
        decode: |bytes, out| each(bytes, out, block32::decode_q4_1),
        written: written(3, |values, out| each_32(values, out, block32::encode_q4_1)),
        held: Held::Q4(|block, out| out.push(block32::q4_1(block)), Fidelity::Same),
    },
    Format {
        dtype: StoredType::Q4_K,
        name: "q4_k",
        ggml: 12,
        block: (kquant::ELEMENTS, kquant::Q4_BYTES),
        decode: |bytes, out| each(bytes, out, kquant::decode_q4),
        written: written(14, |values, out| {
            for block in values.as_chunks().0 {
                out.extend_from_slice(&kquant::encode_q4(block));
            }
        }),
        held: Held::Q4(kquant::q4_blocks, Fidelity::ScalesRounded),
    },
    Format {
        dtype: StoredType::Q6_K,
        name: "q6_k",
        ggml: 14,
        block: (kquant::ELEMENTS, kquant::Q6_BYTES),
        decode: |bytes, out| each(bytes, out, kquant::decode_q6),
        written: written(18, |values, out| {
            for block in values.as_chunks().0 {
                out.extend_from_slice(&kquant::encode_q6(block));
            }
        }),
        held: Held::Rounded(DType::Q8),
    },
    Format {
        dtype: StoredType::Q5_0,
        name: "q5_0",
        ggml: 6,
        block: (32, 22),
        decode: |bytes, out| each(bytes, out, block32::decode_q5_0),
        written: None,
        held: Held::Q8(|block, out| out.push(block32::q5_0(block)), Fidelity::Exact),
    },
    Format {
        dtype: StoredType::Q5_1,
        name: "q5_1",
        ggml: 7,
        block: (32, 24),
        decode: |bytes, out| each(bytes, out, block32::decode_q5_1),
        written: None,
        held: Held::Rounded(DType::Q8),
    },
    Format {
        dtype: StoredType::Q5_K,
        name: "q5_k",
        ggml: 13,
        block: (kquant::ELEMENTS, kquant::Q5_BYTES),
        decode: |bytes, out| each(bytes, out, kquant::decode_q5),
        written: None,
        held: Held::Rounded(DType::Q8),
    },
    Format {
        dtype: StoredType::Q2_K,
        name: "q2_k",
        ggml: 10,
        block: (kquant::ELEMENTS, kquant::Q2_BYTES),
        decode: |bytes, out| each(bytes, out, kquant::decode_q2),
        written: None,
        held: Held::Rounded(DType::Q8),
    },
    Format {
        dtype: StoredType::Q3_K,
        name: "q3_k",
        ggml: 11,
        block: (kquant::ELEMENTS, kquant::Q3_BYTES),
        decode: |bytes, out| each(bytes, out, kquant::decode_q3),
        written: None,
        held: Held::Q8(kquant::q3_blocks, Fidelity::Exact),
    },
    Format {
        dtype: StoredType::IQ4_NL,
        name: "iq4_nl",
        ggml: 20,
        block: (32, 18),
        decode: |bytes, out| each(bytes, out, block32::decode_iq4_nl),
        written: None,
        held: Held::Q8(|block, out| out.push(block32::iq4_nl(block)), Fidelity::Exact),
    },
    Format {
        dtype: StoredType::IQ4_XS,
        name: "iq4_xs",
        ggml: 23,
        block: (kquant::ELEMENTS, kquant::IQ4_BYTES),
        decode: |bytes, out| each(bytes, out, kquant::decode_iq4),
        written: None,
        held: Held::Q8(kquant::iq4_blocks, Fidelity::ScalesRounded),
    },
    Format {
        dtype: StoredType::MXFP4,
        name: "mxfp4",
        ggml: 39,
        block: (32, 17),
        decode: |bytes, out| each(bytes, out, block32::decode_mxfp4),
        written: None,
        held: Held::Q8(|block, out| out.push(block32::mxfp4(block)), Fidelity::Exact),
    },
];

impl StoredType {
    /// Every type.
    pub const ALL: [Self; FORMATS.len()] = {
        let mut all = [Self::F32; FORMATS.len()];
        let mut i = 0;
        while i < all.len() {
            assert!(FORMATS[i].dtype as usize == i, "rows are in the order of the types");
            all[i] = FORMATS[i].dtype;
            i += 1;
        }
        all
    };

    fn format(self) -> &'static Format {
        &FORMATS[self as usize]
    }

    /// Elements that are stored together.
    pub fn block_elements(self) -> usize {
        self.format().block.0
    }

    /// Bytes that `block_elements` take.
    pub fn block_bytes(self) -> usize {
        self.format().block.1
    }

    /// Its name in lower case.
    pub fn name(self) -> &'static str {
        self.format().name
    }

    /// GGML's number of it, which GGUF files carry.
    pub fn ggml_number(self) -> u32 {
        self.format().ggml
    }

    /// Whether files of it are written here; the others are only read.
    pub fn is_written(self) -> bool {
        self.format().written.is_some()
    }

    /// llama.cpp's number of a file that is mostly of this type, where such files are written.
    pub(crate) fn file_type(self) -> Option<u32> {
        self.format().written.as_ref().map(|written| written.file_type)
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

    /// As what a matrix of it rests in device memory, and how closely.
    pub fn held_as(self) -> (DType, Fidelity) {
        match self.format().held {
            Held::Same(dtype) => (dtype, Fidelity::Same),
            Held::Q8(_, fidelity) => (DType::Q8, fidelity),
            Held::Q4(_, fidelity) => (DType::Q4, fidelity),
            Held::Rounded(dtype) => (dtype, Fidelity::Rounded),
        }
    }
}

/// Appends the f32 values of whole blocks in `bytes` to `out`. The bytes need no alignment.
pub(crate) fn dequantise(dtype: StoredType, bytes: &[u8], out: &mut Vec<f32>) {
    (dtype.format().decode)(bytes, out);
}

/// Appends the little-endian bytes of values as a type, rounded to the nearest for floats; for the choice of scales see
/// `block32.rs`, `tensor::stored` and `kquant.rs`.
///
/// # Panics
/// If the values are no whole blocks, or the type is only read.
pub(crate) fn quantise(dtype: StoredType, values: &[f32], out: &mut Vec<u8>) {
    assert!(values.len().is_multiple_of(dtype.block_elements()), "{} values", values.len());
    match &dtype.format().written {
        Some(written) => (written.encode)(values, out),
        None => panic!("{dtype:?} is only read"),
    }
}

/// Stored blocks as the rows of `columns` that kernels read, of the type that [`StoredType::held_as`] says.
pub(crate) fn repack(dtype: StoredType, bytes: &[u8], columns: usize) -> Vec<u8> {
    let (elements, block_bytes) = dtype.format().block;
    let rows = bytes.chunks_exact((columns / elements * block_bytes).max(1));
    let blocks = |row| <[u8]>::chunks_exact(row, block_bytes);
    // One row's blocks at a time, which a processor's cache holds.
    let (mut eight, mut four, mut values) = (vec![], vec![], vec![]);
    let mut out = Vec::new();
    for row in rows {
        match dtype.format().held {
            Held::Same(_) => out.extend_from_slice(row),
            Held::Q8(split, _) => {
                blocks(row).for_each(|block| split(block, &mut eight));
                out.extend(q8_rows(columns, eight.drain(..)));
            }
            Held::Q4(split, _) => {
                blocks(row).for_each(|block| split(block, &mut four));
                out.extend(q4_rows(columns, four.drain(..)));
            }
            Held::Rounded(to) => {
                dequantise(dtype, row, &mut values);
                out.extend(encode(&values, columns, to));
                values.clear();
            }
        }
    }
    out
}

/// Decodes the blocks of N bytes.
fn each<const N: usize>(
    bytes: &[u8],
    out: &mut Vec<f32>,
    decode: impl Fn(&[u8; N], &mut Vec<f32>),
) {
    bytes.as_chunks().0.iter().for_each(|block| decode(block, out));
}

/// Appends one block of N bytes for every 32 values.
fn each_32<const N: usize>(
    values: &[f32],
    out: &mut Vec<u8>,
    encode: impl Fn(&[f32; 32]) -> [u8; N],
) {
    out.reserve(values.len() / 32 * N);
    values.as_chunks().0.iter().for_each(|block| out.extend_from_slice(&encode(block)));
}

/// Through a buffer that is aligned, since the file's bytes need not be, so that many are converted at once.
fn decode_f16(bytes: &[u8], out: &mut Vec<f32>) {
    let mut halves = [f16::ZERO; 512];
    for piece in bytes.chunks(2 * halves.len()) {
        let n = piece.len() / 2;
        halves.iter_mut().zip(piece.as_chunks().0).for_each(|(h, b)| *h = f16::from_le_bytes(*b));
        let first = out.len();
        out.resize(first + n, 0.0);
        halves[..n].convert_to_f32_slice(&mut out[first..]);
    }
}

#[cfg(test)]
mod tests;
