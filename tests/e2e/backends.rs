//! Choosing a back end, what each needs, and what an administrator sees of it.

use std::{
    fs::{self, File},
    io::ErrorKind,
    net::{TcpStream, UdpSocket},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyport_tests::{
    daemon::{Daemon, Setup},
    dial::{expect_tcp_hello, expect_tcp_refused, expect_udp_hello, expect_udp_unanswered, tcp_server},
    host::{Outcome, wait_for},
    netns::Netns,
    prerequisites::{path_with, program, public_copy, scratch, xtables},
    topology::Topology,
};
use aya::{Ebpf, programs::SkLookup};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use crate::cases::{Family, Lab, at, on_each_back_end, trial};

/// Takes what BPF needs from a process that root starts.
const WITHOUT_BPF: [&str; 4] =
    ["setpriv", "--bounding-set=-bpf,-sys_admin,-perfmon", "--inh-caps=-bpf,-sys_admin,-perfmon", "--"];

/// The first series of kernels that the `tc` back end works on.
const TC_SINCE: [u32; 2] = [6, 6];

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("backends::auto takes sk-lookup", auto),
        trial("backends::auto tries nothing behind its choice", auto_tries_no_more),
        trial("backends::auto without CAP_BPF takes tproxy", without_bpf),
        trial("backends::auto takes tc where sk_lookup programs are at their limit", sk_lookup_full),
        trial("backends::what was refused is not tried at each restart", remembered),
        trial("backends::tproxy's refusals reach no listener of the host", refusals_past_listeners),
        trial("backends::a chosen back end that can't work", chosen_but_unusable),
        trial("backends::a bpffs is mounted where there is none", mounts_bpffs),
        trial("tc::backends::interfaces that appear later", later_interfaces),
        trial("tc::backends::--interface", one_interface),
    ];
    for flavour in ["nft", "legacy"] {
        trials.push(trial(format!("tproxy::backends::iptables of the {flavour} flavour"), move || tproxy(flavour)));
    }
    if kernel() < TC_SINCE {
        trials.push(trial("backends::tc is refused where the kernel is too old for it", too_old_for_tc));
    }
    trials.push(trial("tproxy::backends::many prefixes, with ipset and without", many));
    for backend in ["sk-lookup", "tc"] {
        trials.push(trial(format!("{backend}::backends::bpftool shows the rules"), move || shown_by_bpftool(backend)));
        trials.push(trial(format!("{backend}::backends::programs log on request"), move || programs_log(backend)));
    }
    trials.extend(on_each_back_end("backends::rp_filter and src_valid_mark", reverse_path));
    trials.extend(on_each_back_end("backends::a local route of someone else's", foreign_route));
    trials
}

/// The series of the kernel that runs.
fn kernel() -> [u32; 2] {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel's release");
    let mut numbers = release.split(|it: char| !it.is_ascii_digit()).map(|number| number.parse().expect("a number"));
    [(); 2].map(|()| numbers.next().expect("two numbers"))
}

/// The reason names what the kernel would have to be, by choice and by `auto`.
fn too_old_for_tc() {
    let outcome = Setup::new(&Netns::new(), "tc").run_to_end();
    assert!(outcome.status == 1 && outcome.stderr.contains("6.6"), "--steering tc: {outcome}");
    let daemon = Daemon::start(&Netns::new(), "auto");
    assert_eq!(daemon.json("status")["backend"], "sk-lookup", "the choice of `auto`");
}

/// The entry of `status` for a back end.
fn tried(daemon: &Daemon, name: &str) -> Value {
    let status = daemon.json("status");
    let all = status["backends"].as_array().expect("the back ends that were tried");
    all.iter().find(|backend| backend["name"] == name).unwrap_or_else(|| panic!("no {name} in {status}")).clone()
}

