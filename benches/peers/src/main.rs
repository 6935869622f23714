//! The same work on the same adapter, for demask and its peers, in turn: round by round A, B, C, A, B, C, …, so
//! that whatever else the machine does meets all alike. See README.md.

mod attention;
#[cfg(feature = "burn")]
mod burn_llama;
#[cfg(any(feature = "burn", feature = "meganeura"))]
mod checkpoint;
mod decode;
mod matmul;
mod peer;
mod race;
mod step;
mod table;
mod work;
mod worker;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Parser, Subcommand};
use demask_engine::gpu::{Gpu, GpuOptions};
use demask_engine::model::{Llama, LlamaConfig, Precision, StoredType};

use peer::{Peer, Programs};
use race::Rules;
use table::{Format, Table};
use work::Work;

/// Measures demask against other engines on the same adapter.
#[derive(Parser)]
#[command(version)]
struct Options {
    #[command(subcommand)]
    what: What,
    /// Rounds; each peer runs once in each
    #[arg(long, global = true, default_value_t = 7)]
    rounds: usize,
    /// Two rounds of the smallest work of each kind: shows that everything runs, not how fast
    #[arg(long, global = true)]
    quick: bool,
    /// Only these peers, comma-separated: demask, burn, meganeura, openblas, pytorch, llama.cpp
    #[arg(long, global = true, value_delimiter = ',')]
    peers: Vec<String>,
    /// Hugging Face folder or GGUF file for `step`; random weights of the same shape if not given
    #[arg(long, global = true)]
    model: Option<PathBuf>,
    /// Folder with the GGUF files of `decode`, and for files made on the way; prepare.sh fills it
    #[arg(long, global = true, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/.cache"))]
    cache: PathBuf,
    /// A program put before those that use the GPU, for example one that selects another driver
    #[arg(long, global = true, env = "DEMASK_PEERS_RUNNER")]
    runner: Option<PathBuf>,
    /// The Python that has torch and numpy
    #[arg(long, global = true, env = "DEMASK_PEERS_PYTHON", default_value = "python3")]
    python: PathBuf,
    /// Seconds to wait for one answer of a peer, its compilation and tuning included
    #[arg(long, global = true, default_value_t = 300.0)]
    patience: f64,
    /// One JSON object a line
    #[arg(long, global = true, conflicts_with = "markdown")]
    json: bool,
    /// Also write every row as one JSON object a line to this file
    #[arg(long, global = true)]
    save: Option<PathBuf>,
    /// Markdown tables
    #[arg(long, global = true)]
    markdown: bool,
}

#[derive(Clone, PartialEq, Subcommand)]
enum What {
    /// Matrix products of training and decoding, f32 and f16 weights
    Matmul,
    /// One f32 training step of a SmolLM2-135M: forward, loss, backward; no optimiser
    Step,
    /// Attention under the two-copy mask of block diffusion, forward and backward
    Attention,
    /// Autoregressive decoding of SmolLM2-135M, f16 and 4-bit weights
    Decode,
    /// All of them
    All,
    /// One peer of this program; speaks on standard input and output
    #[command(hide = true)]
    Worker {
        /// demask, burn, meganeura or openblas
        engine: String,
    },
    /// Writes a model as an f32 Hugging Face folder
    #[command(hide = true)]
    Export {
        /// A model, or `random`
        from: PathBuf,
        /// The folder
        to: PathBuf,
    },
}

fn main() -> ExitCode {
    let options = Options::parse();
    let done = match &options.what {
        What::Worker { engine } => worker::serve(engine).map(|()| true),
        What::Export { from, to } => export(from, to).map(|()| true),
        _ => measure(&options),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("error: results differ or demask failed; see the last column");
            ExitCode::FAILURE
        }
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// Races everything asked for; true if demask ran everywhere and all results agree.
fn measure(options: &Options) -> Result<bool> {
    ensure!(options.rounds > 0, "--rounds is 0; give at least 1");
    let programs = Programs::new(options.runner.clone(), options.python.clone())?;
    let rules = Rules {
        rounds: if options.quick { 2 } else { options.rounds },
        patience: std::time::Duration::try_from_secs_f64(options.patience)
            .context("--patience is no time in seconds")?,
    };
    let format = match (options.json, options.markdown) {
        (true, _) => Format::Json,
        (_, true) => Format::Markdown,
        _ => Format::Text,
    };
    for name in &options.peers {
        ensure!(
            Peer::ALL.iter().any(|p| p.is_called(name)),
            "no peer is called {name:?}; there are {}",
            Peer::ALL.map(|p| p.name()).join(", ")
        );
    }
    let create = |path: &PathBuf| {
        File::create(path).with_context(|| format!("cannot create {}", path.display()))
    };
    let save = options.save.as_ref().map(create).transpose()?;
    let mut good = true;
    for kind in [What::Matmul, What::Step, What::Attention, What::Decode] {
        if options.what != kind && options.what != What::All {
            continue;
        }
        let works = match kind {
            What::Matmul => matmul::works(options.quick),
            What::Attention => attention::works(options.quick),
            What::Step => vec![step_work(options, &programs)?],
            _ => decode::works(&options.cache, options.quick),
        };
        let mut table =
            Table::begin(format, works[0].title(), save.as_ref().map(File::try_clone).transpose()?);
        for work in works {
            let peers = work.peers().iter().copied().filter(|p| {
                options.peers.is_empty() || options.peers.iter().any(|name| p.is_called(name))
            });
            let rows = race::race(&work, peers, &programs, &rules)?;
            good &= rows.iter().all(|r| r.is_good());
            table.add(&rows)?;
        }
        table.end();
    }
    Ok(good)
}

/// The training step's model as a folder of f32 safetensors that every peer can read, made if it is not there yet.
fn step_work(options: &Options, programs: &Programs) -> Result<Work> {
    let from = options.model.clone().unwrap_or_else(|| "random".into());
    let stem = from.file_stem().context("--model names no file")?;
    let folder = match from.join("model.safetensors").is_file() {
        true => from,
        false => {
            let folder = options.cache.join(stem);
            if !folder.join("model.safetensors").is_file() {
                std::fs::create_dir_all(&options.cache)?;
                let status = programs
                    .this("export")
                    .arg(&from)
                    .arg(&folder)
                    .status()
                    .context("cannot start the export of the model")?;
                if !status.success() {
                    bail!("cannot make {} from {}", folder.display(), from.display());
                }
            }
            folder
        }
    };
    Ok(Work::Step { folder, tokens: if options.quick { 16 } else { 128 } })
}

fn export(from: &Path, to: &Path) -> Result<()> {
    let gpu = Gpu::open(GpuOptions::default())?;
    let model = match from == Path::new("random") {
        true => {
            let config = serde_json::from_str(include_str!("smollm2_135m.json"))?;
            let config = LlamaConfig::from_json(&config, Path::new("smollm2_135m.json"))?;
            Llama::random(&gpu, &config, 0)?
        }
        false => Llama::load(&gpu, from, Precision::F32)?,
    };
    Ok(model.save(to, StoredType::F32, None)?)
}
