//! The daemon's client.
#![expect(clippy::print_stderr, reason = "errors go to standard error")]

use std::{env, io::stdout, process::ExitCode};

use anyport::{
    api::{Problem, ProblemKind},
    cli::{Cli, complete, text_of},
    usage,
};
use clap::{CommandFactory as _, Parser as _};

fn main() -> ExitCode {
    complete();
    let cli: Cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return wrong(&error),
    };
    let json = cli.is_json();
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
fn wrong(error: &clap::Error) -> ExitCode {
    let is_mistake = usage::is_mistake(error);
    if is_mistake && asks_for_json() {
        let text = usage::message(error, &Cli::command(), false);
        let (what, hint) = text.split_once("\n\n").unwrap_or((&text, ""));
        let what = what.trim_start_matches("error: ").trim();
        return fail(&Problem::new(ProblemKind::Invalid, what).hint(hint.trim()), true);
    }
    usage::show(error, &Cli::command());
    ExitCode::from(if is_mistake { ProblemKind::Invalid.exit_status() } else { 0 })
}

/// What could not be read as a command line may still say so.
fn asks_for_json() -> bool {
    let arguments: Vec<String> = env::args_os().map(|it| it.to_string_lossy().into_owned()).collect();
    let is_format = |pair: &[String]| ["-o", "--output"].contains(&pair[0].as_str()) && pair[1] == "json";
    let whole = ["--json", "-ojson", "-o=json", "--output=json"];
    arguments.iter().any(|it| whole.contains(&it.as_str())) || arguments.windows(2).any(is_format)
}

fn fail(problem: &Problem, json: bool) -> ExitCode {
    eprintln!("{}", text_of(problem, json));
    ExitCode::from(problem.kind.exit_status())
}