fn auto() {
    let daemon = Daemon::start(&Netns::new(), "auto");
    assert_eq!(daemon.json("status")["backend"], "sk-lookup", "the choice of `auto`");
    assert_eq!(tried(&daemon, "sk-lookup")["usable"], true);
    let log = daemon.log();
    assert!(log.contains("sk-lookup") && log.contains("add-prefix"), "choice and what to type next: {log}");
    assert!(daemon.ok("status").contains("sk-lookup"), "status for people names the back end");
}

/// `auto` does what a start with its choice by name does, and no more. How long both take is shown: they start in turns.
fn auto_tries_no_more() {
    let mut times: [Vec<Duration>; 2] = [vec![], vec![]];
    for _ in 0..3 {
        for (steering, times) in ["auto", "sk-lookup"].iter().zip(&mut times) {
            let begin = Instant::now();
            let daemon = Daemon::start(&Netns::new(), steering);
            times.push(begin.elapsed());
            for other in ["tc", "tproxy"] {
                assert_eq!(tried(&daemon, other)["usable"], Value::Null, "--steering {steering}: {other}");
            }
        }
    }
    let [auto, by_name] = times.map(|mut times| {
        times.sort();
        times[1].as_secs_f64()
    });
    eprintln!("start with auto {auto:.2} s, with sk-lookup {by_name:.2} s, ratio {:.2} (medians of 3)", auto / by_name);
}

fn without_bpf() {
    let topology = Topology::new();
    let daemon = Setup::new(&topology.host, "auto").through(WITHOUT_BPF).start();
    assert_eq!(daemon.json("status")["backend"], "tproxy", "the choice of `auto` without CAP_BPF");
    for name in ["sk-lookup", "tc"] {
        let entry = tried(&daemon, name);
        let reason = entry["reason"].as_str().expect("a reason");
        assert!(entry["usable"] == false && reason.contains("CAP_BPF"), "{name}: {entry}");
        assert!(daemon.log().contains(name), "the log about {name}: {}", daemon.log());
    }
    daemon.ok("add-prefix 192.0.2.0/24 2001:db8:0:a::/64 --protocol both");
    for address in ["192.0.2.3", "2001:db8:0:a::3"] {
        topology.client.enter(|| expect_tcp_hello(at(address, 3)));
        topology.client.enter(|| expect_udp_hello(at(address, 3)));
    }
}

/// Attaches as many `sk_lookup` programs as the kernel lets a namespace have, until it is dropped.
fn fill_sk_lookup(namespace: &Netns) -> Ebpf {
    const OBJECT: &[u8] = aya::include_bytes_aligned!("../../anyport-ebpf/prebuilt/anyport.o");
    // Without rules in its maps, anyport's own program does for one that lets everything pass.
    let mut foreign = Ebpf::load(OBJECT).expect("the BPF object");
    let program: &mut SkLookup = foreign.program_mut("anyport_sk").expect("a program").try_into().expect("sk_lookup");
    program.load().expect("loading the program");
    let file = File::open(namespace.path()).expect("the namespace's file");
    let attached = (0..1_000).take_while(|_| program.attach(&file).is_ok()).count();
    assert!((64..1_000).contains(&attached), "{attached} programs could be attached");
    foreign
}

/// A server that follows another one takes its word for what does not work; one of another executable does not.
fn remembered() {
    let namespace = Netns::new();
    let foreign = fill_sk_lookup(&namespace);
    let daemon = Daemon::start(&namespace, "auto");
    daemon.ok("add-prefix 192.0.2.0/24");
    let reason = tried(&daemon, "sk-lookup")["reason"].clone();
    drop(foreign);
    for _ in 0..2 {
        let server = daemon.pid();
        kill(server, Signal::SIGKILL).expect("SIGKILL to the process that serves");
        daemon.wait_for_successor(server);
        assert_eq!(daemon.json("status")["backend"], "tc", "what steers after a crash");
        let entry = tried(&daemon, "sk-lookup");
        assert!(entry["usable"] == false && entry["reason"] == reason, "{entry}");
        namespace.enter(|| expect_tcp_hello(at("192.0.2.3", 3)));
    }
    let directory = scratch();
    let next = directory.path().join("anyportd");
    public_copy(&program("anyportd").expect("the program under test"), &next);
    let outcome = daemon.take_over(&next);
    assert!(outcome.status == 0, "{outcome}");
    assert_eq!(daemon.json("status")["backend"], "sk-lookup", "what steers after an upgrade");
    namespace.enter(|| expect_tcp_hello(at("192.0.2.3", 3)));
}

