//! What is too small, in the way only under load, or not as it was left.

use std::{
    fs,
    os::unix::fs::{chown, symlink},
    process::Command,
};

use anyport_tests::{
    dial::expect_tcp_hello,
    prerequisites::{scratch, xtables},
};
use libtest_mimic::Trial;

use super::{ADDRESSES, Report, V4, expect_steered, steering, type_fixes, unmended};
use crate::cases::{Lab, at, trial};

pub(super) fn trials() -> Vec<Trial> {
    vec![
        trial("doctor::short queues", short_queues),
        trial("doctor::handshakes without cookies", without_cookies),
        trial("doctor::no room in TIME_WAIT", time_wait),
        trial("doctor::few descriptors", few_descriptors),
        trial("doctor::nonlocal bind", nonlocal_bind),
        trial("doctor::tools of tproxy that are missing", missing_tools),
        trial("doctor::what the daemon says itself", degraded),
        trial("doctor::--undo leaves what others have set since", undo_leaves),
        trial("doctor::--undo takes no orders of others", undo_of_others),
        trial("doctor::in another network namespace", elsewhere),
    ]
}

fn short_queues() {
    let lab = steering("sk-lookup");
    Report::of(&lab.daemon).expect_fine("backlog");
    lab.topology.host.sysctl("net.core.somaxconn", "128");
    let report = Report::of(&lab.daemon);
    type_fixes(&lab.topology.host, report.expect("backlog", "warning", "net.core.somaxconn=128"));
    Report::of(&lab.daemon).expect_fine("backlog");
}

fn without_cookies() {
    let lab = steering("sk-lookup");
    lab.topology.host.sysctl("net.ipv4.tcp_max_syn_backlog", "64");
    Report::of(&lab.daemon).expect_fine("backlog");
    lab.topology.host.sysctl("net.ipv4.tcp_syncookies", "0");
    Report::of(&lab.daemon).expect("backlog", "warning", "net.ipv4.tcp_max_syn_backlog=64");
    Report::with(&lab.daemon, &["--fix"]).expect_fine("backlog");
    assert_eq!(lab.topology.host.run("sysctl", ["-n", "net.ipv4.tcp_syncookies"]).trim(), "1");
}

/// The service is the first to close, and so it is the host that remembers.
fn time_wait() {
    let lab = steering("sk-lookup");
    lab.topology.host.sysctl("net.ipv4.tcp_max_tw_buckets", "4");
    Report::of(&lab.daemon).expect_fine("time-wait");
    for _ in 0..8 {
        lab.topology.client.enter(|| expect_tcp_hello(at(ADDRESSES[0], 80)));
    }
    let report = Report::of(&lab.daemon);
    let finding = report.expect("time-wait", "warning", "of at most 4");
    assert!(!finding["finding"].as_str().is_some_and(|it| it.contains(" 0 had no room")), "{finding}");
    Report::with(&lab.daemon, &["--fix"]).expect_fine("time-wait");
}

fn few_descriptors() {
    let lab = Lab::with("sk-lookup", |setup| setup.through(["prlimit", "--nofile=512:512", "--"]));
    Report::of(&lab.daemon).expect("descriptors", "warning", "may have 512");
    Report::of(&Lab::new("sk-lookup").daemon).expect_fine("descriptors");
}

fn nonlocal_bind() {
    let lab = steering("sk-lookup");
    lab.topology.host.sysctl("net.ipv6.ip_nonlocal_bind", "1");
    let report = Report::of(&lab.daemon);
    let finding = report.expect("nonlocal-bind", "note", "ip_nonlocal_bind=1");
    assert_eq!(Report::with(&lab.daemon, &["--fix"]).0["changed"], serde_json::json!([]), "a note is not fixed");
    type_fixes(&lab.topology.host, finding);
    Report::of(&lab.daemon).expect_fine("nonlocal-bind");
    expect_steered(&lab, &ADDRESSES);
}

