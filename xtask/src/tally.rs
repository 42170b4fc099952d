//! Counting what passed and what failed, over all runners.

use std::{
    fmt,
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result};

use crate::process::dying_with_us;

/// What one or several runners counted.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Tests and checks that passed.
    pub(crate) passed: usize,
    /// Tests and checks that failed.
    pub(crate) failed: usize,
    /// Tests and checks that were left out.
    pub(crate) skipped: usize,
}

impl Tally {
    /// Counts these too.
    pub(crate) fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }

    /// Runs `cargo test`, shows its output and adds its summary lines up. If it failed otherwise than by failing
    /// tests, because one of them ended the whole program for example, that counts as one.
    pub(crate) fn of(command: &Command) -> Result<Self> {
        let mut command = dying_with_us(command);
        let mut child =
            command.stdout(Stdio::piped()).spawn().with_context(|| format!("{command:?} could not be started"))?;
        let mut tally = Self::default();
        for line in BufReader::new(child.stdout.take().context("no pipe")?).split(b'\n') {
            let line = line.with_context(|| format!("{command:?} can't be listened to"))?;
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            if let Some(summary) = Self::parse(&line) {
                tally.add(&summary);
            }
        }
        let status = child.wait().with_context(|| format!("{command:?} got lost"))?;
        if !status.success() && tally.failed == 0 {
            tally.failed = 1;
        }
        Ok(tally)
    }

    /// Reads `test result: ok. 3 passed; 0 failed; 1 ignored; …`, the last line of libtest and libtest-mimic.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
        let count = |what: &str| {
            let count = counts.split("; ").find_map(|count| count.strip_suffix(what))?;
            count.trim_end().parse::<usize>().ok()
        };
        Some(Self { passed: count("passed")?, failed: count("failed")?, skipped: count("ignored")? })
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        if self.skipped > 0 {
            write!(f, ", {} skipped", self.skipped)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Tally;

    #[test]
    fn reads_the_summary_of_libtest() {
        let line = "test result: FAILED. 12 passed; 3 failed; 4 ignored; 0 measured; 7 filtered out; finished in 0.01s";
        assert_eq!(Tally::parse(line), Some(Tally { passed: 12, failed: 3, skipped: 4 }));
    }

    #[test]
    fn reads_nothing_into_other_lines() {
        for line in ["", "test result: none", "test tally::tests::reads … ok", "12 passed, 0 failed"] {
            assert_eq!(Tally::parse(line), None, "{line}");
        }
    }

    #[test]
    fn mentions_skipped_ones_only_if_there_are_any() {
        let tally = |skipped| Tally { passed: 5, failed: 0, skipped }.to_string();
        assert_eq!(tally(0), "5 passed, 0 failed");
        assert_eq!(tally(2), "5 passed, 0 failed, 2 skipped");
    }
}
