//! A `tokenizer.json` from GGUF metadata: the inverse of what llama.cpp's converter did. Not here:
//! how text is split (`splitting.rs`), begin and end tokens, and everything after construction
//! (`tokenizer.rs`).

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::splitting::{DEFAULT, Splitting, byte_level_part, known_names, splitting};
use super::with_type;
use crate::model::gguf::Gguf;
use crate::{Error, Result};

/// Most tokens and merges, far above the 262,144 of the largest published vocabularies.
const MAX_TOKENS: usize = 1 << 20;
const MAX_MERGES: usize = 1 << 21;
/// Longest SentencePiece token in bytes; its merges are searched by trying every cut.
const MAX_PIECE_BYTES: usize = 1 << 9;

/// `tokenizer.ggml.token_type`.
pub(super) const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
pub(super) const CONTROL: i32 = 3;
pub(super) const USER_DEFINED: i32 = 4;
pub(super) const UNUSED: i32 = 5;

/// The tokens of the file with what is known about each, by id.
struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    types: Vec<i32>,
}

pub(super) fn build(path: &Path, gguf: &Gguf) -> Result<tokenizers::Tokenizer> {
    let Some(tokens) = gguf.texts("tokenizer.ggml.tokens")? else {
        return Err(Error::model(
            path,
            "holds no tokenizer; use the Hugging Face folder, or another GGUF of the model",
        ));
    };
    if tokens.is_empty() || tokens.len() > MAX_TOKENS {
        let reason = format!(
            "tokenizer.ggml.tokens has {} tokens; expected 1 to {MAX_TOKENS}",
            tokens.len()
        );
        return Err(Error::model(path, reason));
    }
    let types =
        gguf.i32s("tokenizer.ggml.token_type")?.unwrap_or_else(|| vec![NORMAL; tokens.len()]);
    if types.len() != tokens.len() {
        let reason =
            format!("tokenizer.ggml has {} tokens but {} token types", tokens.len(), types.len());
        return Err(Error::model(path, reason));
    }
    let vocabulary = Vocabulary { tokens, types };
    let mut json = match gguf.text("tokenizer.ggml.model")? {
        Some("gpt2") => byte_level(path, gguf)?,
        Some("llama") => sentencepiece(path, gguf, &vocabulary)?,
        other => {
            let reason = format!(
                "tokenizer.ggml.model {:?} is not supported; expected \"gpt2\" or \"llama\"",
                other.unwrap_or("missing")
            );
            return Err(Error::model(path, reason));
        }
    };
    json["version"] = json!("1.0");
    json["model"]["vocab"] = vocabulary.to_json(path)?;
    json["added_tokens"] = vocabulary.added_tokens();
    serde_json::from_value(json).map_err(|e| {
        Error::model(
            path,
            format!("its tokenizer cannot be built: {}", super::one_line(&e.to_string())),
        )
    })
}

