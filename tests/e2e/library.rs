//! Programs that are a service by the crate `anyport`: what they see, from where they answer, and restarts.

use std::{
    fs,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::{fd::AsRawFd as _, unix::fs::PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    thread::scope,
    time::Duration,
};

use anyport::{
    Accepted, Datagram, Registration,
    register::{Answer, Request, open},
};
use anyport_tests::{
    daemon::LogOnPanic,
    dial::{PATIENCE, any, receive, tcp_text},
    host::wait_for,
    owners::{Owner, register_socket},
    prerequisites::{example, public_copy, scratch},
    random::Random,
};
use libtest_mimic::Trial;
use nix::sys::{
    signal::Signal,
    socket::{MsgFlags, send},
};
use serde_json::Value;

use crate::{
    cases::{Lab, at, on_each_back_end, trial},
    register::EndOfLoad,
};

const PREFIXES: [&str; 2] = ["192.0.2.0/24", "2001:db8:0:a::/64"];
/// How often the program is restarted under load.
const RESTARTS: usize = 20;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(on_each_back_end("library::a program without privileges is the service", unprivileged));
    trials.extend(on_each_back_end("library::restarts under load", restarts));
    trials.extend(on_each_back_end("library::answers are judged one by one", judged));
    trials.push(trial("library::on tokio", on_tokio));
    trials
}

/// A lab with the service `greeter`, which belongs to a user without privileges.
struct Greeter {
    lab: Lab,
    directory: tempfile::TempDir,
}

impl Greeter {
    fn new(backend: &str) -> Self {
        let lab = Lab::new(backend);
        lab.daemon.ok("add-service greeter --handler registered --owner user:65533");
        lab.daemon.ok(&format!("add-prefix {} --protocol both --service greeter", PREFIXES.join(" ")));
        let directory = scratch();
        for path in [directory.path(), lab.daemon.socket().parent().expect("a directory")] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("an open directory");
        }
        public_copy(&example("service").expect("the example"), &directory.path().join("service"));
        Self { lab, directory }
    }

    fn program(&self) -> PathBuf {
        self.directory.path().join("service")
    }

    /// Starts the program, which registers.
    fn start(&self) -> Owner {
        let (program, control) = (self.program(), register_socket(&self.lab.daemon));
        let text = |path: &Path| path.display().to_string();
        let user = ["--reuid=65533", "--regid=65533", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"];
        let words = ["setpriv", "--pdeathsig", "KILL"].into_iter().chain(user).map(str::to_owned);
        let words: Vec<String> = words.chain([text(&program), "greeter".into(), text(&control)]).collect();
        Owner::start(&self.lab.topology.host, &words.iter().map(String::as_str).collect::<Vec<_>>())
    }
}

/// What a new client at `local` is told by what it dials over UDP, which must be who answers.
fn ask(to: SocketAddr) -> (SocketAddr, String) {
    let client = UdpSocket::bind(any(to.ip())).expect("a client");
    ask_from(&client, to)
}

fn ask_from(client: &UdpSocket, to: SocketAddr) -> (SocketAddr, String) {
    client.set_read_timeout(Some(PATIENCE)).expect("a time limit");
    client.send_to(b"who is there?", to).expect("a question");
    let mut buffer = [0; 512];
    let (length, from) = receive(client, &mut buffer).unwrap_or_else(|error| panic!("no answer from {to}: {error}"));
    assert_eq!(from, to, "who answers");
    (client.local_addr().expect("its address"), String::from_utf8_lossy(&buffer[..length]).into_owned())
}

fn service(lab: &Lab, name: &str) -> Value {
    let services = lab.daemon.json("services");
    services.as_array().expect("services").iter().find(|it| it["name"] == name).expect("the service").clone()
}

