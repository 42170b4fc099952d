//! Tests of the routes that cover exactly the addresses of prefixes.

use std::collections::BTreeSet;

use proptest::{collection::vec, prelude::*};

use super::{Coverage, Difference, Edits, Prefix};

fn prefixes(texts: &[&str]) -> Vec<Prefix> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn coverage(texts: &[&str]) -> Coverage {
    prefixes(texts).into_iter().collect()
}

#[test]
fn merges_what_adjoins() {
    for (given, expected) in [
        (&["192.0.2.0/25", "192.0.2.128/25"][..], &["192.0.2.0/24"][..]),
        (&["192.0.2.0/24", "192.0.2.7"], &["192.0.2.0/24"]),
        // These adjoin, but no single block is both.
        (&["192.0.2.2/31", "192.0.2.4"], &["192.0.2.2/31", "192.0.2.4/32"]),
        (&["128.0.0.0/1", "0.0.0.0/1"], &["0.0.0.0/0"]),
        (&["8000::/1", "::/1"], &["::/0"]),
        (&["255.255.255.255", "::"], &["255.255.255.255/32", "::/128"]),
        (&["ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"], &["ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128"]),
        (&["2001:db8:1::/48", "2001:db8::/48", "0.0.0.0/0"], &["0.0.0.0/0", "2001:db8::/47"]),
    ] {
        let blocks: Vec<Prefix> = coverage(given).blocks().collect();
        assert_eq!(blocks, prefixes(expected), "{given:?}");
    }
}

#[test]
fn a_hole_in_everything_is_cut_and_filled() {
    for (everything, hole, width) in [("0.0.0.0/0", "192.0.2.7/32", 32), ("::/0", "2001:db8::7/128", 128)] {
        let before = coverage(&[everything]);
        let mut after = before.clone();
        let hole: Prefix = hole.parse().unwrap();
        let mut edits = Edits::default();
        after.remove(&everything.parse().unwrap(), [], &mut edits);
        after.add(&everything.parse().unwrap(), &mut edits);
        assert!(edits.difference().is_empty());
        after.remove(&hole, [], &mut edits);
        assert!(!after.covers(&hole) && before.covers(&hole));
        let difference = edits.difference();
        assert_eq!((difference.removed.len(), difference.added.len()), (1, width));
        after.add(&hole, &mut Edits::default());
        assert_eq!(after, before);
    }
}

/// Any prefix of a corner of the address space, 256 addresses of each family at its very end, so that the last
/// address of all is among them.
fn any_prefix() -> impl Strategy<Value = Prefix> {
    (any::<bool>(), any::<u8>(), 0..=8u8).prop_map(|(is_ipv4, low, host_bits)| {
        let (width, corner) = if is_ipv4 { (32, 0xffff_ff00) } else { (128, u128::MAX << 8) };
        Prefix::from_bits(is_ipv4, corner | u128::from(low), width - host_bits)
    })
}

/// The addresses one by one.
fn addresses(prefixes: &[Prefix]) -> BTreeSet<(bool, u128)> {
    let each = |prefix: &Prefix| {
        let (is_ipv4, (first, last)) = (prefix.is_ipv4(), prefix.bounds());
        (first..=last).map(move |address| (is_ipv4, address))
    };
    prefixes.iter().flat_map(each).collect()
}

/// The number of the largest blocks that lie inside: no set of blocks that covers the same can be smaller.
fn fewest(addresses: &BTreeSet<(bool, u128)>) -> usize {
    let holds = |is_ipv4, first: u128, host_bits: u8| {
        (0..1u128 << host_bits).all(|low| addresses.contains(&(is_ipv4, first | low)))
    };
    let starts_largest = |&&(is_ipv4, address): &&(bool, u128)| {
        let fits = |host_bits: &u8| address % (1 << host_bits) == 0 && holds(is_ipv4, address, *host_bits);
        (0..=8).filter(fits).max().is_some_and(|host_bits| {
            (host_bits + 1..=8).all(|larger| !holds(is_ipv4, address & (u128::MAX << larger), larger))
        })
    };
    addresses.iter().filter(starts_largest).count()
}

