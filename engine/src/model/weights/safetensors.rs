//! The header of a safetensors file, read as if it were hostile. Not here: values (`weights.rs`).
//!
//! The `safetensors` crate checks that tensors cover the data without gap or overlap and that shape
//! and dtype give the byte span. It overlooks three things, which are done here: a name given twice
//! (the last one wins silently), spans whose sum with the header length overflows, and a header of
//! up to 100 MB.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use ::safetensors::tensor::{Metadata, TensorInfo};
use serde::de::{Deserializer as _, Error as _, IgnoredAny, MapAccess, Visitor};

use crate::{Error, Result};

/// Largest header, in bytes. A thousand layers need 1.3 MB.
const MAX_HEADER_BYTES: u64 = 4 << 20;

/// Most dimensions of a tensor; no Llama has more than two.
const MAX_DIMENSIONS: usize = 8;

/// The tensors of one file, sorted by offset, and where their data begins.
pub(crate) struct Header {
    pub tensors: Vec<(String, TensorInfo)>,
    /// Offset of the data section from the start of the file, in bytes.
    pub data_start: usize,
}

/// Parses and checks the header of a whole mapped file. Every span it returns lies inside `bytes`.
pub(crate) fn read_header(path: &Path, bytes: &[u8]) -> Result<Header> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        let reason = format!(
            "truncated: {} bytes, and a safetensors file has at least 8; fetch it again",
            bytes.len()
        );
        return Err(Error::model(path, reason));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        let reason = format!(
            "header of {length} bytes; at most {MAX_HEADER_BYTES} are accepted, is it safetensors?"
        );
        return Err(Error::model(path, reason));
    }
    let length = length as usize;
    if length > rest.len() {
        let reason = format!(
            "truncated: the header claims {length} bytes, {} follow; fetch it again",
            rest.len()
        );
        return Err(Error::model(path, reason));
    }
    let (json, data) = rest.split_at(length);
    let mut parser = serde_json::Deserializer::from_slice(json);
    let mut tensors = parser
        .deserialize_map(HeaderVisitor)
        .and_then(|tensors| parser.end().map(|()| tensors))
        .map_err(|e| Error::model(path, format!("invalid safetensors header: {e}")))?;
    for (name, info) in &tensors {
        if info.data_offsets.1 > data.len() {
            let reason = format!(
                "tensor {name:?} ends at byte {} of {} data bytes; the file is truncated, fetch \
                 it again",
                info.data_offsets.1,
                data.len()
            );
            return Err(Error::model(path, reason));
        }
    }
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let metadata = Metadata::new(None, tensors.clone()).map_err(|e| {
        Error::model(path, format!("invalid safetensors header: {e}; fetch the file again"))
    })?;
    if metadata.data_len() != data.len() {
        let reason = format!(
            "tensors cover {} of {} data bytes; fetch the file again",
            metadata.data_len(),
            data.len()
        );
        return Err(Error::model(path, reason));
    }
    Ok(Header { tensors, data_start: 8 + length })
}

/// Collects the entries in order, so that a name given twice is seen.
struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Vec<(String, TensorInfo)>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a map of tensor names to dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut names = BTreeSet::new();
        let mut tensors = vec![];
        while let Some(name) = map.next_key::<String>()? {
            if !names.insert(name.clone()) {
                return Err(A::Error::custom(format!("{name:?} is given twice")));
            }
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
            } else {
                let info: TensorInfo = map.next_value()?;
                if info.shape.len() > MAX_DIMENSIONS {
                    let reason = format!("{name:?} has {} dimensions", info.shape.len());
                    return Err(A::Error::custom(reason));
                }
                tensors.push((name, info));
            }
        }
        Ok(tensors)
    }
}
