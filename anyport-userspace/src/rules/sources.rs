//! Which sources a service allows and denies: its access control list.

use std::{collections::HashSet, net::IpAddr};

use super::{InvalidText, Prefix};

/// Which clients a service allows: its ACL, the prefixes of sources that it allows and those that it denies.
///
/// The longest prefix that a source is in decides. A source in none of them is allowed unless the ACL allows some.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceLists {
    allow: Vec<Prefix>,
    deny: Vec<Prefix>,
    /// For IPv4 and IPv6: where ranges of addresses begin, as numbers, and whether they are allowed.
    ranges: [Vec<(u128, bool)>; 2],
}

impl SourceLists {
    /// Most prefixes in the lists of one service. Each of the rules that say something else has its own copy in the
    /// lookup table.
    pub const LIMIT: usize = 4096;

    /// Takes every source.
    pub const EVERYBODY: &'static Self =
        &Self { allow: Vec::new(), deny: Vec::new(), ranges: [Vec::new(), Vec::new()] };

    /// Of prefixes in any order.
    pub fn new(allow: Vec<Prefix>, deny: Vec<Prefix>) -> Self {
        if allow.is_empty() && deny.is_empty() {
            return Self::default();
        }
        let mut all: Vec<_> = allow.iter().map(|it| (*it, true)).chain(deny.iter().map(|it| (*it, false))).collect();
        // The longer ones last, since they decide.
        all.sort_by_key(|(prefix, _)| prefix.len());
        let ranges = [true, false].map(|is_ipv4| {
            let mut ranges = vec![(0, allow.is_empty())];
            for (prefix, is_taken) in all.iter().filter(|(prefix, _)| prefix.is_ipv4() == is_ipv4) {
                paint(&mut ranges, prefix.bounds(), *is_taken);
            }
            // Behind the last address there is nothing.
            let (_, end) = Prefix::from_bits(is_ipv4, 0, 0).bounds();
            ranges.pop_if(|(first, _)| *first > end);
            ranges.dedup_by_key(|(_, is_taken)| *is_taken);
            ranges
        });
        Self { allow, deny, ranges }
    }

    /// The prefixes that are allowed.
    pub fn allow(&self) -> &[Prefix] {
        &self.allow
    }

    /// The prefixes that are denied.
    pub fn deny(&self) -> &[Prefix] {
        &self.deny
    }

    /// Whether every source is taken since nothing else is said.
    pub fn is_empty(&self) -> bool {
        self.allow.is_empty() && self.deny.is_empty()
    }

    /// Whether the lists make sense.
    ///
    /// # Errors
    /// They contradict each other, or have too many prefixes.
    pub fn validate(&self) -> Result<(), InvalidText> {
        let count = self.allow.len() + self.deny.len();
        if count > Self::LIMIT {
            return Err(InvalidText(format!(
                "source-allow and source-deny have {count} prefixes; {} are the limit",
                Self::LIMIT
            )));
        }
        let allowed: HashSet<_> = self.allow.iter().collect();
        match self.deny.iter().find(|prefix| allowed.contains(prefix)) {
            Some(both) => Err(InvalidText(format!("{both} is both in source-allow and in source-deny"))),
            None => Ok(()),
        }
    }

    /// Whether a source is taken.
    pub fn allows(&self, source: IpAddr) -> bool {
        let (number, _) = Prefix::host(source).bounds();
        let ranges = &self.ranges[usize::from(!source.is_ipv4())];
        let behind = ranges.partition_point(|(first, _)| *first <= number);
        // Lists that say nothing have no ranges.
        behind.checked_sub(1).is_none_or(|at| ranges[at].1)
    }

    /// The prefix that decides about a source, if there is one.
    pub fn deciding(&self, source: IpAddr) -> Option<Prefix> {
        let all = self.allow.iter().chain(&self.deny).copied();
        all.filter(|prefix| prefix.contains(source)).max_by_key(Prefix::len)
    }

