//! SIGKILL at any moment, a second daemon, and what is left behind: nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    process::Command,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    thread::{scope, sleep},
    time::Duration,
};

use anyport_tests::{
    daemon::{Daemon, Setup, kill_all},
    dial::{expect_tcp_hello, expect_tcp_refused},
    host::wait_for,
    netns::Netns,
    prerequisites::{BPFFS, scratch},
    random::Random,
};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};

use crate::cases::{BACKENDS, Lab, alone, at, on_each_back_end, trial};

/// How often a daemon is killed.
const KILLS: usize = 50;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(on_each_back_end("crash::nothing is left after SIGTERM", traceless));
    trials.extend(on_each_back_end("crash::SIGKILL during changes, then a start that converges", kills));
    trials.extend(on_each_back_end("crash::a second daemon is refused", second));
    trials.push(alone("crash::what was acknowledged is there, however often the server is killed", acknowledged));
    trials.push(trial("crash::another back end takes over after SIGKILL", || {
        takeover(&["sk-lookup", "tproxy", "sk-lookup", "tproxy", "sk-lookup"]);
    }));
    trials.push(trial("crash::another back end, tc too, takes over after SIGKILL", || {
        takeover(&["sk-lookup", "tc", "tproxy", "sk-lookup", "tproxy", "tc", "sk-lookup"]);
    }));
    trials
}

/// What the host holds: routes, rules, chains, hooks, interfaces and pins, but no counters.
pub(crate) fn snapshot(namespace: &Netns) -> BTreeMap<String, String> {
    let mut lines: Vec<String> = [
        "ip -4 route show table all",
        "ip -6 route show table all",
        "ip -4 rule",
        "ip -6 rule",
        "ip -o link",
        "nft --stateless list ruleset",
        "bpftool net",
        "ipset list",
    ]
    .map(str::to_owned)
    .to_vec();
    for interface in namespace.run("ls", ["/proc/sys/net/ipv4/conf"]).split_whitespace() {
        if !["all", "default"].contains(&interface) {
            lines.push(format!("tc qdisc show dev {interface}"));
            lines.push(format!("tc filter show dev {interface} ingress"));
        }
    }
    for flavour in ["nft", "legacy"] {
        for family in ["iptables", "ip6tables"] {
            // Without comments and counters, and without tables in which there is nothing: legacy tables stay.
            let save = format!("xtables-{flavour}-multi {family}-save");
            lines.push(format!("{save} | grep -v '^[#*:]' | grep -v '^COMMIT$' || true"));
        }
    }
    lines
        .into_iter()
        .map(|line| {
            let outcome = namespace.output(Command::new("sh").args(["-c", &line]));
            assert!(outcome.status == 0, "{line}: {outcome}");
            (line, outcome.stdout)
        })
        .collect()
}

/// Asserts that `namespace` holds what it held `before`. The kernel frees some of it a little later.
pub(crate) fn assert_same(namespace: &Netns, before: &BTreeMap<String, String>) {
    wait_for("return to the state before", Duration::from_secs(5), || {
        let after = snapshot(namespace);
        match before.iter().find(|(line, text)| after.get(*line) != Some(*text)) {
            None => Ok(()),
            Some((line, text)) => Err(format!("`{line}`, before:\n{text}\nafter:\n{}", after[line])),
        }
    });
}

/// Numbers of the maps, programs and links that the daemon holds, by its descriptors.
fn kernel_objects(daemon: &Daemon) -> BTreeSet<(&'static str, String)> {
    let directory = format!("/proc/{}/fdinfo", daemon.pid());
    let mut objects = BTreeSet::new();
    for file in fs::read_dir(&directory).expect("the daemon's descriptors") {
        // One that is closed in between has no text.
        let text = fs::read_to_string(file.expect("a descriptor").path()).unwrap_or_default();
        for (key, kind) in [("map_id:", "map"), ("prog_id:", "prog"), ("link_id:", "link")] {
            let ids = text.lines().filter_map(|line| line.strip_prefix(key));
            objects.extend(ids.map(|id| (kind, id.trim().to_owned())));
        }
    }
    objects
}

