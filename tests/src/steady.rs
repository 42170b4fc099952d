//! Clients that dial all the time while something happens to the daemon.

use std::{
    fmt,
    net::SocketAddr,
    panic::resume_unwind,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread::{scope, sleep},
    time::{Duration, Instant},
};

use crate::{
    dial::{hello, read_text, tcp},
    netns::Netns,
    random::Random,
};

/// What became of a connection to the handler `hello` that was not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// There was none.
    Refused,
    /// It was established, and ended before the first byte.
    Unanswered,
    /// Another service answered.
    Misdirected,
}

/// Within which a client knows that its connection was lost in a crash.
const SHORTLY: Duration = Duration::from_secs(1);

/// A connection that was not served.
#[derive(Clone, Debug)]
pub struct Failure {
    /// When that was known.
    pub at: Instant,
    /// The original destination.
    pub to: SocketAddr,
    /// What became of it.
    pub loss: Loss,
    /// What the kernel or the other side said.
    pub why: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { to, loss, why, .. } = self;
        let what = match loss {
            Loss::Refused => "refused",
            Loss::Unanswered => "established and not answered",
            Loss::Misdirected => "answered by another",
        };
        write!(f, "{to} {what}: {why}")
    }
}

/// What became of all connections.
#[derive(Debug, Default)]
pub struct Tally {
    /// How many were served.
    pub served: u64,
    /// The others.
    pub failures: Vec<Failure>,
}

impl Tally {
    /// How many were lost this way.
    pub fn count(&self, loss: Loss) -> usize {
        self.failures.iter().filter(|failure| failure.loss == loss).count()
    }

    /// How many were lost in crashes of the server at these moments: what it had accepted and not yet answered is reset.
    pub fn lost_in(&self, crashes: &[Instant]) -> usize {
        let is_of_crash = |failure: &&Failure| crashes.iter().any(|at| (*at..*at + SHORTLY).contains(&failure.at));
        self.failures.iter().filter(|it| it.loss == Loss::Unanswered).filter(is_of_crash).count()
    }

    /// The first few failures in words.
    pub fn sample(&self) -> String {
        let some: Vec<String> = self.failures.iter().take(5).map(ToString::to_string).collect();
        format!("\n{}", some.join("\n"))
    }
}

/// Sets a flag when dropped, so that threads that wait for it also end when one of them panics.
#[derive(Debug)]
pub struct EndOfWork<'a>(pub &'a AtomicBool);

impl Drop for EndOfWork<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Who dials the handler `hello`, and how.
#[derive(Clone, Copy, Debug)]
pub struct Clients<'a> {
    /// Where they are.
    pub namespace: &'a Netns,
    /// What they dial: random addresses and ports of these.
    pub prefixes: &'a [&'a str],
    /// How many dial at the same time.
    pub count: usize,
    /// How long each waits between one connection and the next.
    pub pause: Duration,
}

impl Clients<'_> {
    /// Dials one connection after another until `is_over`. `served` is counted meanwhile.
    pub fn dial_until(&self, is_over: &AtomicBool, served: &AtomicU64) -> Vec<Failure> {
        scope(|scope| {
            let client = |number| scope.spawn(move || self.dial_as(number, is_over, served));
            let clients: Vec<_> = (0..self.count).map(client).collect();
            clients.into_iter().flat_map(|it| it.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
        })
    }

    fn dial_as(&self, number: usize, is_over: &AtomicBool, served: &AtomicU64) -> Vec<Failure> {
        let mut failures = Vec::new();
        self.namespace.enter(|| {
            let mut random = Random::new(&format!("steady {number}"));
            while !is_over.load(Relaxed) {
                let prefix: &str = random.pick::<&str>(self.prefixes);
                let to = SocketAddr::new(random.address(prefix), random.port());
                match dial(to) {
                    Ok(()) => drop(served.fetch_add(1, Relaxed)),
                    Err(failure) => failures.push(failure),
                }
                sleep(self.pause);
            }
        });
        failures
    }
}

/// Has `clients` of `namespace` dial without a pause for as long as `work` takes. It is told how many were served so far.
pub fn dial_during(namespace: &Netns, prefixes: &[&str], clients: usize, work: impl FnOnce(&AtomicU64)) -> Tally {
    let (is_over, served) = (AtomicBool::new(false), AtomicU64::new(0));
    let clients = Clients { namespace, prefixes, count: clients, pause: Duration::ZERO };
    let failures = scope(|scope| {
        let dialling = scope.spawn(|| clients.dial_until(&is_over, &served));
        let end = EndOfWork(&is_over);
        work(&served);
        drop(end);
        dialling.join().unwrap_or_else(|panic| resume_unwind(panic))
    });
    Tally { served: served.into_inner(), failures }
}

fn dial(to: SocketAddr) -> Result<(), Failure> {
    let lost = |loss, why: String| Err(Failure { at: Instant::now(), to, loss, why });
    let mut stream = match tcp(to) {
        Ok(stream) => stream,
        Err(error) => return lost(Loss::Refused, error.to_string()),
    };
    let local = stream.local_addr();
    match (read_text(&mut stream), local) {
        (Ok(text), Ok(local)) if text == hello(local, to, "tcp") => Ok(()),
        (Ok(text), Ok(_)) if text.is_empty() => lost(Loss::Unanswered, "end of stream".into()),
        (Ok(text), Ok(_)) => lost(Loss::Misdirected, text),
        // Without an address of its own it was reset at once.
        (Err(error), _) | (_, Err(error)) => lost(Loss::Unanswered, error.to_string()),
    }
}