impl Vocabulary<'_> {
    fn to_json(&self, path: &Path) -> Result<Value> {
        let mut vocab = Map::new();
        for (id, token) in self.tokens.iter().enumerate() {
            if vocab.insert((*token).to_owned(), json!(id)).is_some() {
                return Err(Error::model(
                    path,
                    format!("tokenizer.ggml.tokens holds {token:?} twice"),
                ));
            }
        }
        Ok(Value::Object(vocab))
    }

    /// Tokens that are matched in the text before anything else, id 0 included.
    fn added_tokens(&self) -> Value {
        let added = |(id, (token, kind)): (usize, (&&str, &i32))| {
            // An empty spelling would match everywhere.
            let special = matches!(*kind, UNKNOWN | CONTROL);
            (!token.is_empty() && (special || *kind == USER_DEFINED)).then(|| {
                json!({
                    "id": id, "content": token, "special": special,
                    "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                })
            })
        };
        self.tokens.iter().zip(&self.types).enumerate().filter_map(added).collect()
    }
}

fn byte_level(path: &Path, gguf: &Gguf) -> Result<Value> {
    let pre = gguf.text("tokenizer.ggml.pre")?.unwrap_or(DEFAULT);
    let Some(Splitting { normalizer, pre_tokenizer, ignore_merges }) = splitting(pre) else {
        let known = known_names().join(", ");
        let reason = format!(
            "tokenizer.ggml.pre {pre:?} is not supported; expected one of {known}; use the Hugging \
             Face folder instead"
        );
        return Err(Error::model(path, reason));
    };
    let Some(texts) = gguf.texts("tokenizer.ggml.merges")? else {
        return Err(Error::model(
            path,
            "tokenizer.ggml.merges is missing; use the Hugging Face folder instead",
        ));
    };
    if texts.len() > MAX_MERGES {
        return Err(Error::model(
            path,
            format!("{} merges; at most {MAX_MERGES} are accepted", texts.len()),
        ));
    }
    let mut merges = vec![];
    for merge in texts {
        match merge.split_once(' ') {
            Some((left, right)) => merges.push(json!([left, right])),
            None => {
                return Err(Error::model(
                    path,
                    format!("merge {merge:?} is not two tokens with a space between"),
                ));
            }
        }
    }
    Ok(json!({
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": byte_level_part(true),
        "model": {"type": "BPE", "merges": merges, "ignore_merges": ignore_merges},
    }))
}

/// As transformers' `LlamaConverter` does (legacy behaviour, which is how the models were trained).
fn sentencepiece(path: &Path, gguf: &Gguf, vocabulary: &Vocabulary) -> Result<Value> {
    let scores = gguf.f32s("tokenizer.ggml.scores")?.unwrap_or_default();
    if scores.len() != vocabulary.tokens.len() || scores.iter().any(|score| score.is_nan()) {
        let reason = format!(
            "tokenizer.ggml.scores has {} values for {} tokens, or one that is no number",
            scores.len(),
            vocabulary.tokens.len()
        );
        return Err(Error::model(path, reason));
    }
    if let Some(token) = vocabulary.tokens.iter().find(|token| token.len() > MAX_PIECE_BYTES) {
        let reason =
            format!("a token of {} bytes; at most {MAX_PIECE_BYTES} are accepted", token.len());
        return Err(Error::model(path, reason));
    }
    let merges = merges_from_scores(vocabulary, &scores);
    if merges.len() > MAX_MERGES {
        return Err(Error::model(
            path,
            format!("{} merges; at most {MAX_MERGES} are accepted", merges.len()),
        ));
    }
    let unknown = gguf.u64("tokenizer.ggml.unknown_token_id")?.unwrap_or(0);
    let Some(unknown) = usize::try_from(unknown).ok().and_then(|id| vocabulary.tokens.get(id))
    else {
        return Err(Error::model(
            path,
            format!("tokenizer.ggml.unknown_token_id {unknown} is no token"),
        ));
    };
    let replace = |from: &str, to: &str| {
        with_type("Replace", json!({"pattern": {"String": from}, "content": to}))
    };
    let mut normalizers = vec![replace(" ", "▁")];
    let mut decoders =
        vec![replace("▁", " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    if gguf.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true) {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(json!({
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "merges": merges, "unk_token": unknown, "fuse_unk": true,
             "byte_fallback": true,
        },
    }))
}

/// SentencePiece joins the pair whose union has the highest score; BPE wants that as an ordered
/// list. Order and ties are those of transformers' `generate_merges`.
fn merges_from_scores(vocabulary: &Vocabulary, scores: &[f32]) -> Vec<Value> {
    let ids: HashMap<&str, usize> =
        vocabulary.tokens.iter().enumerate().map(|(id, token)| (*token, id)).collect();
    let mut merges = vec![];
    for (id, token) in
        vocabulary.tokens.iter().enumerate().filter(|(id, _)| vocabulary.types[*id] == NORMAL)
    {
        let cuts = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let mut parts: Vec<_> =
            cuts.filter_map(|(l, r)| Some((*ids.get(l)?, *ids.get(r)?))).collect();
        parts.sort_unstable();
        merges.extend(parts.into_iter().map(|(l, r)| (scores[id], l, r)));
    }
    let length = |id: usize| vocabulary.tokens[id].chars().count();
    merges.sort_by_cached_key(|&(score, l, r)| {
        let rank = score.to_bits() as i32;
        // The bits of floats order like integers once the negative half is flipped; -0 counts as 0.
        let rank = if score == 0.0 { 0 } else { rank ^ (((rank >> 31) as u32) >> 1) as i32 };
        std::cmp::Reverse((rank, length(l), length(r)))
    });
    merges
        .into_iter()
        .map(|(_, l, r)| json!([vocabulary.tokens[l], vocabulary.tokens[r]]))
        .collect()
}
