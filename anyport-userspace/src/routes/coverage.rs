//! Which addresses are to be local, and the fewest blocks that say so.
//!
//! Prefixes that overlap or adjoin are one range of addresses, and a range is as few blocks as can be; so the routes
//! depend on the addresses that are covered alone, and not on the prefixes that they came from.

use std::{collections::BTreeMap, iter};

use crate::rules::Prefix;

/// The first and the last address of a range.
type Range = (u128, u128);

/// The addresses of any number of prefixes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    v4: Ranges,
    v6: Ranges,
}

/// What a series of small changes has done to a [`Coverage`], for as long as nothing else changes it. It grows with
/// the ranges that were touched, whatever the size of the coverage.
#[derive(Clone, Debug, Default)]
pub struct Edits {
    v4: Net,
    v6: Net,
}

/// The blocks by which two coverages differ, in order: IPv4 first, then by address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Blocks of the first coverage only.
    pub removed: Vec<Prefix>,
    /// Blocks of the second coverage only.
    pub added: Vec<Prefix>,
}

impl Coverage {
    /// Covers the prefix as well.
    pub fn add(&mut self, prefix: &Prefix, edits: &mut Edits) {
        let (ranges, net) = self.family(prefix.is_ipv4(), edits);
        ranges.add(prefix.bounds(), net);
    }

    /// Covers no more of the prefix than `still_covered` does: all other prefixes, or at least those inside the
    /// prefix or around it, in any order.
    pub fn remove<I: IntoIterator<Item = Prefix>>(&mut self, prefix: &Prefix, still_covered: I, edits: &mut Edits) {
        let (ranges, net) = self.family(prefix.is_ipv4(), edits);
        let removed = prefix.bounds();
        ranges.cut(removed, net);
        for other in still_covered.into_iter().filter(|other| other.is_ipv4() == prefix.is_ipv4()) {
            if let Some(kept) = common(removed, other.bounds()) {
                ranges.add(kept, net);
            }
        }
    }

    /// Takes the changes back.
    pub fn undo(&mut self, edits: Edits) {
        self.v4.undo(edits.v4);
        self.v6.undo(edits.v6);
    }

    /// Whether every address of the prefix is covered.
    pub fn covers(&self, prefix: &Prefix) -> bool {
        let ranges = if prefix.is_ipv4() { &self.v4 } else { &self.v6 };
        let (first, last) = prefix.bounds();
        ranges.0.range(..=first).next_back().is_some_and(|(_, end)| last <= *end)
    }

    /// The addresses that both cover.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        Self { v4: self.v4.intersection(&other.v4), v6: self.v6.intersection(&other.v6) }
    }

    /// The fewest blocks that cover these addresses and no others; in order: IPv4 first, then by address.
    pub fn blocks(&self) -> impl Iterator<Item = Prefix> {
        self.v4
            .iter()
            .flat_map(|range| blocks(range, true))
            .chain(self.v6.iter().flat_map(|range| blocks(range, false)))
    }

    /// How the blocks of another coverage differ from those of this one.
    pub fn difference(&self, latter: &Self) -> Difference {
        Difference::between(self.blocks(), latter.blocks())
    }

    fn family<'a>(&'a mut self, is_ipv4: bool, edits: &'a mut Edits) -> (&'a mut Ranges, &'a mut Net) {
        if is_ipv4 { (&mut self.v4, &mut edits.v4) } else { (&mut self.v6, &mut edits.v6) }
    }
}

impl FromIterator<Prefix> for Coverage {
    fn from_iter<I: IntoIterator<Item = Prefix>>(prefixes: I) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for prefix in prefixes {
            let ranges = if prefix.is_ipv4() { &mut v4 } else { &mut v6 };
            ranges.push(prefix.bounds());
        }
        Self { v4: Ranges::merged(v4), v6: Ranges::merged(v6) }
    }
}

impl Edits {
    /// How the blocks differ from those before the changes.
    pub fn difference(&self) -> Difference {
        Difference::between(
            blocks_of(&self.v4, true, false).chain(blocks_of(&self.v6, false, false)),
            blocks_of(&self.v4, true, true).chain(blocks_of(&self.v6, false, true)),
        )
    }
}

fn blocks_of(net: &Net, is_ipv4: bool, is_new: bool) -> impl Iterator<Item = Prefix> {
    net.iter().filter(move |(_, new)| **new == is_new).flat_map(move |(range, _)| blocks(*range, is_ipv4))
}

impl Difference {
    /// The difference of two lists of blocks, both in order and each without repetition.
    pub(super) fn between(previous: impl Iterator<Item = Prefix>, latter: impl Iterator<Item = Prefix>) -> Self {
        let mut difference = Self::default();
        let (mut previous, mut latter) = (previous.peekable(), latter.peekable());
        loop {
            match (previous.peek(), latter.peek()) {
                (Some(old), Some(new)) if old == new => {
                    previous.next();
                    latter.next();
                }
                (Some(old), new) if new.is_none_or(|new| position(old) < position(new)) => {
                    difference.removed.extend(previous.next());
                }
                (_, Some(_)) => difference.added.extend(latter.next()),
                (_, None) => return difference,
            }
        }
    }

