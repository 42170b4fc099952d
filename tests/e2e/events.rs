//! Which events of connections and flows are published as they begin.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::UdpSocket,
    os::unix::net::UnixStream,
    process::{Command, Stdio},
    thread::sleep,
    time::Duration,
};

use anyport_tests::{
    daemon::{Daemon, Setup},
    dial::{any, expect_tcp_hello, expect_udp_hello, tcp, udp},
    host::wait_for,
    netns::Netns,
    prerequisites::{program, scratch},
    topology::CLIENT,
};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use crate::cases::{BACKENDS, Family, Lab, at, on_each_back_end, trial};

/// A steered prefix of each family, and addresses in them.
const PREFIX: [&str; 2] = ["192.0.2.0/24", "2001:db8:0:a::/64"];
const ONE: [&str; 2] = ["192.0.2.201", "2001:db8:0:a::201"];

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(on_each_back_end("events::connections and flows", begun));
    trials.extend(on_each_back_end("events::only what is asked for", filtered));
    for backend in &BACKENDS[..2] {
        trials.push(trial(format!("{backend}::events::what is dropped"), move || dropped(backend)));
        trials.push(trial(format!("{backend}::events::what is missed is counted"), move || missed(backend)));
    }
    trials.push(trial("events::tproxy says what it does not tell", limits_of_tproxy));
    trials.push(trial("events::listeners come and go", come_and_go));
    trials.push(trial("events::the command", command));
    trials.push(trial("events::changes and who has made them", changes));
    trials
}

/// A subscriber to events.
pub(crate) struct Ear(BufReader<UnixStream>);

impl Ear {
    /// Subscribes to what this query asks for. The subscription has begun when this returns.
    pub(crate) fn new(daemon: &Daemon, query: &str) -> Self {
        Self::open(daemon, query).unwrap_or_else(|answer| panic!("{query}: {answer}"))
    }

    fn open(daemon: &Daemon, query: &str) -> Result<Self, String> {
        let mut stream = UnixStream::connect(daemon.socket()).expect("a connection");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a time limit");
        write!(stream, "GET /v1/events?{query} HTTP/1.1\r\nHost: anyport\r\n\r\n").expect("sending");
        let mut ear = Self(BufReader::new(stream));
        let status = ear.line();
        if !status.starts_with("HTTP/1.1 200") {
            return Err(status);
        }
        while !ear.line().trim().is_empty() {}
        // The length of the first piece, which comes when it has begun.
        ear.line();
        Ok(ear)
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        assert!(self.0.read_line(&mut line).expect("a line") > 0, "the daemon has closed the connection");
        line
    }

    /// The next event of a connection or flow, notes and changes aside.
    fn next(&mut self) -> Value {
        self.next_with(|line| !line.contains("\"note\"") && !line.contains("\"verb\""))
    }

    /// The next change.
    fn change(&mut self) -> Value {
        self.next_with(|line| line.contains("\"verb\""))
    }

    /// The next line that is wanted. Pieces end where lines do, so what else there is are lengths.
    pub(crate) fn next_with(&mut self, is_wanted: impl Fn(&str) -> bool) -> Value {
        loop {
            let line = self.line();
            if line.starts_with('{') && is_wanted(&line) {
                return serde_json::from_str(&line).expect("JSON");
            }
        }
    }

    /// The next event, in short.
    fn told(&mut self) -> String {
        let event = self.next();
        let text = |name: &str| event[name].as_str().unwrap_or_else(|| panic!("no {name}: {event}")).to_owned();
        assert!(text("time").starts_with("20") && text("time").ends_with('Z'), "{event}");
        let from = text("from");
        let client = from.rsplit_once(':').expect("a port").0;
        format!(
            "{} {client} {} {} {} {}",
            text("protocol"),
            text("to"),
            text("outcome"),
            text("service"),
            text("prefix")
        )
    }
}

/// The log is written a moment later.
fn wait_for_line(daemon: &Daemon, line: &str) {
    wait_for("a line of the log", Duration::from_secs(10), || {
        let log = daemon.log();
        if log.contains(line) { Ok(()) } else { Err(format!("no {line:?} in:\n{log}")) }
    });
}

