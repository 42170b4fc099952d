//! What the host gets while rules are there: addresses inside of a steered prefix, and servers.

use std::{fs, net::TcpListener, process::Command, time::Duration};

use anyport_tests::{
    dial::{expect_tcp_echo, expect_tcp_hello, expect_udp_hello, tcp, tcp_from, tcp_server, tcp_text},
    host::wait_for,
    netns::Netns,
    prerequisites::scratch,
};
use libtest_mimic::Trial;

use crate::cases::{Lab, at, on_each_back_end};

const LIMIT: Duration = Duration::from_secs(10);
/// What the host gets, each inside of one of the prefixes.
const LATER: [&str; 2] = ["192.0.2.9", "2001:db8:0:a::9"];
const PREFIXES: &str = "192.0.2.0/24 2001:db8:0:a::/64";
/// Another host inside of them, which a route of its own leads to.
const BEYOND: [&str; 2] = ["192.0.2.40", "2001:db8:0:a::40"];
/// And resolvers, and neighbours.
const RESOLVERS: [&str; 2] = ["192.0.2.53", "2001:db8:0:a::53"];
const NEIGHBOURS: [&str; 2] = ["192.0.2.41", "2001:db8:0:a::41"];

pub(crate) fn trials() -> Vec<Trial> {
    let told = on_each_back_end("later::what comes later is told", told);
    told.chain(on_each_back_end("later::others that are cut off are told", cut_off))
        .chain(on_each_back_end("later::addresses that are left to the host", left))
        .collect()
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
    expect_note(&lab, "tcp 192.0.2.9:8080");

    change_addresses(&lab, "del");
    drop(wildcards);
    wait_for_degraded(&lab, "the address", false);
    wait_for_degraded(&lab, "0.0.0.0:8081", false);
}

/// Those who listen to events hear of it.
fn expect_note(lab: &Lab, part: &str) {
    let mut listen = Command::new("timeout");
    let ctl = lab.daemon.ctl_command(&[], &["events", "--json"]);
    listen.args(["--preserve-status", "3"]).arg(ctl.get_program()).args(ctl.get_args());
    let heard = lab.topology.host.output(&mut listen).stdout;
    assert!(heard.contains("\"note\"") && heard.contains(part), "{heard}");
}

/// Gateways, resolvers, neighbours and the other ends of connections.
fn cut_off(backend: &'static str) {
    let directory = scratch();
    let resolver = directory.path().join("resolv.conf");
    let name = |resolvers: [&str; 2]| {
        let [v4, v6] = resolvers;
        fs::write(&resolver, format!("nameserver {v4}\nnameserver {v6}\n")).expect("a file for the resolver");
    };
    name(["127.0.0.1", "::1"]);
    let mount = format!("mount --bind {} /etc/resolv.conf && exec \"$0\" \"$@\"", resolver.display());
    let lab = Lab::with(backend, |setup| setup.through(["unshare", "--mount", "sh", "-c", &mount]));
    let host = &lab.topology.host;
    lab.daemon.ok("add-service echo --handler echo");
    lab.daemon.ok(&format!("add-prefix {PREFIXES} --protocol both --service echo"));
    // Clients on the host itself are served, and others are reached by routes of their own.
    let served = host.enter(|| {
        [tcp(at("192.0.2.60", 80)), tcp_from(at("203.0.113.1", 0), at("192.0.2.60", 80))]
            .map(|stream| stream.expect("a connection"))
    });
    let commands: [Vec<String>; 2] = ["add", "del"].map(|verb| {
        let by = |address: &&str| format!("route {verb} {address} dev server table local");
        BEYOND.iter().map(by).collect()
    });
    commands[0].iter().for_each(|command| drop(host.ip(command)));
    let held = connect(host, &lab.topology.server);
    for (network, gateway) in ["198.18.0.0/15", "2001:db8:f::/48"].into_iter().zip(BEYOND) {
        host.ip(&format!("route add {network} via {gateway} dev server"));
    }
    name(RESOLVERS);
    for (resolver, neighbour) in RESOLVERS.into_iter().zip(NEIGHBOURS) {
        host.ip(&format!("neigh add {neighbour} lladdr 02:00:00:00:00:41 dev server nud permanent"));
        wait_for_degraded(&lab, &format!("the resolver {resolver} is inside"), true);
        wait_for_degraded(&lab, &format!("the neighbour {neighbour} on server is inside"), true);
    }
    for reached in BEYOND.into_iter().chain(["192.0.2.60"]) {
        assert!(!degraded(&lab).contains(reached), "{}", degraded(&lab));
    }

    let cut_off = BEYOND.map(|it| [format!("the gateway {it} is"), format!("connection tcp {}", at(it, 22))]);
    commands[1].iter().for_each(|command| drop(host.ip(command)));
    cut_off.iter().flatten().for_each(|part| wait_for_degraded(&lab, part, true));
    assert!(lab.daemon.log().contains("the gateway 192.0.2.40 is inside"), "{}", lab.daemon.log());
    let doctor = lab.daemon.ctl(&["doctor", "--json"]).stdout;
    assert!(doctor.contains("the gateway 192.0.2.40 is inside") && doctor.contains("real-hosts.md"), "{doctor}");
    expect_note(&lab, "the resolver 192.0.2.53");

    // What it says to type helps, as does a rule about the very address.
    commands[0].iter().for_each(|command| drop(host.ip(command)));
    cut_off.iter().flatten().for_each(|part| wait_for_degraded(&lab, part, false));
    let [v4, v6] = NEIGHBOURS;
    lab.daemon.ok(&format!("add-prefix {v4} {v6} --protocol both --service echo --force"));
    name(["127.0.0.1", "::1"]);
    wait_for("end of all that was told", LIMIT, || {
        let degraded = degraded(&lab);
        if degraded == "[]" { Ok(()) } else { Err(degraded) }
    });
    for stream in served {
        expect_tcp_echo(stream, b"served all the time");
    }
    drop(held);
}

/// Connections of the host with another one.
fn connect(host: &Netns, other: &Netns) -> impl Sized {
    for address in BEYOND {
        let nodad = if address.contains(':') { " nodad" } else { "" };
        other.ip(&format!("address add {address} dev eth0{nodad}"));
    }
    BEYOND.map(|address| {
        let listener = other.enter(|| TcpListener::bind(at(address, 22))).expect("a server");
        let stream = host.enter(|| tcp(at(address, 22))).expect("a connection");
        (stream, listener.accept().expect("a connection"))
    })
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
