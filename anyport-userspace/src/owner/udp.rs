//! `UdpSocket`, by which a program receives the datagrams of a service.

use std::{
    io,
    net::{self, SocketAddr},
    os::fd::AsRawFd,
};

use socket2::{Domain, SockRef};

use super::{Registration, answers::Answers, canonical, queue::Queue};
use crate::{
    api::Problem,
    datagram::{self, Ends},
    rules::Family,
};

/// Room for datagrams that wait, in bytes as the kernel counts them; it gives no more than `net.core.rmem_max`.
const RECEIVE_BUFFER: usize = 4 << 20;

/// Receives the datagrams of a service, and answers from the original destination. Several threads may share it.
///
/// ```no_run
/// use anyport::{Datagram, UdpSocket};
///
/// let socket = UdpSocket::register("dns")?;
/// let mut buffer = [0; UdpSocket::LARGEST];
/// while let Some(Datagram { data, ends }) = socket.recv(&mut buffer)? {
///     socket.reply(ends, data)?;
/// }
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
///
/// As with a [`Listener`](crate::Listener), a new process takes over by registering, and the old one drains then.
#[derive(Debug)]
pub struct UdpSocket {
    queue: Queue<net::UdpSocket>,
    bound: Vec<SocketAddr>,
    answers: Answers,
}

/// A datagram, in the buffer that it was received into.
#[derive(Clone, Copy, Debug)]
pub struct Datagram<'buffer> {
    /// What was said.
    pub data: &'buffer [u8],
    /// Who said it, and to what.
    pub ends: Ends,
}

impl UdpSocket {
    /// Bytes of a buffer into which every datagram fits.
    pub const LARGEST: usize = datagram::LARGEST;

    /// Becomes the receiver of a service at the daemon's usual socket; see [`Registration`] for another one.
    ///
    /// # Errors
    /// See [`Registration::listener`].
    pub fn register(service: &str) -> Result<Self, Problem> {
        Registration::new(service)?.udp_socket()
    }

    pub(super) fn new(sockets: Vec<net::UdpSocket>, registration: Registration) -> io::Result<Self> {
        let mut bound = Vec::new();
        for socket in &sockets {
            socket.set_nonblocking(true)?;
            let options = SockRef::from(socket);
            let is_ipv6 = options.domain()? == Domain::IPV6;
            if is_ipv6 {
                datagram::tell_destinations(socket, Family::Ipv6)?;
            }
            if !is_ipv6 || !options.only_v6()? {
                datagram::tell_destinations(socket, Family::Ipv4)?;
            }
            options.set_recv_buffer_size(RECEIVE_BUFFER)?;
            bound.push(socket.local_addr()?);
        }
        Ok(Self { queue: Queue::new(sockets)?, bound, answers: Answers::new(registration) })
    }

    /// Waits for the next datagram. Nothing when there will be no more, after [`drain`](Self::drain). Those that do not
    /// fit into the buffer, and those to a group of hosts, are passed over: they are not to be answered.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn recv<'buffer>(&self, buffer: &'buffer mut [u8]) -> io::Result<Option<Datagram<'buffer>>> {
        let received = self.queue.take(|socket| receive(socket, buffer))?;
        Ok(received.map(|(length, ends)| Datagram { data: &buffer[..length], ends }))
    }

    /// Answers from the original destination.
    ///
    /// The daemon sends it, since that takes privileges, and only if the original destination is steered to the service.
    /// An answer to a source that is steered itself is dropped, so that two services can't answer each other for ever; so is
    /// one to a client that has not written there within a minute, and what is more than 64 times what it wrote, in
    /// datagrams or in bytes with headers. What was dropped, and what the kernel would not send, is counted in
    /// `anyportctl services --json`.
    ///
    /// # Errors
    /// There is no daemon, it refuses, or it has not taken the answer for a second. The answer is lost; the next one is
    /// tried like any other.
    pub fn reply(&self, ends: Ends, answer: &[u8]) -> io::Result<()> {
        match self.directly(ends) {
            Some(socket) => socket.send_to(answer, ends.client).map(drop),
            None => self.answers.send(ends, answer),
        }
    }

    /// To be called when another process has registered: what is in the queue is still received, and after two seconds
    /// without anything there will be no more. Wakes those that wait.
    pub fn drain(&self) {
        self.queue.drain();
    }

    /// The socket whose own address is the original destination: a process of this host has sent to it directly, without steering.
    fn directly(&self, ends: Ends) -> Option<&net::UdpSocket> {
        self.bound.iter().position(|bound| *bound == ends.dialled).map(|at| &self.queue.sockets()[at])
    }

    pub(super) fn sockets(&self) -> &[net::UdpSocket] {
        self.queue.sockets()
    }

    #[cfg(feature = "tokio")]
    pub(super) fn into_parts(self) -> (Vec<net::UdpSocket>, Vec<SocketAddr>, Answers) {
        let Self { queue, bound, answers } = self;
        (queue.into_sockets(), bound, answers)
    }
}

/// Takes a datagram that can be answered; the error `WouldBlock` if there is none, or another one.
pub(super) fn receive(socket: &impl AsRawFd, buffer: &mut [u8]) -> io::Result<(usize, Ends)> {
    let datagram = datagram::receive(socket, buffer, &mut datagram::control_buffer())?;
    let ends = datagram.ends.ok_or(io::ErrorKind::WouldBlock)?;
    Ok((datagram.length, Ends { client: canonical(ends.client), dialled: canonical(ends.dialled) }))
}
