//! The daemon's log, on standard error: written by a thread of its own, since a pipe or a terminal takes nothing for as long as others like.

use std::{
    io::{self, IsTerminal as _, Write, stderr},
    panic,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::{self, sleep},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use tracing::{Level, Metadata, warn};
use tracing_subscriber::{
    EnvFilter, Layer as _,
    fmt::{self, MakeWriter},
    layer::SubscriberExt as _,
    registry, reload,
    util::SubscriberInitExt as _,
};

use crate::{
    config::{LogFormat, LogLevel},
    journal::{self, Priority},
    privileges,
    text::visible,
    usage::When,
};

/// Lines that wait to be written; further ones are counted and left out.
const MAX_WAITING: usize = 4096;
/// How often it is looked whether all is written.
const INTERVAL: Duration = Duration::from_millis(5);

/// Sets another level, once there is a log.
static SET_LEVEL: OnceLock<Box<dyn Fn(LogLevel) + Send + Sync>> = OnceLock::new();
/// To the thread that writes, once there is one.
static LINES: OnceLock<SyncSender<String>> = OnceLock::new();
/// Lines that wait, and lines that were left out since the last one was written.
static WAITING: AtomicU64 = AtomicU64::new(0);
static LEFT_OUT: AtomicU64 = AtomicU64::new(0);

/// Begins to log. What the journal knows by itself is not in lines for people.
pub fn open(level: LogLevel, format: LogFormat, colours: When) {
    let (filtered, handle) = reload::Layer::new(filter(level));
    let lines = fmt::layer().with_writer(Lines).with_ansi(colours.holds(stderr().is_terminal())).with_target(false);
    let lines = match format {
        LogFormat::Json => lines.json().boxed(),
        LogFormat::Text if journal::is_reader() => lines.without_time().with_level(false).boxed(),
        LogFormat::Text => lines.boxed(),
    };
    registry().with(filtered).with(lines).init();
    let set_level = move |level| {
        if let Err(error) = handle.reload(filter(level)) {
            warn!("log by the level {level}: {error}");
        }
    };
    // There is one log a process.
    SET_LEVEL.set(Box::new(set_level)).ok();
    if journal::is_reader() {
        panic::set_hook(Box::new(|panic| {
            let thread = thread::current();
            let name = thread.name().unwrap_or("without a name");
            journal::tell(Priority::Error, &format_args!("thread {name} {panic}"));
        }));
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

fn filter(level: LogLevel) -> EnvFilter {
    // The netlink library tells of every message from debug on.
    EnvFilter::new(format!("{level},netlink_proto=warn,rtnetlink=warn"))
}

/// Where events are written.
struct Lines;

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line(Priority::Info)
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> Line {
        Line(match *event.level() {
            Level::ERROR => Priority::Error,
            Level::WARN => Priority::Warning,
            Level::INFO => Priority::Info,
            _ => Priority::Debug,
        })
    }
}

/// Takes a whole event at a time.
struct Line(Priority);

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = as_read(self.0, shown(line));
        let Some(lines) = LINES.get() else {
            stderr().write_all(text.as_bytes())?;
            return Ok(line.len());
        };
        WAITING.fetch_add(1, Relaxed);
        if lines.try_send(text).is_err() {
            WAITING.fetch_sub(1, Relaxed);
            LEFT_OUT.fetch_add(1, Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A text as those take it who read the log.
fn as_read(priority: Priority, text: String) -> String {
    if journal::is_reader() { journal::marked(priority, &text) } else { text }
}

/// Orders to the terminal are the log's own colours: others are escaped within messages already.
fn shown(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    text.split('\u{1b}').map(visible).collect::<Vec<_>>().join("\u{1b}")
}

fn write_all(lines: &Receiver<String>) {
    for line in lines {
        // Nobody can be told that it does not work.
        stderr().write_all(line.as_bytes()).ok();
        let left_out = LEFT_OUT.swap(0, Relaxed);
        if left_out > 0 {
            let what = format_args!("{left_out} lines of the log were left out, since it was not taken in time");
            journal::tell(Priority::Warning, &what);
        }
        WAITING.fetch_sub(1, Relaxed);
    }
}
