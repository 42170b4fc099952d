//! The simulation of many nodes, with few of them.

use std::process::Command;

use anyport_tests::host::Outcome;
use libtest_mimic::Trial;

use crate::{cases::trial, control::contains};

pub(super) fn trials() -> Vec<Trial> {
    vec![trial("fleet::simulated nodes take what is published", simulated)]
}

/// It fails where a node does not have a set active, or does not report it.
fn simulated() {
    // Not on /run, of which the program has its own.
    let directory = tempfile::tempdir().expect("a directory");
    let plot = directory.path().join("plot.svg");
    let mut command = Command::new(env!("CARGO_BIN_EXE_sim"));
    command.args(["fleet", "--nodes", "5", "--rules", "500", "--changed", "5", "--rounds", "2"]);
    let outcome = Outcome::of(command.arg("--plot").arg(&plot));
    assert!(outcome.status == 0, "{outcome}");
    contains(&outcome.stdout, &["| 5 | ", "Sets of 500 rules"]);
    assert!(plot.is_file(), "no plot");
}
