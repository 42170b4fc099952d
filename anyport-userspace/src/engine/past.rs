//! What was counted by rules and services that are gone, so that no sum falls with them.
//!
//! A rule leaves its share to the service that it steered to, and a service leaves its own to its name: one that is opened in its place
//! goes on from there.

use std::{
    collections::HashMap,
    ops::{AddAssign, Range},
};

use anyport_common::maps::{Counters, MAX_SERVICES};

use super::desired::Steps;
use crate::{
    rules::{Change, Prefix, PrefixRules, Protocol, RuleRef, ServiceName},
    service::{ConnectionTimes, Service, ServiceStats},
};

/// So many names have a share of their own; those without a service share one beyond.
const MOST_NAMES: usize = 2 * MAX_SERVICES as usize;

/// What was counted under a name by what is gone.
#[derive(Clone, Debug, Default)]
pub(super) struct Share {
    /// By rules.
    pub(super) counters: Counters,
    /// By services.
    pub(super) stats: ServiceStats,
    pub(super) times: ConnectionTimes,
}

impl Share {
    fn of(service: &Service) -> Self {
        let stats = ServiceStats { active: 0, ..service.stats() };
        Self { counters: Counters::default(), stats, times: service.times() }
    }
}

impl AddAssign<&Self> for Share {
    fn add_assign(&mut self, Self { counters, stats, times }: &Self) {
        add(&mut self.counters, counters);
        self.stats += *stats;
        self.times += times;
    }
}

/// The shares of all that is gone.
#[derive(Debug, Default)]
pub(super) struct Past {
    shares: HashMap<ServiceName, Share>,
    /// What services had counted that were taken out, and may be put back: by slot.
    out: Vec<(ServiceName, u16, Share)>,
    /// Of prefixes that still have a rule for the same protocol and service, which are one row of the metrics.
    rows: HashMap<Prefix, Vec<(Protocol, ServiceName, Counters)>>,
}

impl Past {
    /// What a name was left.
    pub(super) fn of(&self, name: &ServiceName) -> Share {
        let out = self.out.iter().filter(|(it, ..)| it == name).map(|(.., share)| share);
        let mut all = Share::default();
        self.shares.get(name).into_iter().chain(out).for_each(|share| all += share);
        all
    }

    /// What rules left, by service.
    pub(super) fn counters(&self) -> impl Iterator<Item = (&ServiceName, &Counters)> {
        self.shares.iter().map(|(name, share)| (name, &share.counters)).filter(|(_, it)| **it != Counters::default())
    }

    /// What services counted that have no successor.
    pub(super) fn stats_without(&self, is_there: impl Fn(&ServiceName) -> bool) -> ServiceStats {
        let all = self.shares.iter().chain(self.out.iter().map(|(name, _, share)| (name, share)));
        let mut stats = ServiceStats::default();
        for (_, share) in all.filter(|(name, _)| !is_there(name)) {
            stats += share.stats;
        }
        stats
    }

    /// What rules left to a row: to a prefix, as far as its rules steer a protocol to a service.
    pub(super) fn of_row(&self, rule: &RuleRef<'_>) -> Counters {
        let row = self.rows.get(&rule.prefix).and_then(|rows| rows.iter().find(|it| is_of_row(it, rule)));
        row.map(|(.., counters)| *counters).unwrap_or_default()
    }

    /// A rule that steered to a service is gone.
    pub(super) fn leave_rule(&mut self, service: &ServiceName, counters: &Counters) {
        add(&mut self.share_of(service).counters, counters);
    }

    /// The rules of a change are gone that are not moved to another number, given what was counted under those that are freed.
    pub(super) fn leave_rules(&mut self, change: &Change, counted: &HashMap<u32, Counters>) {
        if counted.is_empty() && self.rows.is_empty() {
            return;
        }
        for (prefix, rules) in &change.removed {
            let at = change.added.binary_search_by_key(prefix, |(it, _)| *it);
            let after = at.ok().map(|at| &change.added[at].1);
            for rule in rules.numbered(*prefix) {
                if let Some(counters) = counted.get(&rule.number) {
                    self.leave_rule(&rule.terms.service, counters);
                    self.leave_to_row(&rule, counters);
                }
            }
            self.end_rows(*prefix, after);
        }
    }

    fn leave_to_row(&mut self, rule: &RuleRef<'_>, counters: &Counters) {
        let rows = self.rows.entry(rule.prefix).or_default();
        match rows.iter_mut().find(|it| is_of_row(it, rule)) {
            Some((.., row)) => add(row, counters),
            None => rows.push((rule.terms.protocol, rule.terms.service.clone(), *counters)),
        }
    }

    /// Rows end with the last of their rules.
    fn end_rows(&mut self, prefix: Prefix, after: Option<&PrefixRules>) {
        let Some(rows) = self.rows.get_mut(&prefix) else { return };
        rows.retain(|row| after.is_some_and(|after| after.numbered(prefix).any(|rule| is_of_row(row, &rule))));
        if rows.is_empty() {
            self.rows.remove(&prefix);
        }
    }

