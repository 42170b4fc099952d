//! The rule set: all rules in order of precedence, without conflicts, and changes to it.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap, btree_map::Entry},
    mem,
    sync::Arc,
};

use smallvec::SmallVec;

use super::{Origin, Origins, Prefix, Rule, RuleSpec, shared_map::SharedMap};

/// Rules in order of precedence, without contradictions. A copy takes little time and memory: see `SharedMap`.
#[derive(Clone, Debug, Default)]
pub struct RuleSet {
    pub(super) prefixes: SharedMap<Prefix, PrefixRules>,
    /// How many prefixes there are of each length of a family, in their order. Nobody looks for others.
    lengths: BTreeMap<(bool, Reverse<u8>), usize>,
    rules: usize,
}

/// The rules of one prefix, in order of precedence; at least one.
///
/// They have numbers in this order, one after the other, and stand under these numbers in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PrefixRules {
    /// The number of the first one, once they have numbers.
    pub first_number: u32,
    rules: SmallVec<[RuleEntry; 1]>,
}

/// A rule without its prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleEntry {
    /// What it says.
    pub terms: Arc<RuleSpec>,
    /// Where the rule comes from.
    pub origins: Origins,
}

/// A rule and its number.
#[derive(Clone, Copy, Debug)]
pub struct RuleRef<'a> {
    /// The prefix.
    pub prefix: Prefix,
    /// What the rule says.
    pub terms: &'a Arc<RuleSpec>,
    /// Where the rule comes from.
    pub origins: Origins,
    /// Its number.
    pub number: u32,
}

impl RuleRef<'_> {
    /// The rule by itself.
    pub fn to_rule(self) -> Rule {
        Rule { prefix: self.prefix, terms: Arc::clone(self.terms), origins: self.origins }
    }
}

/// Two rules that can't both hold.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// Neither is more specific, and they disagree about a port.
    #[error(
        "{new} contradicts {old}: both cover the same number of ports of the same prefix and \
         disagree about port {port}"
    )]
    Targets {
        /// The rule that was to be added.
        new: Box<Rule>,
        /// The rule that is there.
        old: Box<Rule>,
        /// The lowest port that they disagree about.
        port: u16,
    },
    /// The same rule, once with a local route and once without.
    #[error("{0} is there already, but {there}", there = if .0.terms.route { "with a local route" } else { "without a local route" })]
    Route(Box<Rule>),
}

