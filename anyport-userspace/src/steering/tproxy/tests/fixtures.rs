//! What the tests of this back end have in common.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    net::IpAddr,
    sync::Arc,
};

use anyport_common::flow::Transport;
use proptest::prelude::*;

pub(in crate::steering::tproxy) use crate::rules::tests::fixtures::rule;
use crate::{
    rules::{Decision, Origin, Prefix, Protocol, Rule, RuleSet, RuleText, decide},
    steering::{
        GroupSocket, Holder, ServiceSockets,
        tproxy::{
            chain_rules::{ChainRule, Destination, Family, LineTarget},
            change::{self, State, Step, Target, Way},
            groups::{self, Sockets},
        },
    },
};

pub(in crate::steering::tproxy) const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// A packet: source, destination, transport and port.
pub(in crate::steering::tproxy) type Packet = (IpAddr, IpAddr, Transport, u16);

pub(in crate::steering::tproxy) fn service(name: &str, slot: u16, bound: [Option<&str>; 4]) -> ServiceSockets {
    let socket = Arc::new(File::open("/dev/null").unwrap().into());
    let group =
        |bound: &str| GroupSocket { cookie: 0, bound: bound.parse().unwrap(), holder: Holder::Us(Arc::clone(&socket)) };
    ServiceSockets {
        slot,
        name: name.parse().unwrap(),
        groups: bound.map(|bound| bound.map(group)),
        sources: Arc::default(),
    }
}

pub(in crate::steering::tproxy) fn services() -> Vec<ServiceSockets> {
    vec![
        service("a", 1, [Some("127.0.0.1:1001"), Some("127.0.0.1:1002"), Some("[::1]:1003"), Some("[::1]:1004")]),
        service("b", 2, [Some("0.0.0.0:2001"), None, Some("[::]:2003"), None]),
        service("c", 3, [Some("10.0.0.1:3001"), Some("127.0.0.1:3002"), None, Some("[::1]:3004")]),
    ]
}

/// A set, with numbers, of those of the rules that contradict none before them.
pub(in crate::steering::tproxy) fn rule_set(rules: &[Rule]) -> RuleSet {
    let mut set = RuleSet::default();
    for rule in rules.iter().filter(|rule| rule.terms.validate(&rule.prefix).is_ok()) {
        let _ = set.insert(rule);
    }
    numbered(&set, 0)
}

/// The same rules, under numbers from this one on.
pub(in crate::steering::tproxy) fn numbered(set: &RuleSet, first: u32) -> RuleSet {
    let mut next = first;
    let mut change = crate::rules::Change::default();
    for (prefix, rules) in set.prefixes() {
        let mut rules = rules.clone();
        rules.first_number = next;
        next += u32::try_from(rules.len()).unwrap();
        change.added.push((*prefix, rules));
    }
    let mut numbered = RuleSet::default();
    numbered.apply(&change);
    numbered
}

pub(in crate::steering::tproxy) fn target<'a>(
    rules: &'a RuleSet,
    services: &'a [ServiceSockets],
    family: Family,
    few: usize,
) -> Target<'a> {
    Target { family, few, rules: rules.view(), sockets: Sockets::of(services, family, None), waiting: Vec::new() }
}

/// What the kernel would be like.
#[derive(Clone, Debug, Default)]
pub(in crate::steering::tproxy) struct Model {
    pub(in crate::steering::tproxy) lines: Vec<ChainRule>,
    pub(in crate::steering::tproxy) sets: HashMap<String, HashSet<Prefix>>,
}

impl Model {
    /// Made from nothing by the rules.
    pub(in crate::steering::tproxy) fn of(
        rules: &RuleSet,
        services: &[ServiceSockets],
        family: Family,
        few: usize,
    ) -> (Self, State) {
        let mut named = 0;
        let Way { steps, end, .. } = change::from_anything(target(rules, services, family, few), || {
            named += 1;
            format!("first-{named}")
        })
        .unwrap();
        let mut model = Self::default();
        for step in steps {
            model.carry_out(step);
        }
        (model, end)
    }

    /// Does a step and gives what the kernel was like after each part of it.
    pub(in crate::steering::tproxy) fn carry_out(&mut self, step: Step) -> Vec<Self> {
        let mut states = Vec::new();
        match step {
            Step::Make(sets) => {
                for (set, prefixes) in sets {
                    let len = prefixes.len();
                    let elements: HashSet<_> = prefixes.into_iter().collect();
                    assert_eq!(elements.len(), len, "a set has each element once");
                    assert!(self.sets.insert(set, elements).is_none(), "names never come again");
                }
            }
            Step::Lines { lines, .. } => self.lines = lines,
            Step::Elements { added, removed } => {
                for it in added {
                    assert!(self.sets.get_mut(&it.set).unwrap().insert(it.prefix), "{it:?} was there");
                    states.push(self.clone());
                }
                for it in removed {
                    assert!(self.sets.get_mut(&it.set).unwrap().remove(&it.prefix), "{it:?} was not there");
                    states.push(self.clone());
                }
            }
            Step::Wait => {}
        }
        states.push(self.clone());
        states
    }

    pub(in crate::steering::tproxy) fn matches(&self, line: &ChainRule, packet: Packet) -> bool {
        let (source, address, transport, port) = packet;
        let is_inside = match &line.destination {
            Destination::Prefix(prefix, _) => prefix.contains(address),
            Destination::Set(set) => self.sets[set].iter().any(|prefix| prefix.contains(address)),
        };
        is_inside
            && line.transport == transport
            && line.source.is_none_or(|it| it.contains(source))
            && line.ports.iter().any(|(first, last)| (*first..=*last).contains(&port))
    }

