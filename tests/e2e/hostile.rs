//! What users without privileges do to a daemon at work, and what a server does that is not itself any more: the daemon goes on, and nobody gains
//! anything.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, chown, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyport_tests::{
    daemon::{Daemon, Setup},
    dial::expect_tcp_hello,
    host::{Running, wait_for},
    http,
    netns::Netns,
    owners::register_socket,
    prerequisites::{GROUP, USER, public_copy, scratch},
    promptness::expect_prompt,
};
use libtest_mimic::Trial;
use nix::unistd::mkfifo;
use serde_json::{Value, json};

use crate::cases::{Lab, alone, at, trial};

/// As a user without privileges, passes sockets whose last close lasts long.
const PASSER: &str = include_str!("hostile/passer.py");
/// How long such a close lasts.
const LINGER: &str = "40";
/// Answers that are measured.
const ASKED: usize = 200;
/// How long it may take until a server is replaced that does not answer.
const REPLACED: Duration = Duration::from_mins(1);
/// And until a daemon ends whose server does not.
const ENDED: Duration = Duration::from_mins(1);

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for door in ["control", "register", "nested", "unread", "lock", "answers"] {
        let name = format!("hostile::sockets that take long to close, passed through: {door}");
        trials.push(trial(&name, move || passed(door, 3)));
    }
    trials.push(trial("hostile::more sockets that take long to close than are taken", || passed("register", 40)));
    trials.push(trial("hostile::a server that is stopped is replaced", stopped));
    trials.push(trial("hostile::a server that is stopped does not keep the daemon from ending", stopped_at_end));
    trials.push(trial("hostile::a log that nobody takes", unread_log));
    trials.push(trial("hostile::lines of the log that others cause", flood_of_lines));
    trials.push(alone("hostile::names that are not what they seem", names));
    trials.push(trial("hostile::directories of another daemon", shared_directories));
    trials.push(trial("hostile::locks that a local user holds, and files that he reads", locks));
    trials.push(trial("hostile::programs that others could have written", programs));
    trials.push(trial("hostile::a server that is not itself", impostor));
    trials.push(trial("hostile::descriptors for clients and for control", descriptors));
    trials
}

/// Passes sockets until it is dropped. They are in the daemon's hands when this returns.
fn pass(daemon: &Daemon, door: &str, times: usize) -> Running {
    let path = if door == "control" { daemon.socket() } else { register_socket(daemon) };
    let mut command = Command::new("python3");
    command.args(["-c", PASSER, door]).arg(path).args([LINGER, &times.to_string()]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut process = Running(daemon.namespace().spawn(command));
    assert_eq!(process.first_line(), "passed\n");
    process
}

fn passed(door: &str, times: usize) {
    let mut lab = Lab::with("sk-lookup", |setup| setup.args(["--readers", "all"]));
    lab.daemon.ok("add-service web --handler registered --owner user:65533");
    lab.daemon.ok("add-service names --handler registered --owner user:65533");
    lab.daemon.ok("add-prefix 192.0.2.0/24");
    let attack = pass(&lab.daemon, door, times);
    let client = Some((&lab.topology.client, at("192.0.2.3", 80)));
    expect_prompt(&lab.daemon, client, door, |asked| asked < ASKED);
    // Drift is repaired, and changes are made.
    lab.topology.host.ip("route del local 192.0.2.0/24 dev lo");
    wait_for("repair", Duration::from_secs(10), || {
        let routes = lab.topology.host.ip("route show table local proto 165");
        if routes.contains("192.0.2.0/24") { Ok(()) } else { Err(routes) }
    });
    lab.daemon.ok("add-prefix 2001:db8:0:a::/64");
    lab.topology.client.enter(|| expect_tcp_hello(at("192.0.2.3", 80)));
    let code = lab.daemon.terminate(Duration::from_secs(10));
    assert_eq!(code, 0, "the end of the daemon:\n{}", lab.daemon.log());
    drop(attack);
}

fn stopped() {
    let lab = Lab::new("sk-lookup");
    lab.daemon.ok("add-prefix 192.0.2.0/24");
    let before = lab.daemon.pid();
    lab.daemon.pause();
    wait_for("another server", REPLACED, || {
        let now = lab.daemon.servers();
        if now.iter().any(|pid| *pid != before) { Ok(()) } else { Err(format!("{now:?}")) }
    });
    lab.daemon.wait_for_successor(before);
    lab.topology.client.enter(|| expect_tcp_hello(at("192.0.2.3", 80)));
    let log = lab.daemon.log();
    assert!(log.contains("did not answer for 15 s and was killed"), "{log}");
}

fn stopped_at_end() {
    let mut lab = Lab::new("sk-lookup");
    lab.daemon.pause();
    lab.daemon.terminate(ENDED);
}

/// Standard error is a pipe that is full.
fn unread_log() {
    let namespace = Netns::new();
    let directory = scratch();
    let fifo = directory.path().join("log");
    mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o666)).expect("a pipe");
    // Open at both ends, so that a writer waits for room instead of a reader.
    let reader = fs::File::options().read(true).write(true).open(&fifo).expect("both ends of the pipe");
    let line = format!("exec \"$@\" 2> {}", fifo.display());
    let setup = Setup::new(&namespace, "sk-lookup").through(["sh", "-c", &line, "sh"]);
    let mut daemon = setup.args(["--log-level", "debug"]).start();
    for number in 0..300 {
        daemon.ok(&format!("add-prefix 192.0.2.{}", number % 256));
        daemon.ok(&format!("remove-prefix 192.0.2.{}", number % 256));
    }
    expect_prompt(&daemon, None, "a log that nobody takes", |asked| asked < ASKED);
    let code = daemon.terminate(Duration::from_secs(20));
    assert_eq!(code, 0);
    drop(reader);
}