/// Asserts that the kernel has freed all of `objects`.
fn assert_freed(objects: &BTreeSet<(&'static str, String)>) {
    wait_for("end of the daemon's BPF objects", Duration::from_secs(5), || {
        let alive = |kind: &str, id: &str| {
            let line = format!("bpftool {kind} show id {id}");
            let shown = anyport_tests::host::Outcome::of(Command::new("sh").args(["-c", &line]));
            (shown.status == 0).then_some(shown.stdout)
        };
        match objects.iter().find_map(|(kind, id)| alive(kind, id)) {
            None => Ok(()),
            Some(object) => Err(object),
        }
    });
}

pub(crate) fn assert_no_pins(daemon: &Daemon) {
    let left: Vec<_> =
        fs::read_dir(daemon.bpffs()).map(|all| all.flatten().map(|pin| pin.path()).collect()).unwrap_or_default();
    assert!(left.is_empty(), "pins that are left: {left:?}");
}

/// The host after an orderly end is the host before the start.
fn traceless(backend: &'static str) {
    let topology = anyport_tests::topology::Topology::new();
    // What belongs to others stays: a route for anyport's own kind of prefix, and rules in its table.
    topology.host.ip("route add local 203.0.113.128/25 dev lo");
    topology.host.run("iptables", ["-t", "mangle", "-A", "PREROUTING", "-p", "icmp", "-j", "MARK", "--set-mark", "7"]);
    topology.host.run("ip6tables", ["-t", "mangle", "-A", "PREROUTING", "-p", "icmpv6", "-j", "ACCEPT"]);
    let before = snapshot(&topology.host);
    let mut daemon = Daemon::start(&topology.host, backend);
    daemon.ok("add-prefix 192.0.2.0/24 203.0.113.128/25 2001:db8:0:a::/64 --protocol both --except 22");
    topology.client.enter(|| expect_tcp_hello(at("192.0.2.3", 3)));
    assert!(snapshot(&topology.host) != before, "the snapshot sees nothing of a working daemon");
    let objects = kernel_objects(&daemon);
    assert!(backend == "tproxy" || objects.len() > 3, "BPF objects of the daemon: {objects:?}");
    daemon.stop();
    assert_same(&topology.host, &before);
    assert_no_pins(&daemon);
    assert_freed(&objects);
    assert!(!daemon.socket().exists(), "the control socket is left");
}

/// The prefixes that come and go.
fn prefix(number: usize) -> String {
    if number.is_multiple_of(2) { format!("192.0.2.{}/29", number * 8) } else { format!("2001:db8:0:{number:x}::/64") }
}

/// Kills the daemon in the middle of changes again and again; each start holds what was acknowledged before.
fn kills(backend: &'static str) {
    let mut lab = Lab::new(backend);
    let mut random = Random::new(backend);
    lab.daemon.stop();
    let before = snapshot(&lab.topology.host);
    lab.daemon.restart();
    let mut present: BTreeSet<usize> = BTreeSet::new();
    for round in 0..KILLS {
        let pause = Duration::from_micros(u64::try_from(random.below(60_000)).expect("a short time"));
        let keeper = lab.daemon.keeper();
        // The change that was under way when the daemon died may have happened or not.
        let unsure = scope(|scope| {
            let killer = scope.spawn(move || {
                sleep(pause);
                kill_all(keeper);
            });
            let unsure = loop {
                let number = random.below(16);
                let verb = if present.contains(&number) { "remove-prefix" } else { "add-prefix" };
                let outcome = lab.daemon.ctl(&[verb, &prefix(number)]);
                match outcome.status {
                    0 if verb == "add-prefix" => assert!(present.insert(number)),
                    0 => assert!(present.remove(&number)),
                    // No daemon, or one that was killed before it could answer.
                    1 | 3 => break number,
                    _ => panic!("round {round}: {verb} {}: {outcome}", prefix(number)),
                }
            };
            killer.join().expect("the killing thread");
            unsure
        });
        lab.daemon.kill();
        lab.daemon.restart();
        let rules = lab.daemon.json("prefixes");
        let seen: BTreeSet<String> = rules
            .as_array()
            .expect("rules")
            .iter()
            .map(|rule| rule["prefix"].as_str().expect("a text").to_owned())
            .collect();
        if seen.contains(&prefix(unsure)) {
            present.insert(unsure)
        } else {
            present.remove(&unsure)
        };
        let expected: BTreeSet<String> = present.iter().map(|&number| prefix(number)).collect();
        assert_eq!(seen, expected, "round {round}: rules after the restart; under way was {}", prefix(unsure));
        converged(&lab, &expected, round);
    }
    lab.daemon.stop();
    assert_same(&lab.topology.host, &before);
    assert_no_pins(&lab.daemon);
}

/// Routes, what an administrator reads and what a client gets agree with the rules.
fn converged(lab: &Lab, expected: &BTreeSet<String>, round: usize) {
    let routes =
        ["-4", "-6"].map(|family| lab.topology.host.ip(&format!("{family} route show table local proto 165"))).concat();
    let routes: BTreeSet<String> =
        routes.lines().filter_map(|line| Some(line.split_whitespace().nth(1)?.to_owned())).collect();
    assert_eq!(&routes, expected, "round {round}: local routes of anyport's own");
    if lab.daemon.bpffs().join("rules").exists() {
        let entries = lab.daemon.map("rules");
        assert_eq!(entries.len(), expected.len(), "round {round}: rules map: {entries:?}");
    }
    for prefix in expected.iter().take(3) {
        let address = prefix.split('/').next().expect("an address");
        for client in ["remote", "local"] {
            lab.at(client).enter(|| expect_tcp_hello(at(address, 1_234)));
        }
    }
    let gone = (0..16).map(prefix).find(|prefix| !expected.contains(prefix));
    if let Some(prefix) = gone {
        let address = prefix.split('/').next().expect("an address").to_owned();
        lab.topology.host.enter(|| expect_tcp_refused(at(&address, 1_234)));
    }
}

/// Eight clients change rules while the server is killed again and again: what was acknowledged is there in the end, after a restart,
/// too. `ANYPORT_CHANGES` makes as many changes as it says, for releases.
fn acknowledged() {
    const CLIENTS: usize = 8;
    /// A kill for so many changes.
    const CHANGES_PER_KILL: usize = 190;
    let changes = std::env::var("ANYPORT_CHANGES").map_or(800, |text| text.parse().expect("a number of changes"));
    let mut daemon = Daemon::start(&Netns::new(), "sk-lookup");
    let prefix = |number: usize| format!("198.18.{}.{}/32", number / 256, number % 256);
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let (kills, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let there: Vec<String> = scope(|scope| {
        let clients: Vec<_> =
            (0..CLIENTS).map(|_| scope.spawn(|| change(&daemon, changes, &next, &done, &refused, prefix))).collect();
        scope.spawn(|| {
            while done.load(Relaxed) < changes {
                if done.load(Relaxed) / CHANGES_PER_KILL >= kills.load(Relaxed) {
                    kill(daemon.pid(), Signal::SIGKILL).expect("a server to kill");
                    kills.fetch_add(1, Relaxed);
                    // Who is killed more often than that serves nobody in between.
                    sleep(Duration::from_millis(500));
                }
                sleep(Duration::from_millis(5));
            }
        });
        clients.into_iter().flat_map(|client| client.join().expect("a client")).collect()
    });
    let what = format!("{} acknowledged, {refused:?} refused, {kills:?} kills", there.len());
    assert!(there.len() * 10 > changes * 9 && kills.load(Relaxed) >= changes / CHANGES_PER_KILL, "{what}");
    let expect = |daemon: &Daemon| {
        let names: BTreeSet<String> = daemon.ok("prefixes -o name").lines().map(str::to_owned).collect();
        let missing: Vec<&String> = there.iter().filter(|prefix| !names.contains(*prefix)).collect();
        assert!(missing.is_empty(), "acknowledged and not there: {missing:?}");
    };
    expect(&daemon);
    daemon.stop();
    daemon.restart();
    expect(&daemon);
}

/// What a client has added, and was told so.
fn change(
    daemon: &Daemon,
    changes: usize,
    next: &AtomicUsize,
    done: &AtomicUsize,
    refused: &AtomicUsize,
    prefix: impl Fn(usize) -> String,
) -> Vec<String> {
    let mut there = Vec::new();
    loop {
        let number = next.fetch_add(1, Relaxed);
        if number >= changes {
            return there;
        }
        let outcome = daemon.ctl(&["add-prefix", &prefix(number), "--no-route"]);
        if outcome.status == 0 {
            there.push(prefix(number));
        } else {
            refused.fetch_add(1, Relaxed);
        }
        done.fetch_add(1, Relaxed);
    }
}

/// A second daemon of the same network namespace ends with a message that names the first, which goes on.
fn second(backend: &'static str) {
    let namespace = Netns::new();
    let mut first = Daemon::start(&namespace, backend);
    first.ok("add-prefix 192.0.2.0/24");
    let own = scratch();
    let [state, pins] = ["state", "pins"].map(|name| own.path().join(name));
    for other in BACKENDS {
        for (what, setup) in [
            (
                "other directories",
                Setup::new(&namespace, other).args(["--state-dir".into(), state.clone()]).bpffs(&pins),
            ),
            ("the same bpffs", Setup::new(&namespace, other).bpffs(first.bpffs())),
            ("the same state", Setup::new(&namespace, other).args(["--state-dir".into(), first.state()])),
        ] {
            let outcome = setup.run_to_end();
            let named = outcome.stderr.contains(&first.pid().to_string());
            assert!(outcome.status == 1 && named, "a second daemon with {other} and {what}: {outcome}");
            namespace.enter(|| expect_tcp_hello(at("192.0.2.3", 3)));
        }
    }
    assert!(!state.exists() && !pins.exists(), "a daemon that was refused leaves its directories");
    assert!(first.rules().len() == 1, "rules of the first daemon: {:?}", first.rules());
    // Another namespace is another host.
    let elsewhere = Daemon::start(&Netns::new(), backend);
    elsewhere.ok("add-prefix 192.0.2.0/24");
    elsewhere.namespace().enter(|| expect_tcp_hello(at("192.0.2.3", 3)));
    first.kill();
    Daemon::start(&namespace, "tproxy").ok("status");
}

/// What one back end left in the kernel goes when the next start uses another one.
fn takeover(order: &[&str]) {
    let mut lab = Lab::new("sk-lookup");
    lab.daemon.stop();
    let before = snapshot(&lab.topology.host);
    let mut objects = BTreeSet::new();
    for (round, &backend) in order.iter().enumerate() {
        lab.daemon.set_steering(backend);
        lab.daemon.restart();
        assert_freed(&objects);
        if round == 0 {
            lab.daemon.ok("add-prefix 192.0.2.0/24 2001:db8:0:a::/64 --protocol both");
        }
        for client in ["remote", "local"] {
            lab.at(client).enter(|| expect_tcp_hello(at("192.0.2.3", 3)));
        }
        assert_eq!(lab.daemon.json("status")["backend"], backend, "back end in force");
        let chain = lab.topology.host.run("iptables-save", ["-t", "mangle"]);
        assert!(chain.contains("ANYPORT") == (backend == "tproxy"), "with {backend}, the mangle table is:\n{chain}");
        objects = kernel_objects(&lab.daemon);
        lab.daemon.kill();
    }
    lab.daemon.set_steering("tproxy");
    lab.daemon.restart();
    lab.daemon.stop();
    assert_same(&lab.topology.host, &before);
    assert_no_pins(&lab.daemon);
    assert!(std::path::Path::new(BPFFS).is_dir(), "the bpffs itself stays");
}
