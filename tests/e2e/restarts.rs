//! What a restart, an upgrade and a crash of the process that serves do to clients: nothing, as far as they can see.

use std::{
    fs,
    io::Read as _,
    net::UdpSocket,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    thread::{self, sleep},
    time::Duration,
};

use anyport_tests::{
    daemon::LogOnPanic,
    dial::{PATIENCE, any, expect_tcp_hello, expect_tcp_line, tcp, udp, udp_over},
    host::wait_for,
    prerequisites::{program, public_copy, scratch},
    random::Random,
    steady::{Loss, Tally, dial_during},
    systemd::Systemd,
    topology::{SERVER, Topology},
};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};

use crate::{
    cases::{Lab, at, on_each_back_end, trial},
    crash::snapshot,
};

const PREFIXES: [&str; 2] = ["192.0.2.0/24", "2001:db8:0:a::/64"];
/// How many dial at the same time.
const CLIENTS: usize = 3;
const CRASHES: usize = 8;
const UPGRADES: u64 = 6;
/// Connections between two of these.
const BETWEEN: u64 = 200;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(on_each_back_end("restarts::SIGKILL of the process that serves", crashes));
    trials.extend(on_each_back_end("restarts::upgrades under load", upgrades));
    trials.extend(on_each_back_end("restarts::what is established goes on", established));
    trials.extend(on_each_back_end("restarts::an upgrade that fails is undone", failed_upgrade));
    trials.extend(on_each_back_end("restarts::--keep leaves steering behind", keep));
    trials.push(trial("restarts::what can't start does not take over", refused_upgrade));
    trials.push(trial("restarts::one that ends before its turn is replaced", ended_early));
    trials.push(trial("restarts::the number of workers changes", workers));
    trials.push(trial("restarts::connections have their time", deadline));
    trials.push(trial("restarts::without keeper it stops", orphan));
    trials.push(trial("restarts::under systemd", systemd));
    trials.push(trial("restarts::systemd does not give up", systemd_tries_again));
    trials.push(trial("restarts::a package that goes leaves no unit behind", removed));
    trials
}

fn lab(backend: &str) -> Lab {
    let lab = Lab::new(backend);
    lab.daemon.ok(&format!("add-prefix {} --protocol both", PREFIXES.join(" ")));
    lab
}

/// Has clients dial during `work`. Nobody may be refused, nor served by another.
fn dial_while(lab: &Lab, work: impl FnOnce(&AtomicU64)) -> Tally {
    dial_from(&lab.topology, work)
}

fn dial_from(topology: &Topology, work: impl FnOnce(&AtomicU64)) -> Tally {
    let tally = dial_during(&topology.client, &PREFIXES, CLIENTS, work);
    let lost = tally.count(Loss::Refused) + tally.count(Loss::Misdirected);
    assert!(lost == 0, "{lost} of {} connections:{}", tally.served, tally.sample());
    tally
}

fn wait_for_more(served: &AtomicU64) {
    let enough = served.load(Relaxed) + BETWEEN;
    wait_for("more connections", Duration::from_secs(30), || {
        if served.load(Relaxed) >= enough { Ok(()) } else { Err(format!("{served:?} of {enough}")) }
    });
}

/// A copy of the daemon, as an upgrade brings it.
fn copy(directory: &Path, name: &str) -> PathBuf {
    let copy = directory.join(format!("anyportd-{name}"));
    public_copy(&program("anyportd").expect("the program under test"), &copy);
    copy
}

/// Connections that it has accepted and not answered die with the process, one of each client at most. All others wait.
fn crashes(backend: &'static str) {
    let mut lab = lab(backend);
    let mut random = Random::new(backend);
    let tally = dial_while(&lab, |served| {
        for _ in 0..CRASHES {
            wait_for_more(served);
            sleep(Duration::from_micros(random.below(50_000) as u64));
            let pid = lab.daemon.pid();
            kill(pid, Signal::SIGKILL).expect("SIGKILL to the process that serves");
            lab.daemon.wait_for_successor(pid);
        }
        wait_for_more(served);
    });
    let lost = tally.count(Loss::Unanswered);
    assert!(lost <= CRASHES * CLIENTS, "{lost} of {} connections:{}", tally.served, tally.sample());
    assert!(lab.daemon.log().contains("was killed by SIGKILL"), "{}", lab.daemon.log());
    lab.daemon.stop();
}

