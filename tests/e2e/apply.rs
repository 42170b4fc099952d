//! Rules from a file: what changes and what stays, going back by itself, and no moment without rules in between.

use std::{
    fs,
    net::{SocketAddr, UdpSocket},
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    thread::{scope, sleep},
    time::Duration,
};

use anyport_tests::{
    daemon::{Daemon, LogOnPanic},
    dial::{expect_tcp_hello, expect_tcp_refused, is_refusal, tcp, tcp_from},
    host::wait_for,
    prerequisites::scratch,
};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::{
    cases::{BACKENDS, Lab, at, on_each_back_end, trial},
    control::contains,
    rules::{services, who},
};

/// Changes of the rules while clients dial. Each takes `iptables` tens of milliseconds.
const SWAPS: usize = 1_000;
const SWAPS_BY_IPTABLES: usize = 100;
/// Clients that dial while the rules change.
const CLIENTS: usize = 3;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(on_each_back_end("apply::the applied rules are those of the file", files));
    trials.extend(on_each_back_end("apply::100,000 rules", hundred_thousand));
    trials.extend(on_each_back_end("apply::what is not confirmed goes back by itself", unconfirmed));
    trials.push(trial("apply::services come, change and go with the file", with_services));
    trials.push(trial("apply::files that make no sense change nothing", nonsense));
    trials.push(trial("apply::counters go on", counters));
    trials.push(trial("apply::counters of many rules are exact", many_counters));
    trials.push(trial("apply::sources select", sources));
    for backend in BACKENDS {
        let swaps = if backend == "tproxy" { SWAPS_BY_IPTABLES } else { SWAPS };
        let name = format!("{backend}::apply::{swaps} swaps of two services under load");
        trials.push(trial(name, move || swapped_services(backend, swaps)));
        let name = format!("{backend}::apply::{swaps} moves of prefix and port at once");
        trials.push(trial(name, move || moved_rules(backend, swaps)));
    }
    trials
}

/// A file for `apply` in a directory of its own.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(scratch())
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, text).expect("a file in a directory of the test's own");
        path
    }

    /// Applies a text, with options; returns what was printed as JSON.
    fn apply(&self, daemon: &Daemon, text: &str, options: &str) -> Value {
        let path = self.write("rules", text);
        daemon.json(&format!("apply {} {options}", path.display()))
    }
}

fn number(answer: &Value, field: &str) -> u64 {
    answer[field].as_u64().unwrap_or_else(|| panic!("{field} of {answer}"))
}

fn files(backend: &'static str) {
    let mut daemon = services(backend);
    let files = Files::new();
    daemon.ok("add-prefix 203.0.113.0/24 --service three");
    let text = "# two rules\n192.0.2.0/24 tcp 80-90 except=85 service=one\n2001:db8:0:a::/64 service=two\n";
    let plan = files.apply(&daemon, text, "--dry-run");
    assert_eq!(
        plan["difference"],
        serde_json::json!([
            "+ 192.0.2.0/24 tcp 80-90 except=85 service=one",
            "+ 2001:db8:0:a::/64 tcp 1-65535 service=two",
        ])
    );
    assert_eq!(daemon.rules().len(), 1, "a dry run changes nothing");
    let applied = files.apply(&daemon, text, "");
    assert_eq!(["added", "removed", "kept_added"].map(|it| number(&applied, it)), [2, 0, 1], "{applied}");
    for (address, port, expected) in [
        ("192.0.2.7", 80, "one"),
        ("192.0.2.7", 85, "no"),
        ("192.0.2.7", 91, "no"),
        ("2001:db8:0:a::7", 7, "two"),
        ("203.0.113.7", 7, "three"),
    ] {
        assert_eq!(who(&daemon, "tcp", address, port), expected, "{address} {port}");
    }
    let again = files.apply(&daemon, text, "");
    assert_eq!(["added", "removed", "unchanged"].map(|it| number(&again, it)), [0, 0, 2], "{again}");
    assert_eq!(again["generation"], applied["generation"]);
    // The same rule by hand, too: it stays when the file does not have it any more.
    daemon.ok("add-prefix 2001:db8:0:a::/64 --service two");
    let other = "192.0.2.0/25 service=two\n";
    let change = files.apply(&daemon, other, "");
    assert_eq!(["added", "removed", "kept_added"].map(|it| number(&change, it)), [1, 1, 2], "{change}");
    daemon.stop();
    daemon.restart();
    let origins: Vec<String> = daemon
        .json("prefixes")
        .as_array()
        .expect("rules")
        .iter()
        .map(|it| format!("{} {}", it["prefix"], it["origin"]))
        .collect();
    assert_eq!(
        origins,
        ["\"192.0.2.0/25\" \"applied\"", "\"203.0.113.0/24\" \"added\"", "\"2001:db8:0:a::/64\" \"added\""]
    );
    assert_eq!(who(&daemon, "tcp", "192.0.2.7", 80), "two");
    let pruned = files.apply(&daemon, other, "--prune");
    assert_eq!(["removed", "unchanged"].map(|it| number(&pruned, it)), [2, 1], "{pruned}");
    let notes = daemon.ok("remove-prefix 192.0.2.0/25");
    contains(&notes, &["applied from a file"]);
    assert!(daemon.rules().is_empty());
    daemon.stop();
    daemon.restart();
    assert!(daemon.rules().is_empty(), "what was removed comes back: {:?}", daemon.rules());
}

