//! UDP services that one forged datagram sets on each other, and owners that send what no client has asked for.

use std::{
    net::{SocketAddr, UdpSocket},
    thread::{self, JoinHandle, sleep},
    time::{Duration, Instant},
};

use anyport::{Ends, Registration};
use anyport_tests::{
    daemon::Daemon,
    dial::{PATIENCE, SILENCE, any, receive, transparent_udp, udp_over},
    host::wait_for,
    netns::Netns,
    owners::register_socket,
    random::Random,
    topology::CLIENT,
};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};

use crate::cases::{Family, Lab, at, on_each_back_end};

/// What each of two hosts steers.
const STEERED: [[&str; 2]; 2] = [["192.0.2.0/25", "2001:db8:0:a::/64"], ["192.0.2.128/25", "2001:db8:0:b::/64"]];
/// An address of each.
const ADDRESS: [[&str; 2]; 2] = [["192.0.2.1", "2001:db8:0:a::1"], ["192.0.2.129", "2001:db8:0:b::1"]];
/// Their addresses on the cable.
const OWN: [[&str; 2]; 2] = [["198.51.100.1", "2001:db8:c::1"], ["198.51.100.2", "2001:db8:c::2"]];
/// More packets than the hop limit allows for one datagram.
const ROUNDS: u64 = 70;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(on_each_back_end("hostile_udp::two hosts do not talk for ever", two_hosts));
    trials.extend(on_each_back_end("hostile_udp::services of other programs are left at last", other_programs));
    trials.extend(on_each_back_end("hostile_udp::chains of forwarding end", chains));
    trials.extend(on_each_back_end("hostile_udp::a fast client is always answered", fast_client));
    trials.extend(on_each_back_end("hostile_udp::owners answer who has asked", owners));
    trials
}

/// Two hosts on one cable, each with a daemon.
struct Pair {
    hosts: [Netns; 2],
    daemons: [Daemon; 2],
}

impl Pair {
    fn new(backend: &str) -> Self {
        let hosts = [Netns::new(), Netns::new()];
        let [one, other] = &hosts;
        one.join(
            other,
            ("eth0", &["198.51.100.1/30", "2001:db8:c::1/64"]),
            ("eth0", &["198.51.100.2/30", "2001:db8:c::2/64"]),
        );
        for (host, peer) in [(0, 1), (1, 0)] {
            hosts[host].ip(&format!("route add {} via {}", STEERED[peer][0], OWN[peer][0]));
            hosts[host].ip(&format!("-6 route add {} via {}", STEERED[peer][1], OWN[peer][1]));
        }
        let daemons = [Daemon::start(one, backend), Daemon::start(other, backend)];
        Self { hosts, daemons }
    }

    fn steer(&self, handlers: [&str; 2]) {
        for ((daemon, prefixes), handler) in self.daemons.iter().zip(STEERED).zip(handlers) {
            daemon.ok(&format!("add-service {handler}-all --handler {handler}"));
            daemon.ok(&format!("add-prefix {} --protocol udp --service {handler}-all", prefixes.join(" ")));
        }
    }

    fn stop_steering(&self, handlers: [&str; 2]) {
        for ((daemon, prefixes), handler) in self.daemons.iter().zip(STEERED).zip(handlers) {
            daemon.ok(&format!("remove-prefix {}", prefixes.join(" ")));
            daemon.ok(&format!("remove-service {handler}-all"));
        }
    }

    /// A datagram for the first host that claims to come from a steered address of the second.
    fn forge(&self, from: SocketAddr, to: SocketAddr) {
        let socket = self.hosts[1].enter(|| transparent_udp(from)).expect("a socket on a foreign address");
        socket.send_to(b"talk to each other, for ever and ever", to).expect("sending");
    }

    /// Datagrams of both hosts' services of these handlers.
    fn datagrams(&self, handlers: [&str; 2]) -> u64 {
        self.daemons
            .iter()
            .zip(handlers)
            .map(|(daemon, handler)| counted(daemon, &format!("{handler}-all"), "datagrams"))
            .sum()
    }
}

fn counted(daemon: &Daemon, service: &str, what: &str) -> u64 {
    let services = daemon.json("services");
    let found = services.as_array().expect("services").iter().find(|it| it["name"] == service);
    found.expect("the service")[what].as_u64().expect("a count")
}

/// Waits until nothing more is counted, and returns the count.
fn settled(count: impl Fn() -> u64) -> u64 {
    let mut before = count();
    wait_for("end of the conversation", Duration::from_secs(20), || {
        sleep(SILENCE);
        let now = count();
        let was = std::mem::replace(&mut before, now);
        if now == was { Ok(now) } else { Err(format!("{} datagrams more", now - was)) }
    })
}

