//! The `demask` binary: parses, calls the engine or the trainer, prints. Nothing here that a user
//! of the libraries would miss.
//!
//! Contract: stdout carries results only (one JSON object with `--json`), all else goes to stderr;
//! an error is one line there. Exit code 0 is success, 1 a failure (file, GPU, memory), 2 a command
//! line that makes no sense.

mod args;
mod bench;
mod chat;
mod convert;
mod data;
mod decoding;
mod demo;
mod doctor;
mod edit;
mod generate;
mod infill;
mod interrupt;
mod manual;
mod merge;
mod patch;
mod plan;
mod report;
mod score;
mod show;
mod sources;
mod steps;
mod template;
mod tokenizer;
mod train;
mod tune;
mod ui;
mod version;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

const EXAMPLES: &str = "\
First steps:
  demask doctor        which GPU would be used, and whether it computes right
  demask demo          a small model writes code, learns for a minute, writes again
  demask generate --model DIR --prompt 'def fib(n):'
  demask infill main.py --at 12:5 --model DIR
  demask edit main.py --instruction 'add type hints' --model DIR
  demask score --model DIR --file main.py
  demask template --model DIR --messages chat.json
  demask data build src/ --tokenizer MODEL --out data
  demask train recipe.toml --out runs/first
  demask report runs/first
  demask merge base --lora runs/lora/model --out merged
  demask convert merged model.gguf --type q4_k
  demask bench run --json base.json

The best GPU found is used; --adapter or the environment variable DEMASK_ADAPTER
names another adapter. NO_COLOR turns colours off. Ctrl-C stops cleanly, a second
one at once.

Exit codes: 0 success, 1 failure (file, GPU, memory), 2 wrong command line.";

/// Train and run block-diffusion code models on any GPU.
#[derive(Parser)]
#[command(
    name = "demask",
    version = version::short(),
    long_version = version::long(),
    after_help = EXAMPLES,
    max_term_width = 100
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Args),
    Doctor(doctor::Args),
    Data(data::Args),
    Tokenizer(tokenizer::Args),
    Train(train::Args),
    Report(report::Args),
    Merge(merge::Args),
    Convert(convert::Args),
    Generate(generate::Args),
    Infill(infill::Args),
    Edit(edit::Args),
    Score(score::Args),
    Template(template::Args),
    Bench(bench::Args),
    Completions(manual::CompletionsArgs),
    Man(manual::ManArgs),
}

fn main() -> ExitCode {
    silence_drivers();
    std::panic::set_hook(Box::new(|panic| {
        ui::restore_cursor();
        ui::complain(&one_line(&format!(
            "internal error: {panic}; please report this, with the output of the same command \
             under RUST_BACKTRACE=1"
        )));
        let trace = std::backtrace::Backtrace::capture();
        if trace.status() == std::backtrace::BacktraceStatus::Captured {
            ui::complain(&trace.to_string());
        }
        // Not by unwinding: a destructor that panics too would abort with a core dump.
        std::process::exit(1);
    }));
    let result = match Cli::parse().command {
        Command::Demo(args) => demo::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Data(args) => data::run(args),
        Command::Tokenizer(args) => tokenizer::run(args),
        Command::Train(args) => train::run(args),
        Command::Report(args) => report::run(args),
        Command::Merge(args) => merge::run(args),
        Command::Convert(args) => convert::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Infill(args) => infill::run(args),
        Command::Edit(args) => edit::run(args),
        Command::Score(args) => score::run(args),
        Command::Template(args) => template::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Completions(args) => manual::completions(Cli::command(), args),
        Command::Man(args) => manual::man(Cli::command(), args),
    };
    match result {
        Ok(code) => code,
        // Whoever read our output has seen enough.
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            ui::complain(&format!("error: {}", one_line(&format!("{e:#}"))));
            ExitCode::FAILURE
        }
    }
}

/// Mesa's OpenGL driver prints an "error: XDG_RUNTIME_DIR is invalid or not set" of its own for
/// every adapter where the variable is not set, as in containers. Any folder satisfies it.
fn silence_drivers() {
    if cfg!(target_os = "linux") && std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // SAFETY: this is the first thing the process does, so no other thread reads the
        // environment.
        unsafe { std::env::set_var("XDG_RUNTIME_DIR", std::env::temp_dir()) };
    }
}

/// A command line that parses and still makes no sense: exit code 2, like those that do not parse.
fn usage(command: &str, message: &str) -> ! {
    let mut cli = Cli::command();
    cli.build();
    let command = cli.find_subcommand_mut(command).expect("commands name themselves");
    command.error(clap::error::ErrorKind::ValueValidation, message).exit()
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>());
    io.into_iter().any(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Messages of other libraries may span lines (TOML errors draw carets); ours do not.
fn one_line(message: &str) -> String {
    let mut line = String::new();
    for part in message.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('|')) {
        match line.chars().last() {
            None => {}
            Some(':' | ';' | ',') => line.push(' '),
            Some(_) => line.push_str("; "),
        }
        line.push_str(part);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn errors_become_one_line() {
        let toml =
            "in r.toml: TOML parse error at line 2\n  |\n2 | a = 1\n  | ^\nunknown field `a`\n";
        let line = "in r.toml: TOML parse error at line 2; 2 | a = 1; unknown field `a`";
        assert_eq!(one_line(toml), line);
    }

    #[test]
    fn a_closed_pipe_is_recognised_below_its_context() {
        let pipe = std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        assert!(is_broken_pipe(&anyhow::Error::from(pipe).context("printing")));
        assert!(!is_broken_pipe(&anyhow::anyhow!("another")));
    }
}
