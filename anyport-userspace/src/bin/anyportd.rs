//! The daemon.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "without the log, there is the terminal")]

use std::process::ExitCode;

use anyport::{
    config::{Config, Options},
    daemon,
    keeper::{self, Link},
    logging,
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

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("anyportd: {error:#}");
    ExitCode::FAILURE
}
