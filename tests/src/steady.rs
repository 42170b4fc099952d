//! Clients that dial all the time while something happens to the daemon.

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::scope,
};

use crate::{
    dial::{hello, read_text, tcp},
    netns::Netns,
    random::Random,
};

/// What became of a connection to the handler `hello` that was not served.
#[derive(Clone, Debug)]
pub enum Failure {
    /// There was none.
    Refused(SocketAddr, String),
    /// It was established, and ended before the first byte.
    Unanswered(SocketAddr, String),
    /// Somebody else answered.
    Misdirected(SocketAddr, String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, to, why) = match self {
            Self::Refused(to, why) => ("refused", to, why),
            Self::Unanswered(to, why) => ("established and not answered", to, why),
            Self::Misdirected(to, why) => ("answered by another", to, why),
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
    /// Those that were established and not answered.
    pub fn unanswered(&self) -> usize {
        self.failures.iter().filter(|failure| matches!(failure, Failure::Unanswered(..))).count()
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
    let mut stream = tcp(to).map_err(|error| Failure::Refused(to, error.to_string()))?;
    let local = stream.local_addr();
    match (read_text(&mut stream), local) {
        (Ok(text), Ok(local)) if text == hello(local, to, "tcp") => Ok(()),
        (Ok(text), Ok(_)) if text.is_empty() => Err(Failure::Unanswered(to, "end of stream".into())),
        (Ok(text), Ok(_)) => Err(Failure::Misdirected(to, text)),
        // Without an address of its own the connection was reset at once.
        (Err(error), _) | (_, Err(error)) => Err(Failure::Unanswered(to, error.to_string())),
    }
}