impl PrefixRules {
    /// The rules.
    pub fn iter(&self) -> std::slice::Iter<'_, RuleEntry> {
        self.rules.iter()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.rules.len()
    }

    /// Whether there is none, which is so only while they are being changed.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Whether anyport makes the prefix local.
    pub fn is_routed(&self) -> bool {
        self.rules.iter().any(|it| it.terms.route)
    }

    /// Whether these say the same in the same order, whatever their origins are.
    pub fn say_the_same_as(&self, other: &Self) -> bool {
        self.len() == other.len() && self.iter().zip(other.iter()).all(|(a, b)| a.terms == b.terms)
    }

    /// The rules with their numbers.
    pub fn numbered(&self, prefix: Prefix) -> impl Iterator<Item = RuleRef<'_>> {
        let numbers = self.first_number..;
        numbers.zip(&self.rules).map(move |(number, RuleEntry { terms, origins })| RuleRef {
            prefix,
            terms,
            origins: *origins,
            number,
        })
    }

    /// Adds a rule, or an origin to the one that says the same. Returns whether that made a difference.
    ///
    /// # Errors
    /// The rule contradicts one that is there; nothing has changed.
    pub fn insert(&mut self, rule: &Rule) -> Result<bool, Conflict> {
        let Rule { prefix, terms, origins } = rule;
        self.give_way(*origins);
        let at = self.rules.partition_point(|old| old.terms.precedence() < terms.precedence());
        if let Some(old) = self.rules.get_mut(at)
            && old.terms.precedence() == terms.precedence()
        {
            if old.terms.route != terms.route {
                let old = Rule { prefix: *prefix, terms: Arc::clone(&old.terms), origins: old.origins };
                return Err(Conflict::Route(Box::new(old)));
            }
            let before = old.origins;
            old.origins = before.union(*origins);
            return Ok(before != old.origins);
        }
        for old in &self.rules {
            if let Some(port) = contradiction(terms, &old.terms) {
                let old = Rule { prefix: *prefix, terms: Arc::clone(&old.terms), origins: old.origins };
                return Err(Conflict::Targets { new: Box::new(rule.clone()), old: Box::new(old), port });
            }
        }
        self.rules.insert(at, RuleEntry { terms: Arc::clone(terms), origins: *origins });
        Ok(true)
    }

    /// An address is left to the host only where nobody else has a rule about it.
    fn give_way(&mut self, to: Origins) {
        let host = Origins::from(Origin::Host);
        if to != host {
            self.rules.retain(|held| held.origins != host);
        }
    }

    /// Adds many rules of this prefix, as [`Self::insert`] would one after the other.
    ///
    /// # Errors
    /// A rule contradicts another one, and what is here is of no use any more.
    pub fn extend(&mut self, prefix: Prefix, rules: impl Iterator<Item = RuleEntry>) -> Result<(), Conflict> {
        for held in rules {
            self.give_way(held.origins);
            self.rules.push(held);
        }
        // Stable, so that what was here stays where the same comes again.
        self.rules.sort_by(|a, b| a.terms.precedence().cmp(&b.terms.precedence()));
        let to_rule =
            |held: &RuleEntry| Box::new(Rule { prefix, terms: Arc::clone(&held.terms), origins: held.origins });
        let mut merged: SmallVec<[RuleEntry; 1]> = SmallVec::with_capacity(self.rules.len());
        for held in mem::take(&mut self.rules) {
            match merged.last_mut() {
                Some(last) if last.terms.precedence() == held.terms.precedence() => {
                    if last.terms.route != held.terms.route {
                        return Err(Conflict::Route(to_rule(last)));
                    }
                    last.origins = last.origins.union(held.origins);
                }
                _ => merged.push(held),
            }
        }
        self.rules = merged;
        match self.contradictory() {
            None => Ok(()),
            Some((old, new, port)) => Err(Conflict::Targets { new: to_rule(new), old: to_rule(old), port }),
        }
    }

    /// Two rules that contradict each other, and the port, found by going through the ports once.
    fn contradictory(&self) -> Option<(&RuleEntry, &RuleEntry, u16)> {
        if self.rules.len() < 2 {
            return None;
        }
        // Where the ports that the rules match begin, and where they end.
        let mut edges: Vec<(u32, bool, usize)> = Vec::new();
        let counts: Vec<u32> = self.rules.iter().map(|held| held.terms.matched_ports().count()).collect();
        for (place, held) in self.rules.iter().enumerate() {
            for (first, last) in held.terms.matched_ports().ranges() {
                edges.push((u32::from(*first), true, place));
                edges.push((u32::from(*last) + 1, false, place));
            }
        }
        edges.sort_unstable();
        let mut open: HashMap<(u32, Option<Prefix>), Vec<usize>> = HashMap::new();
        for (_, begins, place) in edges {
            let new = &self.rules[place];
            let rivals = open.entry((counts[place], new.terms.source)).or_default();
            if !begins {
                rivals.retain(|it| *it != place);
                continue;
            }
            for rival in rivals.iter() {
                let old = &self.rules[*rival];
                if let Some(port) = contradiction(&new.terms, &old.terms) {
                    return Some((old, new, port));
                }
            }
            rivals.push(place);
        }
        None
    }

    /// Adds a rule where it belongs, whatever it contradicts.
    pub(crate) fn insert_unchecked(&mut self, terms: &Arc<RuleSpec>, origins: Origins) {
        let at = self.rules.partition_point(|old| old.terms.precedence() < terms.precedence());
        self.rules.insert(at, RuleEntry { terms: Arc::clone(terms), origins });
    }

    /// Takes out the rules for which `select` holds and returns them.
    pub fn remove(&mut self, mut select: impl FnMut(&RuleEntry) -> bool) -> Vec<RuleEntry> {
        let (gone, kept): (Vec<_>, Vec<_>) = mem::take(&mut self.rules).into_iter().partition(|it| select(it));
        self.rules = kept.into();
        gone
    }

    /// Takes this origin away from all rules, and out those that have no other.
    pub fn remove_origin(&mut self, origin: Origin) {
        for held in &mut self.rules {
            held.origins = held.origins.without(origin);
        }
        self.rules.retain(|held| !held.origins.is_empty());
    }
}

