//! Packets of unusual shape, and TCP's corner cases, which each back end must see like the kernel's own lookup.

use std::{
    io::ErrorKind,
    net::{SocketAddr, TcpListener, UdpSocket},
    time::{Duration, Instant},
};

use anyport_tests::{
    daemon::LogOnPanic,
    dial::{PATIENCE, QUESTION, SILENCE, expect_tcp_hello, hello, read_text, receive, tcp_from, tcp_text},
    host::wait_for,
    packet::{Extra, send_udp, shake_hands},
    random::Random,
    topology::CLIENT,
};
use libtest_mimic::Trial;

use crate::cases::{BACKENDS, Family, Lab, Shared, at, on_each_back_end, shared, trial};

/// A steered address of each family.
const STEERED: [&str; 2] = ["192.0.2.3", "2001:db8:0:a::3"];

/// What stands before the transport header, by name.
const SHAPES: [(&str, Extra); 9] = [
    ("IPv4 without options", Extra::Options(&[])),
    ("IPv4 with one word of options", Extra::Options(&[1, 1, 1, 0])),
    ("IPv4 with ten words of options", Extra::Options(&[1; 40])),
    ("IPv6 without extension headers", Extra::Chain(&[])),
    ("IPv6 with hop-by-hop options", Extra::Chain(&[0])),
    ("IPv6 with destination options", Extra::Chain(&[60])),
    ("IPv6 with hop-by-hop and destination options", Extra::Chain(&[0, 60])),
    ("IPv6 with an atomic fragment header", Extra::Chain(&[44])),
    ("IPv6 with four extension headers", Extra::Chain(&[0, 60, 44, 60])),
];

/// Shapes that `tc` can't steer. The others can, and none may leave them to the host.
const HIDDEN: [(&str, Extra); 2] = [
    ("a SYN in fragments of eight bytes", Extra::Fragments(8)),
    ("a SYN behind nine extension headers", Extra::Chain(&[60; 9])),
];

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for backend in BACKENDS {
        let lab = shared(move || {
            let lab = Lab::new(backend);
            lab.daemon.ok("add-prefix 192.0.2.0/24 2001:db8:0:a::/64 --protocol both");
            lab
        });
        for (name, extra) in SHAPES {
            let lab = lab.clone();
            trials.push(trial(format!("{backend}::wire::{name}"), move || shape(&lab, extra)));
        }
        trials.push(trial(format!("{backend}::wire::v4-mapped clients"), move || mapped(&lab)));
        for (name, extra) in HIDDEN {
            trials.push(trial(format!("{backend}::wire::{name}"), move || hidden(backend, extra)));
        }
    }
    trials.extend(on_each_back_end("wire::TIME_WAIT is taken over", time_wait));
    trials.extend(on_each_back_end("wire::SYN cookies", syn_cookies));
    trials
}

/// A datagram of this shape is answered by `hello`, a SYN by the handshake.
fn shape(lab: &Shared, extra: Extra) {
    let _log = LogOnPanic(&lab.daemon);
    let family = if matches!(extra, Extra::Options(_)) { Family::V4 } else { Family::V6 };
    let mut random = Random::new("shape");
    let to = at(family.of(STEERED), random.port());
    lab.topology.client.enter(|| {
        let socket = UdpSocket::bind(at(family.of(CLIENT), 0)).expect("a UDP socket");
        socket.connect(to).expect("a connected UDP socket");
        socket.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        let from = socket.local_addr().expect("an own address");
        send_udp(from, to, extra, QUESTION).expect("sending a datagram of this shape");
        let mut buffer = [0; 2_048];
        let (length, _) = receive(&socket, &mut buffer).expect("an answer to a datagram of this shape");
        assert_eq!(String::from_utf8_lossy(&buffer[..length]), hello(from, to, "udp"));
        shake_hands(from, to, extra, PATIENCE).expect("a handshake after a SYN of this shape");
    });
}

/// What can't be read at the interface is steered or dropped, but reaches no listener of the host.
fn hidden(backend: &str, extra: Extra) {
    let lab = Lab::new(backend);
    let host = &lab.topology.host;
    let family = if matches!(extra, Extra::Chain(_)) { Family::V6 } else { Family::V4 };
    let port = 2_222;
    // Addresses with a listener that are the host's own, by another's route.
    let (others, route) =
        (family.of(["192.0.3.3", "2001:db8:0:b::3"]), family.of(["192.0.3.0/24", "2001:db8:0:b::/64"]));
    let listener = host.enter(|| TcpListener::bind(at(family.of(["0.0.0.0", "::"]), port))).expect("a listener");
    host.ip(&format!("route add local {route} dev lo"));
    lab.daemon.ok("add-prefix 192.0.2.0/24 2001:db8:0:a::/64 --force");
    let dial = |to: &str, own: u16, patience| {
        let from = at(family.of(CLIENT), own);
        lab.topology.client.enter(|| shake_hands(from, at(to, port), extra, patience))
    };
    dial(others, 40_001, PATIENCE).expect("a SYN of this shape reaches a listener of the host's where no rule is");
    let is_dropped = backend == "tc";
    let patience = if is_dropped { SILENCE } else { PATIENCE };
    let outcome = dial(family.of(STEERED), 40_002, patience);
    assert!(outcome.is_err() == is_dropped, "a SYN of this shape to a steered address: {outcome:?}");
    let prefix = family.of(["192.0.2.0/24", "2001:db8:0:a::/64"]);
    assert_eq!(lab.daemon.count(prefix, "steered") > 0, !is_dropped, "whether a rule counts it as steered");
    drop(listener);
}

