use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
    ops::Range,
};

/// Gives out numbers that stay as long as what they were given to.
///
/// A number that was given back is not the next to be given out: programs and people may still hold it for a moment.
#[derive(Debug)]
pub(super) struct Numbers<T> {
    range: Range<u32>,
    next: u32,
    given: HashMap<T, u32>,
    used: HashSet<u32>,
}

impl<T: Eq + Hash + Clone> Numbers<T> {
    pub(super) fn new(range: Range<u32>) -> Self {
        Self { next: range.start, range, given: HashMap::new(), used: HashSet::new() }
    }

    /// How many there are at most.
    pub(super) fn capacity(&self) -> usize {
        self.range.len()
    }

    /// The number of `owner`, a new one where it has none. Nothing is left only beyond [`Self::capacity`].
    pub(super) fn get(&mut self, owner: &T) -> Option<u32> {
        if let Some(number) = self.given.get(owner) {
            return Some(*number);
        }
        let candidates = (self.next..self.range.end).chain(self.range.start..self.next);
        let number = candidates.into_iter().find(|number| !self.used.contains(number))?;
        self.next = number + 1;
        self.used.insert(number);
        self.given.insert(owner.clone(), number);
        Some(number)
    }

    /// Takes back the numbers of all others.
    pub(super) fn keep<'a>(&mut self, owners: impl Iterator<Item = &'a T>)
    where
        T: 'a,
    {
        let owners: HashSet<&T> = owners.collect();
        for (_, number) in self.given.extract_if(|owner, _| !owners.contains(owner)) {
            self.used.remove(&number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Numbers;

    #[test]
    fn numbers_stay_and_come_back_late() {
        let mut numbers = Numbers::new(1..4);
        assert_eq!((numbers.get(&"a"), numbers.get(&"b"), numbers.get(&"a")), (Some(1), Some(2), Some(1)));
        numbers.keep(["b"].iter());
        assert_eq!((numbers.get(&"c"), numbers.get(&"d"), numbers.get(&"e")), (Some(3), Some(1), None));
        numbers.keep(["b", "c"].iter());
        assert_eq!((numbers.get(&"e"), numbers.get(&"b")), (Some(1), Some(2)));
    }
}
