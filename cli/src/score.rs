//! `demask score`: how probable a text is to a model, token by token. What people use to check that
//! a port, a conversion or a quantisation is sound.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use demask_engine::decode::{bits_per_byte, perplexity, score};
use demask_engine::model::Tokenizer;
use serde_json::json;

use crate::args::{Common, Ids, ModelArgs, read_text};
use crate::ui;

const EXAMPLES: &str = "\
Examples:
  demask score --model DIR --text 'def f(x): return x'
  demask score --model model.gguf --file main.py
  git show HEAD:main.py | demask score --model DIR --json | jq .perplexity
  demask score --model DIR --ids 1,15,9

A token's score is its natural log-probability given the tokens before it, read
causally whatever the model was trained for; the first token has none. Perplexity
is exp of the mean negative score; bits per byte are the negative scores in bits
over the bytes of the scored tokens.";

/// Print each token's log-probability in a text, its perplexity and bits per byte
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,

    /// The text itself
    #[arg(long, value_name = "TEXT", group = "input")]
    text: Option<String>,

    /// A file with the text, UTF-8; - is stdin, which is also the default
    #[arg(long, value_name = "FILE", group = "input")]
    file: Option<PathBuf>,

    /// Token ids instead of text, as in 1,2,3
    #[arg(long, value_name = "IDS", group = "input")]
    ids: Option<Ids>,

    /// Add the special tokens that the tokenizer adds to a text (such as a begin-of-text token)
    #[arg(long, conflicts_with = "ids")]
    add_special: bool,

    #[command(flatten)]
    common: Common,
}

/// One line of the table.
struct Scored {
    id: u32,
    /// `None` without a tokenizer.
    text: Option<String>,
    logprob: Option<f32>,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let stdin = args.text.is_none() && args.file.is_none() && args.ids.is_none();
    if stdin && std::io::stdin().is_terminal() {
        crate::usage("score", "nothing to score: give --text, --file or --ids, or pipe a text in");
    }
    let path = &args.model.model;
    let model = args.model.open()?;
    let config = &model.config;
    let (ids, tokenizer) = match &args.ids {
        // A folder without a tokenizer can still be scored by ids.
        Some(Ids(ids)) => (ids.clone(), Tokenizer::for_model(path, config).ok()),
        None => {
            let tokenizer = Tokenizer::for_model(path, config)?;
            let text = match &args.text {
                Some(text) => text.clone(),
                None => read_text(args.file.as_deref().unwrap_or(Path::new("-")))?,
            };
            (tokenizer.encode(&text, args.add_special)?, Some(tokenizer))
        }
    };
    let gpu = args.common.open_gpu_for(&args.model)?;
    let llama = model.load(&gpu)?;
    let logprobs = score(&llama, &ids)?;
    let lost = logprobs.iter().position(|p| p.is_some_and(|p| !p.is_finite()));
    if let Some(at) = lost {
        bail!(
            "{}: no finite probability for token {at}; the weights are damaged, or too large for \
             this --precision",
            path.display()
        );
    }
    let perplexity = perplexity(&logprobs);
    let bits = tokenizer.as_ref().and_then(|t| bits_per_byte(&logprobs, scored_bytes(t, &ids)));
    let tokens: Vec<Scored> = ids
        .iter()
        .zip(logprobs)
        .map(|(&id, logprob)| {
            let text = tokenizer.as_ref().map(|t| token_text(t, id));
            Scored { id, text, logprob }
        })
        .collect();
    if args.common.output.json {
        let token = |t: &Scored| json!({ "id": t.id, "text": t.text, "logprob": t.logprob });
        ui::print_json(&json!({
            "tokens": tokens.iter().map(token).collect::<Vec<_>>(),
            "perplexity": perplexity,
            "bits_per_byte": bits,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    ui::print(&table(&tokens))?;
    let number = |value: Option<f64>| value.map_or("none".to_owned(), |v| format!("{v:.4}"));
    ui::print(&format!(
        "\ntokens         {}\nperplexity     {}\nbits per byte  {}\n",
        tokens.len(),
        number(perplexity),
        number(bits)
    ))?;
    Ok(ExitCode::SUCCESS)
}

/// Bytes of all tokens but the first, which is not scored. Special tokens stand for no text.
fn scored_bytes(tokenizer: &Tokenizer, ids: &[u32]) -> usize {
    let scored = ids.iter().skip(1).filter(|&&id| !tokenizer.is_special(id));
    scored.filter_map(|&id| tokenizer.token_bytes(id)).map(<[u8]>::len).sum()
}

/// A token's own text; bytes that are no whole character appear as U+FFFD.
fn token_text(tokenizer: &Tokenizer, id: u32) -> String {
    match tokenizer.token_bytes(id) {
        Some(bytes) if !tokenizer.is_special(id) => String::from_utf8_lossy(bytes).into_owned(),
        _ => tokenizer.id_to_token(id).unwrap_or_default(),
    }
}

fn table(tokens: &[Scored]) -> String {
    let mut text = format!("{:>6} {:>8} {:>9}  text\n", "#", "id", "logprob");
    for (i, t) in tokens.iter().enumerate() {
        let logprob = t.logprob.map_or("-".to_owned(), |v| format!("{v:.4}"));
        let shown = t.text.as_ref().map_or(String::new(), |text| format!("{text:?}"));
        text += &format!("{i:>6} {:>8} {logprob:>9}  {shown}\n", t.id);
    }
    text
}