/// Whatever both answer, and from however many ports: each forged datagram ends by its hop limit.
fn two_hosts(backend: &'static str) {
    let pair = Pair::new(backend);
    let mut random = Random::new("two hosts");
    for handlers in [["echo", "echo"], ["hello", "hello"], ["echo", "hello"]] {
        pair.steer(handlers);
        // Services of these names have counted before.
        let mut before = pair.datagrams(handlers);
        for family in Family::ALL {
            for forged in [1, 50] {
                for _ in 0..forged {
                    let from = at(family.of(ADDRESS[1]), if forged == 1 { 40_000 } else { random.port() });
                    pair.forge(from, at(family.of(ADDRESS[0]), random.port()));
                }
                let seen = settled(|| pair.datagrams(handlers)) - before;
                assert!(seen >= forged && seen <= forged * ROUNDS, "{handlers:?}: {forged} became {seen}");
                before += seen;
            }
        }
        pair.stop_steering(handlers);
    }
}

/// Answers what it gets at `address` until it gets nothing more, after it has written to `to`. Returns how much it got.
fn service(
    namespace: &Netns,
    address: SocketAddr,
    to: SocketAddr,
    answer: fn(u64, &[u8]) -> Vec<u8>,
) -> JoinHandle<u64> {
    let socket = namespace.enter(|| UdpSocket::bind(address)).expect("a UDP socket");
    socket.set_read_timeout(Some(PATIENCE / 10)).expect("a time limit");
    thread::spawn(move || {
        socket.send_to(&answer(0, b"again and again"), to).expect("sending");
        let (mut count, begin, mut buffer) = (0, Instant::now(), [0; 2048]);
        while let Ok((length, from)) = receive(&socket, &mut buffer) {
            count += 1;
            assert!(begin.elapsed() < Duration::from_mins(1), "it goes on after {count} datagrams");
            socket.send_to(&answer(count, &buffer[..length]), from).expect("sending");
        }
        count
    })
}

/// They begin with a new hop limit each time.
fn other_programs(backend: &'static str) {
    let pair = Pair::new(backend);
    let same: fn(u64, &[u8]) -> Vec<u8> = |_, question| question.to_vec();
    let new: fn(u64, &[u8]) -> Vec<u8> = |number, _| format!("something new: {number}").into();
    // Services at one port below 1024 count for each pair of addresses, until they are silent for a while.
    for (handlers, addresses) in [("echo", ADDRESS[0]), ("hello", ["192.0.2.2", "2001:db8:0:a::2"])] {
        let handlers = [handlers, "discard"];
        pair.steer(handlers);
        for family in Family::ALL {
            let to = at(family.of(addresses), 7);
            for (port, answer, most) in [(40_007, same, 2 * 8192), (19, new, 1100)] {
                let from = at(family.of(OWN[1]), port);
                let count = service(&pair.hosts[1], from, to, answer).join().expect("its count");
                assert!(count > 0 && count <= most, "{handlers:?}: port {port} was answered {count} times");
            }
        }
        assert!(counted(&pair.daemons[0], &format!("{}-all", handlers[0]), "refused_conversation") > 0);
        pair.stop_steering(handlers);
    }
    let log = pair.daemons[0].log();
    assert!(log.contains("seems to be a service"), "{log}");
}

/// Each forwards to an address that the other one steers back.
fn chains(backend: &'static str) {
    let pair = Pair::new(backend);
    for family in Family::ALL {
        for (host, peer) in [(0, 1), (1, 0)] {
            let upstream = at(family.of(ADDRESS[peer]), 9);
            let daemon = &pair.daemons[host];
            daemon.ok(&format!("add-service round{family} --handler forward --upstream {upstream}"));
            daemon.ok(&format!("add-prefix {} --protocol udp --service round{family}", family.of(STEERED[host])));
        }
        let service = format!("round{family}");
        let of_both = |what: &str| pair.daemons.iter().map(|daemon| counted(daemon, &service, what)).sum::<u64>();
        let to = at(family.of(ADDRESS[0]), 9);
        let client = pair.hosts[1].enter(|| UdpSocket::bind(any(to.ip()))).expect("a UDP socket");
        for number in 1..=5 {
            client.send_to(b"where does this go?", to).expect("sending");
            let seen = settled(|| of_both("datagrams"));
            assert!(seen >= number && seen <= number * ROUNDS, "{number} became {seen}");
            assert_eq!(of_both("refused_loop"), number);
        }
    }
}

