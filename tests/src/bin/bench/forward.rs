//! `bench forward`: the handler `forward` beside HAProxy and nginx.

use std::{
    io::{IsTerminal as _, stderr},
    thread,
    time::Duration,
};

use anyhow::Result;
use anyport_tests::{
    numbers::{count, percentile},
    random::Random,
};

use super::{
    micros,
    proxies::{Kind, Lab, Others, Proxy, Way},
    samples::{Meter, Subject},
    traffic::{
        leave_first_cpu,
        load::{self, Load},
        upstream::{ECHO, SOURCE},
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
    #[command(flatten)]
    others: Others,
}

/// Bytes of a request, and of its answer.
const REQUEST: usize = 100;
/// Connections that ask at the same time.
const CONCURRENT: usize = 64;
/// Connections that read at the same time.
const READERS: usize = 4;
/// Requests of which the time is taken in a round.
const TIMED: usize = 500;
/// Bytes of a MiB, by which downloads are counted.
const MIB: f64 = 1_048_576.0;

/// What was measured of a proxy by one way, with or without PROXY header.
#[derive(Debug)]
struct Measured {
    subject: Subject<3>,
    has_header: bool,
    latencies: Vec<Duration>,
    /// Bytes for an idle connection.
    memory: f64,
}

/// The benchmark.
pub(crate) fn forward(options: &Options) -> Result<()> {
    leave_first_cpu()?;
    let proxies = options.others.proxies(&[Kind::HaProxy, Kind::Nginx])?;
    let labs: Vec<Lab> = proxies.iter().map(Lab::start).collect::<Result<_>>()?;
    let mut all: Vec<(usize, Measured)> = Vec::new();
    for (number, proxy) in proxies.iter().enumerate() {
        let ways = [false, true].into_iter().take(if proxy.kind == Kind::Direct { 1 } else { 2 });
        all.extend(ways.map(|has_header| (number, Measured::new(proxy, has_header))));
    }
    let mut random = Random::new("forward");
    let mut order: Vec<usize> = (0..all.len()).collect();
    // The first round warms up and is forgotten.
    for round in 0..=options.rounds {
        random.shuffle(&mut order);
        for &index in &order {
            let (lab, measured) = &mut all[index];
            measured.measure(&labs[*lab], Duration::from_millis(options.slice), round > 0)?;
        }
        if stderr().is_terminal() {
            eprint!("\rround {round} of {} ", options.rounds);
        }
    }
    drop(labs);
    let mut all: Vec<Measured> = all.into_iter().map(|(_, measured)| measured).collect();
    for measured in all.iter_mut().filter(|it| it.subject.proxy.kind != Kind::Direct) {
        // A proxy that has had as many connections before has memory for them.
        measured.memory = idle_memory(&Lab::start(&measured.subject.proxy)?, measured.has_header, options.idle)?;
    }
    print_rates(&all);
    print_costs(&mut all);
    print_ratios(&all);
    explain(&mut all, options);
    Ok(())
}

impl Measured {
    fn new(proxy: &Proxy, has_header: bool) -> Self {
        Self { subject: Subject::new(proxy.clone()), has_header, latencies: Vec::new(), memory: 0.0 }
    }

    fn measure(&mut self, lab: &Lab, slice: Duration, counts: bool) -> Result<()> {
        for (load, samples) in LOADS.into_iter().zip(&mut self.subject.samples) {
            let (port, clients, unit) =
                if load == Load::Bulk { (SOURCE, READERS, MIB) } else { (ECHO, CONCURRENT, 1.0) };
            let to = lab.target(Way::Tcp { port, has_header: self.has_header });
            let meter = Meter::start(lab.process())?;
            let rate = lab.topology.client.enter(|| load::rate(load, to, REQUEST, clients, slice))? / unit;
            if counts {
                meter.stop(samples, rate, rate * (slice + load::WARM_UP).as_secs_f64())?;
            }
        }
        let to = lab.target(Way::Tcp { port: ECHO, has_header: self.has_header });
        let times = lab.topology.client.enter(|| load::latencies(to, REQUEST, TIMED))?;
        if counts {
            self.latencies.extend(times);
        }
        Ok(())
    }

    fn header(&self) -> &'static str {
        match (self.has_header, self.subject.proxy.kind) {
            (false, _) => "–",
            (true, Kind::Nginx) => "v1",
            (true, _) => "v2",
        }
    }
}

