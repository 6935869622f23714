//! What a model that was tuned on conversations is given: a message or a conversation by its chat template.

use std::path::Path;

use anyhow::{Context, Result};
use demask_engine::model::{ChatOptions, ChatTemplate, Tokenizer};
use serde_json::{Map, Value, json};

use crate::args::read_text;

/// What a chat template is told, as options of all commands that use one.
#[derive(clap::Args)]
pub struct ChatArgs {
    /// Tell the chat template something, as JSON or else text: enable_thinking=false, date_string='1 May 2026'
    ///
    /// Also tools, documents, add_generation_prompt and continue_final_message, as transformers'
    /// apply_chat_template takes them. Repeatable.
    #[arg(long, value_name = "KEY=JSON", value_parser = told)]
    chat_arg: Vec<(String, Value)>,
}

/// A key and its value; what is no JSON is text.
fn told(text: &str) -> Result<(String, Value), String> {
    let (key, value) =
        text.split_once('=').ok_or("KEY=JSON is expected, as enable_thinking=false")?;
    let plain = |c: char| c.is_alphanumeric() || c == '_';
    if key.is_empty() || !key.chars().all(plain) {
        return Err(format!("{key:?} is no name that a template can read"));
    }
    // A text needs no quotes, but what begins as a list or object must be one.
    let value = match serde_json::from_str(value) {
        Ok(value) => value,
        Err(e) if value.starts_with(['{', '[', '"']) => {
            return Err(format!("{value} is no JSON: {e}"));
        }
        Err(_) => Value::from(value),
    };
    Ok((key.to_owned(), value))
}

impl ChatArgs {
    /// Options with the assistant's turn begun, unless an argument says otherwise.
    pub fn options(&self) -> Result<ChatOptions> {
        let mut options = ChatOptions::new(true);
        for (key, value) in &self.chat_arg {
            options.set(key, value.clone())?;
        }
        let begun = |(key, _): &(String, Value)| key == "add_generation_prompt";
        if options.continue_final_message.is_some() && !self.chat_arg.iter().any(begun) {
            options.add_generation_prompt = false;
        }
        Ok(options)
    }

    /// The values by name.
    pub fn variables(&self) -> Map<String, Value> {
        self.chat_arg.iter().cloned().collect()
    }
}

/// The template for a conversation of this kind.
pub fn template_of(tokenizer: &Tokenizer, options: &ChatOptions) -> Result<ChatTemplate> {
    tokenizer.chat_for(None, options.tools.is_some())?.context(
        "the model's tokenizer brings no chat template, so there is no way to tell it something",
    )
}

/// A JSON file, or stdin for `-`.
pub fn read_json(path: &Path) -> Result<Value> {
    serde_json::from_str(&read_text(path)?)
        .with_context(|| format!("{} is no JSON", path.display()))
}

/// The tokens of a conversation in which the user has said this and the model's turn comes. What the text spells of
/// special tokens does not end the turn.
pub fn user_message(tokenizer: &Tokenizer, text: &str, chat: &ChatArgs) -> Result<Vec<u32>> {
    let options = chat.options()?;
    let template = template_of(tokenizer, &options)?;
    let render = |content: &str| {
        template.render_with(&[json!({ "role": "user", "content": content })], &options)
    };
    let ids = tokenizer.encode_chat(&render(text)?)?;
    let specials = |ids: &[u32]| ids.iter().filter(|&&id| tokenizer.is_special(id)).count();
    // Not in any text, and no template takes it apart.
    const HERE: &str = "\u{F8FE}here\u{F8FE}";
    let frame = render(HERE)?;
    let (before, behind) =
        frame.split_once(HERE).context("the chat template leaves out what the user says")?;
    let [before, behind] = [tokenizer.encode_chat(before)?, tokenizer.encode(behind, false)?];
    if specials(&ids) == specials(&before) + specials(&behind) {
        return Ok(ids);
    }
    Ok([before, tokenizer.encode_text(text)?, behind].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_json_or_text() {
        let value = |text: &str| told(text).unwrap().1;
        assert_eq!(value("enable_thinking=false"), json!(false));
        assert_eq!(value("date_string=26 Jul 2024"), json!("26 Jul 2024"));
        assert_eq!(value("n=2"), json!(2));
        assert_eq!(value("tools=[{\"a\": \"b=c\"}]"), json!([{"a": "b=c"}]));
        assert_eq!(value("empty="), json!(""));
        for wrong in ["x", "=1", "a b=1", "tools=[1", "s=\"open"] {
            assert!(told(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_turn_that_is_continued_is_not_begun_anew() {
        let args = |told_: &[&str]| ChatArgs {
            chat_arg: told_.iter().map(|t| told(t).unwrap()).collect(),
        };
        assert!(args(&[]).options().unwrap().add_generation_prompt);
        assert!(!args(&["add_generation_prompt=false"]).options().unwrap().add_generation_prompt);
        assert!(!args(&["continue_final_message=true"]).options().unwrap().add_generation_prompt);
        assert!(args(&["messages=[]"]).options().is_err());
        assert!(args(&["add_generation_prompt=1"]).options().is_err());
    }
}
