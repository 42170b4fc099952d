//! Numbers of rules and slots of services, as the kernel knows them.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
};

/// Gives out numbers, one by one or several in a row, low ones first.
///
/// Numbers that were given back rest for a while: programs and people may still hold them for a moment.
#[derive(Debug)]
pub(in crate::engine) struct IdAllocator {
    /// Runs of free numbers: where each begins and ends.
    free: BTreeMap<u32, u32>,
    resting: VecDeque<Range<u32>>,
    /// How many ranges rest.
    rest: usize,
}

impl IdAllocator {
    /// Gives out these ids. Ranges that were given back rest until so many others have been.
    pub(in crate::engine) fn new(range: Range<u32>, rest: usize) -> Self {
        Self { free: BTreeMap::from([(range.start, range.end)]), resting: VecDeque::new(), rest }
    }

    /// Takes as many numbers in a row. Nothing is returned only where there is no such row.
    pub(in crate::engine) fn take(&mut self, count: u32) -> Option<Range<u32>> {
        if let Some(taken) = self.take_free(count) {
            return Some(taken);
        }
        while let Some(range) = self.resting.pop_front() {
            self.free(range);
        }
        self.take_free(count)
    }

    fn take_free(&mut self, count: u32) -> Option<Range<u32>> {
        if count == 0 {
            return Some(0..0);
        }
        let (start, end) = self.free.iter().find(|(start, end)| **end - **start >= count).map(|(a, b)| (*a, *b))?;
        self.free.remove(&start);
        let taken = start..start + count;
        if taken.end < end {
            self.free.insert(taken.end, end);
        }
        Some(taken)
    }

    /// Takes numbers back.
    pub(in crate::engine) fn give_back(&mut self, numbers: Range<u32>) {
        if numbers.is_empty() {
            return;
        }
        self.resting.push_back(numbers);
        while self.resting.len() > self.rest
            && let Some(range) = self.resting.pop_front()
        {
            self.free(range);
        }
    }

    fn free(&mut self, Range { mut start, mut end }: Range<u32>) {
        if let Some((before, last)) = self.free.range(..start).next_back().map(|(before, last)| (*before, *last))
            && last == start
        {
            self.free.remove(&before);
            start = before;
        }
        if let Some(last) = self.free.remove(&end) {
            end = last;
        }
        self.free.insert(start, end);
    }
}

#[cfg(test)]
mod tests {
    use super::IdAllocator;

    #[test]
    fn ids_rest_before_they_come_back() {
        let mut ids = IdAllocator::new(1..9, 2);
        assert_eq!([1, 2, 1].map(|count| ids.take(count)), [Some(1..2), Some(2..4), Some(4..5)]);
        ids.give_back(1..2);
        ids.give_back(2..4);
        assert_eq!(ids.take(1), Some(5..6));
        ids.give_back(4..5);
        assert_eq!(ids.take(1), Some(1..2));
        // Rather than none at all, one that rests.
        assert_eq!((ids.take(3), ids.take(1), ids.take(3)), (Some(6..9), Some(2..3), None));
        for range in [1..2, 2..3, 5..6, 6..9] {
            ids.give_back(range);
        }
        assert_eq!((ids.take(8), ids.take(1)), (Some(1..9), None));
    }
}
