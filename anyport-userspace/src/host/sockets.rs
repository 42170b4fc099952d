//! The sockets of the thread's network namespace, as the kernel lists them over `NETLINK_SOCK_DIAG`.
//!
//! `/proc/net/tcp` and `udp` list them as well, but go on by the number of the entry when they are read in pieces
//! (`udp_get_idx`, net/ipv4/udp.c), so that sockets that others close meanwhile hide some that are open. A dump goes on by
//! the slot of the hash table and the number in that slot (`udp_dump`, `net/ipv4/udp_diag.c`; `inet_diag_dump_icsk`,
//! `net/ipv4/inet_diag.c`; since 3.3), and takes a slot under its lock.

use std::{collections::HashSet, net::IpAddr, net::SocketAddr};

use anyhow::Context as _;
use anyport_common::flow::Transport;
use netlink_packet_sock_diag::{
    SockDiagMessage,
    constants::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP},
    inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags, nlas::Nla},
};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use super::{Connection, Listener, dump::dump};

/// The listening TCP sockets and the unconnected UDP sockets of the thread's network namespace.
///
/// # Errors
/// The kernel does not list them.
pub fn listeners() -> anyhow::Result<Vec<Listener>> {
    let mut listeners = listeners_of(Transport::Tcp)?;
    listeners.extend(listeners_of(Transport::Udp)?);
    Ok(listeners)
}

/// Those of one transport.
///
/// # Errors
/// As [`listeners`].
pub fn listeners_of(transport: Transport) -> anyhow::Result<Vec<Listener>> {
    let states = match transport {
        Transport::Tcp => StateFlags::LISTEN,
        // UDP sockets that are not connected count as closed.
        Transport::Udp => StateFlags::CLOSE,
    };
    let mut listeners = Vec::new();
    list(transport, &states, |socket| {
        listeners.push(Listener {
            transport,
            local: SocketAddr::new(local(socket), socket.header.socket_id.source_port),
            // The kernel reports this of IPv6 sockets in these states.
            is_ipv6_only: socket.nlas.contains(&Nla::SkV6Only(true)),
            inode: socket.header.inode.into(),
            cookie: u64::from_ne_bytes(socket.header.socket_id.cookie),
            // Of UDP sockets these are bytes.
            waiting: if transport == Transport::Tcp { socket.header.recv_queue } else { 0 },
        });
    })?;
    Ok(listeners)
}

/// The local addresses of [`for_each_connection`].
///
/// # Errors
/// As [`listeners`].
pub fn connected_addresses() -> anyhow::Result<HashSet<IpAddr>> {
    let mut addresses = HashSet::new();
    for_each_connection(|it| {
        addresses.insert(it.local.ip());
    })?;
    Ok(addresses)
}

/// Shows the connections of the thread's network namespace: those of TCP from the first SYN on until both sides have closed,
/// without what is in `TIME_WAIT`, and those of connected UDP sockets.
///
/// # Errors
/// As [`listeners`].
pub fn for_each_connection(see: impl FnMut(Connection)) -> anyhow::Result<()> {
    list_connections((StateFlags::TIME_WAIT | StateFlags::CLOSE | StateFlags::LISTEN).complement(), see)
}

/// Of those, the ones that neither side has begun to close.
///
/// # Errors
/// As [`listeners`].
pub(super) fn for_each_established(see: impl FnMut(Connection)) -> anyhow::Result<()> {
    list_connections(StateFlags::ESTABLISHED, see)
}

fn list_connections(of_tcp: StateFlags, mut see: impl FnMut(Connection)) -> anyhow::Result<()> {
    for (transport, states) in [(Transport::Tcp, of_tcp), (Transport::Udp, StateFlags::ESTABLISHED)] {
        list(transport, &states, |socket| {
            let id = &socket.header.socket_id;
            let remote = SocketAddr::new(id.destination_address.to_canonical(), id.destination_port);
            let (local, inode) = (SocketAddr::new(local(socket), id.source_port), socket.header.inode.into());
            see(Connection { transport, local, remote, inode });
        })?;
    }
    Ok(())
}

/// Sockets of one port that wait for nobody new, as those that serve clients.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Connections, and connected sockets of UDP.
    pub connected: usize,
    /// Connections that are over and in `TIME_WAIT`.
    pub time_wait: usize,
    /// Sockets of UDP that are not connected.
    pub unconnected: usize,
    /// The inodes of all that processes hold.
    pub inodes: HashSet<u64>,
}

impl Held {
    /// What is in the way of a server that is bound to the wildcard address and this port, if these are at steered addresses.
    pub fn in_the_way(&self, transport: Transport, port: u16) -> Option<String> {
        let Self { connected, time_wait, unconnected, .. } = self;
        match transport {
            _ if connected + time_wait + unconnected == 0 => None,
            Transport::Tcp => Some(format!(
                "{connected} connections and {time_wait} in TIME_WAIT at steered addresses: a server of the host that wants \
                 port {port} of the wildcard address has to set SO_REUSEADDR, as servers do"
            )),
            Transport::Udp => Some(format!(
                "{connected} flows and {unconnected} sockets for answers at steered addresses: a server of the host that wants \
                 port {port} of the wildcard address has to set SO_REUSEADDR, or come two seconds after the last answer"
            )),
        }
    }
}

