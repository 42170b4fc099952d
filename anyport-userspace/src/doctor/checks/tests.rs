//! Faults that no namespace of this machine can have: other kernels, other devices, the host's own limits.

use std::fs;

use serde_json::json;

use super::{back_ends, conntrack, netkit, reuseport, sk_lookup_programs};
use crate::doctor::{Daemon, Finding, Host, Link, Severity, Steered};

/// A host with these files below `/proc`.
fn with_files(files: &[(&str, &str)], test: impl FnOnce(Host)) {
    let proc = tempfile::tempdir().unwrap();
    for (file, content) in files {
        let path = proc.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    test(Host::unknown(proc.path()));
}

/// A daemon that steers one prefix.
fn daemon(backend: &str, workers: usize) -> Daemon {
    let status = json!({
        "version": "0.1.0", "pid": 1, "backend": backend, "backends": [], "generation": 1, "workers": workers,
        "rules": 1, "max_rules": 1, "bytes": 0, "services": 1, "interfaces": [], "draining": [], "degraded": [],
        "totals": {"steered": 0, "dropped": 0, "denied": 0, "refused": 0, "unmatched": 0, "active": 0, "listen_drops": 0,
            "receive_drops": 0},
    });
    let steered = Steered {
        prefix: "192.0.2.0/24".parse().unwrap(),
        protocol: crate::rules::Protocol::Tcp,
        ports: "1-65535".parse().unwrap(),
        route: true,
    };
    Daemon { status: serde_json::from_value(status).unwrap(), steered: vec![steered] }
}

fn expect(found: &[Finding], severity: Severity, part: &str) {
    let [finding] = found else { panic!("{found:?}") };
    assert!(finding.severity == severity && finding.finding.contains(part), "{finding:?}");
    assert!(finding.severity == Severity::Note || !finding.fix.is_empty(), "{finding:?}");
}

#[test]
fn groups_of_sockets_with_tc_need_linux_6_6() {
    for (release, backend, workers, is_broken) in [
        ("6.5.0-14-generic\n", "tc", 2, true),
        ("5.15.0\n", "tc", 8, true),
        ("6.5.0\n", "tc", 1, false),
        ("6.5.0\n", "sk-lookup", 2, false),
        ("6.6.1\n", "tc", 2, false),
        ("6.18.0-rc1\n", "tc", 2, false),
    ] {
        with_files(&[("sys/kernel/osrelease", release)], |mut host| {
            host.daemon = Ok(daemon(backend, workers));
            let found = reuseport::look(&host).unwrap();
            assert_eq!(!found.is_empty(), is_broken, "{release} {backend} {workers}: {found:?}");
            if is_broken {
                expect(&found, Severity::Broken, &format!("{workers} workers"));
            }
        });
    }
}

#[test]
fn netkit_matters_to_tc_alone() {
    with_files(&[], |mut host| {
        let link = |name: &str, kind: &str| Link { name: name.into(), kind: kind.into(), ..Link::default() };
        for (kind, backend, is_found) in [("netkit", "tc", true), ("veth", "tc", false), ("netkit", "sk-lookup", false)]
        {
            host.links = Ok(vec![link("lo", ""), link("pod7", kind)]);
            host.daemon = Ok(daemon(backend, 1));
            let found = netkit::look(&host).unwrap();
            assert_eq!(!found.is_empty(), is_found, "{kind} {backend}: {found:?}");
            if is_found {
                expect(&found, Severity::Warning, "pod7");
            }
        }
    });
}

#[test]
fn a_full_table_of_connections_is_broken_and_one_that_fills_up_a_warning() {
    for (count, severity) in [("799", None), ("800", Some(Severity::Warning)), ("1000", Some(Severity::Broken))] {
        let files = [("sys/net/netfilter/nf_conntrack_count", count), ("sys/net/netfilter/nf_conntrack_max", "1000")];
        with_files(&files, |mut host| {
            host.daemon = Ok(daemon("sk-lookup", 1));
            let found = conntrack::look(&host).unwrap();
            match severity {
                None => assert_eq!(found, []),
                Some(severity) => {
                    expect(&found, severity, &format!("{count} of at most 1000"));
                    assert_eq!(found[0].fix[0], "iptables -t raw -I PREROUTING -d 192.0.2.0/24 -j CT --notrack");
                }
            }
        });
    }
    // A kernel without connection tracking.
    with_files(&[], |host| assert_eq!(conntrack::look(&host).unwrap(), []));
}

#[test]
fn back_ends_of_other_kernels() {
    with_files(&[], |mut host| {
        back_ends::look(&host).unwrap_err();
        host.programs = Ok([true, true]);
        assert_eq!(back_ends::look(&host).unwrap(), []);
        host.programs = Ok([false, true]);
        expect(&back_ends::look(&host).unwrap(), Severity::Note, "no sk_lookup");
        // There is nothing in its PATH.
        host.programs = Ok([false, false]);
        expect(&back_ends::look(&host).unwrap(), Severity::Broken, "no back end");
        let mut daemon = daemon("tproxy", 1);
        daemon.status.backends = serde_json::from_value(json!([
            {"name": "sk-lookup", "usable": false, "reason": "CAP_BPF"}, {"name": "tproxy", "usable": true, "reason": ""}
        ]))
        .unwrap();
        host.daemon = Ok(daemon);
        expect(&back_ends::look(&host).unwrap(), Severity::Note, "sk-lookup is not used: CAP_BPF");
    });
}

#[test]
fn the_kernel_takes_64_sk_lookup_programs() {
    with_files(&[], |mut host| {
        for (attached, is_full) in [(0, false), (63, false), (64, true)] {
            host.sk_lookup = Ok(vec!["foreign".into(); attached]);
            let found = sk_lookup_programs::look(&host).unwrap();
            assert_eq!(!found.is_empty(), is_full, "{attached}: {found:?}");
        }
        host.daemon = Ok(daemon("tc", 1));
        assert_eq!(sk_lookup_programs::look(&host).unwrap(), []);
    });
}
