//! Documents as token ids, with a mark on those that are read but not learnt.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use demask_engine::model::tokenizer::{FIM_NAMES, Fim, FimOrder};
use demask_engine::model::{ChatOptions, ChatTemplate, LlamaConfig, Tokenizer, Weights, hub};
use demask_engine::philox::Philox;
use serde_json::{Map, Value};

use super::{Content, Conversation, Document, fnv1a, turns};
use crate::bpe;

/// Set on a token that is read but neither masked nor predicted: a prompt's. Ids stay below 2^24.
pub const GIVEN: u32 = 1 << 31;

/// Fields of a message, beside its text, that a model learns to write or to answer.
const FIELDS: [&str; 5] =
    ["tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"];

/// Keeps this stream apart from others drawn under the same user seed.
const FIM: u64 = u64::from_le_bytes(*b"fim\0\0\0\0\0");

/// A tokenizer, as the making of a dataset needs it. Shared by threads.
pub struct Vocabulary {
    /// For documents: text that spells a special token becomes ordinary tokens.
    text: tokenizers::Tokenizer,
    /// For conversations: the template's special tokens count.
    chat: tokenizers::Tokenizer,
    template: Option<ChatTemplate>,
    /// For conversations with tools, where the tokenizer has a template of its own for them.
    for_tools: Option<ChatTemplate>,
    /// What the template is told of every conversation.
    told: Map<String, Value>,
    special: Vec<String>,
    fim: Option<Fim>,
    /// Put before each text.
    begin: Vec<u32>,
    /// Put before each conversation that does not begin with it.
    chat_bos: Option<u32>,
    /// What the chat template ends the assistant's turn with, if that is a token.
    pub end_of_turn: Option<u32>,
    /// What ends a document.
    pub eos: u32,
    /// Ids are below this.
    pub size: usize,
    /// Names and contents of the tokenizer's files.
    pub files: Vec<(String, Vec<u8>)>,
}

impl Vocabulary {
    /// Opens a folder with a `tokenizer.json`, with or without a model beside it, or a GGUF file or its folder.
    pub fn open(path: &Path) -> Result<Vocabulary> {
        let path = &hub::resolve(path)?;
        let (config, tokenizer) = match bare(path)? {
            Some(both) => both,
            None => {
                let (config, _) = Weights::open(path)?;
                let tokenizer = Tokenizer::for_model(path, &config)?;
                (config, tokenizer)
            }
        };
        let eos = config.eos_token_ids.first().copied().or(tokenizer.eos_token_id());
        let eos = eos.with_context(|| {
            format!("{}: no token is known to end a text (eos_token)", path.display())
        })?;
        Self::new(&tokenizer, eos)
    }

    /// The vocabulary of a tokenizer whose documents end with `eos`.
    pub fn new(tokenizer: &Tokenizer, eos: u32) -> Result<Vocabulary> {
        let json = tokenizer.to_json()?;
        let chat = tokenizers::Tokenizer::from_bytes(&json)
            .map_err(|e| anyhow!("the tokenizer cannot be used for a corpus: {e}"))?;
        let [begin, _] = tokenizer.around()?;
        let special = chat.get_added_tokens_decoder();
        let special = special.values().filter(|t| t.special).map(|t| t.content.clone()).collect();
        Ok(Vocabulary {
            text: bpe::for_corpus(&json)?,
            chat,
            template: tokenizer.chat()?,
            for_tools: tokenizer.chat_for(None, true)?,
            told: Map::new(),
            special,
            fim: tokenizer.fim(),
            begin,
            chat_bos: tokenizer.chat_bos(),
            end_of_turn: tokenizer.end_of_turn()?,
            eos,
            size: tokenizer.vocab_size(),
            files: tokenizer.files()?,
        })
    }

    /// Tells the chat template of every conversation these values, by name, as `enable_thinking`.
    ///
    /// # Errors
    /// If a value is of a type that its name does not take.
    pub fn tell(&mut self, variables: &Map<String, Value>) -> Result<()> {
        turns::options(variables)?;
        self.told = variables.clone();
        Ok(())
    }