/// The kernel lets a namespace have 64 `sk_lookup` programs; here another program has attached them all.
fn sk_lookup_full() {
    let namespace = Netns::new();
    let _foreign = fill_sk_lookup(&namespace);
    let daemon = Daemon::start(&namespace, "auto");
    assert_eq!(daemon.json("status")["backend"], "tc", "the choice of `auto` beside so many programs");
    let entry = tried(&daemon, "sk-lookup");
    let reason = entry["reason"].as_str().expect("a reason");
    assert!(entry["usable"] == false && reason.contains("too long"), "what the kernel said about sk-lookup: {entry}");
    daemon.ok("add-prefix 192.0.2.0/24 2001:db8:0:a::/64");
    for address in ["192.0.2.3", "2001:db8:0:a::3"] {
        namespace.enter(|| expect_tcp_hello(at(address, 3)));
    }
    drop(daemon);
    let outcome = Setup::new(&namespace, "sk-lookup").run_to_end();
    assert!(outcome.status == 1 && outcome.stderr.contains("too long"), "--steering sk-lookup: {outcome}");
}

/// The message says what failed and what to do; nothing stays behind.
fn chosen_but_unusable() {
    let namespace = Netns::new();
    let expect_failure = |what: &str, outcome: &Outcome, part: &str| {
        assert!(outcome.status == 1 && outcome.stderr.contains(part), "{what}, with {part:?}: {outcome}");
        let routes = namespace.ip("route show table local proto 165");
        assert!(routes.is_empty(), "routes after {what}: {routes}");
    };
    for backend in ["sk-lookup", "tc"] {
        let outcome = Setup::new(&namespace, backend).through(WITHOUT_BPF).run_to_end();
        expect_failure(&format!("{backend} without CAP_BPF"), &outcome, "CAP_BPF");
    }
    let empty = scratch();
    let outcome = Setup::new(&namespace, "tproxy").env("PATH", only_setpriv(empty.path())).run_to_end();
    expect_failure("tproxy without iptables", &outcome, "iptables-restore");
    let through = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", "--"];
    let outcome = Setup::new(&namespace, "tproxy").through(through).run_to_end();
    expect_failure("tproxy without CAP_NET_ADMIN", &outcome, "CAP_NET_ADMIN");
    let outcome = Setup::new(&namespace, "sk-lookup").bpffs("/proc/nowhere").run_to_end();
    expect_failure("sk-lookup without a bpffs", &outcome, "/proc/nowhere");
}

/// A search path with nothing but what starts the daemon.
fn only_setpriv(directory: &Path) -> &Path {
    let setpriv = Outcome::of(Command::new("sh").args(["-c", "command -v setpriv"])).stdout;
    std::os::unix::fs::symlink(setpriv.trim(), directory.join("setpriv")).expect("a link to setpriv");
    directory
}

fn mounts_bpffs() {
    let directory = scratch();
    let path = directory.path().join("bpf");
    let mounted =
        || fs::read_to_string("/proc/thread-self/mounts").expect("mounts").contains(&path.display().to_string());
    // To mount takes root. A daemon that has changed its user can't unmount it any more, and the next start finds it.
    for (user, is_left) in [("anyport", true), ("root", false)] {
        let mut daemon = Setup::new(&Netns::new(), "sk-lookup").bpffs(&path).args(["--user", user]).start();
        daemon.ok("add-prefix 192.0.2.0/24");
        assert!(mounted(), "no bpffs at {}", path.display());
        daemon.namespace().run("bpftool", ["map", "dump", "pinned", &path.join("rules").display().to_string()]);
        daemon.stop();
        assert_eq!(mounted(), is_left, "the bpffs at {} after {user}", path.display());
        assert!(!path.join("rules").exists());
    }
}