impl<'a> IntoIterator for &'a PrefixRules {
    type Item = &'a RuleEntry;
    type IntoIter = std::slice::Iter<'a, RuleEntry>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl RuleSet {
    /// The rules in order of precedence.
    pub fn iter(&self) -> impl Iterator<Item = RuleRef<'_>> {
        self.prefixes.iter().flat_map(|(prefix, rules)| rules.numbered(*prefix))
    }

    /// The prefixes in order of precedence, each with its rules.
    pub fn prefixes(&self) -> impl Iterator<Item = (&Prefix, &PrefixRules)> {
        self.prefixes.iter()
    }

    /// How many prefixes there are.
    pub fn prefix_count(&self) -> usize {
        self.prefixes.len()
    }

    /// How many rules there are.
    pub fn len(&self) -> usize {
        self.rules
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.rules == 0
    }

    /// Whether this very rule is here, under its number.
    pub fn has_under_its_number(&self, rule: &RuleRef<'_>) -> bool {
        let entry = self.of_prefix(&rule.prefix).and_then(|rules| {
            let at = rule.number.checked_sub(rules.first_number)?;
            rules.rules.get(usize::try_from(at).ok()?)
        });
        entry.is_some_and(|entry| entry.terms == *rule.terms)
    }

    /// The rules of exactly this prefix.
    pub fn of_prefix(&self, prefix: &Prefix) -> Option<&PrefixRules> {
        self.prefixes.get(prefix)
    }

    /// The prefixes around this one, itself included, in order of precedence.
    pub fn around(&self, prefix: Prefix) -> impl Iterator<Item = (Prefix, &PrefixRules)> {
        let lengths = self.lengths_of(prefix).skip_while(move |len| *len > prefix.len());
        lengths.map(move |len| prefix.truncated(len)).filter_map(|it| Some((it, self.prefixes.get(&it)?)))
    }

    /// The prefixes inside of this one, itself included, in order of precedence.
    pub fn within(&self, prefix: Prefix) -> impl Iterator<Item = (Prefix, &PrefixRules)> {
        let (first, last) = prefix.bounds();
        self.lengths_of(prefix).take_while(move |len| *len >= prefix.len()).flat_map(move |len| {
            let at = |address| Prefix::from_bits(prefix.is_ipv4(), address, len);
            self.prefixes.range(at(first)..=at(last)).map(|(prefix, rules)| (*prefix, rules))
        })
    }

    /// The prefixes behind this one in order of precedence, each with its rules; without one, all of them.
    pub fn after(&self, prefix: Option<Prefix>) -> impl Iterator<Item = (Prefix, &PrefixRules)> {
        let entries = prefix.map_or_else(|| self.prefixes.iter(), |prefix| self.prefixes.after(&prefix));
        entries.map(|(prefix, rules)| (*prefix, rules))
    }

    /// Of [`Self::within`], those behind a prefix. What is before it is not gone through.
    pub fn within_after(&self, within: Prefix, after: Option<Prefix>) -> impl Iterator<Item = (Prefix, &PrefixRules)> {
        let (first, last) = within.bounds();
        self.lengths_of(within).take_while(move |len| *len >= within.len()).flat_map(move |len| {
            let at = |address| Prefix::from_bits(within.is_ipv4(), address, len);
            let from = after.map_or(at(first), |after| at(first).max(after));
            let to = at(last);
            // Where all of this length is before it, nothing is left of it.
            let range = (from <= to).then(|| self.prefixes.range(from..=to)).into_iter().flatten();
            range.map(|(prefix, rules)| (*prefix, rules)).filter(move |(prefix, _)| after.is_none_or(|it| *prefix > it))
        })
    }

    /// The lengths of all prefixes of a family, the longest first.
    pub(super) fn lengths_of(&self, like: Prefix) -> impl Iterator<Item = u8> {
        let family = !like.is_ipv4();
        self.lengths.range((family, Reverse(u8::MAX))..=(family, Reverse(0))).map(|((_, len), _)| len.0)
    }

    /// The rules of a prefix, which is there from now on.
    fn entry(&mut self, prefix: Prefix) -> &mut PrefixRules {
        self.prefixes.entry(prefix, || {
            *self.lengths.entry(length(&prefix)).or_default() += 1;
            PrefixRules::default()
        })
    }

    /// Adds a rule, or an origin to the one that says the same. Returns whether that made a difference.
    ///
    /// # Errors
    /// The rule contradicts one that is there; the set is as before.
    pub fn insert(&mut self, rule: &Rule) -> Result<bool, Conflict> {
        let rules = self.entry(rule.prefix);
        let before = rules.len();
        let is_new = rules.insert(rule)?;
        let after = rules.len();
        self.rules += after - before;
        Ok(is_new)
    }

    /// Adds many rules, as [`Self::insert`] would one after the other.
    ///
    /// # Errors
    /// A rule contradicts another one, and the set is of no use any more.
    pub fn extend(&mut self, rules: impl Iterator<Item = Rule>) -> Result<(), Conflict> {
        let mut by_prefix: BTreeMap<Prefix, Vec<RuleEntry>> = BTreeMap::new();
        for Rule { prefix, terms, origins } in rules {
            by_prefix.entry(prefix).or_default().push(RuleEntry { terms, origins });
        }
        for (prefix, held) in by_prefix {
            let of_prefix = self.entry(prefix);
            let before = of_prefix.len();
            of_prefix.extend(prefix, held.into_iter())?;
            let after = of_prefix.len();
            self.rules += after - before;
        }
        Ok(())
    }

    /// Carries a change out that was made for this set.
    pub fn apply(&mut self, change: &Change) {
        let before: usize = change.removed.iter().map(|(_, rules)| rules.len()).sum();
        let after: usize = change.added.iter().map(|(_, rules)| rules.len()).sum();
        self.rules = self.rules + after - before;
        let is_much = self.prefixes.is_much(change.removed.len() + change.added.len());
        for (prefix, _) in &change.removed {
            let is_there =
                if is_much { self.of_prefix(prefix).is_some() } else { self.prefixes.remove(prefix).is_some() };
            if is_there && let Entry::Occupied(mut count) = self.lengths.entry(length(prefix)) {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                }
            }
        }
        if !is_much {
            for (prefix, rules) in &change.added {
                *self.entry(*prefix) = rules.clone();
            }
            return;
        }
        let is_removed = |prefix: &Prefix| change.removed.binary_search_by_key(prefix, |(it, _)| *it).is_ok();
        for (prefix, _) in &change.added {
            if is_removed(prefix) || self.of_prefix(prefix).is_none() {
                *self.lengths.entry(length(prefix)).or_default() += 1;
            }
        }
        self.prefixes.replace(&change.removed, &change.added);
    }
}

