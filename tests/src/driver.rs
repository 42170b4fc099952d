//! The driver of `anyportctl fleet …`: runs its commands and reads what they print.

use std::{fs, path::PathBuf, process::Command};

use anyport::fleet::layout::Time;
use serde_json::{Value, json};

use crate::{
    etcd::Etcd,
    host::Outcome,
    netns::Netns,
    prerequisites::{program, scratch},
};

/// Runs `anyportctl fleet` with files and a way to reach etcd.
#[derive(Debug)]
pub struct Driver {
    /// Where.
    pub namespace: Netns,
    /// What comes behind all arguments.
    pub options: Vec<String>,
    /// For what is published.
    pub files: tempfile::TempDir,
}

impl Driver {
    /// A driver that reaches etcd from a namespace.
    pub fn of(namespace: &Netns, etcd: &Etcd) -> Self {
        Self { namespace: namespace.clone(), options: vec!["--etcd".into(), etcd.urls()], files: scratch() }
    }

    /// Writes a file, and gives its path as text.
    pub fn file(&self, name: &str, text: &str) -> String {
        let path: PathBuf = self.files.path().join(name);
        fs::write(&path, text).expect("a file");
        path.display().to_string()
    }

    /// `anyportctl fleet` with arguments that are split at blanks.
    pub fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(program("anyportctl").unwrap_or_else(|missing| panic!("{missing}")));
        // The machine may have a configuration.
        command.env("ANYPORT_CONFIG", "/dev/null").arg("fleet").args(arguments.split_whitespace()).args(&self.options);
        command
    }

    /// Runs it to its end.
    pub fn run(&self, arguments: &str) -> Outcome {
        self.namespace.output(&mut self.command(arguments))
    }

    /// It must succeed.
    pub fn ok(&self, arguments: &str) -> String {
        let outcome = self.run(arguments);
        assert!(outcome.status == 0, "fleet {arguments}: {outcome}");
        outcome.stdout
    }

    /// It must succeed; what it prints as JSON.
    pub fn json(&self, arguments: &str) -> Value {
        let text = self.ok(&format!("{arguments} --json"));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("fleet {arguments} printed {text:?}: {error}"))
    }

    /// It must end with this status; what it complains.
    pub fn refused(&self, arguments: &str, status: i32) -> String {
        let outcome = self.run(arguments);
        assert!(outcome.status == status, "fleet {arguments} should end with {status}: {outcome}");
        outcome.stderr
    }

    /// The ring as `status` tells it; null where there is none.
    pub fn ring(&self, ring: &str) -> Value {
        let outcome = self.run(&format!("status --ring {ring} --json"));
        if outcome.status == 1 && outcome.stderr.contains("there is no ring") {
            return Value::Null;
        }
        assert!(outcome.status == 0, "fleet status --ring {ring}: {outcome}");
        serde_json::from_str::<Value>(&outcome.stdout).expect("JSON of fleet status")[0].clone()
    }

    /// The sequence of a ring's pointer.
    pub fn sequence(&self, ring: &str) -> u64 {
        self.ring(ring)["pointer"]["sequence"].as_u64().unwrap_or_default()
    }
}

/// The report of a node at which this pointer is active.
pub fn report(node: &str, pointer: &Value) -> Value {
    let now = Time::now().to_string();
    json!({
        "node": node, "ring": pointer["ring"], "sequence": pointer["sequence"], "set": pointer["set"], "revision": 1,
        "generation": 1, "backend": "sk-lookup", "health": "good", "version": "0.1.0",
        "since": now, "reported": now,
    })
}

/// Writes a node's report, and that there is such a node.
pub fn put_report(etcd: &Etcd, report: &Value) {
    let (ring, node) = (text(&report["ring"]), text(&report["node"]));
    let member = json!({ "ring": ring, "node": node, "since": report["since"] });
    etcd.put(&format!("/anyport/members/{ring}/{node}"), &member.to_string());
    etcd.put(&format!("/anyport/nodes/{ring}/{node}"), &report.to_string());
}

/// What is a text in JSON.
pub fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text"))
}
