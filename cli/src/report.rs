//! `demask report`: one page with the curves, numbers and samples of training runs.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use demask_trainer::report::{report, write};
use serde_json::json;

use crate::ui;

const EXAMPLES: &str = "\
Examples:
  demask report runs/first
  demask report runs/first --out first.html
  demask report runs/*                       several in the same plots, and how their recipes differ
  demask report runs/* --json | jq '.runs[] | {name, best_validation}'

A run is the folder given to `demask train --out`; it may still be training. The
page is one file without scripts that loads nothing: losses, cross-entropy by mask
rate, validation, gradient norm, speed, memory, samples over time and the recipe.
For TensorBoard: tensorboard --logdir runs";

/// Make one page with the curves, numbers and samples of training runs
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Folders of runs
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,

    /// The page; one that exists is replaced
    #[arg(long, value_name = "FILE", default_value = "report.html")]
    out: PathBuf,

    /// Print the runs' numbers as one JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let report = report(&args.runs)?;
    write(&args.out, &report.page)?;
    if args.json {
        let out = args.out.display().to_string();
        ui::print_json(&json!({ "out": out, "bytes": report.page.len(), "runs": report.runs }))?;
    } else {
        ui::print(&format!("{}\n", args.out.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}
