//! What a `tokenizer.json` may contain. The `tokenizers` crate panics on some contents and takes
//! others on trust, so the parts are checked before it sees them. Not here: what the parts do.

use std::path::Path;

use serde_json::Value;

use crate::{Error, Result};

/// Parts that Llama tokenizers are made of. Others change text in ways that token bytes cannot
/// undo, or are parsed by code that panics (`Precompiled`, `WordPiece`).
const NORMALIZERS: &[&str] =
    &["NFC", "NFD", "NFKC", "NFKD", "Prepend", "Replace", "Strip", "Lowercase"];
const PRE_TOKENIZERS: &[&str] =
    &["ByteLevel", "Split", "Digits", "Metaspace", "Punctuation", "Whitespace", "WhitespaceSplit"];
const POST_PROCESSORS: &[&str] = &["ByteLevel", "TemplateProcessing"];
const DECODERS: &[&str] = &["ByteLevel", "Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"];

/// Checks a parsed `tokenizer.json`, and takes away what would make encoding random or cut texts.
pub(super) fn sanitise(path: &Path, json: &mut Value) -> Result<()> {
    let wrong = |reason: String| Err(Error::model(path, reason));
    if !json.is_object() || !json["model"].is_object() {
        return wrong("has no model; expected a Hugging Face tokenizer.json".to_owned());
    }
    let model = &json["model"];
    if model.get("type").is_some_and(|kind| kind != "BPE") {
        return wrong(format!("model type {} is not supported; expected BPE", model["type"]));
    }
    for name in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if model.get(name).is_some_and(|value| !value.is_null() && value != "") {
            return wrong(format!("model.{name} is not supported; expected null"));
        }
    }
    let parts = [
        ("normalizer", "normalizers", NORMALIZERS),
        ("pre_tokenizer", "pretokenizers", PRE_TOKENIZERS),
        ("post_processor", "processors", POST_PROCESSORS),
        ("decoder", "decoders", DECODERS),
    ];
    for (name, list, known) in parts {
        check_part(path, name, list, known, json.get(name).unwrap_or(&Value::Null))?;
    }
    // Cutting and padding are the caller's business: training pads by block, decoding never.
    for name in ["truncation", "padding"] {
        json[name] = Value::Null;
    }
    json["model"]["dropout"] = Value::Null;
    Ok(())
}

/// A part is null, one of the known types, or one flat sequence of them.
fn check_part(path: &Path, name: &str, list: &str, known: &[&str], part: &Value) -> Result<()> {
    let items = match part["type"] == "Sequence" {
        true => part[list].as_array().map(Vec::as_slice).unwrap_or_default(),
        false if part.is_null() => return Ok(()),
        false => std::slice::from_ref(part),
    };
    for item in items {
        let kind = item["type"].as_str().unwrap_or("without a type");
        if !known.contains(&kind) {
            let reason = format!("{name} {kind:?} is not supported; expected {}", known.join(", "));
            return Err(Error::model(path, reason));
        }
        if kind == "TemplateProcessing" {
            check_template(path, item)?;
        }
    }
    Ok(())
}

/// Every special token of a template is declared: encoding would panic otherwise.
fn check_template(path: &Path, template: &Value) -> Result<()> {
    for list in ["single", "pair"] {
        for piece in template[list].as_array().into_iter().flatten() {
            let Some(special) = piece.get("SpecialToken") else { continue };
            let declared = special["id"].as_str().and_then(|id| template["special_tokens"].get(id));
            if declared.is_none_or(|token| token["id"] != special["id"]) {
                let reason = format!(
                    "post_processor uses special token {} without declaring it",
                    special["id"]
                );
                return Err(Error::model(path, reason));
            }
        }
    }
    Ok(())
}

/// After loading: each added token has the id it declares (the crate numbers anew those that the
/// model lacks), and the template adds no id that is not a token.
pub(super) fn check_ids(path: &Path, json: &Value, inner: &tokenizers::Tokenizer) -> Result<()> {
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        let given = token["content"].as_str().and_then(|content| inner.token_to_id(content));
        if given.map(u64::from) != token["id"].as_u64() {
            let given = given.map_or("none".to_owned(), |id| id.to_string());
            let reason = format!(
                "added token {} declares id {} but gets {given}; correct tokenizer.json",
                token["content"], token["id"]
            );
            return Err(Error::model(path, reason));
        }
    }
    let processor = &json["post_processor"];
    let processors =
        processor["processors"].as_array().map_or(std::slice::from_ref(processor), Vec::as_slice);
    let declared = processors
        .iter()
        .filter_map(|item| item["special_tokens"].as_object())
        .flat_map(|map| map.values());
    for id in declared.flat_map(|token| token["ids"].as_array().into_iter().flatten()) {
        let token =
            id.as_u64().and_then(|id| u32::try_from(id).ok()).and_then(|id| inner.id_to_token(id));
        if token.is_none() {
            return Err(Error::model(
                path,
                format!("post_processor adds id {id}, which no token has"),
            ));
        }
    }
    Ok(())
}
