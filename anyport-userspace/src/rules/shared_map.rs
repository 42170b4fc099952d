//! A sorted map of which copies are cheap: they share all that neither of them has changed since.
//!
//! Entries stand in leaves of a few hundred. A copy copies the list of leaves alone, and a change copies the leaf that it is made in if
//! another map has that leaf too. So a reader can go through the rules as they were at a moment while commands change them, and what
//! is kept for it is what has changed meanwhile.

use std::{cmp::Ordering, ops::RangeInclusive, sync::Arc};

/// Entries of a leaf at most. It is cut in half at that.
const LARGEST: usize = 256;
/// A change of more than one in so many entries makes all leaves at once.
const MANY: usize = 8;

type Leaf<K, V> = Arc<Vec<(K, V)>>;

/// Values by key, in the order of the keys.
#[derive(Clone, Debug)]
pub(super) struct SharedMap<K, V> {
    /// None is empty.
    leaves: Vec<Leaf<K, V>>,
    len: usize,
}

impl<K, V> Default for SharedMap<K, V> {
    fn default() -> Self {
        Self { leaves: Vec::new(), len: 0 }
    }
}

impl<K: Ord + Copy, V: Clone> SharedMap<K, V> {
    /// How many entries there are.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// All of them.
    pub(super) fn iter(&self) -> Iter<'_, K, V> {
        Iter { leaves: &self.leaves, at: 0, last: None }
    }

    /// The entries behind a key.
    pub(super) fn after(&self, key: &K) -> Iter<'_, K, V> {
        let leaves = &self.leaves[self.leaf_of(key)..];
        let at = leaves.first().map_or(0, |leaf| leaf.partition_point(|(it, _)| it <= key));
        Iter { leaves, at, last: None }
    }

    /// The entries from one key to another, both included.
    pub(super) fn range(&self, keys: RangeInclusive<K>) -> Iter<'_, K, V> {
        let (first, last) = keys.into_inner();
        let leaves = &self.leaves[self.leaf_of(&first)..];
        let at = leaves.first().map_or(0, |leaf| leaf.partition_point(|(key, _)| *key < first));
        Iter { leaves, at, last: Some(last) }
    }

    /// The value of a key.
    pub(super) fn get(&self, key: &K) -> Option<&V> {
        let leaf = self.leaves.get(self.leaf_of(key))?;
        let at = leaf.binary_search_by(|(it, _)| it.cmp(key)).ok()?;
        Some(&leaf[at].1)
    }

    /// The value of a key, made by `value` where there is none.
    pub(super) fn entry(&mut self, key: K, value: impl FnOnce() -> V) -> &mut V {
        if self.leaves.is_empty() {
            self.leaves.push(Arc::default());
        }
        let mut leaf = self.leaf_of(&key).min(self.leaves.len() - 1);
        let mut place = self.leaves[leaf].binary_search_by(|(it, _)| it.cmp(&key));
        if let Err(at) = place {
            if self.leaves[leaf].len() >= LARGEST {
                let upper = Arc::make_mut(&mut self.leaves[leaf]).split_off(LARGEST / 2);
                self.leaves.insert(leaf + 1, Arc::new(upper));
                if at > LARGEST / 2 {
                    leaf += 1;
                    place = Err(at - LARGEST / 2);
                }
            }
            self.len += 1;
        }
        let entries = Arc::make_mut(&mut self.leaves[leaf]);
        let at = place.unwrap_or_else(|at| {
            entries.insert(at, (key, value()));
            at
        });
        &mut entries[at].1
    }

    /// Takes the value of a key out.
    pub(super) fn remove(&mut self, key: &K) -> Option<V> {
        let leaf = self.leaf_of(key);
        let at = self.leaves.get(leaf)?.binary_search_by(|(it, _)| it.cmp(key)).ok()?;
        let (_, value) = Arc::make_mut(&mut self.leaves[leaf]).remove(at);
        self.len -= 1;
        self.join(leaf);
        Some(value)
    }

    /// Whether a change of so many entries is made faster by [`Self::replace`] than by one after the other.
    pub(super) fn is_much(&self, entries: usize) -> bool {
        entries > self.len / MANY
    }

    /// Takes `removed` out and puts `added` in, both sorted by key.
    pub(super) fn replace(&mut self, removed: &[(K, V)], added: &[(K, V)]) {
        let (mut removed, mut added) = (removed.iter().peekable(), added.iter().peekable());
        let mut all: Vec<(K, V)> = Vec::with_capacity(self.len + added.len());
        for (key, value) in self.iter() {
            while let Some((new, value)) = added.next_if(|(new, _)| new < key) {
                all.push((*new, value.clone()));
            }
            while removed.next_if(|(gone, _)| gone < key).is_some() {}
            let is_gone = removed.next_if(|(gone, _)| gone == key).is_some();
            match added.next_if(|(new, _)| new == key) {
                Some((_, value)) => all.push((*key, value.clone())),
                None if is_gone => {}
                None => all.push((*key, value.clone())),
            }
        }
        all.extend(added.cloned());
        *self = all.into_iter().collect();
    }

    /// The leaf that has a key if any has it: the first one whose last key is not less.
    fn leaf_of(&self, key: &K) -> usize {
        self.leaves.partition_point(|leaf| leaf.last().is_some_and(|(last, _)| last < key))
    }

    /// Puts a leaf that has become small together with the next one, if both fit well into one.
    fn join(&mut self, leaf: usize) {
        if self.leaves[leaf].is_empty() {
            self.leaves.remove(leaf);
        } else if let Some(next) = self.leaves.get(leaf + 1)
            && self.leaves[leaf].len() + next.len() <= LARGEST / 4
        {
            let next = self.leaves.remove(leaf + 1);
            Arc::make_mut(&mut self.leaves[leaf]).extend(next.iter().cloned());
        }
    }
}

