//! Standard error where the journal of systemd reads it: each line begins with its priority, and the journal itself
//! knows its time and its process (sd-daemon(3)).

use std::{
    env,
    fmt::{Display, Write as _},
    fs::File,
    io::{self, stderr},
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    sync::LazyLock,
};

/// How bad it is what a line tells of, as in syslog(3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// Something failed.
    Error = 3,
    /// Something may fail, or does without.
    Warning = 4,
    /// All is as it should be.
    Info = 6,
    /// Of use to those who look for a fault.
    Debug = 7,
}

/// Whether the journal reads what is written to standard error.
pub(crate) fn is_reader() -> bool {
    static IS_READER: LazyLock<bool> = LazyLock::new(|| {
        let told = env::var("JOURNAL_STREAM").ok();
        // A service manager names the file that it has opened for us; it may be another one by now.
        let file = stderr().as_fd().try_clone_to_owned().and_then(|it| File::from(it).metadata());
        file.is_ok_and(|file| told.is_some_and(|told| told == format!("{}:{}", file.dev(), file.ino())))
    });
    *IS_READER
}

/// The lines of a text, each with its priority.
pub(crate) fn marked(priority: Priority, text: &str) -> String {
    text.lines().fold(String::new(), |mut marked, line| {
        // Writing to a string does not fail.
        writeln!(marked, "<{}>{line}", priority as u8).ok();
        marked
    })
}

/// Tells of something on standard error, for processes that have no log of their own.
pub fn tell(priority: Priority, what: &dyn Display) {
    let text = if is_reader() { marked(priority, &what.to_string()) } else { format!("anyportd: {what}\n") };
    // Nobody can be told that it does not work.
    io::Write::write_all(&mut stderr(), text.as_bytes()).ok();
}

#[cfg(test)]
mod tests {
    use super::{Priority, marked};

    #[test]
    fn each_line_has_its_priority() {
        assert_eq!(marked(Priority::Error, "it failed:\n  why\n"), "<3>it failed:\n<3>  why\n");
        assert_eq!(marked(Priority::Info, "ready"), "<6>ready\n");
    }
}