    /// What undoes this difference.
    #[must_use]
    pub fn reversed(self) -> Self {
        Self { removed: self.added, added: self.removed }
    }

    /// Whether the blocks are the same.
    pub fn is_empty(&self) -> bool {
        self.removed.is_empty() && self.added.is_empty()
    }
}

/// The place of a block in the order of blocks.
pub(super) fn position(block: &Prefix) -> (bool, u128, u8) {
    (!block.is_ipv4(), block.bounds().0, block.len())
}

/// The ranges that a series of changes has touched: `true` for those that have come, `false` for those that have gone.
type Net = BTreeMap<Range, bool>;

/// Ranges of addresses of one family, first to last. They neither overlap nor adjoin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Ranges(BTreeMap<u128, u128>);

impl Ranges {
    /// From ranges of any kind.
    fn merged(mut ranges: Vec<Range>) -> Self {
        ranges.sort_unstable();
        ranges.dedup_by(|&mut (first, last), (_, end)| {
            let merges = first <= end.saturating_add(1);
            if merges {
                *end = last.max(*end);
            }
            merges
        });
        Self(ranges.into_iter().collect())
    }

    fn iter(&self) -> impl Iterator<Item = Range> {
        self.0.iter().map(|(first, last)| (*first, *last))
    }

    fn add(&mut self, (first, last): Range, net: &mut Net) {
        let mut merged = (first, last);
        while let Some(other) = self.last_up_to(last.saturating_add(1))
            && other.1.saturating_add(1) >= first
        {
            self.take(other, net);
            merged = (merged.0.min(other.0), merged.1.max(other.1));
        }
        self.put(merged, net);
    }

    fn cut(&mut self, (first, last): Range, net: &mut Net) {
        while let Some(other) = self.last_up_to(last)
            && other.1 >= first
        {
            self.take(other, net);
            if other.0 < first {
                self.put((other.0, first - 1), net);
            }
            if other.1 > last {
                self.put((last + 1, other.1), net);
            }
        }
    }

    /// The last range that begins no later than this.
    fn last_up_to(&self, address: u128) -> Option<Range> {
        self.0.range(..=address).next_back().map(|(first, last)| (*first, *last))
    }

    fn put(&mut self, range: Range, net: &mut Net) {
        self.0.insert(range.0, range.1);
        // What went and comes back is no change.
        if net.remove(&range).is_none() {
            net.insert(range, true);
        }
    }

    fn take(&mut self, range: Range, net: &mut Net) {
        self.0.remove(&range.0);
        if net.remove(&range).is_none() {
            net.insert(range, false);
        }
    }

    fn undo(&mut self, net: Net) {
        let (come, gone): (Vec<_>, Vec<_>) = net.into_iter().partition(|(_, is_new)| *is_new);
        for ((first, _), _) in come {
            self.0.remove(&first);
        }
        self.0.extend(gone.into_iter().map(|(range, _)| range));
    }

    fn intersection(&self, other: &Self) -> Self {
        let (mut these, mut others) = (self.iter().peekable(), other.iter().peekable());
        let ranges = iter::from_fn(|| {
            while let (Some(&this), Some(&that)) = (these.peek(), others.peek()) {
                // Whichever ends first has nothing more in common with what follows.
                if this.1 < that.1 {
                    these.next();
                } else {
                    others.next();
                }
                let shared = common(this, that);
                if shared.is_some() {
                    return shared;
                }
            }
            None
        });
        Self(ranges.collect())
    }
}

/// The addresses that two ranges share.
fn common(a: Range, b: Range) -> Option<Range> {
    let (first, last) = (a.0.max(b.0), a.1.min(b.1));
    (first <= last).then_some((first, last))
}

/// The fewest blocks that make up the range: from its start on, always the largest that begins there and fits.
fn blocks((first, last): Range, is_ipv4: bool) -> impl Iterator<Item = Prefix> {
    let width: u8 = if is_ipv4 { 32 } else { 128 };
    let mut rest = Some(first);
    iter::from_fn(move || {
        let first = rest?;
        let mut host_bits = 0;
        // The next larger block begins here too, and its last address is still within.
        while host_bits < width && (first >> host_bits) & 1 == 0 && first | (u128::MAX >> (127 - host_bits)) <= last {
            host_bits += 1;
        }
        let end = if host_bits == 0 { first } else { first | (u128::MAX >> (128 - host_bits)) };
        rest = (end < last).then(|| end + 1);
        Some(Prefix::from_bits(is_ipv4, first, width - host_bits))
    })
}

#[cfg(test)]
mod tests;
