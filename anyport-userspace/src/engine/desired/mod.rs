//! Desired state: the rules as they are to be, the numbers by which the kernel knows them, and what is drained.
//!
//! A command changes the rules once forward by [`Desired::begin`], and once back by [`Desired::roll_back`] if it fails. What a plan is
//! to read otherwise for a moment is an [`Overlay`]: see [`Desired::refusing`] and [`Drains::refusals`].

mod drains;
mod ids;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fmt::Write as _,
    ops::Range,
    sync::Arc,
};

use anyhow::Context as _;
use anyport_common::maps::{MAX_RULES, MAX_SERVICES};

pub(super) use self::drains::{Drains, Scope};
use self::ids::IdAllocator;
use crate::rules::{
    Change, Origin, Overlay, Prefix, PrefixRules, Rule, RuleRef, RuleSet, RuleSpec, RuleView, ServiceName,
    lines::RuleLine,
};

/// How many numbers of rules and slots of services rest before they are given out again.
const RESTING: usize = 32;
/// The slot of rules that are drained, which never has a socket. Slot 0 refuses too.
#[expect(clippy::cast_possible_truncation, reason = "slots are numbers of 16 bits")]
pub(super) const DRAINED_SLOT: u16 = (MAX_SERVICES - 1) as u16;

/// What is to be steered.
#[derive(Debug)]
pub(super) struct Desired {
    /// Those of the last change that has begun.
    rules: RuleSet,
    /// What rules say, each once.
    specs: HashSet<Arc<RuleSpec>>,
    /// The prefixes with rules that were added by hand.
    added: BTreeSet<Prefix>,
    rule_ids: IdAllocator,
    slots: IdAllocator,
    drains: Drains,
    /// How often the rules were changed, forward or back.
    #[cfg(test)]
    patches: u64,
}

/// A change that the rules have taken, to be finished or rolled back.
#[derive(Debug, Default)]
pub(super) struct Transition {
    change: Change,
    steps: Steps,
}

impl Transition {
    /// What changes, with rule numbers.
    pub(super) fn change(&self) -> &Change {
        &self.change
    }

    /// What becomes of prefixes and numbers.
    pub(super) fn steps(&self) -> &Steps {
        &self.steps
    }
}

/// The prefixes that a change concerns, and what becomes of rule numbers.
#[derive(Clone, Debug, Default)]
pub(super) struct Steps {
    pub(super) prefixes: Vec<Prefix>,
    pub(super) fresh: Vec<Range<u32>>,
    pub(super) freed: Vec<Range<u32>>,
    pub(super) moved: Vec<(u32, u32)>,
}

impl Desired {
    /// No rules yet, and these drains.
    pub(super) fn new(drains: Drains) -> Self {
        Self {
            rules: RuleSet::default(),
            specs: HashSet::new(),
            added: BTreeSet::new(),
            rule_ids: IdAllocator::new(0..MAX_RULES, RESTING),
            slots: IdAllocator::new(1..u32::from(DRAINED_SLOT), RESTING),
            drains,
            #[cfg(test)]
            patches: 0,
        }
    }

    /// The rules, with their numbers.
    pub(super) fn rules(&self) -> &RuleSet {
        &self.rules
    }

    /// What is drained.
    pub(super) fn drains(&self) -> &Drains {
        &self.drains
    }

    /// The same, to be changed.
    pub(super) fn drains_mut(&mut self) -> &mut Drains {
        &mut self.drains
    }

    /// This rule spec, shared by all rules that have an equal one.
    pub(super) fn shared(&mut self, terms: RuleSpec) -> Arc<RuleSpec> {
        const MANY: usize = 4096;
        if let Some(known) = self.specs.get(&terms) {
            return Arc::clone(known);
        }
        if self.specs.len() >= MANY.max(self.rules.len()) {
            self.specs.retain(|it| Arc::strong_count(it) > 1);
        }
        let terms = Arc::new(terms);
        self.specs.insert(Arc::clone(&terms));
        terms
    }

