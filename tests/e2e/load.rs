//! What happens to clients that dial while the rules change.

use std::{
    collections::HashSet,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    thread::{scope, sleep},
    time::{Duration, Instant},
};

use anyport_tests::{daemon::LogOnPanic, dial::tcp, http, random::Random};
use libtest_mimic::Trial;
use serde_json::json;

use crate::cases::{BACKENDS, Lab, trial};

/// Each address of it is as good as any other; no two connections share one.
const PREFIX: &str = "2001:db8:0:a::/64";
const CLIENTS: usize = 8;
/// Connections that a client opens at most, and keeps.
const EACH: usize = 150;
/// Between two connections of a client, so that they dial before, during and after the change.
const PAUSE: Duration = Duration::from_millis(1);
/// How often the prefix goes.
const ROUNDS: usize = 4;
/// How long a connection may take to come through. The kernel sends again what was lost, with growing pauses.
const RECOVERY: Duration = Duration::from_secs(10);

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for backend in BACKENDS {
        for client in ["remote", "local"] {
            let name = format!("{backend}::established connections survive remove-prefix under load::{client}");
            let label = name.clone();
            trials.push(trial(name, move || survive_removal(backend, client, &label)));
        }
    }
    trials
}

/// Many clients dial while the prefix goes: a connection that was established is served, however late.
fn survive_removal(backend: &str, client: &str, label: &str) {
    let lab = Lab::new(backend);
    let _log = LogOnPanic(&lab.daemon);
    lab.daemon.ok("add-service echo --handler echo");
    let mut random = Random::new(label);
    let mut failures = Vec::new();
    let mut established = 0;
    for round in 0..ROUNDS {
        lab.daemon.ok(&format!("add-prefix {PREFIX} --service echo"));
        let streams = dial_and_remove(&lab, client, &mut random);
        established += streams.len();
        let failed = unanswered(streams);
        failures.extend(failed.into_iter().map(|failure| format!("round {round}: {failure}")));
        if !failures.is_empty() {
            break;
        }
    }
    assert!(
        failures.is_empty(),
        "{} of {established} connections that were established are dead after remove-prefix, such as\n{}",
        failures.len(),
        failures.iter().take(8).map(String::as_str).collect::<Vec<_>>().join("\n"),
    );
}

/// What the clients got while the prefix went. Those that were refused are not among them.
fn dial_and_remove(lab: &Lab, client: &str, random: &mut Random) -> Vec<TcpStream> {
    let count = AtomicUsize::new(0);
    let removed = AtomicBool::new(false);
    let remove_at = CLIENTS * EACH / 4 + random.below(CLIENTS * EACH / 4);
    let mut seen = HashSet::new();
    let mut addresses: Vec<Vec<SocketAddr>> = Vec::new();
    for _ in 0..CLIENTS {
        let fresh = std::iter::repeat_with(|| SocketAddr::new(random.address(PREFIX), random.port()));
        addresses.push(fresh.filter(|to| seen.insert(to.ip())).take(EACH).collect());
    }
    scope(|scope| {
        let clients: Vec<_> = addresses
            .into_iter()
            .map(|addresses| {
                let (count, removed) = (&count, &removed);
                scope.spawn(move || {
                    lab.at(client).enter(|| {
                        let mut streams = Vec::new();
                        for to in addresses {
                            let was_removed = removed.load(Relaxed);
                            streams.extend(tcp(to).ok().inspect(|_| {
                                count.fetch_add(1, Relaxed);
                            }));
                            if was_removed {
                                break;
                            }
                            sleep(PAUSE);
                        }
                        streams
                    })
                })
            })
            .collect();
        wait_until(|| count.load(Relaxed) >= remove_at);
        // Faster than the client program, so that the dialling goes on meanwhile.
        let body = json!({ "prefixes": [PREFIX] }).to_string();
        let answer = http::request(&lab.daemon.socket(), "DELETE", "/v1/prefixes", body.as_bytes());
        removed.store(true, Relaxed);
        assert!(answer.0 == 200, "remove-prefix under load: {answer:?}");
        clients.into_iter().flat_map(|client| client.join().expect("a dialling thread")).collect()
    })
}

/// Waits, with less delay than `host::wait_for`, which is there for things that take longer.
fn wait_until(condition: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < end, "the clients' connections did not come to be within 20 s");
        sleep(Duration::from_micros(100));
    }
}

/// Sends a line over each connection at the same time, and tells which did not bring it back.
fn unanswered(mut streams: Vec<TcpStream>) -> Vec<String> {
    let describe = |stream: &TcpStream| format!("{:?} to {:?}", stream.local_addr().ok(), stream.peer_addr().ok());
    let line = |number: usize| format!("line {number:5}\n").into_bytes();
    let mut failures = Vec::new();
    let mut open = Vec::new();
    for (number, mut stream) in streams.drain(..).enumerate() {
        match stream.write_all(&line(number)) {
            Ok(()) => open.push((number, stream)),
            Err(error) => failures.push(format!("{}: sending: {error}", describe(&stream))),
        }
    }
    let end = Instant::now() + RECOVERY;
    for (number, mut stream) in open {
        let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        stream.set_read_timeout(Some(left)).expect("a time limit");
        let mut back = vec![0; line(number).len()];
        match stream.read_exact(&mut back) {
            Ok(()) if back == line(number) => {}
            Ok(()) => failures.push(format!("{}: wrong echo {:?}", describe(&stream), String::from_utf8_lossy(&back))),
            Err(error) => failures.push(format!("{}: no echo: {error}", describe(&stream))),
        }
    }
    failures
}
