//! Writes the manual pages and the shell completions of both programs, for `cargo xtask dist`: `pages DIRECTORY` fills
//! `DIRECTORY/man8` and `DIRECTORY/completions`.

use std::{env, fs, path::PathBuf};

use anyhow::Context as _;
use anyport::{cli::Cli, config::Options};
use clap::{Command, CommandFactory as _};
use clap_complete::Shell;
use clap_mangen::Man;

fn main() -> anyhow::Result<()> {
    let directory = PathBuf::from(env::args_os().nth(1).context("say where to write to")?);
    let (manual, completions) = (directory.join("man8"), directory.join("completions"));
    for directory in [&manual, &completions] {
        fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
    }
    for command in [Options::command(), Cli::command()] {
        let name = command.get_name().to_owned();
        let mut command = command.disable_help_subcommand(true);
        // Names the verbs' pages, such as anyportctl-add-prefix.8.
        command.build();
        for page in with_verbs(&command) {
            let page = Man::new(page.clone()).section("8");
            page.generate_to(&manual).with_context(|| format!("write {}", page.get_filename()))?;
        }
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            clap_complete::generate_to(shell, &mut command.clone(), &name, &completions)
                .with_context(|| format!("write the completions of {name} for {shell}"))?;
        }
    }
    Ok(())
}

/// A command, its verbs, and theirs.
fn with_verbs(command: &Command) -> Vec<&Command> {
    let verbs = command.get_subcommands().flat_map(with_verbs);
    [command].into_iter().chain(verbs).collect()
}
