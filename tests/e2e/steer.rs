//! The main job: any address, any port, over TCP and UDP, from near and far, and nothing else.

use std::net::{SocketAddr, UdpSocket};

use anyport_tests::{
    daemon::{Daemon, LogOnPanic},
    dial::{
        expect_tcp_echo, expect_tcp_hello, expect_tcp_line, expect_tcp_refused, expect_udp_echo, expect_udp_hello,
        expect_udp_text, tcp, tcp_server, tcp_text, transparent_udp, udp_server,
    },
    random::Random,
    topology::{CLIENT, HOST, SERVER, Topology},
};
use libtest_mimic::Trial;

use crate::cases::{BACKENDS, Family, Lab, Shared, at, on_each_back_end, shared, trial};

/// Steered to `hello`.
const HELLO: [&str; 2] = ["192.0.2.0/25", "2001:db8:0:a::/64"];
/// Steered to `echo`.
const ECHO: [&str; 2] = ["192.0.2.128/25", "2001:db8:0:b::/64"];
/// Steered to `hello`, for local clients only, as 127.0.0.0/8 does not travel.
const LOOPBACK: &str = "127.77.0.0/16";
/// How many address and port pairs of a prefix are tried as original destinations.
const PAIRS: usize = 1_000;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for backend in BACKENDS {
        let lab = shared(move || steering(backend));
        trials.extend(matrix(backend, &lab));
        trials.extend(pairs(backend, &lab));
    }
    trials.extend(on_each_back_end("other traffic stays as it was", untouched));
    trials.extend(on_each_back_end("--except 22 leaves the host's listener", excepted));
    trials.extend(on_each_back_end("the host's only address", only_address));
    trials.extend(on_each_back_end("established connections survive remove-prefix", survives_removal));
    trials.extend(on_each_back_end("established connections survive changes of other rules", survives_churn));
    trials.extend(on_each_back_end("steering wins over the host's listener", shadows));
    trials
}

/// Hosts and a daemon that steers [`HELLO`], [`ECHO`] and [`LOOPBACK`].
fn steering(backend: &str) -> Lab {
    let lab = Lab::new(backend);
    lab.daemon.ok("add-service echo --handler echo");
    lab.daemon.ok(&format!("add-prefix {} --protocol both", HELLO.join(" ")));
    lab.daemon.ok(&format!("add-prefix {} --protocol both --service echo", ECHO.join(" ")));
    lab.daemon.ok(&format!("add-prefix {LOOPBACK} --protocol both --force"));
    lab
}

/// Family × protocol × client × handler.
fn matrix(backend: &'static str, lab: &Shared) -> Vec<Trial> {
    let mut trials = Vec::new();
    for family in Family::ALL {
        for protocol in ["tcp", "udp"] {
            for client in ["remote", "local"] {
                for (handler, prefixes) in [("hello", HELLO), ("echo", ECHO)] {
                    let name = format!("{backend}::{protocol}{family}::{client}::{handler}");
                    let (lab, label) = (lab.clone(), name.clone());
                    trials.push(trial(name, move || {
                        answered(&lab, client, protocol, handler, family.of(prefixes), &label);
                    }));
                }
            }
        }
    }
    trials
}

/// The lowest and highest port, a busy one and random ones, each on a random address.
fn answered(lab: &Lab, client: &str, protocol: &str, handler: &str, prefix: &str, label: &str) {
    let _log = LogOnPanic(&lab.daemon);
    let mut random = Random::new(label);
    let ports = [1, 22, 65_535, random.port(), random.port(), random.port()];
    lab.at(client).enter(|| {
        for port in ports {
            let to = SocketAddr::new(random.address(prefix), port);
            let payload: Vec<u8> = (0..1_200).map(|_| random.next_u64().to_le_bytes()[3]).collect();
            match (protocol, handler) {
                ("tcp", "hello") => expect_tcp_hello(to),
                ("udp", "hello") => expect_udp_hello(to),
                ("udp", _) => expect_udp_echo(to, &payload),
                _ => expect_tcp_echo(tcp(to).expect("a connection to echo"), &payload.repeat(150)),
            }
        }
    });
}

