//! `bench forward`: the handler `forward` beside HAProxy and nginx.

use std::{
    io::{IsTerminal as _, stderr},
    thread,
    time::Duration,
};

use anyhow::Result;
use anyport_tests::{
    numbers::{median, percentile},
    random::Random,
};

use super::{
    micros,
    proxies::{Kind, Lab, target},
    traffic::{
        CpuTime, leave_first_cpu,
        load::{self, Load},
    },
};

/// The loads of every proxy.
const LOADS: [Load; 3] = [Load::Connections, Load::Requests, Load::Bulk];

/// Options of `bench forward`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Rounds; in each, every proxy is measured once.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Milliseconds of each load.
    #[arg(long, default_value_t = 500)]
    slice: u64,
    /// Connections whose memory is measured.
    #[arg(long, default_value_t = 4_000)]
    idle: usize,
}

/// Bytes of a request, and of its answer.
const REQUEST: usize = 100;
/// Connections that ask at the same time.
const CONCURRENT: usize = 64;
/// Connections that read at the same time.
const READERS: usize = 4;
/// Requests of which the time is taken in a round.
const TIMED: usize = 500;

/// What was measured of a proxy by one way, with or without PROXY header.
#[derive(Debug)]
struct Subject {
    kind: Kind,
    has_header: bool,
    /// By [`Load`]: what is counted in a second, for each round.
    rates: [Vec<f64>; 3],
    /// By [`Load`]: microseconds of processor time of the proxy for one of what is counted, or for a MiB.
    costs: [Vec<f64>; 3],
    latencies: Vec<Duration>,
    /// Bytes for an idle connection.
    memory: f64,
}

/// The benchmark.
pub(crate) fn forward(options: &Options) -> Result<()> {
    leave_first_cpu()?;
    let lab = Lab::start()?;
    let kinds = Kind::ALL.into_iter().flat_map(|kind| [false, true].map(|has_header| (kind, has_header)));
    let mut subjects: Vec<Subject> = kinds
        .filter(|it| *it != (Kind::Direct, true))
        .map(|(kind, has_header)| Subject {
            kind,
            has_header,
            rates: Default::default(),
            costs: Default::default(),
            latencies: Vec::new(),
            memory: 0.0,
        })
        .collect();
    let mut random = Random::new("forward");
    let mut order: Vec<usize> = (0..subjects.len()).collect();
    // The first round warms up and is forgotten.
    for round in 0..=options.rounds {
        random.shuffle(&mut order);
        for &index in &order {
            measure(&lab, &mut subjects[index], Duration::from_millis(options.slice), round > 0)?;
        }
        if stderr().is_terminal() {
            eprint!("\rround {round} of {} ", options.rounds);
        }
    }
    drop(lab);
    for subject in subjects.iter_mut().filter(|it| it.kind != Kind::Direct) {
        // A proxy that has had as many connections before has memory for them.
        subject.memory = idle_memory(&Lab::start()?, subject, options.idle)?;
    }
    print(&mut subjects, options);
    Ok(())
}

fn measure(lab: &Lab, subject: &mut Subject, slice: Duration, counts: bool) -> Result<()> {
    let Subject { kind, has_header, rates, costs, latencies, .. } = subject;
    for load in LOADS {
        let to = target(*kind, load, *has_header);
        let clients = if load == Load::Bulk { READERS } else { CONCURRENT };
        let time = CpuTime::of(lab.process(*kind))?;
        let rate = lab.topology.client.enter(|| load::rate(load, to, REQUEST, clients, slice))?;
        let used = time.used()?;
        if counts {
            let unit = if load == Load::Bulk { 1_048_576.0 } else { 1.0 };
            rates[load as usize].push(rate);
            costs[load as usize].push(used / (rate * (slice + load::WARM_UP).as_secs_f64() / unit));
        }
    }
    let to = target(*kind, Load::Requests, *has_header);
    let times = lab.topology.client.enter(|| load::latencies(to, REQUEST, TIMED))?;
    if counts {
        latencies.extend(times);
    }
    Ok(())
}

