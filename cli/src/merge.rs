//! `demask merge`: one model of a base and its adapter, or of several checkpoints.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use demask_engine::model::merge::{average, merge, written_type};
use demask_engine::model::{Lora, StoredType};

use crate::args::{Output, type_parser};
use crate::ui;

const EXAMPLES: &str = "\
Examples:
  demask merge base --lora runs/lora/model --out merged
  demask merge runs/first/checkpoints/step-* --out mean
  demask merge base.gguf --lora adapter --type f16 --out merged

The result is a Hugging Face folder with the first model's tokenizer. Needs no GPU;
a row of the weights at a time is in memory.";

/// Put an adapter into the weights of its model, or average checkpoints
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The adapter's base, or at least two models to average
    #[arg(value_name = "MODEL", required = true)]
    models: Vec<PathBuf>,

    /// Adapter in PEFT's format
    #[arg(long, value_name = "DIR")]
    lora: Option<PathBuf>,

    /// Folder to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    /// Type of the weights written [default: the first model's, bf16 if it is quantised]
    #[arg(long = "type", value_parser = type_parser(&FLOATS), value_name = "TYPE")]
    dtype: Option<StoredType>,

    #[command(flatten)]
    output: Output,
}

const FLOATS: [StoredType; 3] = [StoredType::F32, StoredType::F16, StoredType::BF16];

pub fn run(args: Args) -> Result<ExitCode> {
    match (&args.lora, args.models.len()) {
        (Some(_), 1) | (None, 2..) => {}
        (Some(_), _) => crate::usage("merge", "--lora goes with one model, its base"),
        (None, _) => crate::usage("merge", "give --lora, or several models to average"),
    }
    let dtype = args.dtype.map_or_else(|| written_type(&args.models[0]), Ok)?;
    let bar = ui::share_bar(args.output.notices());
    let mut hear = |share: f64| bar.set_position((share * 1000.0) as u64);
    match &args.lora {
        Some(dir) => merge(&args.models[0], &Lora::read(dir)?, &args.out, dtype, &mut hear)?,
        None => average(&args.models, &args.out, dtype, &mut hear)?,
    }
    bar.finish_and_clear();
    args.output.model_written(&args.out, dtype)?;
    Ok(ExitCode::SUCCESS)
}
