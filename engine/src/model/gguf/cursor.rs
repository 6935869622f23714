//! Reading the parts of a GGUF file from its bytes, each checked against their end.
//! Not here: the file as a whole (`gguf.rs`).

use std::path::Path;

use super::GgufTensor;
use crate::model::weights::quant::StoredType;
use crate::{Error, Result};

/// Longest metadata key and tensor name, in bytes.
const MAX_NAME_BYTES: usize = 1 << 10;

/// A metadata value. Integers of every width are widened.
#[derive(Clone, Copy)]
pub(super) enum Value<'a> {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(&'a str),
    Array(Array<'a>),
}

/// An array that stays in the file: `count` items of `kind` in `bytes`.
#[derive(Clone, Copy)]
pub(super) struct Array<'a> {
    pub kind: u32,
    pub count: usize,
    pub bytes: &'a [u8],
}

pub(super) const KIND_STRING: u32 = 8;
const KIND_ARRAY: u32 = 9;

/// Reads little-endian values from a slice; every read is checked against its end.
pub(super) struct Cursor<'a> {
    pub path: &'a Path,
    pub bytes: &'a [u8],
    pub at: usize,
}

impl<'a> Cursor<'a> {
    pub fn error(&self, reason: impl Into<String>) -> Error {
        Error::model(self.path, reason)
    }

    pub fn take(&mut self, n: u64) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        match usize::try_from(n).ok().and_then(|n| rest.get(..n)) {
            Some(taken) => {
                self.at += taken.len();
                Ok(taken)
            }
            None => {
                let (at, left) = (self.at, rest.len());
                Err(self.error(format!(
                    "truncated: {n} bytes wanted at byte {at}, {left} left; fetch the file again"
                )))
            }
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N as u64)?);
        Ok(bytes)
    }

    pub fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub fn string(&mut self) -> Result<&'a str> {
        let length = self.u64()?;
        let at = self.at;
        let bytes = self.take(length)?;
        std::str::from_utf8(bytes)
            .map_err(|_| self.error(format!("the text at byte {at} is not UTF-8")))
    }

    pub fn name(&mut self) -> Result<&'a str> {
        let name = self.string()?;
        match name.len() <= MAX_NAME_BYTES {
            true => Ok(name),
            false => Err(self.error(format!(
                "a name of {} bytes; at most {MAX_NAME_BYTES} are accepted",
                name.len()
            ))),
        }
    }

    pub fn value(&mut self, kind: u32) -> Result<Value<'a>> {
        Ok(match kind {
            0 => Value::Unsigned(u8::from_le_bytes(self.array()?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => match self.array::<1>()? {
                [flag @ (0 | 1)] => Value::Bool(flag == 1),
                [other] => return Err(self.error(format!("a flag of {other}; expected 0 or 1"))),
            },
            KIND_STRING => Value::Text(self.string()?),
            KIND_ARRAY => Value::Array(self.read_array()?),
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => {
                return Err(self.error(format!("value type {other} is unknown; expected 0 to 12")));
            }
        })
    }

    /// Walks over an array and keeps its place. Arrays of arrays, which no Llama has, are refused,
    /// so nothing recurses.
    fn read_array(&mut self) -> Result<Array<'a>> {
        let (kind, count) = (self.u32()?, self.u64()?);
        let start = self.at;
        let item_bytes = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            KIND_STRING => {
                for _ in 0..count {
                    self.string()?;
                }
                0
            }
            KIND_ARRAY => return Err(self.error("an array of arrays is not supported")),
            other => {
                return Err(
                    self.error(format!("array item type {other} is unknown; expected 0 to 12"))
                );
            }
        };
        match count.checked_mul(item_bytes) {
            Some(length) => self.take(length)?,
            None => {
                return Err(
                    self.error(format!("an array of {count} items does not fit in the file"))
                );
            }
        };
        Ok(Array { kind, count: count as usize, bytes: &self.bytes[start..self.at] })
    }

    /// One entry of the tensor directory; its `start` still counts from the data section.
    pub fn tensor(&mut self) -> Result<GgufTensor<'a>> {
        let name = self.name()?;
        let n_dims = self.u32()?;
        if !(1..=4).contains(&n_dims) {
            return Err(
                self.error(format!("tensor {name:?} has {n_dims} dimensions; expected 1 to 4"))
            );
        }
        let mut shape = vec![];
        let mut elements = 1u64;
        for _ in 0..n_dims {
            let n = self.u64()?;
            let product =
                elements.checked_mul(n).filter(|&product| product > 0 && product < 1 << 48);
            let Some(product) = product else {
                return Err(self.error(format!(
                    "tensor {name:?} has a dimension of {n}; its size is zero or absurd"
                )));
            };
            elements = product;
            shape.push(n as usize);
        }
        let row = shape[0];
        shape.reverse();
        let dtype = stored_type(self.u32()?).map_err(|kind| {
            let known = StoredType::ALL.map(|t| format!("{t:?}")).join(", ");
            self.error(format!("tensor {name:?} is {kind}; supported are {known}"))
        })?;
        let length = dtype.bytes(elements).filter(|_| row.is_multiple_of(dtype.block_elements()));
        let Some(length) = length else {
            return Err(self.error(format!(
                "tensor {name:?} has rows of {row} elements, which {dtype:?} cannot hold"
            )));
        };
        let start = self.u64()?;
        let (Ok(start), Ok(length)) = (usize::try_from(start), usize::try_from(length)) else {
            return Err(self
                .error(format!("tensor {name:?} begins at {start}, beyond what memory can map")));
        };
        Ok(GgufTensor { name, shape, dtype, file: 0, start, length })
    }
}

/// GGML's number of a tensor type; for an unsupported one, its name.
fn stored_type(number: u32) -> std::result::Result<StoredType, String> {
    if let Some(known) = StoredType::ALL.into_iter().find(|t| t.ggml_number() == number) {
        return Ok(known);
    }
    let name = match number {
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        24..=27 => "of whole numbers",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        40 => "NVFP4",
        other => return Err(format!("of GGML type {other}")),
    };
    Err(name.to_owned())
}
