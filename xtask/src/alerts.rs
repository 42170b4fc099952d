//! The rules of docs/alerts.yml, by the unit tests in tests/alerts.yml.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};

use crate::process::exec;

const RULES: &str = "docs/alerts.yml";
const TESTS: &str = "tests/alerts.yml";

/// Has promtool read the rules and run their tests.
pub(crate) fn check(root: &Path) -> Result<()> {
    let promtool =
        |action: &str, file: &str| exec(Command::new("promtool").current_dir(root).args([action, "rules", file]));
    promtool("check", RULES)?;
    promtool("test", TESTS)?;
    let read = |file: &str| fs::read_to_string(root.join(file)).with_context(|| format!("read {file}"));
    let untested = untested(&read(RULES)?, &read(TESTS)?);
    ensure!(untested.is_empty(), "{TESTS} lacks {}", untested.join(", "));
    Ok(())
}

/// Each alert takes a test in which it fires and one in which it does not.
fn untested(rules: &str, tests: &str) -> Vec<String> {
    let alerts = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
    let lines: Vec<&str> = tests.lines().map(str::trim).collect();
    let mut untested = Vec::new();
    for alert in alerts {
        let silent = format!("alertname: {alert}}}");
        if !lines.iter().any(|line| line.ends_with(&silent)) {
            untested.push(format!("{alert} that does not fire"));
        }
        let fires = [format!("alertname: {alert}"), "exp_alerts:".to_owned()];
        if !lines.windows(2).any(|pair| pair == fires) {
            untested.push(format!("{alert} that fires"));
        }
    }
    untested
}

#[cfg(test)]
mod tests {
    use super::untested;

    #[test]
    fn what_is_not_tested_is_found() {
        let rules = "rules:\n  - alert: One\n  - alert: Other\n";
        let fires = "- eval_time: 1m\n  alertname: One\n  exp_alerts:\n";
        assert_eq!(
            untested(rules, &format!("{fires}- {{eval_time: 1m, alertname: Other}}\n")),
            ["One that does not fire", "Other that fires"]
        );
        let silent = "- {eval_time: 1m, alertname: One}\n";
        assert_eq!(untested("- alert: One\n", &format!("{fires}{silent}")), [""; 0]);
    }
}
