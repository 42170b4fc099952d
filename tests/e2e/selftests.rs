//! The kernel's own selftests, as far as they make sense for a product, under their names.
//!
//! | selftest | here |
//! |---|---|
//! | sk_lookup `query lookup prog` | [`query`] |
//! | sk_lookup `… redir port`, `… redir addr` (TCP, UDP, IPv4, IPv6), and sk_assign's eight cases | [`redirect`] |
//! | sk_lookup `… redir with reuseport` | [`spread`]: the group chooses among the workers |
//! | sk_lookup `… redir and reuseport with conns` | `udp::clients do not mix`: answers leave from sockets of their own |
//! | sk_lookup `… drop on lookup` | [`no_live_socket`], [`killed`] |
//! | sk_lookup `sk_assign rejects … established`, `connected` | `established connections survive …`, `udp::a connected socket …` |
//! | assign_reuse `tcpv4`, `tcpv6`, `udpv4`, `udpv6` | [`once`]: the program decides exactly once for each question |
//! | nft_tproxy_tcp and nft_tproxy_udp, forward and local | [`intercept`] |
//! | select_reuseport `test_syncookie` | `wire::SYN cookies` |
//!
//! | not here | reason |
//! |---|---|
//! | sk_lookup `… skip reuseport` | anyport never asks for one certain member of a group |
//! | sk_lookup `IPv4->IPv6 redir port` | there is a socket for each family; v4-mapped *clients* are in `wire` |
//! | sk_lookup `drop on valid ifindex` | no rule is about interfaces |
//! | sk_lookup `drop on reuseport`, the rest of select_reuseport | no program is attached to a group of ours |
//! | sk_lookup `sk_assign returns EEXIST`, `honors F_REPLACE`, `accepts NULL`, `access ctx`, `narrow access` | one helper's arguments, which only the kernel's own test programs vary |
//! | sk_lookup `multi prog - …` | needs foreign programs; how verdicts combine is the kernel's matter |
//! | migrate_reuseport | belongs to upgrades without loss, a later issue |
//! | sockmap_listen | the map's own semantics; what matters of them is [`no_live_socket`] |
//! | nft_tproxy's checks that the router itself is *not* intercepted | anyport steers local clients on purpose |

use std::{
    net::{TcpStream, UdpSocket},
    process::Command,
    time::Duration,
};

use anyport_tests::{
    daemon::{Daemon, LogOnPanic},
    dial::{
        PATIENCE, QUESTION, any, expect_tcp_hello, expect_tcp_refused, expect_udp_hello, expect_udp_text,
        expect_udp_unanswered, is_refusal, read_text, receive, tcp, tcp_server, tcp_text, udp_server,
    },
    host::wait_for,
    topology::{SECOND, SERVER},
};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::cases::{BACKENDS, Family, Lab, Shared, at, on_each_back_end, shared, trial};

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for backend in BACKENDS {
        let lab = shared(move || {
            let lab = Lab::new(backend);
            lab.daemon.ok("add-prefix 192.0.2.1 2001:db8:0:a::1 --protocol both --ports 7007");
            lab.daemon.ok("add-prefix 192.0.2.2 2001:db8:0:a::2 --protocol both");
            lab
        });
        for family in Family::ALL {
            for (protocol, upper) in [("tcp", "TCP"), ("udp", "UDP")] {
                for what in ["port", "addr"] {
                    let name = match backend {
                        "sk-lookup" => format!("sk-lookup::sk_lookup::{upper} IPv{family} redir {what}"),
                        _ => format!("{backend}::sk_assign::ipv{family} {protocol} {what} redir"),
                    };
                    let lab = lab.clone();
                    trials.push(trial(name, move || redirect(&lab, family, protocol, what)));
                }
            }
        }
    }
    trials.push(trial("sk-lookup::sk_lookup::query lookup prog", query));
    for backend in ["sk-lookup", "tc"] {
        trials.push(trial(format!("{backend}::sk_lookup::drop on lookup"), move || no_live_socket(backend)));
        trials.push(trial(format!("{backend}::assign_reuse"), move || once(backend)));
    }
    trials.extend(on_each_back_end("sk_lookup::drop on lookup, after SIGKILL", killed));
    trials.extend(on_each_back_end("sk_lookup::redir with reuseport", spread));
    trials.extend(on_each_back_end("nft_tproxy", intercept));
    trials
}

/// The listener's port on another address, and another port.
fn redirect(lab: &Shared, family: Family, protocol: &str, what: &str) {
    let _log = LogOnPanic(&lab.daemon);
    let to = match what {
        "port" => at(family.of(["192.0.2.1", "2001:db8:0:a::1"]), 7007),
        _ => at(family.of(["192.0.2.2", "2001:db8:0:a::2"]), listening_port(&lab.daemon, protocol, family)),
    };
    for client in ["remote", "local"] {
        lab.at(client).enter(|| if protocol == "tcp" { expect_tcp_hello(to) } else { expect_udp_hello(to) });
    }
}

