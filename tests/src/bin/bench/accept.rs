//! `bench accept`: the handler `discard` beside a bare accept loop.

use std::{
    collections::HashMap,
    fmt,
    io::{self, Read as _},
    net::SocketAddr,
    os::fd::AsRawFd as _,
    time::Duration,
};

use anyhow::Result;
use anyport_tests::{
    daemon::{Daemon, Setup},
    dial,
    host::{Running, wait_for},
    numbers::median,
    random::Random,
    topology::Topology,
};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use socket2::{Domain, Socket, Type};

use super::traffic::{
    CpuTime, leave_first_cpu,
    load::{self, Load},
    on_first_cpu, separate, start,
};

/// Everything that any of them answers for.
const PREFIX: &str = "192.0.2.0/24";
/// The original destination.
const TARGET: ([u8; 4], u16) = ([192, 0, 2, 77], 31_337);
/// Clients at a time.
const CLIENTS: usize = 64;

/// Options of `bench accept`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Rounds; in each, everybody is measured once.
    #[arg(long, default_value_t = 31)]
    rounds: usize,
    /// Milliseconds of load in a round.
    #[arg(long, default_value_t = 500)]
    slice: u64,
}

/// Who accepts.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// A loop over `epoll_wait` and `accept`, at a socket that is bound to the original destination.
    Loop,
    /// anyport with this many prefixes.
    Anyport(u32),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loop => f.write_str("a bare epoll loop, bound socket"),
            Self::Anyport(1) => f.write_str("anyport, 1 prefix"),
            Self::Anyport(prefixes) => write!(f, "anyport, {prefixes} prefixes"),
        }
    }
}

struct Subject {
    kind: Kind,
    topology: Topology,
    process: Process,
    rates: Vec<f64>,
    costs: Vec<f64>,
}

enum Process {
    Loop(Running),
    Anyport(Box<Daemon>),
}

impl Process {
    fn id(&self) -> u32 {
        match self {
            Self::Loop(running) => running.id(),
            Self::Anyport(daemon) => daemon.pid().as_raw().unsigned_abs(),
        }
    }
}

impl Subject {
    fn start(kind: Kind) -> Result<Self> {
        let topology = Topology::new();
        separate(&topology);
        let process = match kind {
            Kind::Loop => {
                topology.host.ip(&format!("route add local {PREFIX} dev lo"));
                let mut command = on_first_cpu(std::env::current_exe()?);
                command.args(["loop", "--listen", &SocketAddr::from(TARGET).to_string()]);
                Process::Loop(start(&topology.host, &command))
            }
            Kind::Anyport(prefixes) => {
                let daemon = Setup::new(&topology.host, "sk-lookup").through(["taskset", "--cpu-list", "0"]);
                let daemon = daemon.args(["--workers", "1"]).start();
                daemon.ok("add-service sink --handler discard");
                daemon.ok(&format!("add-prefix {PREFIX} --service sink"));
                let others: Vec<_> = (1..prefixes).map(|it| format!("2001:db8:{:x}::/48", 0x1000 + it)).collect();
                if !others.is_empty() {
                    daemon.ok(&format!("add-prefix {} --service sink", others.join(" ")));
                }
                Process::Anyport(Box::new(daemon))
            }
        };
        wait_for("connection", Duration::from_secs(20), || {
            topology.client.enter(|| dial::tcp(TARGET.into())).map_err(|error| format!("{kind}: {error}"))
        });
        Ok(Self { kind, topology, process, rates: Vec::new(), costs: Vec::new() })
    }

    fn measure(&mut self, slice: Duration, counts: bool) -> Result<()> {
        let time = CpuTime::of(self.process.id())?;
        let rate = self.topology.client.enter(|| load::rate(Load::Accepts, TARGET.into(), 0, CLIENTS, slice))?;
        let used = time.used()?;
        if counts {
            self.rates.push(rate);
            self.costs.push(used / (rate * (slice + load::WARM_UP).as_secs_f64()));
        }
        Ok(())
    }
}

/// The benchmark.
pub(crate) fn accept(options: &Options) -> Result<()> {
    leave_first_cpu()?;
    let kinds = [Kind::Loop, Kind::Anyport(1), Kind::Anyport(1_000)];
    let mut subjects = kinds.into_iter().map(Subject::start).collect::<Result<Vec<_>>>()?;
    let mut random = Random::new("accept");
    let mut order = [0, 1, 2];
    // The first round warms up and is forgotten.
    for round in 0..=options.rounds {
        random.shuffle(&mut order);
        for index in order {
            subjects[index].measure(Duration::from_millis(options.slice), round > 0)?;
        }
    }
    println!("| who accepts | connections/s | ratio | CPU µs a connection | ratio |");
    println!("|---|---:|---:|---:|---:|");
    for subject in &subjects {
        let ratio = |of: &[f64], first: &[f64]| median(of.iter().zip(first).map(|(of, first)| of / first));
        println!(
            "| {} | {:.0} | {:.2} | {:.1} | {:.2} |",
            subject.kind,
            median(subject.rates.iter().copied()),
            ratio(&subject.rates, &subjects[0].rates),
            median(subject.costs.iter().copied()),
            ratio(&subject.costs, &subjects[0].costs),
        );
    }
    println!();
    println!(
        "TCP connections that are made and closed, {CLIENTS} at a time, over a pair of interfaces. One thread accepts, on the \
         first CPU; the clients have the other one. {} rounds of {} ms for each, in random order; medians, and medians of the \
         rounds' ratios. CPU: time of all threads of the process.",
        options.rounds, options.slice
    );
    Ok(())
}

/// What the bare loop is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Loop {
    /// Where it listens.
    #[arg(long)]
    listen: SocketAddr,
}

/// Accepts, reads to the end and forgets, until the process ends: with as few system calls as that takes.
pub(crate) fn run_loop(Loop { listen }: &Loop) -> Result<()> {
    const LISTENER: u64 = u64::MAX;
    let socket = Socket::new(Domain::for_address(*listen), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&(*listen).into())?;
    socket.listen(4_096)?;
    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
    let mut open = HashMap::new();
    let mut events = [EpollEvent::empty(); 256];
    let mut buffer = [0; 16 << 10];
    loop {
        let count = epoll.wait(&mut events, EpollTimeout::NONE)?;
        for event in &events[..count] {
            if event.data() == LISTENER {
                let (stream, _) = match socket.accept_raw() {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                    accepted => accepted?,
                };
                stream.set_nonblocking(true)?;
                let key = u64::try_from(stream.as_raw_fd())?;
                epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, key))?;
                open.insert(key, stream);
            } else if let Some(mut stream) = open.get(&event.data()) {
                match stream.read(&mut buffer) {
                    Ok(1..) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Ok(0) | Err(_) => drop(open.remove(&event.data())),
                }
            }
        }
    }
}
