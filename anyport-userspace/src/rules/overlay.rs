//! A rule set that reads differently for some prefixes, while the set itself stays as it is.
//!
//! A plan whose rules differ from the active ones for a moment, such as while clients of a prefix are refused before its route goes,
//! reads through an [`Overlay`]. That is as large as what differs, whatever the size of the set.

use std::{
    cmp::{Ordering, Reverse},
    collections::{BTreeMap, BTreeSet},
    iter::Peekable,
};

use super::{
    Prefix, PrefixRules, RuleSet,
    set::{Change, RuleRef, length},
};

/// Prefixes with the rules that they are read with, in place of those of the set below.
#[derive(Clone, Debug, Default)]
pub struct Overlay {
    /// Without rules, a prefix reads as if it were not there.
    prefixes: BTreeMap<Prefix, PrefixRules>,
    lengths: BTreeSet<(bool, Reverse<u8>)>,
}

impl Overlay {
    /// Whether everything reads as it does in the set below.
    pub fn is_empty(&self) -> bool {
        self.prefixes.is_empty()
    }

    /// The rules of this prefix are read as these, which have numbers.
    pub fn put(&mut self, prefix: Prefix, rules: PrefixRules) {
        self.lengths.insert(length(&prefix));
        self.prefixes.insert(prefix, rules);
    }
}

impl Extend<(Prefix, PrefixRules)> for Overlay {
    fn extend<I: IntoIterator<Item = (Prefix, PrefixRules)>>(&mut self, prefixes: I) {
        if !self.is_empty() {
            prefixes.into_iter().for_each(|(prefix, rules)| self.put(prefix, rules));
            return;
        }
        // From a sorted sequence a tree is made much faster than by one insertion after the other.
        self.prefixes = prefixes.into_iter().collect();
        self.lengths = self.prefixes.keys().map(length).collect();
    }
}

/// A rule set, read through an overlay or as it is.
#[derive(Clone, Copy, Debug)]
pub struct RuleView<'a> {
    base: &'a RuleSet,
    overlay: Option<&'a Overlay>,
    prefixes: usize,
    rules: usize,
}

impl RuleSet {
    /// The set as it is.
    pub fn view(&self) -> RuleView<'_> {
        RuleView { base: self, overlay: None, prefixes: self.prefixes.len(), rules: self.len() }
    }

    /// The set with the rules of an overlay in place of its own.
    pub fn through<'a>(&'a self, overlay: &'a Overlay) -> RuleView<'a> {
        let mut view = self.view();
        if overlay.is_empty() {
            return view;
        }
        for (prefix, rules) in &overlay.prefixes {
            if let Some(hidden) = self.of_prefix(prefix) {
                view.prefixes -= 1;
                view.rules -= hidden.len();
            }
            view.prefixes += usize::from(!rules.is_empty());
            view.rules += rules.len();
        }
        RuleView { overlay: Some(overlay), ..view }
    }
}

impl<'a> RuleView<'a> {
    /// The rules in order of precedence.
    pub fn iter(self) -> impl Iterator<Item = RuleRef<'a>> {
        self.prefixes().flat_map(|(prefix, rules)| rules.numbered(*prefix))
    }

    /// The prefixes in order of precedence, each with its rules.
    pub fn prefixes(self) -> impl Iterator<Item = (&'a Prefix, &'a PrefixRules)> {
        Merged::new(self.base.prefixes.iter(), self.overlay.map(|it| it.prefixes.iter()))
    }

    /// How many prefixes there are.
    pub fn prefix_count(self) -> usize {
        self.prefixes
    }

    /// How many rules there are.
    pub fn len(self) -> usize {
        self.rules
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.rules == 0
    }

    /// The rules of exactly this prefix.
    pub fn of_prefix(self, prefix: &Prefix) -> Option<&'a PrefixRules> {
        match self.overlay.and_then(|it| it.prefixes.get(prefix)) {
            Some(rules) => Some(rules).filter(|it| !it.is_empty()),
            None => self.base.of_prefix(prefix),
        }
    }

    /// The prefixes around this one, itself included, in order of precedence.
    pub fn around(self, prefix: Prefix) -> impl Iterator<Item = (Prefix, &'a PrefixRules)> {
        let lengths = self.lengths_of(prefix).into_iter().skip_while(move |len| *len > prefix.len());
        lengths.map(move |len| prefix.truncated(len)).filter_map(move |it| Some((it, self.of_prefix(&it)?)))
    }

    /// The prefixes inside of this one, itself included, in order of precedence.
    pub fn within(self, prefix: Prefix) -> impl Iterator<Item = (Prefix, &'a PrefixRules)> {
        let (first, last) = prefix.bounds();
        self.lengths_of(prefix).into_iter().take_while(move |len| *len >= prefix.len()).flat_map(move |len| {
            let at = |address| Prefix::from_bits(prefix.is_ipv4(), address, len);
            let range = at(first)..=at(last);
            let above = self.overlay.map(|it| it.prefixes.range(range.clone()));
            let merged = Merged::new(self.base.prefixes.range(range), above);
            merged.map(|(prefix, rules)| (*prefix, rules))
        })
    }

    /// A set of its own that has these rules.
    pub fn to_set(self) -> RuleSet {
        let mut set = self.base.clone();
        if let Some(Overlay { prefixes, .. }) = self.overlay {
            let hidden = prefixes.keys().filter_map(|prefix| Some((*prefix, set.of_prefix(prefix)?.clone())));
            let shown = prefixes.iter().filter(|(_, rules)| !rules.is_empty());
            let change = Change {
                removed: hidden.collect(),
                added: shown.map(|(prefix, rules)| (*prefix, rules.clone())).collect(),
            };
            set.apply(&change);
        }
        set
    }

    /// The lengths of all prefixes of a family, the longest first.
    fn lengths_of(self, like: Prefix) -> Vec<u8> {
        let mut lengths: Vec<u8> = self.base.lengths_of(like).collect();
        if let Some(Overlay { lengths: more, .. }) = self.overlay {
            let family = !like.is_ipv4();
            lengths.extend(more.range((family, Reverse(u8::MAX))..=(family, Reverse(0))).map(|(_, len)| len.0));
            lengths.sort_unstable_by_key(|len| Reverse(*len));
            lengths.dedup();
        }
        lengths
    }
}

