//! For how long what the client of a flow says has gone unanswered.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// Questions of one flow since its last answer. Times are microseconds on a clock of the caller's, never 0.
#[derive(Debug, Default)]
pub(super) struct Silence {
    /// The first of those questions; 0 if there is none.
    since: AtomicU64,
    /// From when on the silence has not been counted as a failure.
    uncounted: AtomicU64,
    has_failed: AtomicBool,
}

/// What silence is a failure of the upstream.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// How long it has to last.
    pub(super) limit: u64,
    /// Whether the client may be silent in between for longer than that, too. Where answers need not come, a client that
    /// says something now and then, such as to keep a NAT's mapping, expects none.
    pub(super) has_pauses: bool,
}

impl Silence {
    /// The client says something `now`, and said or heard something at `before`. From when on it has waited for an
    /// answer if that is too long; once per limit.
    pub(super) fn asked(&self, before: u64, now: u64, patience: Patience) -> Option<u64> {
        let Patience { limit, has_pauses } = patience;
        let is_first = self.since.load(Relaxed) == 0;
        if is_first {
            self.since.store(now, Relaxed);
        }
        if is_first || (!has_pauses && now.saturating_sub(before) > limit) {
            self.uncounted.store(now, Relaxed);
            return None;
        }
        let from = self.uncounted.load(Relaxed);
        if now.saturating_sub(from) < limit {
            return None;
        }
        self.uncounted.store(now, Relaxed);
        Some(from)
    }

    /// The silence has counted as a failure.
    pub(super) fn failed(&self) {
        self.has_failed.store(true, Relaxed);
    }

    /// The upstream says something. Whether its silence before has counted as a failure.
    pub(super) fn answered(&self) -> bool {
        // Other processors read these all the time, so they are written only if they change.
        if self.since.load(Relaxed) != 0 {
            self.since.store(0, Relaxed);
        }
        self.has_failed.load(Relaxed) && self.has_failed.swap(false, Relaxed)
    }

    /// Since when there is a question without an answer.
    pub(super) fn since(&self) -> Option<u64> {
        Some(self.since.load(Relaxed)).filter(|since| *since != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::{Patience, Silence};

    const STEADY: Patience = Patience { limit: 30, has_pauses: false };
    const ANY: Patience = Patience { limit: 30, has_pauses: true };

    /// Says something at each of these times; when that is too much silence.
    fn ask(silence: &Silence, patience: Patience, times: &[u64]) -> Vec<u64> {
        let mut before = times[0];
        let mut ask = |now| silence.asked(std::mem::replace(&mut before, now), now, patience).map(|_| now);
        times.iter().filter_map(|now| ask(*now)).collect()
    }

    #[test]
    fn questions_without_answers_count_once_per_limit() {
        for patience in [STEADY, ANY] {
            let silence = Silence::default();
            assert_eq!(silence.since(), None);
            assert_eq!(ask(&silence, patience, &[10, 20, 30, 39, 40, 50, 60, 70, 75]), [40, 70]);
            assert_eq!(silence.since(), Some(10));
        }
    }

    #[test]
    fn an_answer_ends_the_silence() {
        let silence = Silence::default();
        assert_eq!(ask(&silence, STEADY, &[10, 30]), [0_u64; 0]);
        assert!(!silence.answered());
        assert_eq!(silence.since(), None);
        assert_eq!(ask(&silence, STEADY, &[35, 45, 60, 65]), [65]);
        silence.failed();
        assert_eq!([silence.answered(), silence.answered()], [true, false]);
    }

    #[test]
    fn a_word_now_and_then_is_no_question_where_none_is_expected() {
        let times = [10, 50, 100, 150, 200];
        assert_eq!(ask(&Silence::default(), STEADY, &times), [0_u64; 0]);
        assert_eq!(ask(&Silence::default(), ANY, &times), [50, 100, 150, 200]);
    }
}
