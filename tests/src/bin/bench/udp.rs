//! `bench udp`: datagrams through the handler `forward` and through nginx.

use std::{
    fmt,
    io::{self, IsTerminal as _, stderr},
    net::{SocketAddr, UdpSocket},
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use anyport::sys::datagrams::Batch;
use anyport_tests::{
    daemon::{Daemon, Setup},
    dial::receive,
    host::wait_for,
    numbers::median,
    prerequisites,
    random::Random,
    topology::{HOST, SERVER, Topology},
};
use nix::poll::{PollFd, PollFlags, poll};
use tempfile::TempDir;

use super::{
    proxies::{nginx_config, write},
    traffic::{CpuTime, Running, leave_first_cpu, on_first_cpu, separate, start_upstream, upstream::ECHO},
};

/// Options of `bench udp`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Rounds; in each, everybody is measured once.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Milliseconds of each load.
    #[arg(long, default_value_t = 500)]
    slice: u64,
    /// Flows at a time.
    #[arg(long, default_value_t = 64)]
    flows: usize,
    /// Datagrams of each kept flow that are under way at the same time.
    #[arg(long, default_value_t = 4)]
    window: usize,
}

/// Bytes of a datagram.
const LENGTH: usize = 100;
/// Where nginx waits for flows that are kept, and for those of one question.
const NGINX: [u16; 2] = [8_200, 8_201];
/// What anyport answers for, in the same order.
const DIALLED: [&str; 2] = ["192.0.2.1", "192.0.2.2"];
/// Before anything counts.
const WARM_UP: Duration = Duration::from_millis(200);
/// After this, a datagram is taken for lost.
const PATIENCE: Duration = Duration::from_millis(200);

/// Who is between client and upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Direct,
    Nginx,
    Anyport,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Direct => "no proxy",
            Self::Nginx => "nginx stream",
            Self::Anyport => "anyport",
        })
    }
}

/// What clients do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Load {
    /// Datagrams through flows that stay.
    Kept,
    /// Flows of one question and one answer.
    New,
}

const LOADS: [Load; 2] = [Load::Kept, Load::New];

/// What was measured, by [`Load`], for each round.
#[derive(Debug)]
struct Subject {
    kind: Kind,
    /// Answers in a second.
    rates: [Vec<f64>; 2],
    /// Microseconds of the proxy's processor time for one answer.
    costs: [Vec<f64>; 2],
}

/// Everybody at work.
struct Lab {
    topology: Topology,
    nginx: Running,
    daemon: Daemon,
    _upstream: Running,
    _directory: TempDir,
}

/// The benchmark.
pub(crate) fn udp(options: &Options) -> Result<()> {
    leave_first_cpu()?;
    let lab = Lab::start()?;
    let mut subjects = [Kind::Direct, Kind::Nginx, Kind::Anyport].map(|kind| Subject {
        kind,
        rates: Default::default(),
        costs: Default::default(),
    });
    let mut random = Random::new("udp");
    let mut order: Vec<usize> = (0..subjects.len()).collect();
    // The first round warms up and is forgotten.
    for round in 0..=options.rounds {
        random.shuffle(&mut order);
        for &index in &order {
            lab.measure(&mut subjects[index], options, round > 0)?;
        }
        if stderr().is_terminal() {
            eprint!("\rround {round} of {} ", options.rounds);
        }
    }
    print(&subjects, options);
    Ok(())
}

impl Lab {
    fn start() -> Result<Self> {
        let topology = Topology::new();
        separate(&topology);
        let directory = prerequisites::scratch();
        let upstream = start_upstream(&topology)?;
        let listen = |port: u16, more: &str| {
            format!(" server {{ listen {}:{port} udp; proxy_pass {}:{ECHO}; {more} }}\n", HOST[0], SERVER[0])
        };
        let servers = listen(NGINX[0], "") + &listen(NGINX[1], "proxy_requests 1; proxy_responses 1;");
        let config = write(&directory, "nginx.conf", &nginx_config(&directory, &servers))?;
        let nginx = Running::start(&topology.host, on_first_cpu("nginx").arg("-c").arg(config));
        let daemon = Setup::new(&topology.host, "sk-lookup").through(["taskset", "--cpu-list", "0"]);
        let daemon = daemon.args(["--workers", "1"]).start();
        for (dialled, more) in DIALLED.iter().zip(["", "--udp responses=1"]) {
            daemon.ok(&format!("add-service to-{dialled} --handler forward --upstream {}:{ECHO} {more}", SERVER[0]));
            daemon.ok(&format!("add-prefix {dialled}/32 --protocol udp --service to-{dialled}"));
        }
        let lab = Self { topology, nginx, daemon, _upstream: upstream, _directory: directory };
        for kind in [Kind::Direct, Kind::Nginx, Kind::Anyport] {
            for load in LOADS {
                let to = target(kind, load);
                let ask = || {
                    let socket = UdpSocket::bind("0.0.0.0:0")?;
                    socket.connect(to)?;
                    socket.set_read_timeout(Some(PATIENCE))?;
                    socket.send(b"?")?;
                    receive(&socket, &mut [0; 1])
                };
                wait_for("answer", Duration::from_secs(20), || {
                    lab.topology.client.enter(ask).map_err(|error| format!("{kind} at {to}: {error}"))
                });
            }
        }
        Ok(lab)
    }

