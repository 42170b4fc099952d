//! What a look has found, and when the next one is due.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use tracing::{error, info, warn};

use super::Shadowed;
use crate::log_limit::LogLimit;

/// How many times longer than a look is the pause until the next one at least: with many sockets or routes a look takes long.
const SHARE: u32 = 50;

/// Programs may open many sockets for a moment.
static LINES: LogLimit = LogLimit::new();

/// One kind of what is looked for, as it was seen last.
#[derive(Debug)]
pub(super) struct Seen {
    interval: Duration,
    at: Option<Instant>,
    took: Duration,
    found: BTreeMap<Shadowed, String>,
}

impl Seen {
    /// Looked for this often.
    pub(super) fn every(interval: Duration) -> Self {
        Self { interval, at: None, took: Duration::ZERO, found: BTreeMap::new() }
    }

    /// In words.
    pub(super) fn found(&self) -> impl Iterator<Item = &str> {
        self.found.values().map(String::as_str)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Shadowed> {
        self.found.keys()
    }

    pub(super) fn is_due(&self) -> bool {
        self.at.is_none_or(|at| at.elapsed() >= self.interval.max(self.took * SHARE))
    }

    /// Takes a look into account that has begun then. What it could not see stays as it was.
    pub(super) fn note(&mut self, begun: Instant, look: anyhow::Result<BTreeMap<Shadowed, String>>) {
        match look {
            Ok(seen) => self.compare(seen),
            Err(error) => error!("{error:#}"),
        }
        (self.at, self.took) = (Some(Instant::now()), begun.elapsed());
    }

    /// What is new is logged, and what is gone.
    fn compare(&mut self, mut seen: BTreeMap<Shadowed, String>) {
        for (what, text) in &mut seen {
            if let Some(known) = self.found.remove(what) {
                *text = known;
            } else if let Some(left_out) = LINES.next() {
                warn!("{text}{left_out}");
            }
        }
        for gone in std::mem::replace(&mut self.found, seen).into_values() {
            if let Some(left_out) = LINES.next() {
                info!("no more: {gone}{left_out}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        time::{Duration, Instant},
    };

    use anyhow::anyhow;

    use super::{Seen, Shadowed};

    #[test]
    fn what_is_seen_again_is_no_news() {
        let peer = Shadowed::Peer { address: "192.0.2.1".parse().unwrap(), role: "the gateway".to_owned() };
        let look = |text: &str| Ok(BTreeMap::from([(peer.clone(), text.to_owned())]));
        let mut seen = Seen::every(Duration::MAX);
        assert!(seen.is_due());
        seen.note(Instant::now(), look("with its process"));
        seen.note(Instant::now(), look("without"));
        assert!(!seen.is_due() && seen.found().eq(["with its process"]));
        seen.note(Instant::now(), Err(anyhow!("nobody could look")));
        assert_eq!(seen.found().count(), 1);
        seen.note(Instant::now(), Ok(BTreeMap::new()));
        assert_eq!(seen.found().count(), 0);
    }
}
