//! Clients that dial all the time while something happens to the daemon.

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::scope,
    time::Instant,
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
    /// Somebody else answered.
    Misdirected,
}

/// A connection that was not served.
#[derive(Clone, Debug)]
pub struct Failure {
    /// When that was known.
    pub at: Instant,
    /// What was dialled.
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

    /// The first few failures in words.
    pub fn sample(&self) -> String {
        let some: Vec<String> = self.failures.iter().take(5).map(ToString::to_string).collect();
        format!("\n{}", some.join("\n"))
    }
}

/// Ends the clients also when the work panics.
struct EndOfWork<'a>(&'a AtomicBool);

impl Drop for EndOfWork<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Has `clients` threads of `namespace` dial the handler `hello` at random addresses and ports of `prefixes`, one connection after
/// another, for as long as `work` takes. It is told how many were served so far.
pub fn dial_during(namespace: &Netns, prefixes: &[&str], clients: usize, work: impl FnOnce(&AtomicU64)) -> Tally {
    let (is_over, served, failures) = (AtomicBool::new(false), AtomicU64::new(0), Mutex::new(Vec::new()));
    scope(|scope| {
        let _end = EndOfWork(&is_over);
        for client in 0..clients {
            let (is_over, served, failures) = (&is_over, &served, &failures);
            scope.spawn(move || {
                namespace.enter(|| {
                    let mut random = Random::new(&format!("steady {client}"));
                    while !is_over.load(Relaxed) {
                        let prefix: &str = random.pick::<&str>(prefixes);
                        let to = SocketAddr::new(random.address(prefix), random.port());
                        match dial(to) {
                            Ok(()) => drop(served.fetch_add(1, Relaxed)),
                            Err(failure) => failures.lock().expect("a lock").push(failure),
                        }
                    }
                });
            });
        }
        work(&served);
    });
    Tally { served: served.into_inner(), failures: failures.into_inner().expect("a lock") }
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
