//! Tests of what the host has that a rule could shadow.

use std::{
    collections::HashMap,
    net::{TcpListener, UdpSocket},
    sync::Arc,
};

use anyport_common::flow::Transport;

use super::{
    Connection, Host, Listener, Owner, Peer, Role, addresses, describe, listeners, objections, owners, process_name,
    reached, shadowed,
};
use crate::rules::{Origin, PortSet, Rule, RuleSpec};

fn rule(prefix: &str, ports: &str, except: &str) -> Rule {
    let ports = if ports == "all" { PortSet::all() } else { ports.parse().unwrap() };
    let terms = RuleSpec { ports, except: except.parse().unwrap(), ..RuleSpec::default() };
    Rule { prefix: prefix.parse().unwrap(), terms: Arc::new(terms), origins: Origin::Added.into() }
}

fn listener(transport: Transport, local: &str, inode: u64) -> Listener {
    Listener { transport, local: local.parse().unwrap(), is_ipv6_only: false, inode, cookie: 0, waiting: 0 }
}

fn peers() -> Vec<Peer> {
    let connection = |remote: &str, inode| {
        let (local, remote) = ("192.0.2.1:22".parse().unwrap(), remote.parse().unwrap());
        Role::Connected(Connection { transport: Transport::Tcp, local, remote, inode })
    };
    let roles = [
        ("198.18.0.7", connection("198.18.0.7:50000", 20)),
        ("198.18.0.7", connection("198.18.0.7:50001", 21)),
        ("198.18.1.53", Role::Resolver),
        ("198.18.2.3", Role::Neighbour { interface: "eth0".into(), is_stale: true }),
        ("198.18.3.4", Role::Needed("the upstream of service web".into())),
    ];
    roles.map(|(address, role)| Peer { address: address.parse().unwrap(), role }).into()
}

fn host() -> Host {
    Host {
        addresses: [("127.0.0.1", "lo"), ("192.0.2.1", "eth0"), ("::1", "lo"), ("2001:db8::1", "eth0")]
            .map(|(address, interface)| (address.parse().unwrap(), interface.to_owned()))
            .to_vec(),
        gateways: ["192.0.2.254", "fe80::1"].map(|gateway| gateway.parse().unwrap()).to_vec(),
        listeners: vec![
            listener(Transport::Tcp, "0.0.0.0:22", 1),
            listener(Transport::Tcp, "[::]:80", 2),
            listener(Transport::Tcp, "192.0.2.1:443", 3),
            listener(Transport::Udp, "0.0.0.0:53", 4),
            listener(Transport::Tcp, "127.0.0.1:9464", 5),
            listener(Transport::Tcp, "198.51.100.9:8080", 6),
        ],
        peers: peers(),
    }
}

#[test]
fn the_kernel_prefers_exact_addresses_to_wildcards() {
    let all = [("[::]:80", 1), ("0.0.0.0:80", 2), ("192.0.2.7:80", 3), ("192.0.2.8:80", 4), ("0.0.0.0:81", 5)];
    let mut listeners: Vec<_> = all.map(|(local, inode)| listener(Transport::Tcp, local, inode)).into();
    listeners.push(listener(Transport::Udp, "0.0.0.0:80", 6));
    listeners.push(Listener { is_ipv6_only: true, ..listener(Transport::Tcp, "[::]:80", 7) });
    for (to, inodes) in [
        ("192.0.2.7:80", &[3, 2, 1][..]),
        ("192.0.2.9:80", &[2, 1]),
        ("[2001:db8::1]:80", &[1, 7]),
        ("192.0.2.7:82", &[]),
    ] {
        let found = reached(Transport::Tcp, to.parse().unwrap(), listeners.clone());
        assert_eq!(found.iter().map(|it| it.inode).collect::<Vec<_>>(), inodes, "{to}");
    }
}

#[test]
fn harmless_rules_pass() {
    let without_route =
        Rule { terms: Arc::new(RuleSpec { route: false, ..RuleSpec::default() }), ..rule("192.0.2.240/28", "all", "") };
    for rule in [
        rule("203.0.113.0/24", "all", ""),
        rule("192.0.2.128/26", "all", ""),
        rule("2001:db8:1::/64", "all", ""),
        // What is only steered leaves the way to peers as it is.
        Rule { terms: Arc::clone(&without_route.terms), ..rule("198.18.0.0/15", "all", "") },
        without_route,
    ] {
        assert_eq!(objections(std::slice::from_ref(&rule), &host()), [""; 0], "{rule}");
    }
}

