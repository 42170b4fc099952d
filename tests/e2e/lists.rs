//! Lists of sources that services take or do not take.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd as _,
    thread,
    time::Duration,
};

use anyport::register::{Register, Request, send, socket_beside};
use anyport_tests::{
    dial::{QUESTION, expect_tcp_line, is_refusal, tcp, tcp_from, udp_over},
    netns::Netns,
    prerequisites::scratch,
    topology::{CLIENT, SECOND, SERVER},
};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::cases::{Family, Lab, at, on_each_back_end, trial};

/// A steered prefix of each family.
const PREFIX: [&str; 2] = ["192.0.2.0/24", "2001:db8:0:a::/64"];
/// Addresses in them.
const ONE: [&str; 2] = ["192.0.2.201", "2001:db8:0:a::201"];
/// Where the client is, and where the server is with both of its addresses.
const OF_CLIENT: [&str; 2] = ["198.51.100.0/24", "2001:db8:c::/64"];
const OF_SERVER: [&str; 2] = ["203.0.113.0/24", "2001:db8:d::/64"];

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(on_each_back_end("lists::the longest prefix decides", decide));
    trials.extend(on_each_back_end("lists::a change leaves connections alone and is kept", change));
    for backend in ["sk-lookup", "tc"] {
        trials.push(trial(format!("{backend}::lists::registered sockets"), move || registered(backend)));
    }
    trials.push(trial("lists::tproxy can't keep sources from registered sockets", registered_with_tproxy));
    trials
}

/// Whether a client at this address of a host is served over TCP; if not, it is told at once.
fn takes_tcp(host: &Netns, from: &str, to: SocketAddr) -> bool {
    let served = host.enter(|| tcp_from(at(from, 0), to)).and_then(|mut stream| {
        stream.write_all(b"?")?;
        stream.read_exact(&mut [0])
    });
    let is_told = |error: &io::Error| {
        is_refusal(error) || matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
    };
    served.inspect_err(|error| assert!(is_told(error), "from {from} to {to}: {error}")).is_ok()
}

fn takes_udp(host: &Netns, from: &str, to: SocketAddr) -> bool {
    let socket = host.enter(|| UdpSocket::bind(at(from, 0))).expect("a UDP socket");
    socket.connect(to).is_ok_and(|()| udp_over(&socket, QUESTION, Duration::from_millis(400)).is_ok())
}

/// Which of the client and the server's first and second address a service allows.
fn taken(lab: &Lab, to: &str, family: Family) -> [bool; 3] {
    let (client, server) = (&lab.topology.client, &lab.topology.server);
    let hosts = [(client, CLIENT), (server, SERVER), (server, SECOND)];
    hosts.map(|(host, from)| {
        let (from, to) = (family.of(from), at(to, 4_000));
        let takes = takes_tcp(host, from, to);
        assert_eq!(takes_udp(host, from, to), takes, "from {from} to {to} over UDP, not over TCP");
        takes
    })
}

fn denied(lab: &Lab, name: &str) -> u64 {
    let services = lab.daemon.json("services");
    let service = services.as_array().expect("services").iter().find(|it| it["name"] == name).expect("the service");
    service["denied"].as_u64().expect("a count")
}

fn decide(backend: &'static str) {
    let lab = Lab::new(backend);
    let deny = format!("{},{}", SERVER[0], SERVER[1]);
    let services = [
        ("all", String::new(), [true, true, true]),
        ("allow", format!("--source-allow {} --source-allow {}", OF_CLIENT[0], OF_CLIENT[1]), [true, false, false]),
        ("deny", format!("--source-deny {deny}"), [true, false, true]),
        (
            "both",
            format!("--source-allow {},{} --source-deny {deny}", OF_SERVER[0], OF_SERVER[1]),
            [false, false, true],
        ),
        ("other", "--source-allow 10.0.0.0/8".to_owned(), [false, false, false]),
    ];
    for (number, (name, settings, expected)) in (1..).zip(services) {
        lab.daemon.ok(&format!("add-service {name} --handler echo {settings}"));
        for family in Family::ALL {
            let one = family.of([format!("192.0.2.{number}"), format!("2001:db8:0:a::{number}")]);
            lab.daemon.ok(&format!("add-prefix {one} --protocol both --service {name}"));
            assert_eq!(taken(&lab, &one, family), expected, "{name}, IPv{family}");
            // Once more, since a datagram from the same source may have been taken for a flow.
            assert_eq!(taken(&lab, &one, family), expected, "{name}, IPv{family}");
            if backend != "tproxy" {
                let prefix = family.of([format!("{one}/32"), format!("{one}/128")]);
                let refused = expected.iter().filter(|it| !**it).count() as u64;
                assert!(lab.daemon.count(&prefix, "denied") >= 4 * refused, "{name}");
                assert_eq!(lab.daemon.count(&prefix, "dropped"), lab.daemon.count(&prefix, "denied"));
            }
            for (from, is_taken) in [CLIENT, SERVER, SECOND].map(|it| family.of(it)).into_iter().zip(expected) {
                let brackets = |address: &str, port: u16| at(address, port).to_string();
                let explained =
                    lab.daemon.json(&format!("explain tcp {} --from {}", brackets(&one, 80), brackets(from, 1234)));
                let reason = if is_taken { "steered" } else { "denied" };
                assert_eq!((&explained["reason"], &explained["service"]), (&reason.into(), &name.into()));
                assert_eq!(explained["sources"].is_null(), name == "all", "{explained}");
                let notes = explained["notes"].as_array().expect("notes");
                assert!(!notes.iter().any(|it| it.to_string().contains("otherwise")), "{explained}");
            }
        }
        assert_eq!(denied(&lab, name) > 0, expected.contains(&false), "{name}");
    }
    let text = lab.daemon.ok(&format!("explain 192.0.2.3:80 --from {}:1234", SERVER[0]));
    assert!(text.contains("does not take 203.0.113.2") && text.contains("source-deny 203.0.113.2/32"), "{text}");
    assert!(lab.daemon.ok("status").contains("of sources that services do not take"));
}