proptest! {
    #[test]
    fn blocks_are_exact_and_fewest(prefixes in vec(any_prefix(), 0..24)) {
        let coverage: Coverage = prefixes.iter().copied().collect();
        let blocks: Vec<Prefix> = coverage.blocks().collect();
        let covered = addresses(&prefixes);
        prop_assert_eq!(addresses(&blocks), covered.clone());
        prop_assert_eq!(blocks.iter().map(|block| addresses(&[*block]).len()).sum::<usize>(), covered.len());
        prop_assert_eq!(blocks.len(), fewest(&covered));
        prop_assert!(blocks.is_sorted_by_key(super::position));
        for prefix in &prefixes {
            prop_assert!(coverage.covers(prefix));
        }
    }

    #[test]
    fn small_changes_come_to_the_same_as_all_anew(
        before in vec(any_prefix(), 0..24),
        changes in vec((any::<bool>(), any::<prop::sample::Index>(), any_prefix()), 0..24),
    ) {
        let previous: Coverage = before.iter().copied().collect();
        let mut prefixes = before;
        let mut coverage = previous.clone();
        let mut edits = Edits::default();
        for (adds, index, prefix) in changes {
            if adds || prefixes.is_empty() {
                prefixes.push(prefix);
                coverage.add(&prefix, &mut edits);
            } else {
                let removed = prefixes.swap_remove(index.index(prefixes.len()));
                coverage.remove(&removed, prefixes.iter().copied(), &mut edits);
            }
            prop_assert_eq!(&coverage, &prefixes.iter().copied().collect());
        }
        prop_assert_eq!(edits.difference(), previous.difference(&coverage));
        coverage.undo(edits);
        prop_assert_eq!(coverage, previous);
    }

    #[test]
    fn differences_and_intersections_are_those_of_sets(
        previous in vec(any_prefix(), 0..24),
        latter in vec(any_prefix(), 0..24),
        asked in any_prefix(),
    ) {
        let (old_addresses, new_addresses) = (addresses(&previous), addresses(&latter));
        let (old, new): (Coverage, Coverage) = (previous.into_iter().collect(), latter.into_iter().collect());
        let Difference { removed, added } = old.difference(&new);
        let (old_blocks, new_blocks): (Vec<_>, Vec<_>) = (old.blocks().collect(), new.blocks().collect());
        let only = |these: &[Prefix], those: &[Prefix]| -> Vec<Prefix> {
            these.iter().filter(|block| !those.contains(block)).copied().collect()
        };
        prop_assert_eq!(removed, only(&old_blocks, &new_blocks));
        prop_assert_eq!(added, only(&new_blocks, &old_blocks));
        let both: Vec<Prefix> = old.intersection(&new).blocks().collect();
        prop_assert_eq!(addresses(&both), &old_addresses & &new_addresses);
        prop_assert_eq!(both.into_iter().collect::<Coverage>(), old.intersection(&new));
        prop_assert_eq!(old.covers(&asked), addresses(&[asked]).is_subset(&old_addresses));
    }

    /// What is removed goes before what is added comes: in between, what both cover is covered, and nothing else.
    #[test]
    fn removals_alone_leave_the_intersection(
        kept in vec(any_prefix(), 0..12),
        removed in vec(any_prefix(), 0..6),
        added in vec(any_prefix(), 0..6),
    ) {
        let old: Coverage = kept.iter().chain(&removed).copied().collect();
        let latter: Vec<Prefix> = kept.iter().chain(&added).copied().collect();
        let new: Coverage = latter.iter().copied().collect();
        let mut coverage = old.clone();
        let mut edits = Edits::default();
        for prefix in &removed {
            coverage.remove(prefix, latter.iter().copied(), &mut edits);
        }
        // A prefix that is added within one that is removed may be covered already.
        prop_assert_eq!(&coverage, &old.intersection(&new));
        for prefix in &added {
            coverage.add(prefix, &mut edits);
        }
        prop_assert_eq!(coverage, new);
    }
}
