//! `anyportctl doctor`: what on this host silently breaks steering, and what to do about it.
//!
//! Everything that is looked at is collected first, in [`Host`]; a check is a function of that, one a file.

mod checks;
mod firewall;
mod fix;
mod host;
mod look;
mod modules;
mod sysctl;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use self::{
    fix::{Change, Journal},
    host::{Daemon, Host, Link, PolicyRule, Steered},
    sysctl::Sysctl,
};

/// How bad something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Good to know; nothing is wrong by it.
    Note,
    /// Some clients, or all under load, are not served as they should be.
    Warning,
    /// Something does not work now.
    Broken,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Broken => "BROKEN",
        })
    }
}

/// Something that a check has found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The check, by its name in [`Report`].
    pub check: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What was found.
    pub finding: String,
    /// What comes of it.
    pub why: String,
    /// What to type or to do, a step each.
    pub fix: Vec<String>,
    /// Whether `--fix` does all of that.
    pub fixable: bool,
    /// What `--fix` does.
    #[serde(skip)]
    pub changes: Vec<Change>,
}

impl Finding {
    fn new(severity: Severity, finding: impl Into<String>, why: impl Into<String>) -> Self {
        Self {
            check: "",
            severity,
            finding: finding.into(),
            why: why.into(),
            fix: Vec::new(),
            fixable: false,
            changes: Vec::new(),
        }
    }

    fn broken(finding: impl Into<String>, why: impl Into<String>) -> Self {
        Self::new(Severity::Broken, finding, why)
    }

    fn warning(finding: impl Into<String>, why: impl Into<String>) -> Self {
        Self::new(Severity::Warning, finding, why)
    }

    fn note(finding: impl Into<String>, why: impl Into<String>) -> Self {
        Self::new(Severity::Note, finding, why)
    }

    /// A step that is left to people.
    #[must_use]
    fn by_hand(mut self, step: impl Into<String>) -> Self {
        self.fix.push(step.into());
        self
    }

    /// A step that `--fix` takes, and that can be undone.
    #[must_use]
    fn by_change(mut self, change: Change) -> Self {
        self.fix.push(change.to_string());
        self.fixable = true;
        self.changes.push(change);
        self
    }
}

/// A check: its name, which stays the same from version to version, and what it does.
struct Check {
    name: &'static str,
    look: fn(&Host) -> anyhow::Result<Vec<Finding>>,
}

/// What all checks have found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The daemon, if one answers.
    pub daemon: Option<DaemonView>,
    /// Why what a daemon would tell is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_daemon: Option<String>,
    /// What is wrong, the worst first.
    pub findings: Vec<Finding>,
    /// The checks that found nothing.
    pub ok: Vec<&'static str>,
    /// The checks that could not look.
    pub skipped: Vec<Skipped>,
}

/// The daemon that a [`Report`] is about.
#[derive(Clone, Debug, Serialize)]
pub struct DaemonView {
    /// Its version.
    pub version: String,
    /// The process that accepts.
    pub pid: u32,
    /// The back end in use.
    pub backend: crate::back_end::BackEnd,
    /// Number of rules.
    pub rules: usize,
}

/// A check that could not look.
#[derive(Clone, Debug, Serialize)]
pub struct Skipped {
    /// Its name.
    pub check: &'static str,
    /// Why it could not.
    pub why: String,
}

impl Report {
    /// Makes all checks.
    pub fn of(host: &Host) -> Self {
        let (mut findings, mut ok, mut skipped) = (Vec::new(), Vec::new(), Vec::new());
        for Check { name, look } in checks::ALL {
            match look(host) {
                Ok(found) if found.is_empty() => ok.push(*name),
                Ok(found) => findings.extend(found.into_iter().map(|it| Finding { check: name, ..it })),
                Err(error) => skipped.push(Skipped { check: name, why: format!("{error:#}") }),
            }
        }
        findings.sort_by_key(|it| std::cmp::Reverse(it.severity));
        let (daemon, no_daemon) = match &host.daemon {
            Ok(Daemon { status, .. }) => {
                let view = DaemonView {
                    version: status.version.clone(),
                    pid: status.pid,
                    backend: status.backend,
                    rules: status.rules,
                };
                (Some(view), None)
            }
            Err(why) => (None, Some(why.clone())),
        };
        Self { daemon, no_daemon, findings, ok, skipped }
    }

    /// How many findings are [`Severity::Broken`].
    pub fn broken(&self) -> usize {
        self.findings.iter().filter(|it| it.severity == Severity::Broken).count()
    }

    /// What `--fix` would do, each change once.
    pub fn changes(&self) -> Vec<Change> {
        let mut changes: Vec<Change> = Vec::new();
        for change in self.findings.iter().filter(|it| it.severity > Severity::Note).flat_map(|it| &it.changes) {
            if !changes.contains(change) {
                changes.push(change.clone());
            }
        }
        changes
    }
}
