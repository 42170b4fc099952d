//! Where `forward` leads: names whose addresses change, and upstreams that are steered themselves.

use std::{
    fs, io,
    net::{SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyport_tests::{
    dial::{SILENCE, any, expect_udp_text, first_words, tcp, tcp_server, tcp_text, udp_over, udp_server},
    host::{Running, wait_for},
    netns::Netns,
    prerequisites::scratch,
    topology::{SECOND, SERVER},
};
use libtest_mimic::Trial;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::cases::{Lab, at, on_each_back_end, trial};

const PREFIX: &str = "192.0.2.0/24";
const ONE: &str = "192.0.2.77";
const ONE6: &str = "2001:db8:0:a::77";

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = vec![trial("upstreams::a name whose addresses change", names)];
    trials.extend(on_each_back_end("upstreams::no client comes back for ever", detours));
    trials.push(trial("upstreams::one that answers no datagrams gets no more of them", silent));
    trials.push(trial("upstreams::one without a route costs no datagram", unreachable));
    trials
}

/// A server of names that are in a file. Killed when dropped.
struct Dns {
    process: Running,
    hosts: PathBuf,
}

impl Dns {
    fn start(namespace: &Netns, directory: &Path) -> Self {
        let hosts = directory.join("hosts");
        fs::write(&hosts, "").expect("a file of names");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null"]);
        command.args(["--no-resolv", "--no-hosts", "--user=root", "--log-facility=-", "--listen-address=127.0.0.1"]);
        command.arg("--bind-interfaces");
        command.arg(format!("--addn-hosts={}", hosts.display()));
        command.arg(format!("--pid-file={}", directory.join("pid").display()));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self { process: Running(namespace.spawn(command)), hosts }
    }

    /// Has a name mean this address from now on.
    fn say(&self, name: &str, address: &str) {
        fs::write(&self.hosts, format!("{address} {name}\n")).expect("a file of names");
        kill(Pid::from_raw(self.process.id().try_into().expect("a pid")), Signal::SIGHUP).expect("a signal to it");
    }
}

fn text(lab: &Lab, to: SocketAddr) -> String {
    lab.topology.client.enter(|| tcp_text(to)).unwrap_or_else(|error| error.to_string())
}

fn wait_for_text(lab: &Lab, expected: &str) {
    wait_for(expected, Duration::from_secs(10), || match text(lab, at(ONE, 80)) {
        text if text == expected => Ok(()),
        other => Err(other),
    });
}

/// By the C library's resolver, which asks the servers that its file names.
fn names() {
    let directory = scratch();
    let resolver = directory.path().join("resolv.conf");
    fs::write(&resolver, "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n").expect("a file for the resolver");
    let mount = format!("mount --bind {} /etc/resolv.conf && exec \"$0\" \"$@\"", resolver.display());
    let lab = Lab::with("sk-lookup", |setup| setup.through(["unshare", "--mount", "sh", "-c", &mount]));
    let dns = Dns::start(&lab.topology.host, directory.path());
    for (address, name) in [(SERVER[0], "first"), (SECOND[0], "second"), (SECOND[1], "third")] {
        lab.topology.server.enter(|| tcp_server(at(address, 8080), name));
    }
    lab.daemon.ok("add-service edge --handler forward --upstream origin.example:8080 --resolve-interval 1s");
    lab.daemon.ok(&format!("add-prefix {PREFIX} --service edge"));
    let degraded = || lab.daemon.json("status")["degraded"].to_string();
    dns.say("origin.example", SERVER[0]);
    wait_for_text(&lab, "first");
    assert!(!degraded().contains("does not resolve"), "{}", degraded());
    for (address, name) in [(SECOND[0], "second"), (SECOND[1], "third"), (SERVER[0], "first")] {
        dns.say("origin.example", address);
        wait_for_text(&lab, name);
        for _ in 0..20 {
            assert_eq!(text(&lab, at(ONE, 80)), name, "nobody goes to the address before");
        }
    }
    drop(dns);
    wait_for("complaint", Duration::from_secs(10), || {
        let degraded = degraded();
        let is_told = degraded.contains("the name origin.example does not resolve, its last 1 addresses stay in use");
        if is_told { Ok(()) } else { Err(degraded) }
    });
    assert_eq!(text(&lab, at(ONE, 80)), "first", "the last address stays in use");
}

/// A service that leads to itself, a ring of two, and one that leads to a service which answers.
fn detours(backend: &'static str) {
    let lab = Lab::new(backend);
    let descriptors =
        || fs::read_dir(format!("/proc/{}/fd", lab.daemon.pid())).expect("the daemon's descriptors").count();
    lab.daemon.ok("add-service self --handler forward --upstream 192.0.2.1:*");
    lab.daemon.ok("add-service there --handler forward --upstream 192.0.2.130:80");
    lab.daemon.ok("add-service back --handler forward --upstream 192.0.2.66:80");
    lab.daemon.ok("add-service chain --handler forward --upstream 192.0.2.200:80");
    for (prefix, service) in
        [("192.0.2.0/26", "self"), ("192.0.2.64/26", "there"), ("192.0.2.128/26", "back"), ("192.0.2.224/27", "chain")]
    {
        lab.daemon.ok(&format!("add-prefix {prefix} --protocol both --service {service} --force"));
    }
    lab.daemon.ok("add-prefix 192.0.2.192/27 --protocol both --force");
    let before = descriptors();
    for client in ["remote", "local"] {
        for dialled in ["192.0.2.2", "192.0.2.1", "192.0.2.66", "192.0.2.130"] {
            let to = at(dialled, 80);
            lab.at(client).enter(|| {
                // The reset may be here before anybody looks.
                let outcome = tcp(to).and_then(|mut stream| first_words(&mut stream));
                assert_eq!(outcome.map_err(|error| error.kind()), Err(io::ErrorKind::ConnectionReset), "{dialled}");
                let socket = UdpSocket::bind(any(to.ip())).expect("a client");
                socket.connect(to).expect("a way");
                assert!(udp_over(&socket, b"anyone?", SILENCE).is_err(), "{dialled} answers");
            });
        }
        lab.at(client).enter(|| {
            let text = tcp_text(at("192.0.2.230", 80)).expect("what does not lead back is served");
            assert!(text.contains("you reached 192.0.2.200:80"), "{text}");
        });
    }
    assert!(descriptors() <= before + 8, "{} descriptors, {before} before", descriptors());
    let degraded = lab.daemon.json("status")["degraded"].to_string();
    for (service, upstream) in [("self", "192.0.2.1:80"), ("there", "192.0.2.130:80"), ("back", "192.0.2.66:80")] {
        let complaint = format!("service {service}: the upstream {upstream} gets no clients, since it is steered");
        assert!(degraded.contains(&complaint), "{complaint}: {degraded}");
        assert_eq!(lab.daemon.log().matches(&complaint).count(), 1, "one line in a minute");
    }
    assert!(!degraded.contains("chain"), "{degraded}");
}

/// Of two upstreams one has its port closed. What opens a flow there is lost, until so many failures have put it out.
fn silent() {
    /// As in the default settings.
    const FAILURES: usize = 3;
    const QUESTIONS: usize = 60;
    let lab = Lab::new("sk-lookup");
    for ((upstream, closed), (address, service)) in SERVER.into_iter().zip(SECOND).zip([(ONE, "v4"), (ONE6, "v6")]) {
        let [upstream, closed] = [upstream, closed].map(|it| at(it, 5_353));
        lab.topology.server.enter(|| udp_server(UdpSocket::bind(upstream).expect("a server"), "answer"));
        lab.daemon.ok(&format!("add-service {service} --handler forward --upstream {upstream} --upstream {closed}"));
        lab.daemon.ok(&format!("add-prefix {address} --protocol udp --service {service}"));
        let lost = lab.topology.client.enter(|| {
            let asked = (0..QUESTIONS).map(|_| {
                let socket = UdpSocket::bind(any(address.parse().expect("an address"))).expect("a client");
                socket.connect(at(address, 53)).expect("a client");
                udp_over(&socket, b"question", SILENCE)
            });
            asked.filter(Result::is_err).count()
        });
        assert!((1..=FAILURES).contains(&lost), "{lost} of {QUESTIONS} questions were lost");
        let services = lab.daemon.json("services");
        let shown =
            services.as_array().expect("services").iter().find(|it| it["name"] == service).expect("the service");
        let states: Vec<_> =
            shown["upstreams"].as_array().expect("upstreams").iter().map(|it| it["state"].to_string()).collect();
        assert_eq!(states, ["\"up\"", "\"ejected\""], "{shown}");
    }
}

/// The kernel says at once that there is no way to one of two upstreams.
fn unreachable() {
    let lab = Lab::new("sk-lookup");
    lab.topology.host.ip("route add unreachable 198.18.0.1/32");
    lab.topology.host.ip("-6 route add unreachable 2001:db8:ffff::1/128");
    for ((upstream, away), (address, service)) in
        SERVER.into_iter().zip(["198.18.0.1", "2001:db8:ffff::1"]).zip([(ONE, "v4"), (ONE6, "v6")])
    {
        let [upstream, away] = [upstream, away].map(|it| at(it, 5_353));
        lab.topology.server.enter(|| udp_server(UdpSocket::bind(upstream).expect("a server"), "answer"));
        lab.daemon.ok(&format!("add-service {service} --handler forward --upstream {away} --upstream {upstream}"));
        lab.daemon.ok(&format!("add-prefix {address} --protocol udp --service {service}"));
        lab.topology.client.enter(|| {
            for _ in 0..20 {
                expect_udp_text(at(address, 53), "answer");
            }
        });
    }
}
