//! The host's own firewall, made by iptables and by nft.

use std::{net::UdpSocket, process::Command, time::Duration};

use anyport_tests::{dial, host::wait_for};
use libtest_mimic::Trial;

use super::{ADDRESSES, Report, V4, V6, expect_not_steered, expect_steered, steering, type_fixes};
use crate::cases::{Lab, at, on_each_back_end, trial};

/// Firewalls that keep clients from `192.0.2.3`, port 80: what makes them, and what is found.
const STOPPING: [(&str, &str, &str, &str); 8] = [
    ("by its policy", "iptables -P INPUT DROP", "broken", "dropped by the firewall: its policy in INPUT"),
    (
        "by its last rule",
        "iptables -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT; iptables -A INPUT -i lo -j ACCEPT; \
         iptables -A INPUT -p tcp --dport 22 -j ACCEPT; iptables -A INPUT -j REJECT",
        "broken",
        "-A INPUT -j REJECT",
    ),
    (
        "by chains of its own",
        "iptables -N allowed; iptables -A allowed -p tcp --dport 22 -j ACCEPT; iptables -A allowed -d 203.0.113.0/24 -j ACCEPT; \
         iptables -A INPUT -j allowed; iptables -P INPUT DROP",
        "broken",
        "its policy in INPUT",
    ),
    (
        "before routing",
        "iptables -t raw -A PREROUTING -d 192.0.2.0/24 -j DROP",
        "broken",
        "PREROUTING of the table raw",
    ),
    (
        "on one port",
        "iptables -A INPUT -p tcp --dport 80 -j DROP; iptables -A INPUT -p udp --dport 80 -j DROP",
        "warning",
        "on port 80",
    ),
    (
        "by translation",
        "iptables -t nat -A PREROUTING -m addrtype --dst-type LOCAL -p tcp --dport 80 -j REDIRECT --to-ports 9",
        "warning",
        "on port 80 gets another destination",
    ),
    (
        "of nftables",
        "nft add table inet f; nft add chain inet f in '{ type filter hook input priority 0; policy drop; }'; \
         nft add rule inet f in icmp type echo-request accept; \
         nft add rule inet f in ct state vmap '{ established : accept, related : accept, invalid : drop }'; \
         nft add rule inet f in iifname lo accept; nft add rule inet f in tcp dport '{ 22, 8000-8100 }' accept; \
         nft add rule inet f in ip protocol icmp accept; nft add rule inet f in meta l4proto ipv6-icmp accept",
        "broken",
        "its policy in in of the table inet f (nft)",
    ),
    (
        "of nftables, by a rule in a chain of its own",
        "nft add table ip f; nft add chain ip f zone; nft add rule ip f zone tcp dport 22 accept; nft add rule ip f zone reject; \
         nft add chain ip f in '{ type filter hook input priority 0; }'; nft add rule ip f in iifname lo accept; \
         nft add rule ip f in ct state established,related accept; nft add rule ip f in goto zone",
        "broken",
        "in zone of the table ip f (nft)",
    ),
];

/// Firewalls that let this client pass, and what is left open then.
const PASSING: [(&str, &str, Option<&str>); 6] = [
    ("that allows the prefix", "iptables -A INPUT -d 192.0.2.0/24 -j ACCEPT; iptables -P INPUT DROP", None),
    (
        "that allows this client",
        "iptables -A INPUT -s 198.51.100.0/24 -j ACCEPT; iptables -P INPUT DROP",
        Some("unless a rule lets it pass before (-A INPUT -s 198.51.100.0/24 -j ACCEPT in INPUT of the table filter)"),
    ),
    (
        "that allows this interface",
        "iptables -A INPUT -i client -j ACCEPT; iptables -P INPUT DROP",
        Some("(-A INPUT -i client -j ACCEPT in INPUT of the table filter)"),
    ),
    ("that drops other clients", "iptables -A INPUT -s 203.0.113.0/24 -j DROP", None),
    (
        "of nftables with ports in a named set",
        "nft add table inet f; nft add set inet f ports '{ type inet_service; flags interval; elements = { 1-65535 }; }'; \
         nft add chain inet f in '{ type filter hook input priority 0; policy drop; }'; \
         nft add rule inet f in icmp type echo-request accept; nft add rule inet f in icmpv6 type '{ nd-neighbor-solicit, nd-neighbor-advert }' accept; \
         nft add rule inet f in ct status dnat accept; nft add rule inet f in tcp dport @ports accept; \
         nft add rule inet f in udp dport @ports accept",
        None,
    ),
    (
        "of nftables that allows the prefix",
        "nft add table inet f; nft add chain inet f in '{ type filter hook input priority 0; policy drop; }'; \
         nft add rule inet f in ip daddr 192.0.2.0/24 accept; nft add rule inet f in ip6 daddr 2001:db8::/32 accept; \
         nft add rule inet f in meta l4proto ipv6-icmp accept",
        None,
    ),
];

pub(super) fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> = on_each_back_end("doctor::a firewall", on_back_end).collect();
    trials.push(trial("tproxy::doctor::what lets packets in leaves refusals as they are", refused_as_before));
    for (name, script, severity, part) in STOPPING {
        trials.push(trial(format!("doctor::a firewall that stops {name}"), move || stopping(script, severity, part)));
    }
    for (name, script, open) in PASSING {
        trials.push(trial(format!("doctor::a firewall {name}"), move || passing(script, open)));
    }
    trials.push(trial("doctor::a rule of another transparent proxy", other_proxy));
    trials
}

