//! The steps from one state of the kernel to another, so that every packet is judged by either the rules before or those
//! after, whichever lines and sets it meets.
//!
//! Three things make that so:
//! - All lines are replaced in one transaction, and an element comes or goes in one step.
//! - What comes does so in order of precedence, and before anything goes; what goes does so in reverse. So of the
//!   rules that a packet meets at any time, the first one that matches is the one that decides before or after.
//! - Between steps that may concern the same packet, those that the kernel has begun to process are waited for.

use std::{
    collections::{BTreeSet, HashSet},
    mem,
    net::SocketAddr,
};

use super::{
    chain_rules::{self, ChainRule, Family},
    groups::{self, Effect, Group, Groups, Key, Prefixes, Sockets},
};
use crate::rules::{Prefix, RuleSet, RuleView};

/// An element of a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Element {
    pub(super) set: String,
    pub(super) prefix: Prefix,
}

/// Something that the kernel does as a whole, or that no packet sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// New sets by name, which no line names yet.
    Make(Vec<(String, Vec<Prefix>)>),
    /// These are the lines from now on.
    Lines { lines: Vec<ChainRule>, waiting: Vec<SocketAddr> },
    /// One element after the other.
    Elements { added: Vec<Element>, removed: Vec<Element> },
    /// The kernel finishes the packets that it has begun to process.
    Wait,
}

/// What our part of the kernel is like.
#[derive(Clone, Debug, Default)]
pub(super) struct State {
    pub(super) groups: Groups,
    /// The sockets of others that the guards name.
    pub(super) waiting: Vec<SocketAddr>,
}

impl State {
    /// The sets that lines name.
    pub(super) fn sets(&self) -> impl Iterator<Item = (&Key, &str)> {
        self.groups.iter().filter_map(|(key, group)| Some((key, group.prefixes.set()?)))
    }
}

/// Steps, and what the kernel is like after them.
#[derive(Debug)]
pub(super) struct Way {
    pub(super) steps: Vec<Step>,
    pub(super) end: State,
    /// Whether sets go whose rules stay.
    pub(super) is_anew: bool,
}

/// The state after the steps.
#[derive(Debug)]
pub(super) struct Target<'a> {
    pub(super) family: Family,
    /// Up to how many prefixes of a group have lines of their own, see [`groups::FEW`].
    pub(super) few: usize,
    pub(super) rules: RuleView<'a>,
    pub(super) sockets: Sockets<'a>,
    pub(super) waiting: Vec<SocketAddr>,
}

/// The steps that depend on nothing but the target: everything is rebuilt and takes the place of what was there.
pub(super) fn from_anything(target: Target<'_>, mut new_name: impl FnMut() -> String) -> anyhow::Result<Way> {
    let Target { family, few, rules, sockets, waiting } = target;
    let mut sets = Vec::new();
    let mut end = Groups::new();
    for (key, (verdicts, prefixes)) in groups::sort(rules, family, &sockets)? {
        // The kernel's sets can't hold the whole address space, of which there is one.
        let prefixes = if prefixes.len() > few && key.len > 0 {
            let (name, len) = (new_name(), prefixes.len());
            sets.push((name.clone(), prefixes));
            Prefixes::Set { name, len }
        } else {
            Prefixes::Few(prefixes)
        };
        end.insert(key, Group { verdicts, prefixes });
    }
    let mut steps = making(sets);
    steps.push(Step::Lines { lines: chain_rules::lines(&end, rules), waiting: waiting.clone() });
    Ok(Way { steps, end: State { groups: end, waiting }, is_anew: true })
}

fn making(sets: Vec<(String, Vec<Prefix>)>) -> Vec<Step> {
    if sets.is_empty() { Vec::new() } else { vec![Step::Make(sets)] }
}

