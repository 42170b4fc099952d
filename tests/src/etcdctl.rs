//! `etcdctl` with the way to a cluster, which may not answer.

use std::{ffi::OsStr, process::Command};

use crate::{host::Outcome, netns::Netns};

/// `etcdctl` in a namespace, for some members of a cluster.
#[derive(Clone, Debug)]
pub struct Etcdctl {
    /// Where it runs.
    pub namespace: Netns,
    /// The members' URLs, separated by commas.
    pub endpoints: String,
    /// What it takes to be let in.
    pub options: Vec<String>,
}

impl Etcdctl {
    /// Runs it to its end, whatever comes of it.
    pub fn run(&self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Outcome {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &self.endpoints]).args(&self.options).args(arguments);
        self.namespace.output(&mut command)
    }
}
