//! Sockets that other processes hand over: how they come, what is refused, restarts under load, and their end.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, UdpSocket},
    os::{fd::AsFd as _, unix::fs::PermissionsExt as _},
    path::Path,
    process::{Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    thread::scope,
    time::Duration,
};

use anyport::register::{Register, Request, send};
use anyport_tests::{
    daemon::{Daemon, LogOnPanic, Setup},
    dial::{expect_tcp_refused, receive, tcp, tcp_text, udp},
    host::wait_for,
    http,
    netns::Netns,
    owners::{Owner, register_socket, script},
    prerequisites::{GROUP, program, public_copy, scratch},
    random::Random,
    servers::Server,
};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};

use crate::cases::{Lab, at, on_each_back_end, trial};

const PREFIXES: [&str; 2] = ["192.0.2.0/24", "2001:db8:0:a::/64"];
/// How often an owner is restarted under load.
const RESTARTS: usize = 100;
/// How many names come and go.
const NAMES: usize = 10_000;
/// A user without privileges, and the group that it is made a member of.
const STRANGER: [&str; 3] = ["--reuid=65533", "--regid=65533", "--groups=4711"];

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(on_each_back_end("register::an unmodified server", unmodified_server));
    trials.extend(on_each_back_end("register::nginx, reloaded under load", nginx));
    trials.extend(on_each_back_end("register::a UDP socket", udp_socket));
    trials.extend(on_each_back_end("register::a group of sockets", group));
    trials.extend(on_each_back_end("register::a hundred restarts under load", restarts));
    trials.extend(on_each_back_end("register::the owner ends, a fallback stands in", owner_ends));
    trials.extend(on_each_back_end("register::what was registered outlives the daemon", daemon_restarts));
    trials.push(trial("register::the ways a socket comes", ways));
    trials.push(trial("register::who may register", permissions));
    trials.push(trial("register::what is refused", refusals));
    trials.push(trial("register::unregister", unregister));
    trials.push(trial("register::an apply keeps what was registered", apply));
    trials.push(trial("register::a stale slot never reaches another service", stale_slot));
    trials.push(trial("register::ten thousand names leave nothing", names));
    trials
}

/// A lab with the service `web` behind both prefixes.
fn lab(backend: &str, options: &str) -> Lab {
    let lab = Lab::new(backend);
    lab.daemon.ok(&format!("add-service web --handler registered {options}"));
    lab.daemon.ok(&format!("add-prefix {} --protocol both --service web", PREFIXES.join(" ")));
    lab
}

fn text_at(lab: &Lab, address: &str, port: u16) -> String {
    lab.topology
        .client
        .enter(|| tcp_text(at(address, port)).unwrap_or_else(|error| panic!("{address}:{port}: {error}")))
}

fn expect_unserved(lab: &Lab, address: &str) {
    lab.topology.client.enter(|| expect_tcp_refused(at(address, 80)));
}

fn degraded(daemon: &Daemon) -> String {
    daemon.json("status")["degraded"].to_string()
}

fn wait_for_degraded(daemon: &Daemon, text: &str) {
    wait_for("complaint of status", Duration::from_secs(15), || {
        let degraded = degraded(daemon);
        if degraded.contains(text) { Ok(()) } else { Err(degraded) }
    });
}

fn sockets(daemon: &Daemon, service: &str) -> Vec<Value> {
    let services = daemon.json("services");
    let service = services.as_array().expect("services").iter().find(|it| it["name"] == service);
    service.expect("the service")["sockets"].as_array().expect("its sockets").clone()
}

