//! `demask tokenizer`: makes a tokenizer of text.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Subcommand;
use demask_trainer::bpe;
use serde_json::json;

use crate::args::Output;
use crate::data::corpus_recipe;
use crate::ui;

const EXAMPLES: &str = "\
Examples:
  demask tokenizer train src/ --vocab-size 8192 --out tokenizer
  demask tokenizer train corpus.toml --root ~/corpus --vocab-size 32768 --out tokenizer

The tokenizer is a byte-level BPE with an end, a mask, fill-in-the-middle and chat
tokens (ChatML). It is written as tokenizer.json and tokenizer_config.json, which
transformers reads. Each source of a recipe gets an equal share of the text.";

/// Train a tokenizer
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Train(TrainArgs),
}

/// Train a byte-level BPE on a corpus recipe, or on directories and files
#[derive(clap::Args)]
struct TrainArgs {
    /// One corpus recipe (.toml), or directories, JSONL and Parquet files
    #[arg(value_name = "RECIPE.toml|PATH", required = true)]
    paths: Vec<PathBuf>,

    /// Tokens, special ones and single bytes included
    #[arg(long, value_name = "N", default_value_t = 32_768)]
    vocab_size: usize,

    /// Folder to write it to
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    /// Folder that relative paths in the recipe start from [default: the recipe's own]
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,

    /// Most text to train on, in MB; memory takes some times as much
    #[arg(long, value_name = "MB", default_value_t = bpe::MOST_BYTES >> 20)]
    most: u64,

    #[command(flatten)]
    output: Output,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let Command::Train(args) = args.command;
    let notices = args.output.notices();
    let recipe = corpus_recipe(&args.paths, args.root.as_deref())?;
    notices.say("reading text and merging pairs …");
    let began = Instant::now();
    let size = bpe::train(&recipe, args.vocab_size, args.most << 20, &args.out)?;
    let out = args.out.display();
    notices.say(&format!("{size} tokens in {}", ui::duration(began.elapsed())));
    if args.output.json {
        ui::print_json(&json!({"vocab_size": size, "out": out.to_string()}))?;
    } else {
        ui::print(&format!("{out}\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}