/// Cables that are plugged in, pulled and plugged in again, while the daemon runs.
fn later_interfaces() {
    let lab = Lab::new("tc");
    lab.daemon.ok("add-prefix 192.0.2.0/24 2001:db8:0:a::/64 --protocol both");
    for round in 0..3 {
        let late = Netns::new();
        late.join(
            &lab.topology.host,
            ("eth0", &["198.51.100.129/30", "2001:db8:e::1/64"]),
            ("late", &["198.51.100.130/30", "2001:db8:e::2/64"]),
        );
        late.ip("route add default via 198.51.100.130");
        late.ip("-6 route add default via 2001:db8:e::2");
        wait_for("steering on a new interface", Duration::from_secs(5), || {
            late.enter(|| anyport_tests::dial::tcp_text(at("192.0.2.3", 3)))
                .map_err(|error| format!("round {round}: {error}"))
        });
        for address in ["192.0.2.3", "2001:db8:0:a::3"] {
            late.enter(|| expect_tcp_hello(at(address, 3)));
            late.enter(|| expect_udp_hello(at(address, 3)));
            lab.topology.client.enter(|| expect_tcp_hello(at(address, 3)));
        }
        lab.topology.host.ip("link delete late");
    }
    assert_eq!(lab.daemon.json("status")["degraded"], Value::Array(vec![]), "degraded after interfaces came and went");
}

fn one_interface() {
    let lab = Lab::with("tc", |setup| setup.args(["--interface", "client"]));
    lab.daemon.ok("add-prefix 192.0.2.0/24");
    lab.topology.client.enter(|| expect_tcp_hello(at("192.0.2.3", 3)));
    for other in [&lab.topology.server, &lab.topology.host] {
        other.enter(|| expect_tcp_refused(at("192.0.2.3", 3)));
    }
}

/// What a program decides is in the log from debug on, and not before.
fn programs_log(backend: &str) {
    const DECISION: &str = "port 31337: steered to service";
    for (level, is_logged) in [("info", false), ("debug", true)] {
        let daemon = Setup::new(&Netns::new(), backend).args(["--log-level", level]).start();
        daemon.ok("add-prefix 192.0.2.0/24");
        daemon.namespace().enter(|| expect_tcp_hello(at("192.0.2.77", 31_337)));
        if is_logged {
            wait_for("line of the program", Duration::from_secs(3), || {
                let log = daemon.log();
                if log.contains(DECISION) { Ok(()) } else { Err(log) }
            });
        } else {
            assert!(!daemon.log().contains(DECISION), "{}", daemon.log());
        }
    }
}

