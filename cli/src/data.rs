//! `demask data`: makes token shards of text, and shows what is in them.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Subcommand;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use demask_trainer::data::build::{Progress, build};
use demask_trainer::data::recipe::{CorpusRecipe, Decontaminate, Format};
use demask_trainer::data::sample::{GIVEN, Vocabulary};
use demask_trainer::data::shards::{Dataset, Shard};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use crate::args::Output;
use crate::chat::ChatArgs;
use crate::ui::Notices;
use crate::{interrupt, ui};

const EXAMPLES: &str = "\
Examples:
  demask data build src/ --tokenizer MODEL --out data
  demask data build corpus.toml --out data
  demask data build conversations.parquet --tokenizer MODEL --out data
  demask data build corpus.toml --root ~/corpus --against HumanEval.jsonl.gz --out data
  demask data show data --documents 3

Sources are directories of source code, JSON by lines or as a list (also .gz, .zst)
and Parquet files; what the rows of a file hold, its columns say. A corpus recipe,
short:
  tokenizer = \"tokenizer\"        # folder or GGUF file
  held_out = 0.01                # of each source, by package
  fim_rate = 0.1
  decontaminate.against = [\"HumanEval.jsonl.gz\"]
  [[source]]
  name = \"python\"
  paths = [\"python\"]
  extensions = [\"py\"]
  max_package_bytes = 1_200_000
  [[source]]
  name = \"chat\"
  paths = [\"chat.jsonl\"]
  format = \"messages\"            # or text, prompt_response, alpaca, edit
  [chat_args]                    # what the chat template is told
  enable_thinking = false

Ctrl-C stops it; the same command goes on. The same input gives the same dataset.";

/// Make token shards of directories, JSONL and Parquet, or show them
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Build(BuildArgs),
    Show(ShowArgs),
}

/// Make a dataset of a corpus recipe, or of directories and files
#[derive(clap::Args)]
struct BuildArgs {
    /// One corpus recipe (.toml), or directories, JSONL and Parquet files
    #[arg(value_name = "RECIPE.toml|PATH", required = true)]
    paths: Vec<PathBuf>,

    /// Folder of the dataset, made if it does not exist
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    /// Folder with a tokenizer.json, a model's folder or a GGUF file; replaces the recipe's
    #[arg(long, value_name = "PATH")]
    tokenizer: Option<PathBuf>,

    /// What the rows of the files hold [default: what their columns say]
    #[arg(long, value_name = "FORMAT", value_parser = format_parser())]
    format: Option<Format>,

    /// Folder that relative paths in the recipe start from [default: the recipe's own]
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,

    /// Leave out what shares 13 words with this evaluation set (JSONL), beside the recipe's
    #[arg(long, value_name = "FILE")]
    against: Vec<PathBuf>,

    #[command(flatten)]
    chat: ChatArgs,

    #[command(flatten)]
    output: Output,
}

/// What a dataset holds
#[derive(clap::Args)]
struct ShowArgs {
    /// Folder of the dataset
    dataset: PathBuf,

    /// Print the first N documents of each source too
    #[arg(long, value_name = "N", default_value_t = 0)]
    documents: u64,

    /// Print the result as one JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<ExitCode> {
    match args.command {
        Command::Build(args) => run_build(args),
        Command::Show(args) => show(&args),
    }
}

/// The names of the formats of rows.
fn format_parser() -> impl TypedValueParser<Value = Format> {
    let formats =
        [Format::Text, Format::Messages, Format::PromptResponse, Format::Alpaca, Format::Edit];
    PossibleValuesParser::new(formats.map(Format::name)).map(move |name| {
        formats.into_iter().find(|format| format.name() == name).unwrap_or_default()
    })
}

/// The recipe that paths on the command line stand for.
pub fn corpus_recipe(paths: &[PathBuf], root: Option<&Path>) -> Result<CorpusRecipe> {
    if let [path] = paths
        && path.extension().is_some_and(|ending| ending == "toml")
    {
        return CorpusRecipe::read(path, root);
    }
    Ok(CorpusRecipe::of_paths(paths, &[]))
}

fn run_build(args: BuildArgs) -> Result<ExitCode> {
    interrupt::listen("leaving after the files in work; the same command goes on");
    let notices = args.output.notices();
    let mut recipe = corpus_recipe(&args.paths, args.root.as_deref())?;
    if let Some(format) = args.format {
        recipe.source.iter_mut().for_each(|source| source.format = Some(format));
    }
    recipe.recognise()?.iter().for_each(|line| notices.say(line));
    if !args.against.is_empty() {
        let empty = Decontaminate { against: Vec::new(), words: 13 };
        recipe.decontaminate.get_or_insert(empty).against.extend(args.against);
    }
    let tokenizer = args.tokenizer.or(recipe.tokenizer.clone());
    ensure!(
        tokenizer.is_some(),
        "name the tokenizer (a model, or a folder from demask tokenizer train) with --tokenizer or in the recipe"
    );
    let mut vocabulary = Vocabulary::open(&tokenizer.unwrap_or_default())?;
    let mut told = recipe.chat_args.clone();
    told.extend(args.chat.variables());
    vocabulary.tell(&told)?;
    let began = Instant::now();
    let bar = Bar::new(notices);
    let hear = |progress: Progress| {
        bar.show(progress);
        !interrupt::asked()
    };
    let dataset = build(&recipe, &vocabulary, &args.out, &hear)?;
    bar.finish();
    let seconds = began.elapsed();
    if args.output.json {
        ui::print_json(&summary(&dataset, Some(seconds)))?;
    } else {
        print_summary(&dataset)?;
        notices.say(&format!("done in {}: {}", ui::duration(seconds), args.out.display()));
    }
    Ok(ExitCode::SUCCESS)
}

/// One bar for both passes; the first takes about a tenth of the time.
pub struct Bar {
    bar: ProgressBar,
    notices: Notices,
    last_line: Mutex<Instant>,
}

impl Bar {
    pub fn new(notices: Notices) -> Bar {
        let target = match notices.animated() {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(Some(1), target);
        let template = "{msg:20} {bar:24} {bytes}/{total_bytes}  ETA {eta}";
        let style = ProgressStyle::with_template(template).expect("the template is valid");
        bar.set_style(style.progress_chars("━╸─"));
        bar.set_message("listing files …");
        bar.tick();
        Bar { bar, notices, last_line: Mutex::new(Instant::now()) }
    }

    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }

    pub fn show(&self, progress: Progress) {
        let (what, done, total) = match progress {
            Progress::Reading(done, total) => ("choosing documents", done, total),
            Progress::Writing(done, total) => ("writing tokens", done, total),
        };
        if self.bar.message() != what {
            self.bar.reset();
            self.bar.set_message(what);
        }
        self.bar.set_length(total);
        self.bar.set_position(done);
        let mut last = self.last_line.lock().unwrap_or_else(|e| e.into_inner());
        if !self.notices.animated() && last.elapsed() >= Duration::from_secs(10) {
            self.notices.say(&format!("{what}: {} of {}", ui::bytes(done), ui::bytes(total)));
            *last = Instant::now();
        }
    }
}

/// Documents, tokens and learnt tokens of shards.
fn counts(shards: &[Shard]) -> [u64; 3] {
    let sum = |of: fn(&Shard) -> u64| shards.iter().map(of).sum();
    [sum(|s| s.documents), sum(|s| s.tokens), sum(|s| s.learnt)]
}

fn summary(dataset: &Dataset, seconds: Option<Duration>) -> serde_json::Value {
    let part = |shards: &[Shard]| {
        let [documents, tokens, learnt] = counts(shards);
        json!({"documents": documents, "tokens": tokens, "learnt": learnt, "shards": shards.len()})
    };
    let sources = dataset.manifest.sources.iter().map(|source| {
        json!({
            "name": source.name,
            "format": source.format,
            "weight": source.weight,
            "train": part(&source.train),
            "held_out": part(&source.held_out),
            "report": source.report,
        })
    });
    json!({
        "dataset": dataset.folder.display().to_string(),
        "vocab_size": dataset.manifest.vocab_size,
        "sources": sources.collect::<Vec<_>>(),
        "seconds": seconds.map(|s| s.as_secs_f64()),
    })
}

fn print_summary(dataset: &Dataset) -> Result<()> {
    for source in &dataset.manifest.sources {
        ui::print(&format!("{}\n", ui::heading(&source.name)))?;
        for line in source.report.to_string().lines() {
            ui::print(&format!("  {line}\n"))?;
        }
    }
    let row = |name: &str, cells: [String; 4]| {
        let [documents, tokens, learnt, held_out] = cells;
        ui::print(&format!("{name:<16}{documents:>11}{tokens:>12}{learnt:>12}{held_out:>14}\n"))
    };
    let titles = ["documents", "tokens", "learnt", "held out"].map(String::from);
    ui::print("\n")?;
    row("", titles)?;
    let (mut train, mut held_out) = ([0; 3], [0; 3]);
    for source in &dataset.manifest.sources {
        let (a, b) = (counts(&source.train), counts(&source.held_out));
        row(&source.name, cells(a, b))?;
        (0..3).for_each(|i| {
            train[i] += a[i];
            held_out[i] += b[i];
        });
    }
    row("all", cells(train, held_out))
}

fn cells(train: [u64; 3], held_out: [u64; 3]) -> [String; 4] {
    let [documents, tokens, learnt] = train;
    let count = |n: u64| ui::count(n as f64);
    [documents.to_string(), count(tokens), count(learnt), count(held_out[1])]
}

fn show(args: &ShowArgs) -> Result<ExitCode> {
    let dataset = Dataset::open(&args.dataset)?;
    if args.json {
        ui::print_json(&summary(&dataset, None))?;
        return Ok(ExitCode::SUCCESS);
    }
    print_summary(&dataset)?;
    if args.documents == 0 {
        return Ok(ExitCode::SUCCESS);
    }
    let vocabulary = Vocabulary::open(&dataset.tokenizer())?;
    for source in &dataset.manifest.sources {
        let mut left = args.documents;
        for shard in &source.train {
            let mapped = dataset.map(shard)?;
            let mut first = 0;
            for &end in mapped.ends().iter().take(left as usize) {
                ui::print(&format!("\n{}\n", ui::heading(&format!("{}:", source.name))))?;
                let ids = &mapped.tokens()[first..end as usize];
                // What is read and not learnt is dim.
                for piece in ids.chunk_by(|a, b| (a ^ b) & GIVEN == 0) {
                    let plain: Vec<u32> = piece.iter().map(|id| id & !GIVEN).collect();
                    let text = vocabulary.decode(&plain)?;
                    ui::print(&if piece[0] & GIVEN != 0 { ui::dim_lines(&text) } else { text })?;
                }
                ui::print("\n")?;
                first = end as usize;
                left -= 1;
            }
            if left == 0 {
                break;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
