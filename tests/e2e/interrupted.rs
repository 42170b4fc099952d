//! Clients that go away in the middle of a request, and clients that never finish one.

use std::{
    collections::BTreeSet,
    fs,
    io::Write as _,
    net::{Ipv4Addr, Ipv6Addr},
    os::unix::net::UnixStream,
    thread::sleep,
    time::Duration,
};

use anyport_tests::{
    daemon::Daemon,
    dial::{expect_tcp_hello, is_refusal, tcp_text},
    host::wait_for,
    http,
    netns::Netns,
    random::Random,
};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::{
    cases::{at, on_each_back_end},
    crash::{assert_no_pins, assert_same, snapshot},
};

/// How many requests are left alone.
const ROUNDS: usize = 80;
/// How many requests there are to choose from; each is about one prefix of either family.
const GROUPS: usize = 8;
/// How long a daemon may take to end, whatever its clients do.
const END: Duration = Duration::from_secs(5);

/// The beginnings of requests that never go on.
const HALVES: [(&str, &[u8]); 3] = [
    ("half a header", b"POST /v1/pre"),
    (
        "a header without its body",
        b"POST /v1/prefixes HTTP/1.1\r\nHost: anyport\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n",
    ),
    ("nothing at all", b""),
];

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(on_each_back_end("interrupted::a client that goes away leaves all or nothing", all_or_nothing));
    trials.extend(on_each_back_end("interrupted::a half request keeps nobody from stopping", half_requests));
    trials
}

/// The prefixes of a group. None adjoin, so that each has a route of its own.
fn prefixes(group: usize) -> [String; 2] {
    [format!("192.0.2.{}/29", group * 16), format!("2001:db8:0:{:x}::/64", group * 2 + 10)]
}

/// Adds and removes prefixes through connections that are closed before the answer can come, at any moment of the
/// daemon's work. Whatever it makes of that, everybody has to tell the same story afterwards.
fn all_or_nothing(backend: &'static str) {
    let daemon = Daemon::start(&Netns::new(), backend);
    let mut random = Random::new(&format!("{backend} all or nothing"));
    // iptables takes its time.
    let longest = if backend == "tproxy" { 60_000 } else { 8_000 };
    let mut present = BTreeSet::new();
    for round in 0..ROUNDS {
        let group = random.below(GROUPS);
        let method = if present.contains(&group) { "DELETE" } else { "POST" };
        let pause = Duration::from_micros(u64::try_from(random.below(longest)).expect("a short time"));
        let body = json!({ "prefixes": prefixes(group) }).to_string();
        let mut stream = UnixStream::connect(daemon.socket()).expect("a connection to the control socket");
        stream.write_all(&http::bytes(method, "/v1/prefixes", body.as_bytes())).expect("sending a request");
        sleep(pause);
        drop(stream);
        // Waits for the command, where what only shows does not.
        daemon.ok("explain tcp 192.0.2.1:1234");

        let what = format!(
            "agreement in round {round}, after a {method} of {} whose client went away after {pause:?},",
            prefixes(group).join(" and "),
        );
        let seen = wait_for(&what, Duration::from_secs(4), || agreement(backend, &daemon));
        let known = |group: usize| prefixes(group).iter().filter(|&prefix| seen.contains(prefix)).count();
        assert!(known(group) != 1, "{what} one of the two prefixes was left: {seen:?}");
        let others: BTreeSet<usize> = (0..GROUPS).filter(|&other| other != group && known(other) == 2).collect();
        present.remove(&group);
        assert_eq!(others, present, "{what} others changed as well: {seen:?}");
        if known(group) == 2 {
            present.insert(group);
        }
    }
    // None of that keeps a patient client from being served.
    for group in 0..GROUPS {
        daemon.ok(&format!("add-prefix {}", prefixes(group).join(" ")));
    }
    let seen = wait_for("agreement at the end", Duration::from_secs(4), || agreement(backend, &daemon));
    assert!(seen.len() == 2 * GROUPS, "rules at the end: {seen:?}");
}

