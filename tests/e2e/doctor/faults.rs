//! Faults that keep packets from their socket.

use std::time::Duration;

use anyport_tests::{
    daemon::Daemon,
    dial::{SILENCE, expect_tcp_hello, tcp_within},
    host::wait_for,
    netns::Netns,
};
use libtest_mimic::Trial;
use serde_json::json;

use super::{ADDRESSES, Report, V4, V6, expect_not_steered, expect_steered, steering, type_fixes, unmended};
use crate::cases::{Family, Lab, at, on_each_back_end, trial};

pub(super) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(on_each_back_end("doctor::local routes that went", missing_routes));
    trials.extend(on_each_back_end("doctor::IPv6 switched off", without_ipv6));
    trials.extend(on_each_back_end("doctor::policy routing before the table local", policy_routing));
    trials.extend(on_each_back_end("doctor::rp_filter", rp_filter));
    trials.extend(on_each_back_end("doctor::src_valid_mark", src_valid_mark));
    trials.extend(on_each_back_end("doctor::bridge-nf-call-iptables", bridge_netfilter));
    trials.push(trial("doctor::--no-route and nobody else routes", no_route));
    trials.push(trial("doctor::a blackhole inside of a steered prefix", blackhole));
    trials.push(trial("doctor::an address inside of a link's network", on_link));
    trials
}

fn missing_routes(backend: &'static str) {
    let lab = unmended(backend);
    Report::of(&lab.daemon).expect_fine("local-routes");
    for family in Family::ALL {
        lab.topology.host.ip(&format!("-{family} route flush table local proto 165"));
    }
    expect_not_steered(&lab, &ADDRESSES);
    let report = Report::of(&lab.daemon);
    let finding = report.expect("local-routes", "broken", "no local route for 192.0.2.0/24, 2001:db8:0:a::/64");
    assert_eq!(finding["fixable"], true);
    type_fixes(&lab.topology.host, finding);
    expect_steered(&lab, &ADDRESSES);
    Report::of(&lab.daemon).expect_fine("local-routes");
    // The same by itself, and back, and back once more, which changes nothing.
    lab.topology.host.ip("route flush table local proto 165");
    let fixed = Report::with(&lab.daemon, &["--fix"]);
    fixed.expect_fine("local-routes");
    assert_eq!(fixed.0["changed"].as_array().map(Vec::len), Some(1), "{:#}", fixed.0);
    assert_eq!(Report::with(&lab.daemon, &["--fix"]).0["changed"], json!([]));
    expect_steered(&lab, &ADDRESSES);
    Report::with(&lab.daemon, &["--undo"]).expect("local-routes", "broken", "no local route for 192.0.2.0/24");
    expect_not_steered(&lab, V4);
    let again = Report::with(&lab.daemon, &["--undo"]);
    assert_eq!(again.0["changed"], json!([]));
}

/// The client asks for the address on its own link, by neighbour solicitation.
fn on_link() {
    const ADDRESS: &str = "2001:db8:c::77";
    let lab = Lab::new("sk-lookup");
    Report::of(&lab.daemon).expect_fine("on-link");
    lab.daemon.ok(&format!("add-prefix {ADDRESS}"));
    let is_answered = || lab.topology.client.enter(|| tcp_within(at(ADDRESS, 80), SILENCE).is_ok());
    assert!(!is_answered());
    let report = Report::of(&lab.daemon);
    let finding = report.expect("on-link", "warning", "2001:db8:c::77/128 is inside of 2001:db8:c::/64 of client");
    let steps = finding["fix"].as_array().expect("steps");
    // What the second one says behind its condition.
    let (_, commands) = steps[1].as_str().and_then(|step| step.split_once(": ")).expect("commands");
    lab.topology.host.run("sh", ["-ec", commands]);
    wait_for("answer for the address", Duration::from_secs(10), || {
        if is_answered() { Ok(()) } else { Err("none comes".to_owned()) }
    });
}

fn no_route() {
    let lab = Lab::new("sk-lookup");
    lab.daemon.ok("add-prefix 192.0.2.0/24 --no-route");
    expect_not_steered(&lab, V4);
    let report = Report::of(&lab.daemon);
    let finding = report.expect("local-routes", "warning", "--no-route");
    // It was not asked for.
    assert_eq!(finding["fixable"], false);
    type_fixes(&lab.topology.host, finding);
    lab.topology.client.enter(|| expect_tcp_hello(at(V4[0], 80)));
    Report::of(&lab.daemon).expect_fine("local-routes");
}

fn blackhole() {
    let lab = steering("sk-lookup");
    lab.topology.host.ip("route add blackhole 192.0.2.3 table local");
    expect_not_steered(&lab, &["192.0.2.3"]);
    expect_steered(&lab, &["192.0.2.4"]);
    Report::of(&lab.daemon).expect("local-routes", "broken", "192.0.2.3/32");
    lab.topology.host.ip("route del blackhole 192.0.2.3 table local");
    Report::of(&lab.daemon).expect_fine("local-routes");
}

fn without_ipv6(backend: &'static str) {
    let lab = steering(backend);
    Report::of(&lab.daemon).expect_fine("ipv6");
    lab.topology.host.sysctl("net.ipv6.conf.lo.disable_ipv6", "1");
    expect_not_steered(&lab, V6);
    let report = Report::of(&lab.daemon);
    report.expect("ipv6", "broken", "switched off on lo");
    report.expect("local-routes", "broken", "2001:db8:0:a::/64");
    // The route can be had only after that.
    let fixed = Report::with(&lab.daemon, &["--fix"]);
    fixed.expect_fine("ipv6");
    fixed.expect_fine("local-routes");
    expect_steered(&lab, V6);
}