    /// A slot for a service.
    pub(super) fn take_slot(&mut self) -> anyhow::Result<u16> {
        let slot = self.slots.take(1).context("there are too many services")?.start;
        Ok(slot.try_into()?)
    }

    /// A service is closed that had this slot.
    pub(super) fn give_back_slot(&mut self, slot: u16) {
        let slot = u32::from(slot);
        self.slots.give_back(slot..slot + 1);
    }

    /// Changes the rules.
    ///
    /// # Errors
    /// There are not enough numbers; nothing has changed.
    pub(super) fn begin(&mut self, mut change: Change) -> anyhow::Result<Transition> {
        let steps = self.number(&mut change)?;
        self.patch(&change);
        Ok(Transition { change, steps })
    }

    /// What has begun is in the kernel. Returns the change with the numbers that the rules have got.
    pub(super) fn finish(&mut self, Transition { change, steps }: Transition) -> Change {
        self.give_back(&steps.freed);
        change
    }

    /// What has begun is not to be: the rules are those before.
    pub(super) fn roll_back(&mut self, Transition { change, steps }: Transition) {
        self.give_back(&steps.fresh);
        self.patch(&change.inverse());
    }

    /// What is read differently while new connections to these prefixes are refused, which are withdrawn. Returns the numbers too that
    /// were taken for that, which are to be given back.
    ///
    /// # Errors
    /// There are not enough numbers.
    pub(super) fn refusing(
        &mut self,
        withdrawn: &[&(Prefix, PrefixRules)],
    ) -> anyhow::Result<(Overlay, Vec<Range<u32>>)> {
        let mut refusing = Overlay::default();
        let mut known: HashMap<*const RuleSpec, Arc<RuleSpec>> = HashMap::new();
        let mut fresh = Vec::new();
        for (prefix, before) in withdrawn {
            let here = self.rules.of_prefix(prefix);
            let is_alone = here.is_none();
            let mut rules = here.cloned().unwrap_or_default();
            // The rules that are withdrawn need their numbers no more, except to be refused under them.
            rules.first_number = before.first_number;
            for held in before {
                let terms = known.entry(Arc::as_ptr(&held.terms)).or_insert_with(|| {
                    Arc::new(RuleSpec { service: ServiceName::nobody(), ..RuleSpec::clone(&held.terms) })
                });
                rules.insert_unchecked(terms, held.origins);
            }
            if !is_alone {
                self.give_numbers(&mut [&mut rules], &mut fresh)?;
            }
            refusing.put(*prefix, rules);
        }
        Ok((refusing, fresh))
    }

    /// These numbers are no rule's any more.
    pub(super) fn give_back(&mut self, ranges: &[Range<u32>]) {
        for range in ranges {
            self.rule_ids.give_back(range.clone());
        }
    }

    /// The rules through an overlay to which what is drained has been added.
    pub(super) fn drained<'a>(&'a self, overlay: &'a mut Overlay) -> RuleView<'a> {
        let refusals = self.drains.refusals(self.rules.through(overlay));
        overlay.extend(refusals);
        self.rules.through(overlay)
    }

    /// The rules that were added by hand.
    pub(super) fn added_by_hand(&self) -> Vec<Rule> {
        let of_prefix = |prefix| self.rules.of_prefix(prefix).into_iter().flat_map(|it| it.numbered(*prefix));
        let rules = self.added.iter().flat_map(of_prefix).filter(|it| it.origins.contains(Origin::Added));
        rules.map(RuleRef::to_rule).collect()
    }

    /// The rules that were applied, as lines.
    pub(super) fn applied_lines(&self) -> String {
        let mut text = String::new();
        for rule in self.rules.iter().filter(|it| it.origins.contains(Origin::Applied)) {
            let _ = writeln!(text, "{}", RuleLine(&rule.prefix, rule.terms));
        }
        text
    }