/// Two series of prefixes in order as one. Where both have a prefix, the upper one's rules are meant.
struct Merged<'a, L, U>
where
    L: Iterator<Item = (&'a Prefix, &'a PrefixRules)>,
    U: Iterator<Item = (&'a Prefix, &'a PrefixRules)>,
{
    lower: Peekable<L>,
    upper: Option<Peekable<U>>,
}

impl<'a, L, U> Merged<'a, L, U>
where
    L: Iterator<Item = (&'a Prefix, &'a PrefixRules)>,
    U: Iterator<Item = (&'a Prefix, &'a PrefixRules)>,
{
    fn new(lower: L, upper: Option<U>) -> Self {
        Self { lower: lower.peekable(), upper: upper.map(Iterator::peekable) }
    }
}

impl<'a, L, U> Iterator for Merged<'a, L, U>
where
    L: Iterator<Item = (&'a Prefix, &'a PrefixRules)>,
    U: Iterator<Item = (&'a Prefix, &'a PrefixRules)>,
{
    type Item = (&'a Prefix, &'a PrefixRules);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let Some((above, rules)) = self.upper.as_mut().and_then(Peekable::peek) else { return self.lower.next() };
            match self.lower.peek().map_or(Ordering::Greater, |(below, _)| below.cmp(above)) {
                Ordering::Less => return self.lower.next(),
                Ordering::Equal => drop(self.lower.next()),
                Ordering::Greater => {}
            }
            let shown = (*above, *rules);
            self.upper.as_mut().and_then(Iterator::next);
            if !shown.1.is_empty() {
                return Some(shown);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Overlay, RuleView};
    use crate::rules::{Change, Prefix, PrefixRules, RuleSet, tests::arbitrary};

    type Read = Vec<(Prefix, PrefixRules)>;

    fn rules_of(view: RuleView<'_>) -> Read {
        view.prefixes().map(|(prefix, rules)| (*prefix, rules.clone())).collect()
    }

    /// What it is to read like: the set with those prefixes replaced.
    fn replaced(set: &RuleSet, overlay: &Read) -> RuleSet {
        let mut replaced = set.clone();
        let removed = overlay.iter().filter_map(|(prefix, _)| Some((*prefix, set.of_prefix(prefix)?.clone())));
        let added = overlay.iter().filter(|(_, rules)| !rules.is_empty()).cloned();
        replaced.apply(&Change { removed: removed.collect(), added: added.collect() });
        replaced
    }

    proptest! {
        #[test]
        fn a_view_reads_as_a_set_that_was_changed(
            set in arbitrary::rules(20),
            other in arbitrary::rules(20),
            hidden: Vec<bool>,
        ) {
            // Prefixes of the other set, and some of this one without rules.
            let mut shown = rules_of(other.view());
            let gone = set.prefixes().zip(&hidden).filter(|((prefix, _), is_hidden)| **is_hidden && other.of_prefix(prefix).is_none());
            shown.extend(gone.map(|((prefix, _), _)| (*prefix, PrefixRules::default())));
            shown.sort_by_key(|(prefix, _)| *prefix);
            let mut overlay = Overlay::default();
            overlay.extend(shown.iter().cloned());

            let (view, expected) = (set.through(&overlay), replaced(&set, &shown));
            prop_assert_eq!(rules_of(view), rules_of(expected.view()));
            prop_assert_eq!(rules_of(view.to_set().view()), rules_of(expected.view()));
            prop_assert_eq!(view.iter().count(), expected.len());
            prop_assert_eq!((view.len(), view.prefix_count()), (expected.len(), expected.prefix_count()));
            prop_assert_eq!(view.is_empty(), expected.is_empty());
            for (prefix, _) in set.prefixes().chain(other.prefixes()) {
                prop_assert_eq!(view.of_prefix(prefix), expected.of_prefix(prefix));
                for near in [*prefix, prefix.truncated(prefix.len() / 2)] {
                    prop_assert_eq!(view.around(near).collect::<Vec<_>>(), expected.around(near).collect::<Vec<_>>());
                    prop_assert_eq!(view.within(near).collect::<Vec<_>>(), expected.within(near).collect::<Vec<_>>());
                }
            }
        }
    }

    #[test]
    fn without_an_overlay_a_view_is_the_set() {
        let set = RuleSet::default();
        assert!(set.view().is_empty() && set.through(&Overlay::default()).overlay.is_none());
    }
}
