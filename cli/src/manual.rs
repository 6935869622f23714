//! `demask completions` and `demask man`: the command line, written down for shells and for `man`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;

use crate::ui;

const COMPLETIONS: &str = "\
Examples:
  demask completions bash > ~/.local/share/bash-completion/completions/demask
  demask completions zsh > ~/.zfunc/_demask          with ~/.zfunc in $fpath
  demask completions fish > ~/.config/fish/completions/demask.fish
  demask completions powershell >> $PROFILE";

const MAN: &str = "\
Examples:
  demask man | man -l -
  demask man data build | man -l -
  demask man --out ~/.local/share/man/man1";

/// Print a script that completes demask's command lines in a shell
#[derive(clap::Args)]
#[command(after_help = COMPLETIONS)]
pub struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

/// Print the manual page of demask or of one of its commands
#[derive(clap::Args)]
#[command(after_help = MAN)]
pub struct ManArgs {
    /// The command, `data build` for example [default: demask itself]
    #[arg(value_name = "COMMAND")]
    command: Vec<String>,

    /// Write all pages into this folder instead: demask.1, demask-train.1, …
    #[arg(long, value_name = "DIR", conflicts_with = "command")]
    out: Option<PathBuf>,
}

/// Prints the completions of `cli`.
pub fn completions(mut cli: Command, args: CompletionsArgs) -> Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut cli, "demask", &mut script);
    ui::print(&String::from_utf8(script)?)?;
    Ok(ExitCode::SUCCESS)
}

/// Prints or writes the pages of `cli`.
pub fn man(mut cli: Command, args: ManArgs) -> Result<ExitCode> {
    // Names subcommands "demask data build".
    cli.build();
    if let Some(folder) = args.out {
        std::fs::create_dir_all(&folder)
            .and_then(|()| clap_mangen::generate_to(cli, &folder))
            .with_context(|| format!("cannot write pages into {}", folder.display()))?;
        ui::print(&format!("{}\n", folder.display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut chosen = &cli;
    for name in &args.command {
        let known = chosen.find_subcommand(name).filter(|command| !command.is_hide_set());
        chosen =
            known.unwrap_or_else(|| crate::usage("man", &format!("there is no command {name:?}")));
    }
    let mut page = Vec::new();
    Man::new(chosen.clone()).render(&mut page)?;
    ui::print(&String::from_utf8(page)?)?;
    Ok(ExitCode::SUCCESS)
}
