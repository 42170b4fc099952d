//! What others remove from the kernel is put back: noticed, repaired, logged and counted.

use std::{fmt::Write as _, path::Path, time::Duration};

use anyport_tests::{
    daemon::Setup,
    dial::{expect_tcp_hello, tcp_text},
    host::wait_for,
    prerequisites::{path_with, xtables},
};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::cases::{Lab, at, on_each_back_end, trial};

/// How long it may take on a busy machine. It is a second or two on others.
const LIMIT: Duration = Duration::from_secs(20);

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(on_each_back_end("changed::what others remove is put back", removals));
    trials.extend(on_each_back_end("changed::what can't be put back is said", lo_down));
    for backend in ["sk-lookup", "tc"] {
        trials.push(trial(format!("{backend}::changed::the directory of the pins"), move || pin_directory(backend)));
    }
    trials.push(trial("tproxy::changed::in the legacy tables, too", legacy));
    trials.push(trial("tproxy::changed::nobody is fought", fight));
    trials.push(trial("tc::changed::interfaces that come and go", interfaces));
    trials
}

/// Something that others do, and the kind of thing that it removes.
struct Removal {
    kind: &'static str,
    line: String,
}

fn removals_of(backend: &str, pins: &Path) -> Vec<Removal> {
    let pins = pins.display();
    let mut removals = vec![
        ("route", "ip route del local 192.0.2.0/24 dev lo".to_owned()),
        ("route", "ip -6 route del local 2001:db8:0:a::/64 dev lo".to_owned()),
        ("route", "ip route flush table local proto 165; ip -6 route flush table local proto 165".to_owned()),
        ("route", "ip link set lo down; ip link set lo up".to_owned()),
        ("route", "ip address del 127.0.0.1/8 dev lo; ip address add 127.0.0.1/8 dev lo".to_owned()),
    ];
    if backend == "tproxy" {
        let in_each = |line: &str| format!("iptables -t mangle {line}; ip6tables -t mangle {line}");
        removals.extend([
            ("chain", in_each("-F ANYPORT")),
            ("chain", in_each("-D PREROUTING -j ANYPORT")),
            ("chain", in_each("-D ANYPORT-RULES 1")),
            ("chain", in_each("-F")),
            ("chain", "iptables -F INPUT; ip6tables -F INPUT".to_owned()),
            ("chain", "iptables -D ANYPORT-REFUSE 1; ip6tables -D ANYPORT-REFUSE 2".to_owned()),
            ("chain", "nft delete table ip mangle; nft delete table ip6 mangle".to_owned()),
            ("set", "for set in $(ipset list -name); do ipset flush $set; done".to_owned()),
            // A set that is in use again, since the chains were put back meanwhile, can't be destroyed.
            (
                "set",
                format!(
                    "for try in 1 2 3 4 5 6 7 8 9; do {}; done=yes; \
                     for set in $(ipset list -name); do ipset destroy $set || done=no; done; \
                     if [ $done = yes ]; then break; fi; done",
                    in_each("-F")
                ),
            ),
        ]);
    } else {
        removals.extend([
            ("link", format!("for link in {pins}/link-*; do bpftool link detach pinned $link; done")),
            ("pin", format!("rm {pins}/link-*")),
            ("pin", format!("rm {pins}/control {pins}/rules {pins}/ports")),
            ("pin", format!("rm -r {pins}/*")),
            ("link", format!("for link in {pins}/link-*; do bpftool link detach pinned $link; rm $link; done")),
            ("table", format!("bpftool map delete pinned {pins}/table key 0 0 0 0")),
            (
                "socket",
                format!(
                    "for slot in 0 1 2 3 4 5 6 7; do bpftool map delete pinned {pins}/sockets key $slot 0 0 0; done"
                ),
            ),
        ]);
    }
    removals.into_iter().map(|(kind, line)| Removal { kind, line }).collect()
}

/// How often things of a kind were put right.
fn mended(status: &Value, kind: &str) -> u64 {
    let all = status["mended"].as_array().expect("what was mended");
    all.iter().find(|it| it["kind"] == kind).map_or(0, |it| it["times"].as_u64().expect("a number"))
}

/// Waits until more of this kind was put right than `before`, and nothing is gone any more.
fn wait_until_mended(lab: &Lab, kind: &str, before: u64, what: &str) {
    wait_for(&format!("mending of {what}"), LIMIT, || {
        let status = lab.daemon.json("status");
        let is_gone = status["degraded"].to_string().contains(" is gone");
        if mended(&status, kind) > before && !is_gone { Ok(()) } else { Err(status.to_string()) }
    });
}

const ADDRESSES: [&str; 4] = ["192.0.2.3", "2001:db8:0:a::3", "198.51.100.107", "2001:db8:0:f::107"];

fn expect_traffic(lab: &Lab) {
    for address in ADDRESSES {
        lab.topology.client.enter(|| expect_tcp_hello(at(address, 1234)));
    }
}

fn wait_for_traffic(lab: &Lab, what: &str) {
    for address in ADDRESSES {
        let greeting = || tcp_text(at(address, 1234)).map_err(|error| error.to_string());
        let answer = wait_for(&format!("traffic after {what}"), LIMIT, || lab.topology.client.enter(greeting));
        assert!(answer.starts_with("hello"), "{answer}");
    }
}

/// With so many prefixes of one kind that tproxy makes sets of them.
fn rules() -> String {
    let mut rules = "192.0.2.0/24 both\n2001:db8:0:a::/64 both\n".to_owned();
    for number in (101..255).step_by(2) {
        let _ = writeln!(rules, "198.51.100.{number}/32\n2001:db8:0:f::{number}/128");
    }
    rules
}

