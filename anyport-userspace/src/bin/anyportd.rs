//! The daemon.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "without the log, there is the terminal")]

use std::process::ExitCode;

use anyhow::Context as _;
use anyport::{
    config::{Config, Options},
    daemon, engine,
    keeper::{self, Link},
    logging, rights,
};
use clap::Parser as _;
use tracing::error;

fn main() -> ExitCode {
    let Options { config, check, takeover, settings } = Options::parse();
    // Before there is another thread.
    let link = match Link::of_process() {
        Ok(link) => link,
        Err(error) => return fail(&error),
    };
    // Who only keeps sockets or asks for something needs no rules.
    let read = if link.is_some() || check { Config::new } else { Config::without_rules };
    let config = match read(settings, config.as_deref()) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("anyportd: {error:#}");
            link.inspect(|link| link.failed(&error));
            return ExitCode::from(2);
        }
    };
    if check {
        let Config { services, rules, .. } = &config;
        println!("the configuration is right: {} services, {} rules", services.len(), rules.len());
        return ExitCode::SUCCESS;
    }
    let Some(link) = link else {
        let done = if takeover { keeper::take_over(&config.socket).map(|()| ExitCode::SUCCESS) } else { keep(&config) };
        return done.unwrap_or_else(|error| fail(&error));
    };
    logging::open(config.log_level, config.log_format);
    match daemon::run(&config, &link) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            link.failed(&error);
            ExitCode::FAILURE
        }
    }
}

fn keep(config: &Config) -> anyhow::Result<ExitCode> {
    // Root may take them out of their owners.
    let fetched = engine::fetch_registered(&config.state_dir);
    if let Some(why) = rights::become_user(config)? {
        eprintln!("anyportd: running as root with all of its rights: {why}");
    }
    keeper::keep(fetched).context("start the server process")
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("anyportd: {error:#}");
    ExitCode::FAILURE
}