/// Works with this flavour alone, in one chain of its own, and touches no rule of others.
fn tproxy(flavour: &str) {
    let topology = Topology::new();
    let tools = xtables(flavour);
    let path = path_with(tools.path());
    let run = |line: &str| {
        let outcome = topology.host.output(Command::new("sh").args(["-c", line]).env("PATH", &path));
        assert!(outcome.status == 0, "{line}: {outcome}");
        outcome.stdout
    };
    for family in ["iptables", "ip6tables"] {
        run(&format!(
            "{family} -t mangle -N OTHERS && {family} -t mangle -A OTHERS -p tcp --dport 9 -j MARK --set-mark 9"
        ));
        run(&format!("{family} -t mangle -A PREROUTING -j OTHERS && {family} -t mangle -A FORWARD -p udp -j ACCEPT"));
    }
    let saved = || {
        ["iptables", "ip6tables"].map(|family| {
            let all = run(&format!("{family}-save -t mangle"));
            all.lines().filter(|line| line.starts_with('-')).collect::<Vec<_>>().join("\n")
        })
    };
    let before = saved();
    let mut daemon = Setup::new(&topology.host, "tproxy").env("PATH", &path).start();
    daemon.ok("add-prefix 192.0.2.0/24 2001:db8:0:a::/64 --protocol both --except 22");
    daemon.ok("add-prefix 203.0.113.128/25 --ports 80,443,8000-8999");
    for _ in 0..2 {
        for address in ["192.0.2.3", "2001:db8:0:a::3"] {
            for namespace in [&topology.client, &topology.host] {
                namespace.enter(|| expect_tcp_hello(at(address, 3)));
                namespace.enter(|| expect_udp_hello(at(address, 3)));
                namespace.enter(|| expect_tcp_refused(at(address, 22)));
            }
        }
        let now = saved();
        for (now, before) in now.iter().zip(&before) {
            assert!(before.lines().all(|rule| now.contains(rule)), "rules of others:\n{before}and now:\n{now}");
            let jumps =
                now.lines().filter(|line| line.starts_with("-A PREROUTING") && line.contains("ANYPORT")).count();
            assert!(jumps == 1, "{jumps} jumps to the chain ANYPORT:\n{now}");
        }
        daemon.kill();
        daemon.restart();
    }
    // Someone else adds a rule meanwhile; the next change of ours keeps it.
    run("iptables -t mangle -A OTHERS -p tcp --dport 10 -j MARK --set-mark 10");
    daemon.ok("remove-prefix 203.0.113.128/25");
    assert!(saved()[0].contains("--dport 10"), "a rule that came meanwhile is gone: {}", saved()[0]);
    run("iptables -t mangle -D OTHERS -p tcp --dport 10 -j MARK --set-mark 10");
    daemon.stop();
    assert_eq!(saved(), before, "rules after the end");
}

/// Where a firewall lets packets pass before they are refused, they get no answer, and no listener of the host gets them. Else
/// the daemon puts that in order within a second.
fn refusals_past_listeners() {
    let mut lab = Lab::with("tproxy", |setup| setup.args(["--mend", "false"]));
    let host = lab.topology.host.clone();
    lab.daemon.ok("add-service web --handler registered");
    lab.daemon.ok("add-prefix 192.0.2.0/24 2001:db8:0:a::/64 --protocol both --service web");
    let udp = host.enter(|| {
        tcp_server(at("::", 80), "the host's own\n");
        UdpSocket::bind(at("::", 80)).expect("a UDP socket")
    });
    let addresses = ["192.0.2.3", "2001:db8:0:a::3"];
    for client in ["remote", "local"] {
        for address in addresses {
            lab.at(client).enter(|| {
                expect_tcp_refused(at(address, 80));
                assert!(expect_udp_unanswered(at(address, 80)), "{client} UDP to {address}: silence, not a refusal");
            });
        }
    }
    host.run("sh", ["-c", "iptables -I INPUT -j ACCEPT; ip6tables -I INPUT -j ACCEPT"]);
    for address in addresses {
        lab.topology.client.enter(|| {
            let tcp = TcpStream::connect_timeout(&at(address, 80), Duration::from_millis(300));
            assert_eq!(tcp.map(|_| ()).map_err(|it| it.kind()), Err(ErrorKind::TimedOut), "{address}");
            assert!(!expect_udp_unanswered(at(address, 80)), "{address}");
        });
    }
    udp.set_nonblocking(true).expect("a non-blocking socket");
    assert!(udp.recv_from(&mut [0; 99]).is_err(), "the host's own UDP socket got something");
    let rules = lab.daemon.json("prefixes");
    assert!(rules.as_array().expect("rules").iter().all(|it| it["dropped"].as_u64() >= Some(6)), "{rules}");
    // A policy that came meanwhile stays, though the chain was there for us alone.
    host.run("iptables", ["-F", "INPUT"]);
    host.run("iptables", ["-P", "INPUT", "DROP"]);
    lab.daemon.stop();
    let left = lab.topology.host.run("iptables-save", ["-t", "filter"]);
    assert!(left.contains(":INPUT DROP") && !left.contains("ANYPORT"), "{left}");
}