fn unconfirmed(backend: &'static str) {
    let mut daemon = services(backend);
    let files = Files::new();
    files.apply(&daemon, "192.0.2.0/24 service=one\n", "");
    let before = daemon.rules();
    let other = "192.0.2.0/24 service=two\n198.51.100.0/24 service=two\n";
    files.apply(&daemon, other, "--confirm 2s");
    assert_eq!(who(&daemon, "tcp", "192.0.2.7", 80), "two");
    let complaint = daemon.refused("add-prefix 203.0.113.0/24", 1);
    contains(&complaint, &["anyportctl confirm"]);
    wait_for("way back", Duration::from_secs(8), || match daemon.rules() {
        rules if rules == before => Ok(()),
        rules => Err(format!("{rules:?}")),
    });
    assert_eq!(who(&daemon, "tcp", "192.0.2.7", 80), "one");
    assert_eq!(who(&daemon, "tcp", "198.51.100.7", 80), "no");
    daemon.refused("confirm", 1);
    // A daemon that ends before the answer comes up with the rules before.
    files.apply(&daemon, other, "--confirm 1h");
    daemon.kill();
    daemon.restart();
    assert_eq!(daemon.rules(), before);
    files.apply(&daemon, other, "--confirm 60s");
    daemon.ok("confirm");
    daemon.stop();
    daemon.restart();
    assert_eq!(daemon.rules().len(), 2, "{:?}", daemon.rules());
    daemon.ok("add-prefix 203.0.113.0/24");
}

fn with_services() {
    let daemon = services("sk-lookup");
    let files = Files::new();
    let text = |banner: &str| {
        format!(
            "[[service]]\nname = \"edge\"\nhandler = \"discard\"\nbanner = \"{banner}\"\n\n\
             [[rule]]\nprefix = \"192.0.2.0/24\"\nservice = \"edge\"\n"
        )
    };
    files.apply(&daemon, &text("first"), "");
    assert_eq!(who(&daemon, "tcp", "192.0.2.7", 80), "first");
    let changed = files.apply(&daemon, &text("second"), "");
    assert_eq!(changed["services"], serde_json::json!(["~ edge"]));
    assert_eq!(who(&daemon, "tcp", "192.0.2.7", 80), "second");
    // Back again, and with it the previous settings.
    files.apply(&daemon, &text("third"), "--confirm 1s");
    assert_eq!(who(&daemon, "tcp", "192.0.2.7", 80), "third");
    wait_for("the service before", Duration::from_secs(6), || match who(&daemon, "tcp", "192.0.2.7", 80).as_str() {
        "second" => Ok(()),
        other => Err(other.to_owned()),
    });
    daemon.ok("add-prefix 198.51.100.0/24 --service edge");
    let other = "[[rule]]\nprefix = \"192.0.2.0/24\"\nservice = \"one\"\n";
    let path = files.write("other", other);
    let complaint = daemon.refused(&format!("apply {}", path.display()), 1);
    contains(&complaint, &["a rule stays that steers to it"]);
    daemon.ok("remove-prefix 198.51.100.0/24");
    daemon.ok(&format!("apply {}", path.display()));
    assert_eq!(who(&daemon, "tcp", "192.0.2.7", 80), "one");
    assert!(!daemon.ok("services").contains("edge"));
}

