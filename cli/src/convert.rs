//! `demask convert`: the same model in another type or format.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use demask_engine::model::merge::{ConvertOptions, convert, written_type};
use demask_engine::model::{StoredType, Tokenizer, Weights};

use crate::args::{Output, type_parser};
use crate::ui;

const EXAMPLES: &str = "\
Examples:
  demask convert runs/first/model model-q8.gguf --type q8_0
  demask convert Stable-DiffCoder-8B-Instruct coder-q4.gguf --type q4_k
  demask convert model.gguf folder --type bf16

A name that ends in .gguf becomes a GGUF file, which llama.cpp loads; any other a
Hugging Face folder, which transformers loads. Needs no GPU; a few rows of the
weights at a time are in memory. Of a split GGUF any part names the whole.";

/// Write a model in another type or format: GGUF in blocks of 8, 6 or 4 bits, or a folder
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Hugging Face folder or GGUF file
    #[arg(value_name = "MODEL")]
    model: PathBuf,

    /// FILE.gguf or a folder
    #[arg(value_name = "OUT")]
    out: PathBuf,

    /// Type of the matrices written [default: the model's own, bf16 if it is quantised]
    ///
    /// A folder holds floats. In GGUF, q8_0 takes 8.5 bits a weight, q6_k 6.6, q4_1 5, q4_k and q4_0
    /// 4.5.
    #[arg(long = "type", value_parser = type_parser(&written()), value_name = "TYPE")]
    dtype: Option<StoredType>,

    /// Write a GGUF file even where it cannot hold flags of added tokens (lstrip, rstrip, single_word)
    ///
    /// Such a file splits text around these tokens otherwise than the folder does; each is named.
    #[arg(long)]
    lossy_tokenizer: bool,

    #[command(flatten)]
    output: Output,
}

fn written() -> Vec<StoredType> {
    StoredType::ALL.into_iter().filter(|dtype| dtype.is_written()).collect()
}

pub fn run(args: Args) -> Result<ExitCode> {
    let dtype = args.dtype.map_or_else(|| written_type(&args.model), Ok)?;
    let bar = ui::share_bar(args.output.notices());
    let mut hear = |share: f64| bar.set_position((share * 1000.0) as u64);
    let options = ConvertOptions { dtype, lossy_tokenizer: args.lossy_tokenizer };
    let lost = convert(&args.model, &args.out, options, &mut hear)?;
    bar.finish_and_clear();
    for token in lost {
        args.output.notices().say(&format!("not in the file: the added token {token}"));
    }
    if args.out.extension().is_some_and(|extension| extension == "gguf") {
        let (config, _) = Weights::open(&args.model)?;
        let tokenizer = Tokenizer::for_model(&args.model, &config)?;
        for note in tokenizer.otherwise_in_llama_cpp(&config)? {
            args.output.notices().say(&note);
        }
    }
    args.output.model_written(&args.out, dtype)?;
    Ok(ExitCode::SUCCESS)
}
