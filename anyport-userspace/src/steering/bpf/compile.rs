//! From rules to the words that [`anyport_common::table`] describes.

use anyport_common::{
    flow::Transport,
    table::{HEADER_WORDS, SERVICE_HOST, SERVICE_NONE, Span, port_range, v4_range},
};

use crate::{
    rules::Rule,
    steering::{NumberedRule, Plan},
};

/// Compiles a plan into a region of the table.
///
/// # Errors
/// A rule names a service that the plan lacks.
pub(super) fn compile(plan: &Plan) -> anyhow::Result<Vec<u64>> {
    let v6_begins = plan.rules.partition_point(|it| it.rule.prefix.is_ipv4());
    let (v4, v6) = plan.rules.split_at(v6_begins);
    let mut words = vec![0; HEADER_WORDS as usize];
    words[0] = plan.generation;

    let ranges = ranges(plan, v4, &mut words)?;
    words[1] = span(&words, ranges.len()).to_word();
    words.extend(ranges.iter().map(|range| v4_range(low_half(range.first), range.policy)));

    let ranges = self::ranges(plan, v6, &mut words)?;
    words[2] = span(&words, ranges.len()).to_word();
    for range in ranges {
        words.extend([high_word(range.first), low_word(range.first), u64::from(range.policy)]);
    }
    Ok(words)
}

/// Addresses from `first` on, up to the next range, have this policy.
struct Range {
    first: u128,
    policy: u32,
}

/// A prefix whose end is not reached yet, with what holds inside of it where nothing more specific does.
struct Open {
    last: u128,
    policy: u32,
    ports: Policy,
}

/// Cuts one family's address space into ranges and appends the policies to `words`.
fn ranges(plan: &Plan, rules: &[NumberedRule], words: &mut Vec<u64>) -> anyhow::Result<Vec<Range>> {
    let mut by_prefix: Vec<&[NumberedRule]> = rules.chunk_by(|a, b| a.rule.prefix == b.rule.prefix).collect();
    by_prefix.sort_by_key(|rules| (rules[0].rule.prefix.bounds().0, rules[0].rule.prefix.len()));

    let mut ranges = vec![Range { first: 0, policy: 0 }];
    let mut open: Vec<Open> = Vec::new();
    for rules in by_prefix {
        let (first, last) = rules[0].rule.prefix.bounds();
        close(&mut open, &mut ranges, |it| it.last < first);
        let mut ports = open.last().map_or_else(Policy::default, |outer| outer.ports.clone());
        // The first rule decides, so it is painted last.
        for NumberedRule { number, rule } in rules.iter().rev() {
            ports.paint(rule, *number, plan.service(&rule.service)?.slot);
        }
        let policy = ports.append_to(words);
        begin(&mut ranges, first, policy);
        open.push(Open { last, policy, ports });
    }
    close(&mut open, &mut ranges, |_| true);
    let beyond_v4 = |range: &Range| range.first > u128::from(u32::MAX);
    if rules.first().is_some_and(|it| it.rule.prefix.is_ipv4()) {
        ranges.retain(|range| !beyond_v4(range));
    }
    Ok(ranges)
}

/// Ends the innermost prefixes for which `ends` holds: behind each, what is around it holds again.
fn close(open: &mut Vec<Open>, ranges: &mut Vec<Range>, ends: impl Fn(&Open) -> bool) {
    while let Some(inner) = open.pop_if(|it| ends(it)) {
        if let Some(first) = inner.last.checked_add(1) {
            begin(ranges, first, open.last().map_or(0, |outer| outer.policy));
        }
    }
}

/// Begins a range, in place of one that would begin at the same address.
fn begin(ranges: &mut Vec<Range>, first: u128, policy: u32) {
    ranges.pop_if(|range| range.first == first);
    ranges.push(Range { first, policy });
}

/// What holds for the ports of an address: one map for each of [`Transport::ALL`].
#[derive(Clone, Default)]
struct Policy([PortMap; 2]);

impl Policy {
    fn paint(&mut self, rule: &Rule, number: u32, slot: u16) {
        for (transport, map) in Transport::ALL.iter().zip(&mut self.0) {
            if !rule.protocol.transports().contains(transport) {
                continue;
            }
            for (first, last) in rule.ports.ranges() {
                map.paint(*first, *last, Target { service: slot, rule: number });
            }
            for (first, last) in rule.except.ranges() {
                map.paint(*first, *last, Target { service: SERVICE_HOST, rule: number });
            }
        }
    }

    /// Returns the policy's offset.
    fn append_to(&self, words: &mut Vec<u64>) -> u32 {
        let policy = offset(words);
        let tcp = Span { offset: policy + 2, count: self.0[0].len() };
        let udp = Span { offset: tcp.offset + tcp.count, count: self.0[1].len() };
        words.extend([tcp.to_word(), udp.to_word()]);
        for map in &self.0 {
            let ranges = map.0.iter();
            words.extend(ranges.map(|(first, target)| port_range(*first, target.service, target.rule)));
        }
        policy
    }
}

#[derive(Clone, Copy, PartialEq)]
struct Target {
    service: u16,
    rule: u32,
}

/// The port space cut into ranges, each of which lasts until the next one begins; the first begins at 0.
#[derive(Clone)]
struct PortMap(Vec<(u16, Target)>);

impl Default for PortMap {
    fn default() -> Self {
        Self(vec![(0, Target { service: SERVICE_NONE, rule: 0 })])
    }
}

impl PortMap {
    fn len(&self) -> u32 {
        u32::try_from(self.0.len()).unwrap_or(u32::MAX)
    }