/// Where there are sets one stands for all prefixes; where there are none each has a line, up to a limit.
fn many() {
    let topology = Topology::new();
    let tools = xtables("nft");
    let without = only_setpriv(tools.path());
    for (path, has_sets) in [(path_with(tools.path()), true), (without.into(), false)] {
        let mut daemon = Setup::new(&topology.host, "tproxy").env("PATH", &path).start();
        let all: Vec<String> = (0..40).map(|it| format!("192.0.2.{it} 2001:db8:0:a::{it:x}")).collect();
        daemon.ok(&format!("add-prefix {}", all.join(" ")));
        for client in [&topology.client, &topology.host] {
            client.enter(|| expect_tcp_hello(at("192.0.2.39", 3)));
            client.enter(|| expect_tcp_hello(at("2001:db8:0:a::27", 3)));
        }
        let rules = || topology.host.run("iptables", ["-t", "mangle", "-S", "ANYPORT-RULES"]);
        assert_eq!(rules().contains("--match-set anyport-4-"), has_sets, "{}", rules());
        let rule = |address: &str| {
            let all = daemon.json("prefixes");
            let all = all.as_array().expect("rules").clone();
            all.into_iter().find(|rule| rule["prefix"] == address).unwrap_or_else(|| panic!("no rule of {address}"))
        };
        assert_eq!([rule("192.0.2.39/32"), rule("2001:db8:0:a::27/128")].map(|it| it["steered"].clone()), [2, 2]);
        assert_eq!(rule("192.0.2.38/32")["steered"], 0);
        daemon.ok("remove-prefix 192.0.2.38");
        daemon.ok("add-prefix 192.0.2.38 --ports 80");
        daemon.ok("add-prefix 192.0.2.40");
        topology.client.enter(|| expect_tcp_hello(at("192.0.2.38", 80)));
        topology.client.enter(|| expect_tcp_refused(at("192.0.2.38", 3)));
        topology.client.enter(|| expect_tcp_hello(at("192.0.2.40", 3)));
        assert_eq!(rule("192.0.2.39/32")["steered"], 2, "what was counted before other rules changed");
        daemon.stop();
        assert_eq!(topology.host.run("ipset", ["list", "-name"]), "", "sets after the end");
    }
    let directory = scratch();
    let file = directory.path().join("anyport.toml");
    let rule = |it: u16| format!("[[rule]]\nprefix = \"2001:db8:0:a::{it:x}\"\n");
    fs::write(&file, (0..17_000).map(rule).collect::<String>()).expect("a configuration");
    let outcome = Setup::new(&topology.host, "tproxy").env("PATH", without).config(&file).run_to_end();
    assert!(outcome.status == 1 && outcome.stderr.contains("apt-get install ipset"), "{outcome}");
}