impl<K: Ord + Copy, V: Clone> FromIterator<(K, V)> for SharedMap<K, V> {
    /// Of entries that are sorted by key.
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut map = Self::default();
        let mut entries = entries.into_iter().peekable();
        while entries.peek().is_some() {
            // Room is left, so that the first changes cut no leaf.
            let leaf: Vec<_> = entries.by_ref().take(LARGEST * 3 / 4).collect();
            map.len += leaf.len();
            map.leaves.push(Arc::new(leaf));
        }
        map
    }
}

/// Entries in the order of their keys.
pub(super) struct Iter<'a, K, V> {
    /// Those that are left, the first of them from `at` on.
    leaves: &'a [Leaf<K, V>],
    at: usize,
    last: Option<K>,
}

impl<'a, K: Ord, V> Iterator for Iter<'a, K, V> {
    type Item = (&'a K, &'a V);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (leaf, rest) = self.leaves.split_first()?;
            let Some((key, value)) = leaf.get(self.at) else {
                (self.leaves, self.at) = (rest, 0);
                continue;
            };
            if self.last.as_ref().is_some_and(|last| key.cmp(last) == Ordering::Greater) {
                self.leaves = &[];
                return None;
            }
            self.at += 1;
            return Some((key, value));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::{LARGEST, SharedMap};

    fn entries(map: &SharedMap<u16, u32>) -> Vec<(u16, u32)> {
        map.iter().map(|(key, value)| (*key, *value)).collect()
    }

    proptest! {
        #[test]
        fn it_is_as_a_tree_and_copies_stay_as_they_were(
            begin in prop::collection::btree_map(0_u16..2000, 0_u32..9, 0..1500),
            steps in prop::collection::vec((0_u16..2000, any::<bool>()), 0..1500),
            (low, high) in (0_u16..2000, 0_u16..2000),
        ) {
            let mut tree: BTreeMap<u16, u32> = begin.clone();
            let mut map: SharedMap<u16, u32> = begin.clone().into_iter().collect();
            let copy = map.clone();
            for (number, (key, is_put)) in (10..).zip(steps) {
                if is_put {
                    *map.entry(key, || 0) = number;
                    tree.insert(key, number);
                } else {
                    prop_assert_eq!(map.remove(&key), tree.remove(&key));
                }
                prop_assert_eq!((map.get(&key), map.len()), (tree.get(&key), tree.len()));
            }
            prop_assert_eq!(entries(&map), tree.iter().map(|(key, value)| (*key, *value)).collect::<Vec<_>>());
            prop_assert_eq!(entries(&copy), begin.into_iter().collect::<Vec<_>>());
            prop_assert!(map.leaves.iter().all(|leaf| (1..=LARGEST).contains(&leaf.len())));
            let (low, high) = (low.min(high), low.max(high));
            let range: Vec<_> = map.range(low..=high).collect();
            prop_assert_eq!(range, tree.range(low..=high).collect::<Vec<_>>());
            prop_assert_eq!(map.after(&low).collect::<Vec<_>>(), tree.range(low + 1..).collect::<Vec<_>>());
        }

        #[test]
        fn many_changes_at_once_are_as_one_after_the_other(
            begin in prop::collection::btree_map(0_u16..900, 0_u32..9, 0..600),
            removed in prop::collection::btree_map(0_u16..900, 0_u32..9, 0..300),
            added in prop::collection::btree_map(0_u16..900, 10_u32..19, 0..300),
        ) {
            let (removed, added): (Vec<_>, Vec<_>) = (removed.into_iter().collect(), added.into_iter().collect());
            let mut one: SharedMap<u16, u32> = begin.into_iter().collect();
            let mut all = one.clone();
            for (key, _) in &removed {
                one.remove(key);
            }
            for (key, value) in &added {
                *one.entry(*key, || 0) = *value;
            }
            all.replace(&removed, &added);
            prop_assert_eq!(entries(&one), entries(&all));
            prop_assert_eq!(one.len(), all.len());
        }
    }
}
