//! Tests of the lines that are written for iptables.

use std::net::SocketAddr;

use proptest::prelude::*;

use super::{Family, guards, lines, split, without};
use crate::{
    rules::{PortSet, Protocol, RuleSet},
    steering::tproxy::tests::fixtures::{FAMILIES, Model, expected, packets, rule, rule_set, services, some_rules},
};

fn rules() -> RuleSet {
    rule_set(&[
        rule("192.0.2.0/24", Protocol::Both, "all", "22,179", "b"),
        rule("192.0.2.7", Protocol::Tcp, "80,443,8000-8999", "", "c"),
        rule("192.0.2.8", Protocol::Tcp, "all", "22", "a"),
        rule("192.0.2.9", Protocol::Tcp, "all", "22", "a"),
        rule("192.0.2.9 from 198.51.100.0/24", Protocol::Tcp, "all", "22", "c"),
        rule("2001:db8::/32", Protocol::Udp, "53", "", "a"),
        rule("2001:db8::/33", Protocol::Tcp, "1-9", "", "b"),
        rule("2001:db8::/34", Protocol::Tcp, "1-9", "", "c"),
    ])
}

fn text(family: Family) -> Vec<String> {
    let (model, _) = Model::of(&rules(), &services(), family, 1);
    model.lines.iter().map(ToString::to_string).collect()
}

#[test]
fn lines_look_like_this() {
    assert_eq!(
        text(Family::V4),
        [
            "-d 192.0.2.7/32 -p tcp -m multiport --dports 80,443,8000:8999 \
             -m comment --comment \"anyport rule 0\" -j TPROXY --on-ip 10.0.0.1 --on-port 3001",
            "-s 198.51.100.0/24 -d 192.0.2.9/32 -p tcp -m tcp --dport 22:22 \
             -m comment --comment \"anyport rule 2\" -j RETURN",
            "-s 198.51.100.0/24 -d 192.0.2.9/32 -p tcp -m multiport --dports 1:21,23:65535 \
             -m comment --comment \"anyport rule 2\" -j TPROXY --on-ip 10.0.0.1 --on-port 3001",
            "-p tcp -m tcp --dport 22:22 -m set --match-set first-1 dst ! --update-counters -j RETURN",
            "-p tcp -m multiport --dports 1:21,23:65535 -m set --match-set first-1 dst \
             -j TPROXY --on-ip 127.0.0.1 --on-port 1001",
            "-d 192.0.2.0/24 -p tcp -m multiport --dports 22,179 \
             -m comment --comment \"anyport rule 4\" -j RETURN",
            "-d 192.0.2.0/24 -p tcp -m multiport --dports 1:21,23:178,180:65535 \
             -m comment --comment \"anyport rule 4\" -j TPROXY --on-ip 127.0.0.1 --on-port 2001",
            "-d 192.0.2.0/24 -p udp -m multiport --dports 22,179 \
             -m comment --comment \"anyport rule 4\" -j RETURN",
            "-d 192.0.2.0/24 -p udp -m multiport --dports 1:21,23:178,180:65535 \
             -m comment --comment \"anyport rule 4\" -j DROP",
        ]
    );
    assert_eq!(
        text(Family::V6),
        [
            "-d 2001:db8::/34 -p tcp -m tcp --dport 1:9 \
             -m comment --comment \"anyport rule 5\" -j DROP",
            "-d 2001:db8::/33 -p tcp -m tcp --dport 1:9 \
             -m comment --comment \"anyport rule 6\" -j TPROXY --on-ip ::1 --on-port 2003",
            "-d 2001:db8::/32 -p udp -m udp --dport 53:53 \
             -m comment --comment \"anyport rule 7\" -j TPROXY --on-ip ::1 --on-port 1004",
        ]
    );
}

#[test]
fn guards_look_like_this() {
    let (model, state) = Model::of(&rules(), &services(), Family::V4, 1);
    assert_eq!(lines(&state.groups, rules().view()), model.lines);
    let waiting: [SocketAddr; 1] = ["192.0.2.9:53".parse().unwrap()];
    assert_eq!(
        guards(&model.lines, &waiting, "RULES"),
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
        let split = split(set.ranges());
        assert_eq!(split.iter().map(Vec::len).collect::<Vec<_>>(), portions, "{ports}");
        assert_eq!(split.concat(), set.ranges());
    }
}

#[test]
fn excepted_ports_are_not_steered() {
    for (ports, except, left) in [
        ("1-65535", "", "1-65535"),
        ("1-65535", "1-65535", ""),
        ("1-65535", "1,65535", "2-65534"),
        ("80,443", "80", "443"),
        ("10-20,30-40", "1-10,15,20-30,50", "11-14,16-19,31-40"),
    ] {
        let [ports, except, left] = [ports, except, left].map(|it| it.parse::<PortSet>().unwrap());
        assert_eq!(without(&ports, &except), left.ranges());
    }
}

proptest! {
    #[test]
    fn lines_decide_as_the_rules_do(rules in some_rules(), few in 0..3usize) {
        let (rules, services) = (rule_set(&rules), services());
        for family in FAMILIES {
            let (model, state) = Model::of(&rules, &services, family, few);
            for packet in packets(family) {
                prop_assert_eq!(
                    model.decide(&state, &rules, packet),
                    expected(&rules, &services, packet),
                    "{:?}", packet
                );
            }
        }
    }
}
