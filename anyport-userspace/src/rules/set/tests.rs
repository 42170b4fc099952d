//! Tests of the rule set: precedence, conflicts, origins and changes.

use anyport_common::flow::Transport;

use proptest::prelude::*;

use super::{Change, Conflict, Draft, RuleSet};
use crate::rules::{
    Decision, Origin, Prefix, Protocol, Rule, RuleText, decide,
    tests::{arbitrary, fixtures::rule},
};

fn tcp(prefix: &str, ports: &str, except: &str, service: &str) -> Rule {
    rule(prefix, Protocol::Tcp, ports, except, service)
}

fn set(rules: &[Rule]) -> RuleSet {
    let mut set = RuleSet::default();
    for rule in rules {
        set.insert(rule).unwrap();
    }
    set
}

fn answer(set: &RuleSet, address: &str, port: u16) -> String {
    answer_to(set, "198.51.100.1", address, port)
}

fn answer_to(set: &RuleSet, source: &str, address: &str, port: u16) -> String {
    match decide(set, address.parse().unwrap(), Transport::Tcp, port, source.parse().unwrap()) {
        Decision::Unmatched => "unmatched".into(),
        Decision::Host(_) => "host".into(),
        Decision::Steer(rule) => rule.terms.service.to_string(),
    }
}

#[test]
fn specific_before_general() {
    let mut rules = vec![
        tcp("192.0.2.0/24", "all", "22", "wide"),
        tcp("192.0.2.0/24", "80", "", "web"),
        tcp("192.0.2.0/24", "8000-8999", "8080", "range"),
        tcp("192.0.2.128/25", "443", "", "half"),
        tcp("192.0.2.200/32", "1-1024", "443", "one"),
        rule("192.0.2.0/24", Protocol::Udp, "all", "", "udp"),
        tcp("2001:db8::/32", "all", "", "six"),
    ];
    for _ in 0..rules.len() {
        rules.rotate_left(1);
        let set = set(&rules);
        for (address, port, expected) in [
            ("192.0.2.1", 1, "wide"),
            ("192.0.2.1", 22, "host"),
            ("192.0.2.1", 80, "web"),
            ("192.0.2.1", 8001, "range"),
            ("192.0.2.1", 8080, "host"),
            ("192.0.2.129", 443, "half"),
            ("192.0.2.129", 444, "wide"),
            ("192.0.2.200", 443, "host"),
            ("192.0.2.200", 1024, "one"),
            ("192.0.2.200", 1025, "wide"),
            ("192.0.2.200", 0, "unmatched"),
            ("192.0.3.1", 80, "unmatched"),
            ("2001:db8::1", 80, "six"),
        ] {
            assert_eq!(answer(&set, address, port), expected, "{address}:{port}");
        }
    }
}

#[test]
fn contradictions_are_named() {
    let mut set = set(&[tcp("192.0.2.0/24", "80,443", "", "a")]);
    let conflict = set.insert(&tcp("192.0.2.0/24", "80-81", "", "b")).unwrap_err();
    assert!(matches!(conflict, Conflict::Targets { port: 80, .. }));
    let both = rule("192.0.2.0/24", Protocol::Both, "443,444", "", "b");
    assert!(set.insert(&both).is_err());
    assert!(set.insert(&tcp("192.0.2.0/24", "80", "443", "a")).is_err());
    // Another size, another protocol, another prefix, or the same target: no contradiction.
    for rule in [
        tcp("192.0.2.0/24", "80", "", "b"),
        rule("192.0.2.0/24", Protocol::Udp, "80-81", "", "b"),
        tcp("192.0.2.0/25", "80-81", "", "b"),
        tcp("192.0.2.0/24", "80-81", "", "a"),
    ] {
        assert_eq!(set.insert(&rule), Ok(true));
    }
}

#[test]
fn the_same_again_changes_nothing() {
    let mut set = set(&[tcp("192.0.2.0/24", "80,443", "", "a")]);
    assert_eq!(set.insert(&tcp("192.0.2.0/24", "443,80", "", "a")), Ok(false));
    let mut without_route = RuleText::from(&tcp("192.0.2.0/24", "80,443", "", "a"));
    without_route.route = false;
    assert!(matches!(set.insert(&without_route.into_rule(Origin::Added)), Err(Conflict::Route(_))));
    assert_eq!(set.len(), 1);
}

/// A rule that two want stays until neither does.
#[test]
fn origins_hold_a_rule_together() {
    let rule = tcp("192.0.2.0/24", "80", "", "a");
    let mut set = set(std::slice::from_ref(&rule));
    assert_eq!(set.insert(&Rule { origins: Origin::Applied.into(), ..rule.clone() }), Ok(true));
    let without = |set: &RuleSet, origin| {
        let mut draft = Draft::of(set);
        draft.prefix(rule.prefix).remove_origin(origin);
        let mut set = set.clone();
        set.apply(&draft.finish());
        set
    };
    let one = without(&set, Origin::Added);
    assert_eq!(one.iter().map(|it| it.origins.first()).collect::<Vec<_>>(), [Origin::Applied]);
    assert!(without(&one, Origin::Applied).is_empty());
}

