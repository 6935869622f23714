//! Chat templates: a conversation as the text that a model was trained on, by the Jinja template that comes with its
//! tokenizer (`chat_template` of `tokenizer_config.json`), rendered as transformers does (trimmed and left-stripped
//! blocks, Python's string methods, `raise_exception`).

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, context};
use serde::Serialize;
use serde_json::Value;

use crate::{Error, Result};

/// The template for a tokenizer that has ChatML's tokens and no template of its own.
pub const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + \
    message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}\
    {{ '<|im_start|>assistant\\n' }}{% endif %}";

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token` and its kind, which templates may name.
    special: Value,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Compiles a template; `settings` is the `tokenizer_config.json`, for the special tokens that it may name.
    pub fn new(template: &str, settings: &Value) -> Result<ChatTemplate> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| refuse(&e))?);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| {
            Err::<String, _>(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned(NAME, template.to_owned()).map_err(|e| refuse(&e))?;
        let mut special = serde_json::Map::new();
        for name in ["bos_token", "eos_token", "pad_token", "unk_token"] {
            let token = &settings[name];
            let token = token.as_str().or(token["content"].as_str());
            special.insert(name.to_owned(), Value::from(token.unwrap_or_default()));
        }
        Ok(ChatTemplate { environment, special: Value::Object(special) })
    }

    /// The text of a conversation: each turn serialises as `{role, content}`. With `open`, the assistant's next turn is
    /// begun.
    ///
    /// # Errors
    /// If the template refuses the conversation (roles that do not alternate, say), in its own words.
    pub fn render<T: Serialize>(&self, turns: &[T], open: bool) -> Result<String> {
        let template = self.environment.get_template(NAME).map_err(|e| refuse(&e))?;
        let turns = Serde(turns);
        let special = Serde(&self.special);
        template
            .render(context! { messages => turns, add_generation_prompt => open, ..special })
            .map_err(|e| refuse(&e))
    }
}

fn refuse(error: &minijinja::Error) -> Error {
    Error::Request(format!("the model's chat template: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// What transformers renders for the same conversation; the template is in the style of Llama 2's.
    #[test]
    fn a_template_with_pythons_methods_and_special_tokens() {
        let template = "{% for m in messages %}\n    {% if m['role'] == 'user' %}\n\
            {{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}\n    {% else %}\n\
            {{- ' ' + m['content'] + eos_token }}\n    {% endif %}\n{% endfor %}";
        let settings = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}});
        let chat = ChatTemplate::new(template, &settings).unwrap();
        let turns =
            json!([{"role": "user", "content": " hi "}, {"role": "assistant", "content": "yo"}]);
        let text = chat.render(turns.as_array().unwrap(), false).unwrap();
        assert_eq!(text, "<s>[INST] hi [/INST]\n yo</s>\n");
    }

    #[test]
    fn chatml_opens_the_answer_and_a_refusal_is_passed_on() {
        let chat = ChatTemplate::new(CHATML, &Value::Null).unwrap();
        let turns = [json!({"role": "user", "content": "hi"})];
        let text = chat.render(&turns, true).unwrap();
        assert_eq!(text, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
        let refusing = "{{ raise_exception('no ' + messages[0].role) }}";
        let refusing = ChatTemplate::new(refusing, &Value::Null).unwrap();
        assert!(refusing.render(&turns, true).unwrap_err().to_string().contains("no user"));
        assert!(ChatTemplate::new("{% for", &Value::Null).is_err());
    }
}