fn idle_memory(lab: &Lab, subject: &Subject, count: usize) -> Result<f64> {
    let to = target(subject.kind, Load::Requests, subject.has_header);
    let before = lab.memory(subject.kind)?;
    let idle = lab.topology.client.enter(|| load::idle(to, REQUEST, count))?;
    // What was taken for the last requests is given back.
    thread::sleep(Duration::from_secs(1));
    let now = lab.memory(subject.kind)?;
    drop(idle);
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    Ok(now.saturating_sub(before) as f64 / count as f64)
}

/// The median of the rounds' ratios to the better of HAProxy and nginx in the same round.
fn ratio(subjects: &[Subject], subject: &Subject, load: Load) -> Option<f64> {
    let rates = |kind| {
        let other = subjects.iter().find(|it| it.kind == kind && it.has_header == subject.has_header)?;
        Some(&other.rates[load as usize])
    };
    let (haproxy, nginx) = (rates(Kind::HaProxy)?, rates(Kind::Nginx)?);
    let better = haproxy.iter().zip(nginx).map(|(haproxy, nginx)| haproxy.max(*nginx));
    let own = &subject.rates[load as usize];
    Some(median(own.iter().zip(better).map(|(own, better)| own / better)))
}

fn print(subjects: &mut [Subject], options: &Options) {
    println!("| proxy | PROXY header | connections/s | ratio | requests/s | ratio | Gbit/s | ratio |");
    println!("|---|---|---:|---:|---:|---:|---:|---:|");
    for subject in &*subjects {
        let [connections, requests, bulk] = LOADS.map(|load| median(subject.rates[load as usize].iter().copied()));
        let [r0, r1, r2] = LOADS.map(|load| match ratio(subjects, subject, load) {
            Some(ratio) if subject.kind != Kind::Direct => format!("{ratio:.2}"),
            _ => "–".to_owned(),
        });
        let (kind, header) = (subject.kind, header(subject));
        let gbit = bulk * 8.0 / 1e9;
        println!("| {kind} | {header} | {connections:.0} | {r0} | {requests:.0} | {r1} | {gbit:.1} | {r2} |");
    }
    println!();
    println!(
        "| proxy | PROXY header | CPU µs a connection | CPU µs a request | CPU µs a MiB | added p50 µs | added p99 µs | \
         bytes an idle connection |"
    );
    println!("|---|---|---:|---:|---:|---:|---:|---:|");
    let mut direct =
        subjects.iter().find(|it| it.kind == Kind::Direct).map(|it| it.latencies.clone()).unwrap_or_default();
    let [direct_p50, direct_p99] = [50, 99].map(|part| micros(percentile(&mut direct, part)));
    for subject in subjects.iter_mut().filter(|it| it.kind != Kind::Direct) {
        let [connection, request, mib] = LOADS.map(|load| median(subject.costs[load as usize].iter().copied()));
        let [p50, p99] = [50, 99].map(|part| micros(percentile(&mut subject.latencies, part)));
        println!(
            "| {} | {} | {connection:.1} | {request:.1} | {mib:.0} | {:.1} | {:.1} | {:.0} |",
            subject.kind,
            header(subject),
            p50 - direct_p50,
            p99 - direct_p99,
            subject.memory
        );
    }
    println!();
    println!(
        "One thread for each proxy, all of them on the first CPU; clients and upstream share the other one. {} rounds, in each of \
         which every proxy has every load for {} ms, in random order. Rates are medians of the rounds; a ratio is the \
         median of the rounds' ratios to the better of HAProxy and nginx. Requests have 100 bytes, and so do their answers: \
         64 clients at a time, for connections/s with a new connection for each request. Gbit/s: four downloads. Added latency: \
         of single requests over one connection, {TIMED} in a round, less what they take without proxy (p50 {direct_p50:.1} µs, \
         p99 {direct_p99:.1} µs). CPU: time of the proxy's threads. Memory: private pages of the proxy's processes, with \
         {} connections more than before.",
        options.rounds, options.slice, options.idle
    );
}

fn header(subject: &Subject) -> &'static str {
    match (subject.has_header, subject.kind) {
        (false, _) => "–",
        (true, Kind::Nginx) => "v1",
        (true, _) => "v2",
    }
}
