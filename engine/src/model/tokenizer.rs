//! Text to token ids and back, around the `tokenizers` crate: `tokenizer.json` of a Hugging Face
//! folder, or the metadata of a GGUF file (`tokenizer/from_gguf.rs`). Not here: which chat template
//! is taken (`tokenizer/templates.rs`), and what it prints (`chat.rs`).
//!
//! Supported are the two kinds that Llama models use: byte-level BPE, and SentencePiece BPE with
//! byte fallback. In both every token stands for fixed bytes, so decoding is joining bytes, and a
//! stream of tokens gives the same text as all of them at once.

use std::path::Path;
use std::sync::OnceLock;

use serde_json::{Value, json};

use super::config::LlamaConfig;
use super::gguf::Gguf;
use super::gguf::ends::Ends;
use super::gguf::split::Parts;
use super::gguf::write::Meta;
use super::weights::source::{Source, locate, read_capped};
use crate::{Error, Result};

mod bytes;
mod check;
mod ends;
mod fim;
mod from_gguf;
mod settings;
mod splitting;
mod templates;
mod to_gguf;

use bytes::Scheme;
pub use fim::{FIM_NAMES, Fim, FimOrder};
use settings::{add_ends, default_settings};

/// Largest `tokenizer.json` in bytes; Llama 3's has 17 MB. Parsing takes up to 40 times the file's
/// size.
const MAX_TOKENIZER_BYTES: u64 = 32 << 20;
/// Largest `tokenizer_config.json` or chat template in bytes.
const MAX_SETTINGS_BYTES: u64 = 8 << 20;
/// Names that models give to the token of a masked position; the first is Stable-DiffCoder's.
const MASK_NAMES: [&str; 4] = ["<[MASK_TOKEN]>", "<mask>", "[MASK]", "<|mask|>"];

/// A model's tokenizer. Immutable; `Send` and `Sync`.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The same, to which special tokens that a text spells out are text.
    plain: OnceLock<tokenizers::Tokenizer>,
    /// By id.
    pieces: Vec<Option<Piece>>,
    /// Whether encoding prepended a space to the text, which decoding takes away.
    strip_space: bool,
    mask_token_id: Option<u32>,
    /// Put before a conversation whose template does not write it.
    chat_bos: Option<u32>,
    /// By name; the one that is taken, unless another is asked for, is called `default`.
    chat_templates: Vec<(String, String)>,
    /// Contents of `tokenizer_config.json`.
    settings: Value,
}

/// What one token stands for.
struct Piece {
    bytes: Box<[u8]>,
    special: bool,
}

impl Tokenizer {
    /// The tokenizer of the model at `path` (a folder or `.gguf` file, as for `Weights::open`).
    /// Every id is below `config.vocab_size` afterwards; more embedding rows than tokens are
    /// allowed.
    pub fn for_model(path: &Path, config: &LlamaConfig) -> Result<Self> {
        match locate(path)? {
            Source::Folder(dir) => Self::from_folder(&dir, config),
            Source::Gguf(file) => {
                let parts = Parts::open(&file)?;
                Self::from_gguf(&file, &parts.gguf()?, config)
            }
        }
    }

    /// The tokenizer in `dir/tokenizer.json`, with `tokenizer_config.json` and
    /// `chat_template.jinja` and `additional_chat_templates/` where present.
    pub fn from_folder(dir: &Path, config: &LlamaConfig) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let bytes = read_capped(&path, MAX_TOKENIZER_BYTES)?;
        let wrong = |e: String| {
            Error::model(&path, format!("not a tokenizer.json that can be used: {}", one_line(&e)))
        };
        let mut json: Value = serde_json::from_slice(&bytes).map_err(|e| wrong(e.to_string()))?;
        drop(bytes);
        check::sanitise(&path, &mut json)?;
        let inner: tokenizers::Tokenizer = serde::Deserialize::deserialize(&json)
            .map_err(|e: serde_json::Error| wrong(e.to_string()))?;
        check::check_ids(&path, &json, &inner)?;
        drop(json);

