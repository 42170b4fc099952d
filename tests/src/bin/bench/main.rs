//! Measures what steering and forwarding cost. Prints Markdown tables.
//!
//! Build with `--release`, programs and benchmark alike: `cargo xtask bench` does.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "tables and progress are what this program is for")]

mod accept;
mod add_prefix;
mod apply;
mod connect;
mod forward;
mod lookup;
mod memory;
mod proxies;
mod relay;
mod samples;
mod subjects;
mod traffic;
mod udp;

use std::{net::IpAddr, thread, time::Duration};

use anyhow::Result;
use anyport_tests::prerequisites;
use clap::{Parser, Subcommand};

/// The back ends of anyport.
const BACKENDS: [&str; 3] = ["sk-lookup", "tc", "tproxy"];

/// Measures anyport.
#[derive(Debug, Parser)]
struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// TCP connect latency over loopback, as ratios to a socket bound to the very address and port.
    Connect(connect::Options),
    /// Wall time of a whole `anyportctl add-prefix` command.
    AddPrefix(add_prefix::Options),
    /// Cost of a lookup in the kernel by the number of rules, beside an LPM trie.
    Lookup(lookup::Options),
    /// Time and memory of whole commands by the number of rules.
    Apply(apply::Options),
    /// The handler `forward` beside HAProxy and nginx.
    Forward(forward::Options),
    /// What a daemon keeps of connections that are over.
    Memory(memory::Options),
    /// Datagrams through the handler `forward` beside nginx.
    Udp(udp::Options),
    /// Ways to move data from one TCP connection to another.
    Relay(relay::Options),
    /// The handler `discard` beside a bare accept loop.
    Accept(accept::Options),
    /// Accepts, reads to the end and forgets.
    #[command(hide = true)]
    Sink(connect::Sink),
    /// One of the ways to move data, at work.
    #[command(hide = true)]
    RelayBy(relay::RelayBy),
    /// A bare accept loop.
    #[command(hide = true)]
    Loop(accept::Loop),
    /// The server behind the proxies.
    #[command(hide = true)]
    Upstream {
        /// Where it listens.
        #[arg(long)]
        address: IpAddr,
    },
}

fn main() -> Result<()> {
    let what = Options::parse().what;
    match &what {
        What::Sink(sink) => return connect::sink(sink),
        What::RelayBy(relay) => return relay::relay_by(relay),
        What::Loop(options) => return accept::run_loop(options),
        What::Upstream { address } => return traffic::upstream::serve(*address),
        _ => prerequisites::prepare()?,
    }
    match &what {
        What::Connect(options) => connect::connect(options),
        What::AddPrefix(options) => add_prefix::add_prefix(options),
        What::Lookup(options) => lookup::lookup(options),
        What::Apply(options) => apply::apply(options),
        What::Forward(options) => forward::forward(options),
        What::Memory(options) => memory::memory(options),
        What::Udp(options) => udp::udp(options),
        What::Relay(options) => relay::relay(options),
        What::Accept(options) => accept::accept(options),
        What::Sink(_) | What::RelayBy(_) | What::Loop(_) | What::Upstream { .. } => Ok(()),
    }
}

/// CPUs, which is also how many members anyport's groups of listening sockets have.
fn cpus() -> Result<usize> {
    Ok(thread::available_parallelism()?.get())
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