fn policy_routing(backend: &'static str) {
    let lab = steering(backend);
    let host = &lab.topology.host;
    Report::of(&lab.daemon).expect_fine("policy-routing");
    host.ip("rule add pref 100 lookup local");
    host.ip("rule del pref 0");
    host.ip("route add blackhole default table 77");
    expect_steered(&lab, V4);
    // In another place, but still the first.
    Report::of(&lab.daemon).expect_fine("policy-routing");
    host.ip("rule add pref 50 to 192.0.2.0/24 lookup 77");
    expect_not_steered(&lab, V4);
    let report = Report::of(&lab.daemon);
    type_fixes(host, report.expect("policy-routing", "broken", "(priority 50) lead 192.0.2.0/24 away"));
    expect_steered(&lab, V4);
    Report::of(&lab.daemon).expect_fine("policy-routing");
    for priority in ["0", "100"] {
        host.ip(&format!("rule del pref {priority}"));
    }
    expect_not_steered(&lab, V4);
    let report = Report::of(&lab.daemon);
    type_fixes(host, report.expect("policy-routing", "broken", "no rule of `ip rule`"));
    expect_steered(&lab, V4);
}

/// A client that is reached by another interface than the one it comes by.
fn rp_filter(backend: &'static str) {
    let lab = steering(backend);
    let (client, host) = (&lab.topology.client, &lab.topology.host);
    client.join(host, ("eth1", &["198.51.100.9/30"]), ("second", &["198.51.100.10/30"]));
    client.ip("address add 203.0.113.129/32 dev lo");
    client.ip("route add 192.0.2.3 via 198.51.100.2 src 203.0.113.129");
    host.ip("route add 203.0.113.129 via 198.51.100.9");
    expect_steered(&lab, V4);
    host.sysctl("net.ipv4.conf.client.rp_filter", "0");
    host.sysctl("net.ipv4.conf.all.rp_filter", "1");
    // Before anybody is harmed there is nothing to say.
    Report::of(&lab.daemon).expect_fine("rp-filter");
    expect_not_steered(&lab, V4);
    let report = Report::of(&lab.daemon);
    let finding = report.expect("rp-filter", "warning", "rp_filter=1 on");
    assert!(finding["finding"].as_str().is_some_and(|it| it.contains("client")), "{finding}");
    let fixed = Report::with(&lab.daemon, &["--fix"]);
    fixed.expect_fine("rp-filter");
    expect_steered(&lab, V4);
    Report::with(&lab.daemon, &["--undo"]).expect("rp-filter", "warning", "rp_filter=1 on");
    assert_eq!(host.run("sysctl", ["-n", "net.ipv4.conf.client.rp_filter"]).trim(), "0");
    expect_not_steered(&lab, V4);
    type_fixes(host, finding);
    expect_steered(&lab, V4);
}

/// Another proxy marks packets and routes them by the mark, as TPROXY is set up everywhere.
fn src_valid_mark(backend: &'static str) {
    let lab = steering(backend);
    let host = &lab.topology.host;
    host.run("iptables", "-t mangle -I PREROUTING -d 192.0.2.0/24 -j MARK --set-mark 1".split(' '));
    host.ip("rule add fwmark 1 lookup 100");
    host.ip("route add local default dev lo table 100");
    expect_steered(&lab, V4);
    Report::of(&lab.daemon).expect_fine("src-valid-mark");
    host.sysctl("net.ipv4.conf.all.src_valid_mark", "1");
    expect_not_steered(&lab, V4);
    let report = Report::of(&lab.daemon);
    type_fixes(host, report.expect("src-valid-mark", "warning", "src_valid_mark=1 on client"));
    expect_steered(&lab, V4);
    Report::of(&lab.daemon).expect_fine("src-valid-mark");
    host.sysctl("net.ipv4.conf.client.src_valid_mark", "1");
    expect_not_steered(&lab, V4);
    Report::with(&lab.daemon, &["--fix"]).expect_fine("src-valid-mark");
    expect_steered(&lab, V4);
}

/// A client behind a bridge, such as a container.
fn bridge_netfilter(backend: &'static str) {
    let (client, host) = (Netns::new(), Netns::new());
    host.ip("link add bridge0 type bridge forward_delay 0");
    host.ip(&format!("link add port type veth peer name eth0 netns {}", client.path()));
    host.ip("link set port master bridge0 up");
    host.ip("link set bridge0 up");
    host.ip("address add 198.51.100.2/24 dev bridge0");
    client.ip("address add 198.51.100.1/24 dev eth0");
    client.ip("link set eth0 up");
    client.ip("route add default via 198.51.100.2");
    host.sysctl("net.bridge.bridge-nf-call-iptables", "0");
    host.sysctl("net.bridge.bridge-nf-call-ip6tables", "0");
    let daemon = Daemon::start(&host, backend);
    daemon.ok("add-prefix 192.0.2.0/24");
    client.enter(|| expect_tcp_hello(at(V4[0], 80)));
    Report::of(&daemon).expect_fine("bridge-netfilter");
    host.sysctl("net.bridge.bridge-nf-call-iptables", "1");
    let report = Report::of(&daemon);
    if backend == "tproxy" {
        client.enter(|| tcp_within(at(V4[0], 80), SILENCE)).expect_err("a connection");
        report.expect("bridge-netfilter", "broken", "bridge0");
        Report::with(&daemon, &["--fix"]).expect_fine("bridge-netfilter");
    } else {
        report.expect_fine("bridge-netfilter");
    }
    client.enter(|| expect_tcp_hello(at(V4[0], 80)));
}
