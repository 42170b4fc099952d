//! The daemon's client.
#![expect(clippy::print_stderr, reason = "errors go to standard error")]

use std::{env, io::stdout, process::ExitCode};

use anyport::{
    api::{Problem, ProblemKind},
    cli::{Cli, text_of},
};
use clap::{Parser as _, error::ErrorKind};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let json = cli.json;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(cli.run(&mut stdout())),
        Err(error) => Err(Problem::new(ProblemKind::Failed, format!("start: {error}"))),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => fail(&problem, json),
    }
}

/// Help and versions are asked for; everything else is a mistake.
fn usage(error: &clap::Error) -> ExitCode {
    let is_mistake = !matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    if is_mistake && env::args_os().any(|argument| argument == "--json") {
        let text = error.to_string();
        let (what, hint) = text.split_once("\n\n").unwrap_or((&text, ""));
        let what = what.trim_start_matches("error: ").trim();
        return fail(&Problem::new(ProblemKind::Invalid, what).hint(hint.trim()), true);
    }
    // Where standard output is closed, nobody reads the help.
    error.print().ok();
    ExitCode::from(if is_mistake { ProblemKind::Invalid.exit_status() } else { 0 })
}

fn fail(problem: &Problem, json: bool) -> ExitCode {
    eprintln!("{}", text_of(problem, json));
    ExitCode::from(problem.kind.exit_status())
}