fn flood_of_lines() {
    let daemon = Setup::new(&Netns::new(), "sk-lookup").args(["--readers", "all"]).start();
    let before = daemon.log().lines().count();
    let script = "import os, socket, sys\n\
        os.setgroups([]); os.setresgid(65533, 65533, 65533); os.setresuid(65533, 65533, 65533)\n\
        for _ in range(2000):\n s = socket.socket(socket.AF_UNIX)\n s.connect(sys.argv[1])\n \
        s.sendall(b'DELETE /v1/prefixes HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\nContent-Length: 0\\r\\n\\r\\n')\n s.recv(4096)\n s.close()\n";
    let begun = Instant::now();
    let mut command = Command::new("python3");
    command.args(["-c", script]).arg(daemon.socket());
    let outcome = daemon.namespace().output(&mut command);
    assert_eq!(outcome.status, 0, "{outcome}");
    let seconds = begun.elapsed().as_secs() + 2;
    let lines = daemon.log().lines().count() - before;
    assert!(lines as u64 <= 10 * seconds, "{lines} lines in {seconds} s");
    assert!(lines > 0, "the first lines are there:\n{}", daemon.log());
}

/// A process gives itself a name that turns the rest of a line around.
fn names() {
    let lab = Lab::new("sk-lookup");
    lab.daemon.ok("add-service web --handler registered");
    lab.daemon.ok("add-prefix 192.0.2.0/24 --service web");
    let script = "import ctypes, socket, sys\n\
        ctypes.CDLL(None).prctl(15, '\\u202egnp.x\\u200b'.encode())\n\
        s = socket.create_server(('0.0.0.0', 8080))\n\
        print(s.fileno(), flush=True)\n\
        sys.stdin.read()\n";
    let mut command = Command::new("python3");
    command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut process = Running(lab.topology.host.spawn(command));
    let (pid, descriptor) = (process.id(), process.first_line());
    lab.daemon.ok(&format!("register web --pid {pid} --fd {}", descriptor.trim()));
    for arguments in ["explain tcp 192.0.2.3:80", "explain tcp 192.0.2.3:80 --json"] {
        let text = lab.daemon.ok(arguments);
        assert!(text.contains("\\u202egnp.x\\u200b"), "{arguments}: {text}");
        assert!(!text.contains(['\u{202e}', '\u{200b}']), "{arguments}: {text}");
    }
}

