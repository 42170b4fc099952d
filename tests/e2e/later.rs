//! What the host gets while rules are there: addresses inside of a steered prefix, and servers.

use std::{net::TcpListener, process::Command, time::Duration};

use anyport_tests::{
    dial::{expect_tcp_hello, expect_udp_hello, tcp_server, tcp_text},
    host::wait_for,
};
use libtest_mimic::Trial;

use crate::cases::{Lab, at, on_each_back_end};

const LIMIT: Duration = Duration::from_secs(10);
/// What the host gets, each inside of one of the prefixes.
const LATER: [&str; 2] = ["192.0.2.9", "2001:db8:0:a::9"];
const PREFIXES: &str = "192.0.2.0/24 2001:db8:0:a::/64";

pub(crate) fn trials() -> Vec<Trial> {
    let told = on_each_back_end("later::what comes later is told", told);
    told.chain(on_each_back_end("later::addresses that are left to the host", left)).collect()
}

fn degraded(lab: &Lab) -> String {
    lab.daemon.json("status")["degraded"].to_string()
}

fn wait_for_degraded(lab: &Lab, part: &str, is_there: bool) {
    wait_for(&format!("{part:?} in status, or its end"), LIMIT, || {
        let degraded = degraded(lab);
        if degraded.contains(part) == is_there { Ok(()) } else { Err(degraded) }
    });
}

fn change_addresses(lab: &Lab, verb: &str) {
    let [v4, v6] = LATER;
    lab.topology.host.ip(&format!("address {verb} {v4}/32 dev client"));
    let nodad = if verb == "add" { " nodad" } else { "" };
    lab.topology.host.ip(&format!("-6 address {verb} {v6}/128 dev client{nodad}"));
}

fn told(backend: &'static str) {
    let lab = Lab::new(backend);
    let host = &lab.topology.host;
    lab.daemon.ok(&format!("add-prefix {PREFIXES} --protocol both --except 22"));
    // A server of the wildcard address is reached at other addresses of the host, and at ports that are left to it.
    let wildcards = host.enter(|| ["0.0.0.0:8081", "[::]:22"].map(|it| TcpListener::bind(it).expect("a server")));
    for address in LATER {
        lab.topology.client.enter(|| expect_udp_hello(at(address, 53)));
    }
    change_addresses(&lab, "add");
    for (address, prefix) in LATER.into_iter().zip(PREFIXES.split(' ')) {
        wait_for_degraded(
            &lab,
            &format!("the address {address} of client is inside of the steered prefix {prefix}"),
            true,
        );
        lab.topology.client.enter(|| expect_tcp_hello(at(address, 8080)));
    }
    wait_for_degraded(&lab, "tcp 0.0.0.0:8081", true);
    host.enter(|| LATER.map(|address| tcp_server(at(address, 8080), "the host's own\n")));
    for address in LATER {
        wait_for_degraded(&lab, &format!("tcp {} ", at(address, 8080)), true);
        lab.topology.client.enter(|| expect_tcp_hello(at(address, 8080)));
        let explained = lab.daemon.json(&format!("explain {}", at(address, 8080)));
        assert!(explained["shadowed"].to_string().contains(&at(address, 8080).to_string()), "{explained}");
    }
    let status = degraded(&lab);
    assert!(!status.contains(":22 ") && !status.contains("udp "), "{status}");
    assert!(lab.daemon.log().contains("is inside of the steered prefix"), "{}", lab.daemon.log());
    let doctor = lab.daemon.ctl(&["doctor", "--json"]).stdout;
    assert!(doctor.contains("the address 192.0.2.9 of client"), "{doctor}");
    // Those who listen to events hear of it.
    let events = ["--preserve-status", "3"];
    let mut listen = Command::new("timeout");
    let ctl = lab.daemon.ctl_command(&[], &["events", "--json"]);
    listen.args(events).arg(ctl.get_program()).args(ctl.get_args());
    let heard = host.output(&mut listen).stdout;
    assert!(heard.contains("\"note\"") && heard.contains("tcp 192.0.2.9:8080"), "{heard}");

    change_addresses(&lab, "del");
    drop(wildcards);
    wait_for_degraded(&lab, "the address", false);
    wait_for_degraded(&lab, "0.0.0.0:8081", false);
}

fn left(backend: &'static str) {
    let lab = Lab::with(backend, |setup| setup.args(["--own-addresses", "host"]));
    lab.daemon.ok(&format!("add-prefix {PREFIXES} --protocol both"));
    lab.topology.host.enter(|| tcp_server(at("::", 8080), "the host's own\n"));
    change_addresses(&lab, "add");
    let text = |address: &str| {
        let text = lab.topology.client.enter(|| tcp_text(at(address, 8080)));
        text.unwrap_or_else(|error| panic!("{address}: {error}"))
    };
    let wait_for_texts = |begin: &str| {
        for address in LATER {
            wait_for(&format!("{begin:?} from {address}"), LIMIT, || {
                let text = text(address);
                if text.starts_with(begin) { Ok(()) } else { Err(text) }
            });
        }
    };
    wait_for_texts("the host's own");
    for address in LATER {
        let explained = lab.daemon.json(&format!("explain {}", at(address, 8080)));
        assert!(explained["verdict"] == "host" && explained["rule"]["origin"] == "host", "{explained}");
    }
    assert!(text("192.0.2.10").starts_with("hello") && text("2001:db8:0:a::10").starts_with("hello"));
    assert_eq!(degraded(&lab), "[]");
    // A rule about the very address comes before, whether it is there first or not.
    let [v4, v6] = LATER;
    lab.daemon.ok(&format!("add-prefix {v4} {v6} --force"));
    wait_for_texts("hello");
    lab.daemon.ok(&format!("remove-prefix {v4} {v6}"));
    wait_for_texts("the host's own");
    change_addresses(&lab, "del");
    wait_for_texts("hello");
    assert_eq!(lab.daemon.rules().len(), 2);
}
