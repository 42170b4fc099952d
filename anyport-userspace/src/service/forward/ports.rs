//! Local ports of UDP flows to upstreams.
//!
//! By itself the kernel gives a port of `net.ipv4.ip_local_port_range` to one UDP socket only, whatever that is connected to.
//! Once none is left, a port that has a flow to one upstream gets another one to another upstream. No two flows have the
//! same port towards the same upstream: it would be by chance which of them gets an answer.

use std::{
    collections::HashSet,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::RangeInclusive,
    sync::{LazyLock, Mutex},
};

use tokio::net::UdpSocket;

use crate::service::{lock, socket_options};

/// Most ports that are tried for one flow where none is free.
const MOST_TRIES: usize = 4096;
/// Ports that the kernel chooses for a client's address before that counts as in vain.
const TRIES_OF_CLIENT: usize = 16;
const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
/// The kernel's own default.
const DEFAULT_RANGE: RangeInclusive<u16> = 32768..=60999;

/// Local ends and the upstreams that they are connected to, of all flows of this process.
static TAKEN: LazyLock<Mutex<HashSet<(SocketAddr, SocketAddr)>>> = LazyLock::new(Mutex::default);

/// A local address and port that is one flow's towards an upstream, until this is dropped: after the socket.
#[derive(Debug)]
pub(super) struct LocalEnd {
    local: SocketAddr,
    upstream: SocketAddr,
}

impl LocalEnd {
    /// None if another flow has it.
    fn claim(local: SocketAddr, upstream: SocketAddr) -> Option<Self> {
        let is_free = lock(&TAKEN).insert((local, upstream));
        is_free.then(|| Self { local, upstream })
    }
}

impl Drop for LocalEnd {
    fn drop(&mut self) {
        lock(&TAKEN).remove(&(self.local, self.upstream));
    }
}

/// A socket that is connected to an upstream: from the client's address, and from its port unless the client has another flow
/// there; or from this host's.
///
/// # Errors
/// The kernel's; `AddrNotAvailable` if no port is left towards this upstream.
pub(super) fn open(upstream: SocketAddr, client: Option<SocketAddr>) -> io::Result<(UdpSocket, LocalEnd)> {
    let (socket, end) = match client {
        Some(client) => of_client(upstream, client),
        None => of_host(upstream),
    }?;
    Ok((UdpSocket::from_std(socket.into())?, end))
}

type Opened = io::Result<(socket2::Socket, LocalEnd)>;

fn of_host(upstream: SocketAddr) -> Opened {
    let port = |port| SocketAddr::new(unspecified(upstream), port);
    match socket_options::flow(upstream, None) {
        Ok(socket) => {
            // The port was nobody's. From now on others may have it that are connected to elsewhere, and so may servers of
            // the host.
            socket.set_reuse_address(true)?;
            match LocalEnd::claim(port(local_port(&socket)?), upstream) {
                Some(end) => Ok((socket, end)),
                None => shared(upstream, port),
            }
        }
        Err(error) if is_exhausted(&error) => shared(upstream, port),
        Err(error) => Err(error),
    }
}

/// With a port that has flows to other upstreams.
fn shared(upstream: SocketAddr, port: impl Fn(u16) -> SocketAddr) -> Opened {
    let range = range();
    let first = usize::from(*range.start());
    let count = range.len();
    let mut random = [0; 2];
    // Without randomness the first port is as good as any other.
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()).ok();
    let start = usize::from(u16::from_ne_bytes(random));
    for step in 0..count.min(MOST_TRIES) {
        let Ok(number) = u16::try_from(first + (start + step) % count) else { continue };
        let Some(end) = LocalEnd::claim(port(number), upstream) else { continue };
        match socket_options::shared_flow(upstream, port(number)) {
            Ok(socket) => return Ok((socket, end)),
            // Another program has it for itself.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error),
        }
    }
    Err(none_left(upstream))
}