/// `python3 -m http.server`, dual-stack, as it comes.
fn unmodified_server(backend: &'static str) {
    let lab = lab(backend, "");
    assert!(degraded(&lab.daemon).contains("nobody has registered one"));
    let root = scratch();
    fs::write(root.path().join("index.html"), "it is me").expect("a page");
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "python3", "-m", "http.server", "8080", "--bind", "::", "--directory"]);
    command.arg(root.path()).stdout(Stdio::null()).stderr(Stdio::null());
    let server = Owner::of(lab.topology.host.spawn(command));
    let pid = server.pid();
    wait_for("registration", Duration::from_secs(10), || {
        let outcome = lab.daemon.ctl(&["register", "web", "--pid", &pid.to_string(), "--listen", "tcp:[::]:8080"]);
        if outcome.status == 0 { Ok(()) } else { Err(outcome.to_string()) }
    });
    for (address, client) in [("192.0.2.7", "remote"), ("2001:db8:0:a::7", "remote"), ("192.0.2.8", "local")] {
        lab.at(client).enter(|| {
            let mut stream = tcp(at(address, 443)).expect("a connection");
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n").expect("a request");
            let mut text = String::new();
            stream.read_to_string(&mut text).expect("an answer");
            assert!(text.ends_with("it is me"), "{text}");
        });
    }
    let sockets = sockets(&lab.daemon, "web");
    assert_eq!(sockets.len(), 2, "one for each family: {sockets:?}");
    assert!(sockets.iter().all(|it| it["pid"] == pid && it["cookie"] == sockets[0]["cookie"]), "{sockets:?}");
    let explained = lab.daemon.json("explain 192.0.2.7:443");
    assert_eq!((&explained["verdict"], &explained["socket"]["pid"]), (&json!("steer"), &json!(pid)), "{explained}");
    assert_eq!(explained["socket"]["process"], "python3", "{explained}");
    assert_eq!(degraded(&lab.daemon), "[]");
    let again = lab.daemon.json(&format!("register web --pid {pid} --listen tcp:0.0.0.0:8080"));
    assert_eq!(again["changed"], 0, "the same once more");
}

/// nginx as it comes: new workers have the sockets of the old ones, so nothing registers again.
fn nginx(backend: &'static str) {
    let lab = lab(backend, "");
    let answer = "return 200 \"$server_addr $server_port\";";
    let http = format!("server {{ listen 8080; listen [::]:8080; location / {{ {answer} }} }}");
    let server = Server::nginx_http(&lab.topology.host, &http);
    for listen in ["tcp:0.0.0.0:8080", "tcp:[::]:8080"] {
        wait_for("registration", Duration::from_secs(10), || {
            let outcome = lab.daemon.ctl(&["register", "web", "--pid", &server.pid().to_string(), "--listen", listen]);
            if outcome.status == 0 { Ok(()) } else { Err(outcome.to_string()) }
        });
    }
    let get = |to: SocketAddr| {
        let mut stream = tcp(to)?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok::<_, std::io::Error>(text.lines().last().unwrap_or_default().to_owned())
    };
    let master = server.pid();
    let (failures, served, is_over) = (Mutex::new(Vec::new()), AtomicUsize::new(0), AtomicBool::new(false));
    scope(|scope| {
        let _end = EndOfLoad(&is_over);
        scope.spawn(|| {
            lab.topology.client.enter(|| {
                let mut random = Random::new(&format!("nginx {backend}"));
                while !is_over.load(Relaxed) {
                    let prefix = PREFIXES[served.fetch_add(1, Relaxed) % PREFIXES.len()];
                    let to = SocketAddr::new(random.address(prefix), random.port());
                    match get(to) {
                        Ok(text) if text == format!("{} {}", to.ip(), to.port()) => {}
                        other => failures.lock().expect("a lock").push(format!("{to}: {other:?}")),
                    }
                }
            });
        });
        let at_least = |more: usize| {
            let before = served.load(Relaxed);
            wait_for("clients", Duration::from_secs(20), || {
                if served.load(Relaxed) >= before + more { Ok(()) } else { Err("too few".to_owned()) }
            });
        };
        for _ in 0..5 {
            kill(master, Signal::SIGHUP).expect("a reload");
            at_least(50);
        }
    });
    let failures = failures.into_inner().expect("a lock");
    let served = served.into_inner();
    assert!(failures.is_empty(), "{} of {served} failed, such as {:?}", failures.len(), &failures[..1]);
    assert_eq!(sockets(&lab.daemon, "web").len(), 2);
    assert_eq!(degraded(&lab.daemon), "[]");
}

