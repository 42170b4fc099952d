//! Random rules for tests: few distinct addresses and ports, so that rules overlap and edges are met often.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyport_common::flow::{Flow, Transport};
use proptest::prelude::*;

use crate::rules::{Origin, PortSet, Prefix, Protocol, Rule, RuleSet, RuleText, SourceLists, to_address};

/// The services that random rules steer to.
pub(crate) const SERVICES: [&str; 3] = ["a", "b", "c"];

/// Prefixes of any length around 192.0.2.0/24 and `2001:db8::/56` with three ways to differ in either half.
pub(crate) fn prefixes() -> impl Strategy<Value = Prefix> {
    let v4 = (0..=32u8, any::<u8>()).prop_map(|(len, low)| Prefix::from_bits(true, 0xc000_0200 | u128::from(low), len));
    let v6 = (0..=128u8, any::<u8>(), any::<u8>()).prop_map(|(len, high, low)| {
        let bits = 0x2001_0db8_u128 << 96 | u128::from(high & 0x83) << 64 | u128::from(low);
        Prefix::from_bits(false, bits, len)
    });
    prop_oneof![v4, v6]
}

/// Prefixes of the clients, of either family.
fn sources(is_ipv4: bool) -> impl Strategy<Value = Option<Prefix>> {
    prop_oneof![
        2 => Just(None),
        1 => (0..=128u8, 0..8u8).prop_map(move |(len, low)| {
            let bits = if is_ipv4 { 0xc633_6400 } else { 0x2001_0db8_00ff_u128 << 80 };
            let len = if is_ipv4 { len % 33 } else { len };
            Some(Prefix::from_bits(is_ipv4, bits | u128::from(low), len))
        }),
    ]
}

fn ports() -> impl Strategy<Value = PortSet> {
    let number = || prop_oneof![1..=9u16, 65_530..=65_535u16];
    let range = (number(), number()).prop_map(|(a, b)| format!("{}-{}", a.min(b), a.max(b)));
    prop::collection::vec(range, 0..3).prop_map(|ranges| ranges.join(",").parse().unwrap())
}

/// Any rule that is valid by itself.
pub(crate) fn rule() -> impl Strategy<Value = Rule> {
    let protocol = prop::sample::select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Both]);
    let service = prop::sample::select(SERVICES.to_vec());
    let about = prefixes().prop_flat_map(|prefix| (Just(prefix), sources(prefix.is_ipv4())));
    let rule = (about, protocol, ports(), ports(), service).prop_map(
        |((prefix, source), protocol, ports, except, service)| {
            let service = service.parse().unwrap();
            RuleText { prefix, protocol, ports, except, source, service, route: true }.into_rule(Origin::Added)
        },
    );
    rule.prop_filter("something is steered", |rule| !rule.terms.ports.is_subset(&rule.terms.except))
}

/// A set of up to `count` rules that do not contradict each other.
pub(crate) fn rules(count: usize) -> impl Strategy<Value = RuleSet> {
    prop::collection::vec(rule(), 0..count).prop_map(|rules| {
        let mut set = RuleSet::default();
        for rule in &rules {
            // A rule that contradicts one that is there stays out.
            drop(set.insert(rule));
        }
        set
    })
}

/// Lists that do not contradict themselves, mostly of the clients that flows come from.
pub(crate) fn source_lists() -> impl Strategy<Value = SourceLists> {
    let prefix = any::<bool>().prop_flat_map(sources).prop_filter_map("everybody", |it| it);
    prop::collection::vec((prefix, any::<bool>()), 0..6).prop_map(|entries| {
        let entries: BTreeMap<Prefix, bool> = entries.into_iter().collect();
        let of = |is_allowed| entries.iter().filter(|(_, it)| **it == is_allowed).map(|(prefix, _)| *prefix).collect();
        SourceLists::new(of(true), of(false))
    })
}

/// A flow to an edge of a prefix, or beside it, from one of few clients.
pub(crate) fn flow() -> impl Strategy<Value = Flow> {
    (prefixes(), 0..4u8, any::<bool>(), 0..20u16, 0..8u8).prop_map(|(prefix, edge, is_tcp, port, client)| {
        let (first, last) = prefix.bounds();
        let address = match edge {
            0 => first,
            1 => last,
            2 => first.wrapping_sub(1),
            _ => last.wrapping_add(1),
        };
        let client = if prefix.is_ipv4() { 0xc633_6400 } else { 0x2001_0db8_00ff_u128 << 80 } | u128::from(client);
        Flow {
            source: to_address(ip(prefix.is_ipv4(), client)),
            address: to_address(ip(prefix.is_ipv4(), address)),
            transport: if is_tcp { Transport::Tcp } else { Transport::Udp },
            port: if port < 10 { port } else { 65_516 + port },
        }
    })
}

#[expect(clippy::cast_possible_truncation, reason = "the last 32 bits are an IPv4 address")]
fn ip(is_ipv4: bool, bits: u128) -> IpAddr {
    if is_ipv4 { Ipv4Addr::from_bits(bits as u32).into() } else { Ipv6Addr::from_bits(bits).into() }
}
