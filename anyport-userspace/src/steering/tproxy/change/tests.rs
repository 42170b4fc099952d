//! Tests that every packet meets the old or the new verdict at each moment of a change.

use std::collections::HashSet;

use proptest::prelude::*;

use super::{State, Step, Way, from_state};
use crate::{
    rules::{Prefix, Protocol, Rule, RuleSet},
    steering::{
        ServiceSockets,
        tproxy::{
            chain_rules::{Family, LineTarget},
            tests::fixtures::{
                FAMILIES, Model, Packet, expected, numbered, packets, rule, rule_set, service, services, some_change,
                target,
            },
        },
    },
};

/// The prefixes whose rules or numbers are not the same.
fn changed(before: &RuleSet, after: &RuleSet) -> Vec<Prefix> {
    let all: HashSet<_> = before.prefixes().chain(after.prefixes()).map(|(prefix, _)| *prefix).collect();
    let mut changed: Vec<_> = all.into_iter().filter(|it| before.of_prefix(it) != after.of_prefix(it)).collect();
    changed.sort_unstable();
    changed
}

fn way(
    state: &State,
    before: &RuleSet,
    after: &RuleSet,
    services: &[ServiceSockets],
    family: Family,
    few: usize,
) -> Option<Way> {
    let mut named = 0;
    from_state(state, before, &changed(before, after), &target(after, services, family, few), || {
        named += 1;
        format!("second-{named}")
    })
    .unwrap()
}

/// Every possible verdict on a packet that the kernel processes while it goes through these states. The packet keeps to the
/// lines that it began with and sees each set as it is when it comes there.
fn possible_verdicts(states: &[Model], packet: Packet) -> HashSet<Option<LineTarget>> {
    let mut verdicts = HashSet::new();
    for (start, first) in states.iter().enumerate() {
        if start > 0 && states[start - 1].lines == first.lines {
            // Packets that start later see no more than those that started with the same lines.
            continue;
        }
        let mut now = start;
        let passes = first.lines.iter().all(|line| {
            if states[now..].iter().any(|state| state.matches(line, packet)) {
                verdicts.insert(Some(line.verdict));
            }
            let next = (now..states.len()).find(|time| !states[*time].matches(line, packet));
            now = next.unwrap_or(now);
            next.is_some()
        });
        if passes {
            verdicts.insert(None);
        }
    }
    verdicts
}

/// Takes the steps, judging every packet at every moment, and returns what the kernel is like in the end.
fn walk(
    mut model: Model,
    way: &Way,
    family: Family,
    before: &dyn Fn(Packet) -> Option<LineTarget>,
    after: &dyn Fn(Packet) -> Option<LineTarget>,
) -> Model {
    let mut states = vec![model.clone()];
    let check = |states: &[Model]| {
        for packet in packets(family) {
            let allowed = HashSet::from([before(packet), after(packet)]);
            let possible = possible_verdicts(states, packet);
            assert!(possible.is_subset(&allowed), "{packet:?}: {possible:?} of {allowed:?}, on {:#?}", way.steps);
        }
    };
    for step in &way.steps {
        if *step == Step::Wait {
            check(&states);
            states.drain(..states.len() - 1);
        }
        states.extend(model.carry_out(step.clone()));
    }
    check(&states);
    model
}

fn check_change(
    before: &RuleSet,
    after: &RuleSet,
    previous: &[ServiceSockets],
    services: &[ServiceSockets],
    few: usize,
) -> usize {
    let mut short = 0;
    for family in FAMILIES {
        let (model, state) = Model::of(before, previous, family, few);
        let Some(way) = way(&state, before, after, services, family, few) else { continue };
        short += 1;
        let verdict = |rules, services, packet| expected(rules, services, packet).map(|(_, verdict)| verdict);
        let model = walk(model, &way, family, &|packet| verdict(before, previous, packet), &|packet| {
            verdict(after, services, packet)
        });
        for packet in packets(family) {
            assert_eq!(model.decide(&way.end, after, packet), expected(after, services, packet), "{packet:?}");
        }
        for group in way.end.groups.values() {
            let name = group.prefixes.set();
            assert!(name.is_none_or(|name| model.sets[name].len() == group.prefixes.len()), "{group:?}: {model:?}");
        }
        assert_eq!(model.lines, super::chain_rules::lines(&way.end.groups, after.view()));
    }
    short
}

