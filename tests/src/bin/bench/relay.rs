//! `bench relay`: ways to move data from one TCP connection to another.

use std::{
    collections::HashMap,
    fmt,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd},
    time::Duration,
};

use anyhow::{Context as _, Result};
use anyport_tests::{
    dial,
    host::{Running, wait_for},
    numbers::median,
    random::Random,
    topology::{SERVER, Topology},
};
use aya::{
    Ebpf, include_bytes_aligned,
    maps::{MapData, SockHash},
    programs::SkSkb,
};
use nix::{
    fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
    unistd::pipe2,
};

use super::traffic::{
    CpuTime, leave_first_cpu,
    load::{self, Load},
    on_first_cpu, separate, start, start_upstream,
    upstream::{ECHO, SOURCE},
};

static BASELINES: &[u8] = include_bytes_aligned!("../../../../anyport-ebpf/prebuilt/baselines.o");

/// Where a relay listens, which is what its BPF program knows it by.
const PORT: u16 = 9_500;
/// Bytes of requests and answers.
const SIZES: [usize; 4] = [100, 16 << 10, 256 << 10, 1 << 20];
/// Clients at a time.
const CLIENTS: usize = 8;

/// Options of `bench relay`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Rounds; in each, every method is measured once.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Milliseconds of each load.
    #[arg(long, default_value_t = 300)]
    slice: u64,
}

/// How data is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Method {
    /// `read` and `write` with a buffer of 16 KiB.
    Copy16,
    /// The same with 64 KiB.
    Copy64,
    /// The same with 256 KiB.
    Copy256,
    /// `splice` through a pipe of 64 KiB.
    Splice64,
    /// The same with 1 MiB.
    Splice1024,
    /// A stream verdict program that redirects between the sockets of a socket map.
    Sockmap,
}

impl Method {
    const ALL: [Self; 6] = [Self::Copy16, Self::Copy64, Self::Copy256, Self::Splice64, Self::Splice1024, Self::Sockmap];
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Copy16 => "read and write, 16 KiB",
            Self::Copy64 => "read and write, 64 KiB",
            Self::Copy256 => "read and write, 256 KiB",
            Self::Splice64 => "splice, pipe of 64 KiB",
            Self::Splice1024 => "splice, pipe of 1 MiB",
            Self::Sockmap => "socket map redirection",
        })
    }
}

/// What was measured of a method: by load, what is counted in a second and the processor time of the relay for one of it.
#[derive(Debug, Default)]
struct Measured {
    rates: Vec<f64>,
    costs: Vec<f64>,
}

/// A relay at work, one process for each upstream.
struct Relay {
    processes: [Running; 2],
    /// Those for requests, then those for bulk.
    measured: [Measured; SIZES.len() + 1],
}

/// The address of a method's relay to [`ECHO`] or to [`SOURCE`].
fn address(method: Method, upstream: u16) -> SocketAddr {
    let host = method as u8 + if upstream == ECHO { 1 } else { 101 };
    SocketAddr::from(([192, 0, 2, host], PORT))
}

/// The benchmark.
pub(crate) fn relay(options: &Options) -> Result<()> {
    leave_first_cpu()?;
    let topology = Topology::new();
    separate(&topology);
    topology.host.ip("route add local 192.0.2.0/24 dev lo");
    let _upstream = start_upstream(&topology)?;
    let mut relays = Vec::new();
    for method in Method::ALL {
        let mut processes = Vec::new();
        for upstream in [ECHO, SOURCE] {
            let mut command = on_first_cpu(std::env::current_exe()?);
            let name = clap::ValueEnum::to_possible_value(&method).context("a name")?;
            command.args(["relay-by", "--method", name.get_name()]);
            command.args(["--listen", &address(method, upstream).to_string()]);
            command.args(["--to", &format!("{}:{upstream}", SERVER[0])]);
            processes.push(start(&topology.host, &command));
            wait_for("connection", Duration::from_secs(20), || {
                let dial = || dial::tcp(address(method, upstream)).map_err(|error| format!("{method}: {error}"));
                topology.client.enter(dial)
            });
        }
        let processes = processes.try_into().expect("two processes");
        relays.push(Relay { processes, measured: Default::default() });
    }
    let mut random = Random::new("relay");
    let mut order = Method::ALL;
    // The first round warms up and is forgotten.
    for round in 0..=options.rounds {
        random.shuffle(&mut order);
        for method in order {
            let slice = Duration::from_millis(options.slice);
            measure(&topology, method, &mut relays[method as usize], slice, round > 0)?;
        }
    }
    print(&relays, options);
    Ok(())
}

