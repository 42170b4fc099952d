//! A line of the log for each connection at its end, if the service is to have one.

use std::{
    fmt,
    num::NonZeroU32,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::Instant,
};

use anyport_common::flow::Transport;

use super::{ServiceConfig, datagram::Ends};
use crate::rules::{Protocol, ServiceName};

/// Writes down one of so many connections. Each worker has its own, so that none waits for another.
#[derive(Debug)]
pub(super) struct ConnectionLog {
    service: ServiceName,
    /// None for no connections.
    every: Option<NonZeroU32>,
    seen: AtomicU32,
}

/// What is logged of a connection or flow.
pub(super) struct Entry<'a> {
    /// When it began.
    pub(super) began: Instant,
    pub(super) transport: Transport,
    pub(super) ends: Ends,
    /// Where it was forwarded to.
    pub(super) upstream: Option<&'a dyn fmt::Display>,
    /// Bytes that the client sent.
    pub(super) from_client: u64,
    /// Bytes that were sent to it.
    pub(super) to_client: u64,
    /// Why it ended.
    pub(super) reason: &'a dyn fmt::Display,
}

impl ConnectionLog {
    pub(super) fn of(config: &ServiceConfig) -> Self {
        Self { service: config.name.clone(), every: config.connection_log, seen: AtomicU32::new(0) }
    }

    /// Whether a connection that begins is to be written down.
    pub(super) fn picks(&self) -> bool {
        self.every.is_some_and(|every| self.seen.fetch_add(1, Relaxed) % every == 0)
    }

    /// Writes a connection down that has ended.
    pub(super) fn write(&self, entry: &Entry<'_>) {
        let Entry { began, transport, ends, upstream, from_client, to_client, reason } = entry;
        tracing::info!(
            service = %self.service,
            protocol = %Protocol::from(*transport),
            client = %ends.client,
            dialled = %ends.dialled,
            upstream = upstream.map(tracing::field::display),
            from_client,
            to_client,
            seconds = began.elapsed().as_secs_f64(),
            %reason,
            "connection"
        );
    }
}

#[cfg(test)]
mod tests {
    use crate::service::{HandlerKind, ServiceConfig};

    use super::ConnectionLog;

    #[test]
    fn one_of_so_many_is_written_down() {
        let config = |connection_log| ServiceConfig {
            connection_log,
            ..ServiceConfig::new("edge".parse().unwrap(), HandlerKind::Echo)
        };
        for (every, expected) in [(0, 0), (1, 100), (3, 34), (1000, 1)] {
            let log = ConnectionLog::of(&config(every.try_into().ok()));
            assert_eq!((0..100).filter(|_| log.picks()).count(), expected, "one of {every}");
        }
    }
}
