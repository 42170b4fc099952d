//! How long a daemon lets others wait while it is attacked or busy: for answers to `status`, and for new connections.

use std::{
    fmt,
    net::SocketAddr,
    thread::sleep,
    time::{Duration, Instant},
};

use crate::{daemon::Daemon, dial::expect_tcp_hello, http, netns::Netns};

/// A build that is not optimized shares its processors with attackers that are.
const SLOWER: u32 = if cfg!(debug_assertions) { 3 } else { 1 };
/// How long 99 of 100 answers to `status` may take.
pub const STATUS: Duration = Duration::from_millis(SLOWER as u64 * 100);
/// How long 99 of 100 new connections may take, until they are answered.
pub const CONNECTION: Duration = Duration::from_millis(SLOWER as u64 * 50);
/// How long anything may take, on a machine that does other things, too.
const LONGEST: Duration = Duration::from_secs(2);
/// Between one question and the next.
const PAUSE: Duration = Duration::from_millis(10);

/// How long things took.
#[derive(Debug, Default)]
pub struct Times(Vec<Duration>);

impl Times {
    /// Adds how long `work` takes.
    pub fn measure<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let result = work();
        self.0.push(begun.elapsed());
        result
    }

    /// Which time `part` of 100 are not above.
    fn percentile(&self, part: usize) -> Duration {
        let mut times = self.0.clone();
        times.sort_unstable();
        times[(times.len() * part).div_ceil(100) - 1]
    }

    /// Prints them, and panics where 99 of 100 are not within `limit`.
    #[expect(clippy::print_stderr, reason = "shows how far from the limit it was")]
    pub fn expect_within(&self, limit: Duration, what: &str) {
        eprintln!("{what} took {self}");
        assert!(self.percentile(99) <= limit && self.percentile(100) <= LONGEST, "{what} took {self}: {:?}", self.0);
    }
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [median, p99, longest] = [50, 99, 100].map(|part| self.percentile(part));
        write!(f, "{median:?} (median), {p99:?} (p99), {longest:?} (longest of {})", self.0.len())
    }
}

/// Asks for `status` as root, without the start of a process, for as long as `goes_on` says of how often that was. Where
/// there is a `client`, it dials that address, where `hello` answers, after each question. All answers come, and come in
/// time, and no connection is lost.
pub fn expect_prompt(
    daemon: &Daemon,
    client: Option<(&Netns, SocketAddr)>,
    what: &str,
    goes_on: impl Fn(usize) -> bool,
) {
    let (mut answers, mut connections) = (Times::default(), Times::default());
    let mut asked = 0;
    while goes_on(asked) {
        let (status, answer) = answers.measure(|| http::request(&daemon.socket(), "GET", "/v1/status", b""));
        assert_eq!(status, 200, "{what}: {answer}");
        if let Some((namespace, to)) = client {
            namespace.enter(|| connections.measure(|| expect_tcp_hello(to)));
        }
        asked += 1;
        sleep(PAUSE);
    }
    answers.expect_within(STATUS, &format!("{what}: status"));
    if client.is_some() {
        connections.expect_within(CONNECTION, &format!("{what}: a connection"));
    }
}