/// That of the pins is seen to by `crash::a second daemon is refused`.
fn shared_directories() {
    let first = Setup::new(&Netns::new(), "sk-lookup").start();
    let outcome = Setup::new(&Netns::new(), "sk-lookup").args([Path::new("--state-dir"), &first.state()]).run_to_end();
    let is_named =
        outcome.stderr.contains("another anyportd uses the directory") && outcome.stderr.contains("--state-dir");
    assert!(outcome.status == 1 && is_named, "{outcome}");
    first.ok("add-prefix 192.0.2.0/24");
}

/// Anybody who can open a file can lock it: nobody can open what a daemon locks, or read what it keeps.
fn locks() {
    let mut daemon = Setup::new(&Netns::new(), "sk-lookup").start();
    daemon.ok("add-prefix 192.0.2.0/24");
    let state = daemon.state();
    let mode = |path: &Path| fs::metadata(path).expect("a file of the daemon").permissions().mode() & 0o777;
    for path in [&state, &daemon.bpffs().to_owned()] {
        assert_eq!(mode(path) & 0o007, 0, "{}", path.display());
    }
    for entry in fs::read_dir(&state).expect("the state").flatten() {
        assert_eq!(mode(&entry.path()) & 0o077, 0, "{}", entry.path().display());
    }
    // Also where an administrator, or a version of before, has opened the directory to all.
    fs::set_permissions(&state, fs::Permissions::from_mode(0o755)).expect("an open directory");
    daemon.stop();
    let lock = |path: &Path| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]);
        command.args(["flock", "--nonblock"]).arg(path).args(["sleep", "20"]);
        Running(command.stderr(Stdio::null()).spawn().expect("a process of a local user"))
    };
    let held = [state.clone(), state.join("lock"), state.join("state.json")].map(|path| lock(&path));
    sleep(Duration::from_millis(500));
    daemon.restart();
    assert!(daemon.ok("prefixes").contains("192.0.2.0/24"));
    drop(held);
}

/// A program that is started with the daemon's privileges shows that by a file.
fn telling(path: &Path, mark: &Path) {
    fs::write(path, format!("#!/bin/sh\ntouch {}\nsleep 1000\n", mark.display())).expect("a program");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("a mode");
}

fn programs() {
    let daemon = Setup::new(&Netns::new(), "sk-lookup").start();
    let directory = scratch();
    let path = |name: &str| directory.path().join(name);
    let mark = path("marks");
    fs::create_dir(&mark).expect("a directory");
    fs::set_permissions(&mark, fs::Permissions::from_mode(0o777)).expect("a mode");
    let mark = mark.join("started");
    let own = path("anyportd-own");
    telling(&own, &mark);
    chown(&own, Some(USER), Some(GROUP)).expect("a program of the daemon's user");
    let group = path("anyportd-group");
    telling(&group, &mark);
    fs::set_permissions(&group, fs::Permissions::from_mode(0o775)).expect("a mode");
    let theirs = path("theirs");
    fs::create_dir(&theirs).expect("a directory");
    chown(&theirs, Some(65_533), None).expect("another user's directory");
    telling(&theirs.join("anyportd"), &mark);
    telling(&path("anyportd-good"), &mark);
    symlink(path("anyportd-good"), path("anyportd-link")).expect("a link");
    mkfifo(&path("anyportd-pipe"), nix::sys::stat::Mode::from_bits_truncate(0o755)).expect("a pipe");
    let pid = daemon.pid();
    let all = [
        own,
        group,
        theirs.join("anyportd"),
        path("anyportd-link"),
        path("anyportd-pipe"),
        "/dev/zero".into(),
        "/proc/self/exe".into(),
    ];
    for executable in all {
        let body = json!({ "executable": executable }).to_string();
        let (status, answer) = http::request(&daemon.socket(), "POST", "/v1/takeover", body.as_bytes());
        assert!(status == 500 && answer.contains("start "), "{}: {status} {answer}", executable.display());
        assert!(!mark.exists(), "{} was started", executable.display());
    }
    assert_eq!(daemon.pid(), pid, "the same server serves");
    daemon.ok("add-prefix 192.0.2.0/24");
}