fn unprivileged(backend: &'static str) {
    let greeter = Greeter::new(backend);
    let lab = &greeter.lab;
    let owner = greeter.start();
    // A resolver of the host keeps everybody else from binding its port.
    let _taken = lab.topology.host.enter(|| UdpSocket::bind("0.0.0.0:53")).expect("a socket of the host");
    for (address, client) in [("192.0.2.7", "remote"), ("2001:db8:0:a::7", "remote"), ("192.0.2.8", "local")] {
        lab.at(client).enter(|| {
            for port in [1, 53, 31_337] {
                let to = at(address, port);
                let text = tcp_text(to).unwrap_or_else(|error| panic!("{to}: {error}"));
                let end = format!(", you reached {to} over tcp at process {}\n", owner.pid());
                assert!(text.starts_with("hello ") && text.ends_with(&end), "{text}");
                let (_, text) = ask(to);
                assert!(text.contains(&format!("you reached {to} over udp")), "{text}");
            }
        });
    }
    lab.topology.client.enter(|| {
        let client = UdpSocket::bind("198.51.100.1:0").expect("a client");
        let (me, text) = ask_from(&client, at("192.0.2.7", 53));
        assert_eq!(text, format!("hello {me}, you reached 192.0.2.7:53 over udp at process {}\n", owner.pid()));
    });
    let counted = lab.service_after("greeter", 10);
    assert_eq!(counted["unsent"], 0, "{counted}");
    assert!(counted["sockets"].as_array().expect("sockets").iter().all(|it| it["pid"] == owner.pid()), "{counted}");
}

fn restarts(backend: &'static str) {
    let mut greeter = Greeter::new(backend);
    let mut owner = greeter.start();
    let (failures, served, is_over) = (Mutex::new(Vec::new()), AtomicUsize::new(0), AtomicBool::new(false));
    scope(|scope| {
        let _end = EndOfLoad(&is_over);
        let lab = &greeter.lab;
        let _log = LogOnPanic(&lab.daemon);
        for client in 0..2 {
            let (failures, served, is_over) = (&failures, &served, &is_over);
            scope.spawn(move || {
                lab.topology.client.enter(|| {
                    let mut random = Random::new(&format!("{backend} {client}"));
                    while !is_over.load(Relaxed) {
                        let to = SocketAddr::new(random.address(PREFIXES[0]), random.port());
                        match tcp_text(to) {
                            Ok(text) if text.contains(" over tcp") => drop(served.fetch_add(1, Relaxed)),
                            other => failures.lock().expect("a lock").push(format!("{to}: {other:?}")),
                        }
                        ask(to);
                    }
                });
            });
        }
        let mut before = Vec::new();
        for _ in 0..RESTARTS {
            let old = std::mem::replace(&mut owner, greeter.start());
            old.signal(Signal::SIGTERM);
            before.push(old);
        }
        before.into_iter().for_each(Owner::wait_for_end);
    });
    let (failures, served) = (failures.into_inner().expect("a lock"), served.into_inner());
    assert!(failures.is_empty(), "{} of {served} failed, such as {:?}", failures.len(), &failures[..1]);
    assert!(served > RESTARTS, "only {served} connections");

    // Another daemon takes registration and answers up again.
    let answer = |greeter: &Greeter| greeter.lab.topology.client.enter(|| ask(at("192.0.2.1", 53)).1);
    assert!(answer(&greeter).contains(&format!("process {}", owner.pid())));
    greeter.lab.daemon.stop();
    greeter.lab.daemon.restart();
    assert!(answer(&greeter).contains(&format!("process {}", owner.pid())));
}

