//! `Listener`, by which a program receives the TCP connections of a service.

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream},
};

use super::{Registration, canonical, queue::Queue};
use crate::api::Problem;

/// Accepts the TCP connections of a service. Several threads may share it.
///
/// ```no_run
/// # use std::io::Write as _;
/// use anyport::{Accepted, Listener};
///
/// let listener = Listener::register("web")?;
/// while let Some(Accepted { mut stream, client, dialled }) = listener.accept()? {
///     writeln!(stream, "hello {client}, you reached {dialled}")?;
/// }
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
///
/// A new process takes over by registering too: from then on it receives all new connections. The old one is told to
/// [`drain`](Self::drain) *after* that, and ends when [`accept`](Self::accept) returns nothing; so no client is refused.
/// When it is dropped without a successor, clients are refused or go to the service's fallback.
#[derive(Debug)]
pub struct Listener {
    queue: Queue<TcpListener>,
}

/// A connection.
#[derive(Debug)]
pub struct Accepted<S = TcpStream> {
    /// Both its directions.
    pub stream: S,
    /// Who connected.
    pub client: SocketAddr,
    /// The address and port that it connected to.
    pub dialled: SocketAddr,
}

impl Listener {
    /// Becomes the receiver of a service at the daemon's usual socket; see [`Registration`] for another one.
    ///
    /// # Errors
    /// See [`Registration::listener`].
    pub fn register(service: &str) -> Result<Self, Problem> {
        Registration::new(service)?.listener()
    }

    pub(super) fn new(sockets: Vec<TcpListener>) -> io::Result<Self> {
        for socket in &sockets {
            socket.set_nonblocking(true)?;
        }
        Ok(Self { queue: Queue::new(sockets)? })
    }

    /// Waits for the next connection. Nothing when there will be no more, after [`drain`](Self::drain).
    ///
    /// # Errors
    /// The kernel's error, such as `EMFILE` when no descriptor is free; the connection waits on.
    pub fn accept(&self) -> io::Result<Option<Accepted>> {
        self.queue.take(|socket| {
            let (stream, client) = socket.accept()?;
            let dialled = stream.local_addr()?;
            Ok(Accepted { stream, client: canonical(client), dialled: canonical(dialled) })
        })
    }

    /// To be called when another process has registered: connections that are in the queue or in the middle of the handshake
    /// are still accepted, and after two seconds without one there will be no more. Wakes the threads that wait.
    pub fn drain(&self) {
        self.queue.drain();
    }

    pub(super) fn sockets(&self) -> &[TcpListener] {
        self.queue.sockets()
    }

    #[cfg(feature = "tokio")]
    pub(super) fn into_sockets(self) -> Vec<TcpListener> {
        self.queue.into_sockets()
    }
}
