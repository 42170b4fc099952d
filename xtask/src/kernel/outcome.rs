//! What came out of a machine: the tests' own lines, the kernel's log, and how it ended.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result};

use super::machine::Run;
use crate::{process::exec, tally::Tally};

/// What the kernel says when something in it is broken.
const TROUBLES: [&str; 5] = ["Kernel panic", "BUG: ", "Oops: ", "general protection fault", "Unable to handle kernel"];

/// A case, and how it ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Case {
    /// The name of the test.
    pub(crate) name: String,
    /// Whether it passed.
    pub(crate) passed: bool,
}

/// What is known of a run.
pub(crate) struct Outcome {
    /// The kernel's release and version, as `uname -r` and `uname -v` say them.
    pub(crate) kernel: String,
    /// The cases that ran.
    pub(crate) cases: Vec<Case>,
    /// The counts of the runner, and a failure for what else went wrong.
    pub(crate) tally: Tally,
    /// What else went wrong.
    pub(crate) troubles: Vec<String>,
}

impl Outcome {
    /// Reads what the guest has left on the exchange disk, or, if it did not get that far, on the console.
    pub(crate) fn read(run: &Run, exchange: &Path, results: &Path) -> Result<Self> {
        drop(fs::remove_dir_all(results));
        fs::create_dir_all(results)?;
        fs::write(results.join("console"), run.console.join("\n") + "\n")?;
        let mut troubles = Vec::new();
        if run.hung {
            troubles.push(format!("the machine had not ended after {} s", run.time.as_secs()));
        }
        if let Err(error) = exec(Command::new("tar").arg("-xf").arg(exchange).arg("-C").arg(results)) {
            troubles.push(format!("the machine left no results: {error:#}"));
        }
        let text = |name: &str| fs::read_to_string(results.join(name)).ok();
        let console = run.console.join("\n");
        let output = text("output");
        let log = text("dmesg").unwrap_or_default();
        for line in console.lines().chain(log.lines()).filter(|line| is_trouble(line)) {
            troubles.push(format!("the kernel said: {line}"));
        }
        let kernel = text("kernel").unwrap_or_default();
        let status = text("status").unwrap_or_default();
        Ok(Self::judge(&kernel, output.as_deref().unwrap_or(&console), status.trim(), troubles))
    }

    fn judge(kernel: &str, output: &str, status: &str, mut troubles: Vec<String>) -> Self {
        let cases: Vec<Case> = output.lines().filter_map(case).collect();
        let mut tally = Tally::default();
        if let Some(summary) = output.lines().filter_map(Tally::parse).next_back() {
            tally.add(&summary);
        } else {
            tally.passed = cases.iter().filter(|case| case.passed).count();
            tally.failed = cases.len() - tally.passed;
            troubles.push("the tests came to no end".to_owned());
        }
        if tally.passed + tally.failed == 0 {
            troubles.push("no test ran".to_owned());
        }
        if tally.skipped > 0 {
            troubles.push(format!("{} tests were skipped: what a kernel should have must be there", tally.skipped));
        }
        if status != "0" && tally.failed == 0 {
            troubles.push(format!("the tests ended with status {status:?}"));
        }
        tally.failed += usize::from(!troubles.is_empty());
        Self { kernel: kernel.lines().collect::<Vec<_>>().join(" "), cases, tally, troubles }
    }

    /// Whether all is well.
    pub(crate) fn check(&self) -> Result<()> {
        let failed: Vec<&str> = self.cases.iter().filter(|case| !case.passed).map(|case| case.name.as_str()).collect();
        let all = [failed.iter().map(|name| format!("failed: {name}")).collect(), self.troubles.clone()].concat();
        if self.tally.failed == 0 { Ok(()) } else { Err(anyhow::anyhow!(all.join("; "))) }
            .with_context(|| format!("Linux {}", self.kernel))
    }
}

fn is_trouble(line: &str) -> bool {
    TROUBLES.iter().any(|trouble| line.contains(trouble))
}

/// Reads `test tc::tcp4::remote::hello ... ok`.
fn case(line: &str) -> Option<Case> {
    let (name, result) = line.strip_prefix("test ")?.rsplit_once("... ")?;
    let passed = match result.trim_end() {
        "ok" => true,
        "FAILED" => false,
        _ => return None,
    };
    Some(Case { name: name.trim_end().to_owned(), passed })
}

#[cfg(test)]
mod tests {
    use super::{Outcome, is_trouble};
    use crate::tally::Tally;

    const PASSED: &str = "running 2 tests\ntest tc::a b    ... ok\ntest c ... ok\n\n\
                          test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 7 filtered out; finished in 1s\n";

    fn tally(output: &str, status: &str, troubles: &[&str]) -> Tally {
        Outcome::judge("6.1\n#1", output, status, troubles.iter().map(|&it| it.to_owned()).collect()).tally
    }

    #[test]
    fn counts_what_the_runner_counted() {
        assert_eq!(tally(PASSED, "0", &[]), Tally { passed: 2, failed: 0, skipped: 0 });
        let outcome = Outcome::judge("6.1\n#1", PASSED, "0", vec![]);
        let names: Vec<_> = outcome.cases.iter().map(|case| &*case.name).collect();
        assert_eq!((names, &*outcome.kernel), (vec!["tc::a b", "c"], "6.1 #1"));
    }

    #[test]
    fn anything_else_that_went_wrong_is_a_failure() {
        assert_eq!(tally(PASSED, "101", &[]).failed, 1);
        assert_eq!(tally(PASSED, "0", &["the kernel said: Oops: 0"]).failed, 1);
        assert_eq!(tally("", "", &[]).failed, 1);
        assert_eq!(tally("test a ... ok\n", "", &[]), Tally { passed: 1, failed: 1, skipped: 0 });
        let skipped = "test result: ok. 0 passed; 0 failed; 3 ignored; 0 measured; 0 filtered out; finished in 0s";
        assert_eq!(tally(skipped, "0", &[]).failed, 1);
    }

    #[test]
    fn knows_the_kernels_complaints() {
        assert!(is_trouble("[    9.1] BUG: kernel NULL pointer dereference, address: 0000000000000008"));
        assert!(is_trouble("[    9.1] Kernel panic - not syncing: Fatal exception"));
        assert!(!is_trouble("[    0.1] Linux version 6.1.0-50-cloud-amd64"));
    }
}
