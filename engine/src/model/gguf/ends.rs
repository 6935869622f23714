//! Which tokens begin a text and end an answer by a GGUF file, with the rules of llama.cpp: keys name some, defaults stand
//! in for keys that are missing, and the spelling of a token alone makes it an end. Not here: how text is split
//! (`tokenizer/from_gguf.rs`).

use super::Gguf;
use crate::Result;

/// Spellings that llama.cpp (`llama_vocab::impl::load`, November 2026) takes for the end of a turn, a text or a call,
/// whatever the keys say.
const SPELLINGS: [&str; 22] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];
/// Tokens of prompts that fill gaps which end an answer too, with the key that names each and the spellings that stand
/// in for it: padding, the name of a repository, the next file.
const GAPS: [(&str, &[&str]); 3] = [
    (
        "tokenizer.ggml.fim_pad_token_id",
        &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"],
    ),
    (
        "tokenizer.ggml.fim_rep_token_id",
        &["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"],
    ),
    ("tokenizer.ggml.fim_sep_token_id", &["<|file_sep|>"]),
];
/// Names of `tokenizer.ggml.pre` whose texts begin with a token unless the file says otherwise.
const BEGINNING: [&str; 11] = [
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
    "tekken",
    "chameleon",
];

/// The keys for the end of a text, of a turn and of a message.
pub(crate) const END_KEYS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];
/// Ours, where llama.cpp's rules give other ends than the model has: all of them, in order.
pub(crate) const OWN_ENDS: &str = "demask.eos_token_ids";
/// Ours, false where a conversation does not begin with the token that any other text begins with.
pub(crate) const OWN_CHAT_BOS: &str = "demask.chat_bos";

/// What a file says of beginnings and ends.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Ends {
    /// Begins a text.
    pub bos: Option<u32>,
    /// Whether it is put before texts.
    pub add_bos: bool,
    /// Whether it is put before conversations whose template does not write it.
    pub add_chat_bos: bool,
    /// Ends a text.
    pub eos: Option<u32>,
    /// Whether it is put behind texts.
    pub add_eos: bool,
    /// Each ends an answer; the end of a text first.
    pub ends: Vec<u32>,
}

impl Ends {
    /// Reads what `tokenizer.ggml.*` says.
    pub fn read(gguf: &Gguf) -> Result<Self> {
        let tokens = gguf.texts("tokenizer.ggml.tokens")?;
        let n_tokens = tokens.as_ref().map_or(u64::MAX, |tokens| tokens.len() as u64);
        let id = |key: &str| -> Result<Option<u32>> {
            // One that is no token counts as missing; llama.cpp writes the largest u32 for none.
            let id = gguf.u64(key)?.filter(|&id| id < n_tokens.min(u32::MAX.into()));
            Ok(id.and_then(|id| u32::try_from(id).ok()))
        };
        let model = gguf.text("tokenizer.ggml.model")?;
        let (bos, eos) = defaults(model);
        let default =
            |id: Option<u32>| id.filter(|&id| tokens.is_some() && u64::from(id) < n_tokens);
        let pre = gguf.text("tokenizer.ggml.pre")?.unwrap_or_default();
        let begins = model == Some("llama") || BEGINNING.contains(&pre);
        let add_bos = gguf.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(begins);
        let bos = match id("tokenizer.ggml.bos_token_id")? {
            // The default of a token that nothing adds would only be a name for it.
            None => default(bos).filter(|_| add_bos),
            known => known,
        };
        let add_bos = add_bos && bos.is_some();
        let eos = id(END_KEYS[0])?.or(default(eos));
        let named = [eos, id(END_KEYS[1])?, id(END_KEYS[2])?];
        let gaps = [id(GAPS[0].0)?, id(GAPS[1].0)?, id(GAPS[2].0)?];
        let ends = match gguf.i32s(OWN_ENDS)? {
            Some(own) => own.into_iter().filter_map(|id| u32::try_from(id).ok()).collect(),
            None => ends(tokens.as_deref().unwrap_or_default(), named, gaps),
        };
        Ok(Self {
            bos,
            add_bos,
            add_chat_bos: add_bos && gguf.bool(OWN_CHAT_BOS)?.unwrap_or(true),
            eos,
            add_eos: gguf.bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
            ends,
        })
    }
}

/// The tokens that begin and end a text where no key names them.
pub(crate) fn defaults(model: Option<&str>) -> (Option<u32>, Option<u32>) {
    match model {
        Some("llama") => (Some(1), Some(2)),
        Some("gpt2") => (Some(11), Some(11)),
        _ => (None, None),
    }
}

/// What ends an answer: the tokens that keys (or their defaults) name, in their order, then what is spelled like an end.
pub(crate) fn ends<T: AsRef<str>>(
    tokens: &[T],
    named: [Option<u32>; 3],
    gaps: [Option<u32>; 3],
) -> Vec<u32> {
    // Of a large vocabulary most tokens are passed over by their first byte.
    let like_a_name = |id: &u32| tokens[*id as usize].as_ref().starts_with(['<', '[', '_']);
    let names: Vec<u32> = (0..tokens.len() as u32).filter(like_a_name).collect();
    let spelled = |spellings: &'static [&str]| {
        names.iter().copied().filter(|&id| spellings.contains(&text(tokens, id)))
    };
    let gaps = GAPS.iter().zip(gaps);
    let gaps = gaps.filter_map(|((_, names), id)| id.or_else(|| spelled(names).next()));
    let mut by_spelling: Vec<u32> = gaps.chain(spelled(&SPELLINGS)).collect();
    by_spelling.sort_unstable();
    let mut ends = Vec::new();
    for id in named.into_iter().flatten().chain(by_spelling) {
        if !ends.contains(&id) {
            ends.push(id);
        }
    }
    // Two families of models use a spelling of this list for something else.
    let has = |name: &str| ends.iter().any(|&id| text(tokens, id) == name);
    let calls = has("<|call|>") || has("<|calls|>");
    let (goes_on, responds) =
        (calls && (has("<|return|>") || has("<|flush|>")), has("<|tool_response>"));
    ends.retain(|&id| match text(tokens, id) {
        "<|end|>" => !goes_on,
        "</s>" => !responds,
        _ => true,
    });
    ends
}

fn text<T: AsRef<str>>(tokens: &[T], id: u32) -> &str {
    tokens.get(id as usize).map_or("", AsRef::as_ref)
}

#[cfg(test)]
pub(crate) mod tests;
