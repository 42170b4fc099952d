//! The way of answers: what `explain` says of it, the mark of a service, and what is counted where there is no way.

use std::{net::TcpStream, time::Duration};

use anyport_tests::{
    dial::{expect_tcp_hello, expect_udp_hello},
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
    let errors = lab.daemon.refused("add-service other --handler registered --mark 0x10", 2);
    assert!(errors.contains("SO_MARK"), "{errors}");
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