/// The port to which the default service's own socket is bound, by `services --json`.
fn listening_port(daemon: &Daemon, protocol: &str, family: Family) -> u16 {
    let services = daemon.json("services");
    let all = services.as_array().expect("an array of services");
    let default = all.iter().find(|service| service["name"] == "default").expect("the service `default`");
    let sockets = default["sockets"].as_array().expect("an array of sockets");
    let of_kind = |socket: &&Value| {
        let local = socket["local"].as_str().expect("an address and port");
        socket["protocol"] == protocol && local.starts_with('[') == (family == Family::V6)
    };
    let socket = sockets.iter().find(of_kind).unwrap_or_else(|| panic!("no {protocol}{family} socket in {default}"));
    let (_, port) = socket["local"].as_str().expect("an address and port").rsplit_once(':').expect("a port");
    port.parse().expect("a port number")
}

/// The program is attached to exactly the daemon's namespace, as `bpftool` tells, and is gone afterwards.
fn query() {
    let mut lab = Lab::new("sk-lookup");
    let host = lab.topology.host.clone();
    let attached = || -> Vec<Value> {
        // While another test makes a link the kernel says EAGAIN for its number, and bpftool gives up.
        let links = wait_for("list of all links", Duration::from_secs(5), || {
            let outcome = host.output(Command::new("bpftool").args(["-j", "link", "show"]));
            if outcome.status == 0 { Ok(outcome.stdout) } else { Err(outcome.to_string()) }
        });
        let links: Vec<Value> = serde_json::from_str(&links).expect("JSON of bpftool");
        links.into_iter().filter(|link| link["netns_ino"] == host.inode()).collect()
    };
    let links = attached();
    assert!(links.len() == 1 && links[0]["attach_type"] == "sk_lookup", "links of the namespace: {links:?}");
    lab.daemon.stop();
    let links = attached();
    assert!(links.is_empty(), "links after the end: {links:?}");
}

/// A rule whose service has lost its sockets refuses, counts, and never reaches the host's own listener.
fn no_live_socket(backend: &'static str) {
    let lab = Lab::new(backend);
    lab.daemon.ok("add-service echo --handler echo");
    lab.daemon.ok("add-prefix 192.0.2.0/24 2001:db8:0:a::/64 --protocol both --service echo");
    let own = lab.topology.host.enter(|| {
        tcp_server(at("::", 8080), "the host's own\n");
        UdpSocket::bind(at("::", 8080)).expect("a UDP socket")
    });
    let pin = |name: &str| lab.daemon.bpffs().join(name).display().to_string();
    let rules = lab.topology.host.run("bpftool", ["-j", "map", "dump", "pinned", &pin("rules")]);
    let rules: Value = serde_json::from_str(&rules).expect("JSON of bpftool");
    let slot = rules[0]["formatted"]["value"]["service"].as_u64().expect("the service's slot");
    for client in ["remote", "local"] {
        for (prefix, address) in [("192.0.2.0/24", "192.0.2.80"), ("2001:db8:0:a::/64", "2001:db8:0:a::80")] {
            let before = lab.daemon.count(prefix, "dropped");
            // It would put them back at once.
            lab.daemon.pause();
            for member in 0..4 {
                let [a, b, c, d] = u32::try_from(slot * 4 + member).expect("a small number").to_ne_bytes();
                let line = format!("bpftool map delete pinned {} key {a} {b} {c} {d}", pin("sockets"));
                // The daemon may have put back what an earlier round took away, or not.
                lab.topology.host.output(Command::new("sh").args(["-c", &line]));
            }
            lab.at(client).enter(|| {
                expect_tcp_refused(at(address, 8080));
                assert!(expect_udp_unanswered(at(address, 8080)), "{client} UDP to {address}: silence, not a refusal");
            });
            lab.daemon.resume();
            let dropped = lab.daemon.count(prefix, "dropped") - before;
            assert!(dropped >= 2, "{client}: {dropped} packets to {prefix} counted as dropped, not two");
        }
    }
    own.set_nonblocking(true).expect("a non-blocking socket");
    let got = own.recv_from(&mut [0; 2_048]);
    assert!(got.is_err(), "the host's own UDP socket got {got:?}");
}

/// While a killed daemon has not been started again, what it steered reaches nobody else.
fn killed(backend: &'static str) {
    let mut lab = Lab::new(backend);
    lab.daemon.ok("add-prefix 192.0.2.0/24 2001:db8:0:a::/64");
    lab.topology.host.enter(|| tcp_server(at("::", 8080), "the host's own\n"));
    lab.daemon.kill();
    for client in ["remote", "local"] {
        for address in ["192.0.2.80", "2001:db8:0:a::80"] {
            lab.at(client).enter(|| {
                let to = at(address, 8080);
                // TPROXY drops what has no socket, so that its clients would wait.
                match TcpStream::connect_timeout(&to, Duration::from_millis(700)) {
                    Ok(mut stream) => panic!("{client}: {to} was answered by {:?}", read_text(&mut stream)),
                    Err(error) => {
                        let refused = is_refusal(&error);
                        assert!(refused || backend != "sk-lookup", "{client}: {to} was expected to refuse: {error}");
                    }
                }
            });
        }
    }
    lab.daemon.restart();
    lab.topology.client.enter(|| expect_tcp_hello(at("192.0.2.80", 8080)));
}

