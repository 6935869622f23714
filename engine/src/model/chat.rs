//! Chat templates: a conversation as the text that a model was trained on, by the Jinja template that comes with its
//! tokenizer. What is printed is what transformers 5 prints: the template is rewritten (`desugar.rs`) so that minijinja
//! computes with Python's operators, methods and filters, and the conversation is prepared as by `apply_chat_template`.

use std::ops::Range;

use chrono::NaiveDateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, ErrorKind, UndefinedBehavior, escape_formatter};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::{Error, Result};

mod add;
mod arguments;
mod date;
mod desugar;
mod expression;
mod filters;
mod format;
mod globals;
mod json;
mod lexer;
mod methods;
mod python;
mod text_filters;

/// The template for a tokenizer that has ChatML's tokens and no template of its own.
pub const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + \
    message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}\
    {{ '<|im_start|>assistant\\n' }}{% endif %}";

const NAME: &str = "chat template";
/// Special tokens that a template may name; those that a tokenizer has not are undefined.
const SPECIAL: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// Names under which a message's reasoning is passed.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
/// Put behind the message that is to be continued, as transformers does, to find its end again.
const CONTINUE: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
/// Around what `{% generation %}` encloses; no character of any text.
const SIGNS: [char; 2] = ['\u{fdd0}', '\u{fdd1}'];

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    marks_generation: bool,
    /// `bos_token` and its kind, which templates may name.
    special: Map<String, Value>,
}

/// What a template is told beside the messages.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ChatOptions {
    /// Begin the assistant's next turn.
    pub add_generation_prompt: bool,
    /// Leave the last message open, to be continued: the name of its field, `content` as a rule.
    pub continue_final_message: Option<String>,
    /// Tools that may be called: a list of JSON schemas.
    pub tools: Option<Value>,
    /// Texts to answer from: a list of objects.
    pub documents: Option<Value>,
    /// Anything else that a template reads, by name: `enable_thinking`, say.
    pub variables: Map<String, Value>,
}

impl ChatOptions {
    /// Options with the assistant's turn begun, or not.
    pub fn new(add_generation_prompt: bool) -> ChatOptions {
        ChatOptions { add_generation_prompt, ..ChatOptions::default() }
    }

    /// Sets what transformers' `apply_chat_template` takes under this name.
    ///
    /// # Errors
    /// If it is `messages`, or a value of the wrong type.
    pub fn set(&mut self, name: &str, value: Value) -> Result<()> {
        let wrong =
            |what: &str| Error::Request(format!("the chat template's {name} must be {what}"));
        match (name, value) {
            ("messages" | "conversation", _) => return Err(wrong("given as the conversation")),
            ("add_generation_prompt", Value::Bool(on)) => self.add_generation_prompt = on,
            ("add_generation_prompt", _) => return Err(wrong("true or false")),
            ("continue_final_message", Value::String(field)) => {
                self.continue_final_message = Some(field);
            }
            ("continue_final_message", Value::Bool(on)) => {
                self.continue_final_message = on.then(|| "content".to_owned());
            }
            ("continue_final_message", _) => return Err(wrong("true, false or a field's name")),
            ("tools", value) => self.tools = Some(value).filter(|v| !v.is_null()),
            ("documents", value) => self.documents = Some(value).filter(|v| !v.is_null()),
            (name, value) => {
                self.variables.insert(name.to_owned(), value);
            }
        }
        Ok(())
    }
}