fn run(lab: &Lab, script: &str) {
    let outcome = lab.topology.host.output(Command::new("sh").args(["-ec", script]));
    assert!(outcome.status == 0, "{script}: {outcome}");
}

/// Types what all findings of the firewall say.
fn allow(lab: &Lab, report: &Report) {
    for finding in report.findings().iter().filter(|it| it["check"] == "firewall") {
        type_fixes(&lab.topology.host, finding);
    }
}

/// All back ends alike: steered packets pass INPUT.
fn on_back_end(backend: &'static str) {
    let lab = steering(backend);
    Report::of(&lab.daemon).expect_fine("firewall");
    for (tool, addresses) in [("iptables", V4), ("ip6tables", V6)] {
        run(&lab, &format!("{tool} -A INPUT -p {}icmp -j ACCEPT", if tool == "iptables" { "" } else { "ipv6-" }));
        run(&lab, &format!("{tool} -P INPUT DROP"));
        expect_not_steered(&lab, addresses);
        let report = Report::of(&lab.daemon);
        let finding = report.expect("firewall", "broken", "tcp and udp to");
        assert!(finding["finding"].as_str().is_some_and(|it| it.contains(&format!("({tool})"))), "{finding}");
        allow(&lab, &report);
        expect_steered(&lab, addresses);
        Report::of(&lab.daemon).expect_fine("firewall");
    }
}

/// What is typed stands before the chain that refuses, until that is put back in front.
fn refused_as_before() {
    const REFUSED: [&str; 2] = ["192.0.2.77", "2001:db8:0:a::77"];
    let lab = steering("tproxy");
    lab.daemon.ok("add-service nobody --handler registered");
    lab.daemon.ok(&format!("add-prefix {} --protocol both --service nobody", REFUSED.join(" ")));
    let ask = |address| {
        let limit = Duration::from_millis(500);
        lab.topology.client.enter(|| {
            let connected = dial::tcp_within(at(address, 80), limit).map(drop);
            let socket = UdpSocket::bind(dial::any(at(address, 80).ip())).expect("a socket");
            socket.connect(at(address, 80)).expect("a destination");
            [connected, dial::udp_over(&socket, b"question", limit).map(drop)]
        })
    };
    let expect_refused = || {
        for address in REFUSED {
            wait_for("refusals over TCP and UDP", Duration::from_secs(10), || {
                let answers = ask(address);
                let are_refused = answers.iter().all(|it| it.as_ref().is_err_and(dial::is_refusal));
                if are_refused { Ok(()) } else { Err(format!("{address}: {answers:?}")) }
            });
        }
    };
    expect_refused();
    run(&lab, "iptables -P INPUT DROP; ip6tables -P INPUT DROP; ip6tables -A INPUT -p ipv6-icmp -j ACCEPT");
    allow(&lab, &Report::of(&lab.daemon));
    expect_steered(&lab, &ADDRESSES);
    expect_refused();
    let log = lab.daemon.log();
    assert!(log.contains("the jump to it, before all that accepts, from INPUT"), "{log}");
    // As the documents have it.
    run(&lab, "iptables -I INPUT -d 192.0.2.0/24 -j ACCEPT; ip6tables -I INPUT -d 2001:db8:0:a::/64 -j ACCEPT");
    expect_refused();
    expect_steered(&lab, &ADDRESSES);
}

fn stopping(script: &str, severity: &str, part: &str) {
    let lab = steering("sk-lookup");
    expect_steered(&lab, V4);
    run(&lab, script);
    expect_not_steered(&lab, V4);
    let report = Report::of(&lab.daemon);
    let found: Vec<_> = report.findings().iter().filter(|it| it["check"] == "firewall").collect();
    let is_found = |it: &&&serde_json::Value| {
        it["severity"] == severity && it["finding"].as_str().is_some_and(|finding| finding.contains(part))
    };
    assert!(found.iter().any(|it| is_found(&it)), "{part:?} among {found:#?}");
    allow(&lab, &report);
    expect_steered(&lab, V4);
    Report::of(&lab.daemon).expect_fine("firewall");
}

fn passing(script: &str, open: Option<&str>) {
    let lab = steering("sk-lookup");
    run(&lab, script);
    expect_steered(&lab, V4);
    let report = Report::of(&lab.daemon);
    match open {
        Some(part) => drop(report.expect("firewall", "note", part)),
        None => report.expect_fine("firewall"),
    }
}

fn other_proxy() {
    let lab = steering("sk-lookup");
    run(&lab, "iptables -t mangle -A PREROUTING -p tcp -d 192.0.2.0/24 -j TPROXY --on-port 9 --on-ip 127.0.0.1");
    expect_not_steered(&lab, &ADDRESSES[..1]);
    let report = Report::of(&lab.daemon);
    report.expect("firewall", "broken", "taken by another proxy");
    allow(&lab, &report);
    expect_steered(&lab, V4);
    Report::of(&lab.daemon).expect_fine("firewall");
}
