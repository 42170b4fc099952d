use std::{
    fs::File,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use anyport_common::flow::Transport;
use proptest::prelude::*;

use super::{Family, Line, Verdict, guards, lines, split};
use crate::{
    rules::{Decision, Origin, PortSet, Protocol, Rule, RuleSet, decide},
    steering::{GroupSocket, NumberedRule, Plan, ServiceSockets},
};

fn service(name: &str, slot: u16, bound: [Option<&str>; 4]) -> ServiceSockets {
    let socket = Arc::new(File::open("/dev/null").unwrap().into());
    let group = |bound: &str| GroupSocket { socket: Arc::clone(&socket), bound: bound.parse().unwrap() };
    ServiceSockets { slot, name: name.parse().unwrap(), groups: bound.map(|bound| bound.map(group)) }
}

fn rule(prefix: &str, protocol: Protocol, ports: &str, except: &str, service: &str) -> Rule {
    Rule {
        prefix: prefix.parse().unwrap(),
        protocol,
        ports: if ports == "all" { PortSet::all() } else { ports.parse().unwrap() },
        except: except.parse().unwrap(),
        service: service.parse().unwrap(),
        route: true,
        origin: Origin::Added,
    }
}

fn plan(rules: &RuleSet) -> Plan {
    Plan {
        generation: 1,
        rules: (0..).zip(rules).map(|(number, rule)| NumberedRule { number, rule: rule.clone() }).collect(),
        services: vec![
            service("a", 1, [Some("127.0.0.1:1001"), Some("127.0.0.1:1002"), Some("[::1]:1003"), Some("[::1]:1004")]),
            service("b", 2, [Some("0.0.0.0:2001"), None, Some("[::]:2003"), None]),
            service("c", 3, [Some("10.0.0.1:3001"), Some("127.0.0.1:3002"), None, Some("[::1]:3004")]),
        ],
    }
}

fn rule_set(rules: Vec<Rule>) -> RuleSet {
    let mut set = RuleSet::default();
    for rule in rules {
        // Rules that contradict one that is there are left out.
        let _ = set.insert(rule);
    }
    set
}

#[test]
fn lines_look_like_this() {
    let plan = plan(&rule_set(vec![
        rule("192.0.2.0/24", Protocol::Both, "all", "22,179", "b"),
        rule("192.0.2.7", Protocol::Tcp, "80,443,8000-8999", "", "c"),
        rule("2001:db8::/32", Protocol::Udp, "53", "", "a"),
        rule("2001:db8::/33", Protocol::Tcp, "1-9", "", "b"),
        rule("2001:db8::/34", Protocol::Tcp, "1-9", "", "c"),
    ]));
    let text = |family| {
        let lines = lines(&plan, family).unwrap();
        lines.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(
        text(Family::V4),
        [
            "-d 192.0.2.7/32 -p tcp -m multiport --dports 80,443,8000:8999 \
             -m comment --comment \"anyport rule 0\" -j TPROXY --on-ip 10.0.0.1 --on-port 3001",
            "-d 192.0.2.0/24 -p tcp -m multiport --dports 22,179 \
             -m comment --comment \"anyport rule 1\" -j RETURN",
            "-d 192.0.2.0/24 -p tcp -m tcp --dport 1:65535 \
             -m comment --comment \"anyport rule 1\" -j TPROXY --on-ip 127.0.0.1 --on-port 2001",
            "-d 192.0.2.0/24 -p udp -m multiport --dports 22,179 \
             -m comment --comment \"anyport rule 1\" -j RETURN",
            "-d 192.0.2.0/24 -p udp -m udp --dport 1:65535 \
             -m comment --comment \"anyport rule 1\" -j DROP",
        ]
    );
    assert_eq!(
        text(Family::V6),
        [
            "-d 2001:db8::/34 -p tcp -m tcp --dport 1:9 \
             -m comment --comment \"anyport rule 2\" -j DROP",
            "-d 2001:db8::/33 -p tcp -m tcp --dport 1:9 \
             -m comment --comment \"anyport rule 3\" -j TPROXY --on-ip ::1 --on-port 2003",
            "-d 2001:db8::/32 -p udp -m udp --dport 53:53 \
             -m comment --comment \"anyport rule 4\" -j TPROXY --on-ip ::1 --on-port 1004",
        ]
    );
    let waiting: [SocketAddr; 1] = ["192.0.2.9:53".parse().unwrap()];
    assert_eq!(
        guards(&lines(&plan, Family::V4).unwrap(), &waiting, "RULES"),
        [
            "-p tcp -m tcp ! --syn -m socket -j RETURN",
            "-d 192.0.2.9 -p udp -m udp --dport 53 -g RULES",
            "-p udp -m socket --transparent -g RULES",
            "-p udp -m socket -j RETURN",
        ]
    );
}

#[test]
fn portions_fit_into_a_line() {
    for (ports, portions) in [
        ("", &[][..]),
        ("1", &[1]),
        ("1,3,5,7,9,11,13,15,17,19,21,23,25,27,29", &[15]),
        ("1,3,5,7,9,11,13,15,17,19,21,23,25,27,29,31", &[15, 1]),
        ("1-2,4-5,7-8,10-11,13-14,16-17,19-20,22", &[8]),
        ("1-2,4-5,7-8,10-11,13-14,16-17,19-20,22-23", &[7, 1]),
    ] {
        let set: PortSet = ports.parse().unwrap();
        let split = split(&set);
        assert_eq!(split.iter().map(Vec::len).collect::<Vec<_>>(), portions, "{ports}");
        assert_eq!(split.concat(), set.ranges());
    }
}

/// What a packet meets that goes through the lines from the first to the last.
fn first_match(lines: &[Line], address: IpAddr, transport: Transport, port: u16) -> Option<(u32, Verdict)> {
    let line = lines.iter().find(|line| {
        line.prefix.contains(address)
            && line.transport == transport
            && line.ports.iter().any(|(first, last)| (*first..=*last).contains(&port))
    })?;
    Some((line.rule, line.verdict))
}

fn expected(set: &RuleSet, address: IpAddr, transport: Transport, port: u16) -> Option<(u32, Verdict)> {
    let number = |rule| {
        let position = set.iter().position(|other| other == rule).unwrap();
        u32::try_from(position).unwrap()
    };
    match decide(set, address, transport, port) {
        Decision::Unmatched => None,
        Decision::Host(rule) => Some((number(rule), Verdict::Return)),
        Decision::Steer(rule) => {
            let to = match (rule.service.as_str(), address.is_ipv4(), transport) {
                ("a", true, Transport::Tcp) => "127.0.0.1:1001",
                ("a", true, Transport::Udp) => "127.0.0.1:1002",
                ("a", false, Transport::Tcp) => "[::1]:1003",
                ("a", false, Transport::Udp) => "[::1]:1004",
                ("b", true, Transport::Tcp) => "127.0.0.1:2001",
                ("b", false, Transport::Tcp) => "[::1]:2003",
                ("c", true, Transport::Tcp) => "10.0.0.1:3001",
                ("c", true, Transport::Udp) => "127.0.0.1:3002",
                ("c", false, Transport::Udp) => "[::1]:3004",
                _ => return Some((number(rule), Verdict::Drop)),
            };
            Some((number(rule), Verdict::Tproxy(to.parse().unwrap())))
        }
    }
}

fn some_ports() -> impl Strategy<Value = String> {
    let range = (1..60u16, 0..6u16).prop_map(|(first, more)| format!("{first}-{}", first + more));
    prop_oneof![
        1 => Just("1-65535".to_owned()),
        4 => prop::collection::vec(range, 1..20).prop_map(|ranges| ranges.join(",")),
    ]
}

fn some_rule() -> impl Strategy<Value = Rule> {
    let prefix = prop::sample::select(vec![
        "0.0.0.0/0",
        "192.0.2.0/24",
        "192.0.2.0/25",
        "192.0.2.1",
        "::/0",
        "2001:db8::/64",
        "2001:db8::1",
    ]);
    let protocol = prop::sample::select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Both]);
    let except = prop_oneof![Just(String::new()), some_ports()];
    let service = prop::sample::select(vec!["a", "b", "c"]);
    (prefix, protocol, some_ports(), except, service)
        .prop_map(|(prefix, protocol, ports, except, service)| rule(prefix, protocol, &ports, &except, service))
}

proptest! {
    #[test]
    fn lines_decide_as_the_rules_do(rules in prop::collection::vec(some_rule(), 0..12)) {
        let set = rule_set(rules);
        let plan = plan(&set);
        for address in ["192.0.2.1", "192.0.2.2", "192.0.2.200", "2001:db8::1", "2001:db8::2", "fe80::1"] {
            let address: IpAddr = address.parse().unwrap();
            let family = if address.is_ipv4() { Family::V4 } else { Family::V6 };
            let lines = lines(&plan, family).unwrap();
            for transport in Transport::ALL {
                for port in (0..70).chain([65_534, 65_535]) {
                    prop_assert_eq!(
                        first_match(&lines, address, transport, port),
                        expected(&set, address, transport, port),
                        "{} {:?} {}", address, transport, port
                    );
                }
            }
        }
    }
}
