//! Faults that no namespace of this machine can have: other kernels, other devices, the host's own limits.

use std::fs;

use serde_json::json;

use super::{back_ends, conntrack, daemon as of_daemon, modules, netkit, on_link, sk_lookup_programs};
use crate::{
    back_end::BackEnd,
    doctor::{Daemon, Finding, Host, Link, Severity, Steered, host::Tried},
    host::InterfaceAddress,
};

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
fn prefixes_inside_of_a_link_s_network() {
    let arp = |value| [("sys/net/ipv4/conf/all/arp_ignore", "0"), ("sys/net/ipv4/conf/eth0/arp_ignore", value)];
    for (address, network, steered, arp_ignore, expected) in [
        ("2001:db8::1", "2001:db8::/64", "2001:db8::/96", "0", Some("neighbour solicitations")),
        ("2001:db8::1", "2001:db8::/64", "2001:db8::77/128", "0", Some("neighbour solicitations")),
        ("2001:db8::1", "2001:db8::/64", "2001:db8:1::/96", "0", None),
        ("2001:db8::1", "2001:db8::/64", "2001:db8::/48", "0", None),
        ("192.0.2.1", "192.0.2.0/24", "192.0.2.64/26", "0", None),
        ("192.0.2.1", "192.0.2.0/24", "192.0.2.64/26", "1", Some("arp_ignore")),
        ("192.0.2.1", "192.0.2.0/24", "198.51.100.0/24", "1", None),
    ] {
        with_files(&arp(arp_ignore), |mut host| {
            let own = InterfaceAddress {
                address: address.parse().unwrap(),
                network: network.parse().unwrap(),
                interface: "eth0".to_owned(),
                has_broadcast: true,
            };
            let mut daemon = daemon("sk-lookup", 1);
            daemon.steered[0].prefix = steered.parse().unwrap();
            host.daemon = Ok(daemon);
            host.addresses = Ok(vec![own]);
            let found = on_link::look(&host).unwrap();
            match expected {
                None => assert_eq!(found, [], "{steered}"),
                Some(part) => expect(&found, Severity::Warning, part),
            }
            let is_single = steered.ends_with("/128");
            assert_eq!(found.iter().any(|it| it.fix.iter().any(|step| step.contains("neigh add proxy"))), is_single);
        });
    }
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
        let tried = |all: &[(BackEnd, Option<&str>)]| {
            let tried = |it: &(BackEnd, Option<&str>)| Tried { back_end: it.0, failure: it.1.map(ToOwned::to_owned) };
            Ok(all.iter().map(tried).collect())
        };
        host.back_ends = tried(&[(BackEnd::SkLookup, None)]);
        assert_eq!(back_ends::look(&host).unwrap(), []);
        let (sk, tc) = ((BackEnd::SkLookup, Some("unknown func")), (BackEnd::Tc, Some("the kernel has no tcx")));
        host.back_ends = tried(&[sk, (BackEnd::Tc, None)]);
        expect(&back_ends::look(&host).unwrap(), Severity::Note, "sk-lookup is not used: unknown func");
        host.back_ends = tried(&[sk, tc, (BackEnd::Tproxy, None)]);
        let found = back_ends::look(&host).unwrap();
        assert!(found.len() == 2 && found.iter().all(|it| it.why.starts_with("tproxy steers instead")), "{found:?}");
        // There is nothing in its PATH.
        host.back_ends = tried(&[sk, tc, (BackEnd::Tproxy, Some("not in PATH"))]);
        let found = back_ends::look(&host).unwrap();
        expect(
            &found,
            Severity::Broken,
            "no back end works here. sk-lookup: unknown func; tc: the kernel has no tcx; tproxy: not",
        );
        assert_eq!(found[0].fix, ["apt-get install iptables"]);
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
fn modules_of_other_kernels() {
    const DEP: &str = "kernel/net/netfilter/xt_TPROXY.ko: kernel/net/ipv4/netfilter/nf_tproxy_ipv4.ko\n\
                       kernel/net/ipv4/netfilter/nf_tproxy_ipv4.ko:\nkernel/net/netfilter/xt_socket.ko.xz:\n\
                       kernel/net/netfilter/xt_multiport.ko.zst:\nkernel/net/netfilter/xt-comment.ko:\n\
                       kernel/net/netfilter/nft_compat.ko:\nkernel/net/ipv4/tcp_diag.ko:\nkernel/net/ipv4/udp_diag.ko:\n\
                       kernel/net/netfilter/ipset/ip_set.ko:\n";
    let files = [
        ("sys/kernel/osrelease", "5.10.0-9\n"),
        ("modules", "ip_set_hash_net 53248 0 - Live 0x0\n"),
        ("lib/modules/5.10.0-9/modules.builtin", "kernel/net/ipv4/inet_diag.ko\n"),
        ("lib/modules/5.10.0-9/modules.dep", DEP),
    ];
    with_files(&files, |mut host| {
        let found = |host: &Host| modules::look(host).unwrap().into_iter().map(|it| it.finding).collect::<Vec<_>>();
        host.daemon = Ok(daemon("sk-lookup", 1));
        assert_eq!(found(&host), [""; 0]);
        let lacks = ["nf_tproxy_ipv6", "xt_set"].map(|it| format!("Linux 5.10.0-9 has no module {it}"));
        host.daemon = Ok(daemon("tproxy", 1));
        assert_eq!(found(&host), lacks);
        // Without a daemon it matters whether tproxy would be used.
        host.daemon = Err("none".into());
        assert_eq!(found(&host), [""; 0]);
        let failure = Some("no".to_owned());
        host.back_ends = Ok(vec![
            Tried { back_end: BackEnd::SkLookup, failure },
            Tried { back_end: BackEnd::Tproxy, failure: None },
        ]);
        assert_eq!(found(&host), lacks);
    });
    // Without an index nothing is known, and nothing said.
    with_files(&files[..2], |mut host| {
        host.daemon = Ok(daemon("tproxy", 1));
        assert_eq!(modules::look(&host).unwrap(), []);
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

#[test]
fn what_a_killed_daemon_left_behind_is_named() {
    with_files(&[], |mut host| {
        host.leftovers = Ok(Vec::new());
        assert_eq!(of_daemon::look(&host).unwrap(), []);
        host.leftovers = Ok(vec!["192.0.2.0/24".parse().unwrap()]);
        let found = of_daemon::look(&host).unwrap();
        expect(&found, Severity::Broken, "192.0.2.0/24 of anyport is still steered");
        assert_eq!(found[0].fix.len(), 2, "{found:?}");
        assert!(found[0].fix[1].ends_with("ip route flush table local proto 165"), "{found:?}");
    });
}
