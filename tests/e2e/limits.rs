//! Limits on connections and flows: in total, by service and by source.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyport_tests::{
    dial::{PATIENCE, expect_tcp_echo, expect_udp_text, expect_udp_unanswered, tcp, tcp_from, udp_server},
    host::wait_for,
    netns::Netns,
    topology::{SECOND, SERVER},
};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::cases::{Family, Lab, at, on_each_back_end, trial};

/// A steered prefix of each family.
const PREFIX: [&str; 2] = ["192.0.2.0/24", "2001:db8:0:a::/64"];
/// Addresses in them.
const ONE: [&str; 2] = ["192.0.2.201", "2001:db8:0:a::201"];
/// How long a source is greedy.
const GREED: Duration = Duration::from_secs(2);

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(on_each_back_end("limits::a greedy source leaves the others their place", greedy));
    trials.push(trial("limits::of a service and of a source", numbers));
    trials.push(trial("limits::of a source's rate", rates));
    trials.push(trial("limits::flows count as connections", flows));
    trials.push(trial("limits::a file sets them, and they outlive the daemon", kept));
    trials
}

/// Hosts and a daemon with a service `echo` that has these settings, for both families.
fn lab(backend: &str, options: &[&str], settings: &str) -> Lab {
    let lab = Lab::with(backend, |setup| setup.args(options));
    lab.daemon.ok(&format!("add-service echo --handler echo {settings}"));
    lab.daemon.ok(&format!("add-prefix {} {} --service echo", PREFIX[0], PREFIX[1]));
    lab
}

/// What is known of the service.
fn service(lab: &Lab, name: &str) -> Value {
    let services = lab.daemon.json("services");
    services.as_array().expect("services").iter().find(|it| it["name"] == name).expect("the service").clone()
}

/// How many were refused for each reason: total, service, source, rate.
fn refused(lab: &Lab, name: &str) -> [u64; 4] {
    let service = service(lab, name);
    ["total", "service", "source", "rate"].map(|why| service[format!("refused_{why}")].as_u64().expect("a count"))
}

fn wait_for_active(lab: &Lab, count: u64) {
    wait_for("open connections", PATIENCE, || {
        let active = &service(lab, "echo")["active"];
        if *active == count { Ok(()) } else { Err(format!("{active} of {count}")) }
    });
}

/// The connection that `dial` makes if the service lets it in, which otherwise resets it.
fn let_in(dial: impl FnOnce() -> io::Result<TcpStream>) -> Option<TcpStream> {
    let served = dial().and_then(|mut stream| {
        stream.write_all(b"?")?;
        stream.read_exact(&mut [0])?;
        Ok(stream)
    });
    let is_reset = |error: &io::Error| {
        // A word to a connection that was reset is EPIPE.
        matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
    };
    served.inspect_err(|error| assert!(is_reset(error), "neither served nor reset: {error}")).ok()
}

/// How many connections to `to` are let in out of `attempts`, all of them kept.
fn fill(client: &Netns, to: SocketAddr, attempts: usize) -> Vec<TcpStream> {
    client.enter(|| (0..attempts).filter_map(|_| let_in(|| tcp(to))).collect())
}

/// Connects as fast as it can and keeps all; says how many it has tried.
fn grab(to: SocketAddr) -> usize {
    let (begin, mut streams) = (Instant::now(), Vec::new());
    let mut attempts = 0;
    while begin.elapsed() < GREED {
        attempts += 1;
        // A reset may be there before the connection is.
        streams.extend(tcp(to));
        if streams.len() == 5_000 {
            streams.drain(..1_000);
        }
    }
    attempts
}

fn greedy(backend: &'static str) {
    let lab = lab(backend, &["--max-connections", "50"], "");
    for family in Family::ALL {
        let (to, before) = (at(family.of(ONE), 80), refused(&lab, "echo"));
        let client = lab.topology.client.clone();
        let greedy = thread::spawn(move || client.enter(|| grab(to)));
        let (begin, mut served) = (Instant::now(), 0);
        while begin.elapsed() < GREED {
            lab.topology.server.enter(|| expect_tcp_echo(tcp(to).expect("a connection"), b"let me in"));
            served += 1;
        }
        let attempts = greedy.join().expect("a greedy client");
        wait_for_active(&lab, 0);
        let of_source = refused(&lab, "echo")[2] - before[2];
        assert!(served > 10 && attempts > 100, "{served} served, {attempts} attempts");
        assert!(of_source > 0, "IPv{family}: none of {attempts} refused");
        assert_eq!(refused(&lab, "echo")[0], 0, "IPv{family}: the others filled what was left");
    }
    // Four fifths of all, for a source that is alone.
    let held = fill(&lab.topology.client, at(ONE[0], 80), 60);
    assert_eq!(held.len(), 40);
    assert!(lab.daemon.ok("status").contains("connections and flows refused"));
    drop(held);
    wait_for_active(&lab, 0);
}

