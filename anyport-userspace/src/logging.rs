//! The daemon's log, on standard error.

use std::{
    io::{IsTerminal as _, stderr},
    sync::OnceLock,
};

use tracing::warn;
use tracing_subscriber::EnvFilter;

use crate::config::{LogFormat, LogLevel};

/// Sets another level, once there is a log.
static SET_LEVEL: OnceLock<Box<dyn Fn(LogLevel) + Send + Sync>> = OnceLock::new();

/// Begins to log.
pub fn open(level: LogLevel, format: LogFormat) {
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter(level))
        .with_writer(stderr)
        .with_ansi(stderr().is_terminal())
        .with_target(false);
    match format {
        LogFormat::Text => {
            let log = log.with_filter_reloading();
            let handle = log.reload_handle();
            log.init();
            remember(move |level| handle.reload(filter(level)));
        }
        LogFormat::Json => {
            let log = log.json().with_filter_reloading();
            let handle = log.reload_handle();
            log.init();
            remember(move |level| handle.reload(filter(level)));
        }
    }
}

/// Logs from now on by this level.
pub fn set_level(level: LogLevel) {
    if let Some(set_level) = SET_LEVEL.get() {
        set_level(level);
    }
}

fn remember(set_level: impl Fn(LogLevel) -> Result<(), tracing_subscriber::reload::Error> + Send + Sync + 'static) {
    let set_level = move |level| {
        if let Err(error) = set_level(level) {
            warn!("log by the level {level}: {error}");
        }
    };
    // There is one log a process.
    SET_LEVEL.set(Box::new(set_level)).ok();
}

fn filter(level: LogLevel) -> EnvFilter {
    // The netlink library tells of every message from debug on.
    EnvFilter::new(format!("{level},netlink_proto=warn,rtnetlink=warn"))
}
