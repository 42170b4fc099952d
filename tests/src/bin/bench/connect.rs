//! `bench connect`: TCP connect latency, by who accepts.

use std::{
    fs,
    io::{IsTerminal as _, stderr},
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use anyport_tests::{
    daemon::{Daemon, Setup},
    dial::tcp,
    host::{Running, wait_for},
    netns::Netns,
    numbers::percentile,
    prerequisites,
    random::Random,
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{io::AsyncReadExt as _, net::TcpListener};

use super::{BACKENDS, cpus, micros};

/// What every variant answers for.
const PREFIX: &str = "192.0.2.0/24";
/// The one original destination.
const TARGET: (Ipv4Addr, u16) = (Ipv4Addr::new(192, 0, 2, 77), 31_337);
/// Where the listener of the REDIRECT variant stands.
const REDIRECTED: u16 = 4_000;

/// Options of `bench connect`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Rounds; in each, every variant is measured once.
    #[arg(long, default_value_t = 30)]
    rounds: usize,
    /// Connections of a variant in a round.
    #[arg(long, default_value_t = 500)]
    connects: usize,
    /// Client threads.
    #[arg(long, default_value_t = 2)]
    clients: usize,
    /// Separately bound ports; what the limit of open files leaves, unless given.
    #[arg(long)]
    ports: Option<usize>,
}

/// What the accepting side of the variants that are not anyport is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Sink {
    /// Addresses and ports, one a line.
    #[arg(long)]
    listen: PathBuf,
    /// Listening sockets of each address and port.
    #[arg(long)]
    members: usize,
    /// Asks for the original destination of each connection.
    #[arg(long)]
    original: bool,
}

/// Someone who accepts, and how to dial them.
struct Variant {
    name: String,
    namespace: Netns,
    /// Each connection takes one of these.
    targets: Vec<SocketAddr>,
    /// Ends with the variant.
    _accepting: Accepting,
    samples: Vec<Duration>,
    ratios: Vec<f64>,
}

/// Who accepts.
enum Accepting {
    Anyport { _daemon: Daemon },
    Plain { _process: Running, _listen: tempfile::TempDir },
}

/// A namespace in which [`PREFIX`] is local, as anyport's own route makes it.
fn namespace() -> Netns {
    let namespace = Netns::new();
    namespace.ip(&format!("route add local {PREFIX} dev lo src 127.0.0.1"));
    namespace
}

/// A variant whose connections are accepted by [`sink`] at `listen`.
fn plain(name: &str, namespace: Netns, listen: &[SocketAddr], targets: Vec<SocketAddr>) -> Result<Variant> {
    let directory = prerequisites::scratch();
    let file = directory.path().join("listen");
    fs::write(&file, listen.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))?;
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(std::env::current_exe()?);
    // So many ports leave no room for groups.
    let members = if listen.len() == 1 { cpus()? } else { 1 };
    command.arg("sink").arg("--listen").arg(&file).args(["--members", &members.to_string()]).stdin(Stdio::null());
    if listen != targets {
        command.arg("--original");
    }
    let process = namespace.spawn(command);
    Ok(variant(name, namespace, targets, Accepting::Plain { _process: Running(process), _listen: directory }))
}

/// A variant, when its first and last target can be dialled.
fn variant(name: &str, namespace: Netns, targets: Vec<SocketAddr>, accepting: Accepting) -> Variant {
    for target in [targets[0], targets[targets.len() - 1]] {
        wait_for("connection", Duration::from_secs(30), || {
            namespace.enter(|| tcp(target)).map_err(|error| format!("{name}: {target}: {error}"))
        });
    }
    Variant {
        name: name.to_owned(),
        namespace,
        targets,
        _accepting: accepting,
        samples: Vec::new(),
        ratios: Vec::new(),
    }
}

/// All variants, the bound socket first.
fn variants(ports: Option<usize>) -> Result<Vec<Variant>> {
    let target: SocketAddr = TARGET.into();
    let mut all = vec![plain("bound socket", namespace(), &[target], vec![target])?];
    for backend in BACKENDS {
        let namespace = Netns::new();
        let daemon = Setup::new(&namespace, backend).start();
        daemon.ok("add-service sink --handler discard");
        daemon.ok(&format!("add-prefix {PREFIX} --service sink"));
        let name = format!("anyport, {backend}");
        all.push(variant(&name, namespace, vec![target], Accepting::Anyport { _daemon: daemon }));
    }
    let redirect = namespace();
    let port = REDIRECTED.to_string();
    let rule = ["-t", "nat", "-A", "OUTPUT", "-d", PREFIX, "-p", "tcp", "-j", "REDIRECT", "--to-ports", &port];
    redirect.run("iptables", rule);
    let listen = SocketAddr::from((Ipv4Addr::UNSPECIFIED, REDIRECTED));
    all.push(plain("iptables REDIRECT, SO_ORIGINAL_DST", redirect, &[listen], vec![target])?);
    let count = ports.map_or_else(|| Ok(open_files()?.saturating_sub(500)), Ok::<_, anyhow::Error>)?;
    let many: Vec<SocketAddr> = (1..=u16::MAX).take(count).map(|port| (TARGET.0, port).into()).collect();
    all.push(plain(&format!("{} bound ports", many.len()), namespace(), &many, many.clone())?);
    Ok(all)
}