/// Each change is a line of the log and an event, with who has made it and from where.
fn changes() {
    let directory = scratch();
    let (config, rules) = (directory.path().join("anyport.toml"), directory.path().join("rules"));
    std::fs::write(&config, "").expect("writing the configuration");
    let lines = (0..100).map(|number| format!("192.0.2.{number} tcp 80\n")).collect::<Vec<_>>().concat();
    std::fs::write(&rules, lines).expect("writing the rules");
    let daemon = Setup::new(&Netns::new(), "sk-lookup").config(&config).start();
    let mut ear = Ear::new(&daemon, "");
    let mut narrow = Ear::new(&daemon, "port=80");
    let apply = format!("apply {} --confirm 60s", rules.display());
    for (command, verb, what) in [
        ("add-service web --handler echo", "add-service", "web with the handler echo: 1 changed"),
        (
            "add-prefix 198.51.100.0/24 --service web",
            "add-prefix",
            "198.51.100.0/24 tcp ports 1-65535 -> web: 1 changed",
        ),
        ("drain --service web --wait 0s", "drain", "service web"),
        ("undrain --service web", "undrain", "service web: 1 changed"),
        ("remove-prefix 198.51.100.0/24", "remove-prefix", "198.51.100.0/24: 1 changed"),
        ("remove-service web", "remove-service", "web: 1 changed"),
        (&apply, "apply", "100 rules added, 0 removed, rolled back in 60 s unless it is confirmed"),
        ("confirm", "confirm", "what was applied: 1 changed"),
    ] {
        daemon.ok(command);
        let change = ear.change();
        assert_eq!((change["verb"].as_str(), change["what"].as_str()), (Some(verb), Some(what)), "{change}");
        let by = &change["by"];
        assert_eq!((by["uid"].as_u64(), by["program"].as_str()), (Some(0), Some("anyportctl")), "{change}");
        let pid = by["pid"].as_u64().expect("a pid");
        let line = format!("{verb} by uid 0, pid {pid} (anyportctl): {what} (generation {})", change["generation"]);
        wait_for_line(&daemon, &line);
    }
    // What changes nothing is no change.
    daemon.ok("apply --dry-run --force /dev/null");
    daemon.ok(&format!("apply {}", rules.display()));
    std::fs::write(&config, "[[rule]]\nprefix = \"203.0.113.0/24\"\n").expect("writing the configuration");
    kill(daemon.pid(), Signal::SIGHUP).expect("a signal");
    let change = ear.change();
    assert_eq!((&change["verb"], &change["by"]["origin"]), (&"reload".into(), &"SIGHUP".into()), "{change}");
    // A program may call itself what it likes.
    let named = directory.path().join("a\u{1b}[2Jb\nc");
    std::fs::copy(program("anyportctl").expect("anyportctl"), &named).expect("a copy");
    let mut command = Command::new(&named);
    command.args(["remove-prefix", "192.0.2.1", "--socket"]).arg(daemon.socket());
    assert_eq!(daemon.namespace().output(&mut command).status, 0);
    assert_eq!(ear.change()["by"]["program"], "a\\u001b[2Jb\\nc");
    wait_for_line(&daemon, "(a\\u001b[2Jb\\nc)");
    // Those who ask for connections of some kind hear of nothing else.
    narrow.0.get_ref().set_read_timeout(Some(Duration::from_millis(1))).expect("a time limit");
    let mut told = String::new();
    while narrow.0.read_line(&mut told).is_ok_and(|read| read > 0) {}
    assert!(!told.contains("verb"), "{told}");
}

fn client(family: Family) -> String {
    family.of([CLIENT[0].to_owned(), format!("[{}]", CLIENT[1])])
}

fn begun(backend: &'static str) {
    let lab = Lab::new(backend);
    lab.daemon.ok(&format!("add-prefix {} {} --protocol both", PREFIX[0], PREFIX[1]));
    let mut ear = Ear::new(&lab.daemon, "");
    for family in Family::ALL {
        let to = at(family.of(ONE), 443);
        let expected = |protocol| format!("{protocol} {} {to} steered default {}", client(family), family.of(PREFIX));
        for _ in 0..3 {
            lab.topology.client.enter(|| expect_tcp_hello(to));
            assert_eq!(ear.told(), expected("tcp"));
        }
        // One event is published for a flow, however many datagrams it has.
        for _ in 0..2 {
            lab.topology.client.enter(|| {
                let socket = UdpSocket::bind(any(to.ip())).expect("a socket");
                socket.connect(to).expect("a route");
                for _ in 0..5 {
                    anyport_tests::dial::udp_over(&socket, b"?", Duration::from_secs(5)).expect("an answer");
                }
            });
            assert_eq!(ear.told(), expected("udp"));
        }
    }
}