fn missing_tools() {
    let lab = steering("tproxy");
    Report::of(&lab.daemon).expect_fine("tools");
    let report = |path: &std::path::Path| {
        let mut command: Command = lab.daemon.ctl_command(&[], &["doctor", "--json"]);
        Report::read(&lab.topology.host.output(command.env("PATH", path)))
    };
    let iptables = xtables("nft");
    report(iptables.path()).expect("tools", "note", "ipset");
    let nothing = scratch();
    let report = report(nothing.path());
    let of_tools: Vec<_> = report.findings().iter().filter(|it| it["check"] == "tools").collect();
    assert!(of_tools.len() == 2 && of_tools[0]["severity"] == "broken", "{of_tools:#?}");
    // Without tools, nobody can say that the chain is gone.
    assert!(report.findings().iter().all(|it| it["check"] != "attached"), "{:#}", report.0);
}

fn degraded() {
    let lab = steering("sk-lookup");
    Report::of(&lab.daemon).expect_fine("daemon");
    lab.daemon.ok("add-service web --handler registered");
    lab.daemon.ok("add-prefix 192.0.2.128/25 --service web");
    Report::of(&lab.daemon).expect("daemon", "broken", "no live socket");
    lab.daemon.ok("remove-prefix 192.0.2.128/25");
    Report::of(&lab.daemon).expect_fine("daemon");
}

fn undo_leaves() {
    let lab = unmended("sk-lookup");
    let host = &lab.topology.host;
    host.sysctl("net.core.somaxconn", "128");
    host.ip("route flush table local proto 165");
    let fixed = Report::with(&lab.daemon, &["--fix"]);
    // The daemon notices a little later.
    assert!(fixed.findings().iter().all(|it| it["check"] == "daemon"), "{:#}", fixed.0);
    host.sysctl("net.core.somaxconn", "8192");
    let undone = Report::with(&lab.daemon, &["--undo"]);
    undone.expect("local-routes", "broken", "192.0.2.0/24");
    assert_eq!(host.run("sysctl", ["-n", "net.core.somaxconn"]).trim(), "8192");
    assert!(undone.0["changed"].to_string().contains("another program has set it"), "{:#}", undone.0);
    Report::with(&lab.daemon, &["--fix"]);
    expect_steered(&lab, V4);
}

/// The directory of the control socket may belong to the daemon's user, who must not get root's privileges by it.
fn undo_of_others() {
    let lab = steering("sk-lookup");
    lab.topology.host.sysctl("net.core.somaxconn", "128");
    Report::with(&lab.daemon, &["--fix"]).expect_fine("backlog");
    let journal = lab.daemon.socket().with_file_name("doctor.json");
    let text = fs::read_to_string(&journal).expect("a journal");
    let refused = |part: &str| {
        let outcome = lab.daemon.ctl(&["doctor", "--undo"]);
        assert!(outcome.status == 1 && outcome.stderr.contains(part), "{part:?}: {outcome}");
        assert_eq!(lab.topology.host.run("sysctl", ["-n", "net.core.somaxconn"]).trim(), "4096");
    };
    chown(&journal, Some(1), None).expect("another owner");
    refused("belongs to the user 1");
    fs::remove_file(&journal).expect("to remove it");
    fs::write(&journal, text.replace("net/core/somaxconn", "net/../kernel/hostname")).expect("a journal");
    refused("no parameter of the network");
    fs::write(&journal, text.replace("\"namespace\": ", "\"namespace\": 1")).expect("a journal");
    refused("another network namespace");
    fs::write(&journal, "nonsense").expect("a journal");
    refused("doctor.json");
    fs::write(&journal, &text).expect("a journal");
    // Nor is a link followed to where the next one is written.
    let target = lab.daemon.state().join("target");
    symlink(&target, journal.with_extension("new")).expect("a link");
    Report::with(&lab.daemon, &["--undo"]).expect("backlog", "warning", "net.core.somaxconn=128");
    Report::with(&lab.daemon, &["--fix"]).expect_fine("backlog");
    assert!(!target.exists(), "the link was followed");
}

fn elsewhere() {
    let lab = steering("sk-lookup");
    let outcome = lab.topology.client.output(&mut lab.daemon.ctl_command(&[], &["doctor"]));
    assert!(outcome.status == 1 && outcome.stderr.contains("another network namespace"), "{outcome}");
    assert!(outcome.stderr.contains(&format!("nsenter --net=/proc/{}/ns/net", lab.daemon.pid())), "{outcome}");
}
