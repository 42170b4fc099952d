//! `bench lookup`: what a run of the program costs, by the number of rules.

use std::{
    io::{IsTerminal as _, stderr},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use anyport::{
    rules::{Prefix, Protocol, RuleSpec},
    sys::bpf::run_sk_lookup,
};
use anyport_common::flow::Transport;
use anyport_tests::{
    plot::{self, Line, Panel},
    prefixes::{Space, address},
    random::Random,
};
use aya::sys::{Stats, enable_stats};
use socket2::{Domain, Socket, Type};

use super::subjects::{Program, Rules, Subject, question};

const SIZES: [usize; 5] = [1, 1_000, 10_000, 100_000, 1_000_000];
const QUICK_SIZES: [usize; 3] = [1, 1_000, 1_000_000];
/// Rules that are for some ports only.
const PORTS: &str = "80,443,8000-8999";
const EXCEPT: &str = "8080";
/// A trie has an entry for each port, so that there can't be more prefixes with so many of them.
const TRIE_ENTRIES: usize = 2_000_000;

/// Options of `bench lookup`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Less of everything, within a minute.
    #[arg(long)]
    quick: bool,
    /// Numbers of prefixes.
    #[arg(long, value_delimiter = ',')]
    sizes: Option<Vec<usize>>,
    /// Rounds; in each, every program is measured once.
    #[arg(long)]
    rounds: Option<usize>,
    /// Where the plot is written.
    #[arg(long, default_value = "docs/bench-lookup.svg")]
    plot: PathBuf,
}

/// What is measured of a program, in nanoseconds a run.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// The same key again and again.
    Hot,
    /// TCP connections to random addresses.
    Tcp,
    /// Datagrams to random addresses.
    Udp,
}

impl Way {
    const ALL: [Self; 3] = [Self::Hot, Self::Tcp, Self::Udp];

    fn title(self) -> &'static str {
        match self {
            Self::Hot => "The same key again and again",
            Self::Tcp => "TCP connections to random addresses",
            Self::Udp => "Datagrams to random addresses",
        }
    }
}

/// Rules, and what their programs cost: medians for each way and program.
#[derive(Debug)]
struct Row {
    space: Space,
    has_ports: bool,
    size: usize,
    /// By [`Way`] and [`Program`].
    medians: [[Option<f64>; 4]; 3],
}

impl Row {
    /// What a program costs, less what the empty one does.
    fn net(&self, way: Way, program: Program) -> Option<f64> {
        let of = |program: Program| self.medians[way as usize][program as usize];
        Some((of(program)? - of(Program::Empty)?).max(1.0))
    }

    fn is_of(&self, space: Space, has_ports: bool) -> bool {
        self.space.is_ipv4 == space.is_ipv4 && self.has_ports == has_ports
    }
}

/// The benchmark.
pub(crate) fn lookup(options: &Options) -> Result<()> {
    let _statistics = enable_stats(Stats::RunTime).context("have the kernel time BPF programs")?;
    let mut rows = Vec::new();
    let usual = if options.quick { &QUICK_SIZES[..] } else { &SIZES };
    let sizes = options.sizes.clone().unwrap_or_else(|| usual.to_vec());
    let rounds = options.rounds.unwrap_or(if options.quick { 5 } else { 31 });
    let largest = sizes.iter().copied().max().unwrap_or_default();
    for space in [Space::V4, Space::V6] {
        let mut random = Random::new(space.name());
        let all = space.mixed(largest, &mut random);
        for has_ports in [false, true] {
            for &size in &sizes {
                // The trie alone takes seconds to fill.
                if options.quick && has_ports && size > 1 {
                    continue;
                }
                if stderr().is_terminal() {
                    eprintln!("{}, {size} prefixes{}", space.name(), if has_ports { ", some ports" } else { "" });
                }
                rows.push(measure(space, has_ports, &all[..size], rounds, &mut random)?);
            }
        }
    }
    print(&rows, rounds);
    plot(&rows, &options.plot)
}

