//! `bench apply`: what whole commands take, and what memory, by the number of rules.

use std::{
    collections::HashSet,
    fmt::{Display, Write as _},
    fs,
    io::{IsTerminal as _, stderr},
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use anyport::rules::Prefix;
use anyport_tests::{
    daemon::Daemon,
    holdings::Holdings,
    netns::Netns,
    plot::{self, Line, Panel},
    prefixes::Space,
    prerequisites,
    random::Random,
};

const SIZES: [usize; 4] = [1, 1_000, 100_000, 1_000_000];
const QUICK_SIZES: [usize; 3] = [1, 1_000, 100_000];

/// Seconds that a hard input may take.
const PATIENCE: &str = "60";

/// Options of `bench apply`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// A tenth of the rules.
    #[arg(long)]
    quick: bool,
    /// Where the plot is written.
    #[arg(long, default_value = "docs/bench-apply.svg")]
    plot: PathBuf,
}

/// What was measured with so many rules.
#[derive(Debug)]
struct Row {
    rules: usize,
    /// In seconds, in the order of [`COMMANDS`].
    times: [f64; 6],
    memory: Memory,
}

const COMMANDS: [&str; 6] = ["load", "the same again", "add one", "remove one", "list, JSON", "list, for people"];

/// What the daemon and its maps take, in MiB.
#[derive(Clone, Copy, Debug)]
struct Memory {
    resident: f64,
    proportional: f64,
    /// As `status` tells it.
    told: f64,
    /// As the kernel accounts for the maps that the daemon holds.
    locked: f64,
}

/// The benchmark.
pub(crate) fn apply(options: &Options) -> Result<()> {
    let sizes = if options.quick { &QUICK_SIZES[..] } else { &SIZES };
    let mut random = Random::new("apply");
    let mut rows = Vec::new();
    for &rules in sizes {
        progress(&format_args!("{rules} rules"));
        rows.push(measure(rules, &mut random)?);
    }
    print(&rows);
    plot(&rows, &options.plot)?;
    let many = sizes[sizes.len() - 1];
    routes(many)?;
    hurting(many, &mut random)
}

fn measure(rules: usize, random: &mut Random) -> Result<Row> {
    let prefixes = Space::V4.mixed(rules, random);
    let daemon = Daemon::start(&Netns::new(), "sk-lookup");
    let file = RuleFile::write(prefixes.iter().map(|prefix| format!("{prefix} both route=no")))?;
    let load = file.apply(&daemon)?;
    let again = median(3, || file.apply(&daemon))?;
    // Longer than all of the others, so that it is not there yet.
    let one = Space::V6.hosts(1, random)[0].to_string();
    let (mut add, mut remove) = (Vec::new(), Vec::new());
    for _ in 0..9 {
        add.push(timed(&daemon, &["add-prefix", &one, "--no-route"])?);
        remove.push(timed(&daemon, &["remove-prefix", &one])?);
    }
    let [add, remove] = [add, remove].map(|mut times| {
        times.sort_unstable();
        times[times.len() / 2]
    });
    let memory = memory(&daemon)?;
    let json = median(3, || timed(&daemon, &["prefixes", "--json"]))?;
    let human = median(3, || timed(&daemon, &["prefixes"]))?;
    let times = [load, again, add, remove, json, human].map(|time| time.as_secs_f64());
    Ok(Row { rules, times, memory })
}