#[test]
fn one_prefix_more_is_one_element_more() {
    let alike = |last: u32| {
        let rules = (0..last).map(|it| rule(&format!("192.0.2.{it}"), Protocol::Both, "all", "22", "a"));
        rules.collect::<Vec<_>>()
    };
    let before = rule_set(&alike(20));
    let services = services();
    let (_, state) = Model::of(&before, &services, Family::V4, 1);
    let set = state.sets().next().unwrap().1.to_owned();
    let after = numbered(&rule_set(&alike(21)), 0);
    let way = way(&state, &before, &after, &services, Family::V4, 1).unwrap();
    let added = super::Element { set, prefix: "192.0.2.20".parse().unwrap() };
    assert_eq!(way.steps, [Step::Elements { added: vec![added], removed: Vec::new() }]);
}

#[test]
fn a_refusal_is_there_before_the_element_goes() {
    let services = [services(), vec![service("nobody", 0, [None; 4])]].concat();
    let alike = |count: u8, of: &str| -> Vec<Rule> {
        (0..count).map(|it| rule(&format!("192.0.2.{it}"), Protocol::Both, "all", "22", of)).collect()
    };
    let before = rule_set(&alike(20, "a"));
    let mut refusing = alike(19, "a");
    refusing.push(rule("192.0.2.19", Protocol::Both, "all", "22", "nobody"));
    let refusing = rule_set(&refusing);
    let (_, state) = Model::of(&before, &services, Family::V4, 1);
    let way = way(&state, &before, &refusing, &services, Family::V4, 1).unwrap();
    let kinds: Vec<_> = way
        .steps
        .iter()
        .map(|step| match step {
            Step::Make(_) => "make",
            Step::Lines { .. } => "lines",
            Step::Elements { .. } => "elements",
            Step::Wait => "wait",
        })
        .collect();
    assert_eq!(kinds, ["lines", "wait", "elements", "wait", "lines"]);
    assert_eq!(check_change(&before, &refusing, &services, &services, 1), 2);
}

#[test]
fn what_is_counted_otherwise_is_made_anew() {
    let rules: Vec<_> = (0..20).map(|it| rule(&format!("192.0.2.{it}"), Protocol::Tcp, "all", "", "a")).collect();
    let rules = rule_set(&rules);
    let mut without = services();
    without[0] = service("a", 1, [None; 4]);
    let (_, state) = Model::of(&rules, &services(), Family::V4, 1);
    assert!(way(&state, &rules, &rules, &without, Family::V4, 1).is_none());
    let mut elsewhere = services();
    elsewhere[0] = service("a", 1, [Some("127.0.0.1:1111"); 4]);
    let way = way(&state, &rules, &rules, &elsewhere, Family::V4, 1).unwrap();
    assert!(matches!(&way.steps[..], [Step::Lines { lines, .. }] if lines.len() == 1), "{way:?}");
}

proptest! {
    #[test]
    fn every_packet_is_judged_by_the_rules_before_or_after(
        [before, after] in some_change(),
        few in 0..3usize,
        is_renumbered in any::<bool>(),
        is_elsewhere in prop::bool::weighted(0.2),
    ) {
        let [before, after] = [before, after].map(|rules| rule_set(&rules));
        let after = if is_renumbered { numbered(&after, 1000) } else { after };
        let (previous, mut services) = (services(), services());
        if is_elsewhere {
            services[0] = service("a", 1, [Some("127.0.0.1:1111"), Some("127.0.0.1:1112"), Some("[::1]:1113"), Some("[::1]:1114")]);
        }
        check_change(&before, &after, &previous, &services, few);
    }
}