/// The steps from a known state whose rules differ from the target's in these prefixes; nothing if no short sequence leads there.
pub(super) fn from_state(
    start: &State,
    previous: &RuleSet,
    changed: &[Prefix],
    target: &Target<'_>,
    mut new_name: impl FnMut() -> String,
) -> anyhow::Result<Option<Way>> {
    let Some(Moves { coming, going, mut end }) = moves(&start.groups, previous, changed, target)? else {
        return Ok(None);
    };
    let mut sets = Vec::new();
    for (key, group) in &mut end {
        if let Prefixes::Few(prefixes) = &mut group.prefixes
            && prefixes.len() > target.few
            && key.len > 0
        {
            let (name, len) = (new_name(), prefixes.len());
            sets.push((name.clone(), mem::take(prefixes)));
            group.prefixes = Prefixes::Set { name, len };
        }
    }
    let Some(elements) = Elements::split(&start.groups, &end, coming, going) else { return Ok(None) };
    let before = chain_rules::lines(&start.groups, previous.view());
    let after = chain_rules::lines(&end, target.rules);
    let is_of_lines = before != after || start.waiting != target.waiting;
    let has_other_socket = |(key, group): (&Key, &Group)| end.get(key).is_some_and(|it| it.verdicts != group.verdicts);
    if !elements.is_empty() && start.groups.iter().any(has_other_socket) {
        // For a moment the rules of the previous plan would steer to the new sockets.
        return Ok(None);
    }
    let mut steps = making(sets);
    if is_of_lines && !elements.is_empty() {
        let mut waiting = [&start.waiting[..], &target.waiting].concat();
        waiting.sort_unstable();
        waiting.dedup();
        steps.push(Step::Lines { lines: both(&start.groups, previous, &end, target.rules), waiting });
        steps.push(Step::Wait);
    }
    if !elements.is_empty() {
        steps.extend(elements.into_steps());
        if is_of_lines {
            steps.push(Step::Wait);
        }
    }
    if is_of_lines {
        steps.push(Step::Lines { lines: after, waiting: target.waiting.clone() });
    }
    Ok(Some(Way { steps, end: State { groups: end, waiting: target.waiting.clone() }, is_anew: false }))
}

/// Which prefixes come to which groups and go from which, and what that makes of the groups.
struct Moves {
    coming: Vec<(Key, Prefix)>,
    going: Vec<(Key, Prefix)>,
    end: Groups,
}

/// Nothing if the sockets have changed so that prefixes that have not are to be counted differently.
fn moves(start: &Groups, previous: &RuleSet, changed: &[Prefix], target: &Target<'_>) -> anyhow::Result<Option<Moves>> {
    let mut end = start.clone();
    let (mut coming, mut going) = (Vec::new(), Vec::new());
    for prefix in changed.iter().filter(|prefix| target.family.has(prefix.address())) {
        let effects = [Effect::Steer, Effect::Drop];
        let held = previous.of_prefix(prefix).into_iter().flat_map(|it| it.iter());
        let before =
            held.flat_map(|held| effects.map(|effect| Key { len: prefix.len(), terms: held.terms.clone(), effect }));
        let before: Vec<_> = before.filter(|key| start.contains_key(key)).collect();
        let mut after = Vec::new();
        for held in target.rules.of_prefix(prefix).into_iter().flat_map(|it| it.iter()) {
            after.extend(target.sockets.keys(prefix.len(), &held.terms)?);
        }
        going.extend(
            before.iter().filter(|key| !after.iter().any(|(it, _)| it == *key)).map(|key| (key.clone(), *prefix)),
        );
        for (key, verdicts) in after.into_iter().filter(|(key, _)| !before.contains(key)) {
            coming.push((key.clone(), *prefix));
            let group = end.entry(key).or_insert(Group { verdicts, prefixes: Prefixes::Few(Vec::new()) });
            match &mut group.prefixes {
                Prefixes::Few(few) => few.push(*prefix),
                Prefixes::Set { len, .. } => *len += 1,
            }
        }
    }
    for (key, prefix) in &going {
        let Some(group) = end.get_mut(key) else { continue };
        match &mut group.prefixes {
            Prefixes::Few(few) => few.retain(|it| it != prefix),
            Prefixes::Set { len, .. } => *len = len.saturating_sub(1),
        }
    }
    end.retain(|_, group| group.prefixes.len() > 0);
    for (key, group) in &mut end {
        let verdicts = target.sockets.verdicts(&key.terms, key.effect)?;
        let transports = |it: &groups::Verdicts| it.iter().map(|(transport, _)| *transport).collect::<Vec<_>>();
        if transports(&verdicts) != transports(&group.verdicts) {
            return Ok(None);
        }
        group.verdicts = verdicts;
    }
    Ok(Some(Moves { coming, going, end }))
}

/// The changes that are made in sets which stay.
struct Elements {
    coming: Vec<(Key, Element)>,
    going: Vec<(Key, Element)>,
}