/// A file of rules, a line each.
struct RuleFile {
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl RuleFile {
    fn write(lines: impl Iterator<Item = impl Display>) -> Result<Self> {
        let directory = prerequisites::scratch();
        let path = directory.path().join("rules");
        let mut text = String::new();
        for line in lines {
            writeln!(text, "{line}")?;
        }
        fs::write(&path, text)?;
        Ok(Self { path, _directory: directory })
    }

    fn apply(&self, daemon: &Daemon) -> Result<Duration> {
        timed(daemon, &["apply", "--force", self.path.to_str().context("a path of plain letters")?])
    }

    /// As [`Self::apply`], or why not: it is refused, or takes longer than [`PATIENCE`].
    fn try_to_apply(&self, daemon: &Daemon) -> Result<Result<Duration, String>> {
        let mut command = daemon.ctl_command(&["timeout", PATIENCE], &["apply", "--force"]);
        command.arg(&self.path).stdin(Stdio::null()).stdout(Stdio::null());
        let (output, time) = daemon.namespace().enter(|| {
            let begin = Instant::now();
            (command.output(), begin.elapsed())
        });
        let output = output?;
        Ok(match output.status.code() {
            Some(0) => Ok(time),
            Some(124) => Err(format!("not within {PATIENCE} s")),
            _ => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        })
    }
}

/// How long a command takes from its start to its end.
fn timed(daemon: &Daemon, arguments: &[&str]) -> Result<Duration> {
    let mut command = daemon.ctl_command(&[], arguments);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let (status, time) = daemon.namespace().enter(|| {
        let begin = Instant::now();
        (command.status(), begin.elapsed())
    });
    ensure!(status?.success(), "anyportctl {} failed", arguments.join(" "));
    Ok(time)
}

fn median(runs: usize, mut run: impl FnMut() -> Result<Duration>) -> Result<Duration> {
    let mut times = (0..runs).map(|_| run()).collect::<Result<Vec<_>>>()?;
    times.sort_unstable();
    Ok(times[runs / 2])
}

fn memory(daemon: &Daemon) -> Result<Memory> {
    let process = PathBuf::from(format!("/proc/{}", daemon.pid()));
    let rollup = fs::read_to_string(process.join("smaps_rollup"))?;
    let kilobytes = |name: &str| -> Result<f64> {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let number = line.and_then(|line| line.split_whitespace().next()).context("a number of kB")?;
        Ok(number.parse::<f64>()? / 1024.0)
    };
    let told = daemon.json("status")["bytes"].as_f64().context("status tells bytes")?;
    Ok(Memory {
        resident: kilobytes("Rss")?,
        proportional: kilobytes("Pss")?,
        told: mebibytes(told),
        locked: f64::from(u32::try_from(Holdings::of(daemon.pid())?.maps)?) / 1024.0,
    })
}

fn print(rows: &[Row]) {
    println!("| rules | {} |", COMMANDS.map(|name| format!("{name}, ms")).join(" | "));
    println!("|---:|{}", "---:|".repeat(COMMANDS.len()));
    for Row { rules, times, .. } in rows {
        println!("| {rules} | {} |", times.map(|time| format!("{:.1}", time * 1e3)).join(" | "));
    }
    println!("\n| rules | daemon RSS, MiB | PSS, MiB | maps by `status`, MiB | maps by memlock, MiB |");
    println!("|---:|---:|---:|---:|---:|");
    for Row { rules, memory: Memory { resident, proportional, told, locked }, .. } in rows {
        println!("| {rules} | {resident:.1} | {proportional:.1} | {told:.1} | {locked:.1} |");
    }
    println!();
}

fn plot(rows: &[Row], path: &Path) -> Result<()> {
    let line = |name: &str, value: &dyn Fn(&Row) -> f64| Line {
        name: name.to_owned(),
        points: rows.iter().map(|row| (as_float(row.rules), value(row))).collect(),
    };
    let times = COMMANDS.iter().enumerate().map(|(at, name)| line(name, &|row| row.times[at] * 1e3));
    let memory =
        [line("daemon, PSS", &|row| row.memory.proportional), line("maps, by memlock", &|row| row.memory.locked)];
    let panels = [
        Panel { title: "whole commands".to_owned(), x: "rules", y: "ms", lines: times.collect() },
        Panel { title: "memory".to_owned(), x: "rules", y: "MiB", lines: memory.into() },
    ];
    plot::write(path, "Commands and memory by the number of rules", &panels)
}

/// Rules whose routes can't be joined: every other address. Beside it, the kernel's own time for them.
fn routes(count: usize) -> Result<()> {
    println!("| {count} rules with a route each | s |\n|---|---:|");
    for (space, first, len) in [(Space::V4, 127 << 24, 32), (Space::V6, 0x2001_0db8 << 96, 128)] {
        progress(&format_args!("routes, {}", space.name()));
        let prefixes = (0..count as u128).map(|at| Prefix::from_bits(space.is_ipv4, first | at << 1, len));
        let namespace = Netns::new();
        let batch = RuleFile::write(prefixes.clone().map(|prefix| format!("route add local {prefix} dev lo")))?;
        let begin = Instant::now();
        namespace.run("ip", [if space.is_ipv4 { "-4" } else { "-6" }, "-batch", &batch.path.to_string_lossy()]);
        let kernel = begin.elapsed().as_secs_f64();
        drop(namespace);
        let daemon = Daemon::start(&Netns::new(), "sk-lookup");
        let file = RuleFile::write(prefixes.map(|prefix| format!("{prefix} both")))?;
        let load = file.apply(&daemon)?.as_secs_f64();
        let again = file.apply(&daemon)?.as_secs_f64();
        println!("| {}, `ip -batch` | {kernel:.2} |", space.name());
        println!("| {}, `anyportctl apply` | {load:.2} |", space.name());
        println!("| {}, the same again | {again:.2} |", space.name());
    }
    println!();
    Ok(())
}

/// Inputs that are hard on a table.
fn hurting(many: usize, random: &mut Random) -> Result<()> {
    println!("| rules | number | load, s | the same again, s | daemon RSS, MiB | maps by memlock, MiB |");
    println!("|---|---:|---:|---:|---:|---:|");
    let dense = (0..many as u128).map(|at| Prefix::from_bits(true, 127 << 24 | at, 32));
    let any_port = |prefix: Prefix| format!("{prefix} both route=no");
    hurt("/32s side by side", dense.map(any_port).collect())?;
    hurt("/32s scattered over 240.0.0.0/4", Space::RESERVED.hosts(many, random).into_iter().map(any_port).collect())?;
    hurt("/128s scattered over 2001:db8::/32", Space::V6.hosts(many, random).into_iter().map(any_port).collect())?;
    for space in [Space::RESERVED, Space::V6] {
        let what = format!("{} prefixes of every length, nested, each length with its port", space.name());
        hurt(&what, nested(space, many / 4, random))?;
    }
    let ports = (1..=u16::MAX).map(|port| format!("192.0.2.0/24 tcp {port} route=no"));
    hurt("single ports of one prefix", ports.collect())?;
    println!();
    Ok(())
}

/// All prefixes around random addresses. Each length has a port of its own, so that what is around a prefix matters
/// inside of it.
fn nested(space: Space, many: usize, random: &mut Random) -> Vec<String> {
    let mut seen = HashSet::new();
    while seen.len() < many {
        let host = space.hosts(1, random)[0];
        seen.extend((space.shortest()..=host.len()).map(|len| host.truncated(len)));
    }
    let lines = seen.into_iter().take(many);
    lines.map(|prefix| format!("{prefix} both {} route=no", 1_000 + u16::from(prefix.len()))).collect()
}

fn hurt(what: &str, lines: Vec<String>) -> Result<()> {
    progress(&what);
    let daemon = Daemon::start(&Netns::new(), "sk-lookup");
    let number = lines.len();
    let file = RuleFile::write(lines.into_iter())?;
    let load = match file.try_to_apply(&daemon)? {
        Ok(time) => time,
        Err(why) => {
            println!("| {what} | {number} | {why} | – | – | – |");
            return Ok(());
        }
    };
    let load = load.as_secs_f64();
    let again = file.apply(&daemon)?.as_secs_f64();
    let Memory { resident, locked, .. } = memory(&daemon)?;
    println!("| {what} | {number} | {load:.2} | {again:.2} | {resident:.0} | {locked:.0} |");
    Ok(())
}

fn progress(what: &dyn Display) {
    if stderr().is_terminal() {
        eprintln!("{what}");
    }
}

fn mebibytes(bytes: f64) -> f64 {
    bytes / f64::from(1 << 20)
}

#[expect(clippy::cast_precision_loss, reason = "some millions at most")]
fn as_float(number: usize) -> f64 {
    number as f64
}
