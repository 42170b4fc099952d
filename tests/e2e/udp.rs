//! What is particular to UDP: who answers from where, loops, and sockets that must not get what is not theirs.

use std::{
    net::{SocketAddr, UdpSocket},
    thread::sleep,
    time::Duration,
};

use anyport_tests::{
    dial::{
        self, PATIENCE, QUESTION, SILENCE, any, expect_udp_echo, expect_udp_hello, expect_udp_unanswered, hello,
        shared_udp, transparent_udp, udp_over, udp_server,
    },
    host::wait_for,
    random::Random,
    topology::{CLIENT, SERVER},
};
use libtest_mimic::Trial;

use crate::cases::{Family, Lab, at, on_each_back_end};

/// A steered prefix of each family.
const PREFIX: [&str; 2] = ["192.0.2.0/24", "2001:db8:0:a::/64"];
/// Addresses in them.
const ONE: [&str; 2] = ["192.0.2.201", "2001:db8:0:a::201"];
const TWO: [&str; 2] = ["192.0.2.202", "2001:db8:0:a::202"];

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(on_each_back_end("udp::answers leave from the dialled address and port", source));
    trials.extend(on_each_back_end("udp::clients do not mix", clients));
    trials.extend(on_each_back_end("udp::nobody answers once the rule is gone", removed));
    trials.extend(on_each_back_end("udp::the host's own questions are answered", own_questions));
    trials.extend(on_each_back_end("udp::a connected socket of the host keeps its flow", connected));
    trials.extend(on_each_back_end("udp::a wildcard socket of the host steals nothing", wildcard));
    trials.extend(on_each_back_end("udp::two steered addresses never talk to each other", no_loop));
    trials.extend(on_each_back_end("udp::answers are no amplification", amplification));
    trials.extend(on_each_back_end("udp::datagrams in fragments", fragments));
    trials
}

/// Hosts and a daemon whose service `name` gets all UDP of [`PREFIX`].
fn lab(backend: &str, service: &str) -> Lab {
    let lab = Lab::new(backend);
    lab.daemon.ok("add-service echo --handler echo");
    lab.daemon.ok(&format!("add-prefix {} --protocol udp --service {service}", PREFIX.join(" ")));
    lab
}

/// What arrives next at an unconnected socket: from where, and what.
fn receive(socket: &UdpSocket) -> (SocketAddr, Vec<u8>) {
    socket.set_read_timeout(Some(PATIENCE)).expect("a time limit");
    let mut buffer = vec![0; 65_536];
    let (length, from) = dial::receive(socket, &mut buffer).expect("a datagram");
    buffer.truncate(length);
    (from, buffer)
}

/// An unconnected client sees the source of each answer, whatever the kernel would have let through.
fn source(backend: &'static str) {
    let lab = lab(backend, "default");
    let mut random = Random::new("source");
    for client in ["remote", "local"] {
        for family in Family::ALL {
            let prefix = family.of(PREFIX);
            let unspecified = any(random.address(prefix));
            let socket = lab.at(client).enter(|| UdpSocket::bind(unspecified)).expect("a UDP socket");
            let port = socket.local_addr().expect("an own address").port();
            for _ in 0..20 {
                let to = SocketAddr::new(random.address(prefix), random.port());
                socket.send_to(QUESTION, to).expect("sending");
                let (from, answer) = receive(&socket);
                assert_eq!(from, to, "source of the answer to a {client} client");
                let answer = String::from_utf8_lossy(&answer).into_owned();
                let expected = hello(at("0.0.0.0", port), to, "udp");
                let (_, reached) = expected.split_once(", ").expect("two parts");
                assert!(answer.ends_with(reached) && answer.contains(&format!(":{port}, ")), "answer {answer:?}");
            }
        }
    }
}

/// Several clients of one destination get their own answers, also when one of them has gone in between.
fn clients(backend: &'static str) {
    let lab = lab(backend, "echo");
    for family in Family::ALL {
        let to = at(family.of(ONE), 5_000);
        let open = || {
            let socket = UdpSocket::bind(any(to.ip())).expect("a UDP socket");
            socket.connect(to).expect("a connected UDP socket");
            socket
        };
        let sockets: Vec<UdpSocket> =
            ["remote", "local", "remote"].into_iter().map(|client| lab.at(client).enter(open)).collect();
        for round in 0..20 {
            // This one is closed before its answer comes, so that the daemon's next call may see an ICMP error.
            let gone = lab.topology.client.enter(open);
            gone.send(b"nobody waits for this").expect("sending");
            drop(gone);
            for (number, socket) in sockets.iter().enumerate() {
                let question = format!("question {round} of client {number}");
                let answer = udp_over(socket, question.as_bytes(), PATIENCE).expect("an answer");
                assert_eq!(String::from_utf8_lossy(&answer), question);
            }
        }
    }
}

/// Whatever the daemon keeps open to answer with does not outlive the rule.
fn removed(backend: &'static str) {
    let lab = lab(backend, "echo");
    for family in Family::ALL {
        let to = at(family.of(ONE), 5_000);
        for client in ["remote", "local"] {
            lab.at(client).enter(|| expect_udp_echo(to, b"while there is a rule"));
        }
        lab.daemon.ok(&format!("remove-prefix {}", family.of(PREFIX)));
        for client in ["remote", "local"] {
            lab.at(client).enter(|| expect_udp_unanswered(to));
        }
    }
}