/// The place of a prefix's length in the order of prefixes.
pub(super) fn length(prefix: &Prefix) -> (bool, Reverse<u8>) {
    (!prefix.is_ipv4(), Reverse(prefix.len()))
}

/// From one rule set to another: what each prefix concerned had before and what it has afterwards.
#[derive(Clone, Debug, Default)]
pub struct Change {
    /// What goes or is replaced, sorted by prefix.
    pub removed: Vec<(Prefix, PrefixRules)>,
    /// What comes or replaces, sorted by prefix.
    pub added: Vec<(Prefix, PrefixRules)>,
}

impl Change {
    /// Whether nothing changes.
    pub fn is_empty(&self) -> bool {
        self.removed.is_empty() && self.added.is_empty()
    }

    /// The change back.
    #[must_use]
    pub fn inverse(self) -> Self {
        Self { removed: self.added, added: self.removed }
    }

    /// The prefixes concerned, each once, in order of precedence.
    pub fn prefixes(&self) -> Vec<Prefix> {
        let both = self.removed.iter().chain(&self.added);
        let mut prefixes: Vec<_> = both.map(|(prefix, _)| *prefix).collect();
        prefixes.sort_unstable();
        prefixes.dedup();
        prefixes
    }
}

/// A change in the making.
#[derive(Debug)]
pub struct Draft<'a> {
    base: &'a RuleSet,
    touched: BTreeMap<Prefix, PrefixRules>,
}

impl<'a> Draft<'a> {
    /// Begins with no change.
    pub fn of(base: &'a RuleSet) -> Self {
        Self { base, touched: BTreeMap::new() }
    }

    /// The rules of a prefix, to be changed.
    pub fn prefix(&mut self, prefix: Prefix) -> &mut PrefixRules {
        let previous = || self.base.of_prefix(&prefix).cloned().unwrap_or_default();
        self.touched.entry(prefix).or_insert_with(previous)
    }

    /// The rules of a prefix as they are by now.
    pub fn of_prefix(&self, prefix: &Prefix) -> Option<&PrefixRules> {
        self.touched.get(prefix).or_else(|| self.base.of_prefix(prefix)).filter(|it| !it.is_empty())
    }

    /// What has changed in all.
    pub fn finish(self) -> Change {
        let mut change = Change::default();
        for (prefix, after) in self.touched {
            let before = self.base.of_prefix(&prefix);
            if before.is_none_or(|before| *before != after) {
                change.removed.extend(before.map(|before| (prefix, before.clone())));
                if !after.is_empty() {
                    change.added.push((prefix, after));
                }
            }
        }
        change
    }
}

/// The lowest port on which two rules of one prefix disagree although neither is more specific.
fn contradiction(new: &RuleSpec, old: &RuleSpec) -> Option<u16> {
    if !new.protocol.overlaps(old.protocol) || new.source != old.source {
        return None;
    }
    let (ports, old_ports) = (new.matched_ports(), old.matched_ports());
    if ports.count() != old_ports.count() {
        return None;
    }
    // What a rule says changes only where one of its ranges begins or ends.
    let edges = [new, old]
        .into_iter()
        .flat_map(|rule| rule.ports.ranges().iter().chain(rule.except.ranges()))
        .flat_map(|(first, last)| [*first, last.saturating_add(1)]);
    edges
        .filter(|port| match (new.target(*port), old.target(*port)) {
            (Some(new), Some(old)) => new != old,
            _ => false,
        })
        .min()
}

#[cfg(test)]
mod tests;
