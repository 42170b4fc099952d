//! The same for programs that run on tokio.

use std::{
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
};

use tokio::{
    io::Interest,
    net::{TcpListener, TcpStream, UdpSocket as Socket, UnixDatagram},
    sync::{Mutex, watch},
    task::spawn_blocking,
    time::timeout,
};

use super::{
    Accepted, Datagram, Registration, answers, canonical,
    queue::{QUIET, is_of_one_peer},
    udp,
};
use crate::datagram::Ends;

/// Accepts the TCP connections of a service: a [`Listener`](crate::Listener) whose waiting is asynchronous.
///
/// ```no_run
/// # use tokio::io::AsyncWriteExt as _;
/// # async fn serve() -> Result<(), Box<dyn std::error::Error>> {
/// let listener: anyport::tokio::Listener = anyport::Listener::register("web")?.try_into()?;
/// while let Some(mut accepted) = listener.accept().await? {
///     accepted.stream.write_all(format!("you reached {}\n", accepted.dialled).as_bytes()).await?;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Listener {
    sockets: Vec<TcpListener>,
    end: Shutdown,
}

impl TryFrom<crate::Listener> for Listener {
    type Error = io::Error;

    /// # Panics
    /// Outside of a runtime.
    fn try_from(listener: crate::Listener) -> io::Result<Self> {
        let sockets = listener.into_sockets().into_iter().map(TcpListener::from_std).collect::<io::Result<_>>()?;
        Ok(Self { sockets, end: Shutdown::default() })
    }
}

impl Listener {
    /// As [`crate::Listener::accept`]. Nothing is lost when the future is dropped.
    ///
    /// # Errors
    /// The kernel's error, such as `EMFILE` when no descriptor is free; the connection waits on.
    pub async fn accept(&self) -> io::Result<Option<Accepted<TcpStream>>> {
        let accept = async |socket: &TcpListener| {
            let (stream, client) = socket.accept().await?;
            let dialled = stream.local_addr()?;
            Ok(Accepted { stream, client: canonical(client), dialled: canonical(dialled) })
        };
        self.end.or(any(self.sockets.iter().map(accept))).await
    }

    /// As [`crate::Listener::drain`].
    pub fn drain(&self) {
        self.end.begin();
    }
}

/// Receives the datagrams of a service, and answers from the original destination: a [`UdpSocket`](crate::UdpSocket) whose
/// waiting is asynchronous.
#[derive(Debug)]
pub struct UdpSocket {
    sockets: Vec<Socket>,
    bound: Vec<SocketAddr>,
    registration: Registration,
    connection: Mutex<Option<Arc<UnixDatagram>>>,
    end: Shutdown,
}

impl TryFrom<crate::UdpSocket> for UdpSocket {
    type Error = io::Error;

    /// # Panics
    /// Outside of a runtime.
    fn try_from(socket: crate::UdpSocket) -> io::Result<Self> {
        let (sockets, bound, answers) = socket.into_parts();
        let sockets = sockets.into_iter().map(Socket::from_std).collect::<io::Result<_>>()?;
        let registration = answers.into_registration();
        Ok(Self { sockets, bound, registration, connection: Mutex::default(), end: Shutdown::default() })
    }
}

impl UdpSocket {
    /// As [`crate::UdpSocket::recv`]. Nothing is lost when the future is dropped.
    ///
    /// # Errors
    /// The kernel's error.
    pub async fn recv<'buffer>(&self, buffer: &'buffer mut [u8]) -> io::Result<Option<Datagram<'buffer>>> {
        let received = self.end.or(self.next(buffer)).await?;
        Ok(received.map(|(length, ends)| Datagram { data: &buffer[..length], ends }))
    }

    async fn next(&self, buffer: &mut [u8]) -> io::Result<(usize, Ends)> {
        loop {
            for socket in &self.sockets {
                match socket.try_io(Interest::READABLE, || udp::receive(socket, buffer)) {
                    Err(error) if is_of_one_peer(&error) => {}
                    received => return received,
                }
            }
            any(self.sockets.iter().map(Socket::readable)).await?;
        }
    }

    /// As [`crate::UdpSocket::reply`].
    ///
    /// # Errors
    /// As [`crate::UdpSocket::reply`].
    pub async fn reply(&self, ends: Ends, answer: &[u8]) -> io::Result<()> {
        if let Some(at) = self.bound.iter().position(|bound| *bound == ends.dialled) {
            return self.sockets[at].send_to(answer, ends.client).await.map(drop);
        }
        let message = answers::message(ends, answer);
        let mut known = self.connection.lock().await.clone();
        if let Some(connection) = &known {
            match connection.send(&message).await {
                Err(error) if answers::is_gone(&error) => {}
                sent => return sent.map(drop),
            }
        }
        self.reconnect(known.take()).await?.send(&message).await.map(drop)
    }

    /// A connection other than the one that was found to be gone.
    async fn reconnect(&self, gone: Option<Arc<UnixDatagram>>) -> io::Result<Arc<UnixDatagram>> {
        let mut connection = self.connection.lock().await;
        if let Some(other) = &*connection
            && gone.is_none_or(|gone| !Arc::ptr_eq(&gone, other))
        {
            return Ok(Arc::clone(other));
        }
        let registration = self.registration.clone();
        let fresh = spawn_blocking(move || registration.connect()).await.map_err(io::Error::other)??;
        fresh.set_nonblocking(true)?;
        Ok(Arc::clone(connection.insert(Arc::new(UnixDatagram::from_std(fresh)?))))
    }

    /// As [`crate::UdpSocket::drain`].
    pub fn drain(&self) {
        self.end.begin();
    }
}

/// Whether those that wait are to come to an end.
#[derive(Debug)]
struct Shutdown(watch::Sender<bool>);

impl Default for Shutdown {
    fn default() -> Self {
        Self(watch::Sender::new(false))
    }
}

impl Shutdown {
    fn begin(&self) {
        self.0.send_replace(true);
    }

    /// What comes next, or nothing when we are draining and nothing has come for [`QUIET`].
    async fn or<T>(&self, next: impl Future<Output = io::Result<T>>) -> io::Result<Option<T>> {
        let mut begun = self.0.subscribe();
        let mut next = pin!(next);
        tokio::select! {
            biased;
            it = &mut next => return it.map(Some),
            () = async { drop(begun.wait_for(|is_draining| *is_draining).await) } => {}
        }
        match timeout(QUIET, next).await {
            Ok(it) => it.map(Some),
            Err(_) => Ok(None),
        }
    }
}

/// What the first of them gives that is ready.
async fn any<F: Future>(futures: impl Iterator<Item = F>) -> F::Output {
    let mut futures: Vec<Pin<Box<F>>> = futures.map(Box::pin).collect();
    poll_fn(|context| {
        let ready = futures.iter_mut().find_map(|it| match it.as_mut().poll(context) {
            Poll::Ready(it) => Some(it),
            Poll::Pending => None,
        });
        ready.map_or(Poll::Pending, Poll::Ready)
    })
    .await
}