fn nonsense() {
    let daemon = services("sk-lookup");
    daemon.ok("add-prefix 192.0.2.0/24 --ports 80 --service one");
    let files = Files::new();
    let before = daemon.rules();
    for (text, status, wanted) in [
        ("192.0.2.1/24\n", 2, "line 1"),
        ("\n\n192.0.2.0/24 sctp\n", 2, "line 3"),
        ("192.0.2.0/24 service=absent\n", 1, "line 1: there is no service absent"),
        ("192.0.2.0/24 81 service=one\n192.0.2.0/24 81 service=two\n", 1, "line 2"),
        ("192.0.2.0/24 80 service=two\n", 1, "contradicts"),
        ("127.0.0.0/8\n", 5, "--force"),
        ("[[rule]]\nprefix = \"192.0.2.0/24\"\nport = \"80\"\n", 2, "port"),
        ("[daemon]\nworkers = 1\n", 2, "daemon"),
        ("[[service]]\nname = \"one\"\nhandler = \"echo\"\n", 1, "added by hand with other settings"),
        ("\u{0}\u{1}\n", 2, "line 1"),
    ] {
        let path = files.write("rules", text);
        let complaint = daemon.refused(&format!("apply {}", path.display()), status);
        contains(&complaint, &[wanted]);
        assert_eq!(daemon.rules(), before, "{text:?}");
    }
    let (binary, odd) = (files.0.path().join("binary"), files.0.path().join("odd"));
    fs::write(&binary, [b'a', 0xff]).expect("a file");
    fs::write(&odd, [0xff, 0xfe, 0x00]).expect("a file");
    for (arguments, wanted) in [
        (format!("apply {}", binary.display()), "line 1: it is no text in UTF-8"),
        (format!("apply {}", odd.display()), "UTF-16"),
        (format!("apply {}/absent", files.0.path().display()), "No such file"),
        ("apply".to_owned(), "FILE"),
        (format!("apply {} --confirm soon", binary.display()), "--confirm"),
        (format!("apply {} --confirm 0s", files.write("empty", "").display()), "from 1 to 86400 seconds"),
        (format!("apply {} --confirm 30days", files.write("empty", "").display()), "from 1 to 86400 seconds"),
    ] {
        let complaint = daemon.refused(&arguments, 2);
        contains(&complaint, &[wanted]);
    }
    assert_eq!(daemon.rules(), before);
}

/// Of the rules that stay, over changes of others of the same prefix, and over a restart.
fn counters() {
    let mut daemon = services("sk-lookup");
    let files = Files::new();
    files.apply(&daemon, "192.0.2.0/24 80 service=one\n", "");
    let count = |daemon: &Daemon| daemon.count("192.0.2.0/24", "steered");
    for _ in 0..3 {
        who(&daemon, "tcp", "192.0.2.7", 80);
    }
    assert_eq!(count(&daemon), 3);
    files.apply(
        &daemon,
        "192.0.2.0/24 80 service=one\n192.0.2.0/24 443,444 service=two\n192.0.2.0/25 service=two\n",
        "",
    );
    assert_eq!(count(&daemon), 3);
    who(&daemon, "tcp", "192.0.2.200", 80);
    assert_eq!(count(&daemon), 4);
    daemon.stop();
    daemon.restart();
    assert_eq!(count(&daemon), 4, "after a restart");
    who(&daemon, "tcp", "192.0.2.200", 80);
    assert_eq!(count(&daemon), 5);
    let unmatched = || number(&daemon.json("status")["totals"], "unmatched");
    let before = unmatched();
    daemon.namespace().enter(|| expect_tcp_refused(at("127.0.0.1", 9)));
    assert_eq!(unmatched(), before + 1);
}