/// A thousand random pairs of a prefix, each answered with exactly the original destination.
fn pairs(backend: &'static str, lab: &Shared) -> Vec<Trial> {
    let places = [
        ("a /16 of IPv4, local", "local", LOOPBACK),
        ("a prefix of IPv4, remote", "remote", HELLO[0]),
        ("a /64 of IPv6, local", "local", HELLO[1]),
        ("a /64 of IPv6, remote", "remote", HELLO[1]),
    ];
    let both = places.into_iter().flat_map(|place| [(place, "tcp"), (place, "udp")]);
    both.map(|((what, client, prefix), protocol)| {
        let name = format!("{backend}::{protocol}::{PAIRS} random pairs of {what}");
        let (lab, label) = (lab.clone(), name.clone());
        trial(name, move || {
            let _log = LogOnPanic(&lab.daemon);
            let mut random = Random::new(&label);
            let dial = if protocol == "tcp" { expect_tcp_hello } else { expect_udp_hello };
            lab.at(client).enter(|| {
                for _ in 0..PAIRS {
                    dial(SocketAddr::new(random.address(prefix), random.port()));
                }
            });
        })
    })
    .collect()
}

/// What is not configured is refused, unreachable or answered by its owner as before anyport came.
fn untouched(backend: &'static str) {
    let topology = Topology::new();
    topology.server.enter(|| tcp_server(at("::", 7), "the server itself\n"));
    // Local by someone else's hand, but nobody listens; not routed at all; an address of the host; a server behind.
    topology.host.ip("route add local 198.51.100.128/25 dev lo");
    let outside = [
        at("198.51.100.200", 80),
        at("192.0.2.200", 80),
        at("2001:db8:0:f::1", 80),
        at(HOST[0], 80),
        at(HOST[1], 80),
        at(SERVER[0], 7),
        at(SERVER[1], 7),
        at(SERVER[0], 8),
        at(SERVER[1], 8),
    ];
    let look = |place: &str| -> Vec<String> {
        let namespace = if place == "remote" { &topology.client } else { &topology.host };
        let dial = |to| tcp_text(to).unwrap_or_else(|error| error.kind().to_string());
        namespace.enter(|| outside.iter().map(|&to| format!("{place} {to}: {}", dial(to))).collect())
    };
    let before = [look("remote"), look("local")].concat();
    let daemon = Daemon::start(&topology.host, backend);
    daemon.ok("add-prefix 192.0.2.0/25 2001:db8:0:a::/64 --protocol both");
    topology.client.enter(|| expect_tcp_hello(at("192.0.2.1", 80)));
    assert_eq!([look("remote"), look("local")].concat(), before, "traffic outside of the steered prefixes");
}

/// A real listener on an excepted port is reached, and its neighbours are steered.
fn excepted(backend: &'static str) {
    let lab = Lab::new(backend);
    lab.daemon.ok("add-prefix 192.0.2.0/24 2001:db8:0:a::/64 --protocol both --except 22");
    lab.topology.host.enter(|| {
        tcp_server(at("::", 22), "the host's own\n");
        for address in ["192.0.2.9", "2001:db8:0:a::9"] {
            udp_server(transparent_udp(at(address, 22)).expect("a UDP socket"), "the host's own\n");
        }
    });
    for client in ["remote", "local"] {
        lab.at(client).enter(|| {
            for address in ["192.0.2.9", "2001:db8:0:a::9"] {
                let text = tcp_text(at(address, 22)).expect("the real listener");
                assert_eq!(text, "the host's own\n", "{client} TCP to {address} port 22");
                expect_udp_text(at(address, 22), "the host's own\n");
                for port in [21, 23] {
                    expect_tcp_hello(at(address, port));
                    expect_udp_hello(at(address, port));
                }
            }
        });
    }
}