fn upgrades(backend: &'static str) {
    let mut lab = lab(backend);
    let directory = scratch();
    let versions = ["one", "two"].map(|name| copy(directory.path(), name));
    let log = LogOnPanic(&lab.daemon);
    let tally = dial_while(&lab, |served| {
        for (round, version) in (0..UPGRADES).zip(versions.iter().cycle()) {
            wait_for_more(served);
            let before = lab.daemon.pid();
            let outcome = lab.daemon.take_over(version);
            assert!(outcome.status == 0, "upgrade {round}: {outcome}");
            let serving = fs::read_link(format!("/proc/{}/exe", lab.daemon.pid())).expect("what serves");
            assert!(serving == *version && lab.daemon.pid() != before, "{} serves", serving.display());
        }
        wait_for_more(served);
    });
    assert!(tally.failures.is_empty(), "{} of {}:{}", tally.failures.len(), tally.served, tally.sample());
    lab.topology.client.enter(|| drop(udp(at("192.0.2.5", 5), b"question").expect("an answer")));
    assert_eq!(lab.daemon.json("prefixes").as_array().expect("an array").len(), 2);
    drop(log);
    lab.daemon.stop();
}

/// TCP connections and flows of datagrams stay with the process that has them, until they end.
fn established(backend: &'static str) {
    let mut lab = Lab::new(backend);
    lab.daemon.ok("add-service echo --handler echo");
    lab.daemon.ok(&format!("add-service edge --handler forward --upstream {}:4242", SERVER[0]));
    lab.daemon.ok("add-prefix 192.0.2.0/24 --service echo");
    lab.daemon.ok("add-prefix 192.0.2.0/24 --protocol udp --service edge");
    let socket = lab.topology.server.enter(|| UdpSocket::bind(at(SERVER[0], 4242))).expect("a UDP socket");
    thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, from)) = socket.recv_from(&mut buffer) {
            // Clients may be gone.
            socket.send_to(from.to_string().as_bytes(), from).ok();
        }
    });
    let (mut stream, flow) = lab.topology.client.enter(|| {
        let flow = UdpSocket::bind(any(at("192.0.2.9", 9).ip())).expect("a UDP socket");
        flow.connect(at("192.0.2.9", 9)).expect("a connected UDP socket");
        (tcp(at("192.0.2.7", 7)).expect("a connection"), flow)
    });
    let seen = |question: &str| {
        let answer = udp_over(&flow, question.as_bytes(), PATIENCE).expect("an answer");
        String::from_utf8(answer).expect("text")
    };
    expect_tcp_line(&mut stream, "before\n");
    let peer = seen("one");
    assert_eq!(seen("two"), peer);

    let before = lab.daemon.pid();
    let directory = scratch();
    let outcome = lab.daemon.take_over(&copy(directory.path(), "next"));
    assert!(outcome.status == 0, "{outcome}");
    assert!(lab.daemon.servers().contains(&before) && lab.daemon.pid() != before);
    expect_tcp_line(&mut stream, "after\n");
    assert_eq!(seen("three"), peer, "the upstream sees another flow");
    lab.topology.client.enter(|| expect_tcp_line(&mut tcp(at("192.0.2.8", 8)).expect("a new one"), "new\n"));
    drop(stream);
    assert!(lab.daemon.servers().contains(&before), "the flow goes on");
    lab.daemon.stop();
}

