//! Which chat template is taken, of those that a tokenizer brings, as transformers takes it.

use std::path::Path;

use serde_json::{Value, json};

use super::{MAX_SETTINGS_BYTES, Tokenizer};
use crate::model::chat::{CHATML, ChatTemplate};
use crate::model::weights::source::read_capped;
use crate::{Error, Result};

/// The template that is taken where no other is asked for.
const DEFAULT: &str = "default";
/// The template that is taken where there are tools.
const TOOLS: &str = "tool_use";

/// Templates in files of their own, which count instead of any in `tokenizer_config.json`: as that file has them.
pub(super) fn in_files(dir: &Path) -> Result<Option<Value>> {
    let read = |path: &Path| {
        let bytes = read_capped(path, MAX_SETTINGS_BYTES)?;
        String::from_utf8(bytes).map_err(|_| Error::model(path, "not UTF-8"))
    };
    let single = dir.join("chat_template.jinja");
    let single = if single.exists() { Some(read(&single)?) } else { None };
    let folder = dir.join("additional_chat_templates");
    let mut named = Vec::new();
    if folder.is_dir() {
        let cannot = |e: std::io::Error| Error::io(&folder, e.to_string());
        for entry in std::fs::read_dir(&folder).map_err(cannot)? {
            let path = entry.map_err(cannot)?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if let Some(name) = name.strip_suffix(".jinja") {
                named.push((name.to_owned(), read(&path)?));
            }
        }
    }
    named.sort();
    if named.is_empty() {
        return Ok(single.map(Value::String));
    }
    named.splice(0..0, single.map(|text| (DEFAULT.to_owned(), text)));
    let named = named.into_iter().map(|(name, text)| json!({ "name": name, "template": text }));
    Ok(Some(named.collect()))
}

/// `chat_template` of `tokenizer_config.json`, a text or a list of named ones, by name.
pub(super) fn in_settings(settings: &Value) -> Vec<(String, String)> {
    let templates = &settings["chat_template"];
    if let Some(text) = templates.as_str() {
        return vec![(DEFAULT.to_owned(), text.to_owned())];
    }
    let named = templates.as_array().into_iter().flatten();
    let pair = |entry: &Value| {
        Some((entry["name"].as_str()?.to_owned(), entry["template"].as_str()?.to_owned()))
    };
    named.filter_map(pair).collect()
}

impl Tokenizer {
    /// The model's Jinja chat template, as written.
    pub fn chat_template(&self) -> Option<&str> {
        self.template_named(DEFAULT)
    }

    fn template_named(&self, name: &str) -> Option<&str> {
        let mut templates = self.chat_templates.iter();
        templates.find(|(known, _)| known == name).map(|(_, text)| text.as_str())
    }

    /// The names of the chat templates.
    pub fn chat_template_names(&self) -> Vec<&str> {
        self.chat_templates.iter().map(|(name, _)| name.as_str()).collect()
    }

    /// The compiled chat template: the tokenizer's own, else ChatML if it has ChatML's tokens, else `None`.
    ///
    /// # Errors
    /// If the template is wrong, or there are several and none is the default.
    pub fn chat(&self) -> Result<Option<ChatTemplate>> {
        self.chat_for(None, false)
    }

    /// The compiled chat template of this name, or the one for conversations with tools, where there is one, or the
    /// default, as [`Tokenizer::chat`].
    ///
    /// # Errors
    /// As [`Tokenizer::chat`]; also if there is none of this name.
    pub fn chat_for(&self, name: Option<&str>, tools: bool) -> Result<Option<ChatTemplate>> {
        let chatml = || ["<|im_start|>", "<|im_end|>"].iter().all(|t| self.token_id(t).is_some());
        let names = || self.chat_template_names().join(", ");
        let template = match name {
            Some(name) => Some(self.template_named(name).ok_or_else(|| {
                let names = names();
                let known = if names.is_empty() {
                    "it brings none".into()
                } else {
                    format!("there are {names}")
                };
                Error::Request(format!(
                    "the tokenizer has no chat template called {name:?}; {known}"
                ))
            })?),
            None => {
                let for_tools = self.template_named(TOOLS).filter(|_| tools);
                for_tools.or(self.chat_template())
            }
        };
        let template = match template {
            None if !self.chat_templates.is_empty() => {
                return Err(Error::Request(format!(
                    "the tokenizer has several chat templates and none is the default; name one of {}",
                    names()
                )));
            }
            template => template.or_else(|| chatml().then_some(CHATML)),
        };
        template.map(|template| self.chat_of(template)).transpose()
    }

    /// A template from elsewhere, with this tokenizer's special tokens.
    ///
    /// # Errors
    /// If the template is wrong.
    pub fn chat_of(&self, template: &str) -> Result<ChatTemplate> {
        ChatTemplate::new(template, &self.settings)
    }
}