fn start(backend: &str, adapt: impl FnOnce(Setup) -> Setup) -> Lab {
    let lab = Lab::with(backend, adapt);
    let file = lab.daemon.state().join("rules");
    std::fs::write(&file, rules()).expect("writing rules");
    lab.daemon.ok(&format!("apply {}", file.display()));
    lab
}

fn removals(backend: &'static str) {
    let lab = start(backend, |setup| setup);
    expect_traffic(&lab);
    for Removal { kind, line } in removals_of(backend, lab.daemon.bpffs()) {
        let before = mended(&lab.daemon.json("status"), kind);
        lab.topology.host.run("sh", ["-c", &line]);
        wait_until_mended(&lab, kind, before, &line);
        // What was repaired may have been the rest of what the previous line did.
        wait_for_traffic(&lab, &line);
    }
    let log = lab.daemon.log();
    assert!(log.contains("another program removed the local route to 192.0.2.0/24: it is put back"), "{log}");
}

/// Root makes it again. Another user can't, and serves and changes rules all the same.
fn pin_directory(backend: &'static str) {
    for (user, is_made_again) in [("root", true), ("anyport", false)] {
        let mut lab = start(backend, |setup| setup.args(["--user", user]));
        let pins = lab.daemon.bpffs().to_owned();
        std::fs::remove_dir_all(&pins).expect("removing the pins");
        if is_made_again {
            wait_until_mended(&lab, "pin", 0, "the directory");
        } else {
            wait_for("word of the directory", LIMIT, || {
                let degraded = lab.daemon.json("status")["degraded"].to_string();
                let is_told = degraded.contains("the directory of the pins")
                    && degraded.contains("could not be put back")
                    && degraded.contains("a restart of the daemon makes");
                if is_told { Ok(()) } else { Err(degraded) }
            });
        }
        assert_eq!(pins.exists(), is_made_again, "{user}");
        wait_for_traffic(&lab, "the end of the pins");
        lab.daemon.ok("add-prefix 192.0.2.7 --protocol both --ports 9");
        lab.daemon.ok("remove-prefix 192.0.2.7");
        let before = mended(&lab.daemon.json("status"), "route");
        lab.topology.host.ip("route del local 192.0.2.0/24 dev lo");
        wait_for("the route", LIMIT, || {
            let status = lab.daemon.json("status");
            if mended(&status, "route") > before { Ok(()) } else { Err(status.to_string()) }
        });
        wait_for_traffic(&lab, "the end of a route");
        lab.daemon.stop();
        let again = start(backend, |setup| setup.bpffs(&pins).args(["--user", user]));
        expect_traffic(&again);
        assert!(again.daemon.json("status")["degraded"].as_array().is_some_and(Vec::is_empty), "{user}");
    }
}

/// Without `lo` there can be no local routes.
fn lo_down(backend: &'static str) {
    let lab = start(backend, |setup| setup);
    lab.topology.host.ip("link set lo down");
    wait_for("word of the routes", LIMIT, || {
        let degraded = lab.daemon.json("status")["degraded"].to_string();
        if degraded.contains("could not be put back") && degraded.contains("lo up") { Ok(()) } else { Err(degraded) }
    });
    lab.topology.host.ip("link set lo up");
    wait_until_mended(&lab, "route", 0, "lo");
    expect_traffic(&lab);
}

fn legacy() {
    let tools = xtables("legacy");
    let lab = start("tproxy", |setup| setup.env("PATH", path_with(tools.path())));
    for line in ["-F ANYPORT", "-D PREROUTING -j ANYPORT"] {
        let before = mended(&lab.daemon.json("status"), "chain");
        lab.topology.host.run("sh", ["-c", &format!("iptables-legacy -t mangle {line}")]);
        wait_until_mended(&lab, "chain", before, line);
        expect_traffic(&lab);
    }
}

/// Who removes the jump again and again gets the last word for a while, and `status` says so.
fn fight() {
    let lab = start("tproxy", |setup| setup);
    let host = &lab.topology.host;
    let foreign = ["-t", "mangle", "-A", "PREROUTING", "-p", "icmp", "-j", "ACCEPT"];
    host.run("iptables", foreign);
    wait_for("word of the fight", LIMIT * 3, || {
        let status = lab.daemon.json("status");
        host.run("sh", ["-c", "iptables -t mangle -D PREROUTING -j ANYPORT 2>/dev/null || true"]);
        let degraded = status["degraded"].to_string();
        if degraded.contains("removed by others and put back 5 times since") { Ok(()) } else { Err(status.to_string()) }
    });
    let before = mended(&lab.daemon.json("status"), "chain");
    wait_until_mended(&lab, "chain", before, "the jump, after a pause");
    expect_traffic(&lab);
    let shown = host.run("iptables", ["-t", "mangle", "-S", "PREROUTING"]);
    assert!(shown.contains("-A PREROUTING -p icmp -j ACCEPT"), "{shown}");
}

fn interfaces() {
    let lab = start("tc", |setup| setup);
    let watched = |lab: &Lab| lab.daemon.json("status")["interfaces"].to_string();
    lab.topology.host.ip("link add late0 up type veth peer name late1");
    wait_for("watch at late0", LIMIT, || {
        let watched = watched(&lab);
        if watched.contains("late0") { Ok(()) } else { Err(watched) }
    });
    lab.topology.host.ip("link del late0");
    wait_for("end of late0", LIMIT, || {
        let watched = watched(&lab);
        if watched.contains("late0") { Err(watched) } else { Ok(()) }
    });
    let status = lab.daemon.json("status");
    assert!(mended(&status, "interface") == 2 && status["degraded"].as_array().is_some_and(Vec::is_empty), "{status}");
    expect_traffic(&lab);
}