        let settings_path = dir.join("tokenizer_config.json");
        let mut settings = match settings_path.exists() {
            true => serde_json::from_slice(&read_capped(&settings_path, MAX_SETTINGS_BYTES)?)
                .map_err(|e| Error::model(&settings_path, format!("not valid JSON ({e})")))?,
            false => default_settings(&inner, config),
        };
        if !settings.is_object() {
            return Err(Error::model(&settings_path, "the top level is not an object"));
        }
        if let Some(templates) = templates::in_files(dir)? {
            settings["chat_template"] = templates;
        }
        // What is put around a text is the post-processor's to say: beside a tokenizer.json, transformers (5.24) passes
        // over add_bos_token and add_eos_token of tokenizer_config.json.
        Self::assemble(&path, inner, settings, config)
    }

    /// The tokenizer that `tokenizer.*` of a GGUF describes; `path` names it in errors.
    /// Where `tokenizer.ggml.pre` is missing, llama.cpp's default splitting is taken, as llama.cpp does.
    pub fn from_gguf(path: &Path, gguf: &Gguf, config: &LlamaConfig) -> Result<Self> {
        let mut inner = from_gguf::build(path, gguf)?;
        let ends = Ends::read(gguf)?;
        let eos = ends.eos.filter(|_| ends.add_eos);
        add_ends(path, &mut inner, ends.bos.filter(|_| ends.add_bos), eos)?;
        let mut settings = default_settings(&inner, config);
        if let Some(template) = gguf.text("tokenizer.chat_template")? {
            settings["chat_template"] = json!(template);
        }
        let chat_bos = ends.bos.filter(|_| ends.add_chat_bos);
        Ok(Self { chat_bos, ..Self::assemble(path, inner, settings, config)? })
    }

    fn assemble(
        path: &Path,
        inner: tokenizers::Tokenizer,
        settings: Value,
        config: &LlamaConfig,
    ) -> Result<Self> {
        let scheme = Scheme::of(path, &inner)?;
        let vocab = inner.get_vocab(true);
        if let Some((token, id)) = vocab
            .iter()
            .max_by_key(|(_, id)| **id)
            .filter(|(_, id)| **id as usize >= config.vocab_size)
        {
            let rows = config.vocab_size;
            let reason = format!(
                "tokenizer and embedding disagree: token {token:?} has id {id}, the embedding has \
                 {rows} rows; \
                 use the tokenizer the model was trained with"
            );
            return Err(Error::model(path, reason));
        }
        let added = inner.get_added_tokens_decoder();
        let mut pieces = vec![];
        for (token, id) in vocab {
            let index = id as usize;
            if index >= pieces.len() {
                pieces.resize_with(index + 1, || None);
            }
            let piece = match added.get(&id) {
                Some(token) => {
                    Piece { bytes: scheme.added_bytes(&token.content), special: token.special }
                }
                None => Piece { bytes: scheme.bytes(&token), special: false },
            };
            if pieces[index].replace(piece).is_some() {
                return Err(Error::model(
                    path,
                    format!("id {id} belongs to two tokens, one of them {token:?}"),
                ));
            }
        }
        let named_mask = MASK_NAMES.iter().find_map(|name| inner.token_to_id(name));
        let chat_templates = templates::in_settings(&settings);
        Ok(Self {
            pieces,
            strip_space: scheme.strip_space,
            mask_token_id: config.mask_token_id.or(named_mask),
            chat_bos: None,
            chat_templates,
            settings,
            plain: OnceLock::new(),
            inner,
        })
    }

    /// What a GGUF file has no place for, a line for each added token: its flags `lstrip`, `rstrip`, `single_word`.
    pub(crate) fn lost_in_gguf(&self) -> Result<Vec<String>> {
        to_gguf::lost(self)
    }

    /// Metadata of a GGUF file that [`Tokenizer::from_gguf`] and llama.cpp read.
    ///
    /// # Errors
    /// If it is no byte-level BPE, or splits text in a way that llama.cpp has no name for.
    pub(crate) fn to_gguf(&self, path: &Path, config: &LlamaConfig) -> Result<Vec<(String, Meta)>> {
        to_gguf::metadata(self, path, config)
    }

    /// Token ids of a text. Special tokens that the text spells out are recognised; `add_special`
    /// also adds the begin and end tokens that the model was trained with, if any.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        ids_of(&self.inner, text, add_special)
    }

    /// Token ids of a conversation that a chat template has written: special tokens are recognised, and none is added but
    /// the one that a GGUF file puts before every text, where the template does not write it.
    pub fn encode_chat(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(text, false)?;
        if let Some(bos) = self.chat_bos.filter(|bos| ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Token ids of a text that is data, a file's: special tokens that it spells out become ordinary ones, and none is
    /// added.
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>> {
        let plain = self.plain.get_or_init(|| {
            let mut plain = self.inner.clone();
            plain.set_encode_special_tokens(true);
            plain
        });
        ids_of(plain, text, false)
    }

    /// The text of a whole sequence. Bytes that are not UTF-8 become U+FFFD; ids without a token
    /// give nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut stream = self.stream(skip_special);
        let mut text: String = ids.iter().filter_map(|&id| stream.push(id)).collect();
        text.extend(stream.finish());
        text
    }

    /// Decodes a sequence as it grows, giving the same text as [`Tokenizer::decode`].
    pub fn stream(&self, skip_special: bool) -> TokenStream<'_> {
        TokenStream { tokenizer: self, skip_special, pending: vec![], at_start: true }
    }

    /// The exact bytes a token stands for inside a text; `None` where no token has this id. (At the
    /// start of a text SentencePiece's first token stands for one space more than the text has.)
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.piece(id).map(|piece| &*piece.bytes)
    }

    /// Whether the id is a special (control) token.
    pub fn is_special(&self, id: u32) -> bool {
        self.piece(id).is_some_and(|piece| piece.special)
    }

    fn piece(&self, id: u32) -> Option<&Piece> {
        self.pieces.get(id as usize)?.as_ref()
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// The id of a token spelled as in `tokenizer.json`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The spelling of a token in `tokenizer.json` (for byte-level BPE not its bytes).
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The token of a masked position: `config.mask_token_id`, or the token with a usual name for
    /// it.
    pub fn mask_token_id(&self) -> Option<u32> {
        self.mask_token_id
    }

    /// The text of a `tokenizer.json`.
    pub fn to_json(&self) -> Result<String> {
        self.inner
            .to_string(true)
            .map_err(|e| Error::io("tokenizer.json", one_line(&e.to_string())))
    }

    /// Name and contents of the files that make up the tokenizer in a Hugging Face folder.
    pub fn files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let mut settings = self.settings.clone();
        // In a folder a conversation begins with what its template writes and with nothing else.
        if let (Some(template), Some(_), false) =
            (self.chat_template(), self.chat_bos, self.template_begins()?)
        {
            settings["chat_template"] = json!(format!("{{{{ bos_token }}}}{template}"));
        }
        let settings = format!("{settings:#}\n").into_bytes();
        let tokenizer = self.to_json()?.into_bytes();
        Ok(vec![
            ("tokenizer.json".to_owned(), tokenizer),
            ("tokenizer_config.json".to_owned(), settings),
        ])
    }

    /// Writes [`Tokenizer::files`] into `dir`, which must exist.
    pub fn save(&self, dir: &Path) -> Result<()> {
        super::save::save_files(dir, &self.files()?)
    }
}