/// An owner can't send from what is not steered to its service, nor have steered addresses answer each other.
fn judged(backend: &'static str) {
    let lab = Lab::new(backend);
    lab.daemon.ok("add-service greeter --handler registered");
    lab.daemon.ok("add-service other --handler registered");
    lab.daemon.ok("add-prefix 192.0.2.0/25 2001:db8:0:a::/64 --protocol udp --ports 53 --service greeter");
    lab.daemon.ok("add-prefix 192.0.2.128/25 --protocol udp --ports 53 --service other");
    let request = Request::Answer(Answer { service: "greeter".parse().expect("a name") });
    let connection = open(&register_socket(&lab.daemon), &request).expect("a connection for answers");
    let client = lab.topology.client.enter(|| UdpSocket::bind("198.51.100.1:0")).expect("a client");
    client.set_read_timeout(Some(PATIENCE)).expect("a time limit");
    let me = client.local_addr().expect("its address");
    let say = |text: String| {
        send(connection.as_raw_fd(), text.as_bytes(), MsgFlags::empty()).expect("a message");
    };
    for (from, to) in [
        ("192.0.2.1:54", me),
        ("192.0.2.129:53", me),
        ("198.51.100.2:53", me),
        ("203.0.113.1:53", me),
        ("192.0.2.1:53", at("198.51.100.1", 0)),
        ("192.0.2.1:53", at("2001:db8:c::1", 9)),
    ] {
        say(format!("{from} {to}\nforged"));
    }
    say("no ends\n".into());
    for to in ["192.0.2.2:53", "192.0.2.129:53", "192.0.2.1:53"] {
        say(format!("192.0.2.1:53 {to}\nloop"));
    }
    // Nor does anybody get what was not asked for, see `hostile_udp`.
    say(format!("192.0.2.1:53 {me}\nanswer"));
    let counted = wait_for("the last refusal", Duration::from_secs(5), || {
        let counted = service(&lab, "greeter");
        if counted["refused_unsolicited"] == 1 { Ok(counted) } else { Err(counted.to_string()) }
    });
    assert_eq!((&counted["refused_loop"], &counted["unanswerable"]), (&3.into(), &7.into()), "{counted}");
    client.set_nonblocking(true).expect("no waiting");
    receive(&client, &mut [0; 64]).expect_err("nothing was sent");

    // With its rule, the right to send from there is gone at once.
    lab.daemon.ok("remove-prefix 192.0.2.0/25");
    say(format!("192.0.2.1:53 {me}\nanswer"));
    wait_for("refusal", Duration::from_secs(5), || {
        let counted = service(&lab, "greeter");
        if counted["unanswerable"] == 8 { Ok(()) } else { Err(counted.to_string()) }
    });
    // New settings are another service.
    lab.daemon.ok("remove-prefix 2001:db8:0:a::/64");
    lab.daemon.ok("remove-service greeter");
    let error = send(connection.as_raw_fd(), b"192.0.2.1:53 198.51.100.1:9\n", MsgFlags::MSG_NOSIGNAL);
    assert_eq!(error, Err(nix::errno::Errno::EPIPE), "closed with the service");
    let problem = open(&register_socket(&lab.daemon), &request).expect_err("there is no such service");
    assert!(problem.error.contains("no service greeter"), "{problem}");
}

fn on_tokio() {
    let greeter = Greeter::new("auto");
    let lab = &greeter.lab;
    let registration = Registration::new("greeter").expect("a name").at(register_socket(&lab.daemon));
    let (listener, socket) = lab
        .topology
        .host
        .enter(|| (registration.listener().expect("a listener"), registration.udp_socket().expect("a UDP socket")));
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let _context = runtime.enter();
    let listener: anyport::tokio::Listener = listener.try_into().expect("a listener");
    let socket: anyport::tokio::UdpSocket = socket.try_into().expect("a UDP socket");
    let (listener, socket) = (std::sync::Arc::new(listener), std::sync::Arc::new(socket));
    let connections = runtime.spawn({
        let listener = std::sync::Arc::clone(&listener);
        async move {
            let mut dialled: Vec<IpAddr> = Vec::new();
            while let Some(Accepted { stream, dialled: to, .. }) = listener.accept().await.expect("a connection") {
                stream.writable().await.expect("a way to the client");
                stream.try_write(format!("{to}").as_bytes()).expect("a line");
                dialled.push(to.ip());
            }
            dialled
        }
    });
    let datagrams = runtime.spawn({
        let socket = std::sync::Arc::clone(&socket);
        async move {
            let mut buffer = [0; 512];
            while let Some(Datagram { ends, .. }) = socket.recv(&mut buffer).await.expect("a datagram") {
                socket.reply(ends, ends.dialled.to_string().as_bytes()).await.expect("an answer");
            }
        }
    });
    let addresses = ["192.0.2.7", "2001:db8:0:a::7", "192.0.2.9"];
    for address in addresses {
        lab.topology.client.enter(|| {
            let to = at(address, 53);
            assert_eq!(tcp_text(to).expect("a line"), to.to_string());
            assert_eq!(ask(to).1, to.to_string());
        });
    }
    let _successor = greeter.start();
    listener.drain();
    socket.drain();
    let dialled = runtime.block_on(connections).expect("the end of the listener");
    assert_eq!(dialled, addresses.map(|it| it.parse::<IpAddr>().expect("an address")));
    runtime.block_on(datagrams).expect("the end of the UDP socket");
    lab.topology.client.enter(|| assert!(ask(at("192.0.2.7", 53)).1.contains("over udp at process")));
}
