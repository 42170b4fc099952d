//! Datagrams that are forwarded while upstreams die, move and are taken out, and while local ports run out.

use std::{
    collections::BTreeMap,
    fs,
    net::{SocketAddr, UdpSocket},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, sleep},
    time::{Duration, Instant},
};

use anyport_tests::{
    dial::{PATIENCE, SILENCE, receive, shared_udp, udp_over},
    host::{patience, wait_for},
    netns::Netns,
    prerequisites::scratch,
    topology::{CLIENT, SECOND, SERVER},
};
use libtest_mimic::Trial;

use crate::cases::{Lab, alone, at, trial};

const PREFIX: &str = "192.0.2.0/24";
const ONE: &str = "192.0.2.201";
const OTHER: &str = "192.0.2.202";
const PORT: u16 = 4_242;
/// Local ports of the host, and clients that ask at once: more than ports.
const LOCAL_PORTS: &str = "40000 40063";
const MANY: usize = 150;
/// Clients while upstreams die, come back and move: as many as have two descriptors each of the daemon's 20,000, of which it
/// keeps a quarter for other things.
const CLIENTS: usize = 7_000;
/// Within this time flows have left an upstream that was taken out.
const LEAVING: Duration = Duration::from_secs(3);
/// Within this time flows would have left an upstream that is silent.
const SETTLING: Duration = Duration::from_secs(12);

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("departures::flows leave an upstream that is taken out, or stay as they are told to", taken_out),
        trial("departures::flows end with their rule", without_rule),
        trial("departures::flows leave an upstream that has become silent, or stay as they are told to", silent),
        trial("departures::silence alone moves no flow", silent_as_others),
        trial("departures::a local port serves a flow to each upstream", few_ports),
        trial("departures::flows from one client's port are not mixed", not_mixed),
        // Their sockets are half of those that this process may open.
        alone("departures::7,000 clients, and upstreams that die, come back and move", many),
    ]
}

