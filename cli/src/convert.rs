//! `demask convert`: the same model in another type or format.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::ValueEnum;
use demask_engine::model::StoredType;
use demask_engine::model::merge::{convert, written_type};
use serde_json::json;

use crate::args::Output;
use crate::ui;

const EXAMPLES: &str = "\
Examples:
  demask convert runs/first/model model-q8.gguf --type q8_0
  demask convert Stable-DiffCoder-8B-Instruct coder-q4.gguf --type q4_k
  demask convert model.gguf folder --type bf16

A name that ends in .gguf becomes a GGUF file, which llama.cpp loads; any other a
Hugging Face folder, which transformers loads. Needs no GPU; a few rows of the
weights at a time are in memory.";

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
    #[arg(long = "type", value_enum, value_name = "TYPE")]
    dtype: Option<TypeArg>,

    #[command(flatten)]
    output: Output,
}

#[derive(Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
enum TypeArg {
    F32,
    F16,
    Bf16,
    /// 8.5 bits a weight
    #[value(name = "q8_0")]
    Q8_0,
    /// 6.6 bits
    #[value(name = "q6_k")]
    Q6K,
    /// 5 bits
    #[value(name = "q4_1")]
    Q4_1,
    /// 4.5 bits
    #[value(name = "q4_k")]
    Q4K,
    /// 4.5 bits
    #[value(name = "q4_0")]
    Q4_0,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let dtype = match args.dtype {
        None => written_type(&args.model)?,
        Some(TypeArg::F32) => StoredType::F32,
        Some(TypeArg::F16) => StoredType::F16,
        Some(TypeArg::Bf16) => StoredType::BF16,
        Some(TypeArg::Q8_0) => StoredType::Q8_0,
        Some(TypeArg::Q6K) => StoredType::Q6_K,
        Some(TypeArg::Q4_1) => StoredType::Q4_1,
        Some(TypeArg::Q4K) => StoredType::Q4_K,
        Some(TypeArg::Q4_0) => StoredType::Q4_0,
    };
    let bar = ui::share_bar(args.output.notices());
    let mut hear = |share: f64| bar.set_position((share * 1000.0) as u64);
    convert(&args.model, &args.out, dtype, &mut hear)?;
    bar.finish_and_clear();
    let out = args.out.display().to_string();
    match args.output.json {
        true => ui::print_json(&json!({ "out": out, "type": format!("{dtype:?}") }))?,
        false => ui::print(&format!("{out}\n"))?,
    }
    Ok(ExitCode::SUCCESS)
}
