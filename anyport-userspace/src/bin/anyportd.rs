//! The daemon.
#![expect(clippy::print_stderr, reason = "errors before the log is open go to standard error")]

use std::{
    io::{IsTerminal as _, stderr},
    path::PathBuf,
    process::ExitCode,
};

use anyport::{
    config::{Config, LogFormat, Settings},
    daemon,
    keeper::{self, Link},
};
use clap::Parser;
use tracing::error;
use tracing_subscriber::EnvFilter;

/// Lets one socket answer for every address and every port of whole prefixes.
///
/// Without any configuration it starts, steers nothing, and says what to type next. Each option may also stand
/// under [daemon] in the configuration file, by its long name.
#[derive(Debug, Parser)]
#[command(name = "anyportd", version)]
struct Options {
    /// Configuration file [default: /etc/anyport/anyport.toml, which may be absent]
    #[arg(long, env = "ANYPORT_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Takes over from the anyportd that runs, without losing a connection, and leaves: what serves then is this program with the
    /// options of that one
    #[arg(long)]
    takeover: bool,
    #[command(flatten)]
    settings: Settings,
}

fn main() -> ExitCode {
    let Options { config, takeover, settings } = Options::parse();
    // Before there is another thread.
    let link = match Link::of_process() {
        Ok(link) => link,
        Err(error) => return fail(&error),
    };
    if link.is_none() && !takeover {
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