#[test]
fn harm_is_described() {
    for (rule, expected) in [
        (
            rule("192.0.2.0/24", "1-100,443", "22"),
            &[
                "192.0.2.0/24 contains 192.0.2.254, the way to the host's gateway",
                "192.0.2.0/24 contains addresses of the host itself: 192.0.2.1 on eth0",
                "these sockets would be reached no more at addresses of 192.0.2.0/24: \
                 tcp 192.0.2.1:443, tcp [::]:80",
            ][..],
        ),
        (
            rule("127.0.0.0/8", "9464", ""),
            &[
                "127.0.0.0/8 contains addresses of the host itself: 127.0.0.1 on lo",
                "these sockets would be reached no more at addresses of 127.0.0.0/8: \
                 tcp 127.0.0.1:9464",
            ],
        ),
        (
            rule("2001:db8::1", "all", ""),
            &[
                "2001:db8::1/128 contains addresses of the host itself: 2001:db8::1 on eth0",
                "these sockets would be reached no more at addresses of 2001:db8::1/128: \
                 tcp [::]:80",
            ],
        ),
        (
            rule("198.51.100.0/24", "all", ""),
            &["these sockets would be reached no more at addresses of 198.51.100.0/24: \
               tcp 198.51.100.9:8080"],
        ),
        (
            rule("198.18.0.0/24", "all", ""),
            &["this host could not reach these any more, which 198.18.0.0/24 contains: \
               the other end of the connection tcp 198.18.0.7:50000 of sshd (pid 7), \
               the other end of the connection tcp 198.18.0.7:50001"],
        ),
        (
            rule("198.18.1.53", "53", ""),
            &["this host could not reach these any more, which 198.18.1.53/32 contains: the resolver 198.18.1.53"],
        ),
        (
            rule("198.18.0.0/15", "all", ""),
            &["this host could not reach these any more, which 198.18.0.0/15 contains: \
               the neighbour 198.18.2.3 on eth0, \
               the other end of the connection tcp 198.18.0.7:50000 of sshd (pid 7), \
               the other end of the connection tcp 198.18.0.7:50001 and 2 more"],
        ),
        (
            rule("fe80::/10", "1", ""),
            &[
                "fe80::/10 concerns addresses that the host needs: fe80::/10 are link-local addresses, by which IPv6 finds \
                 neighbours and routers",
                "fe80::/10 contains fe80::1, the way to the host's gateway",
            ],
        ),
    ] {
        let host = host();
        let shadowed = shadowed(&rule, &host);
        let owners = HashMap::from([(20, Owner { pid: 7, name: "sshd".into() })]);
        assert_eq!(describe(&rule, &host, &shadowed, &owners), expected);
    }
    let mut host = host();
    host.listeners = vec![Listener { is_ipv6_only: true, ..listener(Transport::Tcp, "[::]:80", 7) }];
    for (prefix, is_shadowed) in [("192.0.2.0/25", false), ("2001:db8::/64", true)] {
        assert_eq!(!shadowed(&rule(prefix, "80", ""), &host).is_empty(), is_shadowed, "{prefix}");
    }
    let everything = objections(&[rule("0.0.0.0/0", "1", "")], &host);
    assert_eq!(everything[0], "a local route to 0.0.0.0/0 would replace the default route and cut the host off");
}

#[test]
fn own_sockets_are_not_listed() {
    let rule = rule("127.0.0.0/8", "all", "");
    let host = host();
    let owner = Owner { pid: std::process::id(), name: "anyportd".into() };
    let lines = |owners| describe(&rule, &host, &shadowed(&rule, &host), owners).pop().unwrap();
    let own = HashMap::from([(5, owner.clone())]);
    assert!(!lines(&own).contains("9464"));
    let others = HashMap::from([(5, Owner { pid: 1, name: "init".into() }), (1, owner)]);
    let line = lines(&others);
    assert!(line.contains("tcp 127.0.0.1:9464 of init (pid 1)"), "{line}");
    assert!(line.contains("tcp 0.0.0.0:22 of anyportd (pid"), "{line}");
}

#[test]
fn finds_real_sockets_and_their_process() {
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let connected = UdpSocket::bind("127.0.0.1:0").unwrap();
    connected.connect(udp.local_addr().unwrap()).unwrap();
    let listeners = listeners().unwrap();
    for (transport, local, is_listed) in [
        (Transport::Tcp, tcp.local_addr().unwrap(), true),
        (Transport::Udp, udp.local_addr().unwrap(), true),
        (Transport::Udp, connected.local_addr().unwrap(), false),
    ] {
        let found = listeners.iter().find(|l| (l.transport, l.local) == (transport, local));
        assert_eq!(found.is_some(), is_listed, "{local}");
        if let Some(found) = found {
            assert_eq!(owners(&[found.inode].into())[&found.inode].pid, std::process::id());
        }
    }
    let lo = addresses().unwrap().into_iter().find(|(_, interface)| interface == "lo");
    assert!(lo.is_some_and(|(address, _)| address.is_loopback()));
}

#[test]
fn names_of_processes_are_safe_to_print() {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("a\n\x1b[2Jé");
    std::os::unix::fs::symlink("/bin/sleep", &program).unwrap();
    let mut process = std::process::Command::new(&program).arg("60").spawn().unwrap();
    // The parent of a new program goes on before the kernel has given that its name (fs/exec.c: first the memory, then the name).
    let mut names = (0..5_000).map(|_| {
        std::thread::sleep(std::time::Duration::from_millis(1));
        process_name(process.id()).unwrap()
    });
    let is_named = names.any(|name| name == "a\\n\\u{1b}[2Jé");
    process.kill().unwrap();
    process.wait().unwrap();
    assert!(is_named);
}