/// A server that read its configuration, but could not serve when it was to begin.
fn failed_upgrade(backend: &'static str) {
    let directory = scratch();
    let place = copy(directory.path(), "anyportd");
    let mut lab = Lab::with(backend, |setup| setup.executable(&place));
    lab.daemon.ok(&format!("add-prefix {}", PREFIXES.join(" ")));
    let before = lab.daemon.rules();
    // Too few descriptors for the sockets of a service.
    let working = copy(directory.path(), "working");
    fs::remove_file(&place).expect("the file goes");
    fs::write(&place, format!("#!/bin/sh\nulimit -n 16\nexec {} \"$@\"\n", working.display())).expect("a script");
    fs::set_permissions(&place, fs::Permissions::from_mode(0o755)).expect("a mode");
    let pid = lab.daemon.pid();
    let tally = dial_while(&lab, |served| {
        wait_for_more(served);
        kill(lab.daemon.keeper(), Signal::SIGUSR2).expect("SIGUSR2 to the keeper");
        lab.daemon.wait_for_successor(pid);
        wait_for_more(served);
    });
    assert!(tally.failures.is_empty(), "{} of {}:{}", tally.failures.len(), tally.served, tally.sample());
    let log = lab.daemon.log();
    assert!(log.contains("the process that served before failed") && log.contains("Too many open files"), "{log}");
    assert_eq!(lab.daemon.rules(), before);
    lab.daemon.stop();
}

/// A server that says at once that it can't start is never told to begin.
fn refused_upgrade() {
    let directory = scratch();
    let config = directory.path().join("anyport.toml");
    fs::write(&config, "").expect("a configuration");
    let mut lab = Lab::with("sk-lookup", |setup| setup.config(&config));
    lab.daemon.ok(&format!("add-prefix {}", PREFIXES[0]));
    let next = copy(directory.path(), "next");
    let before = lab.daemon.pid();
    let expect = |named: &str| {
        let outcome = lab.daemon.take_over(&next);
        assert!(outcome.status == 1 && outcome.stderr.contains(named), "{outcome}");
        assert!(outcome.stderr.contains("the one that serves goes on"), "{outcome}");
        assert_eq!(lab.daemon.pid(), before);
        lab.topology.client.enter(|| expect_tcp_hello(at("192.0.2.3", 3)));
    };
    fs::write(&config, "[daemon]\nworker = 3\n").expect("a configuration");
    expect("unknown field `worker`");
    fs::write(&config, "[[rule]]\nprefix = \"198.51.100.0/24\"\nservice = \"nobody\"\n").expect("a configuration");
    expect("nobody");
    fs::write(&config, "").expect("a configuration");
    // As a later version may leave it.
    let state = lab.daemon.state().join("state.json");
    let text = fs::read_to_string(&state).expect("the state");
    fs::write(
        &state,
        text.replacen("\"version\": 1", "\"version\": 2", 1).replacen("\"version\":1", "\"version\":2", 1),
    )
    .expect("another state");
    expect("its version is 2");
    fs::write(&state, text).expect("the state");
    // A stranger has nothing to say here.
    let stranger = ["setpriv", "--reuid=65533", "--regid=65533", "--clear-groups"];
    let mut command = Command::new(stranger[0]);
    command.args(&stranger[1..]).arg(&next).arg("--takeover").arg("--socket").arg(lab.daemon.socket());
    let outcome = lab.topology.host.output(command.env("ANYPORT_CONFIG", "/dev/null"));
    assert!(outcome.status == 1 && lab.daemon.pid() == before, "{outcome}");
    lab.daemon.stop();
}

/// One that could start has the other leave, and ends: a third one serves.
fn ended_early() {
    let mut lab = lab("sk-lookup");
    let directory = scratch();
    let brief = directory.path().join("anyportd-brief");
    let before = lab.daemon.rules();
    let tally = dial_while(&lab, |served| {
        for seconds in ["0", "0.01", "0.05", "0.5"] {
            let text =
                format!("#!/usr/bin/python3\nimport os, time\nos.write(0, b'\"prepared\"')\ntime.sleep({seconds})\n");
            fs::write(&brief, text).expect("a program");
            fs::set_permissions(&brief, fs::Permissions::from_mode(0o755)).expect("a mode");
            let outcome = lab.daemon.take_over(&brief);
            eprintln!("after {seconds} s: {outcome}");
            wait_for_more(served);
            assert_eq!(lab.daemon.rules(), before);
        }
    });
    assert!(tally.failures.is_empty(), "{} of {}:{}", tally.failures.len(), tally.served, tally.sample());
    lab.daemon.stop();
}

