//! A fleet of many nodes on one machine. Prints Markdown tables.
//!
//! Build with `--release`: `cargo xtask sim` does.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "tables and progress are what this program is for")]

mod fleet;
mod kernel;
mod load;
mod nodes;

use anyhow::{Result, bail};
use anyport_tests::ground;
use clap::{Parser, Subcommand};

/// Simulates a fleet.
#[derive(Debug, Parser)]
struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// From publishing a set to the node that has it last, by the number of nodes.
    Fleet(fleet::Options),
}

fn main() -> Result<()> {
    let Options { what } = Options::parse();
    let missing = ground::missing();
    if !missing.is_empty() {
        bail!("this machine lacks:\n  {}", missing.join("\n  "));
    }
    ground::isolate();
    match what {
        What::Fleet(options) => fleet::fleet(&options),
    }
}
