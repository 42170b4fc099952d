//! Others that the host talks to. A local route to them would end that: what it sends them would stay here.

use std::{
    collections::{BTreeSet, HashSet},
    fs,
    net::{IpAddr, Ipv4Addr},
};

use anyhow::Context as _;
use netlink_packet_route::{
    RouteNetlinkMessage,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::{Connection, InterfaceAddress, dump::dump, interface_addresses, links, sockets::for_each_established};

/// Where the host's resolver finds the servers that it asks, see `resolv.conf(5)`.
const RESOLVERS: &str = "/etc/resolv.conf";

/// Another host, or one of this host's peers in general.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its address.
    pub address: IpAddr,
    /// What it is to this host.
    pub role: Role,
}

/// What a peer is to this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// The other end of a connection of one of the host's own addresses.
    Connected(Connection),
    /// What is for others goes by it.
    Gateway,
    /// It answers for names.
    Resolver,
    /// It is on the same link, and was seen there.
    Neighbour {
        /// By this interface.
        interface: String,
        /// Whether that was half a minute ago or more.
        is_stale: bool,
    },
    /// All hosts of a network that an interface is in.
    Broadcast(String),
    /// Something that the daemon is configured to reach.
    Needed(String),
}

/// The peers of the thread's network namespace at addresses that `are_meant`: of connections from one of the host's `own` addresses,
/// resolvers, and neighbours, each by itself and all of a network.
///
/// # Errors
/// The kernel does not list them.
pub fn peers(own: &BTreeSet<IpAddr>, are_meant: &dyn Fn(IpAddr) -> bool) -> anyhow::Result<Vec<Peer>> {
    let mut peers = neighbours()?;
    peers.extend(broadcasts()?);
    let resolvers = fs::read_to_string(RESOLVERS).unwrap_or_default();
    peers.extend(resolvers_of(&resolvers).map(|address| Peer { address, role: Role::Resolver }));
    peers.retain(|peer| are_meant(peer.address));
    peers.extend(connected(own, are_meant)?);
    peers.retain(|peer| !peer.address.is_loopback() && !own.contains(&peer.address));
    Ok(peers)
}

/// The other ends of connections that are no connections of this host with itself.
fn connected(own: &BTreeSet<IpAddr>, are_meant: &dyn Fn(IpAddr) -> bool) -> anyhow::Result<impl Iterator<Item = Peer>> {
    let is_own = |address: IpAddr| own.contains(&address) && !address.is_loopback();
    let (mut outgoing, mut other_ends) = (Vec::new(), HashSet::new());
    for_each_established(|connection| {
        let (local, remote) = (connection.local.ip(), connection.remote.ip());
        if is_own(local) && are_meant(remote) {
            outgoing.push(connection);
        } else if is_own(remote) && are_meant(local) {
            other_ends.insert((connection.remote, connection.local));
        }
    })?;
    let with_others = outgoing.into_iter().filter(move |it| !other_ends.contains(&(it.local, it.remote)));
    Ok(with_others.map(|it| Peer { address: it.remote.ip(), role: Role::Connected(it) }))
}

fn resolvers_of(text: &str) -> impl Iterator<Item = IpAddr> {
    let servers = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    servers.filter_map(|rest| rest.split_whitespace().next()?.split('%').next()?.parse().ok())
}

/// Who is on the host's links and has answered lately, or was put down by hand.
fn neighbours() -> anyhow::Result<Vec<Peer>> {
    let names = links()?;
    let mut peers = Vec::new();
    dump(NETLINK_ROUTE, RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()), |message| {
        let RouteNetlinkMessage::NewNeighbour(NeighbourMessage { header, attributes, .. }) = message else { return };
        let is_live = matches!(
            header.state,
            NeighbourState::Reachable
                | NeighbourState::Stale
                | NeighbourState::Delay
                | NeighbourState::Probe
                | NeighbourState::Permanent
        );
        let address = attributes.into_iter().find_map(|it| match it {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(IpAddr::V4(address)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some(IpAddr::V6(address)),
            _ => None,
        });
        if let Some(address) = address.filter(|it| is_live && !it.is_multicast()) {
            let interface = names.iter().find(|link| link.index == header.ifindex);
            let interface = interface.map(|link| link.name.clone()).unwrap_or_default();
            let role = Role::Neighbour { interface, is_stale: header.state == NeighbourState::Stale };
            peers.push(Peer { address, role });
        }
    })
    .context("list the neighbours")?;
    Ok(peers)
}

