//! Accepting connections.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    time::sleep,
};

use super::{
    ServiceConfig,
    datagram::Ends,
    descriptors::{DescriptorPool, Descriptors},
    forward::{Forwarder, Refusal},
    handlers,
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
    pub(super) listener: TcpListener,
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
        let open = Open { site: Arc::clone(site), _descriptors: descriptors };
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
    let Ends { client, dialled } = ends;
    let config = &open.site.config;
    if let Err(error) = handlers::converse(config, stream, client, dialled).await {
        tracing::debug!("service {}: {client} to {dialled}: {error}", config.name);
    }
}

async fn forward(open: Open, stream: TcpStream, ends: Ends) {
    let Site { config, counts, descriptors, forwarder } = &*open.site;
    let Some(forwarder) = forwarder else { return };
    if let Err(refusal) = forwarder.serve(stream, ends, descriptors).await {
        let count = match refusal {
            Refusal::Header(_) => &counts.bad_headers,
            Refusal::Upstream(_) => &counts.unforwarded,
        };
        count.raise();
        tracing::debug!("service {}: {} to {}: {refusal}", config.name, ends.client, ends.dialled);
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