fn of_client(upstream: SocketAddr, client: SocketAddr) -> Opened {
    if let Some(end) = LocalEnd::claim(client, upstream) {
        return Ok((socket_options::flow(upstream, Some(client))?, end));
    }
    // The client has dialled several addresses that lead to one upstream.
    for _ in 0..TRIES_OF_CLIENT {
        let socket = socket_options::flow(upstream, Some(SocketAddr::new(client.ip(), 0)))?;
        let local = SocketAddr::new(client.ip(), local_port(&socket)?);
        if let Some(end) = LocalEnd::claim(local, upstream) {
            return Ok((socket, end));
        }
    }
    Err(none_left(upstream))
}

fn none_left(upstream: SocketAddr) -> io::Error {
    io::Error::new(io::ErrorKind::AddrNotAvailable, format!("no local port is left for another flow to {upstream}"))
}

fn local_port(socket: &socket2::Socket) -> io::Result<u16> {
    Ok(socket.local_addr()?.as_socket().ok_or(io::ErrorKind::InvalidData)?.port())
}

/// Whether the kernel has no port that nobody has (`udp_lib_get_port` in net/ipv4/udp.c; connect(2) says `EAGAIN`).
fn is_exhausted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EADDRINUSE))
}

/// The ports that the kernel takes, of this network namespace.
fn range() -> RangeInclusive<u16> {
    let text = fs::read_to_string(RANGE).unwrap_or_default();
    let mut numbers = text.split_whitespace().filter_map(|number| number.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(first), Some(last)) if first <= last => first..=last,
        _ => DEFAULT_RANGE,
    }
}

fn unspecified(like: SocketAddr) -> IpAddr {
    match like.ip() {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, UdpSocket as StdSocket};

    use super::{LocalEnd, open, shared, unspecified};

    fn upstream(text: &str) -> (StdSocket, SocketAddr) {
        let socket = StdSocket::bind(text).unwrap();
        let address = socket.local_addr().unwrap();
        (socket, address)
    }

    #[tokio::test]
    async fn a_port_has_one_flow_for_each_upstream() {
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let [(one, to_one), (two, to_two)] = [upstream(host), upstream(host)];
            let (first, end) = open(to_one, None).unwrap();
            let port = first.local_addr().unwrap().port();
            // Towards another upstream it goes, towards the same one it does not.
            let at = |number| SocketAddr::new(unspecified(to_two), number);
            assert!(LocalEnd::claim(at(port), to_one).is_none());
            let (second, second_end) = shared(to_two, |_| at(port)).unwrap();
            assert_eq!(second.local_addr().unwrap().as_socket().unwrap().port(), port);
            assert!(shared(to_two, |_| at(port)).is_err());
            second.send(b"second").unwrap();
            first.send(b"first").await.unwrap();
            for (server, expected) in [(&one, &b"first"[..]), (&two, b"second")] {
                let mut buffer = [0; 16];
                let (length, from) = server.recv_from(&mut buffer).unwrap();
                assert_eq!((&buffer[..length], from.port()), (expected, port));
                server.send_to(&buffer[..length], from).unwrap();
            }
            let mut buffer = [0; 16];
            assert_eq!(first.recv(&mut buffer).await.unwrap(), 5);
            // It is free again with the flow.
            drop((second, second_end));
            drop((first, end));
            assert!(LocalEnd::claim(at(port), to_two).is_some() && LocalEnd::claim(at(port), to_one).is_some());
        }
    }

    #[tokio::test]
    async fn two_flows_of_one_client_to_one_upstream_have_two_ports() {
        let (_server, to) = upstream("127.0.0.1:0");
        let client: SocketAddr = "127.0.0.77:4077".parse().unwrap();
        let (first, _end) = open(to, Some(client)).unwrap();
        let (second, _other_end) = open(to, Some(client)).unwrap();
        assert_eq!(first.local_addr().unwrap(), client);
        let second = second.local_addr().unwrap();
        assert!(second.ip() == client.ip() && second.port() != client.port(), "{second}");
    }
}
