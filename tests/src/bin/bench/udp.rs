//! `bench udp`: datagrams through the handler `forward` and through nginx.

use std::{
    io::{self, IsTerminal as _, stderr},
    net::{SocketAddr, UdpSocket},
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use anyport::sys::datagrams::Batch;
use anyport_tests::{dial::receive, host::wait_for, random::Random};
use nix::poll::{PollFd, PollFlags, poll};

use super::{
    proxies::{Kind, Lab, Others, Way},
    samples::{Meter, Subject},
    traffic::leave_first_cpu,
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
    #[command(flatten)]
    others: Others,
}

/// Bytes of a datagram.
const LENGTH: usize = 100;
/// Before anything counts.
const WARM_UP: Duration = Duration::from_millis(200);
/// After this, a datagram is taken for lost.
const PATIENCE: Duration = Duration::from_millis(200);

/// What clients do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Load {
    /// Datagrams through flows that stay.
    Kept,
    /// Flows of one question and one answer.
    New,
}

const LOADS: [Load; 2] = [Load::Kept, Load::New];

impl Load {
    fn way(self) -> Way {
        Way::Udp { has_one_answer: self == Self::New }
    }
}

/// The benchmark.
pub(crate) fn udp(options: &Options) -> Result<()> {
    leave_first_cpu()?;
    let mut subjects: Vec<(Lab, Subject<2>)> = Vec::new();
    for proxy in options.others.proxies(&[Kind::Nginx])? {
        let lab = Lab::start(&proxy)?;
        expect_answers(&lab);
        subjects.push((lab, Subject::new(proxy)));
    }
    let mut random = Random::new("udp");
    let mut order: Vec<usize> = (0..subjects.len()).collect();
    // The first round warms up and is forgotten.
    for round in 0..=options.rounds {
        random.shuffle(&mut order);
        for &index in &order {
            let (lab, subject) = &mut subjects[index];
            measure(lab, subject, options, round > 0)?;
        }
        if stderr().is_terminal() {
            eprint!("\rround {round} of {} ", options.rounds);
        }
    }
    let subjects: Vec<_> = subjects.into_iter().map(|(_, subject)| subject).collect();
    print(&subjects, options);
    Ok(())
}

fn expect_answers(lab: &Lab) {
    for load in LOADS {
        let to = lab.target(load.way());
        let ask = || {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(to)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.send(b"?")?;
            receive(&socket, &mut [0; 1])
        };
        wait_for("answer", Duration::from_secs(20), || {
            lab.topology.client.enter(ask).map_err(|error| format!("{load:?} at {to}: {error}"))
        });
    }
}

fn measure(lab: &Lab, subject: &mut Subject<2>, options: &Options, counts: bool) -> Result<()> {
    let slice = Duration::from_millis(options.slice);
    for (load, samples) in LOADS.into_iter().zip(&mut subject.samples) {
        let to = lab.target(load.way());
        let meter = Meter::start(lab.process())?;
        let (all, rate) = lab.topology.client.enter(|| match load {
            Load::Kept => Clients::new(to, options.flows, options.window)?.keep_on(slice),
            Load::New => Clients::new(to, options.flows, 1)?.begin_anew(slice),
        })?;
        ensure!(all > 0.0, "{} at {to} answers nothing", subject.proxy);
        if counts {
            meter.stop(samples, rate, all)?;
        }
    }
    Ok(())
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

fn print(subjects: &[Subject<2>], options: &Options) {
    println!(
        "| proxy | datagrams/s, kept flows | CPU µs each, all | threads | new flows/s | CPU µs each, all | threads |"
    );
    println!("|---|---:|---:|---:|---:|---:|---:|");
    for subject in subjects {
        let ([kept, new], [kept_all, new_all], [kept_own, new_own]) =
            (subject.medians(|it| &it.rates), subject.medians(|it| &it.system), subject.medians(|it| &it.own));
        println!(
            "| {} | {kept:.0} | {kept_all:.1} | {kept_own:.1} | {new:.0} | {new_all:.1} | {new_own:.1} |",
            subject.proxy
        );
    }
    println!();
    println!("| anyport to | datagrams/s, kept flows | CPU each | new flows/s | CPU each |");
    println!("|---|---:|---:|---:|---:|");
    if let Some((own, others)) = subjects.split_last() {
        for other in others.iter().filter(|it| it.proxy.is_rival()) {
            let [[kept, kept_cost], [new, new_cost]] = own.ratios(other);
            println!("| {} | {kept:.2} | {kept_cost:.2} | {new:.2} | {new_cost:.2} |", other.proxy);
        }
    }
    println!();
    println!(
        "One thread for each proxy, all on the first CPU; clients and upstream, an echo, share the other one. {} rounds, in each of \
         which everybody has both loads for {} ms, in random order. Rates and times are medians of the rounds; a ratio is the \
         median of the rounds' ratios. Datagrams have {LENGTH} bytes, and so have their answers. Kept flows: {}, each with {} \
         datagrams under way. New flows: {} at a time, of one question and one answer each (nginx with `proxy_requests 1` and \
         `proxy_responses 1`, anyport with `responses = 1`). CPU, all: time that the processors of the machine work for one \
         answer, by clients, upstream and the kernel's work for packets, too; threads: time of the proxy's threads.",
        options.rounds, options.slice, options.flows, options.window, options.flows
    );
}