    /// What a packet meets that goes through the lines from the first to the last, and the rule that is counted.
    pub(in crate::steering::tproxy) fn decide(
        &self,
        state: &State,
        rules: &RuleSet,
        packet: Packet,
    ) -> Option<(u32, LineTarget)> {
        let line = self.lines.iter().find(|line| self.matches(line, packet))?;
        let number = match &line.destination {
            Destination::Prefix(_, number) => number.unwrap(),
            Destination::Set(set) => {
                let (key, _) = state.sets().find(|(_, name)| *name == set).unwrap();
                groups::number(rules.view(), Prefix::host(packet.1).truncated(key.len), key).unwrap()
            }
        };
        Some((number, line.verdict))
    }
}

/// What the rules say.
pub(in crate::steering::tproxy) fn expected(
    rules: &RuleSet,
    services: &[ServiceSockets],
    packet: Packet,
) -> Option<(u32, LineTarget)> {
    let (source, address, transport, port) = packet;
    match decide(rules, address, transport, port, source) {
        Decision::Unmatched => None,
        Decision::Host(rule) => Some((rule.number, LineTarget::Return)),
        Decision::Steer(rule) => {
            let service = services.iter().find(|it| it.name == rule.terms.service).unwrap();
            let offset = usize::from(!address.is_ipv4()) * 2 + usize::from(transport == Transport::Udp);
            let family = if address.is_ipv4() { Family::V4 } else { Family::V6 };
            Some((rule.number, LineTarget::of(service.groups[offset].as_ref(), family, None)))
        }
    }
}

/// Packets of a family for which the rules of [`some_rules`] differ.
pub(in crate::steering::tproxy) fn packets(family: Family) -> Vec<Packet> {
    let sources = ["198.51.100.1", "198.51.100.200", "203.0.113.9", "2001:db8:1::1", "2001:db8:1:8000::", "fe80::1"];
    let addresses = [
        "192.0.2.1",
        "192.0.2.2",
        "192.0.2.3",
        "192.0.2.100",
        "192.0.2.200",
        "203.0.113.1",
        "2001:db8::1",
        "2001:db8::2",
        "2001:db8::3",
        "2001:db8:1::1",
        "fe80::1",
    ];
    let of_family = |text: &[&str]| {
        let addresses = text.iter().map(|it| it.parse::<IpAddr>().unwrap());
        addresses.filter(|it| family.has(*it)).collect::<Vec<_>>()
    };
    let mut packets = Vec::new();
    for source in of_family(&sources) {
        for address in of_family(&addresses) {
            for transport in Transport::ALL {
                for port in [0, 1, 2, 9, 10, 11, 12, 20, 39, 40, 41, 60, 65, 66, 443, 65_535] {
                    packets.push((source, address, transport, port));
                }
            }
        }
    }
    packets
}

fn some_ports() -> impl Strategy<Value = String> {
    let range = (1..60u16, 0..6u16).prop_map(|(first, more)| format!("{first}-{}", first + more));
    prop_oneof![
        3 => Just("1-65535".to_owned()),
        2 => Just("9-11,40".to_owned()),
        2 => prop::collection::vec(range, 1..20).prop_map(|ranges| ranges.join(",")),
    ]
}

fn some_terms() -> impl Strategy<Value = RuleText> {
    let protocol = prop::sample::select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Both]);
    let except = prop_oneof![3 => Just(String::new()), 1 => some_ports()];
    let source = prop_oneof![
        3 => Just(""),
        1 => prop::sample::select(vec![
            " from 198.51.100.0/24", " from 198.51.100.0/25", " from 2001:db8:1::/48", " from 2001:db8:1::/49",
        ]),
    ];
    let service = prop::sample::select(vec!["a", "b", "c"]);
    (protocol, some_ports(), except, source, service).prop_map(|(protocol, ports, except, source, service)| {
        RuleText::from(&rule(&format!("::/0{source}"), protocol, &ports, &except, service))
    })
}

fn some_prefixes() -> impl Strategy<Value = Vec<Prefix>> {
    let all = [
        "0.0.0.0/0",
        "192.0.2.0/24",
        "203.0.113.0/24",
        "192.0.2.0/25",
        "192.0.2.128/25",
        "192.0.2.1",
        "192.0.2.2",
        "192.0.2.3",
        "::/0",
        "2001:db8::/64",
        "2001:db8:1::/64",
        "2001:db8::1",
        "2001:db8::2",
        "2001:db8::3",
    ];
    prop::sample::subsequence(all.map(|it| it.parse().unwrap()).to_vec(), 0..8)
}

fn each_of(terms: &RuleText, prefixes: &[Prefix]) -> Vec<Rule> {
    prefixes.iter().map(|prefix| RuleText { prefix: *prefix, ..terms.clone() }.into_rule(Origin::Added)).collect()
}

/// Rules of which some say the same of several prefixes.
pub(in crate::steering::tproxy) fn some_rules() -> impl Strategy<Value = Vec<Rule>> {
    let alike = (some_terms(), some_prefixes()).prop_map(|(terms, prefixes)| each_of(&terms, &prefixes));
    prop::collection::vec(alike, 0..6).prop_map(|rules| rules.concat())
}

/// Two sets of such rules, which say the same of some prefixes.
pub(in crate::steering::tproxy) fn some_change() -> impl Strategy<Value = [Vec<Rule>; 2]> {
    let alike = (some_terms(), [some_prefixes(), some_prefixes(), some_prefixes()])
        .prop_map(|(terms, [stay, go, come])| [go, come].map(|some| each_of(&terms, &[&stay[..], &some].concat())));
    let before_and_after =
        |rules: Vec<[Vec<Rule>; 2]>| [0, 1].map(|i| rules.iter().flat_map(|it| it[i].clone()).collect());
    prop::collection::vec(alike, 1..5).prop_map(before_and_after)
}
