//! Tests of the desired state: ids, slots, drains and what a change patches.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Desired, Drains, Scope};
use crate::{
    engine::tests::fixtures::{adding, removing, rule},
    rules::{Draft, Origin, Overlay, Prefix, PrefixRules, Rule, ServiceName},
};

fn desired(rules: &[Rule]) -> Desired {
    let mut desired = Desired::new(Drains::default());
    let change = adding(&desired, rules);
    let transition = desired.begin(change).unwrap();
    desired.finish(transition);
    desired
}

fn read(desired: &Desired) -> Vec<(Prefix, PrefixRules)> {
    desired.rules().prefixes().map(|(prefix, rules)| (*prefix, rules.clone())).collect()
}

#[test]
fn a_change_goes_forward_once_and_back_once() {
    let mut desired = desired(&[rule("192.0.2.0/24", "80", Origin::Added)]);
    let (before, added) = (read(&desired), desired.added_by_hand());
    let change =
        adding(&desired, &[rule("192.0.2.0/24", "443", Origin::Applied), rule("192.0.2.1", "1", Origin::Added)]);
    let patches = desired.patches();
    let transition = desired.begin(change).unwrap();
    assert_eq!((desired.rules().len(), desired.added_by_hand().len()), (3, 2));
    assert_eq!(desired.patches(), patches + 1);
    desired.roll_back(transition);
    assert_eq!((read(&desired), desired.added_by_hand()), (before, added));
    assert_eq!(desired.patches(), patches + 2);
}

#[test]
fn rules_that_stay_keep_their_numbers_and_others_move() {
    let mut desired =
        desired(&[rule("192.0.2.0/24", "80", Origin::Added), rule("198.51.100.0/24", "80", Origin::Added)]);
    let numbers = |desired: &Desired| desired.rules().iter().map(|it| it.number).collect::<Vec<_>>();
    assert_eq!(numbers(&desired), [0, 1]);
    // Another origin says nothing else.
    let change = adding(&desired, &[rule("192.0.2.0/24", "80", Origin::Applied)]);
    let transition = desired.begin(change).unwrap();
    assert!(transition.steps().prefixes.is_empty() && transition.steps().fresh.iter().all(Range::is_empty));
    desired.finish(transition);
    assert_eq!(numbers(&desired), [0, 1]);
    // Another rule does: both of the prefix get new numbers, and what was counted moves along.
    let change = adding(&desired, &[rule("192.0.2.0/24", "443", Origin::Added)]);
    let transition = desired.begin(change).unwrap();
    let steps = transition.steps();
    let numbers_of = |ranges: &[Range<u32>]| ranges.iter().cloned().flatten().collect::<Vec<_>>();
    assert_eq!((numbers_of(&steps.fresh), numbers_of(&steps.freed)), (vec![2, 3], vec![0]));
    assert_eq!(steps.moved.iter().map(|(before, _)| *before).collect::<Vec<_>>(), [0]);
    assert_eq!(numbers(&desired), [2, 3, 1]);
}

#[test]
fn clients_of_a_prefix_that_goes_are_refused_without_a_change_of_the_rules() {
    let mut desired =
        desired(&[rule("192.0.2.0/24", "80", Origin::Added), rule("198.51.100.0/24", "80", Origin::Added)]);
    let change = removing(&desired, "192.0.2.0/24");
    let transition = desired.begin(change).unwrap();
    let (rules, patches) = (read(&desired), desired.patches());

    let withdrawn: Vec<_> = transition.change().removed.iter().collect();
    let (mut overlay, fresh) = desired.refusing(&withdrawn).unwrap();
    assert!(fresh.is_empty());
    let view = desired.drained(&mut overlay);
    let refused: Vec<_> = view.iter().filter(|it| it.terms.service == ServiceName::nobody()).collect();
    assert_eq!((view.len(), refused.len(), refused[0].number), (2, 1, 0));
    assert_eq!((read(&desired), desired.patches()), (rules, patches));
}

#[test]
fn a_rule_that_replaces_the_refused_one_is_read_beside_it() {
    let mut without_route = rule("192.0.2.0/24", "443", Origin::Added);
    Arc::make_mut(&mut without_route.terms).route = false;
    let mut desired = desired(&[rule("192.0.2.0/24", "80", Origin::Added)]);
    let mut draft = Draft::of(desired.rules());
    let rules = draft.prefix("192.0.2.0/24".parse().unwrap());
    rules.remove(|_| true);
    rules.insert(&without_route).unwrap();
    let change = draft.finish();
    let transition = desired.begin(change).unwrap();
    let withdrawn: Vec<_> = transition.change().removed.iter().collect();
    let (overlay, fresh) = desired.refusing(&withdrawn).unwrap();
    let view = desired.rules().through(&overlay);
    assert_eq!(view.len(), 2);
    let numbers: Vec<_> = view.iter().map(|it| it.number).collect();
    assert_eq!(fresh.iter().cloned().flatten().collect::<Vec<_>>(), numbers);
    desired.give_back(&fresh);
}

#[test]
fn what_is_drained_is_read_as_refused() {
    let mut desired = desired(&[rule("192.0.2.0/24", "80", Origin::Added)]);
    let drains = desired.drains_mut();
    drains.begin(Scope::all(None, Vec::new()), Duration::ZERO);
    drains.withdrawn_by(None, Instant::now());
    drains.advance(Instant::now(), |_| true);
    let patches = desired.patches();
    let mut overlay = Overlay::default();
    let view = desired.drained(&mut overlay);
    assert!(view.iter().all(|it| it.terms.service == ServiceName::drained()));
    assert_eq!(desired.patches(), patches);
    assert!(desired.rules().iter().all(|it| it.terms.service == ServiceName::default_service()));
}

#[test]
fn terms_are_shared_and_slots_come_back() {
    let mut desired = Desired::new(Drains::default());
    let terms = Arc::unwrap_or_clone(rule("192.0.2.0/24", "80", Origin::Added).terms);
    let [one, other] = [terms.clone(), terms].map(|terms| desired.shared(terms));
    assert!(Arc::ptr_eq(&one, &other));
    assert_eq!([desired.take_slot().unwrap(), desired.take_slot().unwrap()], [1, 2]);
    desired.give_back_slot(1);
    // It rests first.
    assert_eq!(desired.take_slot().unwrap(), 3);
}

#[test]
fn what_was_applied_is_kept_as_lines() {
    let desired = desired(&[rule("192.0.2.0/24", "80", Origin::Applied), rule("192.0.2.1", "80", Origin::Added)]);
    assert_eq!(desired.applied_lines().lines().count(), 1);
    assert!(desired.applied_lines().starts_with("192.0.2.0/24"), "{}", desired.applied_lines());
    assert_eq!(desired.added_by_hand().len(), 1);
}
