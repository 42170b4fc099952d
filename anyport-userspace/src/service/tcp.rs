//! Accepting connections, and knowing which are still open.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    time::sleep,
};

use super::{
    ServiceConfig,
    descriptors::{Descriptor, DescriptorPool},
    handlers, lock,
    stats::TcpCounts,
};

const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What others may know of one listening socket.
#[derive(Debug, Default)]
pub(super) struct TcpWorker {
    pub(super) counts: TcpCounts,
    /// How many connections are open, by the address that their clients dialled.
    dialled: Mutex<HashMap<IpAddr, u64>>,
}

/// The TCP connections that a service has accepted. Stays valid after the service has stopped.
#[derive(Clone, Debug)]
pub struct Connections(pub(super) Arc<[Arc<TcpWorker>]>);

impl Connections {
    /// How many are open.
    pub fn active(&self) -> u64 {
        let of_worker = |worker: &Arc<TcpWorker>| lock(&worker.dialled).values().sum::<u64>();
        self.0.iter().map(of_worker).sum()
    }

    /// The addresses that the clients of open connections dialled: each needs its local route for as long.
    pub fn addresses(&self) -> HashSet<IpAddr> {
        let of_worker = |worker: &Arc<TcpWorker>| lock(&worker.dialled).keys().copied().collect::<Vec<_>>();
        self.0.iter().flat_map(of_worker).collect()
    }
}

/// An entry among the open connections, taken out when dropped.
struct Open {
    worker: Arc<TcpWorker>,
    address: IpAddr,
    _descriptor: Descriptor,
}

impl Open {
    fn new(worker: &Arc<TcpWorker>, address: IpAddr, descriptor: Descriptor) -> Self {
        *lock(&worker.dialled).entry(address).or_default() += 1;
        Self { worker: Arc::clone(worker), address, _descriptor: descriptor }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Entry::Occupied(mut entry) = lock(&self.worker.dialled).entry(self.address) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }
}

/// One listening socket at work.
#[derive(Debug)]
pub(super) struct Acceptor {
    pub(super) listener: TcpListener,
    pub(super) config: Arc<ServiceConfig>,
    pub(super) worker: Arc<TcpWorker>,
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
                    self.worker.counts.accept_errors.raise();
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
        self.worker.counts.accepted.raise();
        let Ok(dialled) = stream.local_addr() else { return };
        // While the pool is empty one connection waits here and the others in the kernel's queue. Listening
        // sockets that wait for connections take nothing from the pool, however many there are.
        let descriptor = match self.descriptors.try_take() {
            Some(descriptor) => descriptor,
            None => self.wait_for_descriptor().await,
        };
        let open = Open::new(&self.worker, dialled.ip(), descriptor);
        let config = Arc::clone(&self.config);
        tokio::spawn(async move {
            if let Err(error) = handlers::converse(&config, stream, client, dialled).await {
                tracing::debug!("service {}: {client} to {dialled}: {error}", config.name);
            }
            drop(open);
        });
    }

    async fn wait_for_descriptor(&self) -> Descriptor {
        let name = &self.config.name;
        tracing::debug!("service {name}: as many connections as the limit of open files allows; new ones wait");
        self.descriptors.take().await
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
