//! Local users and clients of the HTTP address who want the daemon to stop, grow or forget: neither commands nor those who only look wait
//! for them, memory stays bounded, and each command is carried out once and acknowledged.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyport_tests::{
    daemon::{Daemon, Setup},
    host::{Running, wait_for},
    http,
    netns::Netns,
    promptness::{self, Times, expect_prompt},
};
use libtest_mimic::Trial;
use nix::{
    time::{ClockId, clock_gettime},
    unistd::Pid,
};
use serde_json::Value;

use crate::cases::{alone, at, trial};

/// Rules whose list nobody reads.
const RULES: u32 = 200_000;
/// What memory may grow by under attack, in bytes.
const GROWTH: u64 = 64 << 20;
/// Answers that are measured.
const ASKED: usize = 100;
/// Commands at a time.
const COMMANDS: usize = 120;
const METRICS: &str = "127.0.0.1:9464";
/// What is dialled meanwhile.
const STEERED: &str = "198.51.100.0/24";

/// As a user without privileges, asks over and over as it is told.
const ATTACKERS: &str = "
import os, socket, sys, time
os.setgroups([])
os.setresgid(65533, 65533, 65533)
os.setresuid(65533, 65533, 65533)
path, kind = sys.argv[1:3]
def ask(text):
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(5)
    s.connect(path)
    s.send(text.encode())
    return s
get = 'GET /v1/prefixes HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n'
held = []
print('begun', flush=True)
end = time.time() + 120
while time.time() < end:
    try:
        if kind == 'unread':
            held.append(ask(get))
        elif kind == 'pipelined':
            held.append(ask(get * 50))
        elif kind == 'half':
            held.append(ask(get[:20]))
        elif kind == 'dribble':
            held.append(ask('GET /v1/status HTTP/1.1\\r\\nHost: a\\r\\nContent-Length: 1000\\r\\n\\r\\n'))
            for s in held[-64:]:
                s.send(b'a')
        elif kind == 'explain':
            ask('GET /v1/explain?to=198.51.100.7:80 HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n').close()
        else:
            ask(get).close()
    except OSError:
        pass
    if len(held) > 64:
        held.pop(0).close()
    if kind not in ('churn', 'explain'):
        time.sleep(0.01 if len(held) < 64 else 0.5)
";

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        alone("hostile_api::readers who do not read", unread),
        alone("hostile_api::readers during a large apply", during_apply),
        trial("hostile_api::a listing in pieces is a listing", pieces),
        trial("hostile_api::commands at the same time", commands),
        trial("hostile_api::answers that were lost", lost),
        trial("hostile_api::events that nobody reads", unread_events),
        trial("hostile_api::the HTTP address", http_address),
    ]
}

/// They attack until this is dropped.
fn attackers(daemon: &Daemon, kind: &str) -> Running {
    let mut command = Command::new("python3");
    command.args(["-c", ATTACKERS]).arg(daemon.socket()).arg(kind).stdout(Stdio::piped());
    let mut process = Running(command.spawn().expect("python3"));
    assert_eq!(process.first_line(), "begun\n");
    process
}

fn memory(pid: Pid) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the state of the server");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

fn descriptors(pid: Pid) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors").count()
}

fn rules(count: u32) -> String {
    let address = |number: u32| {
        let [_, a, b, c] = number.to_be_bytes();
        format!("2001:db8:{a:x}{b:02x}:{c:x}::/64 tcp 80 service=default route=no\n")
    };
    (0..count).map(address).collect()
}

fn apply(daemon: &Daemon, count: u32) {
    let file = daemon.state().with_extension("rules");
    fs::write(&file, rules(count)).expect("a file of rules");
    daemon.ok(&format!("apply {}", file.display()));
}

fn start(backend: &str, adapt: impl FnOnce(Setup) -> Setup) -> Daemon {
    let namespace = Netns::new();
    namespace.ip("link set lo up");
    adapt(Setup::new(&namespace, backend).args(["--readers", "all"])).start()
}

/// A client on the same host.
fn client(daemon: &Daemon) -> (&Netns, SocketAddr) {
    (daemon.namespace(), at("198.51.100.7", 80))
}

fn unread() {
    let daemon = start("sk-lookup", |setup| setup);
    apply(&daemon, RULES);
    daemon.ok(&format!("add-prefix {STEERED}"));
    expect_prompt(&daemon, Some(client(&daemon)), "before any attack", |asked| asked < ASKED);
    let idle = memory(daemon.pid());
    let before = descriptors(daemon.pid());
    for kind in ["unread", "pipelined", "half", "dribble", "churn"] {
        let attack = attackers(&daemon, kind);
        thread::sleep(Duration::from_secs(2));
        expect_prompt(&daemon, Some(client(&daemon)), kind, |asked| asked < ASKED);
        let grown = memory(daemon.pid()).saturating_sub(idle);
        eprintln!("{kind}: {} MiB above idle", grown >> 20);
        assert!(grown <= GROWTH, "{kind}: {} MiB above idle", grown >> 20);
        drop(attack);
    }
    wait_for("connections that are closed", Duration::from_secs(20), || {
        let descriptors = descriptors(daemon.pid());
        if descriptors <= before { Ok(()) } else { Err(format!("{descriptors} descriptors, {before} before")) }
    });
}

