//! `tokenizer_config.json`: begin and end tokens.
//! Not here: `tokenizer.json` itself (`check.rs`).

use std::path::Path;

use serde_json::{Value, json};

use crate::model::config::LlamaConfig;
use crate::{Error, Result};

/// A `tokenizer_config.json` for a tokenizer that came without one.
pub(super) fn default_settings(inner: &tokenizers::Tokenizer, config: &LlamaConfig) -> Value {
    let token = |id: Option<u32>| id.and_then(|id| inner.id_to_token(id));
    let mut settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": false,
        "model_max_length": config.max_position_embeddings,
    });
    let named = [
        ("bos_token", config.bos_token_id),
        ("eos_token", config.eos_token_ids.first().copied()),
        ("pad_token", config.pad_token_id),
        ("mask_token", config.mask_token_id),
    ];
    for (name, id) in named {
        if let Some(token) = token(id) {
            settings[name] = json!(token);
        }
    }
    settings
}

/// Makes `encode(…, true)` put these tokens around a text.
pub(super) fn add_ends(
    path: &Path,
    inner: &mut tokenizers::Tokenizer,
    bos: Option<u32>,
    eos: Option<u32>,
) -> Result<()> {
    let mut single = vec![];
    let mut special = serde_json::Map::new();
    for (id, is_bos) in [(bos, true), (eos, false)] {
        if !is_bos {
            single.push(json!({"Sequence": {"id": "A", "type_id": 0}}));
        }
        let Some(id) = id else { continue };
        let Some(token) = inner.id_to_token(id) else {
            return Err(Error::model(
                path,
                format!("the begin or end token has id {id}, which no token has"),
            ));
        };
        single.push(json!({"SpecialToken": {"id": token, "type_id": 0}}));
        special.insert(token.clone(), json!({"id": token, "ids": [id], "tokens": [token]}));
    }
    if special.is_empty() {
        return Ok(());
    }
    let mut pair = single.clone();
    pair.push(json!({"Sequence": {"id": "B", "type_id": 1}}));
    let template = json!({
        "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special,
    });
    let processor: tokenizers::PostProcessorWrapper = serde_json::from_value(template)
        .map_err(|e| Error::model(path, format!("begin and end tokens cannot be added: {e}")))?;
    inner.with_post_processor(Some(processor));
    Ok(())
}