/// Has a program of the tests take over, which then says everything to the keeper that a server can say, and more.
fn impostor() {
    let mut lab = Lab::new("sk-lookup");
    lab.daemon.ok("add-prefix 192.0.2.0/24");
    lab.topology.client.enter(|| expect_tcp_hello(at("192.0.2.3", 80)));
    let directory = scratch();
    let path = |name: &str| directory.path().join(name);
    let executable = path("anyportd-impostor");
    public_copy(&PathBuf::from(env!("CARGO_BIN_EXE_impostor")), &executable);
    let keeper = lab.daemon.keeper();
    let memory = || {
        let status = fs::read_to_string(format!("/proc/{keeper}/status")).expect("the keeper's state");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory").to_owned();
        line.split_whitespace().next().expect("a number").parse::<u64>().expect("kB")
    };
    let before = memory();
    let body = json!({ "executable": executable }).to_string();
    let (status, answer) = http::request(&lab.daemon.socket(), "POST", "/v1/takeover", body.as_bytes());
    assert_eq!(status, 200, "{answer}");
    // It writes where the daemon's user may write.
    let report = lab.daemon.state().join("impostor.json");
    let report: Value = wait_for("report of the impostor", Duration::from_mins(2), || {
        let text = fs::read(&report).map_err(|error| format!("{error}\n{}", lab.daemon.log()))?;
        serde_json::from_slice(&text).map_err(|error| error.to_string())
    });
    assert_eq!(report["started"], json!([]), "what the keeper started for it");
    assert!(report["sent"].as_u64().is_some_and(|sent| sent > 50_000), "{report}");
    assert!(memory() < before + (64 << 10), "the keeper's memory: {before} kB, then {} kB", memory());
    let open = fs::read_dir(format!("/proc/{keeper}/fd")).expect("the keeper's files").count();
    assert!(open < 17_000, "{open} files of the keeper");
    let effective = fs::read_to_string(format!("/proc/{keeper}/status")).expect("the keeper's state");
    assert!(effective.contains("CapEff:\t0000000000000000"), "{effective}");
    // It stops itself then, and still the daemon ends in bounded time.
    lab.daemon.terminate(ENDED);
}

/// What clients may have is what the daemon does not need, however many services there are.
fn descriptors() {
    let limit = ["prlimit", "--nofile=1024:1024"];
    let daemon = Setup::new(&Netns::new(), "sk-lookup").through(limit).start();
    let for_clients = |daemon: &Daemon| daemon.json("status")["client_descriptors"].as_u64().expect("a number");
    let few = for_clients(&daemon);
    for number in 0..20 {
        daemon.ok(&format!("add-service s{number} --handler echo"));
    }
    daemon.ok("add-prefix 127.1.0.0/16 --ports 7000-7999 --service s1");
    let many = for_clients(&daemon);
    assert!(many < few, "{few}, then {many} with more services");
    let namespace = daemon.namespace().clone();
    let clients: Vec<_> = (0..1024)
        .filter_map(|number| {
            let to = at("127.1.0.7", 7000 + number % 1000);
            namespace.enter(|| std::net::TcpStream::connect_timeout(&to, Duration::from_secs(5))).ok()
        })
        .collect();
    wait_for("clients", Duration::from_secs(10), || {
        let status = daemon.json("status");
        // One service takes four fifths of them at most.
        if status["client_descriptors_in_use"].as_u64() >= Some(many * 3 / 4) {
            Ok(())
        } else {
            Err(status.to_string())
        }
    });
    let log = daemon.log();
    assert!(!log.contains("too many open files") && !log.contains("Too many open files"), "{log}");
    expect_prompt(&daemon, None, "all descriptors of clients in use", |asked| asked < ASKED);
    daemon.ok("add-prefix 192.0.2.0/24");
    let report = daemon.ctl(&["doctor"]);
    assert!(report.stdout.contains("for clients") || report.stdout.contains("clients may take"), "{report}");
    drop(clients);
    for number in 0..20 {
        if number != 1 {
            daemon.ok(&format!("remove-service s{number}"));
        }
    }
    assert!(for_clients(&daemon) > many, "with fewer services there are more for clients");
}
