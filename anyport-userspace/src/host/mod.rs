//! What a rule could take away from the host itself: addresses, gateways and listening sockets.

mod dump;
mod links;
mod peers;
mod sockets;
mod unanswered;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

use anyhow::Context as _;
use anyport_common::flow::Transport;
use nix::{net::if_::InterfaceFlags, sys::socket::SockaddrStorage};

pub(crate) use self::unanswered::of_table;
pub use self::{
    links::{Link, links},
    peers::{Peer, Role, peers},
    sockets::{Held, connected_addresses, for_each_connection, held, listeners, listeners_of},
    unanswered::Unanswered,
};
use crate::{
    rules::{Prefix, Rule, special},
    text::list_of,
};

/// A socket that waits for any client: a listening TCP socket or an unconnected UDP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// The transport.
    pub transport: Transport,
    /// Where it is bound, which may be a wildcard address.
    pub local: SocketAddr,
    /// Whether it is one of IPv6 that does not serve IPv4 too.
    pub is_ipv6_only: bool,
    /// Its inode, by which processes hold it.
    pub inode: u64,
    /// The kernel's name for it.
    pub cookie: u64,
    /// With TCP, how many connections wait to be accepted.
    pub waiting: u32,
}

/// A TCP connection, or a connected UDP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// The transport.
    pub transport: Transport,
    /// This end, which is the original destination.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// Its inode, by which processes hold it; 0 before it is accepted.
    pub inode: u64,
}

/// What this network namespace has of its own.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// Configured addresses, each with its interface.
    pub addresses: Vec<(IpAddr, String)>,
    /// The gateways of its routes, see [`crate::routes::Routes::gateways`].
    pub gateways: Vec<IpAddr>,
    /// The sockets that wait for any client.
    pub listeners: Vec<Listener>,
    /// Others that it talks to.
    pub peers: Vec<Peer>,
}

/// The process that holds a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its id.
    pub pid: u32,
    /// Its name.
    pub name: String,
}

impl Owner {
    /// A process by its id; without a name if it has ended.
    pub(crate) fn of(pid: u32) -> Self {
        Self { pid, name: process_name(pid).unwrap_or_default() }
    }
}

/// The name of a process. Anybody can give his a name with line feeds, which are escaped here, and with other characters that are not
/// seen, which are escaped wherever texts are shown.
pub(crate) fn process_name(pid: u32) -> Option<String> {
    let name = fs::read(format!("/proc/{pid}/comm")).ok()?;
    let name = String::from_utf8_lossy(name.strip_suffix(b"\n").unwrap_or(&name)).into_owned();
    let escaped = |it: char| if it.is_control() { it.escape_default().to_string() } else { it.to_string() };
    Some(name.chars().map(escaped).collect())
}

/// Why rules would harm the host; one line each, nothing if they do no harm.
pub fn objections(rules: &[Rule], host: &Host) -> Vec<String> {
    let shadowed: Vec<_> = rules.iter().map(|rule| (rule, shadowed(rule, host))).collect();
    let listeners = shadowed.iter().flat_map(|(_, listeners)| listeners).map(|it| it.inode);
    let cut_off = rules.iter().flat_map(|rule| cut_off(rule, host)).filter_map(|peer| match &peer.role {
        Role::Connected(connection) => Some(connection.inode),
        _ => None,
    });
    let owners = owners(&listeners.chain(cut_off).collect());
    shadowed.iter().flat_map(|(rule, listeners)| describe(rule, host, listeners, &owners)).collect()
}

