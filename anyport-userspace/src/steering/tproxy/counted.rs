//! What packets were counted for which rule, beyond what the lines and sets of the moment know.

use std::collections::HashMap;

use anyport_common::maps::Counters;

use super::groups::Effect;
use crate::steering::Plan;

/// Counters by the number of the rule, and those of packets that met none.
#[derive(Clone, Debug, Default)]
pub(super) struct Counted {
    pub(super) rules: HashMap<u32, Counters>,
    pub(super) unmatched: u64,
}

impl Counted {
    /// Counts packets of a rule.
    pub(super) fn add(&mut self, rule: u32, effect: Effect, packets: u64) {
        let counters = self.rules.entry(rule).or_default();
        match effect {
            Effect::Steer => counters.steered += packets,
            Effect::Drop => counters.no_socket += packets,
        }
    }

    /// Counts on from what was counted elsewhere.
    pub(super) fn add_counters(&mut self, rule: u32, more: &Counters) {
        let counters = self.rules.entry(rule).or_default();
        counters.steered += more.steered;
        counters.no_socket += more.no_socket;
        counters.assign_error += more.assign_error;
        counters.denied += more.denied;
    }

    /// Adds all that was counted elsewhere.
    pub(super) fn add_all(&mut self, more: &Self) {
        for (rule, counters) in &more.rules {
            self.add_counters(*rule, counters);
        }
        self.unmatched += more.unmatched;
    }

    /// Follows rules to their new numbers, and forgets what was counted under numbers that are another's now. Those that are nobody's
    /// keep it: it is still asked for, and a plan that fails is taken back.
    pub(super) fn renumber(&mut self, plan: &Plan<'_>) {
        let moved = plan.moved.iter().filter_map(|(old, new)| Some((*new, *self.rules.get(old)?)));
        let moved: Vec<_> = moved.collect();
        self.rules.retain(|number, _| !plan.fresh.iter().any(|range| range.contains(number)));
        self.rules.extend(moved);
    }
}

#[cfg(test)]
mod tests {
    use super::{Counted, Counters, Effect, Plan};
    use crate::rules::RuleSet;

    #[test]
    fn counts_follow_their_rules() {
        let mut counted = Counted::default();
        for (rule, packets) in [(1, 10), (2, 20), (3, 30), (7, 70), (8, 80)] {
            counted.add(rule, Effect::Steer, packets);
        }
        counted.add(7, Effect::Drop, 7);
        counted.renumber(&Plan {
            generation: 1,
            rules: RuleSet::default().view(),
            changed: None,
            fresh: &[3..5, 20..30],
            freed: &[1..3, 8..9, 30..40],
            moved: &[(1, 20), (2, 21), (10, 9)],
            services: &[],
        });
        let steered = |number| counted.rules.get(&number).map(|it: &Counters| it.steered);
        let now = [1, 2, 3, 7, 8, 9, 20, 21].map(steered);
        assert_eq!(now, [Some(10), Some(20), None, Some(70), Some(80), None, Some(10), Some(20)]);
        assert_eq!(counted.rules[&7].no_socket, 7);
    }
}