fn workers() {
    let directory = scratch();
    let config = directory.path().join("anyport.toml");
    let write = |workers: usize| fs::write(&config, format!("[daemon]\nworkers = {workers}\n")).expect("a file");
    write(1);
    let mut lab = Lab::with("sk-lookup", |setup| setup.config(&config));
    lab.daemon.ok(&format!("add-prefix {} --protocol both", PREFIXES.join(" ")));
    let next = copy(directory.path(), "next");
    let sockets = || lab.daemon.json("services")[0]["sockets"].as_array().expect("an array").len();
    let tally = dial_while(&lab, |served| {
        // Existing sockets stay: connections may wait there.
        for (count, expected) in [(3, 12), (2, 12)] {
            wait_for_more(served);
            write(count);
            let outcome = lab.daemon.take_over(&next);
            assert!(outcome.status == 0, "{outcome}");
            assert_eq!(lab.daemon.json("status")["workers"], count);
            assert_eq!(sockets(), expected);
        }
        wait_for_more(served);
    });
    assert!(tally.failures.is_empty(), "{} of {}:{}", tally.failures.len(), tally.served, tally.sample());
    lab.daemon.stop();
}

fn deadline() {
    let mut lab = Lab::with("sk-lookup", |setup| setup.args(["--drain-timeout", "4s"]));
    lab.daemon.ok("add-service echo --handler echo");
    lab.daemon.ok("add-prefix 192.0.2.0/24 --service echo");
    let mut stream = lab.topology.client.enter(|| tcp(at("192.0.2.7", 7))).expect("a connection");
    expect_tcp_line(&mut stream, "before\n");
    let directory = scratch();
    let outcome = lab.daemon.take_over(&copy(directory.path(), "next"));
    assert!(outcome.status == 0, "{outcome}");
    expect_tcp_line(&mut stream, "after\n");
    let mut rest = Vec::new();
    // A reset is as good an end as any.
    assert!(stream.read_to_end(&mut rest).is_err() || rest.is_empty(), "{rest:?}");
    wait_for("end of the process that was replaced", Duration::from_secs(20), || {
        let servers = lab.daemon.servers();
        if servers.len() == 1 { Ok(()) } else { Err(format!("{servers:?}")) }
    });
    lab.daemon.stop();
}

/// Packets are refused while nobody serves, rather than left to the host, and the next start goes on.
fn keep(backend: &'static str) {
    let mut lab = Lab::with(backend, |setup| setup.args(["--keep"]));
    let own = lab.topology.host.enter(|| std::net::TcpListener::bind("0.0.0.0:8080")).expect("the host's own listener");
    lab.daemon.ok(&format!("add-prefix {}", PREFIXES[0]));
    let during = snapshot(&lab.topology.host);
    lab.daemon.stop();
    own.set_nonblocking(true).expect("non-blocking");
    lab.topology.client.enter(|| {
        let limit = Duration::from_millis(500);
        assert!(std::net::TcpStream::connect_timeout(&at("192.0.2.3", 8080), limit).is_err(), "somebody answers");
    });
    assert!(own.accept().is_err(), "the host's own listener got it");
    assert_eq!(snapshot(&lab.topology.host)["ip -4 route show table all"], during["ip -4 route show table all"]);
    lab.daemon.restart();
    lab.topology.client.enter(|| expect_tcp_hello(at("192.0.2.3", 8080)));
    lab.daemon.ok(&format!("remove-prefix {}", PREFIXES[0]));
    lab.daemon.stop();
}