    /// What identifies the tokenizer: a hash of its files, and of what its chat template is told.
    pub fn fingerprint(&self) -> u64 {
        let told = match self.told.is_empty() {
            true => String::new(),
            false => Value::Object(self.told.clone()).to_string(),
        };
        let files = self.files.iter().flat_map(|(_, contents)| contents.iter().copied());
        fnv1a(files.chain(told.into_bytes()))
    }

    /// The text of ids, special tokens too.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.chat.decode(ids, false).map_err(|e| anyhow!("decoding: {e}"))
    }

    /// Whether it has what the contents of a corpus ask for.
    pub fn check(&self, fim: bool, chat: bool) -> Result<()> {
        ensure!(
            !fim || self.fim.is_some(),
            "fim_rate is above 0, but the tokenizer has no tokens for it ({})",
            FIM_NAMES.map(|names| names.join(", ")).join("; ")
        );
        ensure!(
            !chat || self.template.is_some(),
            "conversations need a chat template, and the tokenizer brings none: add chat_template to its \
             tokenizer_config.json"
        );
        Ok(())
    }

    /// Whether a conversation spells a special token, and could end its own turn with it.
    pub fn is_spoofed(&self, chat: &Conversation) -> bool {
        let spells = |text: &str| self.special.iter().any(|token| text.contains(token.as_str()));
        chat.strings().into_iter().any(spells)
    }

    /// What of a conversation the chat template prints nothing of: a model must not learn to end its turn where it
    /// called a tool.
    pub fn without_place(&self, chat: &Conversation) -> Option<String> {
        let template = self.template(&self.told(chat).ok()?)?;
        // The conversation without one thing, by what that is.
        let mut without: Vec<(String, Conversation)> = Vec::new();
        for field in FIELDS.into_iter().filter(|f| chat.messages.iter().any(|m| m.get(f).is_some()))
        {
            let mut less = chat.clone();
            for message in less.messages.iter_mut().filter_map(Value::as_object_mut) {
                message.retain(|key, _| key != field);
            }
            without.push((field.to_owned(), less));
        }
        for name in ["tools", "documents"].into_iter().filter(|n| chat.variables.contains_key(*n)) {
            let mut less = chat.clone();
            less.variables.retain(|key, _| key != name);
            without.push((name.to_owned(), less));
        }
        for (at, message) in chat.messages.iter().enumerate() {
            let role = message["role"].as_str().unwrap_or_default();
            if !["system", "user", "assistant"].contains(&role) {
                let mut less = chat.clone();
                less.messages.remove(at);
                without.push((format!("role {role}"), less));
            }
        }
        let text =
            |chat: &Conversation| template.render_with(&chat.messages, &self.told(chat).ok()?).ok();
        // Where the template refuses the conversation, it says so itself when its tokens are made.
        let whole = without.first().and_then(|_| text(chat))?;
        let silent = without.into_iter().find(|(_, less)| text(less).as_ref() == Some(&whole));
        silent.map(|(name, _)| name)
    }

    /// A document's tokens; those that are not learnt carry [`GIVEN`]. At `fim_rate`, a text is cut at two random
    /// characters and becomes suffix, prefix, middle, the order in which Seed-Coder was trained (arXiv 2506.03524).
    pub fn tokens(&self, document: &Document, fim_rate: f64, seed: u64) -> Result<Vec<u32>> {
        match &document.content {
            Content::Text(text) => {
                let hash = fnv1a(document.name.bytes());
                let mut random = Philox::new(seed ^ FIM, [hash as u32, (hash >> 32) as u32, 0]);
                let ids = match self.fim {
                    Some(fim) if f64::from(random.uniform()) < fim_rate => {
                        self.fill_in_the_middle(text, fim, &mut random)?
                    }
                    _ => bpe::encode(&self.text, text)?,
                };
                Ok(self.begin.iter().map(|id| id | GIVEN).chain(ids).collect())
            }
            Content::Chat(chat) => self.conversation(chat),
        }
    }

    fn fill_in_the_middle(&self, text: &str, fim: Fim, random: &mut Philox) -> Result<Vec<u32>> {
        let places: Vec<usize> = text.char_indices().map(|(i, _)| i).chain([text.len()]).collect();
        let mut cut = || places[random.below(places.len() as u32) as usize];
        let (a, b) = (cut(), cut());
        let (a, b) = (a.min(b), a.max(b));
        let encode = |part: &str| bpe::encode(&self.text, part);
        let mut ids = fim.prompt(&encode(&text[..a])?, &encode(&text[b..])?, FimOrder::SuffixFirst);
        ids.extend(encode(&text[a..b])?);
        Ok(ids)
    }

    /// What the template is told of a conversation: what every one is told, and what stands beside this one.
    fn told(&self, chat: &Conversation) -> Result<ChatOptions> {
        let mut variables = self.told.clone();
        variables.extend(chat.variables.clone());
        turns::options(&variables)
    }

    fn template(&self, told: &ChatOptions) -> Option<&ChatTemplate> {
        let for_tools = self.for_tools.as_ref().filter(|_| told.tools.is_some());
        for_tools.or(self.template.as_ref())
    }

    /// The template's text, cut where the assistant begins and ends, each piece tokenised alone: so the tokens before
    /// an answer are those of the prompt that asks for it.
    fn conversation(&self, chat: &Conversation) -> Result<Vec<u32>> {
        let told = self.told(chat)?;
        let template = self.template(&told).context("the tokenizer has no chat template")?;
        let mut ids = Vec::new();
        for part in turns::parts(template, &chat.messages, chat.given, &told)? {
            let mark = if part.learnt { 0 } else { GIVEN };
            ids.extend(bpe::encode(&self.chat, &part.text)?.into_iter().map(|id| id | mark));
        }
        if let Some(bos) =
            self.chat_bos.filter(|bos| ids.first().map(|id| id & !GIVEN) != Some(*bos))
        {
            ids.insert(0, bos | GIVEN);
        }
        Ok(ids)
    }
}

