//! Accepting connections.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    time::sleep,
};

use super::{
    ServiceConfig,
    descriptors::{DescriptorPool, Descriptors},
    handlers,
    stats::TcpCounts,
};

const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A connection that is open until this is dropped.
struct Open {
    counts: Arc<TcpCounts>,
    _descriptor: Descriptors,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.counts.ended.raise();
    }
}

/// One listening socket at work.
#[derive(Debug)]
pub(super) struct Acceptor {
    pub(super) listener: TcpListener,
    pub(super) config: Arc<ServiceConfig>,
    pub(super) counts: Arc<TcpCounts>,
    pub(super) descriptors: DescriptorPool,
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
                    self.counts.accept_errors.raise();
                    pause = pause_after(&error, pause);
                    if pause > Duration::ZERO {
                        let name = &self.config.name;
                        tracing::warn!("service {name}: accept: {error}; trying again in {pause:?}");
                        sleep(pause).await;
                    }
                }
            }
        }
    }

    async fn start(&self, stream: TcpStream, client: SocketAddr) {
        self.counts.accepted.raise();
        let Ok(dialled) = stream.local_addr() else { return };
        // While the pool is empty one connection waits here and the others in the kernel's queue. Listening
        // sockets that wait for connections take nothing from the pool, however many there are.
        let descriptor = match self.descriptors.try_take(1) {
            Some(descriptor) => descriptor,
            None => self.wait_for_descriptor().await,
        };
        self.counts.served.raise();
        let open = Open { counts: Arc::clone(&self.counts), _descriptor: descriptor };
        let config = Arc::clone(&self.config);
        tokio::spawn(async move {
            if let Err(error) = handlers::converse(&config, stream, client, dialled).await {
                tracing::debug!("service {}: {client} to {dialled}: {error}", config.name);
            }
            drop(open);
        });
    }

    async fn wait_for_descriptor(&self) -> Descriptors {
        let name = &self.config.name;
        tracing::debug!("service {name}: as many connections as the limit of open files allows; new ones wait");
        self.descriptors.take(1).await
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
