//! GGUF container, versions 2 and 3, read as if it were hostile: metadata and tensor directory. Not
//! here: what a Llama's metadata means (`gguf/llama.rs`), its tokenizer (`tokenizer/from_gguf.rs`).
//!
//! Nothing is allocated by a count the file claims: values are views into the mapped bytes, and the
//! two directories are capped ([`MAX_ENTRIES`] each).

use std::collections::BTreeMap;
use std::path::Path;

use super::weights::quant::StoredType;
use crate::{Error, Result};

mod cursor;
pub(crate) mod ends;
pub(crate) mod llama;
pub(crate) mod split;
pub(crate) mod write;

use cursor::{Cursor, KIND_STRING, Value};

/// Most metadata pairs, and most tensors. A thousand layers have 9,219 tensors.
const MAX_ENTRIES: u64 = 1 << 16;
/// Largest `general.alignment`.
const MAX_ALIGNMENT: u64 = 1 << 20;

/// The directory of one GGUF file, or of all parts of a split one; borrows the files' bytes.
pub struct Gguf<'a> {
    /// Of the first file, which has the metadata.
    path: &'a Path,
    bytes: Vec<&'a [u8]>,
    metadata: BTreeMap<&'a str, Value<'a>>,
    tensors: Vec<GgufTensor<'a>>,
}

/// One entry of the tensor directory.
pub struct GgufTensor<'a> {
    /// GGUF name, as in `blk.0.attn_q.weight`.
    pub name: &'a str,
    /// Row-major shape, outermost first (GGUF itself writes it innermost first).
    pub shape: Vec<usize>,
    /// Type of the elements.
    pub dtype: StoredType,
    /// Which of the files holds it, from 0.
    pub file: usize,
    /// Start of the data from the start of the file, in bytes.
    pub start: usize,
    /// Length of the data in bytes; `start + length` lies inside the file.
    pub length: usize,
}

impl<'a> Gguf<'a> {
    /// Parses the directory of a whole GGUF file in `bytes`; `path` names it in errors.
    pub fn parse(path: &'a Path, bytes: &'a [u8]) -> Result<Self> {
        let mut cursor = Cursor { path, bytes, at: 0 };
        if cursor.take(4)? != b"GGUF" {
            return Err(cursor.error("does not begin with GGUF; give a .gguf file"));
        }
        match cursor.u32()? {
            2 | 3 => {}
            version if matches!(version.swap_bytes(), 1..=3) => {
                return Err(
                    cursor.error("big-endian GGUF is not supported; convert it to little-endian")
                );
            }
            version => {
                return Err(cursor
                    .error(format!("GGUF version {version} is not supported; expected 2 or 3")));
            }
        }
        let (n_tensors, n_pairs) = (cursor.u64()?, cursor.u64()?);
        for (what, count) in [("tensors", n_tensors), ("metadata pairs", n_pairs)] {
            if count > MAX_ENTRIES {
                return Err(cursor
                    .error(format!("claims {count} {what}; at most {MAX_ENTRIES} are accepted")));
            }
        }
        let mut metadata = BTreeMap::new();
        for _ in 0..n_pairs {
            let key = cursor.name()?;
            let kind = cursor.u32()?;
            let value = cursor.value(kind).map_err(|e| name_key(e, key))?;
            if metadata.insert(key, value).is_some() {
                return Err(cursor.error(format!("metadata key {key:?} is given twice")));
            }
        }
        let mut gguf = Self { path, bytes: vec![bytes], metadata, tensors: vec![] };
        for _ in 0..n_tensors {
            gguf.tensors.push(cursor.tensor()?);
        }
        gguf.place_tensors(cursor.at, bytes.len())?;
        Ok(gguf)
    }

