//! `sim fleet`: from publishing a set to the node that has it last.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use anyport::fleet::{self, settings::ConnectionSettings};
use anyport_tests::{
    etcd::Etcd,
    netns::Netns,
    numbers::{count, median},
    plot::{self, Line, Panel},
    prefixes::Space,
    prerequisites::{program, scratch},
    random::Random,
};
use tokio::runtime::Builder;

use crate::{
    load::Load,
    nodes::{Nodes, RING},
};

/// How long it is watched what a fleet costs to which nothing happens.
const REST: Duration = Duration::from_secs(20);
/// How long a burst may take to be over.
const CALM: Duration = Duration::from_secs(3);
/// How often it is looked who has reported.
const GLANCE: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_mins(2);

/// Options of `sim fleet`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Numbers of nodes, rising.
    #[arg(long, value_delimiter = ',', default_value = "10,100,1000")]
    nodes: Vec<usize>,
    /// Rules of a set.
    #[arg(long, default_value_t = 10_000)]
    rules: usize,
    /// Rules that each set has in place of others of the set before.
    #[arg(long, default_value_t = 100)]
    changed: usize,
    /// Sets that are published for each number of nodes.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Where etcd has its files; on a disk, it waits for that [default: in memory]
    #[arg(long)]
    data: Option<PathBuf>,
    /// Where the plot is written.
    #[arg(long, default_value = "docs/sim-fleet.svg")]
    plot: PathBuf,
}

/// What is measured when a set is published. Times are seconds, from the start of the command.
const PUBLISHED: [&str; 9] = [
    "command, s",
    "first node, s",
    "half of them, s",
    "last node, s",
    "all reports, s",
    "CPU of a node, ms",
    "CPU of etcd, s",
    "etcd sends a node, KiB",
    "waits for disks",
];
/// The place of the time until the last node.
const LAST: usize = 3;
/// And what is when nothing happens, a second.
const AT_REST: [&str; 4] = ["CPU of etcd, %", "CPU of the nodes, %", "messages to etcd", "KiB from etcd"];

/// Medians with so many nodes.
#[derive(Debug)]
struct Row {
    nodes: usize,
    /// Seconds until all who had come had the set that was there.
    joined: f64,
    published: [f64; PUBLISHED.len()],
    at_rest: [f64; AT_REST.len()],
}

struct Fleet {
    namespace: Netns,
    etcd: Etcd,
    nodes: Nodes,
    files: tempfile::TempDir,
    rules: Vec<String>,
    random: Random,
    sequence: u64,
}

/// The simulation.
pub(crate) fn fleet(options: &Options) -> Result<()> {
    ensure!(options.nodes.is_sorted(), "the numbers of nodes must rise");
    let namespace = Netns::new();
    let etcd = match &options.data {
        Some(directory) => Etcd::three_in(&namespace, directory),
        None => Etcd::three(&namespace),
    };
    let nodes = Nodes::new(&namespace, &etcd)?;
    let mut random = Random::new("fleet");
    let rules = Space::V6.mixed(options.rules, &mut random).iter().map(ToString::to_string).collect();
    let mut fleet = Fleet { namespace, etcd, nodes, files: scratch(), rules, random, sequence: 0 };
    fleet.publish()?;
    let mut rows = Vec::new();
    for &nodes in &options.nodes {
        rows.push(fleet.measure(nodes, options)?);
    }
    print(&rows, options);
    plot(&rows, &options.plot)
}

impl Fleet {
    fn measure(&mut self, nodes: usize, options: &Options) -> Result<Row> {
        eprintln!("{nodes} nodes");
        let begin = Instant::now();
        self.nodes.grow_to(nodes)?;
        let times = self.nodes.wait_for(self.sequence);
        let joined = times.last().map_or(0.0, |last| seconds(*last - begin));
        self.wait_for_reports(nodes)?;
        let mut rounds = Vec::new();
        for _ in 0..options.rounds {
            sleep(CALM);
            let round = self.round(nodes, options.changed)?;
            eprintln!("  {round:.3?}");
            rounds.push(round);
        }
        sleep(CALM);
        let published = std::array::from_fn(|column| median(rounds.iter().map(|round| round[column])));
        Ok(Row { nodes, joined, published, at_rest: self.at_rest()? })
    }

    /// Publishes another set, and sees what comes of it.
    fn round(&mut self, nodes: usize, changed: usize) -> Result<[f64; PUBLISHED.len()]> {
        for _ in 0..changed {
            let at = self.random.below(self.rules.len());
            // Longer than all of the others, so that it is not there yet.
            self.rules[at] = Space::V6.hosts(1, &mut self.random)[0].to_string();
        }
        let before = Load::now(&self.namespace, &self.etcd)?;
        let begin = Instant::now();
        self.publish()?;
        let command = begin.elapsed().as_secs_f64();
        let times = self.nodes.wait_for(self.sequence);
        let [first, half, last] = [0, times.len() / 2, times.len() - 1].map(|at| seconds(times[at] - begin));
        self.wait_for_reports(nodes)?;
        let reported = seconds(begin.elapsed());
        let used = Load::now(&self.namespace, &self.etcd)?.since(&before);
        let each = count(nodes);
        let (node, etcd) = (seconds(used.nodes) * 1e3 / each, seconds(used.etcd));
        Ok([command, first, half, last, reported, node, etcd, used.sent / 1024.0 / each, used.syncs])
    }

