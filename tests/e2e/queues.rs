//! Queues of what waits for the workers: how long they are, and what becomes of what finds them full.

use std::{
    net::UdpSocket,
    thread::sleep,
    time::{Duration, Instant},
};

use anyport_tests::dial::any;
use libtest_mimic::Trial;
use socket2::{Domain, Socket, Type};

use crate::cases::{Lab, at, trial};

/// An address that is steered.
const ONE: &str = "192.0.2.201";

pub(crate) fn trials() -> Vec<Trial> {
    vec![trial("queues::what finds them full is told", full)]
}

fn full() {
    let lab = Lab::with("sk-lookup", |setup| {
        setup.namespace().sysctl("net.core.somaxconn", "4");
        setup.args(["--workers", "1"])
    });
    lab.daemon.ok("add-service sink --handler discard");
    lab.daemon.ok(&format!("add-prefix {ONE} --protocol both --service sink"));
    let drops =
        |of: &serde_json::Value| ["listen_drops", "receive_drops"].map(|name| of[name].as_u64().expect("a count"));
    assert_eq!(drops(&lab.daemon.json("status")["totals"]), [0, 0]);
    assert!(!lab.daemon.ok("status").contains("full queues"));
    lab.daemon.pause();
    let sockets: Vec<Socket> = lab.topology.client.enter(|| {
        let dial = |_| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).expect("a socket");
            // It is under way.
            socket.connect(&at(ONE, 80).into()).expect_err("a connection at once");
            socket
        };
        (0..50).map(dial).collect()
    });
    lab.topology.client.enter(|| {
        let socket = UdpSocket::bind(any(at(ONE, 0).ip())).expect("a UDP socket");
        let (begin, datagram) = (Instant::now(), [7; 1_400]);
        for _ in 0..8_000 {
            socket.send_to(&datagram, at(ONE, 80)).expect("sending");
        }
        sleep(Duration::from_secs(2).saturating_sub(begin.elapsed()));
    });
    lab.daemon.resume();
    let [listen, receive] = drops(&lab.daemon.json("status")["totals"]);
    assert!(listen > 0 && receive > 0, "{listen} connections and {receive} datagrams dropped");
    let services = lab.daemon.json("services");
    let sink = services.as_array().expect("services").iter().find(|it| it["name"] == "sink").expect("the service");
    assert!(drops(sink)[0] >= listen && drops(sink)[1] >= receive, "{sink}");
    assert!(lab.daemon.ok("status").contains("full queues"));
    drop(sockets);
}
