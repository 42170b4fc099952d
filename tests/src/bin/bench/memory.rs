//! `bench memory`: what a daemon keeps of connections that are over.

use std::{thread, time::Duration};

use anyhow::{Context as _, Result};
use anyport_tests::holdings::Holdings;

use super::{
    proxies::{Kind, Lab, Proxy, Way},
    traffic::{leave_first_cpu, load, upstream::ECHO},
};

/// Bytes of a request, and of its answer.
const REQUEST: usize = 100;
/// Connections at a time.
const CONCURRENT: usize = 64;
/// What is given back late is given back by then.
const SETTLED: Duration = Duration::from_secs(2);

/// Options of `bench memory`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Connections that come and go, in all.
    #[arg(long, default_value_t = 1_000_000)]
    connections: u64,
}

/// The benchmark.
pub(crate) fn memory(options: &Options) -> Result<()> {
    leave_first_cpu()?;
    let lab = Lab::start(&Proxy::new(Kind::Anyport, None)?)?;
    let to = lab.target(Way::Tcp { port: ECHO, has_header: false });
    println!("| connections so far | private memory, KiB | BPF maps, KiB | descriptors |");
    println!("|---:|---:|---:|---:|");
    print(&lab, 0)?;
    let mut done = 0;
    // The first hundredth makes the daemon take what so many at a time need.
    for part in [options.connections / 100, options.connections / 2, options.connections] {
        lab.topology.client.enter(|| load::connect_often(to, REQUEST, CONCURRENT, part - done))?;
        done = part;
        thread::sleep(SETTLED);
        print(&lab, done)?;
    }
    println!();
    println!(
        "Connections through `forward`, each with a request of {REQUEST} bytes and its answer, {CONCURRENT} at a time. Private \
         pages, BPF maps and open descriptors of the daemon, {} s after the last of them has ended.",
        SETTLED.as_secs()
    );
    Ok(())
}

fn print(lab: &Lab, done: u64) -> Result<()> {
    let pid = lab.process().context("the daemon")?;
    let Holdings { descriptors, memory, maps } = Holdings::of(pid)?;
    println!("| {done} | {memory} | {maps} | {descriptors} |");
    Ok(())
}
