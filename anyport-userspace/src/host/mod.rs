//! What a rule could take away from the host itself: addresses, gateways and listening sockets.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fs::{self, File},
    io::{BufRead as _, BufReader, ErrorKind},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

use anyhow::Context as _;
use anyport_common::flow::Transport;

use crate::rules::Rule;

/// A socket that waits for strangers: a listening TCP socket or an unconnected UDP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// The transport.
    pub transport: Transport,
    /// Where it is bound, which may be a wildcard address.
    pub local: SocketAddr,
    /// Its inode, by which processes hold it.
    pub inode: u64,
}

/// What this network namespace has of its own.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// Configured addresses, each with its interface.
    pub addresses: Vec<(IpAddr, String)>,
    /// The gateways of its routes, see [`crate::routes::Routes::gateways`].
    pub gateways: Vec<IpAddr>,
    /// The sockets that wait for strangers.
    pub listeners: Vec<Listener>,
}

/// The process that holds a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its id.
    pub pid: u32,
    /// Its name.
    pub name: String,
}

/// Why rules would harm the host; one line each, nothing if they do no harm.
pub fn objections(rules: &[Rule], host: &Host) -> Vec<String> {
    let shadowed: Vec<_> = rules.iter().map(|rule| (rule, shadowed(rule, host))).collect();
    let owners = owners(&shadowed.iter().flat_map(|(_, listeners)| listeners).map(|it| it.inode).collect());
    shadowed.iter().flat_map(|(rule, listeners)| describe(rule, host, listeners, &owners)).collect()
}