    fn measure(&self, subject: &mut Subject, options: &Options, counts: bool) -> Result<()> {
        let Subject { kind, rates, costs } = subject;
        let process = match kind {
            Kind::Direct => None,
            Kind::Nginx => Some(self.nginx.id()),
            Kind::Anyport => Some(self.daemon.pid().as_raw().unsigned_abs()),
        };
        for load in LOADS {
            let to = target(*kind, load);
            let slice = Duration::from_millis(options.slice);
            let time = CpuTime::of(process)?;
            let (all, rate) = self.topology.client.enter(|| match load {
                Load::Kept => Clients::new(to, options.flows, options.window)?.keep_on(slice),
                Load::New => Clients::new(to, options.flows, 1)?.begin_anew(slice),
            })?;
            let used = time.used()?;
            ensure!(all > 0.0, "{kind} at {to} answers nothing");
            if counts {
                rates[load as usize].push(rate);
                costs[load as usize].push(used / all);
            }
        }
        Ok(())
    }
}

fn target(kind: Kind, load: Load) -> SocketAddr {
    let (address, port) = match kind {
        Kind::Direct => (SERVER[0], ECHO),
        Kind::Nginx => (HOST[0], NGINX[load as usize]),
        Kind::Anyport => (DIALLED[load as usize], 7),
    };
    SocketAddr::new(address.parse().expect("an address"), port)
}

/// Clients that have asked and wait for answers.
struct Clients {
    to: SocketAddr,
    sockets: Vec<UdpSocket>,
    window: usize,
}

/// Answers counted so far, and since the end of the warm-up.
struct Count {
    begin: Instant,
    end: Instant,
    all: f64,
    counted: f64,
}

impl Count {
    fn new(slice: Duration) -> Self {
        let begin = Instant::now() + WARM_UP;
        Self { begin, end: begin + slice, all: 0.0, counted: 0.0 }
    }

    /// Whether the time is not over yet.
    fn add(&mut self, answers: usize) -> bool {
        let now = Instant::now();
        let answers = u32::try_from(answers).map_or(f64::MAX, f64::from);
        self.all += answers;
        if now >= self.begin && now < self.end {
            self.counted += answers;
        }
        now < self.end
    }

    /// All answers, and those in a second.
    fn done(&self) -> (f64, f64) {
        (self.all, self.counted / (self.end - self.begin).as_secs_f64())
    }
}

impl Clients {
    fn new(to: SocketAddr, flows: usize, window: usize) -> Result<Self> {
        let sockets = (0..flows).map(|_| connected(to)).collect::<Result<_>>()?;
        let clients = Self { to, sockets, window };
        clients.sockets.iter().try_for_each(|socket| clients.ask(socket))?;
        Ok(clients)
    }

    fn ask(&self, socket: &UdpSocket) -> Result<()> {
        for _ in 0..self.window {
            socket.send(&[7; LENGTH]).with_context(|| format!("send to {}", self.to))?;
        }
        Ok(())
    }

    /// Sends the next datagram with each answer.
    fn keep_on(&self, slice: Duration) -> Result<(f64, f64)> {
        let mut count = Count::new(slice);
        let mut batch = Batch::default();
        loop {
            let mut answers = 0;
            for at in self.ready()? {
                match batch.receive(&self.sockets[at]) {
                    Ok(received) => {
                        answers += received;
                        batch.send(&self.sockets[at]);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error).with_context(|| format!("receive from {}", self.to)),
                }
            }
            if !count.add(answers) {
                return Ok(count.done());
            }
        }
    }

    /// Asks from a new port after each answer.
    fn begin_anew(&mut self, slice: Duration) -> Result<(f64, f64)> {
        let mut count = Count::new(slice);
        loop {
            let mut answers = 0;
            for at in self.ready()? {
                if self.sockets[at].recv(&mut [0; LENGTH]).is_ok() {
                    answers += 1;
                    self.sockets[at] = connected(self.to)?;
                    self.ask(&self.sockets[at])?;
                }
            }
            if !count.add(answers) {
                return Ok(count.done());
            }
        }
    }

    /// Those that have an answer. If there is none for a while all ask once more.
    fn ready(&self) -> Result<Vec<usize>> {
        let mut waited: Vec<_> =
            self.sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
        let limit = u16::try_from(PATIENCE.as_millis())?;
        if poll(&mut waited, limit)? == 0 {
            self.sockets.iter().try_for_each(|socket| self.ask(socket))?;
        }
        Ok((0..waited.len()).filter(|at| waited[*at].any().unwrap_or_default()).collect())
    }
}

fn connected(to: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(to)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn print(subjects: &[Subject; 3], options: &Options) {
    let [_, nginx, _] = subjects;
    println!("| proxy | datagrams/s, kept flows | ratio | CPU µs each | new flows/s | ratio | CPU µs each |");
    println!("|---|---:|---:|---:|---:|---:|---:|");
    for subject in subjects {
        print!("| {} |", subject.kind);
        for load in LOADS.map(|load| load as usize) {
            let ratios = subject.rates[load].iter().zip(&nginx.rates[load]).map(|(own, nginx)| own / nginx);
            let (rate, cost) = (&subject.rates[load], &subject.costs[load]);
            let rate = median(rate.iter().copied());
            match subject.kind {
                Kind::Direct => print!(" {rate:.0} | – | – |"),
                _ => print!(" {rate:.0} | {:.2} | {:.1} |", median(ratios), median(cost.iter().copied())),
            }
        }
        println!();
    }
    println!();
    println!(
        "One thread for each proxy, both on the first CPU; clients and upstream, an echo, share the other one. {} rounds, in each of \
         which everybody has both loads for {} ms, in random order. Rates are medians of the rounds; a ratio is the median of the \
         rounds' ratios to nginx. Datagrams have {LENGTH} bytes, and so have their answers. Kept flows: {}, each with {} datagrams \
         under way. New flows: {} at a time, of one question and one answer each (nginx with `proxy_requests 1` and \
         `proxy_responses 1`, anyport with `responses = 1`). CPU: time of the proxy's \
         threads for one answer.",
        options.rounds, options.slice, options.flows, options.window, options.flows
    );
}