fn idle_memory(lab: &Lab, has_header: bool, many: usize) -> Result<f64> {
    let to = lab.target(Way::Tcp { port: ECHO, has_header });
    let before = lab.memory()?;
    let idle = lab.topology.client.enter(|| load::idle(to, REQUEST, many))?;
    // What was taken for the last requests is given back.
    thread::sleep(Duration::from_secs(1));
    let now = lab.memory()?;
    drop(idle);
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    Ok(now.saturating_sub(before) as f64 / count(many))
}

fn print_rates(all: &[Measured]) {
    println!("| proxy | PROXY header | connections/s | requests/s | Gbit/s |");
    println!("|---|---|---:|---:|---:|");
    for measured in all {
        let [connections, requests, bulk] = measured.subject.medians(|it| &it.rates);
        let (proxy, header, gbit) = (&measured.subject.proxy, measured.header(), bulk * MIB * 8.0 / 1e9);
        println!("| {proxy} | {header} | {connections:.0} | {requests:.0} | {gbit:.1} |");
    }
    println!();
}

fn print_costs(all: &mut [Measured]) {
    println!("| CPU µs | PROXY header | connection | threads | request | threads | MiB | threads | p50 | p99 | idle |");
    println!("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|");
    let [direct_p50, direct_p99] = direct_latencies(all);
    for measured in all {
        let (subject, header) = (&measured.subject, measured.header());
        let ([c0, r0, m0], [c1, r1, m1]) = (subject.medians(|it| &it.system), subject.medians(|it| &it.own));
        print!("| {} | {header} | {c0:.1} | {c1:.1} | {r0:.1} | {r1:.1} | {m0:.0} | {m1:.0} |", subject.proxy);
        if subject.proxy.kind == Kind::Direct {
            println!(" – | – | – |");
            continue;
        }
        let [p50, p99] = [50, 99].map(|part| micros(percentile(&mut measured.latencies, part)));
        println!(" {:.1} | {:.1} | {:.0} |", p50 - direct_p50, p99 - direct_p99, measured.memory);
    }
    println!();
}

fn direct_latencies(all: &mut [Measured]) -> [f64; 2] {
    let direct = all.iter_mut().find(|it| it.subject.proxy.kind == Kind::Direct);
    direct.map_or([0.0; 2], |it| [50, 99].map(|part| micros(percentile(&mut it.latencies, part))))
}

fn print_ratios(all: &[Measured]) {
    println!(
        "| anyport to | PROXY header | connections/s | requests/s | bytes/s | CPU a connection | CPU a request | CPU a MiB |"
    );
    println!("|---|---|---:|---:|---:|---:|---:|---:|");
    for rival in all.iter().filter(|it| it.subject.proxy.is_rival()) {
        let is_anyport = |it: &&Measured| it.subject.proxy.kind == Kind::Anyport && !it.subject.proxy.is_rival();
        let own = all.iter().filter(is_anyport).find(|it| it.has_header == rival.has_header);
        let Some(own) = own else { continue };
        let [connection, request, bulk] = own.subject.ratios(&rival.subject);
        let [rates, costs] = [0, 1].map(|at| [connection[at], request[at], bulk[at]]);
        let cells: Vec<String> = rates.iter().chain(&costs).map(|it| format!("{it:.2}")).collect();
        println!("| {} | {} | {} |", rival.subject.proxy, rival.header(), cells.join(" | "));
    }
    println!();
}

fn explain(all: &mut [Measured], options: &Options) {
    let [p50, p99] = direct_latencies(all);
    println!(
        "One thread for each proxy, all of them on the first CPU; clients and upstream share the other one. {} rounds, in each of \
         which every proxy has every load for {} ms, in random order. Rates and times are medians of the rounds; a ratio is the \
         median of the rounds' ratios. Requests have {REQUEST} bytes, and so do their answers: {CONCURRENT} clients at a time, \
         for connections/s with a new connection for each request. Gbit/s: {READERS} downloads. CPU µs: time that the \
         processors of the machine work, by clients, upstream and the kernel's work for packets, too; threads: time of the \
         proxy's threads. p50 and p99: what is added to the µs of single requests over one connection, {TIMED} in a round, without \
         proxy (p50 {p50:.1} µs, p99 {p99:.1} µs). Idle: bytes of private pages of the proxy's processes, for each of {} more \
         connections.",
        options.rounds, options.slice, options.idle
    );
}