fn change(backend: &'static str) {
    let mut lab = Lab::new(backend);
    let directory = scratch();
    let file = directory.path().join("services.toml");
    let apply = |lab: &Lab, lists: &str, status: i32| {
        let rules = PREFIX.map(|it| format!("[[rule]]\nprefix = \"{it}\"\nprotocol = \"both\"\nservice = \"edge\"\n"));
        let service = format!("[[service]]\nname = \"edge\"\nhandler = \"echo\"\n{lists}\n");
        fs::write(&file, service + &rules.concat()).expect("a file");
        let outcome = lab.daemon.ctl(&["apply", &file.display().to_string()]);
        assert_eq!(outcome.status, status, "{outcome}");
    };
    let check = |lab: &Lab, expected: [bool; 3]| {
        for family in Family::ALL {
            assert_eq!(taken(lab, family.of(ONE), family), expected, "IPv{family}");
        }
    };
    apply(&lab, "", 0);
    check(&lab, [true; 3]);
    let mut kept: Vec<TcpStream> =
        ONE.iter().map(|one| lab.topology.client.enter(|| tcp(at(one, 80)).expect("a connection"))).collect();
    for stream in &mut kept {
        expect_tcp_line(stream, "before");
    }
    let deny = format!("source-deny = [\"{}\", \"{}\"]", OF_CLIENT[0], OF_CLIENT[1]);
    apply(&lab, &deny, 0);
    check(&lab, [false, true, true]);
    for stream in &mut kept {
        expect_tcp_line(stream, "after");
    }
    for lists in ["source-deny = [\"10.0.0.1/8\"]", "source-allow = [\"10.0.0.0/8\"]\nsource-deny = [\"10.0.0.0/8\"]"] {
        apply(&lab, lists, 2);
    }
    check(&lab, [false, true, true]);
    lab.daemon.stop();
    lab.daemon.restart();
    check(&lab, [false, true, true]);
    let allow = format!("source-allow = [\"{}\", \"{}\"]", OF_CLIENT[0], OF_CLIENT[1]);
    apply(&lab, &allow, 0);
    check(&lab, [true, false, false]);
}

fn registered(backend: &'static str) {
    let lab = Lab::new(backend);
    lab.daemon.ok(&format!("add-service web --handler registered --source-deny {}", SERVER[0]));
    lab.daemon.ok(&format!("add-prefix {} --service web", PREFIX[0]));
    let listener = lab.topology.host.enter(|| TcpListener::bind("127.0.0.1:8080")).expect("a listener");
    let request = Register { service: "web".parse().expect("a name"), pid: None };
    let registering = socket_beside(&lab.daemon.socket());
    send(&registering, &Request::Register(request), &[listener.as_fd()]).expect("a registration");
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            // Clients may be gone.
            stream.write_all(b"!").ok();
        }
    });
    let to = at(ONE[0], 80);
    assert!(takes_tcp(&lab.topology.client, CLIENT[0], to));
    assert!(!takes_tcp(&lab.topology.server, SERVER[0], to));
    assert!(takes_tcp(&lab.topology.server, SECOND[0], to));
    assert_eq!(denied(&lab, "web"), 1);
}

fn registered_with_tproxy() {
    let lab = Lab::new("tproxy");
    let before: Value = lab.daemon.json("services");
    let complaint = lab.daemon.refused("add-service web --handler registered --source-deny 10.0.0.0/8", 2);
    assert!(complaint.contains("nobody would keep sources from registered sockets"), "{complaint}");
    assert_eq!(lab.daemon.json("services"), before);
}
