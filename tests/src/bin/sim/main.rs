//! Simulates fleets: many nodes on one machine, and faults at random. Prints Markdown tables.
//!
//! Build with `--release`, programs and simulation alike: `cargo xtask sim` does.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "tables and progress are what this program is for")]

mod faults;
mod fleet;
mod kernel;
mod load;
mod nodes;

use anyhow::Result;
use anyport_tests::{prerequisites, random};
use clap::{Parser, Subcommand};

/// Simulates fleets.
#[derive(Debug, Parser)]
struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// From publishing a set to the node that has it last, by the number of nodes.
    Fleet(fleet::Options),
    /// Faults at random in etcd, nodes and sockets, while clients dial.
    Faults(faults::Options),
}

fn main() -> Result<()> {
    let Options { what } = Options::parse();
    prerequisites::prepare()?;
    eprintln!("random choices: repeat them with ANYPORT_SEED={}", random::seed());
    match &what {
        What::Fleet(options) => fleet::fleet(options),
        What::Faults(options) => faults::faults(options),
    }
}
