//! Clients of the control socket that sit there, say half of what they want, or too much of it: nobody else has to wait for them.

use std::{
    fs,
    io::{ErrorKind, Read as _, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    process::{Command, Stdio},
    time::Duration,
};

use anyport_tests::{
    daemon::{Daemon, Setup},
    host::{Outcome, Running},
    http,
    netns::Netns,
    prerequisites::{program, public_copy, scratch},
    random::Random,
};
use libtest_mimic::Trial;

use crate::cases::trial;

/// How many sit there.
const IDLE: usize = 1_000;
/// How long the daemon waits for the rest of a head, and some more.
const LONGEST_HEAD: Duration = Duration::from_secs(30);
/// Random requests.
const ROUNDS: usize = 2_000;
/// As a user without privileges, opens as many connections as it is told, says that they are there, and holds them.
const SITTERS: &str = "import os, socket, sys\n\
    os.setgroups([])\n\
    os.setresgid(65533, 65533, 65533)\n\
    os.setresuid(65533, 65533, 65533)\n\
    def new():\n s = socket.socket(socket.AF_UNIX)\n s.connect(sys.argv[1])\n s.send(sys.argv[3].encode())\n return s\n\
    all = [new() for _ in range(int(sys.argv[2]))]\n\
    print('there', flush=True)\n\
    sys.stdin.read()\n";

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("crowd::a thousand idle clients", idle),
        trial("crowd::a thousand idle clients of somebody who may only look", idle_readers),
        trial("crowd::half requests", halves),
        trial("crowd::heads that are too large", large_heads),
        trial("crowd::requests at random", random_requests),
        trial("crowd::readers look and change nothing", readers),
    ]
}

fn expect_commands_work(daemon: &Daemon, who: &str) {
    daemon.ok("add-prefix 198.51.100.0/24");
    daemon.ok("remove-prefix 198.51.100.0/24");
    assert_eq!(daemon.rules().len(), 1, "rules beside {who}");
}

fn start(adapt: impl FnOnce(Setup) -> Setup) -> Daemon {
    let daemon = adapt(Setup::new(&Netns::new(), "sk-lookup")).start();
    daemon.ok("add-prefix 192.0.2.0/24");
    daemon
}

fn connect(daemon: &Daemon) -> UnixStream {
    UnixStream::connect(daemon.socket()).expect("a connection to the control socket")
}

/// Of the very user who then has something to say.
fn idle() {
    let daemon = start(|setup| setup);
    let silent: Vec<_> = (0..IDLE).map(|_| connect(&daemon)).collect();
    expect_commands_work(&daemon, "silent clients");
    let mut last = silent.last().expect("the last one").try_clone().expect("a second handle");
    last.write_all(&http::bytes("GET", "/v1/status", b"")).expect("a request");
    let mut answer = String::new();
    last.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200"), "one of those who sat there: {answer}");
    let descriptors = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).expect("descriptors").count();
    assert!(descriptors < 300, "{descriptors} descriptors for {IDLE} clients");
}

/// Clients of another user, who sit there until this is dropped.
fn sitters(daemon: &Daemon, number: usize, said: &str) -> Running {
    let mut command = Command::new("python3");
    command.args(["-c", SITTERS]).arg(daemon.socket()).arg(number.to_string()).arg(said);
    let mut process = Running(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("python3"));
    process.first_line();
    process
}

fn idle_readers() {
    let daemon = start(|setup| setup.args(["--readers", "all"]));
    let request = "GET /v1/services HTTP/1.1\r\nHost: anyport\r\n\r\n".repeat(3);
    for said in ["", "GET / HT", &request] {
        let _sitters = sitters(&daemon, IDLE / 2, said);
        expect_commands_work(&daemon, &format!("clients that said {said:?}"));
    }
}