fn filtered(backend: &'static str) {
    let lab = Lab::new(backend);
    lab.daemon.ok("add-service web --handler hello");
    lab.daemon.ok(&format!("add-prefix {} {} --protocol both", PREFIX[0], PREFIX[1]));
    lab.daemon.ok("add-prefix 192.0.2.128/25 --ports 80 --service web");
    let mut ears = [
        ("prefix=192.0.2.0/25", "tcp 192.0.2.7:1"),
        ("prefix=2001:db8::/32&protocol=udp", "udp [2001:db8:0:a::201]:53"),
        ("port=443", "tcp 192.0.2.201:443"),
        ("service=web", "tcp 192.0.2.201:80"),
        ("protocol=udp&port=9", "udp 192.0.2.201:9"),
        ("source=192.0.2.0/24", ""),
        ("outcome=dropped", ""),
    ]
    .map(|(query, expected)| (Ear::new(&lab.daemon, query), query, expected));
    // The limit of subscribers.
    let last = Ear::new(&lab.daemon, "sample=1000000000");
    let refused = lab.daemon.refused("events", 1);
    assert!(refused.contains("8 others listen"), "{refused}");
    lab.topology.client.enter(|| {
        expect_tcp_hello(at("192.0.2.7", 1));
        expect_udp_hello(at(ONE[1], 53));
        expect_tcp_hello(at(ONE[0], 443));
        expect_tcp_hello(at(ONE[0], 80));
        expect_udp_hello(at(ONE[0], 9));
    });
    drop(last);
    for (ear, query, expected) in &mut ears {
        if !expected.is_empty() {
            let event = ear.next();
            let text = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
            assert_eq!(format!("{} {}", text("protocol"), text("to")), *expected, "{query}");
        }
        // And nothing else: the next thing is about the end of the subscriber's stream.
        ear.0.get_ref().set_read_timeout(Some(Duration::from_millis(300))).expect("a time limit");
        let mut rest = String::new();
        while ear.0.read_line(&mut rest).is_ok_and(|read| read > 0) {}
        assert!(!rest.contains("\"to\""), "{query}: {rest}");
    }
    for (query, what) in
        [("port=0", "port"), ("prefix=192.0.2.1/24", "192.0.2.0/24"), ("sample=0", "sample"), ("no=1", "no")]
    {
        let mut stream = UnixStream::connect(lab.daemon.socket()).expect("a connection");
        write!(stream, "GET /v1/events?{query} HTTP/1.1\r\nHost: anyport\r\nConnection: close\r\n\r\n")
            .expect("sending");
        let answer = std::io::read_to_string(stream).expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 400") && answer.contains(what), "{query}: {answer}");
    }
    let refused = lab.daemon.refused("events --service nobody", 1);
    assert!(refused.contains("there is no service nobody"), "{refused}");
    lab.daemon.refused("events --prefix 192.0.2.0/24 --source 2001:db8::/32", 2);
}

fn dropped(backend: &str) {
    let lab = Lab::new(backend);
    lab.daemon.ok("add-service none --handler registered");
    lab.daemon.ok(&format!("add-service picky --handler hello --source-deny {}", CLIENT[0]));
    lab.daemon.ok(&format!("add-prefix {} --protocol both", PREFIX[0]));
    lab.daemon.ok("add-prefix 192.0.2.1 --service none");
    lab.daemon.ok("add-prefix 192.0.2.2 --protocol both --service picky");
    let mut ear = Ear::new(&lab.daemon, "outcome=dropped");
    let mut of_service = Ear::new(&lab.daemon, "outcome=dropped&service=picky");
    lab.topology.client.enter(|| {
        expect_tcp_hello(at(ONE[0], 80));
        tcp(at("192.0.2.1", 80)).expect_err("nobody is there");
        tcp(at("192.0.2.2", 80)).expect_err("the client is not taken");
        udp(at("192.0.2.2", 53), b"?").expect_err("the client is not taken");
    });
    assert_eq!(ear.told(), format!("tcp {} 192.0.2.1:80 no-socket none 192.0.2.1/32", CLIENT[0]));
    for ear in [&mut ear, &mut of_service] {
        assert_eq!(ear.told(), format!("tcp {} 192.0.2.2:80 denied picky 192.0.2.2/32", CLIENT[0]));
        assert_eq!(ear.told(), format!("udp {} 192.0.2.2:53 denied picky 192.0.2.2/32", CLIENT[0]));
    }
}

/// A slow subscriber: each event is either published to it or counted as missed.
fn missed(backend: &str) {
    const FLOWS: u64 = 40_000;
    let lab = Lab::new(backend);
    lab.daemon.ok("add-service sink --handler discard");
    lab.daemon.ok(&format!("add-prefix {} --protocol udp --service sink", PREFIX[0]));
    let mut ear = Ear::new(&lab.daemon, "protocol=udp");
    let sent = lab.topology.client.enter(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
        let ports = (1..=u16::MAX).cycle().take(usize::try_from(FLOWS).expect("a number"));
        ports.filter(|port| socket.send_to(b"x", at(ONE[0], *port)).is_ok()).count() as u64
    });
    assert_eq!(sent, FLOWS);
    let steered = wait_for("last datagram", Duration::from_secs(20), || {
        let before = lab.daemon.count(PREFIX[0], "steered");
        sleep(Duration::from_millis(200));
        let now = lab.daemon.count(PREFIX[0], "steered");
        if now == before { Ok(now) } else { Err(format!("{now} so far")) }
    });
    let (mut told, mut missed) = (0, 0);
    while told + missed < steered {
        let event = ear.next();
        match event["missed"].as_u64() {
            Some(more) => missed += more,
            None => told += 1,
        }
    }
    assert_eq!(told + missed, steered);
    assert!(missed > 0 && told >= 4096, "{told} told, {missed} missed");
    // It goes on.
    lab.topology.client.enter(|| drop(udp(at(ONE[0], 50_000), b"?")));
    assert!(ear.told().contains("192.0.2.201:50000"));
}

