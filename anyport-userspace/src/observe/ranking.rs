//! Which prefixes are reported by name, out of a million.

use std::{cmp::Reverse, collections::HashMap};

use anyport_common::maps::Counters;

use crate::{
    api::{LivePrefix, PrefixCounts},
    engine::Counted,
    rules::{Prefix, Protocol, ServiceName},
};

/// How many prefixes are reported by name.
pub(super) const PREFIXES: usize = 100;

/// A prefix, as far as its rules steer a protocol to a service.
#[derive(Clone, Copy, Debug)]
struct Row<'a> {
    /// That of the first of its rules.
    number: u32,
    prefix: Prefix,
    protocol: Protocol,
    service: &'a ServiceName,
    counts: PrefixCounts<u64>,
    before: PrefixCounts<u64>,
}

/// What was counted for all rows, in the order in which they were seen: 20 bytes for each.
#[derive(Debug, Default)]
pub(super) struct Counts {
    numbers: Vec<u32>,
    counts: Vec<PrefixCounts<u64>>,
}

/// Sees all rules in order, and remembers those that are reported.
pub(super) struct Ranking<'a, 'b> {
    before: &'b Counts,
    /// Where the next row is expected there. Rules that did not change are seen in the order of the last time.
    expected: usize,
    /// Otherwise where it is by number, made when it is needed.
    places: Option<HashMap<u32, usize>>,
    now: Counts,
    /// Those of the prefix that is being seen.
    rows: Vec<Row<'a>>,
    busiest: Best<Row<'a>>,
    fastest: Best<Row<'a>>,
}

/// What has come of it.
#[derive(Debug)]
pub(super) struct Ranked {
    /// Those with most packets.
    pub(super) busiest: Vec<LivePrefix>,
    /// Those with the highest rates.
    pub(super) fastest: Vec<LivePrefix>,
    /// For the next time.
    pub(super) counts: Counts,
}

impl Ranked {
    /// How many rows there are.
    pub(super) fn rows(&self) -> usize {
        self.counts.numbers.len()
    }
}

impl<'a, 'b> Ranking<'a, 'b> {
    pub(super) fn new(before: &'b Counts) -> Self {
        let rows = before.numbers.len();
        let now = Counts { numbers: Vec::with_capacity(rows), counts: Vec::with_capacity(rows) };
        let (busiest, fastest) = (Best::default(), Best::default());
        Self { before, expected: 0, places: None, now, rows: Vec::new(), busiest, fastest }
    }

    pub(super) fn see(&mut self, Counted { rule, counters, past }: Counted<'a>) {
        if self.rows.first().is_some_and(|row| row.prefix != rule.prefix) {
            self.flush();
        }
        let (protocol, service) = (rule.terms.protocol, &rule.terms.service);
        let dropped = |Counters { no_socket, assign_error, denied, .. }| no_socket + assign_error + denied;
        if let Some(row) = self.rows.iter_mut().find(|row| row.protocol == protocol && row.service == service) {
            row.counts.steered += counters.steered;
            row.counts.dropped += dropped(counters);
            return;
        }
        let counts =
            PrefixCounts { steered: counters.steered + past.steered, dropped: dropped(counters) + dropped(past) };
        let (number, prefix, before) = (rule.number, rule.prefix, PrefixCounts::default());
        self.rows.push(Row { number, prefix, protocol, service, counts, before });
    }

    fn flush(&mut self) {
        for mut row in std::mem::take(&mut self.rows) {
            row.before = self.before(row.number).unwrap_or(row.counts);
            self.now.numbers.push(row.number);
            self.now.counts.push(row.counts);
            let increase = increase(&row);
            self.busiest.add((row.counts.packets(), 0), row);
            self.fastest.add((increase, row.counts.packets()), row);
        }
    }

    /// What was counted for a row the last time. One that was not there, or had another number, has no rate yet.
    fn before(&mut self, number: u32) -> Option<PrefixCounts<u64>> {
        let Self { before, expected, places, .. } = self;
        let is_there = before.numbers.get(*expected) == Some(&number);
        let at = if is_there {
            *expected
        } else {
            let places = places.get_or_insert_with(|| before.numbers.iter().copied().zip(0..).collect());
            *places.get(&number)?
        };
        *expected = at + 1;
        Some(before.counts[at])
    }

    /// With rates over this time.
    pub(super) fn finish(mut self, seconds: Option<f64>) -> Ranked {
        self.flush();
        let live = |rows: Vec<Row<'_>>| rows.into_iter().map(|row| row.live(seconds)).collect();
        Ranked { busiest: live(self.busiest.finish()), fastest: live(self.fastest.finish()), counts: self.now }
    }
}

fn increase(row: &Row<'_>) -> u64 {
    let Row { counts, before, .. } = row;
    crate::api::increase(counts.packets(), before.packets())
}

impl Row<'_> {
    fn live(&self, seconds: Option<f64>) -> LivePrefix {
        let Self { prefix, protocol, service, counts, before, .. } = self;
        LivePrefix {
            prefix: prefix.to_string(),
            protocol: *protocol,
            service: (*service).clone(),
            counts: *counts,
            rates: seconds.map(|seconds| counts.rates_since(before, seconds)),
        }
    }
}

