//! `demask score`: how probable a text is to a model, token by token, and how far its predictions lie from another
//! model's. What people use to check that a port, a conversion or a quantisation is sound.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail, ensure};
use demask_engine::decode::{Difference, Mode, bits_per_byte, compare, perplexity, score};
use demask_engine::model::{Llama, Precision, Tokenizer, Weights};
use serde_json::json;

use crate::args::{Common, Ids, ModelArgs, read_text};
use crate::decoding::{ModeArg, mode_name};
use crate::show::token_text;
use crate::ui;

const EXAMPLES: &str = "\
Examples:
  demask score --model DIR --text 'def f(x): return x'
  demask score --model model.gguf --file main.py
  demask score --model DIR --file corpus.txt --window 1024
  demask score --model model-q4.gguf --reference DIR --file main.py
  git show HEAD:main.py | demask score --model DIR --json | jq .perplexity
  demask score --model DIR --ids 1,15,9

A token's score is its natural log-probability given the tokens before it; the
first one has none. Of a block-diffusion model it is that given the blocks before
the token's own, which is hidden whole. Perplexity is exp of the mean negative
score; bits per byte are the negative scores in bits over the bytes of the scored
tokens.
--reference compares what two models predict at each token: the Kullback-Leibler
divergence from the reference, in nats, and how often both would choose the same.";

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

    /// How the text is read
    #[arg(long, value_enum, default_value = "auto")]
    mode: ModeArg,

    /// Score the text in pieces of this many tokens, each by itself [default: as a whole]
    #[arg(long, value_name = "N")]
    window: Option<usize>,

    /// Compare the model's predictions with this one's (Hugging Face folder or GGUF file), whose
    /// weights are taken as f32
    #[arg(long, value_name = "PATH")]
    reference: Option<PathBuf>,

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
    let llama = model.load(&gpu, args.common.notices())?;
    let mode = args.mode.mode(config)?;
    let window = args.window.unwrap_or(ids.len()).max(1);
    if let Some(reference) = &args.reference {
        let (reference_config, weights) = Weights::open(reference)?;
        let reference = Llama::from_weights(&gpu, &reference_config, &weights, Precision::F32)?;
        return against(&args, &llama, &reference, &ids, &mode, window);
    }
    let mut logprobs = Vec::with_capacity(ids.len());
    for piece in ids.chunks(window) {
        logprobs.extend(score(&llama, piece, &mode)?);
    }
    let lost = logprobs.iter().position(|p| p.is_some_and(|p| !p.is_finite()));
    if let Some(at) = lost {
        bail!(
            "{}: no finite probability for token {at}; the weights are damaged, or too large for \
             this --precision",
            path.display()
        );
    }
    let perplexity = perplexity(&logprobs);
    ensure_finite(path, "perplexity", perplexity)?;
    let bits =
        tokenizer.as_ref().and_then(|t| bits_per_byte(&logprobs, scored_bytes(t, &ids, &logprobs)));
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

/// Prints how the model's predictions differ from the reference's.
fn against(
    args: &Args,
    llama: &Llama,
    reference: &Llama,
    ids: &[u32],
    mode: &Mode,
    window: usize,
) -> Result<ExitCode> {
    let bar = ui::share_bar(args.common.notices());
    let mut all: Vec<Difference> = Vec::new();
    for (i, piece) in ids.chunks(window).enumerate() {
        all.extend(compare(llama, reference, piece, mode, |done| {
            bar.set_position(((i * window + done) * 1000 / ids.len()) as u64);
        })?);
    }
    bar.finish_and_clear();
    ensure!(!all.is_empty(), "nothing to compare: no token of the text has one before it");
    ensure!(
        all.iter().all(|d| d.kl.is_finite() && d.logprobs.iter().all(|p| p.is_finite())),
        "no finite probabilities; the weights of one model are damaged, or too large for this --precision"
    );
    let n = all.len() as f64;
    let mean = |value: &dyn Fn(&Difference) -> f64| all.iter().map(value).sum::<f64>() / n;
    let mut divergences: Vec<f64> = all.iter().map(|d| d.kl).collect();
    divergences.sort_by(f64::total_cmp);
    let quantile = |q: f64| divergences[((n - 1.0) * q).round() as usize];
    let [theirs, ours] = [0, 1].map(|i| (-mean(&|d| d.logprobs[i])).exp());
    ensure_finite(&args.model.model, "perplexity", Some(ours))?;
    ensure_finite(args.reference.as_deref().unwrap_or(Path::new("")), "perplexity", Some(theirs))?;
    let same = mean(&|d| f64::from(u8::from(d.same_top)));
    let kl = mean(&|d| d.kl);
    if args.common.output.json {
        ui::print_json(&json!({
            "tokens": all.len(),
            "mode": mode_name(mode),
            "perplexity": ours,
            "reference_perplexity": theirs,
            "kl_mean": kl,
            "kl_median": quantile(0.5),
            "kl_p99": quantile(0.99),
            "kl_max": quantile(1.0),
            "same_top": same,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    ui::print(&format!(
        "tokens           {}\nperplexity       {ours:.4}, the reference's {theirs:.4} ({:+.2} %)\n\
         divergence       mean {kl:.6}, median {:.6}, 99 % below {:.6}, largest {:.6} nats\n\
         same choice      {:.2} %\n",
        all.len(),
        100.0 * (ours / theirs - 1.0),
        quantile(0.5),
        quantile(0.99),
        quantile(1.0),
        100.0 * same
    ))?;
    Ok(ExitCode::SUCCESS)
}

/// JSON has no number for what is not finite, and nothing should be read into its absence.
fn ensure_finite(model: &Path, name: &str, value: Option<f64>) -> Result<()> {
    ensure!(
        value.is_none_or(f64::is_finite),
        "{}: the {name} is too large for a number: the model gives the text no probability worth the name; its \
         weights are damaged, or it was made for other text or another tokenizer",
        model.display()
    );
    Ok(())
}

/// Bytes of the tokens that are scored. Special tokens stand for no text.
fn scored_bytes(tokenizer: &Tokenizer, ids: &[u32], scores: &[Option<f32>]) -> usize {
    let scored = ids.iter().zip(scores).filter(|(_, score)| score.is_some()).map(|(&id, _)| id);
    let text = scored.filter(|&id| !tokenizer.is_special(id));
    text.filter_map(|id| tokenizer.token_bytes(id)).map(<[u8]>::len).sum()
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