fn limits_of_tproxy() {
    let lab = Lab::new("tproxy");
    let mut events = lab.daemon.ctl_command(&[], &["events", "--count", "1"]);
    events.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut events = lab.topology.host.spawn(events);
    lab.daemon.ok(&format!("add-prefix {}", PREFIX[0]));
    wait_for("end of the command", Duration::from_secs(20), || {
        lab.topology.client.enter(|| expect_tcp_hello(at(ONE[0], 80)));
        sleep(Duration::from_millis(50));
        events.try_wait().expect("a child").ok_or_else(|| "it runs".to_owned())
    });
    let output = events.wait_with_output().expect("its output");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && errors.starts_with("note: with tproxy events come from"), "{errors}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("to 192.0.2.201:80 steered to default by 192.0.2.0/24"));
}

/// Those who went leave their place, and a service is followed where it goes.
fn come_and_go() {
    let lab = Lab::new("sk-lookup");
    lab.daemon.ok("add-service web --handler hello");
    lab.daemon.ok(&format!("add-prefix {} --service web", PREFIX[0]));
    for _ in 0..30 {
        // That one has gone is noticed soon.
        drop(wait_for("a place", Duration::from_secs(5), || Ear::open(&lab.daemon, "")));
    }
    let mut ear = Ear::new(&lab.daemon, "service=web");
    lab.topology.client.enter(|| expect_tcp_hello(at(ONE[0], 80)));
    assert!(ear.told().contains("192.0.2.201:80 steered web"));
    // Another service of that name has another place in the kernel.
    lab.daemon.ok(&format!("remove-prefix {}", PREFIX[0]));
    lab.daemon.ok("remove-service web");
    lab.daemon.ok("add-service other --handler hello");
    lab.daemon.ok("add-service web --handler hello");
    lab.daemon.ok("add-prefix 198.51.100.128/25 --service other");
    lab.daemon.ok(&format!("add-prefix {} --service web", PREFIX[0]));
    lab.topology.client.enter(|| {
        expect_tcp_hello(at("192.0.2.9", 81));
    });
    assert!(ear.told().contains("192.0.2.9:81 steered web"));
}

fn command() {
    let lab = Lab::new("sk-lookup");
    lab.daemon.ok(&format!("add-prefix {}", PREFIX[0]));
    let mut events = lab.daemon.ctl_command(&[], &["--json", "events", "--port", "81", "--count", "2"]);
    events.stdout(Stdio::piped());
    let mut events = lab.topology.host.spawn(events);
    wait_for("end of the command", Duration::from_secs(20), || {
        for port in [80, 81] {
            lab.topology.client.enter(|| expect_tcp_hello(at(ONE[0], port)));
        }
        sleep(Duration::from_millis(50));
        events.try_wait().expect("a child").ok_or_else(|| "it runs".to_owned())
    });
    let output = events.wait_with_output().expect("its output");
    let lines: Vec<Value> =
        output.stdout.split(|it| *it == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
    assert!(output.status.success() && lines.len() == 2, "{lines:?}");
    assert!(lines.iter().all(|it| it["to"] == "192.0.2.201:81" && it["service"] == "default"), "{lines:?}");
    // The end of the daemon is the end of the events.
    let mut events = lab.daemon.ctl_command(&[], &["events"]);
    events.stdout(Stdio::piped()).stderr(Stdio::piped());
    let events = lab.topology.host.spawn(events);
    for _ in 0..20 {
        lab.topology.client.enter(|| expect_tcp_hello(at(ONE[0], 80)));
        sleep(Duration::from_millis(50));
    }
    drop(lab.daemon);
    let output = events.wait_with_output().expect("its output");
    let [told, errors] = [&output.stdout, &output.stderr].map(|it| String::from_utf8_lossy(it));
    assert_eq!(output.status.code(), Some(3), "{told} {errors}");
    assert!(told.contains("to 192.0.2.201:80") && errors.contains("has ended"), "{told} {errors}");
}