/// Answers each datagram with a name, its source and itself until it is dropped, which closes its port.
struct Upstream {
    goes_on: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Upstream {
    fn start(namespace: &Netns, address: SocketAddr, name: &'static str) -> Self {
        let socket = namespace.enter(|| UdpSocket::bind(address)).expect("a UDP socket");
        socket.set_read_timeout(Some(Duration::from_millis(50))).expect("a time limit");
        let goes_on = Arc::new(AtomicBool::new(true));
        let is_wanted = Arc::clone(&goes_on);
        let thread = thread::spawn(move || {
            let mut buffer = [0; 2_048];
            while is_wanted.load(Relaxed) {
                let Ok((length, from)) = receive(&socket, &mut buffer) else { continue };
                let answer = [name.as_bytes(), b" ", &buffer[..length]].concat();
                // Clients may be gone.
                socket.send_to(&answer, from).ok();
            }
        });
        Self { goes_on, thread: Some(thread) }
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.goes_on.store(false, Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("no panic");
        }
    }
}

/// A configuration file of a service `edge` for [`PREFIX`].
struct File {
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl File {
    fn new() -> Self {
        let directory = scratch();
        Self { path: directory.path().join("anyport.toml"), _directory: directory }
    }

    fn write(&self, upstreams: &[SocketAddr], options: &str) {
        let upstreams: Vec<String> = upstreams.iter().map(ToString::to_string).collect();
        let text = format!(
            "[[service]]\nname = \"edge\"\nhandler = \"forward\"\nupstreams = {upstreams:?}\n{options}\n\
             [[rule]]\nprefix = \"{PREFIX}\"\nprotocol = \"both\"\nservice = \"edge\"\n"
        );
        fs::write(&self.path, text).expect("a configuration");
    }
}

fn client(lab: &Lab, to: SocketAddr) -> UdpSocket {
    lab.topology.client.enter(|| {
        let socket = UdpSocket::bind((CLIENT[0], 0)).expect("a UDP socket");
        socket.connect(to).expect("a connected UDP socket");
        socket
    })
}

/// The name of who answers.
fn who(socket: &UdpSocket, question: &str, limit: Duration) -> Option<String> {
    let answer = String::from_utf8(udp_over(socket, question.as_bytes(), limit).ok()?).expect("text");
    let (name, text) = answer.split_once(' ').expect("a name and a text");
    assert_eq!(text, question);
    Some(name.to_owned())
}

fn shown_upstreams(lab: &Lab) -> serde_json::Value {
    lab.daemon.json("services")[1]["upstreams"].clone()
}

fn taken_out() {
    for (how, expected) in [("move", "second"), ("keep", "first")] {
        let file = File::new();
        let [first, second] = [SERVER[0], SECOND[0]].map(|address| at(address, PORT));
        let options = format!("udp = {{ on-down = \"{how}\" }}");
        file.write(&[first], &options);
        let lab = Lab::with("sk-lookup", |setup| setup.config(&file.path));
        let _upstreams = [(first, "first"), (second, "second")]
            .map(|(address, name)| Upstream::start(&lab.topology.server, address, name));
        let socket = client(&lab, at(ONE, 53_000));
        for _ in 0..3 {
            assert_eq!(who(&socket, "before", PATIENCE).as_deref(), Some("first"));
        }
        file.write(&[second], &options);
        lab.daemon.ok("reload");
        if how == "keep" {
            let upstreams = shown_upstreams(&lab);
            assert_eq!((&upstreams[1]["state"], &upstreams[1]["active"]), (&"gone".into(), &1.into()), "{upstreams}");
        }
        // It talks all the time.
        let start = Instant::now();
        let mut last = None;
        let mut lost = 0;
        while start.elapsed() < LEAVING {
            match who(&socket, "after", SILENCE) {
                Some(name) => last = Some(name),
                None => lost += 1,
            }
        }
        // What the first upstream had not answered when the flow ended.
        let most = usize::from(how == "move");
        assert!(last.as_deref() == Some(expected) && lost <= most, "{how}: {last:?}, {lost} lost");
        if how == "move" {
            wait_for("end of the last flow there", PATIENCE, || match shown_upstreams(&lab).as_array().map(Vec::len) {
                Some(1) => Ok(()),
                count => Err(format!("{count:?} upstreams")),
            });
        }
    }
}

/// The server's host takes datagrams to this address and says nothing any more, not even by ICMP.
fn silence(lab: &Lab, address: &str) {
    lab.topology.server.run("iptables", ["-A", "INPUT", "-d", address, "-p", "udp", "-j", "DROP"]);
}

/// Asks from each client in turn until `is_enough` says so of who answered each of them last, or for `limit`.
fn talk(clients: &[UdpSocket], limit: Duration, is_enough: impl Fn(&[Option<String>]) -> bool) -> Vec<Option<String>> {
    let start = Instant::now();
    let mut last = vec![None; clients.len()];
    while start.elapsed() < limit && !is_enough(&last) {
        for (socket, last) in clients.iter().zip(&mut last) {
            *last = who(socket, "still there?", SILENCE);
        }
    }
    last
}

/// One of two upstreams becomes silent. Its clients go on all the time, and so does one of the other upstream.
fn silent() {
    for (options, expected) in [
        ("", Some("second")),
        ("balance = \"source-hash\"\nudp = { responses = 1 }", Some("second")),
        ("udp = { on-down = \"keep\" }", None),
    ] {
        let file = File::new();
        let [first, second] = [SERVER[0], SECOND[0]].map(|address| at(address, PORT));
        file.write(&[first, second], &format!("connect-timeout = \"2s\"\nejection = {{ time = \"1m\" }}\n{options}"));
        let lab = Lab::with("sk-lookup", |setup| setup.config(&file.path));
        let _upstreams = [(first, "first"), (second, "second")]
            .map(|(address, name)| Upstream::start(&lab.topology.server, address, name));
        let clients = [(); 4].map(|()| client(&lab, at(ONE, 53_000)));
        let before = talk(&clients, PATIENCE, |last| last.iter().all(Option::is_some));
        let gone = if before.iter().flatten().any(|name| name == "first") { "first" } else { "second" };
        let left = if gone == "first" { "second" } else { "first" };
        silence(&lab, if gone == "first" { SERVER[0] } else { SECOND[0] });
        let limit = if expected.is_some() { PATIENCE } else { SETTLING };
        let after = talk(&clients, limit, |last| last.iter().flatten().filter(|name| *name == left).count() == 4);
        let was_gone = |at: usize| before[at].as_deref() == Some(gone);
        for (at, name) in after.iter().enumerate() {
            let expected = if was_gone(at) && expected.is_none() { None } else { Some(left) };
            assert_eq!(name.as_deref(), expected, "client {at} with {options:?}: {before:?}, {after:?}");
        }
        let upstreams = shown_upstreams(&lab);
        let number = usize::from(gone == "second");
        assert_eq!(upstreams[number]["state"], "ejected", "{options}: {upstreams}");
        assert_eq!(upstreams[1 - number]["state"], "up", "{options}: {upstreams}");
    }
}

/// Nobody answers, as where datagrams are only collected: that says nothing of an upstream.
fn silent_as_others() {
    let file = File::new();
    let addresses = [SERVER[0], SECOND[0]].map(|address| at(address, PORT));
    file.write(&addresses, "connect-timeout = \"2s\"");
    let lab = Lab::with("sk-lookup", |setup| setup.config(&file.path));
    let _upstreams = addresses.map(|address| Upstream::start(&lab.topology.server, address, "up"));
    let clients = [(); 4].map(|()| client(&lab, at(ONE, 53_000)));
    talk(&clients, PATIENCE, |last| last.iter().all(Option::is_some));
    for address in [SERVER[0], SECOND[0]] {
        silence(&lab, address);
    }
    talk(&clients, SETTLING, |_| false);
    let upstreams = shown_upstreams(&lab);
    for upstream in upstreams.as_array().expect("upstreams") {
        let expected = (&"up".into(), &2.into(), &0.into());
        assert_eq!((&upstream["state"], &upstream["connections"], &upstream["failures"]), expected, "{upstreams}");
    }
}

fn without_rule() {
    let lab = Lab::new("sk-lookup");
    let address = at(SERVER[0], PORT);
    let _upstream = Upstream::start(&lab.topology.server, address, "up");
    lab.daemon.ok(&format!("add-service edge --handler forward --upstream {address}"));
    lab.daemon.ok(&format!("add-prefix {PREFIX} --protocol udp --service edge"));
    let socket = client(&lab, at(ONE, 53_000));
    for _ in 0..3 {
        assert!(who(&socket, "question", PATIENCE).is_some());
    }
    // Another change leaves it alone.
    lab.daemon.ok("add-prefix 203.0.113.128/25 --protocol udp --service edge");
    assert_eq!(who(&socket, "question", PATIENCE).as_deref(), Some("up"));
    assert_eq!(shown_upstreams(&lab)[0]["connections"], 1);
    lab.daemon.ok(&format!("remove-prefix {PREFIX}"));
    wait_for("end of the flow", LEAVING, || match who(&socket, "question", SILENCE) {
        None => Ok(()),
        Some(name) => Err(format!("{name} answers")),
    });
}

fn few_ports() {
    let lab = Lab::new("sk-lookup");
    lab.topology.host.sysctl("net.ipv4.ip_local_port_range", LOCAL_PORTS);
    let addresses = [at(SERVER[0], PORT), at(SECOND[0], PORT), at(SERVER[0], PORT + 1)];
    let _upstreams = addresses.map(|address| Upstream::start(&lab.topology.server, address, "up"));
    let options: Vec<String> = addresses.iter().map(|address| format!("--upstream {address}")).collect();
    lab.daemon.ok(&format!("add-service edge --handler forward {}", options.join(" ")));
    lab.daemon.ok(&format!("add-prefix {PREFIX} --protocol udp --service edge"));
    let clients: Vec<UdpSocket> = (0..MANY).map(|_| client(&lab, at(ONE, 53_000))).collect();
    for round in 0..3 {
        for (number, socket) in clients.iter().enumerate() {
            // Each gets its own answer.
            let question = format!("{round} {number}");
            assert!(who(socket, &question, PATIENCE).is_some(), "client {number} of {MANY} in round {round}");
        }
    }
    let upstreams = shown_upstreams(&lab);
    for upstream in upstreams.as_array().expect("upstreams") {
        assert_eq!((&upstream["active"], &upstream["failures"]), (&50.into(), &0.into()), "{upstreams}");
    }
    // Servers of the host may have the ports, too.
    lab.topology.host.enter(|| shared_udp(at("0.0.0.0", 40_000)).expect("a port of the host"));
}

/// With the way back that docs/operations.md describes.
fn not_mixed() {
    let lab = Lab::new("sk-lookup");
    let address = at(SERVER[0], PORT);
    let _upstream = Upstream::start(&lab.topology.server, address, "up");
    lab.topology.host.ip(&format!("rule add from {} iif server lookup 165", SERVER[0]));
    lab.topology.host.ip("route add local 0.0.0.0/0 dev lo table 165");
    lab.daemon.ok(&format!("add-service edge --handler forward --upstream {address} --transparent-source"));
    lab.daemon.ok(&format!("add-prefix {PREFIX} --protocol udp --service edge"));
    let own = at(CLIENT[0], 5_555);
    let sockets = [ONE, OTHER].map(|to| {
        lab.topology.client.enter(|| {
            let socket = shared_udp(own).expect("a UDP socket");
            socket.connect(at(to, 53_000)).expect("a connected UDP socket");
            socket
        })
    });
    for round in 0..10 {
        for (socket, to) in sockets.iter().zip([ONE, OTHER]) {
            // A connected socket takes what comes from there only.
            assert!(who(socket, &format!("{round} {to}"), PATIENCE).is_some(), "{to} in round {round}");
        }
    }
}

/// Has each client ask once; how many got no answer, and who answered the others.
fn ask_all(clients: &[UdpSocket], round: &str) -> (usize, BTreeMap<String, usize>) {
    let mut names = BTreeMap::new();
    let mut lost = 0;
    // Not all at once: it is not about the sizes of queues.
    for some in clients.chunks(100) {
        for socket in some {
            // What came back by ICMP for an earlier one.
            if socket.send(round.as_bytes()).is_err() {
                socket.send(round.as_bytes()).ok();
            }
        }
        let end = Instant::now() + patience(SILENCE);
        for socket in some {
            // They wait together.
            let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            socket.set_read_timeout(Some(left)).expect("a time limit");
            let mut buffer = [0; 256];
            match receive(socket, &mut buffer) {
                Ok((length, _)) => {
                    let answer = String::from_utf8_lossy(&buffer[..length]).into_owned();
                    let (name, text) = answer.split_once(' ').expect("a name and a text");
                    assert_eq!(text, round);
                    *names.entry(name.to_owned()).or_insert(0) += 1;
                }
                Err(_) => lost += 1,
            }
        }
    }
    eprintln!("{round}: {lost} of {} lost, {names:?}", clients.len());
    (lost, names)
}

fn many() {
    let file = File::new();
    let addresses = [(SERVER[0], PORT), (SECOND[0], PORT), (SERVER[0], PORT + 1), (SECOND[0], PORT + 1)]
        .map(|(address, port)| at(address, port));
    let moved = at(SERVER[0], PORT + 2);
    // All of them are one source.
    let options = "max-connections-per-source = 8000";
    file.write(&addresses, options);
    let lab = Lab::with("sk-lookup", |setup| setup.config(&file.path));
    // Each datagram to a closed port is answered by ICMP; a host that is sparing with those makes its upstream a silent one.
    for (name, value) in [("net.ipv4.icmp_ratelimit", "0"), ("net.ipv4.icmp_msgs_per_sec", "100000")] {
        lab.topology.server.sysctl(name, value);
    }
    let names = ["one", "two", "three", "four"];
    let start = |number: usize| Upstream::start(&lab.topology.server, addresses[number], names[number]);
    let _first_two = [start(0), start(1)];
    let third = start(2);
    let fourth = start(3);
    let clients: Vec<UdpSocket> = (0..CLIENTS).map(|_| client(&lab, at(ONE, 53_000))).collect();
    for round in ["first", "second"] {
        let (lost, answers) = ask_all(&clients, round);
        assert_eq!((lost, answers.len()), (0, 4), "{round}");
    }
    // Each of its clients loses what it says first, and some may lose what opens a flow there before it is ejected.
    drop(third);
    let (lost, _) = ask_all(&clients, "it dies");
    assert!(lost <= CLIENTS / 4 + 10, "{lost} are lost");
    let (lost, answers) = ask_all(&clients, "it is dead");
    assert!(lost <= 10 && !answers.contains_key("three"), "{lost} are lost, {answers:?}");
    let third = start(2);
    let (lost, _) = ask_all(&clients, "it is back");
    assert_eq!(lost, 0);
    // One moves: its flows follow within a second or so, and nothing is lost while both are there.
    let _moved = Upstream::start(&lab.topology.server, moved, "moved");
    file.write(&[addresses[0], addresses[1], addresses[2], moved], options);
    lab.daemon.ok("reload");
    sleep(LEAVING);
    let (lost, answers) = ask_all(&clients, "it has moved");
    assert!(lost == 0 && !answers.contains_key("four"), "{lost} are lost, {answers:?}");
    drop((third, fourth));
}