/// Incremental decoding; see [`Tokenizer::stream`].
pub struct TokenStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    /// The beginning of a character that is not complete yet; at most 3 bytes between calls.
    pending: Vec<u8>,
    at_start: bool,
}

impl TokenStream<'_> {
    /// The text that this token completes, if any. Never ends inside a character.
    pub fn push(&mut self, id: u32) -> Option<String> {
        let piece =
            self.tokenizer.piece(id).filter(|piece| !(self.skip_special && piece.special))?;
        let mut bytes = &*piece.bytes;
        if self.at_start && !bytes.is_empty() {
            self.at_start = false;
            if self.tokenizer.strip_space {
                bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            }
        }
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut rest = &*self.pending;
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(e) => {
                    let (valid, after) = rest.split_at(e.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    rest = after;
                    match e.error_len() {
                        Some(wrong) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            rest = &rest[wrong..];
                        }
                        None => break,
                    }
                }
            }
        }
        self.pending = rest.to_vec();
        Some(text).filter(|text| !text.is_empty())
    }

    /// What is left when no token follows: U+FFFD if the text ends inside a character.
    pub fn finish(self) -> Option<String> {
        Some(String::from_utf8_lossy(&self.pending).into_owned()).filter(|text| !text.is_empty())
    }
}

fn ids_of(tokenizer: &tokenizers::Tokenizer, text: &str, add_special: bool) -> Result<Vec<u32>> {
    match tokenizer.encode_fast(text, add_special) {
        Ok(encoding) => Ok(encoding.get_ids().to_vec()),
        Err(e) => Err(Error::Request(format!(
            "the text cannot be tokenised: {}",
            one_line(&e.to_string())
        ))),
    }
}

/// A part of a `tokenizer.json` with its type.
fn with_type(name: &str, mut part: Value) -> Value {
    part["type"] = json!(name);
    part
}

/// The crate's messages may span lines; ours do not.
fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests;
