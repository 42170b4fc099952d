//! Servers of the host itself, bound to the wildcard address and a port at which anyport serves steered addresses.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread::{scope, sleep},
    time::Duration,
};

use anyport_tests::{
    dial::{expect_tcp_echo, expect_tcp_hello, expect_udp_echo, expect_udp_hello, expect_udp_text, tcp, udp_server},
    host::wait_for,
    steady::EndOfWork,
    topology::SERVER,
};
use libtest_mimic::Trial;
use socket2::{Domain, Protocol, Socket, Type};

use crate::cases::{Lab, at, on_each_back_end};

const PORT: u16 = 2_222;
/// Where clients are greeted and the connection is closed from this side; where they are echoed; and where they are forwarded.
const GREETED: [&str; 2] = ["192.0.2.7", "2001:db8:0:a::7"];
const ECHOED: [&str; 2] = ["192.0.2.177", "2001:db8:0:b::7"];
const FORWARDED: [&str; 2] = ["192.0.2.240", "2001:db8:0:c::7"];

pub(crate) fn trials() -> Vec<Trial> {
    on_each_back_end("beside::servers of the host start whatever is steered at their port", servers_start).collect()
}

/// As servers do it.
fn bind(kind: Type, address: IpAddr) -> io::Result<Socket> {
    let address = SocketAddr::new(address, PORT);
    let socket = Socket::new(Domain::for_address(address), kind, None::<Protocol>)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    if kind == Type::STREAM {
        socket.listen(8)?;
    }
    Ok(socket)
}

/// What keeps each server from starting.
fn failures(lab: &Lab) -> Vec<String> {
    let wildcards: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
    lab.topology.host.enter(|| {
        let kinds = wildcards.iter().flat_map(|address| [(Type::STREAM, *address), (Type::DGRAM, *address)]);
        let tried = kinds.map(|(kind, address)| (kind, address, bind(kind, address).map(drop)));
        tried.filter_map(|(kind, address, bound)| Some(format!("{kind:?} {address}: {}", bound.err()?))).collect()
    })
}

fn expect_service(lab: &Lab) {
    lab.topology.client.enter(|| {
        for address in GREETED {
            expect_tcp_hello(at(address, PORT));
            expect_udp_hello(at(address, PORT));
        }
        for address in ECHOED {
            expect_udp_echo(at(address, PORT), b"question");
        }
    });
}

/// What is in the way of a server that does not share: `explain` names it, and doctor by which process. A client keeps asking, since
/// sockets for answers are closed soon.
fn expect_named(lab: &Lab) {
    let is_over = AtomicBool::new(false);
    scope(|scope| {
        let _end = EndOfWork(&is_over);
        scope.spawn(|| {
            while !is_over.load(Relaxed) {
                lab.topology.client.enter(|| expect_udp_echo(at(ECHOED[0], PORT), b"question"));
                sleep(Duration::from_millis(200));
            }
        });
        for (protocol, part) in [("tcp", "2 connections"), ("udp", "sockets for answers")] {
            let held = lab.daemon.json(&format!("explain {protocol} {}", at(ECHOED[0], PORT)))["held"].to_string();
            assert!(held.contains(part) && held.contains("SO_REUSEADDR"), "{protocol}: {held}");
        }
        lab.topology.host.enter(|| {
            for kind in [Type::STREAM, Type::DGRAM] {
                let socket = Socket::new(Domain::IPV4, kind, None::<Protocol>).expect("a socket");
                let bound = socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT)).into());
                assert_eq!(bound.expect_err("a port that is held").kind(), io::ErrorKind::AddrInUse, "{kind:?}");
            }
        });
        let found = held_ports(lab, &format!("--port {PORT}"));
        let pid = format!("anyportd (pid {})", lab.daemon.pid());
        assert!(
            found.len() == 2 && found.iter().all(|it| it.contains(&pid) && it.contains("\"warning\"")),
            "{found:?}"
        );
        assert!(found[0].contains("2 connections") && found[1].contains("sockets for answers"), "{found:?}");
        assert_eq!(["", "--port 9"].map(|it| held_ports(lab, it)), [[""; 0]; 2]);
    });
}

/// What doctor finds that is in the way.
fn held_ports(lab: &Lab, options: &str) -> Vec<String> {
    let mut report = lab.daemon.json(&format!("doctor {options}"));
    let findings = report["findings"].as_array_mut().expect("findings");
    findings.retain(|it| it["check"] == "held-port");
    findings.iter().map(ToString::to_string).collect()
}

fn servers_start(backend: &'static str) {
    let lab = Lab::new(backend);
    let [upstream4, upstream6] = SERVER.map(|address| at(address, 80));
    lab.topology.server.enter(|| {
        for address in [upstream4, upstream6] {
            udp_server(std::net::UdpSocket::bind(address).expect("a server"), "forwarded");
        }
    });
    lab.daemon.ok("add-service echo --handler echo");
    lab.daemon.ok(&format!("add-service forward4 --handler forward --upstream {upstream4}"));
    lab.daemon.ok(&format!("add-service forward6 --handler forward --upstream {upstream6}"));
    lab.daemon.ok("add-prefix 192.0.2.0/25 2001:db8:0:a::/64 --protocol both");
    lab.daemon.ok("add-prefix 192.0.2.176/28 2001:db8:0:b::/64 --protocol both --service echo");
    lab.daemon.ok("add-prefix 192.0.2.240/28 --protocol both --service forward4");
    lab.daemon.ok("add-prefix 2001:db8:0:c::/64 --protocol both --service forward6");

    expect_service(&lab);
    let mut held = lab.topology.client.enter(|| {
        for address in FORWARDED {
            expect_udp_text(at(address, PORT), "forwarded");
        }
        ECHOED.map(|address| tcp(at(address, PORT)).expect("a connection"))
    });
    expect_named(&lab);
    // A process that another test starts has this one's sockets for a moment, closed ones too. What is held here stays.
    wait_for("start of all servers", Duration::from_secs(2), || {
        let failures = failures(&lab);
        if failures.is_empty() { Ok(()) } else { Err(failures.join(", ")) }
    });

    // Both go on beside each other.
    let server = lab.topology.host.enter(|| bind(Type::STREAM, Ipv6Addr::UNSPECIFIED.into())).expect("a server");
    let server = TcpListener::from(server);
    expect_service(&lab);
    for stream in &mut held {
        stream.write_all(b"held").expect("writing");
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).expect("reading");
        assert_eq!(&answer, b"held");
    }
    for stream in held {
        expect_tcp_echo(stream, b"to its end");
    }
    let (mut client, (mut accepted, _)) = lab.topology.host.enter(|| {
        let client = tcp(at("127.0.0.1", PORT)).expect("the host's own server");
        (client, server.accept().expect("a connection"))
    });
    accepted.write_all(b"own").expect("writing");
    drop(accepted);
    let mut text = String::new();
    client.read_to_string(&mut text).expect("reading");
    assert_eq!(text, "own");
}