/// The broadcast addresses of the networks that interfaces are in. The kernel has routes to them (`fib_add_ifaddr` in
/// `net/ipv4/fib_frontend.c`), also where no such address is configured; networks of two addresses have none (RFC 3021).
fn broadcasts() -> anyhow::Result<impl Iterator<Item = Peer>> {
    let addresses = interface_addresses()?.into_iter().filter(|it| it.has_broadcast);
    Ok(addresses.filter_map(|InterfaceAddress { address, network, interface, .. }| {
        let IpAddr::V4(address) = address else { return None };
        let hosts = u32::MAX.checked_shr(network.len().into()).filter(|hosts| *hosts > 1)?;
        let address = IpAddr::V4(Ipv4Addr::from_bits(address.to_bits() | hosts));
        Some(Peer { address, role: Role::Broadcast(interface) })
    }))
}

#[cfg(test)]
mod tests {
    use std::{
        net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
        process::Command,
        thread,
    };

    use nix::sched::{CloneFlags, unshare};

    use super::{Peer, Role, peers, resolvers_of};

    #[test]
    fn resolvers_are_read_as_libc_does() {
        let text = "# nameserver 192.0.2.1\nsearch example\nnameserver 192.0.2.53\n nameserver\t2001:db8::53%eth0 x\noptions rotate\n";
        let found: Vec<String> = resolvers_of(text).map(|it| it.to_string()).collect();
        assert_eq!(found, ["192.0.2.53", "2001:db8::53"]);
    }

    #[test]
    fn peers_are_neighbours_and_ends_of_own_connections() {
        let in_namespace = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            for line in [
                "link set lo up",
                "link add eth0 type veth peer name eth1",
                "link set eth0 up",
                "address add 203.0.113.1/24 dev eth0",
                "address add 203.0.113.9/24 dev eth0",
                "address add 198.51.100.1/31 dev eth0",
                "neigh add 203.0.113.7 lladdr 02:00:00:00:00:07 dev eth0 nud reachable",
                "neigh add 203.0.113.8 lladdr 02:00:00:00:00:08 dev eth0 nud failed",
            ] {
                assert!(Command::new("ip").args(line.split(' ')).status().unwrap().success(), "{line}");
            }
            // Both ends of one are here, also without the second address: as of a client on the host that is steered.
            let listener = TcpListener::bind("203.0.113.9:0").unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let [first, second] = ["203.0.113.1", "203.0.113.9"].map(|it| it.parse::<IpAddr>().unwrap());
            assert_eq!(client.local_addr().unwrap().ip(), first);
            let elsewhere: SocketAddr = "203.0.113.77:53".parse().unwrap();
            let resolving = UdpSocket::bind((first, 0)).unwrap();
            resolving.connect(elsewhere).unwrap();
            let found = |own: &[IpAddr]| {
                let peers = peers(&own.iter().copied().collect(), &|_| true).unwrap().into_iter();
                peers.filter(|it| it.role != Role::Resolver).collect::<Vec<Peer>>()
            };
            let broadcast = Peer { address: "203.0.113.255".parse().unwrap(), role: Role::Broadcast("eth0".into()) };
            let role = Role::Neighbour { interface: "eth0".into(), is_stale: false };
            let neighbour = Peer { address: "203.0.113.7".parse().unwrap(), role };
            let before = [&neighbour, &broadcast, &broadcast];
            for own in [&[first][..], &[first, second]] {
                let all = found(own);
                assert_eq!((all.len(), all[..3].iter().collect::<Vec<_>>()), (4, before.to_vec()), "{own:?}");
                let Role::Connected(connection) = &all[3].role else { panic!("{all:?}") };
                assert_eq!((connection.remote, connection.inode == 0), (elsewhere, false));
            }
        };
        thread::spawn(in_namespace).join().unwrap();
    }
}