/// One unconnected socket of the host asks a server outside and a steered address; both answers reach it.
fn own_questions(backend: &'static str) {
    let lab = lab(backend, "echo");
    for family in Family::ALL {
        let server = at(family.of(SERVER), 53);
        let socket = lab.topology.server.enter(|| UdpSocket::bind(server)).expect("a UDP socket");
        udp_server(socket, "the server itself");
        let steered = at(family.of(ONE), 53);
        let own = any(steered.ip());
        let socket = lab.topology.host.enter(|| UdpSocket::bind(own)).expect("a UDP socket");
        for _ in 0..5 {
            socket.send_to(b"to outside", server).expect("sending");
            assert_eq!(receive(&socket), (server, b"the server itself".to_vec()));
            socket.send_to(b"to a steered address", steered).expect("sending");
            assert_eq!(receive(&socket), (steered, b"to a steered address".to_vec()));
        }
    }
}

/// A flow that the host connected, from inside a steered prefix, is not touched by the rule.
fn connected(backend: &'static str) {
    let lab = lab(backend, "echo");
    for family in Family::ALL {
        let (here, there) = (at(family.of(ONE), 6_000), at(family.of(CLIENT), 6_001));
        let flow = lab.topology.host.enter(|| {
            let flow = transparent_udp(here).expect("a UDP socket on a steered address");
            flow.connect(there).expect("a connected UDP socket");
            flow
        });
        let client = lab.topology.client.enter(|| UdpSocket::bind(there)).expect("a UDP socket");
        client.send_to(b"for the flow", here).expect("sending");
        assert_eq!(receive(&flow), (there, b"for the flow".to_vec()));
        // From any other port of the client, the rule decides.
        lab.topology.client.enter(|| expect_udp_echo(here, b"for the service"));
    }
}

/// Sockets on the wildcard address, even with the port of the original destination, get nothing of a steered prefix, and keep
/// nobody from being answered, whether they share their port or have it for themselves.
fn wildcard(backend: &'static str) {
    let lab = lab(backend, "default");
    let shared = lab.topology.host.enter(|| shared_udp(at("::", 5_353))).expect("a UDP socket");
    let exclusive = lab.topology.host.enter(|| UdpSocket::bind(at("::", 5_354))).expect("a UDP socket");
    for socket in [shared, exclusive] {
        let port = socket.local_addr().expect("an own address").port();
        for client in ["remote", "local"] {
            for family in Family::ALL {
                lab.at(client).enter(|| expect_udp_hello(at(family.of(ONE), port)));
            }
        }
        socket.set_nonblocking(true).expect("a non-blocking socket");
        let got = socket.recv_from(&mut [0; 2_048]);
        assert!(got.is_err(), "the host's own socket on port {port} got {got:?}");
    }
}

/// A datagram that claims to come from a steered address is counted and never answered.
fn no_loop(backend: &'static str) {
    let lab = lab(backend, "echo");
    for family in Family::ALL {
        let (from, to) = (at(family.of(TWO), 7), at(family.of(ONE), 7));
        let (mut sent, mut local) = (0, 0);
        for client in ["local", "remote"] {
            let socket = lab.at(client).enter(|| transparent_udp(from)).expect("a socket on a foreign address");
            socket.send_to(b"talk to yourself", to).expect("sending");
            sent += 1;
            // IPv4 drops what comes from outside with an address of its own, before or after it is counted.
            local += u64::from(client == "local" || family == Family::V6);
            let steered = || lab.daemon.count(family.of(PREFIX), "steered");
            wait_for("count of the datagram", Duration::from_secs(3), || {
                if steered() >= local { Ok(()) } else { Err(format!("{} of {local} counted", steered())) }
            });
            sleep(SILENCE);
            assert!(steered() <= sent, "{sent} datagrams from {from} to {to} became {} packets", steered());
        }
    }
}

/// An answer, with its IP and UDP headers, is never larger than a small multiple of the question with its own.
fn amplification(backend: &'static str) {
    let lab = lab(backend, "default");
    for family in Family::ALL {
        for length in [0, 1, 4, 10] {
            let to = at(family.of(ONE), 9);
            let socket = lab.topology.client.enter(|| UdpSocket::bind(any(to.ip()))).expect("a UDP socket");
            socket.connect(to).expect("a connected UDP socket");
            let answer = udp_over(&socket, &QUESTION[..length], SILENCE).unwrap_or_default();
            let headers = family.of([28, 48]);
            let (asked, answered) = (headers + length, headers + answer.len());
            assert!(answered <= 5 * asked, "a packet of {asked} bytes was answered by one of {answered} bytes");
        }
    }
}

/// Larger than any frame on the cable: whole again for a rule of a socket lookup and for TPROXY. What `tc` sees are
/// the fragments, of which only the first has ports; whatever becomes of those, nobody else gets them.
fn fragments(backend: &'static str) {
    let lab = lab(backend, "echo");
    let own = lab.topology.host.enter(|| shared_udp(at("::", 5_001))).expect("a UDP socket");
    for family in Family::ALL {
        // On `lo` nothing is cut.
        lab.topology.host.enter(|| expect_udp_echo(at(family.of(ONE), 5_000), &vec![5; 20_000]));
        let to = at(family.of(ONE), 5_001);
        let socket = lab.topology.client.enter(|| UdpSocket::bind(any(to.ip()))).expect("a UDP socket");
        socket.connect(to).expect("a connected UDP socket");
        match udp_over(&socket, &[5; 4_000], Duration::from_secs(1)) {
            Ok(answer) => assert!(answer == [5; 4_000], "4,000 bytes came back as {}", answer.len()),
            Err(error) => assert!(backend == "tc", "no answer to a datagram in fragments to {to}: {error}"),
        }
    }
    own.set_nonblocking(true).expect("a non-blocking socket");
    let got = own.recv_from(&mut [0; 8_192]);
    assert!(got.is_err(), "a socket of the host got {got:?}, which a rule steers elsewhere");
}