fn print(rows: &[Row], rounds: usize) {
    for way in Way::ALL {
        println!("### {}\n", way.title());
        println!(
            "| rules | prefixes | empty | LPM trie | one load | anyport | trie, net | one load, net | anyport, net | \
             trie / anyport | growth |"
        );
        println!("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|");
        for row in rows {
            let cost = |program: Program| number(row.medians[way as usize][program as usize], 0);
            let [trie, load, anyport] =
                [Program::Trie, Program::Load, Program::Anyport].map(|program| row.net(way, program));
            let Some(anyport) = anyport else { continue };
            let first =
                rows.iter().find(|it| it.is_of(row.space, row.has_ports)).and_then(|it| it.net(way, Program::Anyport));
            println!(
                "| {}, {} | {} | {} | {} | {} | {} | {} | {} | {anyport:.0} | {} | {} |",
                row.space.name(),
                if row.has_ports { "some ports" } else { "any port" },
                row.size,
                cost(Program::Empty),
                cost(Program::Trie),
                cost(Program::Load),
                cost(Program::Anyport),
                number(trie, 0),
                number(load, 0),
                number(trie.map(|trie| trie / anyport), 2),
                number(first.map(|first| anyport / first), 2),
            );
        }
        println!();
    }
    println!(
        "Nanoseconds a run, medians of {rounds} rounds; in each, every program is measured once, in random order and in \
         a network namespace of its own, with the same addresses. *Net* is what is left when the empty program's time \
         is taken off, which is what the kernel's statistics themselves cost; *growth* is net, against the smallest \
         number of prefixes. Some ports: TCP {PORTS} except {EXCEPT}, of which the trie needs an entry for each."
    );
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or("–".to_owned(), |value| format!("{value:.digits$}"))
}

fn plot(rows: &[Row], path: &Path) -> Result<()> {
    let panels = [(Space::V4, Way::Tcp), (Space::V6, Way::Tcp), (Space::V4, Way::Udp), (Space::V6, Way::Udp)];
    let panels = panels.map(|(space, way)| {
        let line = |program: Program, has_ports: bool, name: &str| {
            let rows = rows.iter().filter(|row| row.is_of(space, has_ports));
            #[expect(clippy::cast_precision_loss, reason = "some millions at most")]
            let points = rows.filter_map(|row| Some((row.size as f64, row.net(way, program)?))).collect();
            Line { name: name.to_owned(), points }
        };
        let lines = [
            line(Program::Trie, false, "LPM trie"),
            line(Program::Load, false, "one load"),
            line(Program::Anyport, false, "anyport"),
            line(Program::Trie, true, "LPM trie, some ports"),
            line(Program::Anyport, true, "anyport, some ports"),
        ];
        let title = format!("{}, {}", way.title(), space.name());
        let lines = lines.into_iter().filter(|line| !line.points.is_empty()).collect();
        Panel { title, x: "prefixes", y: "ns a lookup, net of the empty program", lines }
    });
    plot::write(path, "Cost of a lookup by the number of prefixes", &panels)
}