    /// Has the ring point to a set of the rules as they are.
    fn publish(&mut self) -> Result<()> {
        let file = self.files.path().join("set");
        let mut text = String::new();
        for prefix in &self.rules {
            writeln!(text, "{prefix} both 80,443")?;
        }
        fs::write(&file, text)?;
        let mut command = Command::new(program("anyportctl").map_err(anyhow::Error::msg)?);
        command.env("ANYPORT_CONFIG", "/dev/null").args(["fleet", "publish"]).arg(file);
        command.args(["--ring", RING, "--force", "--etcd", &self.etcd.urls()]);
        let outcome = self.namespace.output(&mut command);
        ensure!(outcome.status == 0, "publish: {outcome}");
        self.sequence += 1;
        Ok(())
    }

    /// Waits until etcd has what all nodes report of the set.
    fn wait_for_reports(&self, nodes: usize) -> Result<()> {
        let ring = RING.parse()?;
        let urls = self.etcd.urls().split(',').map(str::to_owned).collect();
        let settings = ConnectionSettings { etcd: urls, ..ConnectionSettings::default() };
        let runtime = Builder::new_current_thread().enable_all().build()?;
        self.namespace.enter(|| {
            runtime.block_on(async {
                let etcd = fleet::etcd::Etcd::connect(&settings.read()?, PATIENCE).await?;
                let end = Instant::now() + PATIENCE;
                while Instant::now() < end {
                    let seen = etcd.ring(&ring).await?;
                    let reports = seen.nodes.iter().filter_map(|node| node.report.as_ref());
                    if reports.filter(|report| report.sequence == self.sequence).count() == nodes {
                        return Ok(());
                    }
                    tokio::time::sleep(GLANCE).await;
                }
                bail!("not all of {nodes} nodes have reported within {PATIENCE:?}")
            })
        })
    }

    /// What is used while nothing happens.
    fn at_rest(&self) -> Result<[f64; AT_REST.len()]> {
        let (begin, before) = (Instant::now(), Load::now(&self.namespace, &self.etcd)?);
        sleep(REST);
        let used = Load::now(&self.namespace, &self.etcd)?.since(&before);
        let time = seconds(begin.elapsed());
        let percent = |it: Duration| 100.0 * seconds(it) / time;
        Ok([percent(used.etcd), percent(used.nodes), used.messages / time, used.sent / 1024.0 / time])
    }
}

fn print(rows: &[Row], Options { rules, changed, rounds, data, .. }: &Options) {
    println!("| nodes | {} |", PUBLISHED.join(" | "));
    println!("|---:|{}", "---:|".repeat(PUBLISHED.len()));
    for Row { nodes, published, .. } in rows {
        let cells: Vec<_> = published.iter().map(|value| figure(*value)).collect();
        println!("| {nodes} | {} |", cells.join(" | "));
    }
    println!("\n| nodes | all at once come and have the set, s | {} |", AT_REST.join(" | "));
    println!("|---:|---:|{}", "---:|".repeat(AT_REST.len()));
    for Row { nodes, joined, at_rest, .. } in rows {
        let cells: Vec<_> = at_rest.iter().map(|value| figure(*value)).collect();
        println!("| {nodes} | {} | {} |", figure(*joined), cells.join(" | "));
    }
    let place = if data.is_some() { "on a disk" } else { "in memory" };
    println!(
        "\nSets of {rules} rules, of which {changed} are other ones than before; medians of {rounds} of them. Times are from the start \
         of `anyportctl fleet publish`. Three members of etcd, with their files {place}, the command, and all nodes share this machine. \
         At rest: a second, over {} s.",
        REST.as_secs()
    );
}

/// Three digits that count.
fn figure(value: f64) -> String {
    match value {
        ..10.0 => format!("{value:.2}"),
        ..100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

fn plot(rows: &[Row], path: &Path) -> Result<()> {
    let points = |of: &dyn Fn(&Row) -> f64| rows.iter().map(|row| (count(row.nodes), of(row))).collect();
    let line = |name: &str, of: &dyn Fn(&Row) -> f64| Line { name: name.into(), points: points(of) };
    let panels = [
        Panel {
            title: "From the command to nodes that have the set".into(),
            x: "nodes",
            y: "s",
            lines: vec![
                line("the first", &|row| row.published[LAST - 2]),
                line("half of them", &|row| row.published[LAST - 1]),
                line("the last", &|row| row.published[LAST]),
                line("all reports", &|row| row.published[LAST + 1]),
            ],
        },
        Panel {
            title: "Processor time of a set".into(),
            x: "nodes",
            y: "s",
            lines: vec![
                line("of etcd", &|row| row.published[LAST + 3]),
                line("of all nodes", &|row| row.published[LAST + 2] * count(row.nodes) / 1e3),
            ],
        },
    ];
    plot::write(path, "A set on its way to the nodes of a fleet", &panels)
}

fn seconds(time: Duration) -> f64 {
    time.as_secs_f64()
}
