//! Answers of services that don't reach their clients, since the kernel has no route to them.
//!
//! The kernel counts packets without a route for the whole host: whatever program tries in vain to reach another host is counted
//! too. So that is told only where services lose attempts to connect, or answers, at the same time.

use std::time::{Duration, Instant};

use tracing::error;

use super::services::Services;
use crate::host::Unanswered;

/// How often the counters are looked at.
const INTERVAL: Duration = Duration::from_secs(2);
/// After so long without another one it is over. A client tries again 8 seconds after its fourth attempt.
const QUIET: Duration = Duration::from_secs(10);

/// What was seen of answers that got lost.
#[derive(Debug)]
pub(super) struct Answers {
    /// What the host had counted at the start.
    before: Unanswered,
    at: Option<Instant>,
    /// Sockets that are taken over have counted before.
    seen: Option<Counted>,
    lost: Option<Lost>,
}

/// What was counted by a moment.
#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    of_host: Unanswered,
    /// Attempts to connect that listening sockets of services dropped.
    attempts: u64,
    /// Datagrams of services that the kernel did not send.
    unsent: u64,
}

/// Answers that get lost these days.
#[derive(Clone, Copy, Debug)]
struct Lost {
    packets: u64,
    of_services: u64,
    last: Instant,
}

impl Answers {
    /// From now on.
    pub(super) fn new() -> Self {
        Self { before: Unanswered::now().unwrap_or_default(), at: None, seen: None, lost: None }
    }

    /// What of the host's packets has got no answer since the start.
    pub(super) fn unanswered(&self) -> Unanswered {
        Unanswered::now().unwrap_or_default().since(self.before)
    }

    /// Checks whether answers get lost.
    pub(super) fn look(&mut self, services: &Services) {
        if self.at.is_some_and(|at| at.elapsed() < INTERVAL) {
            return;
        }
        let now = Instant::now();
        self.at = Some(now);
        match Unanswered::now() {
            Ok(of_host) => self.compare(now, count(services, of_host)),
            Err(error) => error!("look whether answers get lost: {error:#}"),
        }
    }

    fn compare(&mut self, now: Instant, counted: Counted) {
        let Some(before) = self.seen.replace(counted) else { return };
        let of_host = counted.of_host.since(before.of_host);
        // Services that were stopped take their counters with them.
        let attempts = counted.attempts.saturating_sub(before.attempts).saturating_sub(of_host.queue_full);
        let of_services = attempts + counted.unsent.saturating_sub(before.unsent);
        if of_host.no_route > 0 && of_services > 0 {
            let lost = self.lost.get_or_insert(Lost { packets: 0, of_services: 0, last: now });
            (lost.packets, lost.of_services) = (lost.packets + of_host.no_route, lost.of_services + of_services);
            lost.last = now;
        } else if self.lost.is_some_and(|lost| now.duration_since(lost.last) >= QUIET) {
            self.lost = None;
        }
    }

    /// In words, if that is so now.
    pub(super) fn fault(&self) -> Option<String> {
        let Lost { packets, of_services, .. } = self.lost?;
        Some(format!(
            "clients get no answers: services have lost {of_services} attempts to connect and answers of late, and there was no \
             route for {packets} packets of this host; `explain ADDRESS:PORT --from CLIENT` shows the way of an answer"
        ))
    }
}

fn count(services: &Services, of_host: Unanswered) -> Counted {
    let mut counted = Counted { of_host, ..Counted::default() };
    for stats in services.iter().map(|(_, running)| running.service().stats()) {
        counted.attempts += stats.listen_drops;
        counted.unsent += stats.unsent;
    }
    counted
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{Answers, Counted, INTERVAL, QUIET, Unanswered};

    #[test]
    fn only_what_services_lose_is_told_and_only_while_they_do() {
        let mut answers = Answers::new();
        answers.seen = Some(Counted::default());
        let counted = |no_route, queue_full, attempts, unsent| Counted {
            of_host: Unanswered { queue_full, no_route },
            attempts,
            unsent,
        };
        let start = Instant::now();
        for (after, counted, is_told) in [
            // Another program can't reach another host, and then a queue is full.
            (Duration::ZERO, counted(5, 0, 0, 0), false),
            (INTERVAL, counted(6, 3, 3, 0), false),
            (INTERVAL * 2, counted(6, 3, 9, 0), false),
            (INTERVAL * 3, counted(7, 3, 10, 0), true),
            (INTERVAL * 4, counted(7, 3, 10, 0), true),
            (INTERVAL * 5, counted(8, 3, 10, 1), true),
            (INTERVAL * 4 + QUIET, counted(9, 3, 10, 1), true),
            (INTERVAL * 5 + QUIET, counted(10, 3, 10, 1), false),
        ] {
            answers.compare(start + after, counted);
            assert_eq!(answers.fault().is_some(), is_told, "{after:?}: {counted:?}");
        }
    }

    #[test]
    fn it_is_said_how_many() {
        let mut answers = Answers::new();
        answers.seen = Some(Counted::default());
        let of_host = Unanswered { queue_full: 1, no_route: 12 };
        answers.compare(Instant::now(), Counted { of_host, attempts: 8, unsent: 2 });
        let fault = answers.fault().unwrap();
        assert!(fault.contains("lost 9 attempts") && fault.contains("12 packets"), "{fault}");
    }
}
