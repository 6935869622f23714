//! `generation_config.json`: which tokens end an answer, as transformers' `generate` takes it. Not here: what a GGUF says
//! of that (`gguf/ends.rs`), and what is put before a text (`tokenizer.rs`).

use std::path::Path;

use serde_json::{Map, Value, json};

use super::fields::Fields;
use super::{LlamaConfig, MAX_CONFIG_BYTES};
use crate::model::weights::source::read_capped;
use crate::{Error, Result};

/// Its name in a folder.
pub(crate) const FILE: &str = "generation_config.json";
/// What the file says of itself.
const METADATA: [&str; 4] =
    ["_from_model_config", "_commit_hash", "_original_object_hash", "transformers_version"];

/// Takes the tokens that `dir/generation_config.json` names in the place of those of `config.json`. As in transformers
/// (5.24), a file that names no end leaves none: `config.json` is not asked where this file is.
pub(super) fn read(dir: &Path, config: &mut LlamaConfig) -> Result<()> {
    let path = dir.join(FILE);
    if !path.exists() {
        return Ok(());
    }
    let wrong =
        |reason: String| Error::model(&path, format!("{reason}; mend the file or remove it"));
    let value: Value = serde_json::from_slice(&read_capped(&path, MAX_CONFIG_BYTES)?)
        .map_err(|e| wrong(format!("not valid JSON ({e})")))?;
    let Some(map) = value.as_object() else {
        return Err(wrong("the top level is not an object".to_owned()));
    };
    let fields = Fields { map, path: &path };
    config.eos_token_ids = fields.ids("eos_token_id", &[])?;
    let one = |name: &str| Ok::<_, Error>(fields.ids(name, &[])?.first().copied());
    config.bos_token_id = one("bos_token_id")?.or(config.bos_token_id);
    config.pad_token_id = one("pad_token_id")?.or(config.pad_token_id);
    let ours = ["eos_token_id", "bos_token_id", "pad_token_id"];
    let rest = map.iter().filter(|(key, _)| !ours.contains(&key.as_str()));
    config.generation = rest
        .filter(|(key, _)| !METADATA.contains(&key.as_str()))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    config.validate_ids(&path)
}

/// The file for a model: its tokens, and what else its own file said.
pub(crate) fn to_json(config: &LlamaConfig) -> Value {
    let mut map = Map::new();
    let ends = &config.eos_token_ids;
    map.insert("bos_token_id".into(), json!(config.bos_token_id));
    map.insert("eos_token_id".into(), super::ids_json(ends));
    map.insert("pad_token_id".into(), json!(config.pad_token_id));
    map.retain(|_, value| !value.is_null());
    map.extend(config.generation.clone());
    Value::Object(map)
}
