//! What a tokenizer and its chat template put around texts and turns. Not here: which tokens end an answer
//! (`config/generation.rs`, `gguf/ends.rs`).

use std::path::Path;

use serde_json::json;

use super::Tokenizer;
use crate::model::config::LlamaConfig;
use crate::model::gguf::ends::{END_KEYS, OWN_CHAT_BOS, OWN_ENDS, defaults, ends};
use crate::model::gguf::write::Meta;
use crate::{Error, Result};

/// Text of a conversation that asks a template what it writes around it; not in any other text.
const MARK: &str = "\u{F8FE}here\u{F8FE}";

/// What a GGUF file says of beginnings and ends, and what llama.cpp will make of it that the model does not mean.
pub(super) struct InGguf {
    pub meta: Vec<(&'static str, Meta)>,
    notes: Vec<String>,
}

impl Tokenizer {
    /// Where llama.cpp, reading the GGUF file that [`crate::model::merge::convert`] makes of this model, will begin or end
    /// otherwise than transformers and demask: a line for each, none where it will not.
    ///
    /// # Errors
    /// If the tokenizer puts more around a text than such a file can say.
    pub fn otherwise_in_llama_cpp(&self, config: &LlamaConfig) -> Result<Vec<String>> {
        Ok(self.in_gguf(Path::new("a GGUF file"), config)?.notes)
    }

    /// The metadata for a file at `path`.
    pub(super) fn in_gguf(&self, path: &Path, config: &LlamaConfig) -> Result<InGguf> {
        let name = |id: u32| self.id_to_token(id).unwrap_or_else(|| format!("token {id}"));
        let list = |ids: &[u32]| ids.iter().map(|&id| name(id)).collect::<Vec<_>>().join(", ");
        let refuse = |ids: &[u32], place: &str| {
            let reason = format!("cannot hold the tokenizer: it puts {} {place}", list(ids));
            Error::model(path, reason)
        };
        let [before, behind] = self.around()?;
        let (bos, add_bos) = match before[..] {
            [] => (config.bos_token_id, false),
            [bos] => (Some(bos), true),
            _ => return Err(refuse(&before, "before each text, and GGUF has a place for one")),
        };
        let wanted = &config.eos_token_ids;
        let (eos, add_eos) = match behind[..] {
            [] => (wanted.first().copied(), false),
            [eos] if wanted.is_empty() || wanted.contains(&eos) => (Some(eos), true),
            _ => {
                return Err(refuse(
                    &behind,
                    "behind each text, and GGUF has a place for its end alone",
                ));
            }
        };
        let tokens: Vec<String> = (0..config.vocab_size as u32)
            .map(|id| self.id_to_token(id).unwrap_or_default())
            .collect();
        let implied = ends(&tokens, [eos, None, None], [None; 3]);
        let mut rest = wanted.iter().copied().filter(|id| !implied.contains(id));
        let (eot, eom) = (rest.next(), rest.next());
        // Older readers know fewer spellings.
        let eot = eot.or(wanted.iter().copied().find(|&id| Some(id) != eos));
        let (_, default) = defaults(Some("gpt2"));
        let default = default.filter(|&id| (id as usize) < tokens.len());
        let theirs = ends(&tokens, [eos.or(default), eot, eom], [None; 3]);

        let mut meta = vec![
            ("tokenizer.ggml.add_bos_token", Meta::Bool(add_bos)),
            ("tokenizer.ggml.add_eos_token", Meta::Bool(add_eos)),
        ];
        let ids = [
            ("tokenizer.ggml.bos_token_id", bos),
            (END_KEYS[0], eos),
            (END_KEYS[1], eot),
            (END_KEYS[2], eom),
        ];
        meta.extend(ids.into_iter().filter_map(|(key, id)| Some((key, Meta::U32(id?)))));
        let mut notes = vec![];
        if theirs != *wanted {
            meta.push((OWN_ENDS, Meta::I32s(wanted.iter().map(|&id| id as i32).collect())));
            let missing = |of: &[u32], from: &[u32]| -> Vec<u32> {
                of.iter().copied().filter(|id| !from.contains(id)).collect()
            };
            let (more, fewer) = (missing(&theirs, wanted), missing(wanted, &theirs));
            if !more.is_empty() {
                notes.push(format!("llama.cpp will also end an answer at {}", list(&more)));
            }
            if !fewer.is_empty() {
                let fewer = list(&fewer);
                notes.push(format!(
                    "llama.cpp will not end an answer at {fewer}, for which GGUF has no place"
                ));
            }
        }
        if add_bos
            && self.chat_bos.is_none()
            && self.chat()?.is_some()
            && !self.template_begins()?
        {
            meta.push((OWN_CHAT_BOS, Meta::Bool(false)));
            notes.push(format!(
                "llama.cpp will begin a conversation with {}, which the chat template does not write",
                list(&before)
            ));
        }
        let said = self.bos_text();
        if let (Some(said), Some(bos)) = (said, bos)
            && self.token_id(&said) != Some(bos)
            && self.chat_template().is_some_and(|template| template.contains("bos_token"))
        {
            let bos = name(bos);
            notes
                .push(format!("the chat template's bos_token, {said}, will be {bos} in llama.cpp"));
        }
        Ok(InGguf { meta, notes })
    }