/// How many files a process may open here.
fn open_files() -> Result<usize> {
    let limits = fs::read_to_string("/proc/self/limits")?;
    let line = limits.lines().find(|line| line.starts_with("Max open files")).context("no limit of open files")?;
    Ok(line.split_whitespace().nth(4).context("no hard limit of open files")?.parse()?)
}

/// The benchmark `connect`.
pub(crate) fn connect(options: &Options) -> Result<()> {
    let &Options { rounds, connects, clients, ports } = options;
    let mut variants = variants(ports)?;
    let mut random = Random::new("connect");
    let mut order: Vec<usize> = (0..variants.len()).collect();
    // The first round warms up and is forgotten.
    for round in 0..=rounds {
        random.shuffle(&mut order);
        let mut medians = vec![Duration::ZERO; variants.len()];
        for &index in &order {
            let variant = &mut variants[index];
            let mut samples = measure(&variant.namespace, &variant.targets, connects, clients, random.next_u64())?;
            medians[index] = percentile(&mut samples, 50);
            if round > 0 {
                variant.samples.extend(samples);
            }
        }
        for (variant, median) in variants.iter_mut().zip(&medians).filter(|_| round > 0) {
            variant.ratios.push(median.as_secs_f64() / medians[0].as_secs_f64());
        }
        if stderr().is_terminal() {
            eprint!("\rround {round} of {rounds} ");
        }
    }
    println!("| who accepts | median µs | p99 µs | ratio to the bound socket |");
    println!("|---|---:|---:|---:|");
    for variant in &mut variants {
        let [median, p99] = [50, 99].map(|part| micros(percentile(&mut variant.samples, part)));
        variant.ratios.sort_by(f64::total_cmp);
        let ratio = variant.ratios[variant.ratios.len() / 2];
        println!("| {} | {median:.1} | {p99:.1} | {ratio:.2} |", variant.name);
    }
    println!();
    println!(
        "TCP connect to {}:{} over loopback, {rounds} rounds of {connects} connections for each variant in random \
         order, {clients} client threads, {} CPUs, Linux {}. The ratio is the median of the rounds' ratios. Every \
         accepting side is a process of its own with a tokio runtime and a group of SO_REUSEPORT sockets, one for \
         each CPU (the last variant: one for each port); it accepts, reads to the end and forgets. Clients end with a reset, so that nothing waits in \
         TIME_WAIT. The last variant's connections go to random ones of its ports.",
        TARGET.0,
        TARGET.1,
        cpus()?,
        fs::read_to_string("/proc/sys/kernel/osrelease")?.trim(),
    );
    Ok(())
}

/// Times of `connects` calls of `connect`, by `clients` threads at the same time.
fn measure(
    namespace: &Netns,
    targets: &[SocketAddr],
    connects: usize,
    clients: usize,
    seed: u64,
) -> Result<Vec<Duration>> {
    namespace.enter(|| {
        thread::scope(|scope| {
            let clients: Vec<_> = (0..clients)
                .map(|client| scope.spawn(move || dial(targets, connects / clients, &format!("{seed} {client}"))))
                .collect();
            let results = clients.into_iter().map(|client| client.join().expect("a client thread"));
            Ok(results.collect::<Result<Vec<_>>>()?.concat())
        })
    })
}

/// Times of `connects` calls of `connect`. Sockets are made and closed outside of the time that counts.
fn dial(targets: &[SocketAddr], connects: usize, label: &str) -> Result<Vec<Duration>> {
    let mut random = Random::new(label);
    let mut samples = Vec::with_capacity(connects);
    for _ in 0..connects {
        let target = (*random.pick(targets)).into();
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
        socket.set_linger(Some(Duration::ZERO))?;
        let begin = Instant::now();
        socket.connect(&target)?;
        samples.push(begin.elapsed());
    }
    Ok(samples)
}

/// The accepting process of the variants that are not anyport.
pub(crate) fn sink(Sink { listen, members, original }: &Sink) -> Result<()> {
    let addresses = fs::read_to_string(listen)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(cpus()?).enable_all().build()?;
    runtime.block_on(async {
        for line in addresses.lines() {
            let address: SocketAddr = line.parse()?;
            for _ in 0..*members {
                let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
                socket.set_reuse_address(true)?;
                socket.set_reuse_port(true)?;
                socket.set_nonblocking(true)?;
                socket.bind(&address.into())?;
                socket.listen(1_024)?;
                tokio::spawn(forget(TcpListener::from_std(socket.into())?, *original));
            }
        }
        std::future::pending().await
    })
}

/// Accepts for ever, reads each connection to its end, each in a task of its own.
async fn forget(listener: TcpListener, original: bool) {
    // A connection that was reset before it was accepted is none of our business.
    while let Ok((mut stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            if original {
                socket2::SockRef::from(&stream).original_dst_v4().ok();
            }
            let mut buffer = [0; 1_024];
            while stream.read(&mut buffer).await.is_ok_and(|length| length > 0) {}
        });
    }
}