fn describe(rule: &Rule, host: &Host, shadowed: &[Listener], owners: &HashMap<u64, Owner>) -> Vec<String> {
    let prefix = &rule.prefix;
    let mut lines = Vec::new();
    if rule.terms.route && prefix.is_everything() {
        lines.push(format!("a local route to {prefix} would replace the default route and cut the host off"));
    }
    lines.extend(special::broken(prefix, rule.terms.route));
    let gateways = host.gateways.iter().filter(|gateway| prefix.contains(**gateway));
    let gateways: Vec<_> = gateways.map(ToString::to_string).collect();
    if rule.terms.route && !gateways.is_empty() {
        lines.push(format!("{prefix} contains {}, the way to the host's gateway", gateways.join(", ")));
    }
    let peers: BTreeSet<String> = cut_off(rule, host).map(|peer| show_peer(peer, owners)).collect();
    if !peers.is_empty() {
        let peers: Vec<String> = peers.into_iter().collect();
        lines.push(format!("this host could not reach these any more, which {prefix} contains: {}", list_of(&peers)));
    }
    let addresses = host.addresses.iter().filter(|(address, _)| prefix.contains(*address));
    let addresses: Vec<_> = addresses.map(|(address, interface)| format!("{address} on {interface}")).collect();
    if !addresses.is_empty() {
        lines.push(format!("{prefix} contains addresses of the host itself: {}", addresses.join(", ")));
    }
    // A process that shares its sockets with children is named once.
    let sockets: BTreeSet<_> = shadowed
        .iter()
        .filter(|listener| !is_own(listener, owners.get(&listener.inode)))
        .map(|listener| show(listener, owners.get(&listener.inode)))
        .collect();
    if !sockets.is_empty() {
        let sockets: Vec<_> = sockets.into_iter().collect();
        lines.push(format!("these sockets would be reached no more at addresses of {prefix}: {}", sockets.join(", ")));
    }
    lines
}

/// The sockets that would lose to the rule.
fn shadowed(rule: &Rule, host: &Host) -> Vec<Listener> {
    let is_host_inside = host.addresses.iter().any(|(address, _)| rule.prefix.contains(*address));
    let is_reached = |listener: &Listener| match listener.local.ip() {
        // A wildcard socket of IPv6 serves IPv4 too unless it is IPv6-only.
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => is_host_inside && !(listener.is_ipv6_only && rule.prefix.is_ipv4()),
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => is_host_inside && rule.prefix.is_ipv4(),
        local => rule.prefix.contains(local),
    };
    let listeners = host.listeners.iter().copied();
    listeners
        .filter(|listener| rule.terms.protocol.transports().contains(&listener.transport))
        .filter(|listener| {
            let port = listener.local.port();
            rule.terms.ports.contains(port) && !rule.terms.except.contains(port)
        })
        .filter(is_reached)
        .collect()
}

/// The sockets that packets to this address and port reach by the host's own lookup, the one that the kernel prefers
/// first.
pub fn reached(transport: Transport, to: SocketAddr, listeners: Vec<Listener>) -> Vec<Listener> {
    let rank = |listener: &Listener| match listener.local.ip() {
        local if local == to.ip() => Some(0),
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) if to.is_ipv4() => Some(1),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) if !(listener.is_ipv6_only && to.is_ipv4()) => Some(2),
        _ => None,
    };
    let here = listeners.into_iter().filter(|it| it.transport == transport && it.local.port() == to.port());
    let mut ranked: Vec<_> = here.filter_map(|listener| Some((rank(&listener)?, listener))).collect();
    ranked.sort_by_key(|(rank, _)| *rank);
    ranked.into_iter().map(|(_, listener)| listener).collect()
}

/// Whether this is one of the sockets by which anyport does its work: the services' own, and those that it answers
/// datagrams from.
pub(crate) fn is_own(listener: &Listener, owner: Option<&Owner>) -> bool {
    owner.is_some_and(|owner| owner.pid == std::process::id())
        && (listener.local.ip().is_loopback() || listener.transport == Transport::Udp)
}

/// A socket and who holds it, in words.
pub(crate) fn show(listener: &Listener, owner: Option<&Owner>) -> String {
    show_socket(listener.transport, listener.local, owner)
}

fn show_socket(transport: Transport, address: SocketAddr, owner: Option<&Owner>) -> String {
    let transport = match transport {
        Transport::Tcp => "tcp",
        Transport::Udp => "udp",
    };
    match owner {
        Some(Owner { pid, name }) => format!("{transport} {address} of {name} (pid {pid})"),
        None => format!("{transport} {address}"),
    }
}