fn during_apply() {
    for backend in ["sk-lookup", "tproxy"] {
        let daemon = start(backend, |setup| setup);
        daemon.ok(&format!("add-prefix {STEERED}"));
        let _attackers = ["unread", "explain"].map(|kind| attackers(&daemon, kind));
        thread::scope(|scope| {
            let applied = scope.spawn(|| apply(&daemon, 100_000));
            let what = format!("{backend}, during an apply");
            expect_prompt(&daemon, Some(client(&daemon)), &what, |asked| asked < ASKED || !applied.is_finished());
            applied.join().expect("the rules are applied");
        });
        assert_eq!(daemon.json("status")["rules"], 100_001);
    }
}

/// A body that may have come in chunks (RFC 9112, 7.1).
fn joined(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n").filter(|_| !body.starts_with('[')) {
        let (chunk, rest) = rest.split_at(usize::from_str_radix(size, 16).expect("the size of a chunk"));
        whole += chunk;
        body = rest.strip_prefix("\r\n").expect("the end of a chunk");
    }
    whole + body
}

/// The same text whether it is short or long, and for each query.
fn pieces() {
    let daemon = start("sk-lookup", |setup| setup);
    apply(&daemon, 5_000);
    daemon.ok("add-prefix 198.51.100.0/24 --ports 1-65535 --except 22");
    let all = daemon.json("prefixes");
    let all = all.as_array().expect("rules");
    assert_eq!(all.len(), 5_001);
    let is_ipv6 = |rule: &&Value| rule["prefix"].to_string().contains("2001:db8:");
    let all_ports = |rule: &&Value| rule["ports"] != "80";
    let last = all.last().expect("a rule")["prefix"].as_str().expect("a prefix");
    let expected: [(&str, Vec<&Value>); 5] = [
        ("limit=7", all.iter().take(7).collect()),
        ("within=2001:db8::/34", all.iter().filter(is_ipv6).collect()),
        ("service=default&limit=4999", all.iter().take(4_999).collect()),
        ("port=443", all.iter().filter(all_ports).collect()),
        (&format!("after={last}"), Vec::new()),
    ];
    for (query, rules) in expected {
        let (status, answer) = http::request(&daemon.socket(), "GET", &format!("/v1/prefixes?{query}"), b"");
        assert_eq!(status, 200, "{query}: {answer}");
        let answer: Vec<Value> = serde_json::from_str(&joined(&answer)).expect("rules");
        assert!(answer.iter().eq(rules.iter().copied()), "{query}: {} of {} rules", answer.len(), rules.len());
    }
}

fn acknowledged(daemon: &Daemon, words: impl Fn(usize) -> String + Sync) {
    let outcomes: Vec<_> = thread::scope(|scope| {
        let words = &words;
        let all: Vec<_> = (0..COMMANDS)
            .map(|number| {
                scope.spawn(move || {
                    let words = words(number);
                    daemon.ctl(&words.split(' ').collect::<Vec<_>>())
                })
            })
            .collect();
        all.into_iter().map(|it| it.join().expect("a command")).collect()
    });
    let failed: Vec<_> = outcomes.iter().filter(|it| it.status != 0).map(ToString::to_string).collect();
    assert!(failed.is_empty(), "{} of {COMMANDS} failed, such as {:?}", failed.len(), failed.first());
}

fn commands() {
    let daemon = start("sk-lookup", |setup| setup);
    acknowledged(&daemon, |number| format!("add-service s{number} --handler echo"));
    acknowledged(&daemon, |number| format!("add-prefix 198.51.100.{number} --service s{number}"));
    assert_eq!(daemon.rules().len(), COMMANDS);
    acknowledged(&daemon, |number| format!("drain --service s{number} --wait 0s"));
    acknowledged(&daemon, |number| format!("undrain --service s{number}"));
    acknowledged(&daemon, |number| format!("remove-prefix 198.51.100.{number}"));
    acknowledged(&daemon, |number| format!("remove-service s{number}"));
    assert!(daemon.rules().is_empty());
    assert_eq!(daemon.json("services").as_array().expect("services").len(), 1);
}

/// In milliseconds.
fn since_boot() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("the time");
    u64::try_from(Duration::from(now).as_millis()).expect("a number")
}

