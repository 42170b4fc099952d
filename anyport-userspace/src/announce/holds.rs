//! When a prefix is announced, by how long it has been served. Pure.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::{api::AnnounceState, rules::Prefix};

/// Each time that a prefix is withdrawn its hold-down is doubled, up to 32 times the first one. After so long without a break it
/// starts from the first one again.
const MOST_DOUBLINGS: u32 = 5;

/// Whether a prefix is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Serving {
    /// It is.
    Served,
    /// It can't be known yet, so what was so before stays so.
    Unknown,
    /// It is not, and why.
    Unserved(String),
    /// It is not to be served.
    Drained,
}

/// A prefix and whether it is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judged {
    /// Which one.
    pub prefix: Prefix,
    /// Whether it is.
    pub verdict: Serving,
}

/// All prefixes that may be announced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Judgement {
    /// Rises with each change.
    pub number: u64,
    /// Each once.
    pub prefixes: Vec<Judged>,
    /// How long a prefix has to be served without a break.
    pub hold_down: Duration,
}
/// What is known of a prefix.
#[derive(Clone, Debug)]
pub(super) struct Hold {
    pub(super) state: AnnounceState,
    /// Since when.
    pub(super) since: Instant,
    /// Why it is not served, or was not before.
    pub(super) why: Option<String>,
    /// How often it was withdrawn since it was served for long.
    withdrawals: u32,
}

/// What is known of all prefixes that may be announced.
#[derive(Debug, Default)]
pub(super) struct Holds {
    prefixes: BTreeMap<Prefix, Hold>,
    /// How many times prefixes were announced and withdrawn.
    pub(super) announcements: u64,
    pub(super) withdrawals: u64,
}

impl Hold {
    fn new(state: AnnounceState, now: Instant) -> Self {
        Self { state, since: now, why: None, withdrawals: 0 }
    }

    /// When it may be announced, if it is served until then.
    fn due(&self, hold_down: Duration) -> Instant {
        self.since + hold_down * 2_u32.pow(self.withdrawals.saturating_sub(1).min(MOST_DOUBLINGS))
    }

    fn set_state(&mut self, state: AnnounceState, why: Option<String>, now: Instant) {
        if self.state != state {
            (self.state, self.since) = (state, now);
        }
        self.why = why;
    }

    fn judge(&mut self, verdict: &Serving, hold_down: Duration, now: Instant) {
        let is_announced = self.state == AnnounceState::Announced;
        match verdict {
            Serving::Unknown => {}
            Serving::Drained => self.set_state(AnnounceState::Drained, None, now),
            Serving::Unserved(why) => {
                if is_announced {
                    let is_long = now.duration_since(self.since) >= hold_down * 2_u32.pow(MOST_DOUBLINGS);
                    self.withdrawals = if is_long { 1 } else { self.withdrawals.saturating_add(1) };
                }
                self.set_state(AnnounceState::Unserved, Some(why.clone()), now);
            }
            Serving::Served if is_announced => {}
            Serving::Served => {
                let why = self.why.take();
                self.set_state(AnnounceState::Held, why, now);
                if self.due(hold_down) <= now {
                    self.set_state(AnnounceState::Announced, None, now);
                }
            }
        }
    }
}

impl Holds {
    /// Where these were announced by a process before.
    pub(super) fn of(announced: impl Iterator<Item = Prefix>, now: Instant) -> Self {
        let prefixes = announced.map(|prefix| (prefix, Hold::new(AnnounceState::Announced, now)));
        Self { prefixes: prefixes.collect(), ..Self::default() }
    }

    /// Takes a judgement into account. Returns when to look at it again, should nothing else happen.
    pub(super) fn judge(&mut self, judgement: &Judgement, now: Instant) -> Option<Instant> {
        let Judgement { prefixes, hold_down, .. } = judgement;
        let before = self.announced().count();
        let mut previous = std::mem::take(&mut self.prefixes);
        let mut stay = 0;
        for Judged { prefix, verdict } in prefixes {
            let mut hold = previous.remove(prefix).unwrap_or_else(|| Hold::new(AnnounceState::Unserved, now));
            let was_announced = hold.state == AnnounceState::Announced;
            hold.judge(verdict, *hold_down, now);
            stay += usize::from(was_announced && hold.state == AnnounceState::Announced);
            self.prefixes.insert(*prefix, hold);
        }
        self.withdrawals += (before - stay) as u64;
        self.announcements += (self.announced().count() - stay) as u64;
        let held = self.prefixes.values().filter(|hold| hold.state == AnnounceState::Held);
        held.map(|hold| hold.due(*hold_down)).min()
    }