/// With one question under way, and with many.
fn fast_client(backend: &'static str) {
    const QUESTIONS: u64 = 20_000;
    let lab = Lab::new(backend);
    lab.daemon.ok("add-service echo --handler echo");
    lab.daemon.ok("add-prefix 192.0.2.0/24 2001:db8:0:a::/64 --protocol udp --service echo");
    for family in Family::ALL {
        let to = at(family.of(ADDRESS[0]), 7);
        lab.topology.client.enter(|| {
            let socket = UdpSocket::bind(any(to.ip())).expect("a UDP socket");
            socket.connect(to).expect("a connected UDP socket");
            socket.set_read_timeout(Some(PATIENCE)).expect("a time limit");
            for number in 0..QUESTIONS {
                let question = format!("question {number}");
                let answer = udp_over(&socket, question.as_bytes(), PATIENCE).expect("an answer");
                assert_eq!(String::from_utf8_lossy(&answer), question);
            }
        });
    }
    let counted = lab.service_after("echo", 2 * QUESTIONS);
    assert_eq!((&counted["refused_conversation"], &counted["refused_loop"]), (&0.into(), &0.into()), "{counted}");
}

/// Nobody is flooded by an owner, and those who ask get what they ask for, also after the daemon has crashed.
fn owners(backend: &'static str) {
    const QUESTION: &[u8] = b"twelve bytes";
    let lab = Lab::new(backend);
    lab.daemon.ok("add-service dns --handler registered");
    lab.daemon.ok("add-prefix 192.0.2.0/24 2001:db8:0:a::/64 --protocol udp --ports 53 --service dns");
    let registration = Registration::new("dns").expect("a name").at(register_socket(&lab.daemon));
    let owner = lab.topology.host.enter(|| registration.udp_socket()).expect("a registered socket");
    let mut refused = 0;
    for family in Family::ALL {
        let dialled = at(family.of(["192.0.2.200", "2001:db8:0:a::200"]), 53);
        let victim = at(family.of(CLIENT), 9999);
        let open = |address| lab.topology.client.enter(|| UdpSocket::bind(address)).expect("a UDP socket");
        let (hit, client) = (open(victim), open(SocketAddr::new(victim.ip(), 0)));
        let own = client.local_addr().expect("an address");
        let mut buffer = [0; 2048];
        for number in 0..1000_u16 {
            // At one port, and at others; from there, and from elsewhere.
            let client = SocketAddr::new(victim.ip(), if number % 2 == 0 { 9999 } else { 1024 + number });
            owner.reply(Ends { client, dialled }, b"nobody asked for this").expect("taken by the daemon");
        }
        refused += 1000;
        sleep(SILENCE);
        hit.set_nonblocking(true).expect("a non-blocking socket");
        assert!(hit.recv_from(&mut buffer).is_err(), "an answer that nobody asked for");
        let counted = || counted(&lab.daemon, "dns", "refused_unsolicited");
        wait_for("count of what was not sent", Duration::from_secs(10), || {
            if counted() == refused { Ok(()) } else { Err(format!("{} of {refused}", counted())) }
        });
        // A question of 40 bytes with its headers, or 60: answers of 1,028, or 1,048, twice or three times.
        let mut ask = || {
            client.send_to(QUESTION, dialled).expect("sending");
            let asked = owner.recv(&mut buffer).expect("a question").expect("not drained");
            assert_eq!((asked.data, asked.ends), (QUESTION, Ends { client: own, dialled }));
        };
        let answers = |length: usize, times: usize| {
            for _ in 0..times {
                owner.reply(Ends { client: own, dialled }, &vec![7; length]).expect("taken by the daemon");
            }
            client.set_read_timeout(Some(SILENCE)).expect("a time limit");
            std::iter::from_fn(|| receive(&client, &mut [0; 2048]).ok()).inspect(|it| assert_eq!(it.1, dialled)).count()
        };
        ask();
        assert_eq!(answers(1000, 10), family.of([2, 3]));
        ask();
        // What the first question has left counts, too: 504 + 2,560 bytes, or 696 + 3,840, for empty ones with their headers.
        assert_eq!(answers(0, 1000), family.of([109, 94]));
        refused += family.of([8 + 891, 7 + 906]);
        wait_for("count of what was not sent", Duration::from_secs(10), || {
            if counted() == refused { Ok(()) } else { Err(format!("{} of {refused}", counted())) }
        });
        assert!(lab.daemon.log().contains("has not asked for so much lately"), "{}", lab.daemon.log());

        let server = lab.daemon.pid();
        kill(server, Signal::SIGKILL).expect("SIGKILL to the process that serves");
        lab.daemon.wait_for_successor(server);
        refused = 0;
        ask();
        // The first answer after a crash finds a connection that is gone, and makes another one.
        assert_eq!(answers(100, 1), 1);
    }
}
