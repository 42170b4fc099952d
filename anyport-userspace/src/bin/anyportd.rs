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
    #[command(flatten)]
    settings: Settings,
}

fn main() -> ExitCode {
    let Options { config, settings } = Options::parse();
    let config = match Config::new(settings, config.as_deref()) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("anyportd: {error:#}");
            return ExitCode::from(2);
        }
    };
    open_log(&config);
    match daemon::run(&config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            ExitCode::FAILURE
        }
    }
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