/// An IPv6 socket that dials `::ffff:192.0.2.3` sends IPv4, and is told so.
fn mapped(lab: &Shared) {
    let _log = LogOnPanic(&lab.daemon);
    for client in ["remote", "local"] {
        let text = lab.at(client).enter(|| tcp_text(at("::ffff:192.0.2.3", 80))).expect("an answer");
        assert!(text.ends_with(", you reached 192.0.2.3:80 over tcp\n"), "answer to a v4-mapped client: {text:?}");
    }
}

/// The same four numbers again, while the daemon's host still waits out the first connection: `hello` closed first.
fn time_wait(backend: &'static str) {
    let lab = Lab::new(backend);
    lab.daemon.ok("add-prefix 192.0.2.0/24 2001:db8:0:a::/64");
    for family in Family::ALL {
        let to = at(family.of(STEERED), 8_443);
        let from = at(family.of(CLIENT), 41_000);
        for round in 0..5 {
            let (text, taken) = lab.topology.client.enter(|| dial_from(from, to));
            assert_eq!(text, hello(from, to, "tcp"), "round {round}");
            // The client's last word may still be on its way.
            wait_for("connection in TIME_WAIT", Duration::from_secs(3), || {
                let waiting = lab.topology.host.run("ss", ["-Htan", "state", "time-wait"]);
                if waiting.contains(":8443") { Ok(()) } else { Err(waiting) }
            });
            // A SYN that is answered only when it is repeated comes after a second.
            assert!(taken < Duration::from_millis(900), "round {round} took {taken:?}");
        }
    }
}

/// The answer and how long it took.
fn dial_from(from: SocketAddr, to: SocketAddr) -> (String, Duration) {
    // The client's own socket of the time before lives until the last acknowledgement comes.
    let (begin, mut stream) = wait_for("a free port", Duration::from_secs(3), || {
        let begin = Instant::now();
        match tcp_from(from, to) {
            Err(error) if error.kind() == ErrorKind::AddrNotAvailable => Err(format!("{from} to {to}: {error}")),
            stream => Ok((begin, stream.unwrap_or_else(|error| panic!("{from} to {to}: {error}")))),
        }
    });
    let text = read_text(&mut stream).unwrap_or_else(|error| panic!("reading on {from} from {to}: {error}"));
    // The peer's end was read, so that closing leaves nothing here that could be in the way.
    assert_eq!(read_text(&mut stream).expect("the end once more"), "");
    (text, begin.elapsed())
}

/// With cookies for every SYN, neither the SYN nor the acknowledgement finds anything of the connection before.
fn syn_cookies(backend: &'static str) {
    let lab = Lab::new(backend);
    lab.topology.host.sysctl("net.ipv4.tcp_syncookies", "2");
    lab.daemon.ok("add-prefix 192.0.2.0/24 2001:db8:0:a::/64");
    let mut random = Random::new("cookies");
    for client in ["remote", "local"] {
        lab.at(client).enter(|| {
            for prefix in ["192.0.2.0/24", "2001:db8:0:a::/64"] {
                for _ in 0..25 {
                    expect_tcp_hello(SocketAddr::new(random.address(prefix), random.port()));
                }
            }
        });
    }
    let counters = lab.topology.host.enter(|| std::fs::read_to_string("/proc/thread-self/net/netstat"));
    let received = cookies_received(&counters.expect("the namespace's counters"));
    assert!(received >= 100, "the test needs 100 connections by cookie, but there were {received}");
}

/// `TcpExt: SyncookiesRecv` of `/proc/net/netstat`: a line of names, then a line of numbers.
fn cookies_received(counters: &str) -> u64 {
    let mut lines = counters.lines().filter(|line| line.starts_with("TcpExt:")).map(str::split_whitespace);
    let (names, values) = (lines.next().expect("names"), lines.next().expect("numbers"));
    let (_, value) = names.zip(values).find(|(name, _)| *name == "SyncookiesRecv").expect("the counter");
    value.parse().expect("a number")
}