/// With the daemon stopped, connections and datagrams wait at the members of each group: every member has some.
fn spread(backend: &'static str) {
    const WORKERS: usize = 4;
    const CLIENTS: usize = 64;
    let lab = Lab::with(backend, |setup| setup.args(["--workers", "4"]));
    lab.daemon.ok("add-prefix 192.0.2.0/24 2001:db8:0:a::/64 --protocol both");
    for family in Family::ALL {
        let to = at(family.of(["192.0.2.3", "2001:db8:0:a::3"]), 3);
        lab.daemon.pause();
        let (streams, sockets) = lab.topology.client.enter(|| {
            let streams: Vec<TcpStream> = (0..CLIENTS).map(|_| tcp(to).expect("a connection")).collect();
            let sockets = (0..CLIENTS).map(|_| {
                let socket = UdpSocket::bind(any(to.ip())).expect("a UDP socket");
                socket.connect(to).expect("a connected UDP socket");
                socket.send(QUESTION).expect("sending");
                socket
            });
            (streams, sockets.collect::<Vec<UdpSocket>>())
        });
        let waiting = ["-Hltn", "-Huan"].map(|kind| waiting(&lab, kind));
        lab.daemon.resume();
        for (kind, queues) in ["TCP", "UDP"].into_iter().zip(waiting) {
            assert!(queues.len() == WORKERS, "{kind} IPv{family}: waiting at the sockets: {queues:?}");
        }
        for mut stream in streams {
            assert!(read_text(&mut stream).expect("an answer").contains(&format!("reached {to} over tcp")));
        }
        for socket in sockets {
            socket.set_read_timeout(Some(PATIENCE)).expect("a time limit");
            receive(&socket, &mut [0; 2_048]).expect("an answer to each datagram");
        }
    }
}

/// The receive queues of the host's sockets by `ss`, those that are not empty.
fn waiting(lab: &Lab, kind: &str) -> Vec<usize> {
    let listing = lab.topology.host.run("ss", [kind]);
    let queues = listing.lines().map(|line| line.split_whitespace().nth(1).expect("Recv-Q").parse().expect("a number"));
    queues.filter(|&queue| queue > 0).collect()
}

/// Each connection and each datagram is decided about exactly once, whichever socket of the group gets it.
fn once(backend: &'static str) {
    const QUESTIONS: u64 = 20;
    let lab = Lab::with(backend, |setup| setup.args(["--workers", "4"]));
    lab.daemon.ok("add-service echo --handler echo");
    for (prefix, address) in [("192.0.2.0/24", "192.0.2.3"), ("2001:db8:0:a::/64", "2001:db8:0:a::3")] {
        for protocol in ["tcp", "udp"] {
            lab.daemon.ok(&format!("add-prefix {prefix} --protocol {protocol}"));
            let ask = if protocol == "tcp" { expect_tcp_hello } else { expect_udp_hello };
            for client in ["remote", "local"] {
                lab.at(client).enter(|| (0..QUESTIONS).for_each(|_| ask(at(address, 3))));
            }
            let count = lab.daemon.count(prefix, "steered");
            assert_eq!(count, 2 * QUESTIONS, "decisions about {protocol} questions to {prefix}");
            lab.daemon.ok(&format!("remove-prefix {prefix}"));
        }
    }
}

/// One address and port of a server behind the router is intercepted; its other address is not.
fn intercept(backend: &'static str) {
    let lab = Lab::new(backend);
    lab.topology.server.enter(|| {
        for address in SERVER.into_iter().chain(SECOND) {
            tcp_server(at(address, 8080), "PONG_NS3\n");
            udp_server(UdpSocket::bind(at(address, 8080)).expect("a UDP socket"), "PONG_NS3\n");
        }
    });
    let ask_server = |address: &str| {
        assert_eq!(tcp_text(at(address, 8080)).expect("an answer of the server"), "PONG_NS3\n", "TCP to {address}");
        expect_udp_text(at(address, 8080), "PONG_NS3\n");
    };
    for client in ["remote", "local"] {
        lab.at(client).enter(|| SERVER.into_iter().chain(SECOND).for_each(ask_server));
    }
    lab.daemon.ok(&format!("add-prefix {} --protocol both --ports 8080 --force", SERVER.join(" ")));
    for client in ["remote", "local"] {
        lab.at(client).enter(|| {
            for address in SERVER {
                expect_tcp_hello(at(address, 8080));
                expect_udp_hello(at(address, 8080));
            }
            SECOND.into_iter().for_each(ask_server);
        });
    }
    lab.daemon.ok(&format!("remove-prefix {}", SERVER.join(" ")));
    for client in ["remote", "local"] {
        lab.at(client).enter(|| SERVER.into_iter().chain(SECOND).for_each(ask_server));
    }
}
