//! The daemon's log, on standard error: written by a thread of its own, since a pipe or a terminal takes nothing for as long as others like.

use std::{
    io::{self, IsTerminal as _, Write, stderr},
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use tracing::warn;
use tracing_subscriber::EnvFilter;

use crate::{
    config::{LogFormat, LogLevel},
    privileges,
    text::visible,
};

/// Lines that wait to be written; further ones are counted and left out.
const MAX_WAITING: usize = 4096;
/// How often it is looked whether all is written.
const INTERVAL: Duration = Duration::from_millis(5);

/// Sets another level, once there is a log.
static SET_LEVEL: OnceLock<Box<dyn Fn(LogLevel) + Send + Sync>> = OnceLock::new();
/// To the thread that writes, once there is one.
static LINES: OnceLock<SyncSender<Vec<u8>>> = OnceLock::new();
/// Lines that wait, and lines that were left out since the last one was written.
static WAITING: AtomicU64 = AtomicU64::new(0);
static LEFT_OUT: AtomicU64 = AtomicU64::new(0);

/// Begins to log.
pub fn open(level: LogLevel, format: LogFormat) {
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter(level))
        .with_writer(|| Line)
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

/// Has a thread write from now on, so that no other one waits for it.
///
/// # Errors
/// The kernel refuses a thread.
pub fn write_aside() -> anyhow::Result<()> {
    let (sender, lines) = sync_channel(MAX_WAITING);
    privileges::start_thread("anyport-log", privileges::for_others, move || write_all(&lines))
        .context("start the thread that writes the log")?;
    // This is called once.
    LINES.set(sender).ok();
    Ok(())
}

/// Waits until all is written, but not longer than this.
pub fn flush(limit: Duration) {
    let end = Instant::now() + limit;
    while WAITING.load(Relaxed) > 0 && Instant::now() < end {
        sleep(INTERVAL);
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

/// Takes a whole line at a time.
struct Line;

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let Some(lines) = LINES.get() else {
            stderr().write_all(&shown(line))?;
            return Ok(line.len());
        };
        WAITING.fetch_add(1, Relaxed);
        if lines.try_send(shown(line)).is_err() {
            WAITING.fetch_sub(1, Relaxed);
            LEFT_OUT.fetch_add(1, Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Orders to the terminal are the log's own colours: others are escaped within messages already.
fn shown(line: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(line);
    text.split_inclusive('\u{1b}')
        .flat_map(|part| match part.strip_suffix('\u{1b}') {
            Some(before) => [visible(before).into_owned().into_bytes(), vec![0x1b]].concat(),
            None => visible(part).into_owned().into_bytes(),
        })
        .collect()
}

fn write_all(lines: &Receiver<Vec<u8>>) {
    for line in lines {
        let mut stderr = stderr().lock();
        // Nobody can be told that it does not work.
        stderr.write_all(&line).ok();
        let left_out = LEFT_OUT.swap(0, Relaxed);
        if left_out > 0 {
            writeln!(stderr, "anyportd: {left_out} lines of the log were left out, since it was not taken in time")
                .ok();
        }
        WAITING.fetch_sub(1, Relaxed);
    }
}
