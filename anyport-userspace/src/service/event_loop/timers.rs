//! Deadlines of a worker's connections.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use super::slab::Key;

/// Deadlines are put off to the next multiple of so many milliseconds, so that a worker with many of them is seldom woken.
const GRAIN: u64 = 16;

/// The expiry of each connection's timer, at most one for each.
#[derive(Debug)]
pub(super) struct Timers {
    start: Instant,
    due: BTreeSet<(Expiry, Key)>,
}

/// A deadline, in multiples of [`GRAIN`] since the worker began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Expiry(u64);

impl Timers {
    pub(super) fn new() -> Self {
        Self { start: Instant::now(), due: BTreeSet::new() }
    }

    /// Has the connection's timer expire at that time, at the earliest, instead of when it `was` to expire.
    pub(super) fn set(&mut self, key: Key, was: &mut Option<Expiry>, at: Instant) {
        let millis = at.saturating_duration_since(self.start).as_millis();
        let due = Expiry(u64::try_from(millis).unwrap_or(u64::MAX).div_ceil(GRAIN));
        if *was != Some(due) {
            self.clear(key, was.take());
            self.due.insert((due, key));
            *was = Some(due);
        }
    }

    /// Forgets a connection.
    pub(super) fn clear(&mut self, key: Key, was: Option<Expiry>) {
        if let Some(due) = was {
            self.due.remove(&(due, key));
        }
    }

    /// When the first timer expires. None if there is none, or if that is beyond what the clock can tell.
    pub(super) fn next(&self) -> Option<Instant> {
        let (Expiry(count), _) = self.due.first()?;
        self.start.checked_add(Duration::from_millis(count.saturating_mul(GRAIN)))
    }

    /// Takes one connection whose timer has expired by now.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<Key> {
        if self.next()? > now {
            return None;
        }
        self.due.pop_first().map(|(_, key)| key)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{super::slab::Slab, GRAIN, Timers};

    #[test]
    fn each_is_due_once_and_none_too_early() {
        let (mut slab, mut timers) = (Slab::default(), Timers::new());
        let start = timers.start;
        let at = |millis| start + Duration::from_millis(millis);
        let [one, two, three] = [(); 3].map(|()| slab.insert(()));
        let mut due = [None; 3];
        assert_eq!(timers.next(), None);
        timers.set(one, &mut due[0], at(1000));
        timers.set(two, &mut due[1], at(500));
        timers.set(three, &mut due[2], at(501));
        assert!(timers.next().is_some_and(|next| next >= at(500) && next < at(500 + GRAIN)));
        assert_eq!(timers.take_due(at(499)), None);
        // Later than before, and earlier than before.
        timers.set(two, &mut due[1], at(3000));
        timers.set(one, &mut due[0], at(100));
        assert_eq!(timers.take_due(at(600)), Some(one));
        assert_eq!(timers.take_due(at(600)), Some(three));
        assert_eq!(timers.take_due(at(600)), None);
        timers.clear(two, due[1]);
        assert_eq!((timers.take_due(at(9000)), timers.next()), (None, None));
    }
}
