//! The log of connections.

use std::{
    net::{Shutdown, UdpSocket},
    time::Duration,
};

use anyport_tests::{
    dial::{any, expect_tcp_echo, expect_tcp_hello, read_text, tcp, tcp_server, udp_over},
    host::wait_for,
    topology::SERVER,
};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::cases::{Lab, at, trial};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("connections::each is logged at its end", each),
        trial("connections::one of so many is logged", sampled),
        trial("connections::nothing is logged unless it is asked for", none),
    ]
}

/// The logged connections, once there are so many.
fn logged(lab: &Lab, count: usize) -> Vec<Value> {
    wait_for("logged connections", Duration::from_secs(10), || {
        let log = lab.daemon.log();
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let fields = lines.map(|line| line["fields"].clone()).filter(|fields| fields["message"] == "connection");
        let all: Vec<Value> = fields.collect();
        if all.len() == count { Ok(all) } else { Err(format!("{} of {count}: {log}", all.len())) }
    })
}

fn lab(services: &[&str]) -> Lab {
    let lab = Lab::with("sk-lookup", |setup| setup.args(["--log-format", "json"]));
    for (number, service) in services.iter().enumerate() {
        let name = service.split(' ').next().expect("a name");
        lab.daemon.ok(&format!("add-service {service}"));
        lab.daemon.ok(&format!("add-prefix 192.0.2.{number} --protocol both --service {name}"));
    }
    lab
}

/// A field of a connection, as text.
fn field(connection: &Value, name: &str) -> String {
    connection[name].as_str().map_or_else(|| connection[name].to_string(), str::to_owned)
}

fn each() {
    let server = at(SERVER[0], 4_242);
    let lab = lab(&[
        "greet --handler hello --connection-log 1",
        "echo --handler echo --connection-log 1",
        &format!("edge --handler forward --upstream {server} --connection-log 1 --udp idle-timeout=1s"),
        "dead --handler forward --upstream 203.0.113.3:9 --connection-log 1",
    ]);
    let client = &lab.topology.client;
    client.enter(|| expect_tcp_hello(at("192.0.2.0", 80)));
    client.enter(|| expect_tcp_echo(tcp(at("192.0.2.1", 81)).expect("a connection"), &vec![7; 100_000]));
    lab.topology.server.enter(|| tcp_server(server, "an upstream's words"));
    client.enter(|| {
        let mut stream = tcp(at("192.0.2.2", 82)).expect("a connection");
        stream.shutdown(Shutdown::Write).expect("half-close");
        assert_eq!(read_text(&mut stream).expect("words"), "an upstream's words");
    });
    client.enter(|| {
        let refused = tcp(at("192.0.2.3", 83)).and_then(|mut stream| read_text(&mut stream));
        assert!(refused.is_err(), "nobody is there: {refused:?}");
    });
    let upstream = lab.topology.server.enter(|| UdpSocket::bind(server)).expect("a UDP socket");
    std::thread::spawn(move || {
        let mut buffer = [0; 100];
        let (length, from) = upstream.recv_from(&mut buffer).expect("a datagram");
        upstream.send_to(&[&buffer[..length], b"!"].concat(), from).expect("answering");
    });
    client.enter(|| {
        let to = at("192.0.2.2", 84);
        let socket = UdpSocket::bind(any(to.ip())).expect("a UDP socket");
        socket.connect(to).expect("a connected UDP socket");
        assert_eq!(udp_over(&socket, b"hello", Duration::from_secs(5)).expect("an answer"), b"hello!");
    });
    let connections = logged(&lab, 5);
    for (service, expected) in [
        ("greet", ["tcp", "192.0.2.0:80", "null", "0", "closed by both sides"]),
        ("echo", ["tcp", "192.0.2.1:81", "null", "100000", "closed by both sides"]),
        ("dead", ["tcp", "192.0.2.3:83", "null", "0", "no upstream: Connection refused (os error 111)"]),
    ] {
        let connection = connections.iter().find(|it| it["service"] == service).expect("its connection");
        let told = ["protocol", "dialled", "upstream", "from_client", "reason"].map(|name| field(connection, name));
        assert_eq!(told, expected, "{connection}");
    }
    let forwarded =
        |protocol: &str| connections.iter().find(|it| it["service"] == "edge" && it["protocol"] == protocol);
    for (protocol, expected) in [
        ("tcp", ["192.0.2.2:82", "203.0.113.2:4242", "0", "19", "closed by both sides"]),
        ("udp", ["192.0.2.2:84", "203.0.113.2:4242", "5", "6", "closed as idle"]),
    ] {
        let connection = forwarded(protocol).expect("its connection");
        let names = ["dialled", "upstream", "from_client", "to_client", "reason"];
        assert_eq!(names.map(|name| field(connection, name)), expected, "{connection}");
        assert!(field(connection, "client").starts_with("198.51.100.1:"), "{connection}");
        assert!(connection["seconds"].as_f64().is_some_and(|it| it < 10.0), "{connection}");
    }
}

fn sampled() {
    let lab = Lab::with("sk-lookup", |setup| setup.args(["--log-format", "json", "--workers", "1"]));
    lab.daemon.ok("add-service greet --handler hello --connection-log 10");
    lab.daemon.ok("add-prefix 192.0.2.0/24 --service greet");
    for _ in 0..31 {
        lab.topology.client.enter(|| expect_tcp_hello(at("192.0.2.9", 80)));
    }
    assert_eq!(logged(&lab, 4).len(), 4);
    let complaint = lab.daemon.refused("add-service other --handler registered --connection-log 1", 2);
    assert!(complaint.contains("leave connection-log out"), "{complaint}");
    lab.daemon.refused("add-service other --handler hello --connection-log 0", 2);
}

fn none() {
    let lab = lab(&["greet --handler hello"]);
    lab.topology.client.enter(|| expect_tcp_hello(at("192.0.2.0", 80)));
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(logged(&lab, 0).len(), 0);
}
