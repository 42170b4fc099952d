//! Malformed commands, API bodies and configurations: each is answered clearly and changes nothing.

use std::{ffi::OsStr, fs, net::Ipv6Addr, os::unix::ffi::OsStrExt as _};

use anyport_tests::{
    daemon::{Daemon, Setup},
    host::Outcome,
    http,
    netns::Netns,
    prerequisites::scratch,
};
use libtest_mimic::Trial;

use crate::cases::trial;

/// Arguments, the exit status, and what the complaint must contain.
const COMMANDS: &[(&[&str], i32, &str)] = &[
    (&["add-prefix"], 2, "PREFIX"),
    (&["add-prefix", ""], 2, "prefix"),
    (&["add-prefix", "192.0.2.1/24"], 2, "192.0.2.0/24"),
    (&["add-prefix", "2001:db8::1/64"], 2, "2001:db8::/64"),
    (&["add-prefix", "192.0.2.0/33"], 2, "192.0.2.0/33"),
    (&["add-prefix", "2001:db8::/129"], 2, "2001:db8::/129"),
    (&["add-prefix", "192.0.2.0/-1"], 2, "192.0.2.0/-1"),
    (&["add-prefix", "192.0.2.0/"], 2, "192.0.2.0/"),
    (&["add-prefix", "192.0.2.0/24/24"], 2, "192.0.2.0/24/24"),
    (&["add-prefix", "192.0.2/24"], 2, "192.0.2/24"),
    (&["add-prefix", "192.0.2.256"], 2, "192.0.2.256"),
    (&["add-prefix", "192.0.02.1"], 2, "192.0.02.1"),
    (&["add-prefix", "2001:db8:::/64"], 2, "2001:db8:::/64"),
    (&["add-prefix", "::ffff:192.0.2.0/120"], 2, "192.0.2.0/24"),
    (&["add-prefix", "example.org"], 2, "example.org"),
    (&["add-prefix", "224.0.0.0/4", "--force"], 2, "multicast"),
    (&["add-prefix", "198.51.100.128/25", "ff02::1"], 2, "multicast"),
    (&["add-prefix", "255.255.255.255", "--no-route"], 2, "broadcast"),
    (&["add-prefix", "0.0.0.0/8"], 2, "martian"),
    (&["add-prefix", "169.254.0.0/16", "--no-route"], 5, "metadata"),
    (&["add-prefix", "fe80::/10"], 5, "neighbours"),
    (&["add-prefix", "128.0.0.0/1"], 5, "multicast"),
    (&["add-prefix", "192.0.2.0/24", "--protocol", "sctp"], 2, "sctp"),
    (&["add-prefix", "192.0.2.0/24", "--protocol", ""], 2, "protocol"),
    (&["add-prefix", "192.0.2.0/24", "--ports", "0"], 2, "0"),
    (&["add-prefix", "192.0.2.0/24", "--ports", "65536"], 2, "65536"),
    (&["add-prefix", "192.0.2.0/24", "--ports", "111443"], 2, "111443"),
    (&["add-prefix", "192.0.2.0/24", "--ports", "90-80"], 2, "90-80"),
    (&["add-prefix", "192.0.2.0/24", "--ports", "80-"], 2, "80-"),
    (&["add-prefix", "192.0.2.0/24", "--ports", "80,,443"], 2, "80,,443"),
    (&["add-prefix", "192.0.2.0/24", "--ports", ""], 2, "port"),
    (&["add-prefix", "192.0.2.0/24", "--ports", "http"], 2, "http"),
    (&["add-prefix", "192.0.2.0/24", "--ports", "+80"], 2, "+80"),
    (&["add-prefix", "192.0.2.0/24", "--except", "22,x"], 2, "x"),
    (&["add-prefix", "192.0.2.0/24", "--except", "99999"], 2, "99999"),
    (&["add-prefix", "192.0.2.0/24", "--service", ""], 2, "service"),
    (&["add-prefix", "192.0.2.0/24", "--service", "no such"], 2, "no such"),
    (&["add-prefix", "192.0.2.0/24", "--service", "absent"], 1, "absent"),
    (&["add-prefix", "192.0.2.0/24", "--colour"], 2, "--colour"),
    (&["add-prefix", "192.0.2.0/24", "--ports"], 2, "--ports"),
    (&["remove-prefix"], 2, "PREFIX"),
    (&["remove-prefix", "192.0.2.1/24"], 2, "192.0.2.0/24"),
    (&["remove-prefix", "203.0.113.0/24"], 1, "203.0.113.0/24"),
    (&["remove-prefix", "192.0.2.0/24", "--ports", "70000"], 2, "70000"),
    (&["add-service"], 2, "NAME"),
    (&["add-service", "two"], 2, "--handler"),
    (&["add-service", "two", "--handler", "shout"], 2, "shout"),
    (&["add-service", "-two", "--handler", "echo"], 2, "-t"),
    (&["add-service", "Two", "--handler", "echo"], 2, "Two"),
    (&["add-service", "two\u{1b}[31m", "--handler", "echo"], 2, "name"),
    (&["add-service", "..", "--handler", "echo"], 2, ".."),
    (&["add-service", "a/b", "--handler", "echo"], 2, "a/b"),
    (&["add-service", LONG, "--handler", "echo"], 2, "62"),
    (&["add-service", "two", "--handler", "echo", "--banner", "only for discard"], 2, "banner"),
    (&["add-service", "two", "--handler", "echo", "--max-connections", "0"], 2, "0"),
    (&["add-service", "two", "--handler", "echo", "--max-connections-per-source", "many"], 2, "many"),
    (&["add-service", "two", "--handler", "echo", "--accept-rate-per-source", "100"], 2, "slash"),
    (&["add-service", "two", "--handler", "echo", "--accept-rate-per-source", "0/s"], 2, "0/s"),
    (&["add-service", "two", "--handler", "registered", "--max-connections", "9"], 2, "owner's to limit"),
    (&["add-service", "two", "--handler", "echo", "--source-allow", "10.0.0.1/8"], 2, "10.0.0.0/8"),
    (&["add-service", "two", "--handler", "echo", "--source-deny", "somebody"], 2, "somebody"),
    (&["add-service", "two", "--handler", "echo", "--source-deny", "::/0", "--source-allow", "::/0"], 2, "both in"),
    (&["remove-service", "absent"], 1, "absent"),
    (&["prefixes", "extra"], 2, "extra"),
    (&["frobnicate"], 2, "frobnicate"),
];