/// A request with an id, which was sent so many milliseconds ago for the first time.
fn with_id(id: &str, age: Option<u64>, method: &str, target: &str, body: &str) -> Vec<u8> {
    let first = age.map(|age| format!("X-Anyport-First: {}\r\n", since_boot() - age)).unwrap_or_default();
    let head = format!(
        "{method} {target} HTTP/1.1\r\nHost: anyport\r\nConnection: close\r\nX-Anyport-Request: {id}\r\n{first}"
    );
    format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

fn lost() {
    let mut daemon = start("sk-lookup", |setup| setup);
    let verbs = [
        ("POST", "/v1/services", r#"{"name":"web","handler":"echo"}"#),
        ("POST", "/v1/prefixes", r#"{"prefixes":["198.51.100.0/24"],"service":"web"}"#),
        ("POST", "/v1/drain", r#"{"service":"web","prefixes":[],"wait":0}"#),
        ("DELETE", "/v1/drain", r#"{"service":"web","prefixes":[]}"#),
        ("DELETE", "/v1/prefixes", r#"{"prefixes":["198.51.100.0/24"]}"#),
        ("DELETE", "/v1/services/web", ""),
        ("POST", "/v1/apply", "203.0.113.0/24 tcp 80 service=default route=no\n"),
        ("POST", "/v1/apply?confirm=60", "203.0.113.0/24 tcp 81 service=default route=no\n"),
        ("POST", "/v1/confirm", ""),
        ("POST", "/v1/reload", ""),
    ];
    for (number, (method, target, body)) in verbs.into_iter().enumerate() {
        let id = format!("lost-{number}");
        let mut client = UnixStream::connect(daemon.socket()).expect("a connection");
        client.write_all(&with_id(&id, None, method, target, body)).expect("a request");
        // The daemon has it, and the answer is lost.
        thread::sleep(Duration::from_millis(200));
        drop(client);
        let answer = |age| http::raw(&daemon.socket(), &with_id(&id, age, method, target, body));
        let (first, second) = (answer(Some(200)), answer(Some(300)));
        assert!(first.starts_with("HTTP/1.1 200"), "{method} {target}: {first}");
        let content = |answer: &str| answer.split_once("\r\n\r\n").map(|(_, content)| content.to_owned());
        assert_eq!(content(&first), content(&second), "{method} {target}");
    }
    // Another daemon does not know.
    daemon.stop();
    daemon.restart();
    let (method, target, body) = verbs[1];
    let answer = http::raw(&daemon.socket(), &with_id("lost-1", Some(60_000), method, target, body));
    assert!(answer.starts_with("HTTP/1.1 500") && answer.contains("not known"), "{answer}");
    assert_eq!(daemon.rules().len(), 1, "nothing was done again");
}

fn unread_events() {
    let daemon = start("sk-lookup", |setup| setup);
    daemon.ok("add-prefix 127.0.0.0/8 --ports 7000-7999 --no-route --force");
    let mut silent = UnixStream::connect(daemon.socket()).expect("a connection");
    silent.write_all(&http::bytes("GET", "/v1/events", b"")).expect("a request");
    let before = memory(daemon.pid());
    let end = Instant::now() + Duration::from_secs(40);
    let mut first = [0; 16];
    silent.read_exact(&mut first).expect("an answer");
    let is_closed = || {
        daemon.namespace().enter(|| {
            for port in 7_000..7_200 {
                drop(TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port))));
            }
        });
        daemon.log().contains("the peer has read nothing") || !is_connected(&daemon)
    };
    while !is_closed() {
        assert!(Instant::now() < end, "nobody reads these events, and they go on");
    }
    assert!(memory(daemon.pid()).saturating_sub(before) < GROWTH);
}

/// Whether a client of the control socket is connected.
fn is_connected(daemon: &Daemon) -> bool {
    let path = daemon.socket().display().to_string();
    let sockets = fs::read_to_string(format!("/proc/{}/net/unix", daemon.pid())).expect("sockets");
    // One is the socket that listens.
    sockets.lines().filter(|line| line.ends_with(&path)).count() > 1
}

fn http_address() {
    let daemon = start("sk-lookup", |setup| setup.args(["--metrics", METRICS]));
    let address: SocketAddr = METRICS.parse().expect("an address");
    let namespace = daemon.namespace();
    let ask = |host: &str, path: &str| {
        let mut client = namespace.enter(|| TcpStream::connect(address)).expect("a connection");
        client.set_read_timeout(Some(Duration::from_secs(10))).expect("a time limit");
        client.write_all(format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes()).expect("a request");
        let mut answer = String::new();
        client.read_to_string(&mut answer).expect("an answer");
        answer
    };
    let idle = memory(daemon.pid());
    let connect = |said: &[u8]| {
        let mut client = namespace.enter(|| TcpStream::connect(address)).expect("a connection");
        drop(client.write_all(said));
        client
    };
    for said in [&b""[..], b"GET /met", b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"] {
        let _silent: Vec<_> = (0..300).map(|_| connect(said)).collect();
        let mut times = Times::default();
        for _ in 0..ASKED {
            let answer = times.measure(|| ask(METRICS, "/metrics"));
            assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("anyport_"), "{answer}");
        }
        let said = String::from_utf8_lossy(said).into_owned();
        times.expect_within(promptness::STATUS, &format!("beside those who said {said:?}: a scrape"));
    }
    assert!(memory(daemon.pid()).saturating_sub(idle) <= GROWTH);
    for path in ["/", "/metrics", "/live.json", "/history.json"] {
        assert!(ask("site.example:9464", path).starts_with("HTTP/1.1 421"), "{path} for a page of another site");
        assert!(ask("localhost:9464", path).starts_with("HTTP/1.1 200"), "{path}");
    }
}