    /// Ranges of addresses of one family, as numbers, and whether they are taken.
    pub fn ranges(&self, is_ipv4: bool) -> impl Iterator<Item = (u128, u128, bool)> {
        let ranges = &self.ranges[usize::from(!is_ipv4)];
        let (_, end) = Prefix::from_bits(is_ipv4, 0, 0).bounds();
        let lasts = ranges.iter().skip(1).map(|(first, _)| first - 1).chain([end]);
        ranges.iter().zip(lasts).map(|((first, is_taken), last)| (*first, last, *is_taken))
    }
}

fn paint(ranges: &mut Vec<(u128, bool)>, (first, last): (u128, u128), is_taken: bool) {
    let from = ranges.partition_point(|it| it.0 < first);
    let to = ranges.partition_point(|it| it.0 <= last);
    let behind = last.checked_add(1).filter(|next| ranges.get(to).is_none_or(|it| it.0 != *next));
    let behind = behind.map(|next| (next, ranges[to - 1].1));
    ranges.splice(from..to, [(first, is_taken)].into_iter().chain(behind));
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use proptest::prelude::*;

    use super::SourceLists;
    use crate::rules::{
        Prefix, from_address,
        tests::arbitrary::{flow, source_lists},
    };

    fn lists(allow: &[&str], deny: &[&str]) -> SourceLists {
        let read = |list: &[&str]| list.iter().map(|it| it.parse().unwrap()).collect();
        SourceLists::new(read(allow), read(deny))
    }

    #[test]
    fn the_longest_prefix_decides() {
        let both = lists(&["198.51.100.0/24", "198.51.100.64/28"], &["198.51.100.64/26", "203.0.113.0/24"]);
        for (source, is_taken) in [
            ("198.51.100.1", true),
            ("198.51.100.63", true),
            ("198.51.100.64", true),
            ("198.51.100.80", false),
            ("198.51.100.127", false),
            ("198.51.100.128", true),
            ("198.51.101.0", false),
            ("203.0.113.1", false),
            ("2001:db8::1", false),
        ] {
            assert_eq!(both.allows(source.parse().unwrap()), is_taken, "{source}");
        }
        let deny = lists(&[], &["255.255.255.255", "2001:db8::/32"]);
        for (source, is_taken) in
            [("0.0.0.0", true), ("255.255.255.255", false), ("2001:db8::1", false), ("2001:db9::1", true)]
        {
            assert_eq!(deny.allows(source.parse().unwrap()), is_taken, "{source}");
        }
        assert!(SourceLists::default().allows(IpAddr::from([0; 4])) && SourceLists::default().is_empty());
    }

    #[test]
    fn lists_that_make_no_sense_are_refused() {
        assert!(lists(&["10.0.0.0/8"], &["10.0.0.0/9"]).validate().is_ok());
        let error = lists(&["10.0.0.0/8"], &["10.0.0.0/8"]).validate().unwrap_err().to_string();
        assert!(error.contains("10.0.0.0/8 is both in"), "{error}");
        let many = (0..=SourceLists::LIMIT as u128).map(|i| Prefix::from_bits(true, i, 32)).collect();
        assert!(SourceLists::new(many, Vec::new()).validate().unwrap_err().to_string().contains("4097 prefixes"));
    }

    proptest! {
        #[test]
        fn ranges_say_what_the_prefixes_say(lists in source_lists(), flows in prop::collection::vec(flow(), 50)) {
            prop_assert!(lists.validate().is_ok());
            for flow in flows {
                let source = from_address(flow.source);
                let expected = lists.deciding(source).map_or(lists.allow().is_empty(), |it| lists.allow().contains(&it));
                prop_assert_eq!(lists.allows(source), expected, "{} {:?}", source, &lists);
                let (number, _) = Prefix::host(source).bounds();
                let around = lists.ranges(source.is_ipv4()).find(|(first, last, _)| (*first..=*last).contains(&number));
                prop_assert_eq!(around.map_or(lists.is_empty(), |it| it.2), expected);
            }
        }
    }
}
