//! The way of answers: what `explain` says of it, the mark of a service, and what is counted where there is no way.

use std::{
    io::ErrorKind,
    net::{TcpStream, UdpSocket},
    thread::sleep,
    time::Duration,
};

use anyport_tests::{
    dial::{any, expect_tcp_hello, expect_tcp_refused, expect_udp_hello, is_refusal, tcp_within, udp_over},
    host::wait_for,
};
use libtest_mimic::Trial;

use crate::cases::{Lab, at, on_each_back_end, trial};

/// Steered to a service that marks its answers, and to one that does not.
const MARKED: [&str; 2] = ["192.0.2.3", "2001:db8:0:a::3"];
const UNMARKED: [&str; 2] = ["192.0.2.203", "2001:db8:0:b::3"];
const CLIENT: [&str; 2] = ["198.51.100.1", "2001:db8:c::1"];

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials: Vec<_> = on_each_back_end("answers::by mark, or not at all", by_mark).collect();
    trials.extend(on_each_back_end("answers::another way than packets come by", another_way));
    trials.extend(on_each_back_end("answers::by the mark of the packet that is answered", by_packet));
    trials.push(trial("answers::tc and an interface that it does not watch", unwatched));
    trials
}

fn by_mark(backend: &'static str) {
    let lab = Lab::new(backend);
    let host = &lab.topology.host;
    lab.daemon.ok("add-service marked --handler hello --mark 0x10");
    lab.daemon.ok("add-prefix 192.0.2.0/25 2001:db8:0:a::/64 --protocol both --service marked");
    lab.daemon.ok("add-prefix 192.0.2.128/25 2001:db8:0:b::/64 --protocol both");
    let services = lab.daemon.json("services");
    let marks = services.as_array().expect("services").iter().map(|it| it["mark"].as_str());
    assert_eq!(marks.collect::<Vec<_>>(), [None, Some("0x10")], "{services}");
    for (ip, client) in ["ip", "ip -6"].into_iter().zip(CLIENT) {
        host.run("sh", ["-c", &format!("{ip} rule add pref 100 to {client} fwmark 0/0x10 prohibit")]);
    }
    for ((marked, unmarked), client) in MARKED.into_iter().zip(UNMARKED).zip(CLIENT) {
        lab.topology.client.enter(|| {
            expect_tcp_hello(at(marked, 80));
            expect_udp_hello(at(marked, 80));
            let unanswered = TcpStream::connect_timeout(&at(unmarked, 80), Duration::from_millis(500));
            assert!(unanswered.is_err(), "{unmarked} answers");
        });
        let from = at(client, 40_000);
        let explain = |to: &str| lab.daemon.json(&format!("explain {} --from {from}", at(to, 80)));
        let answer = explain(marked)["answer"].clone();
        assert!(answer["interface"] == "client" && answer["mark"] == "0x10", "{answer}");
        let answer = explain(unmarked)["answer"].clone();
        assert!(answer["interface"].is_null() && answer["text"].to_string().contains("prohibit"), "{answer}");
    }
    let status = wait_for("count of what found no route", Duration::from_secs(5), || {
        let status = lab.daemon.ok("status");
        if status.contains("no route    for ") { Ok(status) } else { Err(status) }
    });
    assert!(status.contains("unanswered") && !status.contains("full queues"), "{status}");
    let wait_for_degraded = |is_there: bool| {
        wait_for("answers that get lost, or their end", Duration::from_secs(20), || {
            let degraded = lab.daemon.json("status")["degraded"].to_string();
            if degraded.contains("clients get no answers") == is_there { Ok(()) } else { Err(degraded) }
        });
    };
    wait_for_degraded(true);
    let doctor = lab.daemon.ctl(&["doctor"]).stdout;
    assert!(doctor.contains("clients get no answers") && doctor.contains("real-hosts.md#answers"), "{doctor}");
    wait_for_degraded(false);
    // Another program of the host has no route.
    let before = lab.daemon.json("status")["totals"]["no_route"].as_u64().expect("a count");
    let refused = host.enter(|| TcpStream::connect(at("198.18.0.1", 80)));
    assert!(refused.is_err_and(|error| error.kind() == ErrorKind::NetworkUnreachable));
    sleep(Duration::from_secs(3));
    let status = lab.daemon.json("status");
    assert!(status["totals"]["no_route"].as_u64().expect("a count") > before, "{status}");
    assert_eq!(status["degraded"].to_string(), "[]");
    let errors = lab.daemon.refused("add-service other --handler registered --mark 0x10", 2);
    assert!(errors.contains("SO_MARK"), "{errors}");
}