/// The tokenizer of a folder that holds no model; `None` of any other.
///
/// # Errors
/// If its files are wrong.
pub fn bare_tokenizer(folder: &Path) -> Result<Option<Tokenizer>> {
    Ok(bare(folder)?.map(|(_, tokenizer)| tokenizer))
}

fn bare(folder: &Path) -> Result<Option<(LlamaConfig, Tokenizer)>> {
    if !folder.join("tokenizer.json").exists() || folder.join("config.json").exists() {
        return Ok(None);
    }
    let config = bare_config(folder)?;
    let tokenizer = Tokenizer::from_folder(folder, &config)?;
    Ok(Some((config, tokenizer)))
}

/// The configuration that a tokenizer without a model stands for.
fn bare_config(folder: &Path) -> Result<LlamaConfig> {
    let path = folder.join("tokenizer.json");
    let tokenizer = tokenizers::Tokenizer::from_file(&path).map_err(|e| {
        anyhow!("cannot load {} ({e}); it must be a Hugging Face tokenizer.json", path.display())
    })?;
    let settings: PathBuf = folder.join("tokenizer_config.json");
    let named = std::fs::read(&settings).ok().and_then(|text| {
        let value: serde_json::Value = serde_json::from_slice(&text).ok()?;
        let eos = &value["eos_token"];
        let eos = eos.as_str().or(eos["content"].as_str())?;
        tokenizer.token_to_id(eos)
    });
    let eos = named.or_else(|| tokenizer.token_to_id(bpe::SPECIAL_TOKENS[0]));
    let size = tokenizer.get_vocab_size(true);
    Ok(crate::recipe::Fresh::default().config(size, eos, None))
}