    /// A service was taken out, and may be put back.
    pub(super) fn take_out(&mut self, name: &ServiceName, slot: u16, service: &Service) {
        self.out.push((name.clone(), slot, Share::of(service)));
    }

    /// The service of a slot is back.
    pub(super) fn put_back(&mut self, slot: u16) {
        self.out.retain(|(_, it, _)| *it != slot);
    }

    /// A service that was taken out is closed.
    pub(super) fn close(&mut self, name: &ServiceName, slot: u16, service: &Service) {
        self.put_back(slot);
        *self.share_of(name) += &Share::of(service);
    }

    /// Has the names without a service share one, once there are many.
    pub(super) fn fold(&mut self, is_there: impl Fn(&ServiceName) -> bool) {
        if self.shares.len() <= MOST_NAMES {
            return;
        }
        let mut all = Share::default();
        self.shares.extract_if(|name, _| !is_there(name)).for_each(|(_, share)| all += &share);
        self.shares.insert(ServiceName::nobody(), all);
    }

    fn share_of(&mut self, name: &ServiceName) -> &mut Share {
        self.shares.entry(name.clone()).or_default()
    }
}

/// The numbers whose counters nobody goes on with.
pub(super) fn gone(Steps { freed, moved, .. }: &Steps) -> Vec<Range<u32>> {
    let mut moved: Vec<u32> = moved.iter().map(|(before, _)| *before).collect();
    moved.sort_unstable();
    let mut gone = Vec::new();
    for Range { mut start, end } in freed.iter().cloned() {
        let first = moved.partition_point(|number| *number < start);
        for number in moved[first..].iter().copied().take_while(|number| *number < end) {
            gone.push(start..number);
            start = number + 1;
        }
        gone.push(start..end);
    }
    gone.retain(|range| !range.is_empty());
    gone
}

fn is_of_row((protocol, service, _): &(Protocol, ServiceName, Counters), rule: &RuleRef<'_>) -> bool {
    rule.terms.protocol == *protocol && rule.terms.service == *service
}

/// Adds what was counted elsewhere.
pub(super) fn add(sum: &mut Counters, Counters { steered, no_socket, assign_error, denied }: &Counters) {
    sum.steered += steered;
    sum.no_socket += no_socket;
    sum.assign_error += assign_error;
    sum.denied += denied;
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::{Change, Counters, Past, Steps, gone};
    use crate::{
        engine::tests::fixtures::rule,
        rules::{Origin, Prefix, PrefixRules, ServiceName},
    };

    fn steered(steered: u64) -> Counters {
        Counters { steered, ..Counters::default() }
    }

    #[test]
    fn numbers_that_are_moved_are_not_gone() {
        let steps = |freed: &[std::ops::Range<u32>], moved: &[(u32, u32)]| {
            gone(&Steps { freed: freed.to_vec(), moved: moved.to_vec(), ..Steps::default() })
        };
        assert_eq!(steps(&[3..7, 1..2], &[(4, 20), (30, 21)]), [3..4, 5..7, 1..2]);
        assert_eq!(steps(&[3..5, 8..9], &[(4, 1), (3, 2)]).len(), 1);
    }

    #[test]
    fn rules_leave_their_share_to_their_service_and_to_their_row() {
        let name = ServiceName::default_service();
        let rules = [rule("192.0.2.1", "80", Origin::Added), rule("192.0.2.1", "443", Origin::Added)];
        let prefix: Prefix = rules[0].prefix;
        let of = |some: &[crate::rules::Rule], first_number| {
            let mut of_prefix = PrefixRules::default();
            of_prefix.first_number = first_number;
            for it in some {
                of_prefix.insert_unchecked(&it.terms, it.origins);
            }
            vec![(prefix, of_prefix)]
        };
        let (both, one) = (of(&rules, 1), of(&rules[..1], 3));
        let mut past = Past::default();
        past.leave_rules(&Change { removed: both, added: one.clone() }, &HashMap::from([(2, steered(200))]));
        let of_row = |past: &Past| past.of_row(&one[0].1.numbered(prefix).next().unwrap()).steered;
        assert_eq!((past.of(&name).counters.steered, of_row(&past)), (200, 200));
        // The row ends with its last rule, the service's sum does not.
        past.leave_rules(&Change { removed: one.clone(), added: Vec::new() }, &HashMap::from([(3, steered(100))]));
        assert_eq!((past.of(&name).counters.steered, of_row(&past)), (300, 0));
    }

    #[test]
    fn many_names_share_one() {
        let mut past = Past::default();
        for number in 0..=super::MOST_NAMES {
            past.leave_rule(&format!("s{number}").parse().unwrap(), &steered(1));
        }
        let sum = |past: &Past| past.counters().map(|(_, it)| it.steered).sum::<u64>();
        let before = sum(&past);
        past.fold(|name| name.as_str() == "s7");
        assert_eq!((sum(&past), past.counters().count()), (before, 2));
    }
}