/// The sockets that are at this port of the addresses that `are_meant`. The kernel filters by the port.
///
/// # Errors
/// As [`listeners`].
pub fn held(transport: Transport, port: u16, are_meant: impl Fn(IpAddr) -> bool) -> anyhow::Result<Held> {
    let mut held = Held::default();
    let inodes = &mut held.inodes;
    let mut count = |states: StateFlags| {
        let mut count = 0;
        list_at(transport, &states, port, |socket| {
            if are_meant(local(socket)) {
                count += 1;
                inodes.extend(Some(u64::from(socket.header.inode)).filter(|it| *it != 0));
            }
        })?;
        anyhow::Ok(count)
    };
    match transport {
        Transport::Tcp => {
            held.connected = count((StateFlags::TIME_WAIT | StateFlags::CLOSE | StateFlags::LISTEN).complement())?;
            held.time_wait = count(StateFlags::TIME_WAIT)?;
        }
        Transport::Udp => {
            held.connected = count(StateFlags::ESTABLISHED)?;
            held.unconnected = count(StateFlags::CLOSE)?;
        }
    }
    Ok(held)
}

fn local(socket: &InetResponse) -> IpAddr {
    socket.header.socket_id.source_address.to_canonical()
}

/// Hands over the sockets that are in one of these states.
fn list(transport: Transport, states: &StateFlags, found: impl FnMut(&InetResponse)) -> anyhow::Result<()> {
    list_at(transport, states, 0, found)
}

/// As [`list`], at one port, or at all of them if it is 0.
fn list_at(
    transport: Transport,
    states: &StateFlags,
    port: u16,
    mut found: impl FnMut(&InetResponse),
) -> anyhow::Result<()> {
    let (protocol, option) = match transport {
        Transport::Tcp => (IPPROTO_TCP, "CONFIG_INET_TCP_DIAG"),
        Transport::Udp => (IPPROTO_UDP, "CONFIG_INET_UDP_DIAG"),
    };
    for (family, of_any_port) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
        let socket_id = SocketId { source_port: port, ..of_any_port };
        let request =
            InetRequest { family, protocol, extensions: ExtensionFlags::empty(), states: states.clone(), socket_id };
        let socket = |message| {
            if let SockDiagMessage::InetResponse(socket) = message {
                found(&socket);
            }
        };
        dump(NETLINK_SOCK_DIAG, SockDiagMessage::InetRequest(request), socket).with_context(|| {
            format!("listing the sockets of the host by sock_diag, which the kernel has with {option}")
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream, UdpSocket},
        os::unix::fs::MetadataExt as _,
        sync::atomic::{AtomicBool, Ordering},
        thread,
    };

    use socket2::{Domain, Type};

    use super::*;

    fn inode(socket: &impl std::os::fd::AsFd) -> u64 {
        let descriptor = socket.as_fd().try_clone_to_owned().unwrap();
        std::fs::File::from(descriptor).metadata().unwrap().ino()
    }

    #[test]
    fn sockets_are_told_as_they_are() {
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let connected = UdpSocket::bind("127.0.0.1:0").unwrap();
        connected.connect(udp.local_addr().unwrap()).unwrap();
        let bound = |only| {
            let socket = socket2::Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
            socket.set_only_v6(only).unwrap();
            socket.bind(&"[::]:0".parse::<SocketAddr>().unwrap().into()).unwrap();
            socket.listen(1).unwrap();
            socket
        };
        let (dual, only) = (bound(false), bound(true));
        let listeners = listeners().unwrap();
        let find = |inode| listeners.iter().find(|it| it.inode == inode);
        let (found_udp, found_only) = (find(inode(&udp)).unwrap(), find(inode(&only)).unwrap());
        assert_eq!((found_udp.transport, found_udp.local), (Transport::Udp, udp.local_addr().unwrap()));
        assert_eq!(found_only.transport, Transport::Tcp);
        assert_eq!(Some(found_only.local), only.local_addr().unwrap().as_socket());
        assert!(found_only.is_ipv6_only && !find(inode(&dual)).unwrap().is_ipv6_only && !found_udp.is_ipv6_only);
        assert_eq!(find(inode(&connected)), None);
    }

    #[test]
    fn connections_are_told_by_their_local_address() {
        let listener = TcpListener::bind("127.9.0.1:0").unwrap();
        let udp = UdpSocket::bind("127.9.0.2:0").unwrap();
        let unconnected = UdpSocket::bind("127.9.0.3:0").unwrap();
        udp.connect(unconnected.local_addr().unwrap()).unwrap();
        let addresses = |which: [u8; 3]| {
            let all = connected_addresses().unwrap();
            which.map(|last| all.contains(&IpAddr::from([127, 9, 0, last])))
        };
        assert_eq!(addresses([1, 2, 3]), [false, true, false]);
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert_eq!(addresses([1, 2, 3]), [true, true, false]);
        drop((stream, listener.accept().unwrap()));
    }

    /// Others that come and go hide none that is there.
    #[test]
    fn churn_hides_nothing() {
        const KEPT: usize = 200;
        const COMING_AND_GOING: usize = 100;
        let kept: Vec<_> = (0..KEPT).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
        let inodes: Vec<_> = kept.iter().map(inode).collect();
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    drop([(); COMING_AND_GOING].map(|()| UdpSocket::bind("127.0.0.1:0")));
                }
            });
            let looks = (0..50).map(|_| {
                let seen: HashSet<_> = listeners_of(Transport::Udp).unwrap().iter().map(|it| it.inode).collect();
                inodes.iter().filter(|inode| !seen.contains(inode)).count()
            });
            let missed = looks.max();
            stop.store(true, Ordering::Relaxed);
            assert_eq!(missed, Some(0));
        });
    }
}