fn halves() {
    let daemon = start(|setup| setup);
    let whole = http::bytes("POST", "/v1/prefixes", br#"{"prefixes":["203.0.113.0/24"]}"#);
    let mut random = Random::new("half requests");
    let mut clients: Vec<UnixStream> = (0..200)
        .map(|_| {
            let mut client = connect(&daemon);
            // Its connection may have been closed at once for another one.
            drop(client.write_all(&whole[..=random.below(whole.len() - 1)]));
            client
        })
        .collect();
    expect_commands_work(&daemon, "halves of requests");
    let mut head = connect(&daemon);
    head.write_all(b"GET /v1/status HTTP/1.1\r\nHost: ").expect("half a head");
    head.set_read_timeout(Some(LONGEST_HEAD)).expect("a time limit");
    let mut rest = Vec::new();
    match head.read_to_end(&mut rest) {
        Ok(_) => {}
        Err(error) => assert!(error.kind() != ErrorKind::WouldBlock, "half a head may stay"),
    }
    clients.clear();
    expect_commands_work(&daemon, "halves of requests that are gone");
}

fn large_heads() {
    let daemon = start(|setup| setup);
    for head in [
        format!("GET /v1/status HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(1 << 20)),
        format!("GET /v1/status HTTP/1.1\r\n{}\r\n", "X: a\r\n".repeat(100_000)),
        format!("GET /v1/{} HTTP/1.1\r\n\r\n", "a".repeat(1 << 20)),
        format!("GET /v1/prefixes?within={} HTTP/1.1\r\n\r\n", "%31".repeat(100_000)),
    ] {
        let answer = http::raw(&daemon.socket(), head.as_bytes());
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{} bytes: {answer}", head.len());
        expect_commands_work(&daemon, "a large head");
    }
}

/// Good requests of which some bytes are others.
fn random_requests() {
    let daemon = start(|setup| setup);
    let good: [(&str, &str, &[u8]); 6] = [
        ("POST", "/v1/prefixes", br#"{"prefixes":["203.0.113.0/24"],"ports":"80","service":"default"}"#),
        ("DELETE", "/v1/prefixes", br#"{"prefixes":["203.0.113.0/24"]}"#),
        ("POST", "/v1/services", br#"{"name":"trap","handler":"discard","banner":"login: "}"#),
        ("POST", "/v1/apply?dry_run=true", b"203.0.113.0/24 tcp 80,443 service=default\n"),
        ("GET", "/v1/explain?to=192.0.2.7:80", b""),
        ("GET", "/v1/prefixes?within=192.0.2.0/24&limit=3", b""),
    ];
    let mut random = Random::new("requests");
    for round in 0..ROUNDS {
        let (method, target, body) = *random.pick(&good);
        let mut bytes = http::bytes(method, target, body);
        for _ in 0..=random.below(3) {
            if bytes.is_empty() {
                break;
            }
            let at = random.below(bytes.len());
            match random.below(3) {
                0 => bytes[at] = random.below(256).to_le_bytes()[0],
                1 => drop(bytes.remove(at)),
                _ => bytes.truncate(at.max(1)),
            }
        }
        let mut client = connect(&daemon);
        client.set_read_timeout(Some(Duration::from_secs(10))).expect("a time limit");
        drop(client.write_all(&bytes));
        drop(client.shutdown(std::net::Shutdown::Write));
        let mut answer = Vec::new();
        drop(client.read_to_end(&mut answer));
        let answer = String::from_utf8_lossy(&answer);
        let is_answer = answer.is_empty() || ["HTTP/1.1 2", "HTTP/1.1 4"].iter().any(|it| answer.starts_with(it));
        assert!(is_answer, "round {round}: {:?} was answered by {answer}", String::from_utf8_lossy(&bytes));
    }
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
    daemon.ok("status");
}

fn readers() {
    let public = scratch();
    let ctl = public.path().join("anyportctl");
    public_copy(&program("anyportctl").expect("the client"), &ctl);
    let ask = |daemon: &Daemon, groups: &str, words: &str| {
        fs::set_permissions(daemon.socket().parent().expect("a directory"), fs::Permissions::from_mode(0o755))
            .expect("an open directory");
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65533", "--regid=65533", groups]).arg(&ctl).args(words.split(' '));
        Outcome::of(command.arg("--socket").arg(daemon.socket()))
    };
    let looks = ["status", "prefixes", "services", "explain 192.0.2.7:80"];
    // And readers may not see which client connects where.
    let changes =
        ["add-prefix 203.0.113.0/24", "remove-prefix 192.0.2.0/24", "remove-service default", "confirm", "events"];
    for (option, groups, may_look) in
        [("all", "--clear-groups", true), ("nogroup", "--groups=65534", true), ("nogroup", "--clear-groups", false)]
    {
        let daemon = start(|setup| setup.args(["--readers", option]));
        for words in looks {
            let outcome = ask(&daemon, groups, words);
            assert_eq!(outcome.status, if may_look { 0 } else { 4 }, "{words}, {option}, {groups}: {outcome}");
        }
        for words in changes {
            let outcome = ask(&daemon, groups, words);
            assert!(outcome.status == 4, "{words}, {option}, {groups}: {outcome}");
        }
        let before = daemon.pid();
        let (status, answer) = http::request(&daemon.socket(), "GET", "/v1/takeover", b"{}");
        assert!(status == 405 && daemon.pid() == before, "{answer}");
        assert_eq!(daemon.rules().len(), 1);
    }
}
