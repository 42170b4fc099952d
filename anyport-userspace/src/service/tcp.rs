//! Accepting connections.

use std::{
    fmt::Display,
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyport_common::flow::Transport;
use tokio::{
    net::{TcpListener, TcpStream},
    time::sleep,
};

use super::{
    ServiceConfig,
    datagram::Ends,
    descriptors::{DescriptorPool, Descriptors},
    forward::{End, Forwarder, Outcome, Refusal, Served},
    handlers::{self, Talk},
    log::{ConnectionLog, Entry},
    stats::TcpCounts,
};

const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What a worker has for the connections of one listening socket.
#[derive(Debug)]
pub(super) struct Site {
    pub(super) config: Arc<ServiceConfig>,
    pub(super) counts: TcpCounts,
    pub(super) descriptors: DescriptorPool,
    /// For `forward`.
    pub(super) forwarder: Option<Arc<Forwarder>>,
    pub(super) log: ConnectionLog,
}

impl Site {
    /// Descriptors that a connection takes: a forwarded one has two sockets.
    fn descriptors_each(&self) -> u32 {
        if self.forwarder.is_some() { 2 } else { 1 }
    }
}

/// A connection that is open until this is dropped.
struct Open {
    site: Arc<Site>,
    /// When it began, if it is to be written down.
    logged: Option<Instant>,
    _descriptors: Descriptors,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.site.counts.ended.raise();
    }
}

/// One listening socket at work.
#[derive(Debug)]
pub(super) struct Acceptor {
    pub(super) listener: Arc<TcpListener>,
    pub(super) site: Arc<Site>,
}

impl Acceptor {
    /// Accepts for ever. Connections go on when this is dropped.
    pub(super) async fn run(self) {
        let mut pause = Duration::ZERO;
        loop {
            match self.listener.accept().await {
                Ok((stream, client)) => {
                    pause = Duration::ZERO;
                    self.start(stream, client).await;
                }
                Err(error) => {
                    self.site.counts.accept_errors.raise();
                    pause = pause_after(&error, pause);
                    if pause > Duration::ZERO {
                        let name = &self.site.config.name;
                        tracing::warn!("service {name}: accept: {error}; trying again in {pause:?}");
                        sleep(pause).await;
                    }
                }
            }
        }
    }

    async fn start(&self, stream: TcpStream, client: SocketAddr) {
        let site = &self.site;
        site.counts.accepted.raise();
        let Ok(dialled) = stream.local_addr() else { return };
        let ends = Ends { client, dialled };
        // While the pool is empty one connection waits here and the others in the kernel's queue. Listening
        // sockets that wait for connections take nothing from the pool, however many there are.
        let descriptors = match site.descriptors.try_take(site.descriptors_each()) {
            Some(descriptors) => descriptors,
            None => self.wait_for_descriptors().await,
        };
        site.counts.served.raise();
        let open = Open { site: Arc::clone(site), logged: site.log.begin(), _descriptors: descriptors };
        // The futures differ in size, and each takes no more than its own.
        if site.forwarder.is_some() {
            tokio::spawn(forward(open, stream, ends));
        } else {
            tokio::spawn(converse(open, stream, ends));
        }
    }

    async fn wait_for_descriptors(&self) -> Descriptors {
        let name = &self.site.config.name;
        tracing::debug!("service {name}: as many connections as the limit of open files allows; new ones wait");
        self.site.descriptors.take(self.site.descriptors_each()).await
    }
}

async fn converse(open: Open, stream: TcpStream, ends: Ends) {
    let Site { config, log, .. } = &*open.site;
    let talk = Talk::default();
    let end = handlers::converse(config, stream, ends, &talk).await;
    if let Err(error) = &end {
        tracing::debug!("service {}: {} to {}: {error}", config.name, ends.client, ends.dialled);
    }
    if let Some(began) = open.logged {
        let reason: &dyn Display = match &end {
            Ok(()) => &"closed by both sides",
            Err(error) if error.kind() == io::ErrorKind::TimedOut => &"closed as idle",
            Err(error) => error,
        };
        let (from_client, to_client) = talk.bytes();
        log.write(&Entry { began, transport: Transport::Tcp, ends, upstream: None, from_client, to_client, reason });
    }
}

async fn forward(open: Open, stream: TcpStream, ends: Ends) {
    let Site { config, counts, descriptors, forwarder, log } = &*open.site;
    let Some(forwarder) = forwarder else { return };
    let Served { ends, upstream, end } = forwarder.serve(stream, ends, descriptors).await;
    match &end {
        Err(Refusal::Header(_)) => counts.bad_headers.raise(),
        Err(Refusal::Upstream(_)) => counts.unforwarded.raise(),
        Ok(_) => {}
    }
    let (from_client, to_client, reason): (_, _, &dyn Display) = match &end {
        Ok(outcome) => (outcome.to_upstream, outcome.to_client, &outcome.end),
        Err(refusal) => (0, 0, refusal),
    };
    if !matches!(end, Ok(Outcome { end: End::Closed, .. })) {
        tracing::debug!("service {}: {} to {}: {reason}", config.name, ends.client, ends.dialled);
    }
    if let Some(began) = open.logged {
        let upstream = upstream.as_ref().map(|upstream| upstream as &dyn Display);
        log.write(&Entry { began, transport: Transport::Tcp, ends, upstream, from_client, to_client, reason });
    }
}

/// How long to wait before accepting again, given how long the last pause was. Zero if the error is of the one
/// connection only.
fn pause_after(error: &io::Error, last: Duration) -> Duration {
    match error.raw_os_error() {
        // accept(2): errors that are pending on the new connection are reported by accept.
        Some(
            libc::ECONNABORTED
            | libc::EINTR
            | libc::EPERM
            | libc::EPROTO
            | libc::ENOPROTOOPT
            | libc::EOPNOTSUPP
            | libc::ENETDOWN
            | libc::ENETUNREACH
            | libc::EHOSTDOWN
            | libc::EHOSTUNREACH
            | libc::ENONET
            | libc::ETIMEDOUT,
        ) => Duration::ZERO,
        // No descriptors, no memory, or something unheard of: it may last, and must not keep a CPU busy.
        _ => (last * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE),
    }
}

#[cfg(test)]
mod tests {
    use std::{io, time::Duration};

    use super::pause_after;

    #[test]
    fn backs_off_while_resources_lack() {
        for number in [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM, libc::EINVAL] {
            let error = io::Error::from_raw_os_error(number);
            let mut pause = Duration::ZERO;
            let pauses: Vec<u128> = std::iter::repeat_with(|| {
                pause = pause_after(&error, pause);
                pause.as_millis()
            })
            .take(9)
            .collect();
            assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        }
    }

    #[test]
    fn one_bad_connection_holds_up_no_other() {
        for number in [libc::ECONNABORTED, libc::EPERM, libc::EHOSTUNREACH] {
            let error = io::Error::from_raw_os_error(number);
            assert_eq!(pause_after(&error, Duration::from_secs(1)), Duration::ZERO);
        }
    }
}
