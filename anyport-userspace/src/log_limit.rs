//! Lines of the log that others can cause as often as they like: few are written, and how many were left out.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Limits the lines of one place in the code.
#[derive(Debug)]
pub(crate) struct LogLimit {
    /// How many are written in each window.
    lines: u32,
    window: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    since: Option<Instant>,
    written: u32,
    left_out: u64,
}

impl LogLimit {
    /// Ten lines a second, where each says something else.
    pub(crate) const fn new() -> Self {
        Self::of(10, Duration::from_secs(1))
    }

    /// One in ten seconds, where a counter says the rest.
    pub(crate) const fn of_counted() -> Self {
        Self::of(1, Duration::from_secs(10))
    }

    const fn of(lines: u32, window: Duration) -> Self {
        Self { lines, window, state: Mutex::new(State { since: None, written: 0, left_out: 0 }) }
    }

    /// What to put behind the next line: nothing, or how many lines were left out before. None if this one is left out, too.
    pub(crate) fn next(&self) -> Option<String> {
        self.next_at(Instant::now())
    }

    fn next_at(&self, now: Instant) -> Option<String> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.since.is_none_or(|since| now.saturating_duration_since(since) >= self.window) {
            (state.since, state.written) = (Some(now), 0);
        }
        if state.written == self.lines {
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

    use super::LogLimit;

    #[test]
    fn few_lines_and_the_number_of_the_others() {
        for limit in [LogLimit::new(), LogLimit::of_counted()] {
            let (now, left_out) = (Instant::now(), 100 - limit.lines);
            assert_eq!((0..100).filter_map(|_| limit.next_at(now)).count(), limit.lines as usize);
            let next = now + limit.window;
            assert_eq!(limit.next_at(next).unwrap(), format!(" ({left_out} such lines were left out)"));
            assert_eq!(limit.next_at(next + limit.window).unwrap(), "");
        }
    }
}