/// Map names, and fields by name, in the words of the documentation.
fn shown_by_bpftool(backend: &'static str) {
    let lab = Lab::new(backend);
    lab.daemon.ok("add-prefix 192.0.2.0/24 --ports 80-90 --except 85");
    lab.daemon.ok("add-prefix 2001:db8:0:a::/64 --protocol udp --ports 53");
    let maps = lab.topology.host.run("bpftool", ["map", "show"]);
    assert!(maps.contains("anyport_rules"), "`bpftool map show`: {maps}");
    let pins: Vec<String> = fs::read_dir(lab.daemon.bpffs())
        .expect("pins")
        .flatten()
        .map(|pin| pin.file_name().to_string_lossy().into_owned())
        .collect();
    for pin in ["rules", "ports", "table", "control", "counts", "journals", "drops", "totals", "sockets"] {
        assert!(pins.iter().any(|name| name == pin), "no pin {pin} among {pins:?}");
    }
    assert!(pins.iter().any(|name| name.starts_with("link-")), "no link among the pins {pins:?}");
    let entries = lab.daemon.map("rules");
    let number = |entry: &Value, field: &str| entry[field].as_u64().unwrap_or_else(|| panic!("{field} of {entry}"));
    let numbers = |entry: &Value, fields: &[&str]| fields.iter().map(|it| number(entry, it)).collect::<Vec<_>>();
    let find = |version: u64| {
        let entry = entries.iter().find(|entry| entry["ip_version"] == version);
        entry.unwrap_or_else(|| panic!("no IPv{version} rule in {entries:?}"))
    };
    let fields = ["prefix_len", "protocol", "first_port", "last_port", "ports"];
    for (version, expected, head) in
        [(4, [24, 6, 80, 90, 2], [192, 0, 2, 0]), (6, [64, 17, 53, 53, 0], [0x20, 0x01, 0x0d, 0xb8])]
    {
        let entry = find(version);
        assert_eq!(numbers(entry, &fields), expected, "{entry}");
        let bytes = entry["prefix"].as_array().expect("the prefix's bytes");
        assert_eq!(bytes[..4], head.map(Value::from), "{entry}");
    }
    let ports = lab.daemon.map("ports");
    let at = usize::try_from(number(find(4), "ports_at")).expect("a small number");
    let ranges: Vec<_> =
        ports[at..at + 2].iter().map(|entry| numbers(entry, &["first_port", "last_port", "action"])).collect();
    assert_eq!(ranges, [[85, 85, 2], [80, 90, 1]], "{ports:?}");
    let pin = lab.daemon.bpffs().join("rules").display().to_string();
    let plain = lab.topology.host.run("bpftool", ["map", "dump", "pinned", &pin]);
    assert!(plain.contains("\"prefix_len\""), "the dump for people: {plain}");
}

/// Steering works whatever the host thinks of where packets should come from.
fn reverse_path(backend: &'static str) {
    let lab = Lab::new(backend);
    lab.daemon.ok("add-prefix 192.0.2.0/24 --protocol both");
    for rp_filter in ["0", "1", "2"] {
        for src_valid_mark in ["0", "1"] {
            for interface in ["all", "lo", "client"] {
                lab.topology.host.sysctl(&format!("net.ipv4.conf.{interface}.rp_filter"), rp_filter);
                lab.topology.host.sysctl(&format!("net.ipv4.conf.{interface}.src_valid_mark"), src_valid_mark);
            }
            for client in ["remote", "local"] {
                lab.at(client).enter(|| expect_tcp_hello(at("192.0.2.3", 3)));
                lab.at(client).enter(|| expect_udp_hello(at("192.0.2.3", 3)));
            }
        }
    }
}

/// A route that was there before is used, never changed, and stays.
fn foreign_route(backend: &'static str) {
    let lab = Lab::new(backend);
    let host = &lab.topology.host;
    host.ip("route add local 192.0.2.0/24 dev lo proto static");
    host.ip("-6 route add local 2001:db8:0:a::/64 dev lo proto static metric 77");
    let shown = |family: Family| host.ip(&format!("-{family} route show table local proto static"));
    let before = Family::ALL.map(shown);
    lab.daemon.ok("add-prefix 192.0.2.0/24 2001:db8:0:a::/64");
    for client in ["remote", "local"] {
        lab.at(client).enter(|| expect_tcp_hello(at("2001:db8:0:a::3", 3)));
    }
    lab.topology.client.enter(|| expect_tcp_hello(at("192.0.2.3", 3)));
    lab.daemon.ok("remove-prefix 192.0.2.0/24 2001:db8:0:a::/64");
    assert_eq!(Family::ALL.map(shown), before, "routes of someone else's after remove-prefix");
    let ours = Family::ALL.map(|family| host.ip(&format!("-{family} route show table local proto 165"))).concat();
    assert!(ours.is_empty(), "routes of ours beside them: {ours}");
}