    pub(super) fn announced(&self) -> impl Iterator<Item = Prefix> {
        self.prefixes.iter().filter(|(_, hold)| hold.state == AnnounceState::Announced).map(|(prefix, _)| *prefix)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&Prefix, &Hold)> {
        self.prefixes.iter()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{Holds, Judged, Judgement, Serving};
    use crate::api::AnnounceState;

    const HOLD_DOWN: Duration = Duration::from_secs(10);

    /// One prefix, and what is said of it as seconds go by.
    struct Story {
        holds: Holds,
        begin: Instant,
    }

    impl Story {
        fn new(was_announced: bool) -> Self {
            let begin = Instant::now();
            let announced = was_announced.then(|| "192.0.2.0/24".parse().unwrap());
            Self { holds: Holds::of(announced.into_iter(), begin), begin }
        }

        fn judge(&mut self, second: u64, verdict: Serving) -> (AnnounceState, Option<u64>) {
            let prefixes = vec![Judged { prefix: "192.0.2.0/24".parse().unwrap(), verdict }];
            let judgement = Judgement { number: second, prefixes, hold_down: HOLD_DOWN };
            let again = self.holds.judge(&judgement, self.begin + Duration::from_secs(second));
            let (_, hold) = self.holds.iter().next().unwrap();
            (hold.state, again.map(|it| (it - self.begin).as_secs()))
        }

        fn served(&mut self, second: u64) -> (AnnounceState, Option<u64>) {
            self.judge(second, Serving::Served)
        }

        fn fails(&mut self, second: u64) {
            assert_eq!(self.judge(second, Serving::Unserved("x".into())), (AnnounceState::Unserved, None));
        }
    }

    #[test]
    fn what_is_served_for_long_enough_is_announced() {
        let mut story = Story::new(false);
        story.fails(0);
        assert_eq!(story.served(5), (AnnounceState::Held, Some(15)));
        assert_eq!(story.served(14), (AnnounceState::Held, Some(15)));
        assert_eq!(story.served(15), (AnnounceState::Announced, None));
        story.fails(16);
        assert_eq!((story.holds.announcements, story.holds.withdrawals), (1, 1));
        assert_eq!(story.holds.announced().count(), 0);
    }

    #[test]
    fn each_withdrawal_doubles_the_time_until_it_has_gone_well_for_long() {
        let mut story = Story::new(true);
        let mut now = 0;
        for pause in [10, 20, 40, 80, 160, 320, 320] {
            story.fails(now + 1);
            now += 2;
            assert_eq!(story.served(now), (AnnounceState::Held, Some(now + pause)));
            // A break during the hold-down is no withdrawal, but the hold-down starts again.
            story.fails(now + 1);
            now += 2;
            assert_eq!(story.served(now), (AnnounceState::Held, Some(now + pause)));
            now += pause;
            assert_eq!(story.served(now), (AnnounceState::Announced, None));
        }
        story.fails(now + 320);
        assert_eq!(story.served(now + 321), (AnnounceState::Held, Some(now + 331)));
    }

    #[test]
    fn what_was_announced_stays_so_until_something_is_known() {
        let mut story = Story::new(true);
        assert_eq!(story.judge(0, Serving::Unknown), (AnnounceState::Announced, None));
        assert_eq!(story.served(1), (AnnounceState::Announced, None));
        assert_eq!(story.judge(2, Serving::Drained), (AnnounceState::Drained, None));
        assert_eq!(story.served(3), (AnnounceState::Held, Some(13)), "a drain is no failure");
        let nothing = Judgement { number: 4, prefixes: Vec::new(), hold_down: HOLD_DOWN };
        assert_eq!(story.holds.judge(&nothing, story.begin), None);
        assert_eq!(story.holds.iter().count(), 0);
        let mut unknown = Story::new(false);
        assert_eq!(unknown.judge(0, Serving::Unknown), (AnnounceState::Unserved, None));
    }
}