/// The kernel keeps for answers the mark that the firewall has given the packet, as far as it is told to.
fn by_packet(backend: &'static str) {
    const REFUSED: u16 = 22;
    let lab = Lab::new(backend);
    let (host, client) = (&lab.topology.host, &lab.topology.client);
    lab.daemon.ok("add-service marked --handler hello --mark 0x10");
    lab.daemon.ok("add-prefix 192.0.2.0/25 2001:db8:0:a::/64 --protocol both --service marked --except 22");
    lab.daemon.ok("add-prefix 192.0.2.128/25 2001:db8:0:b::/64 --protocol both --except 22");
    for (ip, tables, to) in [("ip", "iptables", CLIENT[0]), ("ip -6", "ip6tables", CLIENT[1])] {
        // In front of the jump to the chains of tproxy: what those take goes no further in that table.
        let mark = format!("{tables} -t mangle -I PREROUTING -i client -j MARK --or-mark 0x20");
        let prohibit = format!("{ip} rule add pref 100 to {to} fwmark 0/0x20 prohibit");
        host.run("sh", ["-ec", &format!("{mark}; {prohibit}")]);
    }
    let limit = Duration::from_millis(500);
    let connect = |address: &str, port: u16| client.enter(|| tcp_within(at(address, port), limit));
    let expect_silence = |address: &str, port: u16| {
        let connected = connect(address, port);
        assert!(connected.as_ref().is_err_and(|it| !is_refusal(it)), "{address} port {port}: {connected:?}");
    };
    let is_datagram_refused = |address: &str| {
        client.enter(|| {
            let socket = UdpSocket::bind(any(at(address, 0).ip())).expect("a socket");
            socket.connect(at(address, REFUSED)).expect("a destination");
            udp_over(&socket, b"question", limit).is_err_and(|error| is_refusal(&error))
        })
    };
    for address in UNMARKED {
        expect_silence(address, 80);
        expect_silence(address, REFUSED);
        assert!(!is_datagram_refused(address), "{address}");
    }
    host.sysctl("net.ipv4.tcp_fwmark_accept", "1");
    for (marked, unmarked) in MARKED.into_iter().zip(UNMARKED) {
        client.enter(|| expect_tcp_hello(at(unmarked, 80)));
        // A mark of the service's own comes first, and that is another one.
        expect_silence(marked, 80);
        expect_silence(unmarked, REFUSED);
        let answer = client.enter(|| {
            let socket = UdpSocket::bind(any(at(unmarked, 0).ip())).expect("a socket");
            socket.connect(at(unmarked, 80)).expect("a destination");
            udp_over(&socket, b"question", limit)
        });
        assert!(answer.is_err(), "{unmarked} answers a datagram");
    }
    for name in ["net.ipv4.fwmark_reflect", "net.ipv6.fwmark_reflect"] {
        host.sysctl(name, "1");
    }
    for address in UNMARKED {
        client.enter(|| expect_tcp_refused(at(address, REFUSED)));
        assert!(is_datagram_refused(address), "{address}");
    }
}

fn another_way(backend: &'static str) {
    let lab = Lab::new(backend);
    lab.daemon.ok("add-prefix 192.0.2.0/24");
    let explain = |more: &str| lab.daemon.json(&format!("explain 192.0.2.3:80 --from 203.0.113.2:40000 {more}"));
    let explained = explain("--via client");
    let text = explained["answer"]["text"].to_string();
    assert!(explained["verdict"] == "steer" && text.contains("the packet comes by client"), "{explained}");
    assert!(!explain("--via server")["answer"]["text"].to_string().contains("comes by"));
    lab.topology.host.sysctl("net.ipv4.conf.client.rp_filter", "1");
    let explained = explain("--via client");
    assert!(explained["verdict"] == "drop" && explained["reason"] == "filtered", "{explained}");
    assert_eq!(explain("--via server")["verdict"], "steer");
    let outcome = lab.daemon.ctl(&["explain", "192.0.2.3:80", "--from", "203.0.113.2:40000", "--via", "none"]);
    assert!(outcome.status == 1 && outcome.stderr.contains("there is no interface none"), "{outcome}");
    lab.topology.host.ip("route add blackhole 198.18.0.0/15");
    let explained = lab.daemon.json("explain 192.0.2.3:80 --from 198.18.0.1:40000");
    assert!(explained["answer"]["text"].to_string().contains("blackhole"), "{explained}");
    let explained = lab.daemon.json("explain 192.0.2.3:80 --from 198.19.255.255:40000");
    assert!(explained["answer"]["interface"].is_null(), "{explained}");
    assert!(lab.daemon.json("explain 192.0.2.3:80")["answer"].is_null());
}

fn unwatched() {
    let lab = Lab::with("tc", |setup| setup.args(["--interface", "client"]));
    lab.daemon.ok("add-prefix 192.0.2.0/24");
    let reason = |via: &str| lab.daemon.json(&format!("explain 192.0.2.3:80 --via {via}"))["reason"].clone();
    assert_eq!([reason("client"), reason("server")], ["steered", "unwatched"]);
}