/// Keeps the best of what it is given; of those that are as good, the earlier ones.
struct Best<T> {
    kept: Vec<((u64, u64), T)>,
    /// What it takes to be among them, once there are enough.
    floor: Option<(u64, u64)>,
}

impl<T> Default for Best<T> {
    fn default() -> Self {
        Self { kept: Vec::new(), floor: None }
    }
}

impl<T> Best<T> {
    fn add(&mut self, score: (u64, u64), item: T) {
        if self.floor.is_some_and(|floor| score <= floor) {
            return;
        }
        self.kept.push((score, item));
        if self.kept.len() >= 2 * PREFIXES {
            self.cut();
            self.floor = self.kept.last().map(|(score, _)| *score);
        }
    }

    fn cut(&mut self) {
        self.kept.sort_by_key(|(score, _)| Reverse(*score));
        self.kept.truncate(PREFIXES);
    }

    fn finish(mut self) -> Vec<T> {
        self.cut();
        self.kept.into_iter().map(|(_, item)| item).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{Counted, Counters, Counts, LivePrefix, PREFIXES, Ranked, Ranking};
    use crate::rules::{Origin, RuleSet, RuleText};

    /// One rule for each of so many addresses, numbered from `first` on.
    fn rules(count: u32, first: u32) -> RuleSet {
        let mut rules = RuleSet::default();
        for number in 0..count {
            let text = format!("{{\"prefix\": \"192.{}.{}.{}\"}}", number >> 16, number >> 8 & 255, number & 255);
            let text: RuleText = serde_json::from_str(&text).unwrap();
            rules.insert(&text.into_rule(Origin::Added)).unwrap();
        }
        let numbered = rules.prefixes().zip(first..).map(|((prefix, rules), number)| {
            let mut rules = rules.clone();
            rules.first_number = number;
            (*prefix, rules)
        });
        let change = crate::rules::Change { removed: Vec::new(), added: numbered.collect() };
        let mut numbered = RuleSet::default();
        numbered.apply(&change);
        numbered
    }

    fn rank(rules: &RuleSet, before: &Counts, count: impl Fn(u32) -> u64) -> Ranked {
        let mut ranking = Ranking::new(before);
        for rule in rules.iter() {
            let steered = count(rule.number);
            let counters = Counters { steered, ..Counters::default() };
            ranking.see(Counted { rule, counters, past: Counters::default() });
        }
        ranking.finish(Some(2.0))
    }

    fn rates(rows: &[LivePrefix]) -> Vec<(&str, f64)> {
        rows.iter().map(|row| (row.prefix.as_str(), row.rates.unwrap().steered)).collect()
    }

    #[test]
    fn the_busiest_and_the_fastest_are_found_among_many() {
        let rules = rules(10_000, 5);
        let before = rank(&rules, &Counts::default(), u64::from);
        assert_eq!((before.busiest.len(), before.rows()), (PREFIXES, 10_000));
        assert_eq!(before.busiest[0].counts.steered, 10_004);
        assert_eq!(before.busiest[99].counts.steered, 9_905);
        assert!(rates(&before.fastest).iter().all(|(_, rate)| *rate <= 0.0), "nothing was counted before");
        let now = rank(&rules, &before.counts, |number| u64::from(number) + if number == 305 { 20 } else { 0 });
        assert_eq!(rates(&now.fastest)[..2], [("192.0.1.44/32", 10.0), ("192.0.39.15/32", 0.0)]);
    }

    #[test]
    fn rules_are_followed_by_their_numbers() {
        let before = rank(&rules(100, 0), &Counts::default(), |_| 50);
        // The first ones have gone, others have come; and the counter of one was reset.
        let now = rank(&rules(100, 50), &before.counts, |number| if number == 99 { 4 } else { 60 });
        let rates = rates(&now.fastest);
        assert_eq!(rates[0], ("192.0.0.0/32", 5.0));
        let with = |rate: f64| rates.iter().filter(|it| it.1.to_bits() == rate.to_bits()).count();
        assert_eq!((with(5.0), with(2.0), with(0.0)), (49, 1, 50));
    }

    #[test]
    fn rules_of_a_prefix_with_one_service_are_one_row() {
        let mut rules = RuleSet::default();
        for text in [
            r#"{"prefix": "192.0.2.0/24", "ports": "1-10"}"#,
            r#"{"prefix": "192.0.2.0/24", "ports": "80"}"#,
            r#"{"prefix": "192.0.2.0/24", "ports": "53", "protocol": "udp"}"#,
            r#"{"prefix": "192.0.2.0/24", "ports": "22", "service": "other"}"#,
        ] {
            let text: RuleText = serde_json::from_str(text).unwrap();
            rules.insert(&text.into_rule(Origin::Added)).unwrap();
        }
        let ranked = rank(&rules, &Counts::default(), |number| 1 << number);
        let mut rows: Vec<_> =
            ranked.busiest.iter().map(|it| (it.service.as_str(), it.protocol.as_str(), it.counts.steered)).collect();
        rows.sort_unstable();
        assert_eq!(
            rows.iter().map(|it| (it.0, it.1)).collect::<Vec<_>>(),
            [("default", "tcp"), ("default", "udp"), ("other", "tcp")]
        );
        assert_eq!(rows.iter().map(|it| it.2).sum::<u64>(), 0b1111);
    }
}