/// The most specific source wins among rules of the same prefix and ports, and fewer ports win over it.
#[test]
fn sources_select() {
    let set = set(&[
        tcp("192.0.2.0/24", "all", "", "anyone"),
        tcp("192.0.2.0/24 from 198.51.100.0/24", "all", "22", "net"),
        tcp("192.0.2.0/24 from 198.51.100.7/32", "all", "", "one"),
        tcp("192.0.2.0/24 from 198.51.0.0/16", "80", "", "web"),
        tcp("192.0.2.1/32 from 203.0.113.0/24", "all", "", "longer"),
    ]);
    for (source, to, port, expected) in [
        ("203.0.113.1", "192.0.2.2", 1, "anyone"),
        ("203.0.113.1", "192.0.2.1", 1, "longer"),
        ("198.51.100.1", "192.0.2.1", 1, "net"),
        ("198.51.100.1", "192.0.2.1", 22, "host"),
        ("198.51.100.7", "192.0.2.1", 1, "one"),
        ("198.51.100.7", "192.0.2.1", 80, "web"),
        ("198.51.1.7", "192.0.2.1", 80, "web"),
    ] {
        assert_eq!(answer_to(&set, source, to, port), expected, "{source} to {to}:{port}");
    }
}

#[test]
fn a_draft_changes_what_it_touches() {
    let before = set(&[tcp("192.0.2.0/24", "80", "", "a"), tcp("192.0.2.0/25", "80", "", "a")]);
    let (longer, shorter) = ("192.0.2.0/25".parse().unwrap(), "192.0.2.0/24".parse().unwrap());
    let mut draft = Draft::of(&before);
    assert_eq!(draft.prefix(longer).remove(|_| true).len(), 1);
    draft.prefix(shorter).insert(&tcp("192.0.2.0/24", "443", "", "b")).unwrap();
    assert!(draft.of_prefix(&longer).is_none());
    assert_eq!(draft.of_prefix(&shorter).unwrap().len(), 2);
    let change = draft.finish();
    assert_eq!(change.prefixes(), [longer, shorter]);
    let mut after = before.clone();
    after.apply(&change);
    assert_eq!((before.len(), after.len()), (2, 2));
    let around: Vec<_> = after.around("192.0.2.7/32".parse().unwrap()).map(|(prefix, _)| prefix).collect();
    assert_eq!(around, [shorter]);
    after.apply(&change.inverse());
    assert!(after.iter().zip(before.iter()).all(|(a, b)| a.to_rule() == b.to_rule()));
    assert_eq!(after.within("192.0.0.0/16".parse().unwrap()).count(), 2);
}

/// Many rules at once are as many one after the other, contradictions included.
#[test]
fn many_at_once() {
    let rules = [
        tcp("192.0.2.0/24", "all", "22", "wide"),
        tcp("192.0.2.0/24", "80", "", "web"),
        tcp("192.0.2.128/25", "443", "", "half"),
        tcp("192.0.2.0/24", "80", "", "web"),
        tcp("192.0.2.0/24 from 198.51.100.0/24", "80", "", "net"),
    ];
    let mut together = set(&rules[..1]);
    together.extend(rules.iter().cloned()).unwrap();
    let one_by_one = set(&rules);
    assert_eq!(together.len(), one_by_one.len());
    assert!(together.iter().zip(one_by_one.iter()).all(|(a, b)| a.to_rule() == b.to_rule()));
    let conflict = together.extend([tcp("192.0.2.0/24", "80", "", "other")].into_iter()).unwrap_err();
    assert!(matches!(conflict, Conflict::Targets { port: 80, .. }));
}

proptest! {
    #[test]
    fn what_is_around_and_within_is_found(first in arbitrary::rules(20), second in arbitrary::rules(20), is_all: bool) {
        // From one set to another, in one change or by way of none at all.
        let mut set = first.clone();
        let rules_of = |it: &RuleSet| it.prefixes().map(|(prefix, rules)| (*prefix, rules.clone())).collect::<Vec<_>>();
        let (removed, added) = (rules_of(&first), rules_of(&second));
        if is_all {
            set.apply(&Change { removed: removed.clone(), added: added.clone() });
        } else {
            let kept = removed.iter().filter(|(prefix, _)| second.of_prefix(prefix).is_some()).cloned().collect();
            set.apply(&Change { removed: kept, added: added.clone() });
        }
        let there: Vec<Prefix> = set.prefixes().map(|(prefix, _)| *prefix).collect();
        for one in there.iter().copied().chain(removed.iter().chain(&added).map(|(prefix, _)| *prefix)) {
            for prefix in [one, one.truncated(one.len() / 2)] {
                let contains = |outer: &Prefix, inner: &Prefix| {
                    outer.is_ipv4() == inner.is_ipv4() && outer.len() <= inner.len() && inner.truncated(outer.len()) == *outer
                };
                let around: Vec<_> = set.around(prefix).map(|(it, _)| it).collect();
                let within: Vec<_> = set.within(prefix).map(|(it, _)| it).collect();
                prop_assert_eq!(around, there.iter().filter(|it| contains(it, &prefix)).copied().collect::<Vec<_>>());
                prop_assert_eq!(within, there.iter().filter(|it| contains(&prefix, it)).copied().collect::<Vec<_>>());
            }
        }
    }
}