/// A server whose keeper is gone cleans up.
fn orphan() {
    let lab = Lab::new("sk-lookup");
    lab.daemon.ok(&format!("add-prefix {}", PREFIXES[0]));
    let server = lab.daemon.pid();
    kill(lab.daemon.keeper(), Signal::SIGKILL).expect("SIGKILL to the keeper");
    wait_for("end of the server", Duration::from_secs(10), || {
        if kill(server, None).is_err() { Ok(()) } else { Err(lab.daemon.log()) }
    });
    let routes = lab.topology.host.run("ip", ["route", "show", "table", "local", "proto", "165"]);
    assert_eq!(routes, "", "routes that stayed");
    assert!(lab.daemon.log().contains("nothing is left in the kernel"), "{}", lab.daemon.log());
}

/// Installs the units as they are shipped, with the programs from where they were built. The client's path.
fn install_units(manager: &Systemd, options: &str) -> String {
    let [daemon, client] =
        ["anyportd", "anyportctl"].map(|name| program(name).expect("a program").display().to_string());
    manager.write("/run/systemd/system/anyport.service", include_str!("../../xtask/packaging/anyport.service"));
    // Not where the service may not look.
    for (from, to) in [(&daemon, "/run/bin/anyportd"), (&client, "/run/bin/anyportctl")] {
        manager.install(Path::new(from), to);
    }
    let socket = "/run/systemd/system/anyport.socket";
    manager.write(socket, include_str!("../../xtask/packaging/anyport.socket"));
    manager.write(&format!("{socket}.d/test.conf"), "[Unit]\nDefaultDependencies=no\n");
    let drop_in = format!(
        "[Unit]\nDefaultDependencies=no\n\
         [Service]\nExecPaths=/run/bin\nExecStart=\nExecStart=/run/bin/anyportd {options}\n\
         ExecReload=\nExecReload=/run/bin/anyportctl reload\n\
         ExecStopPost=\nExecStopPost=/run/bin/anyportd --withdraw\n\
         StandardOutput=append:/run/log\nStandardError=append:/run/log\n"
    );
    manager.write("/run/systemd/system/anyport.service.d/test.conf", &drop_in);
    manager.write("/run/tmpfiles.d/anyport.conf", include_str!("../../xtask/packaging/anyport.tmpfiles"));
    manager.ok(&["systemd-tmpfiles", "--create", "anyport.conf"]);
    manager.ok(&["systemctl", "daemon-reload"]);
    client
}

/// What keeps it from starting may go away after any time.
fn systemd_tries_again() {
    const CONFIG: &str = "/run/anyport.toml";
    let topology = Topology::new();
    let manager = Systemd::start(&topology.host);
    manager.write(CONFIG, "[[rule]]\nprefix = \"nowhere\"\n");
    let client = install_units(&manager, &format!("--config {CONFIG}"));
    assert_ne!(manager.run(&["systemctl", "start", "anyport"]).status, 0);
    let shown = |what: &str| manager.ok(&["systemctl", "show", "--property", what, "--value", "anyport"]);
    // More than systemd allows within ten seconds if it is not told otherwise.
    wait_for("further attempts", Duration::from_mins(1), || {
        let (restarts, state) = (shown("NRestarts"), shown("ActiveState"));
        assert_ne!(state.trim(), "failed", "after {restarts}: {}", manager.run(&["cat", "/run/log"]).stdout);
        if restarts.trim().parse().is_ok_and(|restarts: u32| restarts > 7) { Ok(()) } else { Err(restarts) }
    });
    manager.write(CONFIG, "");
    wait_for("start", Duration::from_mins(1), || {
        let outcome = manager.run(&[&client, "status"]);
        if outcome.status == 0 { Ok(()) } else { Err(outcome.to_string()) }
    });
}

