//! Time limits of a connection.

use std::time::{Duration, Instant};

use super::RelayEnd;

/// How long a connection may last.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Limits {
    /// Without a word in either direction.
    pub(in super::super) idle: Duration,
    /// In all.
    pub(in super::super) end: Option<Instant>,
}

/// Reports when nothing has happened for too long, checking twice in that time.
#[derive(Debug)]
pub(super) struct IdleTimer {
    pub(super) limits: Limits,
    pub(super) next: Instant,
    moved: u64,
    looks: u32,
}

impl IdleTimer {
    pub(super) fn new(limits: Limits) -> Self {
        let mut quiet = Self { limits, next: Instant::now(), moved: 0, looks: 0 };
        quiet.schedule();
        quiet
    }

    fn schedule(&mut self) {
        let look = Instant::now() + self.limits.idle / 2;
        self.next = self.limits.end.map_or(look, |end| look.min(end));
    }

    /// `moved` is what has been moved so far, in bytes.
    pub(super) fn look(&mut self, moved: u64) -> Result<(), RelayEnd> {
        if self.limits.end.is_some_and(|end| end <= Instant::now()) {
            return Err(RelayEnd::TooLong);
        }
        self.looks = if moved == self.moved { self.looks + 1 } else { 0 };
        self.moved = moved;
        // The first check without new data comes at least half the time after the last data, the second one all of it.
        if self.looks >= 2 {
            return Err(RelayEnd::Idle);
        }
        self.schedule();
        Ok(())
    }
}