fn numbers() {
    let lab = lab("sk-lookup", &[], "--max-connections 5 --max-connections-per-source 3");
    for family in Family::ALL {
        let (to, before) = (at(family.of(ONE), 80), refused(&lab, "echo"));
        let held = fill(&lab.topology.client, to, 10);
        assert_eq!(held.len(), 3);
        let others = fill(&lab.topology.server, to, 10);
        assert_eq!(others.len(), 2);
        let after = refused(&lab, "echo");
        assert_eq!([0, 1, 2, 3].map(|why| after[why] - before[why]), [0, 8, 7, 0], "IPv{family}");
        drop(held);
        wait_for_active(&lab, 2);
        assert_eq!(fill(&lab.topology.client, to, 3).len(), 3, "places that were given back");
        drop(others);
        wait_for_active(&lab, 0);
    }
    // All addresses of a /64 are one source, two of IPv4 are two.
    let from = |address: &str, to: [&str; 2], family: Family| {
        let (from, to) = (at(address, 0), at(family.of(to), 80));
        lab.topology.server.enter(|| let_in(|| tcp_from(from, to)))
    };
    let held: Vec<_> = [SERVER[1], SECOND[1], SERVER[1], SECOND[1]].map(|it| from(it, ONE, Family::V6)).into();
    assert_eq!(held.iter().flatten().count(), 3);
    drop(held);
    wait_for_active(&lab, 0);
    let held: Vec<_> = [SERVER[0], SECOND[0], SERVER[0], SECOND[0]].map(|it| from(it, ONE, Family::V4)).into();
    assert_eq!(held.iter().flatten().count(), 4);
}

fn rates() {
    let lab = lab("sk-lookup", &[], "--accept-rate-per-source 5/h");
    for family in Family::ALL {
        let to = at(family.of(ONE), 80);
        for _ in 0..5 {
            lab.topology.client.enter(|| expect_tcp_echo(tcp(to).expect("a connection"), b"one of five"));
        }
        assert!(fill(&lab.topology.client, to, 20).is_empty());
        assert_eq!(fill(&lab.topology.server, to, 6).len(), 5);
    }
    assert_eq!(refused(&lab, "echo"), [0, 0, 0, 42]);
    lab.daemon.ok("add-service fast --handler echo --accept-rate-per-source 1/200ms");
    lab.daemon.ok("add-prefix 192.0.2.1 --service fast");
    let begin = Instant::now();
    // What comes too fast is served later, when its time has come.
    for _ in 0..4 {
        wait_for("turn", PATIENCE, || {
            let served = fill(&lab.topology.client, at("192.0.2.1", 80), 1);
            if served.is_empty() { Err("not yet".to_owned()) } else { Ok(()) }
        });
    }
    assert!(begin.elapsed() >= Duration::from_millis(600), "{:?}", begin.elapsed());
}

fn flows() {
    let lab = Lab::new("sk-lookup");
    for (family, upstream) in Family::ALL.into_iter().zip([format!("{}:53", SERVER[0]), format!("[{}]:53", SERVER[1])])
    {
        let name = format!("up{family}");
        lab.daemon
            .ok(&format!("add-service {name} --handler forward --upstream {upstream} --max-connections-per-source 2"));
        lab.daemon.ok(&format!("add-prefix {} --protocol udp --service {name}", family.of(PREFIX)));
        let socket = lab.topology.server.enter(|| std::net::UdpSocket::bind(at(family.of(SERVER), 53)));
        udp_server(socket.expect("a UDP socket"), "an answer");
        let to = at(family.of(ONE), 53);
        for _ in 0..2 {
            lab.topology.client.enter(|| expect_udp_text(to, "an answer"));
        }
        lab.topology.client.enter(|| expect_udp_unanswered(to));
        lab.topology.host.enter(|| expect_udp_text(to, "an answer"));
        let service = service(&lab, &name);
        assert_eq!((refused(&lab, &name), &service["unforwarded"]), ([0, 0, 1, 0], &0.into()));
    }
}

fn kept() {
    let mut lab = Lab::new("sk-lookup");
    lab.daemon.ok("add-service by-hand --handler echo --max-connections-per-source 1");
    lab.daemon.ok(&format!("add-prefix {} --service by-hand", PREFIX[0]));
    let directory = anyport_tests::prerequisites::scratch();
    let file = directory.path().join("services.toml");
    let text = |count| {
        format!(
            "[[service]]\nname = \"applied\"\nhandler = \"echo\"\nmax-connections = {count}\n\
             max-connections-per-source = 9\naccept-rate-per-source = \"9/s\"\n\
             [[rule]]\nprefix = \"{}\"\nservice = \"applied\"\n",
            PREFIX[1]
        )
    };
    fs::write(&file, text("2")).expect("a file");
    lab.daemon.ok(&format!("apply {}", file.display()));
    fs::write(&file, text("-2")).expect("a file");
    lab.daemon.refused(&format!("apply {}", file.display()), 2);
    let check = |lab: &Lab| {
        assert_eq!(fill(&lab.topology.client, at(ONE[0], 80), 3).len(), 1);
        assert_eq!(fill(&lab.topology.client, at(ONE[1], 80), 3).len(), 2);
        let of_applied = service(lab, "applied");
        assert_eq!((&of_applied["max_connections"], &of_applied["accept_rate_per_source"]), (&2.into(), &"9/s".into()));
    };
    check(&lab);
    lab.daemon.stop();
    lab.daemon.restart();
    check(&lab);
}
