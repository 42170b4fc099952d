//! `anyportctl doctor`: checks the host, and fixes what is wrong on request.

use std::{num::NonZeroU16, path::PathBuf};

use serde::Serialize;

use super::Output;
use crate::{
    api::{Client, Problem, ProblemKind},
    doctor::{Change, Finding, Host, Journal, Report},
};

/// As often it is looked again after a fix: what one fix brings back, such as IPv6, may show what else is missing.
const ROUNDS: usize = 3;
/// What was changed is written down in the directory of the control socket, which is empty after the next boot.
const JOURNAL: &str = "doctor.json";
/// Steps of a finding that are shown to people.
const SHOWN: usize = 6;
/// Columns of the longest line, but for commands.
const WIDTH: usize = 110;

/// Checks this host for everything that silently breaks steering.
#[derive(Debug, clap::Args)]
pub(super) struct Doctor {
    /// Do what is safe, and write down what was before
    #[arg(long)]
    fix: bool,
    /// Put back what --fix has changed since the last boot
    #[arg(long, conflicts_with = "fix")]
    undo: bool,
    /// Tell what keeps a server of this host from starting at this port of the wildcard address, too
    #[arg(long)]
    port: Option<NonZeroU16>,
    /// Name the checks that found nothing, too
    #[arg(long, short)]
    verbose: bool,
}

/// What [`Doctor`] answers.
#[derive(Serialize)]
struct Answer {
    #[serde(flatten)]
    report: Report,
    /// What was done now, a command each.
    changed: Vec<String>,
}

impl Doctor {
    pub(super) async fn run(self, client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
        let Self { fix, undo, port, verbose } = self;
        let mut changed = Vec::new();
        if undo {
            changed = Journal::open(journal(client))?.undo().await?;
        }
        let mut report = Report::of(&Host::look(client, port).await?);
        if fix {
            let mut journal = Journal::open(journal(client))?;
            for _ in 0..ROUNDS {
                let new: Vec<Change> =
                    report.changes().into_iter().filter(|it| !changed.contains(&it.to_string())).collect();
                if new.is_empty() {
                    break;
                }
                for change in new {
                    journal.make(&change).await?;
                    changed.push(change.to_string());
                }
                report = Report::of(&Host::look(client, port).await?);
            }
        }
        let answer = Answer { report, changed };
        out.print(&answer, |answer| text(answer, verbose, nothing_done(fix, undo)))?;
        match answer.report.broken() {
            0 => Ok(()),
            1 => Err(broken("one thing is broken")),
            many => Err(broken(&format!("{many} things are broken"))),
        }
    }
}

fn broken(what: &str) -> Problem {
    Problem::new(ProblemKind::Failed, what).hint("the findings say what to type; --fix does what is safe")
}

fn journal(client: &Client) -> PathBuf {
    client.socket().with_file_name(JOURNAL)
}

/// What is said where something was to be done and nothing was.
fn nothing_done(fix: bool, undo: bool) -> Option<&'static str> {
    match (fix, undo) {
        (true, _) => Some("nothing was changed: no finding has a remedy that --fix may carry out"),
        (_, true) => {
            Some("nothing was put back: --fix has changed nothing since the last boot, or all of it was put back")
        }
        (false, false) => None,
    }
}

fn text(answer: &Answer, verbose: bool, nothing_done: Option<&str>) -> String {
    let Answer { report, changed } = answer;
    let mut lines: Vec<String> = changed.iter().map(|change| format!("done     {change}")).collect();
    lines.extend(nothing_done.filter(|_| changed.is_empty()).map(ToOwned::to_owned));
    lines.push(match (&report.daemon, &report.no_daemon) {
        (Some(it), _) => {
            format!("anyportd {}, pid {}, steers by {} with {} rules", it.version, it.pid, it.backend, it.rules)
        }
        (None, why) => {
            format!("This is about what any back end would need: {}", why.as_deref().unwrap_or("no daemon answers"))
        }
    });
    lines.extend(report.findings.iter().map(finding));
    lines.extend(report.skipped.iter().map(|it| format!("\nnot seen {}: {}", it.check, it.why)));
    lines.push(String::new());
    lines.push(if verbose {
        format!("fine     {}", report.ok.join(", "))
    } else {
        format!("{} checks found nothing; --verbose names them", report.ok.len())
    });
    lines.join("\n")
}

fn finding(it: &Finding) -> String {
    let Finding { check, severity, finding, why, fix, fixable, .. } = it;
    let mut lines = vec![format!("\n{severity:<9}{check}: {finding}"), wrapped("  why    ", why)];
    lines.extend(fix.iter().take(SHOWN).map(|step| format!("  fix    {step}")));
    if fix.len() > SHOWN {
        lines.push(format!("         and {} more, which --json lists", fix.len() - SHOWN));
    }
    if *fixable {
        lines.push("         or: anyportctl doctor --fix".to_owned());
    }
    lines.join("\n")
}

/// A text in lines of bearable length, the first behind `label` and the others below it.
fn wrapped(label: &str, text: &str) -> String {
    let (mut lines, mut line) = (Vec::new(), label.to_owned());
    for word in text.split_ascii_whitespace() {
        if line.len() + word.len() > WIDTH {
            lines.push(line);
            line = " ".repeat(label.len());
        }
        line.push_str(word);
        line.push(' ');
    }
    lines.push(line);
    lines.iter().map(|line| line.trim_end()).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::wrapped;

    #[test]
    fn lines_stand_below_each_other() {
        let text = wrapped("why ", &"word ".repeat(30));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(lines[0].starts_with("why word word") && lines[1].starts_with("    word word"), "{text}");
        assert!(lines.iter().all(|line| line.len() <= 110 && !line.ends_with(' ')), "{text}");
    }
}