/// The peers that a local route to the rule's prefix would cut off.
fn cut_off<'a>(rule: &'a Rule, host: &'a Host) -> impl Iterator<Item = &'a Peer> {
    host.peers.iter().filter(|peer| rule.terms.route && rule.prefix.contains(peer.address))
}

/// A peer in words, with the process that holds a connection to it.
pub(crate) fn show_peer(Peer { address, role }: &Peer, owners: &HashMap<u64, Owner>) -> String {
    match role {
        Role::Connected(Connection { transport, remote, inode, .. }) => {
            format!("the other end of the connection {}", show_socket(*transport, *remote, owners.get(inode)))
        }
        Role::Gateway => format!("the gateway {address}"),
        Role::Resolver => format!("the resolver {address}"),
        Role::Broadcast(interface) => format!("all hosts of a network of {interface} by {address}"),
        Role::Neighbour { interface, .. } => format!("the neighbour {address} on {interface}"),
        Role::Needed(what) => format!("{what} {address}"),
    }
}

/// The addresses of the thread's network namespace and its sockets that wait for any client.
///
/// # Errors
/// The kernel does not list them.
pub fn look() -> anyhow::Result<Host> {
    Ok(Host { addresses: addresses()?, listeners: listeners()?, ..Host::default() })
}

/// The configured addresses of the thread's network namespace, each with its interface.
pub fn addresses() -> anyhow::Result<Vec<(IpAddr, String)>> {
    Ok(interface_addresses()?.into_iter().map(|it| (it.address, it.interface)).collect())
}

/// A configured address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceAddress {
    /// The address.
    pub address: IpAddr,
    /// The network that is on the interface's link by it: the address alone if there is none.
    pub network: Prefix,
    /// The interface.
    pub interface: String,
    /// Whether all hosts of the link can be reached by one packet.
    pub has_broadcast: bool,
}

/// The configured addresses of the thread's network namespace.
pub fn interface_addresses() -> anyhow::Result<Vec<InterfaceAddress>> {
    let interfaces = nix::ifaddrs::getifaddrs().context("listing the addresses of the host")?;
    let ip = |address: Option<SockaddrStorage>| {
        let address = address?;
        let v4 = address.as_sockaddr_in().map(|it| IpAddr::V4(it.ip()));
        v4.or_else(|| Some(IpAddr::V6(address.as_sockaddr_in6()?.ip())))
    };
    let addresses = interfaces.filter_map(|interface| {
        let address = ip(interface.address)?;
        let len = match ip(interface.netmask) {
            Some(IpAddr::V4(mask)) => mask.to_bits().leading_ones(),
            Some(IpAddr::V6(mask)) => mask.to_bits().leading_ones(),
            None => u128::BITS,
        };
        Some(InterfaceAddress {
            address,
            network: Prefix::host(address).truncated(u8::try_from(len).unwrap_or(u8::MAX)),
            interface: interface.interface_name,
            has_broadcast: interface.flags.contains(InterfaceFlags::IFF_BROADCAST),
        })
    });
    Ok(addresses.collect())
}

/// The processes that hold these sockets, as far as `/proc` lets us see.
pub(crate) fn owners(inodes: &HashSet<u64>) -> HashMap<u64, Owner> {
    let mut owners = HashMap::new();
    if inodes.is_empty() {
        return owners;
    }
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    for process in processes {
        let Some(pid) = process.file_name().to_str().and_then(|pid| pid.parse().ok()) else {
            continue;
        };
        let descriptors = fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
        for descriptor in descriptors {
            let Some(inode) = socket_inode(&descriptor.path()) else { continue };
            if inodes.contains(&inode) {
                owners.entry(inode).or_insert_with(|| Owner::of(pid));
            }
        }
        if owners.len() == inodes.len() {
            break;
        }
    }
    owners
}

/// The sockets of this process.
pub(crate) fn own_inodes() -> HashSet<u64> {
    let descriptors = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    descriptors.filter_map(|descriptor| socket_inode(&descriptor.path())).collect()
}

pub(crate) fn socket_inode(descriptor: &Path) -> Option<u64> {
    let target = fs::read_link(descriptor).ok()?;
    target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod tests;
