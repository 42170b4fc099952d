//! Lines of the log that a peer can cause, so that there are few of them.

use std::time::{Duration, Instant};

/// At most one complaint in this time.
const INTERVAL: Duration = Duration::from_secs(10);

/// When there was the last complaint of a kind.
#[derive(Debug, Default)]
pub(super) struct Complaints(Option<Instant>);

impl Complaints {
    /// Whether there may be another one, which is remembered.
    pub(super) fn is_due(&mut self) -> bool {
        let is_due = self.0.is_none_or(|last| last.elapsed() > INTERVAL);
        if is_due {
            self.0 = Some(Instant::now());
        }
        is_due
    }
}
