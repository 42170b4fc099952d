//! Lines of the log that others can cause as often as they like: a few a second are written, and how many were left out.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Lines in each window.
const LINES: u32 = 10;
const WINDOW: Duration = Duration::from_secs(1);

/// Limits the lines of one place in the code.
#[derive(Debug)]
pub(crate) struct LogLimit(Mutex<State>);

#[derive(Debug)]
struct State {
    since: Option<Instant>,
    written: u32,
    left_out: u64,
}

impl LogLimit {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(State { since: None, written: 0, left_out: 0 }))
    }

    /// What to put behind the next line: nothing, or how many lines were left out before. None if this one is left out, too.
    pub(crate) fn next(&self) -> Option<String> {
        self.next_at(Instant::now())
    }

    fn next_at(&self, now: Instant) -> Option<String> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.since.is_none_or(|since| now.saturating_duration_since(since) >= WINDOW) {
            (state.since, state.written) = (Some(now), 0);
        }
        if state.written == LINES {
            state.left_out += 1;
            return None;
        }
        state.written += 1;
        match std::mem::take(&mut state.left_out) {
            0 => Some(String::new()),
            left_out => Some(format!(" ({left_out} such lines were left out)")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::{LINES, LogLimit, WINDOW};

    #[test]
    fn few_lines_a_second_and_the_number_of_the_others() {
        let (limit, now) = (LogLimit::new(), Instant::now());
        assert_eq!((0..100).filter_map(|_| limit.next_at(now)).count(), LINES as usize);
        assert_eq!(limit.next_at(now + WINDOW).unwrap(), format!(" ({} such lines were left out)", 100 - LINES));
        assert_eq!(limit.next_at(now + WINDOW).unwrap(), "");
    }
}