    /// The token that [`Tokenizer::encode_chat`] puts before a conversation that does not begin with it.
    pub fn chat_bos(&self) -> Option<u32> {
        self.chat_bos
    }

    /// The tokens that [`Tokenizer::encode`] puts before and behind a text.
    pub fn around(&self) -> Result<[Vec<u32>; 2]> {
        let [bare, whole] = [self.encode("a", false)?, self.encode("a", true)?];
        let extra = whole.len().saturating_sub(bare.len());
        let before = (0..=extra).find(|&at| whole[at..].starts_with(&bare)).unwrap_or(extra);
        let behind = whole.len() - (extra - before);
        Ok([whole[..before].to_vec(), whole[behind..].to_vec()])
    }

    /// The special token with which the chat template ends the model's turn; `None` where there is no template, or it
    /// writes none there.
    pub fn end_of_turn(&self) -> Result<Option<u32>> {
        let Some(chat) = self.chat()? else { return Ok(None) };
        let said = |role: &str| json!({"role": role, "content": MARK});
        // A template may refuse a conversation as plain as this one; then nothing is known of it.
        let Ok(text) = chat.render(&[said("user"), said("assistant")], false) else {
            return Ok(None);
        };
        let Some((_, tail)) = text.rsplit_once(MARK) else { return Ok(None) };
        let ids = self.encode(tail, false)?;
        let at = ids.iter().position(|&id| self.is_special(id));
        let blank = |ids: &[u32]| self.decode(ids, false).trim().is_empty();
        Ok(at.filter(|&at| blank(&ids[..at])).map(|at| ids[at]))
    }

    /// Whether the chat template writes the token that begins a text; `false` where there is no template, or no such
    /// token.
    pub(super) fn template_begins(&self) -> Result<bool> {
        let Some(bos) = self.bos_text() else { return Ok(false) };
        let Some(chat) = self.chat()? else { return Ok(false) };
        Ok(match chat.render(&[json!({"role": "user", "content": MARK})], true) {
            Ok(text) => text.starts_with(&bos),
            Err(_) => {
                let spells = |text: &str| text.contains("bos_token") || text.contains(&bos);
                self.chat_template().is_some_and(spells)
            }
        })
    }

    /// The token that ends a text by `tokenizer_config.json`.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.token_id(&self.setting("eos_token")?)
    }

    /// The token that begins a text, as `tokenizer_config.json` spells it.
    fn bos_text(&self) -> Option<String> {
        self.setting("bos_token")
    }

    /// A special token of `tokenizer_config.json`.
    fn setting(&self, name: &str) -> Option<String> {
        let token = &self.settings[name];
        token.as_str().or(token["content"].as_str()).map(str::to_owned)
    }
}