impl ChatTemplate {
    /// Compiles a template; `settings` is the `tokenizer_config.json`, for the special tokens that it may name.
    ///
    /// # Errors
    /// If transformers would not compile it either: a syntax error, a filter or test that there is not.
    pub fn new(template: &str, settings: &Value) -> Result<ChatTemplate> {
        let rewritten =
            desugar::desugar(template, &filters::exists, &globals::is_test).map_err(|e| {
                Error::Request(format!("the chat template, line {}: {}", e.line, e.message))
            })?;
        let mut environment = Environment::empty();
        let mut syntax = SyntaxConfig::builder();
        // The last line end is already gone.
        syntax.trim_blocks(true).lstrip_blocks(true).keep_trailing_newline(true);
        environment.set_syntax(syntax.build().map_err(|e| refuse(&e))?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_unknown_method_callback(|_, value, name, arguments| {
            methods::call(value, name, arguments)
        });
        environment.set_formatter(|out, state, value| match state.auto_escape() {
            AutoEscape::None => Ok(out.write_str(&python::text(value))?),
            _ => escape_formatter(out, state, value),
        });
        globals::install(&mut environment, now);
        environment.add_template_owned(NAME, rewritten).map_err(|e| refuse(&e))?;
        let special = SPECIAL.iter().filter_map(|&name| {
            let token = &settings[name];
            let token = token.as_str().or(token["content"].as_str())?;
            Some((name.to_owned(), Value::from(token)))
        });
        Ok(ChatTemplate {
            environment,
            marks_generation: marks_generation(template),
            source: template.to_owned(),
            special: special.collect(),
        })
    }

    /// Whether it says by `{% generation %}` what the assistant writes.
    pub fn marks_generation(&self) -> bool {
        self.marks_generation
    }

    /// The text of a conversation: each message serialises as an object with a role and, as a rule, a content. With
    /// `open`, the assistant's next turn is begun.
    ///
    /// # Errors
    /// As [`ChatTemplate::render_with`].
    pub fn render<T: Serialize>(&self, messages: &[T], open: bool) -> Result<String> {
        let json = serde_json::to_value(messages).map_err(|e| Error::Request(e.to_string()))?;
        self.render_with(json.as_array().map_or(&[], Vec::as_slice), &ChatOptions::new(open))
    }

    /// The text of a conversation: objects with a role and, as a rule, a content.
    ///
    /// # Errors
    /// If the template refuses the conversation (roles that do not alternate, say), in its own words; if there is no
    /// message; if the last message cannot be continued.
    pub fn render_with(&self, messages: &[Value], options: &ChatOptions) -> Result<String> {
        self.rendered(messages, options, false)
    }

    /// The same, and where in it, in bytes, the template says that the assistant writes.
    ///
    /// # Errors
    /// As [`ChatTemplate::render_with`]; also if the template computes with what it encloses by `{% generation %}`, so that
    /// its place in the text is unknown.
    pub fn render_marked(
        &self,
        messages: &[Value],
        options: &ChatOptions,
    ) -> Result<(String, Vec<Range<usize>>)> {
        let plain = self.rendered(messages, options, false)?;
        if plain.contains(SIGNS) {
            return Err(Error::Request(
                "the conversation holds U+FDD0 or U+FDD1, which are no characters".into(),
            ));
        }
        let marked = self.rendered(messages, options, true)?;
        let (mut text, mut places, mut begun) = (String::new(), Vec::new(), Vec::new());
        for c in marked.chars() {
            if c == SIGNS[0] {
                begun.push(text.len());
            } else if c == SIGNS[1] {
                places.extend(begun.pop().map(|start| start..text.len()));
            } else {
                text.push(c);
            }
        }
        match text == plain && begun.is_empty() {
            true => Ok((text, places)),
            false => Err(Error::Request(
                "the chat template changes what it encloses by {% generation %}, so it is unknown where that stands \
                 in the text"
                    .into(),
            )),
        }
    }

    fn rendered(&self, messages: &[Value], options: &ChatOptions, marked: bool) -> Result<String> {
        let wrong = |message: &str| Err(Error::Request(message.to_owned()));
        let mut messages = messages.iter().map(prepared).collect::<Result<Vec<_>>>()?;
        for (name, value) in [("tools", &options.tools), ("documents", &options.documents)] {
            let fits = |v: &Value| v.as_array().is_some_and(|v| v.iter().all(Value::is_object));
            if !value.as_ref().is_none_or(fits) {
                return wrong(&format!("a chat template's {name} must be a list of objects"));
            }
        }
        let Some(last) = messages.last_mut() else {
            return wrong("a conversation needs at least one message");
        };
        let mut continued = None;
        if let Some(field) = &options.continue_final_message {
            if options.add_generation_prompt {
                return wrong(
                    "continue_final_message and add_generation_prompt exclude each other",
                );
            }
            continued = Some(self.leave_open(last, field)?);
        }
        let mut variables = Map::new();
        variables.extend(self.special.clone());
        variables.extend(options.variables.clone());
        let option = |value: &Option<Value>| value.clone().unwrap_or(Value::Null);
        variables.insert("messages".into(), messages.into_iter().map(Value::Object).collect());
        variables.insert("tools".into(), option(&options.tools));
        variables.insert("documents".into(), option(&options.documents));
        variables.insert("add_generation_prompt".into(), options.add_generation_prompt.into());
        if marked {
            let signs: Vec<Value> = SIGNS.iter().map(|c| c.to_string().into()).collect();
            variables.insert(globals::SIGNS.into(), signs.into());
        }
        let template = self.environment.get_template(NAME).map_err(|e| refuse(&e))?;
        let text = template.render(value_of(&Value::Object(variables))).map_err(|e| refuse(&e))?;
        let Some(end) = continued else { return Ok(text) };
        let tag = text.rfind(CONTINUE.trim_end()).filter(|_| text.contains(end.trim()));
        let Some(at) = tag else {
            return wrong(
                "the last message cannot be continued: the chat template leaves out or changes a part of it",
            );
        };
        // A template that trims takes the space behind the tag, and what stood before it belongs to the message.
        match text[at..].starts_with(CONTINUE) {
            true => Ok(text[..at].to_owned()),
            false => Ok(methods::strip(&text[..at], None, "rstrip").to_owned()),
        }
    }

    /// Puts the tag behind a message that is to be continued, and returns the text that ends there.
    fn leave_open(&self, message: &mut Map<String, Value>, field: &str) -> Result<String> {
        let wrong = |message: String| Err(Error::Request(message));
        let Some(last) = message.get(field).cloned() else {
            return wrong(format!("the last message has no {field:?} to continue"));
        };
        let fields: Vec<&str> = match REASONING.contains(&field) {
            true => {
                let same = |f: &&str| message.get(*f) == Some(&last);
                REASONING.into_iter().filter(same).collect()
            }
            false => vec![field],
        };
        if !fields.iter().any(|field| self.source.contains(field)) {
            return wrong(format!(
                "the chat template does not use {field:?}, so it cannot be continued"
            ));
        }
        if let Some(parts) = message.get_mut(field).and_then(Value::as_array_mut) {
            let texts = parts.iter_mut().rev().filter_map(|part| part.get_mut("text"));
            for part in texts {
                if let Some(text) = part.as_str().map(str::to_owned) {
                    *part = Value::from(text.clone() + CONTINUE);
                    return Ok(text);
                }
            }
            return wrong("the last message has no text to continue".into());
        }
        let Some(text) = last.as_str() else {
            return wrong(format!("the last message's {field:?} is no text to continue"));
        };
        for field in fields {
            message.insert(field.to_owned(), Value::from(text.to_owned() + CONTINUE));
        }
        Ok(text.to_owned())
    }
}

/// Whether a template has the tag, by the pattern that transformers looks for.
fn marks_generation(template: &str) -> bool {
    template.match_indices("{%").any(|(at, _)| {
        let inside = template[at + 2..].trim_start_matches(['-', '+']).trim_start();
        let behind = inside.strip_prefix("generation").map(str::trim_start);
        behind.is_some_and(|rest| rest.trim_start_matches(['-', '+']).starts_with("%}"))
    })
}

fn now() -> NaiveDateTime {
    chrono::Local::now().naive_local()
}

/// A message as a template gets it: what is null is left out; reasoning goes by the names that templates read.
fn prepared(message: &Value) -> Result<Map<String, Value>> {
    let Some(fields) = message.as_object() else {
        return Err(Error::Request("a message must be an object with a role and a content".into()));
    };
    let kept = fields.iter().filter(|(_, value)| !value.is_null());
    let kept: Map<String, Value> = kept.map(|(k, v)| (k.clone(), v.clone())).collect();
    let Some(reasoning) = REASONING.iter().find_map(|&name| kept.get(name)).cloned() else {
        return Ok(kept);
    };
    let mut fields = Map::new();
    fields.insert("thinking".into(), reasoning.clone());
    fields.extend(kept);
    fields.insert("reasoning_content".into(), reasoning);
    Ok(fields)
}

/// JSON as Python reads it.
fn value_of(json: &Value) -> minijinja::Value {
    match json {
        Value::Null => minijinja::Value::from(()),
        Value::Bool(on) => minijinja::Value::from(*on),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(whole), _) => minijinja::Value::from(whole),
            (None, Some(whole)) => minijinja::Value::from(whole),
            _ => minijinja::Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Value::String(text) => minijinja::Value::from(text.as_str()),
        Value::Array(values) => {
            minijinja::Value::from(values.iter().map(value_of).collect::<Vec<_>>())
        }
        Value::Object(fields) => {
            python::dict(fields.iter().map(|(k, v)| (k.as_str().into(), value_of(v))))
        }
    }
}

fn refuse(error: &minijinja::Error) -> Error {
    let said = match error.kind() {
        ErrorKind::InvalidOperation | ErrorKind::UndefinedError | ErrorKind::UnknownMethod => None,
        kind => Some(kind.to_string()),
    };
    let detail = error.detail().map(str::to_owned);
    let message = match (said, detail) {
        (Some(kind), Some(detail)) => format!("{kind}: {detail}"),
        (None, Some(detail)) => detail,
        (kind, None) => kind.unwrap_or_else(|| error.kind().to_string()),
    };
    let line = error.line().map(|line| format!(", line {line}")).unwrap_or_default();
    Error::Request(format!("the chat template{line}: {message}"))
}

#[cfg(test)]
mod tests;
