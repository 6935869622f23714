//! `demask template`: a conversation as the text that a model is given.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow};
use demask_engine::model::{ChatTemplate, Tokenizer, Weights};
use demask_trainer::data::sample::bare_tokenizer;
use serde_json::{Value, json};

use crate::args::{Output, read_text};
use crate::chat::{ChatArgs, read_json, template_of};
use crate::ui;

const EXAMPLES: &str = "\
Examples:
  demask template --model DIR --messages chat.json
  echo '[{\"role\": \"user\", \"content\": \"Hi\"}]' | demask template --model DIR --messages -
  demask template --model DIR --messages chat.json --chat-arg enable_thinking=false
  demask template --model DIR --messages chat.json --tools tools.json
  demask template --model DIR --messages chat.json --chat-arg add_generation_prompt=false
  demask template --model DIR --messages chat.json --template new.jinja --json | jq .ids

The file holds a list of messages, or an object with messages and, beside them, tools,
documents and chat_template_kwargs. The text is what transformers 5 prints for it, with
the assistant's turn begun. With --json also its tokens, and the places in it, in
characters, that the template encloses by {% generation %}.";

/// Print a conversation as a model's chat template writes it
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Hugging Face folder, GGUF file, or a folder with a tokenizer alone
    #[arg(long, value_name = "PATH")]
    model: PathBuf,

    /// JSON file with the messages; - is stdin
    #[arg(long, value_name = "FILE.json")]
    messages: PathBuf,

    /// Another template: a Jinja file, or the name of one that the tokenizer brings
    #[arg(long, value_name = "FILE.jinja|NAME")]
    template: Option<String>,

    /// JSON file with the tools that may be called: a list of JSON schemas
    #[arg(long, value_name = "FILE.json")]
    tools: Option<PathBuf>,

    #[command(flatten)]
    chat: ChatArgs,

    #[command(flatten)]
    output: Output,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let tokenizer = open(&args.model)?;
    let mut options = args.chat.options()?;
    let place = args.messages.display();
    let mut given = read_json(&args.messages)?;
    let messages = match given.as_object_mut() {
        None => given,
        Some(fields) => {
            let messages = fields.remove("messages").or_else(|| fields.remove("conversation"));
            let told = fields.remove("chat_template_kwargs");
            let beside = ["tools", "documents"].map(|name| (name.to_owned(), fields.remove(name)));
            let told = told.iter().filter_map(Value::as_object).flatten();
            let told = told.map(|(name, value)| (name.clone(), Some(value.clone())));
            // What the command line says counts more than the file.
            let said = args.chat.variables();
            for (name, value) in beside.into_iter().chain(told) {
                if let (Some(value), false) = (value, said.contains_key(&name)) {
                    options.set(&name, value)?;
                }
            }
            messages.with_context(|| format!("{place}: there are no \"messages\" in it"))?
        }
    };
    if let Some(tools) = &args.tools {
        options.set("tools", read_json(tools)?)?;
    }
    let messages = messages.as_array().ok_or_else(|| {
        anyhow!("{place}: a list of messages is expected, as [{{\"role\": \"user\", \"content\": \"Hi\"}}]")
    })?;
    let template = match &args.template {
        None => {
            template_of(&tokenizer, &options).with_context(|| args.model.display().to_string())?
        }
        Some(named) => other(&tokenizer, named)?,
    };
    let text = template.render_with(messages, &options)?;
    if !args.output.json {
        ui::print(&text)?;
        return Ok(ExitCode::SUCCESS);
    }
    let ids = tokenizer.encode(&text, false)?;
    let mut answer = json!({ "text": text, "tokens": ids.len(), "ids": ids });
    if template.marks_generation() {
        let (text, places) = template.render_marked(messages, &options)?;
        let at = |byte: usize| text[..byte].chars().count();
        let places: Vec<[usize; 2]> = places.iter().map(|p| [at(p.start), at(p.end)]).collect();
        answer["generation"] = json!(places);
    }
    ui::print_json(&answer)?;
    Ok(ExitCode::SUCCESS)
}

/// The tokenizer of a model, or in a folder that holds nothing else.
fn open(path: &Path) -> Result<Tokenizer> {
    if let Some(tokenizer) = bare_tokenizer(path)? {
        return Ok(tokenizer);
    }
    let (config, _) = Weights::open(path)?;
    Ok(Tokenizer::for_model(path, &config)?)
}

/// A template of a file, or one that the tokenizer brings under this name.
fn other(tokenizer: &Tokenizer, named: &str) -> Result<ChatTemplate> {
    let path = Path::new(named);
    if !path.exists() && tokenizer.chat_template_names().contains(&named) {
        return Ok(tokenizer.chat_for(Some(named), false)?.context("the template is gone")?);
    }
    let text = read_text(path).with_context(|| {
        let names = tokenizer.chat_template_names().join(", ");
        let names = if names.is_empty() { "none".into() } else { names };
        format!(
            "--template {named} is no file and no template of the tokenizer (it brings {names})"
        )
    })?;
    tokenizer.chat_of(&text).with_context(|| named.to_owned())
}
