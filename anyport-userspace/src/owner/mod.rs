//! For programs that want to be a service: sockets that receive what is steered to it.

mod answers;
mod listener;
mod queue;
#[cfg(feature = "tokio")]
pub mod tokio;
mod udp;

use std::{
    io,
    net::{self, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsFd,
    path::PathBuf,
};

use socket2::{Domain, Socket, Type};

pub use self::{
    listener::{Accepted, Listener},
    udp::{Datagram, UdpSocket},
};
use crate::{
    api::{Problem, ProblemKind},
    register::{self, Register, Request},
    rules::ServiceName,
};

/// Where the daemon is asked, unless its control socket is elsewhere.
const DEFAULT_PATH: &str = "/run/anyport/anyportd.register.sock";

/// A service whose sockets are to be this program's.
#[derive(Clone, Debug)]
pub struct Registration {
    service: ServiceName,
    path: PathBuf,
}

impl Registration {
    /// For the service of this name, at the daemon's usual socket for registering.
    ///
    /// # Errors
    /// No service can have that name.
    pub fn new(service: &str) -> Result<Self, Problem> {
        let service =
            service.parse().map_err(|error| Problem::new(ProblemKind::Invalid, format!("register: {error}")))?;
        Ok(Self { service, path: DEFAULT_PATH.into() })
    }

    /// At another socket: a daemon with `--socket DIR/NAME.sock` has `DIR/NAME.register.sock`.
    #[must_use]
    pub fn at(self, path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), ..self }
    }

    /// Listens on a free port of the loopback addresses, and has the daemon steer the service's TCP connections there
    /// from now on, instead of to the sockets that received them before.
    ///
    /// # Errors
    /// The kernel gives no socket, or the daemon's refusal: see [`ProblemKind`].
    pub fn listener(&self) -> Result<Listener, Problem> {
        self.listener_with(loopback(Type::STREAM)?.into_iter().map(net::TcpListener::from).collect())
    }

    /// The same with listening sockets that are there already, such as those that systemd passes (`LISTEN_FDS`; the
    /// crate `listenfd` takes them). One for each family, or one for both.
    ///
    /// # Errors
    /// As [`Self::listener`].
    pub fn listener_with(&self, sockets: Vec<net::TcpListener>) -> Result<Listener, Problem> {
        let listener = Listener::new(sockets).map_err(|error| failed("prepare the listening sockets", &error))?;
        self.register(listener.sockets())?;
        Ok(listener)
    }

    /// Binds UDP sockets to a free port of the loopback addresses, and has the daemon steer the service's datagrams
    /// there from now on, instead of to the sockets that received them before.
    ///
    /// # Errors
    /// As [`Self::listener`].
    pub fn udp_socket(&self) -> Result<UdpSocket, Problem> {
        self.udp_socket_with(loopback(Type::DGRAM)?.into_iter().map(net::UdpSocket::from).collect())
    }

    /// The same with sockets that are there already. One for each family, or one for both.
    ///
    /// # Errors
    /// As [`Self::listener`].
    pub fn udp_socket_with(&self, sockets: Vec<net::UdpSocket>) -> Result<UdpSocket, Problem> {
        let socket =
            UdpSocket::new(sockets, self.clone()).map_err(|error| failed("prepare the UDP sockets", &error))?;
        self.register(socket.sockets())?;
        Ok(socket)
    }

    fn register<S: AsFd>(&self, sockets: &[S]) -> Result<(), Problem> {
        let service = self.service.clone();
        let request = Request::Register(Register { service, pid: None });
        let descriptors: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
        register::send(&self.path, &request, &descriptors).map(drop)
    }
}

/// Sockets on the loopback addresses, where nobody reaches them but by steering; without IPv6 where the host has none.
fn loopback(kind: Type) -> Result<Vec<Socket>, Problem> {
    let open = |address: SocketAddr| {
        let socket = Socket::new(Domain::for_address(address), kind, None)?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.bind(&address.into())?;
        if kind == Type::STREAM {
            // The kernel takes as much as net.core.somaxconn allows.
            socket.listen(i32::MAX)?;
        }
        Ok::<_, io::Error>(socket)
    };
    let mut sockets = Vec::new();
    for address in [(Ipv4Addr::LOCALHOST, 0).into(), (Ipv6Addr::LOCALHOST, 0).into()] {
        match open(address) {
            Ok(socket) => sockets.push(socket),
            Err(error) if is_without(&error) && address.is_ipv6() => {}
            Err(error) => return Err(failed(&format!("open a socket at {}", address.ip()), &error)),
        }
    }
    Ok(sockets)
}

/// Whether the host has no such family, or not that address.
fn is_without(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

fn failed(attempt: &str, error: &io::Error) -> Problem {
    Problem::new(ProblemKind::Failed, format!("{attempt}: {error}"))
}

/// A dual-stack socket writes IPv4 addresses as IPv6 ones.
fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        ip if ip.is_ipv4() => SocketAddr::new(ip, address.port()),
        _ => address,
    }
}
