//! From files to token shards: `recipe` says what, `read` and `rows` open it, `conversation` says what a row is, `filter`
//! and `contamination` leave out, `sample` turns documents into tokens, `turns` finds what of a conversation the assistant
//! wrote, `build` does it all in parallel and can be interrupted, `shards` is what lies on disk. Sequences for training
//! are made of shards by [`crate::pack`].

use std::borrow::Cow;

use serde_json::{Map, Value};

pub mod build;
mod contamination;
pub mod conversation;
pub mod filter;
pub mod read;
pub mod recipe;
mod rows;
pub mod sample;
pub mod shards;
pub mod turns;

/// One document of a corpus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Path below its directory, or file and line.
    pub name: String,
    /// What it is held out with: the top-level folder, or what a column says.
    pub package: String,
    /// What it says.
    pub content: Content,
}

/// What a document says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Text, all of it learnt.
    Text(String),
    /// A conversation, of which the assistant's turns are learnt.
    Chat(Conversation),
}

/// A conversation, as a chat template takes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conversation {
    /// Messages in order: objects with a `role`, a `content` that is text (or anything, of a tool; or absent, beside
    /// calls of tools), and whatever else the data has, such as `tool_calls` and `reasoning_content`.
    pub messages: Vec<Value>,
    /// So many messages at the beginning are a prompt, of which nothing is learnt.
    pub given: usize,
    /// What else the template is told: `tools`, `documents` and other variables by name.
    pub variables: Map<String, Value>,
}

impl Conversation {
    /// A question and the answer that is learnt.
    pub fn of(messages: Vec<Value>) -> Conversation {
        Conversation { messages, ..Conversation::default() }
    }

    /// Whether a message says nothing: no text, no call of a tool, no reasoning.
    fn has_empty_turn(&self) -> bool {
        let blank = |value: &Value| value.as_str().is_none_or(|text| text.trim().is_empty());
        self.messages.iter().any(|message| {
            let says = |(key, value): (&String, &Value)| match key.as_str() {
                "role" | "name" | "tool_call_id" => false,
                _ => !blank(value) || value.is_array() || value.is_object() || value.is_number(),
            };
            !message.as_object().is_some_and(|fields| fields.iter().any(says))
        })
    }

    /// Every text in it that the data decides, roles and names of fields included.
    pub(crate) fn strings(&self) -> Vec<&str> {
        let mut strings = Vec::new();
        self.messages.iter().chain(self.variables.values()).for_each(|v| collect(v, &mut strings));
        strings
    }
}

fn collect<'a>(value: &'a Value, strings: &mut Vec<&'a str>) {
    match value {
        Value::String(text) => strings.push(text),
        Value::Array(values) => values.iter().for_each(|v| collect(v, strings)),
        Value::Object(fields) => fields.iter().for_each(|(key, value)| {
            strings.push(key);
            collect(value, strings);
        }),
        _ => {}
    }
}

/// A text, or anything else as JSON.
fn text_of(value: &Value) -> Cow<'_, str> {
    match value {
        Value::String(text) => Cow::Borrowed(text),
        other => Cow::Owned(other.to_string()),
    }
}

impl Content {
    /// What it says, piece by piece: a text, or what each message holds beside its role, and the template's variables.
    fn texts(&self) -> Vec<Cow<'_, str>> {
        match self {
            Content::Text(text) => vec![Cow::Borrowed(text)],
            Content::Chat(chat) => {
                let fields = chat.messages.iter().filter_map(Value::as_object).flatten();
                let said = fields.filter(|(key, _)| *key != "role").map(|(_, value)| value);
                said.chain(chat.variables.values()).map(text_of).collect()
            }
        }
    }

    /// Its texts.
    pub fn into_texts(self) -> Vec<String> {
        match self {
            Content::Text(text) => vec![text],
            chat => chat.texts().into_iter().map(Cow::into_owned).collect(),
        }
    }

    /// Bytes of text.
    pub fn bytes(&self) -> u64 {
        self.texts().iter().map(|t| t.len() as u64).sum()
    }

    /// What two documents that differ only in whitespace share.
    fn fingerprint(&self) -> (u64, u64) {
        let texts = self.texts();
        let dense = || {
            let bytes = texts.iter().flat_map(|t| t.bytes().chain([0]));
            bytes.filter(|b| !b.is_ascii_whitespace())
        };
        (dense().count() as u64, fnv1a(dense()))
    }
}

/// 64-bit FNV-1a: unlike the standard library's hasher, the same in every release.
pub(crate) fn fnv1a(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