impl Elements {
    /// What of the moves is not done by lines. Nothing if one step for all lines would be too early or too late.
    fn split(start: &Groups, end: &Groups, coming: Vec<(Key, Prefix)>, going: Vec<(Key, Prefix)>) -> Option<Self> {
        let staying_set = |key: &Key| {
            let set = end.get(key)?.prefixes.set()?;
            start.get(key)?.prefixes.set().filter(|previous| *previous == set)
        };
        let sort_out = |moves: Vec<(Key, Prefix)>| {
            let is_apart = are_apart(moves.iter().map(|(_, prefix)| *prefix));
            let (elements, by_line): (Vec<_>, Vec<_>) =
                moves.into_iter().partition(|(key, _)| staying_set(key).is_some());
            let first_element = elements.iter().map(|(key, _)| key).min();
            let last_line = by_line.iter().map(|(key, _)| key).max();
            // Lines come before the elements and go after them, so they must be the more specific ones.
            let is_in_order = is_apart || first_element.is_none() || first_element >= last_line;
            let mut elements: Vec<_> = elements
                .into_iter()
                .filter_map(|(key, prefix)| {
                    let set = staying_set(&key)?.to_owned();
                    Some((key, Element { set, prefix }))
                })
                .collect();
            elements.sort_by(|(a, _), (b, _)| a.cmp(b));
            is_in_order.then_some(elements)
        };
        Some(Self { coming: sort_out(coming)?, going: sort_out(going)? })
    }

    fn is_empty(&self) -> bool {
        self.coming.is_empty() && self.going.is_empty()
    }

    fn into_steps(self) -> Vec<Step> {
        let Self { coming, going } = self;
        let elements = |some: Vec<(Key, Element)>| some.into_iter().map(|(_, element)| element).collect::<Vec<_>>();
        if are_apart(coming.iter().chain(&going).map(|(_, element)| element.prefix)) {
            return vec![Step::Elements { added: elements(coming), removed: elements(going) }];
        }
        let added = in_order(coming).into_iter().map(|it| Step::Elements { added: elements(it), removed: Vec::new() });
        let mut removed = in_order(going);
        removed.reverse();
        let removed = removed.into_iter().map(|it| Step::Elements { added: Vec::new(), removed: elements(it) });
        let mut steps: Vec<_> = added.chain(removed).flat_map(|step| [step, Step::Wait]).collect();
        steps.pop();
        steps
    }
}

/// Elements in portions that have to follow one another.
fn in_order(elements: Vec<(Key, Element)>) -> Vec<Vec<(Key, Element)>> {
    let mut portions: Vec<Vec<_>> = Vec::new();
    let is_one = are_apart(elements.iter().map(|(_, element)| element.prefix));
    for element in elements {
        match portions.last_mut() {
            // The prefixes of a group are disjoint.
            Some(portion) if is_one || portion.last().is_some_and(|(key, _)| *key == element.0) => {
                portion.push(element);
            }
            _ => portions.push(vec![element]),
        }
    }
    portions
}

/// Whether no address lies in two of the prefixes, all of which are of one family.
fn are_apart(prefixes: impl Iterator<Item = Prefix>) -> bool {
    let mut bounds: Vec<_> = prefixes.map(|prefix| prefix.bounds()).collect();
    bounds.sort_unstable();
    bounds.is_sorted_by(|(_, last), (first, _)| last < first)
}

/// The lines of two states at once, for the moment in which one passes into the other. Those of the previous state count
/// for no rule any more.
fn both(start: &Groups, previous: &RuleSet, end: &Groups, rules: RuleView<'_>) -> Vec<ChainRule> {
    let keys: BTreeSet<_> = start.keys().chain(end.keys()).collect();
    let mut lines = Vec::new();
    for key in keys {
        let of_group = |groups: &Groups, rules| {
            groups.get(key).map(|it| chain_rules::of_group(key, &it.verdicts, &it.prefixes, rules)).unwrap_or_default()
        };
        let mut new = of_group(end, rules);
        let known: HashSet<_> = new.iter().map(ChainRule::without_number).collect();
        let old = of_group(start, previous.view()).into_iter().map(|line| line.without_number());
        new.extend(old.filter(|line| !known.contains(line)));
        lines.extend(new);
    }
    lines
}

#[cfg(test)]
mod tests;
