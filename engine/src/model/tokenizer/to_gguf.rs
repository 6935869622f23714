//! GGUF metadata of a tokenizer, as llama.cpp's converter writes it: the inverse of `from_gguf.rs`.

use std::path::Path;

use serde_json::Value;

use super::Tokenizer;
use super::from_gguf::{CONTROL, NORMAL, UNUSED, USER_DEFINED};
use super::splitting::{Splitting, name_of};
use crate::model::config::LlamaConfig;
use crate::model::gguf::write::Meta;
use crate::{Error, Result};

/// Flags of added tokens that GGUF cannot hold: whitespace beside a token that it swallows, and whether it is found
/// inside of words.
const FLAGS: [&str; 3] = ["lstrip", "rstrip", "single_word"];

pub(super) fn lost(tokenizer: &Tokenizer) -> Result<Vec<String>> {
    let json: Value =
        serde_json::from_str(&tokenizer.to_json()?).map_err(|e| Error::io("tokenizer.json", e))?;
    let mut lost = vec![];
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let flags: Vec<&str> = FLAGS.into_iter().filter(|&flag| added[flag] == true).collect();
        if !flags.is_empty() {
            lost.push(format!("{} has {}", added["content"], flags.join(" and ")));
        }
    }
    Ok(lost)
}

pub(super) fn metadata(
    tokenizer: &Tokenizer,
    path: &Path,
    config: &LlamaConfig,
) -> Result<Vec<(String, Meta)>> {
    let refuse = |why: &str| Error::model(path, format!("cannot hold the tokenizer: {why}"));
    let json: Value = serde_json::from_str(&tokenizer.to_json()?)
        .map_err(|e| refuse(&format!("it is no JSON ({e})")))?;
    let model = &json["model"];
    let byte_level = model["type"] == "BPE" && model["byte_fallback"] != true;
    let Some(vocab) = model["vocab"].as_object().filter(|_| byte_level) else {
        return Err(refuse("only byte-level BPE can be written"));
    };
    let mut tokens: Vec<Option<(String, i32)>> = vec![None; config.vocab_size];
    let mut put = |id: Option<u64>, text: &str, kind: i32| {
        let slot = id.and_then(|id| tokens.get_mut(id as usize));
        slot.map(|slot| *slot = Some((text.to_owned(), kind)))
            .ok_or_else(|| refuse(&format!("token {text:?} has no id below the vocabulary")))
    };
    for (text, id) in vocab {
        put(id.as_u64(), text, NORMAL)?;
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let kind = if added["special"] == true { CONTROL } else { USER_DEFINED };
        put(added["id"].as_u64(), added["content"].as_str().unwrap_or_default(), kind)?;
    }
    let unused = |id: usize| (format!("[UNUSED_{id}]"), UNUSED);
    let tokens = tokens.into_iter().enumerate().map(|(id, t)| t.unwrap_or_else(|| unused(id)));
    let (texts, kinds): (Vec<String>, Vec<i32>) = tokens.unzip();
    let merges = model["merges"].as_array().into_iter().flatten().map(|merge| match merge {
        Value::String(both) => both.clone(),
        pair => [&pair[0], &pair[1]].map(|part| part.as_str().unwrap_or_default()).join(" "),
    });
    let splitting = Splitting {
        normalizer: json["normalizer"].clone(),
        pre_tokenizer: json["pre_tokenizer"].clone(),
        ignore_merges: model["ignore_merges"].as_bool().unwrap_or(false),
    };
    let Some(pre) = name_of(&splitting) else {
        return Err(refuse("llama.cpp has no name for the way it splits text"));
    };
    let mut meta = vec![
        ("tokenizer.ggml.model", Meta::Text("gpt2".into())),
        ("tokenizer.ggml.pre", Meta::Text(pre.into())),
        ("tokenizer.ggml.tokens", Meta::Texts(texts)),
        ("tokenizer.ggml.token_type", Meta::I32s(kinds)),
        ("tokenizer.ggml.merges", Meta::Texts(merges.collect())),
        ("tokenizer.ggml.add_space_prefix", Meta::Bool(false)),
    ];
    let ids = [
        ("tokenizer.ggml.padding_token_id", config.pad_token_id),
        ("tokenizer.ggml.mask_token_id", tokenizer.mask_token_id()),
    ];
    meta.extend(tokenizer.in_gguf(path, config)?.meta);
    meta.extend(ids.into_iter().filter_map(|(key, id)| Some((key, Meta::U32(id?)))));
    if let Some(template) = tokenizer.chat_template() {
        meta.push(("tokenizer.chat_template", Meta::Text(template.to_owned())));
    }
    Ok(meta.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
}