fn udp_socket(backend: &'static str) {
    let lab = lab(backend, "");
    let socket = lab.topology.host.enter(|| UdpSocket::bind("0.0.0.0:5300")).expect("a UDP socket");
    let request = Request::Register(Register { service: "web".parse().expect("a name"), pid: None });
    send(&register_socket(&lab.daemon), &request, &[socket.as_fd()]).expect("a registration");
    let own = socket.try_clone().expect("a second handle");
    socket.set_read_timeout(Some(Duration::from_secs(5))).expect("a time limit");
    lab.topology.client.enter(|| {
        scope(|scope| {
            // An ordinary socket answers from its own port, so what arrives is looked at here.
            scope.spawn(|| drop(udp(at("192.0.2.9", 53), b"question")));
            let mut buffer = [0; 64];
            let (length, _) = receive(&own, &mut buffer).expect("the question");
            assert_eq!(&buffer[..length], b"question");
            let other = UdpSocket::bind("198.51.100.1:0").expect("a client");
            own.connect(other.local_addr().expect("an address")).expect("connected after it was registered");
        });
    });
    wait_for_degraded(&lab.daemon, "closed it");
}

/// All sockets of a group are found and served, and one stands for them.
fn group(backend: &'static str) {
    let lab = lab(backend, "");
    let program = "import socket, sys, select\n\
        def new(port):\n \
            s = socket.create_server(('127.0.0.1', port), reuse_port=True)\n \
            return s\n\
        first = new(0)\n\
        all = [first, new(first.getsockname()[1]), new(first.getsockname()[1])]\n\
        print(first.getsockname()[1], flush=True)\n\
        while True:\n \
            for s in select.select(all, [], [])[0]:\n  \
                c, _ = s.accept()\n  \
                c.sendall(b'%d' % all.index(s))\n  \
                c.close()\n";
    let owner = Owner::start(&lab.topology.host, &["python3", "-c", program]);
    lab.daemon.ok(&format!("register web --pid {} --listen tcp:127.0.0.1:{}", owner.pid(), owner.port()));
    let served: BTreeSet<String> = (1..=60).map(|port| text_at(&lab, "192.0.2.1", port)).collect();
    assert_eq!(served.len(), 3, "of three members {served:?} served");
    assert_eq!(sockets(&lab.daemon, "web").len(), 1);
}

/// Ends the load also when the test panics.
pub(crate) struct EndOfLoad<'a>(pub(crate) &'a AtomicBool);

