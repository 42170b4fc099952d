//! Waiting until a peer's kernel has all that was sent to it.
//!
//! The kernel throws away what it has not delivered when a connection is reset, and tells nobody when all is delivered,
//! so it is asked again and again, at longer and longer intervals.

use std::time::{Duration, Instant};

use super::Limits;
use crate::service::event_loop::Stream;

/// After the first look; twice as much each time, up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

/// How far the last words of the side that broke have come.
#[derive(Debug)]
pub(super) struct Delivery {
    /// What was under way at the last look, in bytes, and since when it has not become less.
    last: Option<(usize, Instant)>,
    pause: Duration,
}

impl Delivery {
    /// Nothing is known yet.
    pub(super) fn begin() -> Self {
        Self { last: None, pause: FIRST_PAUSE }
    }

    /// Whether it was looked at.
    pub(super) fn has_begun(&self) -> bool {
        self.last.is_some()
    }

    /// Whether the peer's kernel has all of it, or never will: the peer is gone, or has taken nothing for too long.
    pub(super) fn is_over(&mut self, to: &mut Stream, limits: Limits) -> bool {
        let now = Instant::now();
        let under_way = to.under_way();
        let since = match self.last {
            Some((before, since)) if under_way >= before => since,
            _ => now,
        };
        self.last = Some((under_way, since));
        under_way == 0
            || to.take_failure().is_some()
            || now.duration_since(since) >= limits.idle
            || limits.end.is_some_and(|end| end <= now)
    }

    /// When to look again.
    pub(super) fn next_look(&mut self) -> Instant {
        let pause = self.pause;
        self.pause = (pause * 2).min(LONGEST_PAUSE);
        Instant::now() + pause
    }
}