    /// Puts a target on the ports from `first` to `last`.
    fn paint(&mut self, first: u16, last: u16, target: Target) {
        let from = self.0.partition_point(|(begins, _)| *begins < first);
        let to = self.0.partition_point(|(begins, _)| *begins <= last);
        let behind = last.checked_add(1).map(|next| (next, self.0[to - 1].1));
        let continues = self.0.get(to).map(|(begins, _)| *begins) == last.checked_add(1);
        let painted = [(first, target)].into_iter().chain(behind.filter(|_| !continues));
        self.0.splice(from..to, painted);
    }
}

fn span(words: &[u64], count: usize) -> Span {
    Span { offset: offset(words), count: u32::try_from(count).unwrap_or(u32::MAX) }
}

/// Where the next word will stand. A table that is too long for this is far too long for the map, which refuses it.
fn offset(words: &[u64]) -> u32 {
    u32::try_from(words.len()).unwrap_or(u32::MAX)
}

#[expect(clippy::cast_possible_truncation, reason = "IPv4 addresses and halves are what is asked for")]
mod halves {
    pub(super) fn low_half(address: u128) -> u32 {
        address as u32
    }
    pub(super) fn low_word(address: u128) -> u64 {
        address as u64
    }
    pub(super) fn high_word(address: u128) -> u64 {
        (address >> 64) as u64
    }
}
use halves::{high_word, low_half, low_word};

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use anyport_common::{
        flow::{Address, Flow, Transport},
        table::{Verdict, lookup},
    };
    use proptest::prelude::*;

    use super::compile;
    use crate::{
        rules::{Decision, Origin, PortSet, Prefix, Protocol, Rule, RuleSet, decide},
        steering::{NumberedRule, Plan, ServiceSockets},
    };

    const SERVICES: [&str; 3] = ["a", "b", "c"];

    fn plan(rules: &RuleSet) -> Plan {
        Plan {
            generation: 7,
            rules: (0..).zip(rules).map(|(number, rule)| NumberedRule { number, rule: rule.clone() }).collect(),
            services: (1..)
                .zip(SERVICES)
                .map(|(slot, name)| ServiceSockets { slot, name: name.parse().unwrap(), groups: [const { None }; 4] })
                .collect(),
        }
    }

    fn address(address: IpAddr) -> Address {
        match address {
            IpAddr::V4(address) => Address::v4(address.to_bits()),
            IpAddr::V6(address) => {
                let bits = address.to_bits();
                Address::v6(super::high_word(bits), super::low_word(bits))
            }
        }
    }

    /// Few distinct addresses and ports, so that rules overlap and edges are met often.
    fn prefixes() -> impl Strategy<Value = Prefix> {
        let v4 = (0..=32u8, any::<u8>()).prop_map(|(len, low)| (format!("192.0.2.{low}"), len));
        let v6 = (0..=128u8, any::<u8>()).prop_map(|(len, low)| (format!("2001:db8::{low:x}"), len));
        prop_oneof![v4, v6].prop_map(|(address, len)| {
            let net = ipnet::IpNet::new(address.parse().unwrap(), len).unwrap().trunc();
            net.to_string().parse().unwrap()
        })
    }

    fn ports() -> impl Strategy<Value = PortSet> {
        let number = || prop_oneof![1..=9u16, 65_530..=65_535u16];
        let range = (number(), number()).prop_map(|(a, b)| format!("{}-{}", a.min(b), a.max(b)));
        prop::collection::vec(range, 0..3).prop_map(|ranges| ranges.join(",").parse().unwrap())
    }

    fn rules() -> impl Strategy<Value = RuleSet> {
        let protocol = prop::sample::select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Both]);
        let service = prop::sample::select(SERVICES.to_vec());
        let rule =
            (prefixes(), protocol, ports(), ports(), service).prop_map(|(prefix, protocol, ports, except, service)| {
                Rule {
                    prefix,
                    protocol,
                    ports,
                    except,
                    service: service.parse().unwrap(),
                    route: true,
                    origin: Origin::Added,
                }
            });
        prop::collection::vec(rule, 0..20).prop_map(|rules| {
            let mut set = RuleSet::default();
            for rule in rules {
                // A rule that contradicts one that is there stays out.
                drop(set.insert(rule));
            }
            set
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]
        #[test]
        fn the_table_decides_as_the_reference(
            rules in rules(),
            packets in prop::collection::vec((prefixes(), any::<bool>(), any::<bool>(), 0..20u16), 50),
        ) {
            let plan = plan(&rules);
            let words = compile(&plan).unwrap();
            for (place, at_end, tcp, port) in packets {
                let port = if port < 10 { port } else { 65_516 + port };
                let dialled = if at_end {
                    match place.address() {
                        IpAddr::V4(_) => IpAddr::V4(std::net::Ipv4Addr::from_bits(super::low_half(place.bounds().1))),
                        IpAddr::V6(_) => IpAddr::V6(std::net::Ipv6Addr::from_bits(place.bounds().1)),
                    }
                } else {
                    place.address()
                };
                let transport = if tcp { Transport::Tcp } else { Transport::Udp };
                let flow = Flow { address: address(dialled), transport, port };
                let number_of = |rule: &Rule| {
                    plan.rules.iter().find(|it| it.rule == *rule).unwrap().number
                };
                let expected = match decide(&rules, dialled, transport, port) {
                    Decision::Unmatched => Verdict::Unmatched,
                    Decision::Host(rule) => Verdict::Host { rule: number_of(rule) },
                    Decision::Steer(rule) => Verdict::Steer {
                        rule: number_of(rule),
                        service: plan.service(&rule.service).unwrap().slot,
                    },
                };
                prop_assert_eq!(lookup(words.as_slice(), 0, &flow), Some(expected), "{} {}", dialled, port);
            }
        }
    }
}