fn describe(rule: &Rule, host: &Host, shadowed: &[Listener], owners: &HashMap<u64, Owner>) -> Vec<String> {
    let prefix = &rule.prefix;
    let mut lines = Vec::new();
    if rule.terms.route && prefix.is_everything() {
        lines.push(format!("a local route to {prefix} would replace the default route and cut the host off"));
    }
    let gateways = host.gateways.iter().filter(|gateway| prefix.contains(**gateway));
    let gateways: Vec<_> = gateways.map(ToString::to_string).collect();
    if rule.terms.route && !gateways.is_empty() {
        lines.push(format!("{prefix} contains {}, the way to the host's gateway", gateways.join(", ")));
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
    let is_reached = |local: IpAddr| match local {
        // A wildcard socket of IPv6 serves IPv4 too unless it was told not to, which can't be seen from here.
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => is_host_inside,
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
        .filter(|listener| is_reached(listener.local.ip()))
        .collect()
}

/// The sockets that packets to this address and port reach by the host's own lookup, the one that the kernel prefers
/// first.
pub fn reached(transport: Transport, to: SocketAddr, listeners: Vec<Listener>) -> Vec<Listener> {
    let rank = |listener: &Listener| match listener.local.ip() {
        local if local == to.ip() => Some(0),
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) if to.is_ipv4() => Some(1),
        // As above, it may serve IPv4 too.
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Some(2),
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

fn show(listener: &Listener, owner: Option<&Owner>) -> String {
    let transport = match listener.transport {
        Transport::Tcp => "tcp",
        Transport::Udp => "udp",
    };
    let local = listener.local;
    match owner {
        Some(Owner { pid, name }) => format!("{transport} {local} of {name} (pid {pid})"),
        None => format!("{transport} {local}"),
    }
}

/// The configured addresses of the thread's network namespace, each with its interface.
pub fn addresses() -> anyhow::Result<Vec<(IpAddr, String)>> {
    let interfaces = nix::ifaddrs::getifaddrs().context("listing the addresses of the host")?;
    let addresses = interfaces.filter_map(|interface| {
        let address = interface.address?;
        let address = match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
            (Some(address), _) => IpAddr::V4(address.ip()),
            (_, Some(address)) => IpAddr::V6(address.ip()),
            _ => return None,
        };
        Some((address, interface.interface_name))
    });
    Ok(addresses.collect())
}

/// The listening TCP sockets and the unconnected UDP sockets of the thread's network namespace.
pub fn listeners() -> anyhow::Result<Vec<Listener>> {
    let mut listeners = listeners_of(Transport::Tcp)?;
    listeners.extend(listeners_of(Transport::Udp)?);
    Ok(listeners)
}

/// Which of these sockets, given by their inodes, are listening or unconnected ones still, each with its transport.
///
/// The kernel's list is no snapshot: it is read piece by piece, and goes on by the number of the entry (`udp_get_idx`, net/ipv4/udp.c), so that
/// sockets that others close meanwhile hide some that are open. So what is missing is looked for twice more. Where others open and close a
/// hundred sockets all the time even that missed 18 of 200, so that who must not be wrong has to ask again later.
///
/// # Errors
/// The list can't be read.
pub(crate) fn still_open(inodes: &HashSet<u64>) -> anyhow::Result<HashMap<u64, Transport>> {
    const LOOKS: usize = 3;
    let mut open = HashMap::new();
    for _ in 0..LOOKS {
        let wanted = listeners()?.into_iter().filter(|it| inodes.contains(&it.inode));
        open.extend(wanted.map(|it| (it.inode, it.transport)));
        if open.len() == inodes.len() {
            break;
        }
    }
    Ok(open)
}

/// Those of one transport. The kernel takes milliseconds for TCP, however few there are.
pub fn listeners_of(transport: Transport) -> anyhow::Result<Vec<Listener>> {
    let files = match transport {
        Transport::Tcp => ["tcp", "tcp6"],
        Transport::Udp => ["udp", "udp6"],
    };
    let mut listeners = Vec::new();
    for file in files {
        let path = Path::new("/proc/thread-self/net").join(file);
        match File::open(&path) {
            Ok(file) => read_table(BufReader::new(file).lines(), transport, &mut listeners)
                .with_context(|| format!("reading {}", path.display()))?,
            // A kernel without IPv6.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error).with_context(|| format!("opening {}", path.display()));
            }
        }
    }
    Ok(listeners)
}

/// The local addresses of the connections of the thread's network namespace: those of TCP from the first SYN on until both
/// sides have closed, without what is in `TIME_WAIT`, and those of connected UDP sockets.
pub fn connected_addresses() -> anyhow::Result<HashSet<IpAddr>> {
    // UDP sockets that are not connected are shown as closed.
    const TIME_WAIT_CLOSE_LISTEN: [&str; 3] = ["06", "07", "0A"];
    let mut addresses = HashSet::new();
    for file in ["tcp", "tcp6", "udp", "udp6"] {
        let path = Path::new("/proc/thread-self/net").join(file);
        let text = match fs::read_to_string(&path) {
            // A kernel without IPv6.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            text => text.with_context(|| format!("reading {}", path.display()))?,
        };
        let sockets = text.lines().skip(1).map(|line| line.split_ascii_whitespace().skip(1));
        addresses.extend(sockets.filter_map(|mut fields| {
            let (local, state) = (fields.next()?, fields.nth(1)?);
            let is_connection = !TIME_WAIT_CLOSE_LISTEN.contains(&state);
            is_connection.then(|| socket_address(local)).flatten().map(|local| local.ip())
        }));
    }
    Ok(addresses)
}

fn read_table(
    lines: impl Iterator<Item = std::io::Result<String>>,
    transport: Transport,
    listeners: &mut Vec<Listener>,
) -> std::io::Result<()> {
    const LISTEN: &str = "0A";
    const UNCONNECTED: &str = "07";
    for line in lines.skip(1) {
        let line = line?;
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        let [_, local, _, state, _, _, _, _, _, inode, ..] = fields[..] else { continue };
        match transport {
            // The kernel lists the listening sockets first; of the others there may be very many.
            Transport::Tcp if state != LISTEN => break,
            Transport::Udp if state != UNCONNECTED => continue,
            _ => {}
        }
        if let (Some(local), Ok(inode)) = (socket_address(local), inode.parse()) {
            listeners.push(Listener { transport, local, inode });
        }
    }
    Ok(())
}

/// Reads `0100007F:1F90`: words of 32 bits, each as the machine's own number, and the port.
fn socket_address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let mut bytes = Vec::with_capacity(16);
    for start in (0..address.len()).step_by(8) {
        let word = u32::from_str_radix(address.get(start..start + 8)?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    let address = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        _ => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical(),
    };
    Some(SocketAddr::new(address, u16::from_str_radix(port, 16).ok()?))
}

/// Who holds these sockets, as far as `/proc` lets us see.
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
                let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                let owner = Owner { pid, name: name.trim_end().to_owned() };
                owners.entry(inode).or_insert(owner);
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