    /// Turns offsets from the data section into offsets from the file's start, and checks the
    /// spans: aligned, inside the file, in one gapless row but for the padding.
    fn place_tensors(&mut self, directory_end: usize, file_bytes: usize) -> Result<()> {
        let alignment = self.u64("general.alignment")?.unwrap_or(32);
        if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
            let reason = format!(
                "general.alignment is {alignment}; expected a power of two up to {MAX_ALIGNMENT}"
            );
            return Err(Error::model(self.path, reason));
        }
        let alignment = alignment as usize;
        let data_start = directory_end.next_multiple_of(alignment);
        let mut order: Vec<usize> = (0..self.tensors.len()).collect();
        order.sort_by_key(|&i| self.tensors[i].start);
        let mut expected = 0usize;
        let mut names = BTreeMap::new();
        for i in order {
            let tensor = &mut self.tensors[i];
            if names.insert(tensor.name, ()).is_some() {
                return Err(Error::model(
                    self.path,
                    format!("tensor {:?} is given twice", tensor.name),
                ));
            }
            if tensor.start != expected {
                let reason = format!(
                    "tensor {:?} begins at data offset {}, but {expected} is next; the file is \
                     damaged, fetch it again",
                    tensor.name, tensor.start
                );
                return Err(Error::model(self.path, reason));
            }
            let end =
                data_start.checked_add(expected).and_then(|start| start.checked_add(tensor.length));
            let Some(end) = end.filter(|&end| end <= file_bytes) else {
                let reason = format!(
                    "truncated: tensor {:?} ends after the file; fetch it again",
                    tensor.name
                );
                return Err(Error::model(self.path, reason));
            };
            tensor.start = data_start + expected;
            expected = (end - data_start).next_multiple_of(alignment);
        }
        Ok(())
    }

    /// Every tensor, in the order of the file's directory.
    pub fn tensors(&self) -> &[GgufTensor<'a>] {
        &self.tensors
    }

    /// The bytes of a tensor.
    pub fn data(&self, tensor: &GgufTensor) -> &'a [u8] {
        &self.bytes[tensor.file][tensor.start..tensor.start + tensor.length]
    }

    /// A text value; an error where the key holds another type.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(self.mistyped(key, "text")),
        }
    }

    /// A whole number of any width that is not negative; an error where the key holds another type.
    pub fn u64(&self, key: &str) -> Result<Option<u64>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Unsigned(n)) => Ok(Some(*n)),
            Some(Value::Signed(n)) if *n >= 0 => Ok(Some(*n as u64)),
            Some(_) => Err(self.mistyped(key, "a whole number")),
        }
    }

    /// A number; an error where the key holds another type.
    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Float(x)) => Ok(Some(*x as f32)),
            Some(Value::Unsigned(n)) => Ok(Some(*n as f32)),
            Some(_) => Err(self.mistyped(key, "a number")),
        }
    }

    /// A flag; an error where the key holds another type.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Bool(x)) => Ok(Some(*x)),
            Some(_) => Err(self.mistyped(key, "true or false")),
        }
    }

    /// An array of texts, 16 bytes of memory for each; an error where the key holds another type.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        let Some(mut cursor) = self.array(key, KIND_STRING, "an array of texts")? else {
            return Ok(None);
        };
        let mut texts = vec![];
        while cursor.at < cursor.bytes.len() {
            texts.push(cursor.string()?);
        }
        Ok(Some(texts))
    }

    /// An array of f32; an error where the key holds another type.
    pub fn f32s(&self, key: &str) -> Result<Option<Vec<f32>>> {
        let array = self.array(key, 6, "an array of f32")?;
        Ok(array.map(|cursor| {
            cursor.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
        }))
    }

    /// An array of i32 (or u32 that fit); an error where the key holds another type.
    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>> {
        let kind = match self.metadata.get(key) {
            Some(Value::Array(array)) if array.kind == 4 => 4,
            _ => 5,
        };
        let array = self.array(key, kind, "an array of i32")?;
        Ok(array.map(|cursor| {
            cursor.bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b)).collect()
        }))
    }

    fn array(&self, key: &str, kind: u32, wanted: &str) -> Result<Option<Cursor<'a>>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Array(array)) if array.kind == kind || array.count == 0 => {
                Ok(Some(Cursor { path: self.path, bytes: array.bytes, at: 0 }))
            }
            Some(_) => Err(self.mistyped(key, wanted)),
        }
    }

    fn mistyped(&self, key: &str, wanted: &str) -> Error {
        Error::model(self.path, format!("metadata {key} has the wrong type; expected {wanted}"))
    }
}

/// Adds the key to an error met while reading its value.
fn name_key(error: Error, key: &str) -> Error {
    match error {
        Error::Model { path, reason } => {
            Error::Model { path, reason: format!("metadata {key:?}: {reason}") }
        }
        other => other,
    }
}

#[cfg(test)]
pub(crate) mod tests;
