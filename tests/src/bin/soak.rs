//! `cargo xtask soak`: many restarts, upgrades and crashes of the daemon while clients dial all the time.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "its result is what it prints")]

use std::{
    path::Path,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use anyport_tests::{
    daemon::{Daemon, Setup},
    holdings::Holdings,
    host::wait_for,
    prerequisites::{self, program, public_copy, scratch},
    random::{self, Random},
    steady::{Loss, dial_during},
    topology::Topology,
};
use clap::Parser;
use nix::sys::signal::{Signal, kill};

const PREFIXES: [&str; 2] = ["192.0.2.0/24", "2001:db8:0:a::/64"];
/// How long a server may take to follow another one.
const PATIENCE: Duration = Duration::from_secs(30);

/// Restarts, upgrades and crashes under load.
#[derive(Debug, Parser)]
struct Options {
    /// Connections at least, for each back end.
    #[arg(long, default_value_t = 1_000_000)]
    connections: u64,
    /// How often each of the events happens.
    #[arg(long, default_value_t = 100)]
    events: u64,
    /// Clients that dial at the same time.
    #[arg(long, default_value_t = 4)]
    clients: usize,
    /// Back ends.
    #[arg(long, value_delimiter = ',', default_value = "sk-lookup,tc,tproxy")]
    steering: Vec<String>,
}

/// What happens to the daemon.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Event {
    /// The same program takes over.
    Restart,
    /// Another one does.
    Upgrade,
    /// The process that serves is killed.
    Crash,
}

fn main() -> Result<()> {
    let options = Options::parse();
    prerequisites::prepare()?;
    eprintln!("random choices: repeat them with ANYPORT_SEED={}", random::seed());
    println!(
        "| back end | connections | restarts, upgrades, crashes | refused | answered by another | reset before the first byte | \
         of these in crashes | descriptors before and after | private memory before and after, KiB | BPF maps before and after, KiB | minutes |"
    );
    println!("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|");
    let mut is_good = true;
    for steering in &options.steering {
        is_good &= soak(steering, &options)?;
    }
    if is_good { Ok(()) } else { bail!("connections were lost") }
}

fn soak(steering: &str, options: &Options) -> Result<bool> {
    let start = Instant::now();
    let topology = Topology::new();
    let directory = scratch();
    let daemon = Setup::new(&topology.host, steering).start();
    daemon.ok(&format!("add-prefix {} --protocol both", PREFIXES.join(" ")));
    let versions = ["anyportd-one", "anyportd-two"].map(|name| directory.path().join(name));
    for version in &versions {
        public_copy(&program("anyportd").map_err(anyhow::Error::msg)?, version);
    }
    let mut random = Random::new(steering);
    // The first server of a program has not touched all of its memory yet.
    let warm_up = options.connections / 100;
    dial_during(&topology.client, &PREFIXES, options.clients, |served| wait_until(served, warm_up));
    let before = Holdings::of(daemon.pid())?;
    let mut events = [Event::Restart, Event::Upgrade, Event::Crash].repeat(usize::try_from(options.events)?);
    random.shuffle(&mut events);
    let between = options.connections / (events.len() as u64 + 1);
    let mut crashes = Vec::new();
    let tally = dial_during(&topology.client, &PREFIXES, options.clients, |served| {
        for (number, event) in (1..).zip(&events) {
            wait_until(served, between * number);
            sleep(Duration::from_micros(random.below(20_000) as u64));
            if *event == Event::Crash {
                crashes.push(Instant::now());
            }
            happen(&daemon, *event, &versions[random.below(2)]);
        }
        wait_until(served, options.connections);
    });
    wait_for("end of the servers that were replaced", PATIENCE, || {
        let servers = daemon.servers();
        if servers.len() == 1 { Ok(()) } else { Err(format!("{servers:?}")) }
    });
    let after = Holdings::of(daemon.pid())?;
    let of_crashes = tally.lost_in(&crashes);
    let [refused, misdirected, unanswered] =
        [Loss::Refused, Loss::Misdirected, Loss::Unanswered].map(|loss| tally.count(loss));
    println!(
        "| {steering} | {} | {1}, {1}, {1} | {refused} | {misdirected} | {unanswered} | {of_crashes} | {2}, {3} | {4}, {5} | {6}, {7} | {8:.1} |",
        tally.served,
        options.events,
        before.descriptors,
        after.descriptors,
        before.memory,
        after.memory,
        before.maps,
        after.maps,
        start.elapsed().as_secs_f64() / 60.0,
    );
    for failure in tally.failures.iter().take(20) {
        eprintln!("{failure}");
    }
    Ok(refused == 0 && misdirected == 0 && unanswered == of_crashes)
}

fn wait_until(served: &AtomicU64, count: u64) {
    let mut last = (served.load(Relaxed), Instant::now());
    while served.load(Relaxed) < count {
        let now = served.load(Relaxed);
        if now > last.0 {
            last = (now, Instant::now());
        }
        assert!(last.1.elapsed() < PATIENCE, "no connection has been served for {PATIENCE:?}");
        sleep(Duration::from_millis(1));
    }
}

fn happen(daemon: &Daemon, event: Event, version: &Path) {
    let before = daemon.pid();
    match event {
        Event::Restart => kill(daemon.keeper(), Signal::SIGUSR2).expect("SIGUSR2 to the keeper"),
        Event::Crash => kill(before, Signal::SIGKILL).expect("SIGKILL to the server"),
        Event::Upgrade => {
            let outcome = daemon.take_over(version);
            assert!(outcome.status == 0, "upgrade: {outcome}");
        }
    }
    daemon.wait_for_successor(before);
}