impl Drop for EndOfLoad<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// The new process registers before the old one ends, which serves the connections that it has.
fn restarts(backend: &'static str) {
    let lab = lab(backend, "");
    let _log = LogOnPanic(&lab.daemon);
    let host = &lab.topology.host;
    let registering = register_socket(&lab.daemon);
    let take_over = |name: &str| {
        let owner = Owner::greeter(host, name, "127.0.0.1", 0);
        let request = Register { service: "web".parse().expect("a name"), pid: Some(owner.pid()) };
        let socket = owner.socket(host);
        send(&registering, &Request::Register(request), &[socket.as_fd()]).expect("a registration");
        owner
    };
    let failures = Mutex::new(Vec::new());
    let (served, is_over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let mut owner = take_over("0");
    scope(|scope| {
        let _end = EndOfLoad(&is_over);
        for client in 0..3 {
            let (failures, served, is_over, lab) = (&failures, &served, &is_over, &lab);
            scope.spawn(move || {
                lab.topology.client.enter(|| {
                    let mut random = Random::new(&format!("{backend} {client}"));
                    while !is_over.load(Relaxed) {
                        let to = SocketAddr::new(random.address(PREFIXES[0]), random.port());
                        match tcp_text(to) {
                            Ok(text) if text.contains(" at ") => drop(served.fetch_add(1, Relaxed)),
                            other => failures.lock().expect("a lock").push(format!("{to}: {other:?}")),
                        }
                    }
                });
            });
        }
        let mut before = Vec::new();
        for restart in 1..=RESTARTS {
            let old = std::mem::replace(&mut owner, take_over(&restart.to_string()));
            old.signal(Signal::SIGTERM);
            before.push(old);
            if before.len() > 8 {
                before.remove(0).wait_for_end();
            }
        }
        // None is killed in the middle of a handshake.
        before.into_iter().for_each(Owner::wait_for_end);
    });
    let failures = failures.into_inner().expect("a lock");
    let served = served.into_inner();
    assert!(failures.is_empty(), "{} of {served} failed, such as {:?}", failures.len(), &failures[..1]);
    assert!(served > RESTARTS, "only {served} connections");
    assert!(text_at(&lab, "192.0.2.1", 1).starts_with(&RESTARTS.to_string()));
    assert_eq!(degraded(&lab.daemon), "[]");
}

fn owner_ends(backend: &'static str) {
    let lab = lab(backend, "");
    let owner = Owner::greeter(&lab.topology.host, "first", "127.0.0.1", 0);
    let pid = owner.pid();
    lab.daemon.ok(&format!("register web --pid {pid} --fd {}", owner.descriptor()));
    assert!(text_at(&lab, "192.0.2.1", 80).starts_with("first at 80"));
    drop(owner);
    wait_for_degraded(&lab.daemon, &format!("service web has no live socket: its owner, pid {pid} (python3), exited"));
    expect_unserved(&lab, "192.0.2.1");
    wait_for("count of the refusal", Duration::from_secs(5), || {
        let dropped = lab.daemon.count(PREFIXES[0], "dropped");
        if dropped > 0 { Ok(()) } else { Err(format!("{dropped} dropped")) }
    });

    lab.daemon.ok("add-service guarded --handler registered --fallback default");
    lab.daemon.ok("add-prefix 198.51.100.128/25 --service guarded --no-route");
    lab.daemon.ok("remove-prefix 198.51.100.128/25");
    lab.daemon.ok(&format!("remove-prefix {}", PREFIXES.join(" ")));
    lab.daemon.ok(&format!("add-prefix {} --service guarded", PREFIXES.join(" ")));
    assert!(text_at(&lab, "192.0.2.1", 80).starts_with("hello"), "the fallback");
    let owner = Owner::greeter(&lab.topology.host, "second", "127.0.0.1", 0);
    lab.daemon.ok(&format!("register guarded --pid {} --fd {}", owner.pid(), owner.descriptor()));
    assert!(text_at(&lab, "192.0.2.1", 80).starts_with("second"));
    assert!(text_at(&lab, "2001:db8:0:a::1", 80).starts_with("hello"), "nothing is registered for IPv6");
    drop(owner);
    wait_for_degraded(&lab.daemon, "default stands in");
    assert!(text_at(&lab, "192.0.2.1", 80).starts_with("hello"), "the fallback again");
    let refusal = lab.daemon.refused("remove-service default", 1);
    assert!(refusal.contains("fallback of the service guarded"), "{refusal}");
}

fn daemon_restarts(backend: &'static str) {
    let mut lab = lab(backend, "");
    let owner = Owner::greeter(&lab.topology.host, "steady", "::", 0);
    lab.daemon.ok(&format!("register web --pid {} --fd {}", owner.pid(), owner.descriptor()));
    let before = sockets(&lab.daemon, "web");
    // The next servers are not root: root might fetch the sockets out of their owner again.
    let server = lab.daemon.pid();
    kill(server, Signal::SIGKILL).expect("SIGKILL to the process that serves");
    lab.daemon.wait_for_successor(server);
    for what in ["after a crash", "after an upgrade"] {
        assert_eq!(sockets(&lab.daemon, "web"), before, "{what}");
        assert_eq!(degraded(&lab.daemon), "[]", "{what}");
        for address in ["192.0.2.1", "2001:db8:0:a::1"] {
            assert!(text_at(&lab, address, 80).starts_with("steady"), "{what}");
        }
        let outcome = lab.daemon.take_over(&program("anyportd").expect("the program under test"));
        assert_eq!(outcome.status, 0, "{outcome}");
    }
    lab.daemon.stop();
    lab.daemon.restart();
    assert_eq!(sockets(&lab.daemon, "web"), before);
    assert!(text_at(&lab, "192.0.2.1", 80).starts_with("steady"));
    lab.daemon.kill();
    if backend != "tproxy" {
        assert!(text_at(&lab, "192.0.2.1", 80).starts_with("steady"), "its owner lives, and so does the program");
    }
    lab.daemon.restart();
    for address in ["192.0.2.1", "2001:db8:0:a::1"] {
        assert!(text_at(&lab, address, 80).starts_with("steady"));
    }
    lab.daemon.kill();
    let (pid, port) = (owner.pid(), owner.port());
    drop(owner);
    // Another process at the same address is not the one that was registered.
    let stranger = Owner::greeter(&lab.topology.host, "stranger", "::", port);
    lab.daemon.restart();
    assert!(stranger.pid() != pid && sockets(&lab.daemon, "web").is_empty());
    expect_unserved(&lab, "192.0.2.1");
    assert!(degraded(&lab.daemon).contains("closed"), "{}", degraded(&lab.daemon));
}

fn ways() {
    let lab = lab("auto", "");
    let host = &lab.topology.host;
    let owner = Owner::greeter(host, "direct", "127.0.0.1", 0);
    lab.daemon.ok(&format!("register web --pid {} --listen tcp:127.0.0.1:{}", owner.pid(), owner.port()));
    assert!(text_at(&lab, "192.0.2.1", 1).starts_with("direct"));

    // As a unit with PassFileDescriptorsToExec= does: the client ends, and the socket stays with those who have it.
    let (client, control) = (program("anyportctl").expect("the client"), lab.daemon.socket());
    let client = [client.display().to_string(), "register".into(), "web".into(), "--socket".into()];
    let mut words = vec!["python3", "-c", script("supervisor.py")];
    words.extend(client.iter().map(String::as_str));
    let control = control.display().to_string();
    words.push(&control);
    let supervisor = Owner::start(host, &words);
    assert!(supervisor.line.starts_with("0 "), "passed as systemd does: {}", supervisor.line);
    wait_for("owner that lives on", Duration::from_secs(5), || {
        let sockets = sockets(&lab.daemon, "web");
        if sockets[0]["pid"] == supervisor.pid() { Ok(()) } else { Err(format!("{sockets:?}")) }
    });
    assert_eq!(text_at(&lab, "192.0.2.1", 1), "supervisor\n");

    let passer = Owner::start(
        host,
        &["python3", "-c", script("passer.py"), &register_socket(&lab.daemon).display().to_string(), "web"],
    );
    assert!(passer.line.contains("\"status\":200"), "{}", passer.line);
    assert_eq!(text_at(&lab, "192.0.2.1", 1), "passer\n");

    for descriptor in ["30", "900"] {
        let program = format!(
            "import fcntl, os, socket\ns = socket.create_server(('127.0.0.1', 0))\nn = fcntl.fcntl(s.fileno(), fcntl.F_DUPFD, {descriptor})\n\
             p = s.getsockname()[1]\ns.close()\nl = socket.socket(fileno=n)\nprint(p, n, flush=True)\n\
             while True:\n c, _ = l.accept()\n c.sendall(b'high')\n c.close()"
        );
        let high = Owner::start(host, &["python3", "-c", &program]);
        lab.daemon.ok(&format!("register web --pid {} --listen tcp:127.0.0.1:{}", high.pid(), high.port()));
        assert_eq!(text_at(&lab, "192.0.2.1", 1), "high");
    }
}

fn permissions() {
    let lab = Lab::new("auto");
    let open_to_all = |path: &Path| {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("an open directory");
    };
    open_to_all(lab.daemon.socket().parent().expect("a directory"));
    let register = register_socket(&lab.daemon).display().to_string();
    let host = &lab.topology.host;
    // The interpreter may be where a stranger can't read it, so it gives its privileges up by itself.
    let passer = |service: &str| {
        Owner::start(host, &["python3", "-c", script("passer.py"), &register, service, "65533", "4711"])
    };
    lab.daemon.ok("add-service closed --handler registered");
    lab.daemon.ok("add-service user --handler registered --owner user:65533");
    lab.daemon.ok("add-service group --handler registered --owner user:1 --owner group:4711");
    for (service, status) in [("closed", 403), ("user", 200), ("group", 200), ("default", 403), ("absent", 403)] {
        let owner = passer(service);
        assert!(owner.line.contains(&format!("\"status\":{status}")), "{service}: {}", owner.line);
    }
    let owner = passer("user");
    let foreign = Owner::greeter(host, "root's", "127.0.0.1", 0);
    // Wherever the programs were built, this copy can be run by everyone.
    let public = scratch();
    let ctl = public.path().join("anyportctl");
    public_copy(&program("anyportctl").expect("the client"), &ctl);
    open_to_all(public.path());
    let ask = |who: &[&str], arguments: &str| {
        let mut command = Command::new("setpriv");
        command.args(who).arg(&ctl).args(arguments.split(' ')).arg("--socket").arg(lab.daemon.socket());
        host.output(&mut command)
    };
    let as_stranger = |arguments: &str| ask(&STRANGER, arguments);
    let outcome = as_stranger(&format!("register closed --pid {} --fd 3", owner.pid()));
    assert!(outcome.status == 4 && outcome.stderr.contains("may not"), "{outcome}");
    let outcome = as_stranger(&format!("register user --pid {} --fd {}", foreign.pid(), foreign.descriptor()));
    assert!(outcome.status == 4 && outcome.stderr.contains("another user's"), "nobody is a deputy: {outcome}");
    // A process that has the socket all the same may not say that it is another process's.
    let liar = passer(&format!("user:{}", foreign.pid()));
    assert!(liar.line.contains("\"status\":403") && liar.line.contains("another user's"), "{}", liar.line);
    let outcome = as_stranger("unregister closed");
    assert_eq!(outcome.status, 4, "{outcome}");
    let outcome = as_stranger("services");
    assert_eq!(outcome.status, 4, "registering is no right to control: {outcome}");
    let outcome = as_stranger("unregister user");
    assert_eq!(outcome.status, 0, "{outcome}");
    let member = ["--reuid=1", "--regid=1", &format!("--groups={GROUP}")];
    let outcome = ask(&member, "unregister closed");
    assert!(outcome.status == 1 && outcome.stderr.contains("no such socket"), "members may: {outcome}");
}

fn refusals() {
    let lab = lab("auto", "");
    let host = &lab.topology.host;
    let owner = Owner::greeter(host, "me", "127.0.0.1", 0);
    let (pid, port) = (owner.pid(), owner.port());
    for (arguments, status, why) in [
        ("absent --pid PID --fd 3", 1, "add-service absent --handler registered"),
        ("default --pid PID --fd 3", 1, "has the handler hello"),
        ("web --pid 4194303 --fd 3", 1, "no process"),
        ("web --pid PID --fd 77", 2, "not open"),
        ("web --pid PID --fd 0", 2, "not a socket"),
        ("web --pid PID --listen tcp:127.0.0.2:PORT", 1, "over tcp it waits at: tcp 127.0.0.1:PORT"),
        ("web --pid PID --listen udp:127.0.0.1:PORT", 1, "over udp it waits at: nowhere"),
        ("web --pid PID --listen tcp:localhost:80", 2, "tcp:ADDR:PORT"),
        ("web --pid PID", 2, "--listen"),
        ("web --fd 3", 2, "--pid"),
        ("web", 2, "LISTEN_FDS is not set"),
        ("W\u{7}b --pid PID --fd 3", 2, "lower-case"),
    ] {
        let fill = |text: &str| text.replace("PID ", &format!("{pid} ")).replace("PORT", &port.to_string());
        let refusal = lab.daemon.refused(&format!("register {}", fill(&format!("{arguments} "))), status);
        assert!(refusal.contains(&fill(why)) || refusal.contains(why), "{arguments}: {refusal}");
    }
    for (variables, why) in [
        ("LISTEN_FDS=0", "no sockets were passed"),
        ("LISTEN_FDS=x", "no number"),
        ("LISTEN_FDS=1 LISTEN_PID=1", "another process"),
    ] {
        let wrapper: Vec<&str> = ["env"].into_iter().chain(variables.split(' ')).collect();
        let outcome = host.output(&mut lab.daemon.ctl_command(&wrapper, &["register", "web"]));
        assert!(outcome.status == 2 && outcome.stderr.contains(why), "{variables}: {outcome}");
    }
    // The client's namespace is not the daemon's.
    let abroad = Owner::greeter(&lab.topology.client, "abroad", "127.0.0.1", 0);
    for place in [format!("--fd {}", abroad.descriptor()), format!("--listen tcp:127.0.0.1:{}", abroad.port())] {
        let refusal = lab.daemon.refused(&format!("register web --pid {} {place}", abroad.pid()), 2);
        assert!(refusal.contains("another network namespace"), "{refusal}");
    }
    let two = [(); 2].map(|()| host.enter(|| std::net::TcpListener::bind("127.0.0.1:0")).expect("a socket"));
    let request = Request::Register(Register { service: "web".parse().expect("a name"), pid: None });
    let descriptors = two.each_ref().map(|socket| socket.as_fd());
    let problem = send(&register_socket(&lab.daemon), &request, &descriptors).expect_err("two sockets for one place");
    let names = two.each_ref().map(|socket| socket.local_addr().expect("an address").to_string());
    assert!(names.iter().all(|name| problem.error.contains(name)), "both are named: {problem}");
    assert!(sockets(&lab.daemon, "web").is_empty(), "nothing was registered");
}

fn unregister() {
    let lab = lab("auto", "");
    let owner = Owner::greeter(&lab.topology.host, "both", "::", 0);
    let register = format!("register web --pid {} --fd {}", owner.pid(), owner.descriptor());
    lab.daemon.ok(&register);
    let established = lab.topology.client.enter(|| tcp(at("192.0.2.1", 80))).expect("a connection");
    lab.daemon.ok("unregister web --family ipv4");
    let mut text = String::new();
    (&established).read_to_string(&mut text).expect("established connections go on");
    assert!(text.starts_with("both"), "{text}");
    lab.topology.client.enter(|| expect_tcp_refused(at("192.0.2.1", 80)));
    assert!(text_at(&lab, "2001:db8:0:a::1", 80).starts_with("both"), "the other one stays");
    let refusal = lab.daemon.refused("unregister web --protocol udp", 1);
    assert!(refusal.contains("no such socket"), "{refusal}");
    lab.daemon.ok("unregister web");
    lab.daemon.refused("unregister web", 1);
    lab.topology.client.enter(|| expect_tcp_refused(at("2001:db8:0:a::1", 80)));
    lab.daemon.ok(&register);
    assert!(text_at(&lab, "192.0.2.1", 80).starts_with("both"));
}

/// New settings give a service a new slot, to which its sockets go along; and an unconfirmed apply keeps nobody from
/// restarting.
fn apply() {
    let lab = Lab::new("auto");
    let directory = scratch();
    let file = directory.path().join("rules.toml");
    let write = |owners: &str| {
        let prefix = PREFIXES[0];
        let text = format!(
            "[[service]]\nname = \"web\"\nhandler = \"registered\"\nowners = [{owners}]\n[[rule]]\nprefix = \"{prefix}\"\nservice = \"web\"\n"
        );
        fs::write(&file, text).expect("a file of rules");
        file.display().to_string()
    };
    lab.daemon.ok(&format!("apply {}", write("")));
    let owner = Owner::greeter(&lab.topology.host, "one", "127.0.0.1", 0);
    lab.daemon.ok(&format!("register web --pid {} --fd {}", owner.pid(), owner.descriptor()));
    lab.daemon.ok(&format!("apply {} --confirm 2s", write("\"user:1\"")));
    assert!(text_at(&lab, "192.0.2.1", 1).starts_with("one"));
    let next = Owner::greeter(&lab.topology.host, "two", "127.0.0.1", 0);
    lab.daemon.ok(&format!("register web --pid {} --fd {}", next.pid(), next.descriptor()));
    drop(owner);
    wait_for("roll-back", Duration::from_secs(10), || {
        let status = lab.daemon.json("status");
        if status["unconfirmed"].is_null() { Ok(()) } else { Err(status.to_string()) }
    });
    assert!(text_at(&lab, "192.0.2.1", 1).starts_with("two"), "the newest socket, by the rules before");
}

/// A service's slot goes to another one, and the first comes back under its name.
fn stale_slot() {
    let lab = Lab::new("auto");
    let host = &lab.topology.host;
    let owners = ["a", "b"].map(|name| Owner::greeter(host, name, "127.0.0.1", 0));
    let register = |name: &str, owner: &Owner| {
        lab.daemon.ok(&format!("register {name} --pid {} --fd {}", owner.pid(), owner.descriptor()));
    };
    // Slots rest for a while before they are given out again.
    for round in 0..40 {
        lab.daemon.ok("add-service a --handler registered");
        register("a", &owners[0]);
        lab.daemon.ok("remove-service a");
        lab.daemon.ok("add-service b --handler registered");
        lab.daemon.ok(&format!("add-prefix {} --service b", PREFIXES[0]));
        lab.daemon.ok("add-service a --handler registered");
        lab.topology.client.enter(|| expect_tcp_refused(at("192.0.2.1", 1)));
        register("a", &owners[0]);
        lab.topology.client.enter(|| expect_tcp_refused(at("192.0.2.1", 1)));
        register("b", &owners[1]);
        assert!(text_at(&lab, "192.0.2.1", 1).starts_with('b'), "round {round}");
        lab.daemon.ok(&format!("remove-prefix {}", PREFIXES[0]));
        lab.daemon.ok("remove-service a");
        lab.daemon.ok("remove-service b");
    }
}

fn names() {
    let namespace = Netns::new();
    let daemon = Setup::new(&namespace, "sk-lookup").start();
    let owner = Owner::greeter(&namespace, "owner", "127.0.0.1", 0);
    let socket = owner.socket(&namespace);
    let descriptors = || fs::read_dir(format!("/proc/{}/fd", daemon.pid())).expect("descriptors").count();
    let held =
        || namespace.run("bpftool", ["map", "dump", "pinned", &daemon.bpffs().join("sockets").display().to_string()]);
    let come_and_go = |number: usize| {
        let name = format!("name-{number}");
        let body = json!({ "name": name, "handler": "registered" }).to_string();
        let answer = http::request(&daemon.socket(), "POST", "/v1/services", body.as_bytes());
        assert!(answer.0 == 200, "{answer:?}");
        let register = Register { service: name.parse().expect("a name"), pid: Some(owner.pid()) };
        send(&register_socket(&daemon), &Request::Register(register), &[socket.as_fd()]).expect("a registration");
        let answer = http::request(&daemon.socket(), "DELETE", &format!("/v1/services/{name}"), b"");
        assert!(answer.0 == 200, "{answer:?}");
    };
    let memory = || {
        let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).expect("its status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number")
    };
    // Everything that is made once has been made by then.
    (0..NAMES / 10).for_each(come_and_go);
    let before = (held(), memory());
    let descriptors_before = descriptors();
    (NAMES / 10..NAMES).for_each(come_and_go);
    wait_for("as many descriptors as before", Duration::from_secs(5), || {
        let now = descriptors();
        if now <= descriptors_before { Ok(()) } else { Err(format!("{now}, {descriptors_before} before")) }
    });
    assert_eq!(held(), before.0, "sockets in the map");
    let grown = memory().saturating_sub(before.1);
    assert!(grown < 4096, "{grown} KiB more after {NAMES} names");
    assert_eq!(daemon.json("services").as_array().expect("services").len(), 1);
    let kept = fs::read_to_string(daemon.state().join("registered.json")).expect("what is kept");
    assert!(kept.contains("\"sockets\":[]"), "{kept}");
}