    /// How often the rules were changed.
    #[cfg(test)]
    pub(super) fn patches(&self) -> u64 {
        self.patches
    }

    fn patch(&mut self, change: &Change) {
        #[cfg(test)]
        {
            self.patches += u64::from(!change.is_empty());
        }
        self.rules.apply(change);
        let is_added = |(_, rules): &&(Prefix, PrefixRules)| rules.iter().any(|it| it.origins.contains(Origin::Added));
        for (prefix, _) in change.removed.iter().filter(is_added) {
            self.added.remove(prefix);
        }
        self.added.extend(change.added.iter().filter(is_added).map(|(prefix, _)| *prefix));
    }

    /// Numbers the rules of a change. Prefixes whose rules stay as they are keep their numbers.
    fn number(&mut self, change: &mut Change) -> anyhow::Result<Steps> {
        let mut steps = Steps::default();
        let mut previous = change.removed.iter().peekable();
        let mut fresh: Vec<&mut PrefixRules> = Vec::new();
        let mut moving: Vec<(usize, &PrefixRules)> = Vec::new();
        for (prefix, rules) in &mut change.added {
            while let Some((gone, before)) = previous.next_if(|(it, _)| it < prefix) {
                steps.prefixes.push(*gone);
                push(&mut steps.freed, numbers_of(before));
            }
            if let Some((_, before)) = previous.next_if(|(it, _)| it == prefix) {
                if before.say_the_same_as(rules) {
                    rules.first_number = before.first_number;
                    continue;
                }
                push(&mut steps.freed, numbers_of(before));
                moving.push((fresh.len(), before));
            }
            steps.prefixes.push(*prefix);
            fresh.push(rules);
        }
        for (gone, before) in previous {
            steps.prefixes.push(*gone);
            push(&mut steps.freed, numbers_of(before));
        }
        self.give_numbers(&mut fresh, &mut steps.fresh)?;
        for (at, before) in moving {
            let (now, after) = (fresh[at].first_number.., fresh[at].iter());
            let places: HashMap<&RuleSpec, u32> =
                before.iter().map(|held| &*held.terms).zip(before.first_number..).collect();
            for (number, held) in now.zip(after) {
                steps.moved.extend(places.get(&*held.terms).map(|before| (*before, number)));
            }
        }
        Ok(steps)
    }

    fn give_numbers(&mut self, rules: &mut [&mut PrefixRules], fresh: &mut Vec<Range<u32>>) -> anyhow::Result<()> {
        let count = |rules: &PrefixRules| u32::try_from(rules.len()).unwrap_or(u32::MAX);
        let all = rules.iter().map(|it| u64::from(count(it))).sum::<u64>();
        if let Some(range) = u32::try_from(all).ok().and_then(|all| self.rule_ids.take(all)) {
            let mut next = range.start;
            for rules in rules {
                rules.first_number = next;
                next += count(rules);
            }
            fresh.push(range);
            return Ok(());
        }
        for rules in rules {
            let Some(range) = self.rule_ids.take(count(rules)) else {
                fresh.drain(..).for_each(|range| self.rule_ids.give_back(range));
                anyhow::bail!(
                    "the active rules and those that replace them are more than can be numbered; \
                     replace them in portions"
                );
            };
            rules.first_number = range.start;
            fresh.push(range);
        }
        Ok(())
    }
}

/// Appends numbers, to the last range where they follow it.
fn push(ranges: &mut Vec<Range<u32>>, numbers: Range<u32>) {
    match ranges.last_mut() {
        Some(last) if last.end == numbers.start => last.end = numbers.end,
        _ => ranges.push(numbers),
    }
}

fn numbers_of(rules: &PrefixRules) -> Range<u32> {
    rules.first_number..rules.first_number + u32::try_from(rules.len()).unwrap_or_default()
}

#[cfg(test)]
mod tests;