/// A name of 64 characters, one more than may be.
const LONG: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

/// Method, target, body, the status code, and what the error must contain.
const REQUESTS: &[(&str, &str, &str, u16, &str)] = &[
    ("POST", "/v1/prefixes", "", 400, ""),
    ("POST", "/v1/prefixes", "{", 400, ""),
    ("POST", "/v1/prefixes", "[]", 400, ""),
    ("POST", "/v1/prefixes", "null", 400, ""),
    ("POST", "/v1/prefixes", "{}", 400, "prefixes"),
    ("POST", "/v1/prefixes", r#"{"prefixes":[]}"#, 400, "prefix"),
    ("POST", "/v1/prefixes", r#"{"prefixes":"192.0.2.0/24"}"#, 400, ""),
    ("POST", "/v1/prefixes", r#"{"prefixes":[1]}"#, 400, ""),
    ("POST", "/v1/prefixes", r#"{"prefixes":["203.0.113.0/24","x"]}"#, 400, "x"),
    ("POST", "/v1/prefixes", r#"{"prefixes":["203.0.113.1/24"]}"#, 400, "203.0.113.0/24"),
    ("POST", "/v1/prefixes", r#"{"prefixes":["203.0.113.0/24"],"protocol":"icmp"}"#, 400, "icmp"),
    ("POST", "/v1/prefixes", r#"{"prefixes":["203.0.113.0/24"],"ports":80}"#, 400, ""),
    ("POST", "/v1/prefixes", r#"{"prefixes":["203.0.113.0/24"],"ports":"0-80"}"#, 400, "0"),
    ("POST", "/v1/prefixes", r#"{"prefixes":["203.0.113.0/24"],"except":"1-99999999999999999999"}"#, 400, "999"),
    ("POST", "/v1/prefixes", r#"{"prefixes":["203.0.113.0/24"],"service":"../../etc"}"#, 400, "etc"),
    ("POST", "/v1/prefixes", r#"{"prefixes":["203.0.113.0/24"],"service":"absent"}"#, 404, "absent"),
    ("POST", "/v1/prefixes", r#"{"prefixes":["203.0.113.0/24"],"force":"yes"}"#, 400, ""),
    ("POST", "/v1/prefixes", r#"{"prefixes":["203.0.113.0/24"],"colour":"red"}"#, 400, "colour"),
    ("POST", "/v1/prefixes", r#"{"prefixes":["0.0.0.0/0"]}"#, 428, "force"),
    ("DELETE", "/v1/prefixes", "{}", 400, "prefixes"),
    ("DELETE", "/v1/prefixes", r#"{"prefixes":["203.0.113.0/24"]}"#, 404, "203.0.113.0/24"),
    ("DELETE", "/v1/prefixes", r#"{"prefixes":["192.0.2.0/24"],"ports":"x"}"#, 400, "x"),
    ("POST", "/v1/services", r#"{"name":"two"}"#, 400, "handler"),
    ("POST", "/v1/services", r#"{"name":"two","handler":"shout"}"#, 400, "shout"),
    ("POST", "/v1/services", r#"{"name":"a b","handler":"echo"}"#, 400, "a b"),
    ("POST", "/v1/services", r#"{"name":"two","handler":"echo","colour":1}"#, 400, "colour"),
    ("POST", "/v1/services", r#"{"name":"two","handler":"echo","max-connections":-1}"#, 400, "-1"),
    ("POST", "/v1/services", r#"{"name":"two","handler":"echo","accept-rate-per-source":"5/x"}"#, 400, "5/x"),
    ("POST", "/v1/services", r#"{"name":"two","handler":"echo","source-deny":"10.0.0.0/8"}"#, 400, ""),
    ("DELETE", "/v1/services/absent", "", 404, "absent"),
    ("DELETE", "/v1/services/%00", "", 400, ""),
    ("PUT", "/v1/prefixes", "{}", 405, "PUT"),
    ("GET", "/v2/status", "", 404, ""),
];

/// A configuration, and what the complaint must contain.
const CONFIGURATIONS: &[(&str, &[&str])] = &[
    ("[daemon", &["line 1"]),
    ("[daemon]\nsteering = \"ebpf\"\n", &["line 2", "ebpf"]),
    ("[daemon]\nsteering = 1\n", &["line 2"]),
    ("[daemon]\nworkers = -1\n", &["line 2"]),
    ("[daemon]\nworkers = 0\n", &["workers"]),
    ("[[service]]\nname = \"edge\"\nhandler = \"echo\"\nsource-allow = [\"10.0.0.1/8\"]\n", &["line 4", "10.0.0.0/8"]),
    ("[daemon]\nmax-connections = 0\n", &["line 2"]),
    ("[daemon]\ncolour = \"red\"\n", &["line 2", "colour"]),
    ("[deamon]\n", &["line 1", "deamon"]),
    ("[[service]]\nname = \"edge\"\n", &["handler"]),
    ("[[service]]\nname = \"Edge\"\nhandler = \"echo\"\n", &["Edge"]),
    ("[[service]]\nname = \"edge\"\nhandler = \"echo\"\naccept-rate-per-source = \"x\"\n", &["line 4", "x"]),
    ("[[service]]\nname = \"edge\"\nhandler = \"shout\"\n", &["line 3", "shout"]),
    (
        "[[service]]\nname = \"e\"\nhandler = \"echo\"\n[[service]]\nname = \"e\"\nhandler = \"hello\"\n",
        &["second service e"],
    ),
    ("[[rule]]\nports = \"80\"\n", &["prefix"]),
    ("[[rule]]\nprefix = \"192.0.2.1/24\"\n", &["192.0.2.0/24"]),
    ("[[rule]]\nprefix = \"192.0.2.0/24\"\nports = \"80-70\"\n", &["80-70"]),
    ("[[rule]]\nprefix = \"192.0.2.0/24\"\nprotocol = \"sctp\"\n", &["sctp"]),
    ("[[rule]]\nprefix = \"192.0.2.0/24\"\nservice = \"absent\"\n", &["absent"]),
    ("[[rule]]\nprefix = \"192.0.2.0/24\"\ncolour = 1\n", &["line 3", "colour"]),
];

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("malformed::commands", commands),
        trial("malformed::API bodies", requests),
        trial("malformed::arguments that are no UTF-8", no_utf8),
        trial("malformed::API bodies that are too large", too_large),
        trial("malformed::commands that are too large", too_many),
        trial("malformed::bytes that are no HTTP", no_http),
        trial("malformed::configurations", configurations),
        trial("malformed::options of the daemon", options),
    ]
}

/// A daemon with something to lose.
fn start() -> Daemon {
    let daemon = Daemon::start(&Netns::new(), "sk-lookup");
    daemon.ok("add-service one --handler echo");
    daemon.ok("add-prefix 192.0.2.0/24 2001:db8:0:a::/64 --service one --except 22");
    daemon
}

/// All that a command could change, in words.
fn everything(daemon: &Daemon) -> String {
    let names = daemon
        .json("services")
        .as_array()
        .expect("an array")
        .iter()
        .map(|one| one["name"].to_string())
        .collect::<String>();
    let generation = &daemon.json("status")["generation"];
    format!(
        "{}\n{names}\ngeneration {generation}\n{}",
        daemon.rules().join("\n"),
        daemon.namespace().ip("route show table local")
    )
}

fn commands() {
    let daemon = start();
    let before = everything(&daemon);
    let mut wrong = Vec::new();
    for &(arguments, status, part) in COMMANDS {
        let outcome = daemon.ctl(arguments);
        if outcome.status != status || !outcome.stderr.contains(part) {
            wrong.push(format!("{arguments:?}: expected status {status} and {part:?}, but: {outcome}"));
        }
        let shown = outcome.stderr.contains('\u{1b}');
        assert!(!shown, "{arguments:?}: the complaint repeats control characters: {:?}", outcome.stderr);
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), COMMANDS.len(), wrong.join("\n"));
    assert_eq!(everything(&daemon), before, "state after malformed commands");
}

fn requests() {
    let daemon = start();
    let before = everything(&daemon);
    let mut wrong = Vec::new();
    for &(method, target, body, status, part) in REQUESTS {
        let (seen, answer) = http::request(&daemon.socket(), method, target, body.as_bytes());
        let error = serde_json::from_str::<serde_json::Value>(&answer).is_ok_and(|answer| answer["error"].is_string());
        if seen != status || !answer.contains(part) || !error {
            wrong.push(format!("{method} {target} {body}: expected {status}, {part:?} in JSON, but: {seen} {answer}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), REQUESTS.len(), wrong.join("\n"));
    assert_eq!(everything(&daemon), before, "state after malformed requests");
}

/// Neither the arguments nor what `--json` has to be looked for in are texts.
fn no_utf8() {
    let daemon = start();
    let before = everything(&daemon);
    let garbage = OsStr::from_bytes(b"192.0.2.\xff");
    for arguments in [&["add-prefix"][..], &["--json", "add-prefix"], &["add-service", "--handler"], &[]] {
        let mut command = daemon.ctl_command(&[], arguments);
        let outcome = Outcome::of(command.arg(garbage));
        assert!(outcome.status == 2, "{arguments:?} and bytes that are no UTF-8: {outcome}");
        assert!(!outcome.stderr.contains("panicked"), "{arguments:?} and bytes that are no UTF-8: {outcome}");
        if arguments.contains(&"--json") {
            let error: serde_json::Value = serde_json::from_str(&outcome.stderr).unwrap_or_default();
            assert!(
                error["error"].is_string(),
                "{arguments:?} and bytes that are no UTF-8 complain without JSON: {outcome}"
            );
        }
    }
    assert_eq!(everything(&daemon), before, "state after arguments that are no UTF-8");
}

/// A body beyond the limit is told so in JSON, like any other mistake.
fn too_large() {
    let daemon = start();
    let before = everything(&daemon);
    for length in [(1 << 20) + 1, 8 << 20] {
        let body = vec![b' '; length];
        for (method, target) in [("POST", "/v1/prefixes"), ("DELETE", "/v1/prefixes"), ("POST", "/v1/services")] {
            let (status, answer) = http::request(&daemon.socket(), method, target, &body);
            let problem: serde_json::Value = serde_json::from_str(&answer).unwrap_or_default();
            let complete = problem["error"].is_string() && problem["hint"] != "";
            assert!(status == 413 && complete, "{method} {target} with {length} bytes: {status} {answer:?}");
        }
    }
    assert_eq!(everything(&daemon), before, "state after bodies that were too large");
}

/// As many prefixes as fit on a command line, but not into a body: a mistake, and no daemon that is missing.
fn too_many() {
    let daemon = start();
    let before = everything(&daemon);
    let base = "2001:db8:aaaa:bbbb:cccc:dddd::".parse::<Ipv6Addr>().expect("an address").to_bits();
    let many: Vec<String> =
        (0..30_000).map(|number| Ipv6Addr::from_bits(base | 0xeeee_0000 | number).to_string()).collect();
    for verb in ["add-prefix", "remove-prefix"] {
        let mut command = daemon.ctl_command(&[], &[verb]);
        let Outcome { status, stderr, .. } = Outcome::of(command.args(&many));
        assert!((1..=2).contains(&status), "{verb} with {} addresses: exit status {status}: {stderr}", many.len());
        let said = stderr.to_lowercase();
        let clear = ["large", "limit", "mib", "too many", "at most"].iter().any(|word| said.contains(word));
        assert!(clear, "{verb} with {} addresses doesn't say that they are too many: {stderr}", many.len());
    }
    assert_eq!(everything(&daemon), before, "state after commands that were too large");
}

/// Bytes, huge requests and unfinished ones leave the daemon answering.
fn no_http() {
    let daemon = start();
    let before = everything(&daemon);
    let huge = "a".repeat(64 << 20);
    let (status, _) = http::request(&daemon.socket(), "POST", "/v1/prefixes", huge.as_bytes());
    assert!(status == 413 || status == 400, "64 MiB of a body were answered by {status}");
    let nested = "[".repeat(200_000);
    let (status, _) = http::request(&daemon.socket(), "POST", "/v1/prefixes", nested.as_bytes());
    assert!(status == 413 || status == 400, "200,000 open brackets were answered by {status}");
    let invalid = http::request(&daemon.socket(), "POST", "/v1/prefixes", b"{\"prefixes\":[\"\xff\xfe\"]}");
    assert!(invalid.0 == 400, "invalid UTF-8 was answered by {invalid:?}");
    for bytes in [&b"\0\0\0\0"[..], b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00"] {
        let answer = http::raw(&daemon.socket(), &[bytes, b"\r\n\r\n"].concat());
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{bytes:?} were answered by {answer:?}");
    }
    // A client that says nothing must not keep others waiting.
    let silent: Vec<_> = (0..50).map(|_| std::os::unix::net::UnixStream::connect(daemon.socket())).collect();
    assert_eq!(everything(&daemon), before, "state after bytes that are no HTTP");
    drop(silent);
}

fn configurations() {
    let namespace = Netns::new();
    let directory = scratch();
    let file = directory.path().join("anyport.toml");
    let mut wrong = Vec::new();
    for (text, parts) in CONFIGURATIONS {
        fs::write(&file, text).expect("a configuration");
        let outcome = Setup::new(&namespace, "tproxy").config(&file).run_to_end();
        let named = outcome.stderr.contains(&file.display().to_string());
        let complete = parts.iter().all(|part| outcome.stderr.contains(part));
        if outcome.status != 2 || !named || !complete {
            wrong.push(format!("{text:?}: expected status 2, the file and {parts:?}, but: {outcome}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), CONFIGURATIONS.len(), wrong.join("\n"));
    let routes = namespace.ip("route show table local proto 165");
    assert!(routes.is_empty(), "routes after starts that failed: {routes}");
}

fn options() {
    let namespace = Netns::new();
    let wrong: [&[&str]; 6] = [
        &["--workers", "0"],
        &["--workers", "many"],
        &["--interface"],
        &["--log-level", "loud"],
        &["--log-format", "xml"],
        &["--colour"],
    ];
    for arguments in wrong {
        let outcome = Setup::new(&namespace, "tproxy").args(arguments).run_to_end();
        assert!(outcome.status == 2 && outcome.stderr.contains(arguments[0]), "{arguments:?}: {outcome}");
    }
    let outcome = Setup::new(&namespace, "magic").run_to_end();
    assert!(outcome.status == 2 && outcome.stderr.contains("magic"), "--steering magic: {outcome}");
}