fn measure(topology: &Topology, method: Method, relay: &mut Relay, slice: Duration, counts: bool) -> Result<()> {
    let loads = SIZES.iter().map(|size| (Load::Requests, ECHO, *size)).chain([(Load::Bulk, SOURCE, 0)]);
    for (load, measured) in loads.zip(&mut relay.measured) {
        let (load, upstream, size) = load;
        let process = relay.processes[usize::from(upstream == SOURCE)].id();
        let time = CpuTime::of(process)?;
        let to = address(method, upstream);
        let rate = topology.client.enter(|| load::rate(load, to, size, CLIENTS, slice))?;
        let used = time.used()?;
        if counts {
            measured.rates.push(rate);
            measured.costs.push(used / (rate * (slice + load::WARM_UP).as_secs_f64()));
        }
    }
    Ok(())
}

fn print(relays: &[Relay], options: &Options) {
    println!("| method | 100 B requests/s | 16 KiB | 256 KiB | 1 MiB | bulk Gbit/s |");
    println!("|---|---:|---:|---:|---:|---:|");
    let ratio = |of: &[f64], first: &[f64]| median(of.iter().zip(first).map(|(of, it)| of / it));
    for (method, relay) in Method::ALL.iter().zip(relays) {
        let cells = relay.measured.iter().zip(&relays[0].measured).enumerate().map(|(column, (measured, first))| {
            let (rate, ratio) = (median(measured.rates.iter().copied()), ratio(&measured.rates, &first.rates));
            let (rate, digits) = if column == SIZES.len() { (rate * 8.0 / 1e9, 1) } else { (rate, 0) };
            format!("{rate:.digits$} ({ratio:.2})")
        });
        println!("| {method} | {} |", cells.collect::<Vec<_>>().join(" | "));
    }
    println!();
    println!("| method | CPU µs, 100 B | 16 KiB | 256 KiB | 1 MiB | a MiB of bulk |");
    println!("|---|---:|---:|---:|---:|---:|");
    for (method, relay) in Method::ALL.iter().zip(relays) {
        let cells = relay.measured.iter().enumerate().map(|(column, measured)| {
            let cost = median(measured.costs.iter().copied());
            format!("{:.1}", if column == SIZES.len() { cost * 1_048_576.0 } else { cost })
        });
        println!("| {method} | {} |", cells.collect::<Vec<_>>().join(" | "));
    }
    println!();
    println!(
        "One thread moves the data of {CLIENTS} connections; it has the first CPU, clients and upstream share the other. Requests and \
         answers are equally large. {} rounds of {} ms for each method and load, in random order; medians, and in brackets the \
         median of the rounds' ratios to the first method. CPU is the time of the relay's thread, without what the kernel does \
         in interrupts, which is where a socket map redirects.",
        options.rounds, options.slice
    );
}

/// What the relaying process is told.
#[derive(Debug, clap::Args)]
pub(crate) struct RelayBy {
    /// How.
    #[arg(long)]
    method: Method,
    /// Where it accepts.
    #[arg(long)]
    listen: SocketAddr,
    /// Where it connects to.
    #[arg(long)]
    to: SocketAddr,
}

/// One end of a pair.
struct End {
    stream: TcpStream,
    peer: RawFd,
}

/// Relays until the process ends.
pub(crate) fn relay_by(RelayBy { method, listen, to }: &RelayBy) -> Result<()> {
    let listener = TcpListener::bind(listen)?;
    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
    let mut mover = Mover::new(*method)?;
    let mut ends: HashMap<RawFd, End> = HashMap::new();
    let mut events = [EpollEvent::empty(); 64];
    loop {
        let count = epoll.wait(&mut events, EpollTimeout::NONE)?;
        for event in &events[..count] {
            let fd = RawFd::try_from(event.data())?;
            if fd == 0 {
                let (client, _) = listener.accept()?;
                let server = TcpStream::connect(to)?;
                for stream in [&client, &server] {
                    stream.set_nonblocking(true)?;
                    stream.set_nodelay(true)?;
                }
                // A client may have gone already.
                if mover.begin(&client, &server).is_err() {
                    continue;
                }
                let fds = [client.as_raw_fd(), server.as_raw_fd()];
                for (stream, fds) in [(client, fds), (server, [fds[1], fds[0]])] {
                    let wanted = if *method == Method::Sockmap { EpollFlags::EPOLLRDHUP } else { EpollFlags::EPOLLIN };
                    epoll.add(&stream, EpollEvent::new(wanted, u64::try_from(fds[0])?))?;
                    ends.insert(fds[0], End { stream, peer: fds[1] });
                }
                continue;
            }
            let Some(End { stream, peer }) = ends.get(&fd) else { continue };
            let Some(End { stream: to, .. }) = ends.get(peer) else { continue };
            let goes_on = if *method == Method::Sockmap { Ok(false) } else { mover.step(stream, to) };
            if goes_on.is_err() {
                // A pipe may hold what was not taken.
                mover = Mover::new(*method)?;
            }
            if !goes_on.unwrap_or(false) {
                let peer = *peer;
                ends.remove(&fd);
                ends.remove(&peer);
            }
        }
    }
}