/// All ports but one of the address by which the host itself is reached, and from which it dials.
fn only_address(backend: &'static str) {
    let lab = Lab::new(backend);
    lab.daemon.ok(&format!("add-prefix {} --protocol both --except 22 --no-route --force", HOST.join(" ")));
    lab.topology.host.enter(|| tcp_server(at("::", 22), "the host's own\n"));
    for (own, client) in HOST.into_iter().zip(CLIENT) {
        lab.topology.client.enter(|| {
            assert_eq!(tcp_text(at(own, 22)).expect("the real listener"), "the host's own\n");
            expect_tcp_hello(at(own, 80));
            expect_udp_hello(at(own, 80));
            tcp_server(at(client, 8_080), "outside");
            udp_server(UdpSocket::bind(at(client, 8_080)).expect("a UDP socket"), "outside");
        });
        lab.topology.host.enter(|| {
            assert_eq!(tcp_text(at(client, 8_080)).expect("what the host dials"), "outside");
            expect_udp_text(at(client, 8_080), "outside");
        });
    }
}

/// Connections go on after their rule went, new ones are refused.
fn survives_removal(backend: &'static str) {
    let lab = Lab::new(backend);
    lab.daemon.ok("add-service echo --handler echo");
    for client in ["remote", "local"] {
        for (prefix, address) in [("192.0.2.0/24", "192.0.2.44"), ("2001:db8:0:a::/64", "2001:db8:0:a::44")] {
            lab.daemon.ok(&format!("add-prefix {prefix} --service echo"));
            let to = at(address, 4_444);
            let mut stream = lab.at(client).enter(|| tcp(to)).expect("a connection before");
            expect_tcp_line(&mut stream, "before\n");
            lab.daemon.ok(&format!("remove-prefix {prefix}"));
            assert!(lab.daemon.rules().is_empty(), "rules after remove-prefix: {:?}", lab.daemon.rules());
            for line in ["after\n", "and again\n"] {
                expect_tcp_line(&mut stream, line);
            }
            lab.at(client).enter(|| expect_tcp_refused(to));
            // Enough for a segment of its own and for the peer's window to matter.
            expect_tcp_echo(stream, &vec![7; 300_000]);
        }
    }
}

/// A connection does not notice other rules come and go, nor its own prefix being covered by others.
fn survives_churn(backend: &'static str) {
    let lab = Lab::new(backend);
    lab.daemon.ok("add-service echo --handler echo");
    lab.daemon.ok("add-prefix 192.0.2.0/24 2001:db8:0:a::/64 --service echo");
    let dial = |address: &str| lab.topology.client.enter(|| tcp(at(address, 4_444))).expect("a connection");
    let mut streams = [dial("192.0.2.44"), dial("2001:db8:0:a::44")];
    let changes = [
        "add-prefix 192.0.2.44 2001:db8:0:a::44",
        "add-prefix 198.51.100.128/25",
        "add-prefix 192.0.2.0/25 --ports 4444 --protocol both",
        "remove-prefix 192.0.2.44 2001:db8:0:a::44",
        "add-prefix 192.0.2.32/28 2001:db8:0:a::/80 --except 1-65534",
        "remove-prefix 192.0.2.0/25 198.51.100.128/25 192.0.2.32/28 2001:db8:0:a::/80",
    ];
    for change in changes {
        lab.daemon.ok(change);
        for stream in &mut streams {
            expect_tcp_line(stream, &format!("after {change}\n"));
        }
    }
}

/// Inside a rule, the host's own wildcard and specific listeners lose; outside they go on.
fn shadows(backend: &'static str) {
    let lab = Lab::new(backend);
    lab.topology.host.enter(|| tcp_server(at("::", 8_080), "the host's own\n"));
    lab.daemon.ok("add-prefix 192.0.2.0/24 2001:db8:0:a::/64");
    lab.topology.host.enter(|| tcp_server(at("192.0.2.5", 8_081), "the host's own\n"));
    for client in ["remote", "local"] {
        lab.at(client).enter(|| {
            for to in [at("192.0.2.5", 8_080), at("2001:db8:0:a::5", 8_080), at("192.0.2.5", 8_081)] {
                expect_tcp_hello(to);
            }
            assert_eq!(tcp_text(at(HOST[0], 8_080)).expect("the host's listener"), "the host's own\n");
        });
    }
}