fn measure(space: Space, has_ports: bool, prefixes: &[Prefix], rounds: usize, random: &mut Random) -> Result<Row> {
    let mut terms = RuleSpec { protocol: Protocol::Both, route: false, ..RuleSpec::default() };
    if has_ports {
        terms = RuleSpec { protocol: Protocol::Tcp, ports: PORTS.parse()?, except: EXCEPT.parse()?, ..terms };
    }
    let rules = Rules { space, prefixes: prefixes.to_vec(), terms: Arc::new(terms) };
    let is_too_large = rules.trie_ports().len() * prefixes.len() > TRIE_ENTRIES;
    let mut subjects = Vec::new();
    for program in Program::ALL {
        if program == Program::Trie && is_too_large {
            continue;
        }
        subjects.push(Subject::start(program, &rules).with_context(|| format!("start the program {program:?}"))?);
    }
    let mut samples: [[Vec<f64>; 4]; 3] = Default::default();
    let mut order: Vec<usize> = (0..subjects.len()).collect();
    for round in 0..=rounds {
        random.shuffle(&mut order);
        for way in Way::ALL {
            if has_ports && matches!(way, Way::Udp) {
                continue;
            }
            let count = match way {
                Way::Hot => 1,
                Way::Tcp => 2_000,
                Way::Udp => 8_000,
            };
            let targets: Vec<SocketAddr> = (0..count).map(|_| target(&rules, random)).collect();
            for &index in &order {
                let subject = &subjects[index];
                let cost = subject.namespace.enter(|| match way {
                    Way::Hot => hot(subject, targets[0]),
                    Way::Tcp => traffic(subject, &targets, connect),
                    Way::Udp => traffic(subject, &targets, send),
                })?;
                // The first round warms up and is forgotten.
                if round > 0 {
                    samples[way as usize][subject.program as usize].push(cost);
                }
            }
        }
    }
    let medians = samples.map(|of_way| of_way.map(median));
    drop(subjects);
    // The kernel takes a large trie apart in the background.
    thread::sleep(Duration::from_millis(u64::try_from(prefixes.len() / 500)?));
    Ok(Row { space, has_ports, size: prefixes.len(), medians })
}

/// Any address and port that is steered.
fn target(rules: &Rules, random: &mut Random) -> SocketAddr {
    let address = address(random.pick(&rules.prefixes), random);
    let port = match rules.trie_ports()[..] {
        [0] => random.port(),
        ref ports => *random.pick(ports),
    };
    SocketAddr::new(address, port)
}

fn hot(subject: &Subject, target: SocketAddr) -> Result<f64> {
    let ran = run_sk_lookup(subject.fd(), &mut question(target, Transport::Tcp), 200_000)?;
    Ok(f64::from(ran.nanoseconds))
}

/// What the program costs while there is traffic. The first quarter warms up.
fn traffic(subject: &Subject, targets: &[SocketAddr], act: fn(&Subject, &[SocketAddr]) -> Result<()>) -> Result<f64> {
    let targets: Vec<SocketAddr> = match subject.sockets.port {
        Some(port) => targets.iter().map(|target| SocketAddr::new(target.ip(), port)).collect(),
        None => targets.to_vec(),
    };
    let (warm, counted) = targets.split_at(targets.len() / 4);
    act(subject, warm)?;
    let (time, runs) = subject.ran()?;
    act(subject, counted)?;
    let (time_after, runs_after) = subject.ran()?;
    let (time, runs) = (time_after - time, runs_after - runs);
    ensure!(runs >= counted.len() as u64, "{subject:?} ran {runs} times for {} packets", counted.len());
    #[expect(clippy::cast_precision_loss, reason = "a mean of some hundred nanoseconds")]
    Ok(time as f64 / runs as f64)
}

/// Connects to each, and forgets the connection.
fn connect(subject: &Subject, targets: &[SocketAddr]) -> Result<()> {
    for target in targets {
        let client = Socket::new(domain(target.ip()), Type::STREAM, None)?;
        // A reset leaves nothing in TIME_WAIT, so that ports don't run out.
        client.set_linger(Some(Duration::ZERO))?;
        client.connect(&(*target).into()).with_context(|| format!("{subject:?}: connect to {target}"))?;
        drop(client);
        drop(subject.sockets.tcp.accept()?);
    }
    Ok(())
}

/// Sends a datagram to each.
fn send(subject: &Subject, targets: &[SocketAddr]) -> Result<()> {
    let client = Socket::new(domain(targets[0].ip()), Type::DGRAM, None)?;
    for target in targets {
        client.send_to(b"x", &(*target).into()).with_context(|| format!("{subject:?}: send to {target}"))?;
    }
    Ok(())
}

fn domain(address: IpAddr) -> Domain {
    if address.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 }
}

fn median(mut samples: Vec<f64>) -> Option<f64> {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied()
}
