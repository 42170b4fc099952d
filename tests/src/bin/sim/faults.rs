//! Faults at random: no steered connection fails on a node that lives, and in the end all nodes stand where they should.

use std::time::Duration;

use anyhow::{Result, bail};
use anyport_tests::faults::{Plan, run};
use clap::Args;

/// For how long, and with how many nodes.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Minutes that faults go on.
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// Nodes.
    #[arg(long, default_value_t = 5)]
    nodes: usize,
}

pub(crate) fn faults(options: &Options) -> Result<()> {
    let report = run(&Plan { time: Duration::from_secs_f64(60.0 * options.minutes), nodes: options.nodes });
    print!("{report}");
    if !report.wrong.is_empty() {
        bail!("{} things went wrong:\n{}", report.wrong.len(), report.wrong.join("\n"));
    }
    Ok(())
}