/// The first and the last of many decide, and they go as they came.
fn hundred_thousand(backend: &'static str) {
    const RULES: u32 = 100_000;
    let lab = Lab::new(backend);
    let files = Files::new();
    let address = |host: u32| format!("2001:db8:0:a::{:x}:{:x}", host >> 16, host & 0xffff);
    let all = (0..RULES).map(|host| address(host) + "\n").collect::<Vec<_>>().concat();
    files.apply(&lab.daemon, &all, "");
    let [first, last, none] = [0, RULES - 1, RULES].map(|host| at(&address(host), 80));
    for client in ["remote", "local"] {
        lab.at(client).enter(|| {
            expect_tcp_hello(first);
            expect_tcp_hello(last);
        });
    }
    assert_eq!(lab.daemon.json("status")["rules"], RULES);
    lab.topology.client.enter(|| expect_tcp_refused(none));
    files.apply(&lab.daemon, "", "--force");
    lab.topology.client.enter(|| expect_tcp_refused(last));
}

/// Of so many rules that packets are noted before they are counted: while others come and go, under other numbers, over
/// restarts, and of those that were kept when the daemon is killed.
fn many_counters() {
    const RULES: usize = 200;
    let mut daemon = services("sk-lookup");
    let files = Files::new();
    let apply = |daemon: &Daemon, others: &str| {
        let rules = (0..RULES).fold(String::new(), |all, host| format!("{all}192.0.2.{host} udp 80 service=one\n"));
        files.apply(daemon, &format!("{rules}{others}"), "");
    };
    let mut expected = vec![0; RULES];
    let socket = daemon.namespace().enter(|| UdpSocket::bind("127.0.0.1:0")).expect("a UDP socket");
    // Datagrams, of which each is looked up once: a packet of TCP that comes late is looked up again.
    let mut send = |datagrams: usize| -> Vec<u64> {
        for datagram in 0..datagrams {
            let host = datagram * datagram % RULES;
            socket.send_to(b"counted", format!("192.0.2.{host}:80")).expect("sending");
            expected[host] += 1;
        }
        expected.clone()
    };
    let counted = |daemon: &Daemon| -> Vec<u64> {
        let rules = daemon.json("prefixes --port 80");
        let of = |host: usize| {
            let prefix = Value::from(format!("192.0.2.{host}/32"));
            let rule = rules.as_array().expect("rules").iter().find(|rule| rule["prefix"] == prefix);
            number(rule.expect("the rule"), "steered")
        };
        (0..RULES).map(of).collect()
    };
    // What was sent may be on its way.
    let expect = |daemon: &Daemon, expected: &[u64], when: &str| {
        wait_for(when, Duration::from_secs(5), || {
            let counted = counted(daemon);
            if counted == expected { Ok(()) } else { Err(format!("{counted:?} instead of {expected:?}")) }
        });
    };
    apply(&daemon, "");
    for datagrams in [1, 59, 60, 1, 250] {
        expect(&daemon, &send(datagrams), "exact counts");
    }
    // Another rule for a prefix gives all of its rules other numbers.
    apply(&daemon, "192.0.2.0 443 service=two\n192.0.2.1 443 service=two\n198.51.100.0/24 service=two\n");
    let expected = send(77);
    expect(&daemon, &expected, "exact counts with other rules beside");
    apply(&daemon, "");
    assert_eq!(counted(&daemon), expected, "without them");
    daemon.stop();
    daemon.restart();
    assert_eq!(counted(&daemon), expected, "after a restart");
    let kept = expected;
    expect(&daemon, &send(33), "exact counts after a restart");
    daemon.kill();
    daemon.restart();
    assert_eq!(counted(&daemon), kept, "after it was killed, as it was kept");
}