/// The prefixes that are steered, if all that could tell agree: the API, the kernel's routes and rules, the state
/// file, and who dials.
fn agreement(backend: &str, daemon: &Daemon) -> Result<BTreeSet<String>, String> {
    let before = witnesses(backend, daemon);
    let (_, first) = &before[0];
    if before.iter().any(|(_, prefixes)| prefixes != first) {
        return Err(format!("the witnesses disagree: {before:#?}"));
    }
    for prefix in (0..GROUPS).flat_map(prefixes) {
        let (address, _) = prefix.split_once('/').expect("ADDR/LEN");
        let to = at(address, 1_234);
        let answer = daemon.namespace().enter(|| tcp_text(to));
        let fits = match &answer {
            Ok(_) => first.contains(&prefix),
            Err(error) => !first.contains(&prefix) && is_refusal(error),
        };
        if !fits {
            return Err(format!("{to} answers {answer:?}, while the rules are those of {first:?}"));
        }
    }
    let after = witnesses(backend, daemon);
    if after == before { Ok(first.clone()) } else { Err(format!("still changing, from {before:#?}\nto {after:#?}")) }
}

/// The prefixes as each of them knows them.
fn witnesses(backend: &str, daemon: &Daemon) -> [(&'static str, BTreeSet<String>); 4] {
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let of = |rules: &Value| rules.as_array().expect("rules").iter().map(|rule| text(&rule["prefix"])).collect();
    let kept = fs::read_to_string(daemon.state().join("state.json")).unwrap_or_else(|_| r#"{"rules":[]}"#.to_owned());
    let kept: Value = serde_json::from_str(&kept).expect("a state file that is never half written");
    let rules = if backend == "tproxy" { chain(daemon) } else { map(daemon) };
    [
        ("anyportctl prefixes", of(&daemon.json("prefixes"))),
        ("the local routes", routes(daemon)),
        ("the rules in the kernel", rules),
        ("the state file", of(&kept["rules"])),
    ]
}

fn routes(daemon: &Daemon) -> BTreeSet<String> {
    let show = |family| daemon.namespace().ip(&format!("{family} route show table local proto 165"));
    let all = ["-4", "-6"].map(show).concat();
    all.lines().filter_map(|line| Some(line.split_whitespace().nth(1)?.to_owned())).collect()
}

/// What the back ends that use BPF have in their map for readers.
fn map(daemon: &Daemon) -> BTreeSet<String> {
    let prefix = |rule: &Value| {
        let byte = |value: &Value| value.as_u64().and_then(|byte| u8::try_from(byte).ok()).expect("a byte");
        let bytes: Vec<u8> = rule["prefix"].as_array().expect("bytes").iter().map(byte).collect();
        let bytes: [u8; 16] = bytes.try_into().expect("16 bytes");
        let address = if rule["ip_version"] == 4 {
            Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).to_string()
        } else {
            Ipv6Addr::from(bytes).to_string()
        };
        format!("{address}/{}", rule["prefix_len"])
    };
    daemon.map("rules").iter().map(prefix).collect()
}

/// What tproxy has in its chain.
fn chain(daemon: &Daemon) -> BTreeSet<String> {
    let save = |program| daemon.namespace().run(program, ["-t", "mangle"]);
    let all = ["iptables-save", "ip6tables-save"].map(save).concat();
    let prefix = |line: &str| Some(line.strip_prefix("-A ANYPORT-RULES -d ")?.split(' ').next()?.to_owned());
    all.lines().filter_map(prefix).collect()
}

/// SIGTERM ends the daemon in time and without a trace while a client has a request open.
fn half_requests(backend: &'static str) {
    let namespace = Netns::new();
    let mut daemon = Daemon::start(&namespace, backend);
    daemon.stop();
    let before = snapshot(&namespace);
    let mut wrong = Vec::new();
    for (what, bytes) in HALVES {
        daemon.restart();
        let mut streams: Vec<UnixStream> =
            (0..3).map(|_| UnixStream::connect(daemon.socket()).expect("a connection")).collect();
        for stream in &mut streams {
            stream.write_all(bytes).expect("sending half a request");
        }
        daemon.ok("add-prefix 192.0.2.0/24 2001:db8:0:a::/64");
        namespace.enter(|| expect_tcp_hello(at("192.0.2.3", 3)));
        let status = daemon.terminate(END);
        let left = ["-4", "-6"].map(|family| namespace.ip(&format!("{family} route show table local proto 165")));
        if status != 0 || !left.concat().is_empty() {
            wrong.push(format!("clients that had sent {what}: exit status {status}, routes left: {left:?}"));
        }
        drop(streams);
    }
    assert!(wrong.is_empty(), "SIGTERM with\n{}\nthe daemon's log:\n{}", wrong.join("\n"), daemon.log());
    assert_same(&namespace, &before);
    assert_no_pins(&daemon);
}
