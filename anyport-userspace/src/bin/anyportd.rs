//! The daemon.
#![expect(clippy::print_stdout, reason = "who checks a configuration is at a terminal")]

use std::{io, process::ExitCode, time::Duration};

use anyhow::Context as _;
use anyport::{
    announce,
    config::{Config, Options},
    control, daemon, engine,
    journal::{self, Priority},
    keeper::{self, Link},
    lock::Lock,
    logging, privileges,
    steering::bpf::make_pin_directory,
    usage,
};
use clap::{CommandFactory as _, Parser as _};
use tracing::error;

/// How long the last lines of the log may take.
const LAST_LINES: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let Options { config: file, check, takeover, withdraw, color, settings } = match Options::try_parse() {
        Ok(options) => options,
        Err(error) => {
            usage::show(&error, &Options::command());
            return ExitCode::from(if usage::is_mistake(&error) { 2 } else { 0 });
        }
    };
    // Before there is another thread.
    let link = match Link::of_process() {
        Ok(link) => link,
        Err(error) => return fail(&error),
    };
    // Who only keeps sockets or asks for something needs no rules.
    let read = if link.is_some() || check { Config::new } else { Config::without_rules };
    let config = match read(settings, file.as_deref()) {
        Ok(config) => config,
        Err(error) => {
            tell_error(&error);
            link.inspect(|link| link.failed(&error));
            return ExitCode::from(2);
        }
    };
    if check {
        return tell(&config);
    }
    let Some(link) = link else {
        let done = match (takeover, withdraw) {
            (true, _) => control::take_over(&config.socket).map(|()| ExitCode::SUCCESS),
            (_, true) if announce::has_ended_well() => Ok(ExitCode::SUCCESS),
            (_, true) => withdraw_all(&config).map(|()| ExitCode::SUCCESS),
            _ => keep(config),
        };
        return done.unwrap_or_else(|error| fail(&error));
    };
    logging::open(config.log_level, config.log_format, color);
    let code = match daemon::run(&config, &link) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            link.failed(&error);
            ExitCode::FAILURE
        }
    };
    logging::flush(LAST_LINES);
    code
}

/// What `--check` says of a configuration that could be read.
fn tell(config: &Config) -> ExitCode {
    if let Err(error) = privileges::expect_user(config.user.as_ref()) {
        tell_error(&error);
        return ExitCode::from(2);
    }
    if let Some(code) = refuse_unknown(config) {
        return code;
    }
    for what in config.absent() {
        journal::tell(Priority::Warning, &format_args!("warning: {what}"));
    }
    // What was added and applied is the daemon's and root's to read.
    match engine::Engine::check(config) {
        Err(error) if is_not_permitted(&error) => {
            let what = format_args!("warning: not compared with what was added and applied: {error:#}");
            journal::tell(Priority::Warning, &what);
        }
        Err(error) => {
            tell_error(&error);
            return ExitCode::from(2);
        }
        Ok(()) => {}
    }
    println!("the configuration is right: {} services, {} rules", config.services.len(), config.rules.len());
    ExitCode::SUCCESS
}

/// Names that nobody has are mistakes of the one who starts this or asks; a server that takes over goes on without them.
fn refuse_unknown(config: &Config) -> Option<ExitCode> {
    let unknown = config.unknown();
    for what in &unknown {
        journal::tell(Priority::Error, &format_args!("{what}"));
    }
    (!unknown.is_empty()).then(|| ExitCode::from(2))
}

fn is_not_permitted(error: &anyhow::Error) -> bool {
    let kinds = error.chain().filter_map(|it| it.downcast_ref::<io::Error>()).map(io::Error::kind);
    kinds.into_iter().any(|kind| kind == io::ErrorKind::PermissionDenied)
}

fn keep(config: Config) -> anyhow::Result<ExitCode> {
    Lock::expect_free()?;
    if let Some(code) = refuse_unknown(&config) {
        return Ok(code);
    }
    privileges::raise_memory_limit();
    // Root may take them out of their owners.
    let fetched = engine::fetch_registered(&config.state_dir);
    if let Some(why) =
        privileges::become_user(config.user.as_ref(), config.paths(), config.steering, make_pin_directory)?
    {
        journal::tell(Priority::Warning, &format_args!("running as root with all of its rights: {why}"));
    }
    let given_up = move || {
        journal::tell(Priority::Error, &"nobody has served since the crash: withdrawing what is announced");
        if let Err(error) = withdraw_all(&config) {
            tell_error(&error);
        }
    };
    keeper::keep(fetched, given_up).context("start the server process")
}

/// The file is read again for what is announced, since it may have been another one.
fn withdraw_all(config: &Config) -> anyhow::Result<()> {
    let now = config.read_again();
    now.as_ref().unwrap_or(config).announce.as_ref().map_or(Ok(()), announce::withdraw_all)
}

fn fail(error: &anyhow::Error) -> ExitCode {
    tell_error(error);
    ExitCode::FAILURE
}

fn tell_error(error: &anyhow::Error) {
    journal::tell(Priority::Error, &format_args!("{error:#}"));
}