fn sources() {
    for backend in BACKENDS {
        let daemon = services(backend);
        daemon.ok("add-prefix 192.0.2.0/24 --service one");
        daemon.ok("add-prefix 192.0.2.0/24 --service two --source 127.0.0.0/24");
        daemon.ok("add-prefix 192.0.2.0/24 --service three --source 127.0.0.7");
        for (client, expected) in [("127.0.1.1", "one"), ("127.0.0.8", "two"), ("127.0.0.7", "three")] {
            let stream = daemon.namespace().enter(|| tcp_from(at(client, 0), at("192.0.2.9", 80)));
            let mut stream = stream.unwrap_or_else(|error| panic!("{backend}: {client}: {error}"));
            let mut banner = [0; 16];
            let length = std::io::Read::read(&mut stream, &mut banner).expect("a banner");
            assert_eq!(&banner[..length], expected.as_bytes(), "{backend}: from {client}");
        }
        let complaint = daemon.refused("add-prefix 192.0.2.0/25 --source 2001:db8::/32", 2);
        contains(&complaint, &["same IP version"]);
    }
}

/// Swaps two files again and again while `dial` is called by several clients, which says what is wrong.
fn swap(daemon: &Daemon, files: [&str; 2], swaps: usize, dial: impl Fn(usize) -> Result<(), String> + Sync) {
    let _log = LogOnPanic(daemon);
    let scratch = Files::new();
    let files = [scratch.write("a", files[0]), scratch.write("b", files[1])].map(|it| it.display().to_string());
    daemon.ok(&format!("apply {}", files[0]));
    let is_done = AtomicBool::new(false);
    let dials = AtomicUsize::new(0);
    let wrong = scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                scope.spawn(|| {
                    daemon.namespace().enter(|| {
                        while !is_done.load(Relaxed) {
                            dial(dials.fetch_add(1, Relaxed))?;
                            // Ports for clients are not without end.
                            sleep(Duration::from_millis(1));
                        }
                        Ok::<(), String>(())
                    })
                })
            })
            .collect();
        for round in 1..=swaps {
            daemon.ok(&format!("apply {}", files[round % 2]));
        }
        is_done.store(true, Relaxed);
        clients.into_iter().find_map(|it| it.join().expect("a client that does not panic").err())
    });
    let dials = dials.into_inner();
    assert!(wrong.is_none(), "{} (of {dials} dials)", wrong.unwrap_or_default());
    assert!(dials >= swaps, "only {dials} dials during {swaps} swaps");
}

/// Each connection is answered by one of the two, none is refused.
fn swapped_services(backend: &str, swaps: usize) {
    let daemon = services(backend);
    let dial = |number: usize| {
        let to = at(&format!("192.0.2.{}", 1 + number % 250), 80);
        let mut stream = tcp(to).map_err(|error| format!("dial {number}: {error}"))?;
        let mut banner = [0; 16];
        let length =
            std::io::Read::read(&mut stream, &mut banner).map_err(|error| format!("dial {number}: {error}"))?;
        match &banner[..length] {
            b"one" | b"two" => Ok(()),
            other => Err(format!("dial {number} was answered {:?}", String::from_utf8_lossy(other))),
        }
    };
    swap(&daemon, ["192.0.2.0/24 service=one\n", "192.0.2.0/24 service=two\n"], swaps, dial);
}

/// The old prefix with the new port, and the new prefix with the old port, are never answered.
fn moved_rules(backend: &str, swaps: usize) {
    let daemon = services(backend);
    daemon.namespace().ip("route add local 192.0.2.0/24 dev lo");
    let mixtures: [SocketAddr; 2] = [at("192.0.2.7", 81), at("192.0.2.207", 80)];
    let dial = |number: usize| match tcp(mixtures[number % 2]) {
        Err(error) if is_refusal(&error) => Ok(()),
        Err(error) => Err(format!("dial {number}: {error}")),
        Ok(_) => Err(format!("dial {number} of {} was answered", mixtures[number % 2])),
    };
    let files = ["192.0.2.0/25 80 service=one route=no\n", "192.0.2.128/25 81 service=two route=no\n"];
    swap(&daemon, files, swaps, dial);
}
