//! `bench add-prefix`: a whole command.

use std::{process::Stdio, time::Instant};

use anyhow::{Context as _, Result, bail};
use anyport_tests::{daemon::Daemon, netns::Netns, numbers::percentile};

use super::{BACKENDS, micros};

/// Options of `bench add-prefix`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Commands for each back end.
    #[arg(long, default_value_t = 200)]
    runs: u16,
}

/// The benchmark `add-prefix`.
pub(crate) fn add_prefix(Options { runs }: &Options) -> Result<()> {
    println!("| back end | median ms | p99 ms | after the last one ms |");
    println!("|---|---:|---:|---:|");
    for backend in BACKENDS {
        let daemon = Daemon::start(&Netns::new(), backend);
        let mut samples = Vec::new();
        for run in 0..*runs {
            let prefix = format!("2001:db8:{run:x}::/48");
            let mut command = daemon.ctl_command(&[], &["add-prefix", &prefix]);
            command.stdin(Stdio::null()).stdout(Stdio::null());
            let (status, time) = daemon.namespace().enter(|| {
                let begin = Instant::now();
                (command.status(), begin.elapsed())
            });
            if !status?.success() {
                bail!("anyportctl add-prefix {prefix} failed with {backend}");
            }
            samples.push(time);
        }
        let last = samples.last().copied().context("no runs")?;
        let [median, p99] = [50, 99].map(|part| percentile(&mut samples, part));
        let [median, p99, last] = [median, p99, last].map(|time| micros(time) / 1_000.0);
        println!("| {backend} | {median:.2} | {p99:.2} | {last:.2} |");
    }
    println!();
    println!("Wall time of the whole command `anyportctl add-prefix PREFIX`, {runs} runs with a new prefix each.");
    Ok(())
}
