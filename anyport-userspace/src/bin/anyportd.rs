//! The daemon.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "without the log, there is the terminal")]

use std::{
    io::{IsTerminal as _, stderr},
    process::ExitCode,
};

use anyport::{
    config::{Config, LogFormat, Options},
    daemon,
    keeper::{self, Link},
};
use clap::Parser as _;
use tracing::error;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let Options { config, check, takeover, settings } = Options::parse();
    // Before there is another thread.
    let link = match Link::of_process() {
        Ok(link) => link,
        Err(error) => return fail(&error),
    };
    if link.is_none() && !takeover && !check {
        return keeper::keep()
            .unwrap_or_else(|error| fail(&anyhow::Error::from(error).context("start the server process")));
    }
    let config = match Config::new(settings, config.as_deref()) {
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
        return keeper::take_over(&config.socket).map_or_else(|error| fail(&error), |()| ExitCode::SUCCESS);
    };
    open_log(&config);
    match daemon::run(&config, &link) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            link.failed(&error);
            ExitCode::FAILURE
        }
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("anyportd: {error:#}");
    ExitCode::FAILURE
}

fn open_log(config: &Config) {
    // The netlink library tells of every message from debug on.
    let filter = EnvFilter::new(format!("{},netlink_proto=warn,rtnetlink=warn", config.log_level));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(stderr)
        .with_ansi(stderr().is_terminal())
        .with_target(false);
    match config.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
}