/// Moves data.
enum Mover {
    Copy(Vec<u8>),
    Splice { pipe: (OwnedFd, OwnedFd), size: usize },
    Sockmap { pairs: SockHash<MapData, u32>, first: Vec<u8>, _ebpf: Box<Ebpf> },
}

impl Mover {
    fn new(method: Method) -> Result<Self> {
        Ok(match method {
            Method::Copy16 => Self::Copy(vec![0; 16 << 10]),
            Method::Copy64 => Self::Copy(vec![0; 64 << 10]),
            Method::Copy256 => Self::Copy(vec![0; 256 << 10]),
            Method::Splice64 => Self::splice(64 << 10)?,
            Method::Splice1024 => Self::splice(1 << 20)?,
            Method::Sockmap => {
                let mut ebpf = Ebpf::load(BASELINES)?;
                let pairs: SockHash<_, u32> = ebpf.take_map("baseline_pairs").context("the map")?.try_into()?;
                let program: &mut SkSkb = ebpf.program_mut("baseline_relay").context("the program")?.try_into()?;
                program.load()?;
                program.attach(pairs.fd())?;
                Self::Sockmap { pairs, first: vec![0; 64 << 10], _ebpf: Box::new(ebpf) }
            }
        })
    }

    fn splice(size: usize) -> Result<Self> {
        let pipe = pipe2(OFlag::O_NONBLOCK)?;
        fcntl(&pipe.0, FcntlArg::F_SETPIPE_SZ(i32::try_from(size)?))?;
        Ok(Self::Splice { pipe, size })
    }

    /// Takes a new pair, over which no more than a first request has been said.
    fn begin(&mut self, client: &TcpStream, server: &TcpStream) -> Result<()> {
        if let Self::Sockmap { pairs, first, .. } = self {
            let key = |address: SocketAddr| u32::from(address.port());
            pairs.insert(key(client.peer_addr()?), server.as_raw_fd(), 0)?;
            pairs.insert(1 << 16 | key(server.local_addr()?), client.as_raw_fd(), 0)?;
            // The program sees only what arrives from now on.
            if let Ok(length) = { client }.read(first) {
                { server }.write_all(&first[..length])?;
            }
        }
        Ok(())
    }

    /// Moves what is there; whether that was not the end.
    fn step(&mut self, mut from: &TcpStream, mut to: &TcpStream) -> Result<bool> {
        match self {
            Self::Copy(buffer) => {
                let length = match from.read(buffer) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                    length => length?,
                };
                let mut rest = &buffer[..length];
                while !rest.is_empty() {
                    match to.write(rest) {
                        Ok(written) => rest = &rest[written..],
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait_until_writable(to)?,
                        Err(error) => return Err(error.into()),
                    }
                }
                Ok(length > 0)
            }
            Self::Splice { pipe: (read, write), size } => {
                let flags = SpliceFFlags::SPLICE_F_NONBLOCK;
                let length = match splice(from, None, write.as_fd(), None, *size, flags) {
                    Err(nix::Error::EAGAIN) => return Ok(true),
                    length => length?,
                };
                let mut rest = length;
                while rest > 0 {
                    match splice(read.as_fd(), None, to, None, rest, flags) {
                        Ok(written) => rest -= written,
                        Err(nix::Error::EAGAIN) => wait_until_writable(to)?,
                        Err(error) => return Err(error.into()),
                    }
                }
                Ok(length > 0)
            }
            Self::Sockmap { .. } => Ok(true),
        }
    }
}

fn wait_until_writable(stream: &TcpStream) -> Result<()> {
    poll(&mut [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)], PollTimeout::NONE)?;
    Ok(())
}
