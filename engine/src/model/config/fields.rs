//! Typed reading of JSON objects, with errors that name the field. Not here: which fields there
//! are.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{Error, Result};

/// Typed access to a JSON object; `null` counts as absent.
pub(super) struct Fields<'a> {
    pub map: &'a Map<String, Value>,
    pub path: &'a Path,
}

impl Fields<'_> {
    pub fn error(&self, reason: impl Into<String>) -> Error {
        Error::model(self.path, reason)
    }

    fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    pub fn usize(&self, name: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) => Ok(Some(n)),
            None => Err(self.error(format!("{name} is {}; expected a whole number", brief(value)))),
        }
    }

    pub fn need_usize(&self, name: &str) -> Result<usize> {
        self.usize(name)?
            .ok_or_else(|| self.error(format!("{name} is missing; expected a whole number")))
    }

    pub fn f32(&self, name: &str) -> Result<Option<f32>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64() {
            Some(x) => Ok(Some(x as f32)),
            None => Err(self.error(format!("{name} is {}; expected a number", brief(value)))),
        }
    }

    /// A list of numbers, at most one for each of the frequencies that a head may have.
    pub fn f32s(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let wrong =
            || self.error(format!("{name} is {}; expected a list of numbers", brief(value)));
        let list = value.as_array().filter(|list| list.len() <= 4096).ok_or_else(wrong)?;
        let number = |v: &Value| v.as_f64().map(|x| x as f32).ok_or_else(wrong);
        list.iter().map(number).collect::<Result<_>>().map(Some)
    }

    pub fn bool(&self, name: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_bool() {
            Some(x) => Ok(Some(x)),
            None => Err(self.error(format!("{name} is {}; expected true or false", brief(value)))),
        }
    }

    /// One of the words of `T`.
    pub fn word<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let wrong = |e| self.error(format!("{name} is {}: {e}", brief(value)));
        T::deserialize(value).map(Some).map_err(wrong)
    }

    /// Token ids: an int, a list, `null` (none) or absent (`default`). A negative int means none.
    pub fn ids(&self, name: &str, default: &[u32]) -> Result<Vec<u32>> {
        let wrong =
            |value: &Value| self.error(format!("{name} is {}; expected a token id", brief(value)));
        match self.map.get(name) {
            None => Ok(default.to_vec()),
            Some(Value::Null) => Ok(vec![]),
            Some(value) if value.as_i64().is_some_and(|id| id < 0) => Ok(vec![]),
            Some(Value::Array(list)) if list.len() <= 64 => {
                let id = |v: &Value| {
                    v.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| wrong(v))
                };
                list.iter().map(id).collect()
            }
            Some(value) => match value.as_u64().and_then(|id| u32::try_from(id).ok()) {
                Some(id) => Ok(vec![id]),
                None => Err(wrong(value)),
            },
        }
    }
}

/// A JSON value cut to a length that fits in a message.
pub(super) fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// The f64 whose shortest decimal is that of `x`, so that 1e-5 is written as 1e-5, not
/// 9.99999974e-6.
pub(super) fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(x as f64)
}