/// The control socket is left to systemd while the service runs, and then the package is removed.
fn removed() {
    const PRERM: &str = include_str!("../../xtask/packaging/debian/prerm");
    let topology = Topology::new();
    let manager = Systemd::start(&topology.host);
    let client = install_units(&manager, "");
    let is_active = |unit: &str| manager.run(&["systemctl", "is-active", unit]).stdout.trim() == "active";
    manager.ok(&["systemctl", "enable", "--now", "anyport.service"]);
    manager.ok(&["systemctl", "enable", "anyport.socket"]);
    assert!(is_active("anyport.service") && !is_active("anyport.socket"));
    manager.ok(&["systemctl", "restart", "anyport.service"]);
    assert!(is_active("anyport.service") && is_active("anyport.socket"));
    manager.ok(&[&client, "status"]);
    let links = || manager.run(&["find", "/etc/systemd/system", "-name", "anyport.*", "-type", "l"]).stdout;
    assert_eq!(links().lines().count(), 3, "{}", links());
    // Nothing of it goes with an upgrade.
    manager.write("/run/prerm", PRERM);
    manager.ok(&["sh", "/run/prerm", "upgrade", "0.2.0"]);
    assert!(is_active("anyport.service") && is_active("anyport.socket"));
    manager.ok(&["sh", "/run/prerm", "remove"]);
    assert!(!is_active("anyport.service") && !is_active("anyport.socket"));
    assert_eq!(links(), "");
    assert_ne!(manager.run(&[&client, "status"]).status, 0, "nothing starts it");
}

fn systemd() {
    let topology = Topology::new();
    let manager = Systemd::start(&topology.host);
    let client = install_units(&manager, "--drain-timeout 20s");
    let log = || manager.run(&["cat", "/run/log"]).stdout;
    manager.ok(&["systemctl", "start", "anyport.socket"]);
    // The first command starts the service.
    let started = manager.run(&[&client, "status"]);
    assert!(started.status == 0, "{started}\n{}\n{}", manager.run(&["systemctl", "status", "anyport"]).stdout, log());
    let ctl = |words: &str| manager.ok(&[&[client.as_str()][..], &words.split(' ').collect::<Vec<_>>()].concat());
    let serving = || -> serde_json::Value {
        let status = serde_json::from_str::<serde_json::Value>(&ctl("status --json")).expect("JSON");
        status["pid"].clone()
    };
    ctl("add-service echo --handler echo");
    ctl("add-prefix 198.51.100.128/25 --no-route --service echo");
    ctl(&format!("add-prefix {} {}", PREFIXES[0], PREFIXES[1]));
    ctl("add-prefix 192.0.2.7/32 --service echo --ports 65535");
    let mut stream = topology.client.enter(|| tcp(at("192.0.2.7", 65_535))).expect("a connection");
    expect_tcp_line(&mut stream, "before\n");
    let tally = dial_from(&topology, |served| {
        for what in ["restart", "kill --kill-who=main --signal=USR2", "restart"] {
            wait_for_more(served);
            let before = serving();
            manager.ok(&[&["systemctl"][..], &what.split(' ').collect::<Vec<_>>(), &["anyport"]].concat());
            // Commands wait while nobody serves.
            wait_for("another process that serves", Duration::from_secs(10), || {
                if serving() == before { Err(format!("after {what}: {before}")) } else { Ok(()) }
            });
            expect_tcp_line(&mut stream, "during\n");
        }
        let before = serving();
        manager.ok(&["systemctl", "reload", "anyport"]);
        assert_eq!(serving(), before, "the process that serves after a reload");
        expect_tcp_line(&mut stream, "reloaded\n");
        wait_for_more(served);
    });
    assert!(tally.failures.is_empty(), "{} of {}:{}\n{}", tally.failures.len(), tally.served, tally.sample(), log());
    // The keeper itself is killed: new connections wait until it is started again.
    let tally = dial_from(&topology, |served| {
        wait_for_more(served);
        manager.ok(&["systemctl", "kill", "--kill-who=main", "--signal=KILL", "anyport"]);
        wait_for_more(served);
    });
    assert!(tally.failures.is_empty(), "{} of {}:{}\n{}", tally.failures.len(), tally.served, tally.sample(), log());
    manager.ok(&["systemctl", "stop", "anyport.socket", "anyport"]);
    let routes = topology.host.run("ip", ["route", "show", "table", "local", "proto", "165"]);
    assert_eq!(routes, "", "routes that stayed; the log:\n{}", log());
    assert_eq!(manager.run(&["systemctl", "show", "--property=Result", "--value", "anyport"]).stdout.trim(), "success");
}
