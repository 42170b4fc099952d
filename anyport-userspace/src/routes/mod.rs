//! `AnyIP`: `local` routes that make whole prefixes addresses of this host.
//!
//! They stand in the table `local` with a protocol number of our own, so that `ip route show table local proto 165`
//! lists them, and only those are ever removed.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyhow::Context as _;
use futures_util::{Stream, StreamExt as _, TryStreamExt as _, future::join_all};
use netlink_packet_route::{
    AddressFamily,
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType, RouteVia},
};
use nix::errno::Errno;
use rtnetlink::{Handle, MulticastGroup, RouteMessageBuilder};

use crate::rules::Prefix;

/// The route protocol that marks anyport's routes. Unassigned in `/etc/iproute2/rt_protos`.
pub const ROUTE_PROTOCOL: u8 = 165;

/// `lo` has this index in every network namespace.
const LOOPBACK_INDEX: u32 = 1;

/// Requests that are under way at a time. Their acknowledgements must fit into the socket's receive buffer.
const PIPELINE: usize = 64;

/// Whose routes the table `local` holds for a prefix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Owners {
    ours: bool,
    others: bool,
}

/// What has to be done so that the wanted prefixes, and no others of ours, are local.
#[derive(Debug, Default, PartialEq, Eq)]
struct Difference {
    unwanted: Vec<Prefix>,
    missing: Vec<Prefix>,
    left_as_found: Vec<Prefix>,
}

fn difference(found: &HashMap<Prefix, Owners>, wanted: &HashSet<Prefix>) -> Difference {
    let mut difference = Difference {
        unwanted: found
            .iter()
            .filter(|(prefix, owners)| owners.ours && !wanted.contains(prefix))
            .map(|(prefix, _)| *prefix)
            .collect(),
        ..Difference::default()
    };
    for prefix in wanted {
        match found.get(prefix) {
            Some(Owners { ours: true, .. }) => {}
            Some(Owners { others: true, .. }) => difference.left_as_found.push(*prefix),
            _ => difference.missing.push(*prefix),
        }
    }
    difference
}

/// The routes of one network namespace, seen through a netlink socket.
#[derive(Debug)]
pub struct Routes {
    handle: Handle,
}

impl Routes {
    /// Opens a netlink socket in the thread's network namespace. Must be called within a tokio runtime.
    pub fn open() -> anyhow::Result<Self> {
        // The strict check is what makes the kernel filter dumps by table and type: a router may hold a million routes.
        let (connection, handle, _) =
            rtnetlink::new_connection_with_strict_check().context("opening a netlink socket for routes")?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// The prefixes that our routes make local.
    #[cfg(test)]
    async fn observe(&self) -> anyhow::Result<HashSet<Prefix>> {
        let found = self.local().await?;
        let ours = found.into_iter().filter(|(_, owners)| owners.ours);
        Ok(ours.map(|(prefix, _)| prefix).collect())
    }

    /// Takes away those of our routes that are not wanted.
    pub async fn remove_unwanted(&self, wanted: &HashSet<Prefix>) -> anyhow::Result<()> {
        let unwanted = difference(&self.local().await?, wanted).unwanted;
        for chunk in unwanted.chunks(PIPELINE) {
            let removals = chunk.iter().map(async |prefix| {
                let result = self.handle.route().del(named(prefix)).execute().await;
                match result.map_err(errno) {
                    Ok(()) | Err(Errno::ESRCH) => Ok(()),
                    Err(errno) => Err(refused("removing", prefix, errno)),
                }
            });
            join_all(removals).await.into_iter().collect::<Result<(), _>>()?;
        }
        Ok(())
    }

    /// Adds the routes that are missing. Returns the prefixes that were left as found, since somebody else's route
    /// of the table `local` leads there already.
    pub async fn add_missing(&self, wanted: &HashSet<Prefix>) -> anyhow::Result<Vec<Prefix>> {
        let Difference { missing, mut left_as_found, .. } = difference(&self.local().await?, wanted);
        for chunk in missing.chunks(PIPELINE) {
            let additions = chunk.iter().map(async |prefix| {
                let result = self.handle.route().add(complete(prefix)).execute().await;
                match result.map_err(errno) {
                    Ok(()) => Ok(None),
                    Err(Errno::EEXIST) => Ok(Some(*prefix)),
                    Err(errno) => Err(refused("adding", prefix, errno)),
                }
            });
            for addition in join_all(additions).await {
                left_as_found.extend(addition?);
            }
        }
        Ok(left_as_found)
    }

    /// The gateways of all routes of all tables.
    pub async fn gateways(&self) -> anyhow::Result<Vec<IpAddr>> {
        let mut gateways = BTreeSet::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let routes = self.dump(family, libc::RT_TABLE_UNSPEC, RouteType::Unicast).await?;
            for route in routes {
                collect_gateways(&route.attributes, &mut gateways);
            }
        }
        Ok(gateways.into_iter().collect())
    }

    async fn local(&self) -> anyhow::Result<HashMap<Prefix, Owners>> {
        let mut found: HashMap<Prefix, Owners> = HashMap::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let routes = self.dump(family, libc::RT_TABLE_LOCAL, RouteType::Local).await?;
            for route in routes {
                let Some(prefix) = destination(&route) else { continue };
                let owners = found.entry(prefix).or_default();
                match route.header.protocol {
                    RouteProtocol::Other(ROUTE_PROTOCOL) => owners.ours = true,
                    _ => owners.others = true,
                }
            }
        }
        Ok(found)
    }

    async fn dump(&self, family: AddressFamily, table: u8, kind: RouteType) -> anyhow::Result<Vec<RouteMessage>> {
        let mut query = RouteMessage::default();
        query.header.address_family = family;
        query.header.table = table;
        query.header.kind = kind;
        let routes = self.handle.route().get(query).execute();
        match routes.try_collect::<Vec<_>>().await.map_err(errno) {
            // A kernel without IPv6 answers with the routes of the families that it has.
            Ok(mut routes) => {
                routes.retain(|route| route.header.address_family == family);
                Ok(routes)
            }
            // The table comes into being with its first route.
            Err(Errno::ENOENT) => Ok(Vec::new()),
            Err(errno) => Err(errno).with_context(|| format!("listing the routes of {family:?}")),
        }
    }
}

/// Gives an item whenever a network interface appears, changes or goes. Must be called within a tokio runtime.
pub fn link_changes() -> anyhow::Result<impl Stream<Item = ()> + Send + Unpin> {
    let (connection, handle, messages) = rtnetlink::new_multicast_connection(&[MulticastGroup::Link])
        .context("opening a netlink socket for news of interfaces")?;
    tokio::spawn(connection);
    Ok(messages.map(move |_| {
        // The connection would end with its last handle.
        let _keep = &handle;
    }))
}

/// What tells our route to a prefix from any other, for its removal.
fn named(prefix: &Prefix) -> RouteMessage {
    builder(prefix).build()
}

/// Our route to a prefix. Its source hint makes local clients use a loopback address rather than one of the prefix
/// itself, so that a rule for the prefix sees what they send and never what they are sent.
fn complete(prefix: &Prefix) -> RouteMessage {
    let mut builder = builder(prefix);
    let source = match prefix.address() {
        IpAddr::V4(_) => RouteAddress::Inet(Ipv4Addr::LOCALHOST),
        IpAddr::V6(_) => RouteAddress::Inet6(Ipv6Addr::LOCALHOST),
    };
    builder.get_mut().attributes.push(RouteAttribute::PrefSource(source));
    builder.build()
}

fn builder(prefix: &Prefix) -> RouteMessageBuilder<IpAddr> {
    let mut builder = RouteMessageBuilder::<IpAddr>::new()
        .table_id(libc::RT_TABLE_LOCAL.into())
        .protocol(RouteProtocol::Other(ROUTE_PROTOCOL))
        .kind(RouteType::Local)
        .scope(RouteScope::Host)
        .output_interface(LOOPBACK_INDEX);
    let (family, destination) = match prefix.address() {
        IpAddr::V4(address) => (AddressFamily::Inet, RouteAddress::Inet(address)),
        IpAddr::V6(address) => (AddressFamily::Inet6, RouteAddress::Inet6(address)),
    };
    let message = builder.get_mut();
    message.header.address_family = family;
    message.header.destination_prefix_length = prefix.len();
    message.attributes.push(RouteAttribute::Destination(destination));
    builder
}

fn destination(route: &RouteMessage) -> Option<Prefix> {
    let address = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(address) => Some(address),
        _ => None,
    });
    // The route to everything has no destination.
    let address = match (address, route.header.address_family) {
        (Some(address), _) => ip_address(address)?,
        (None, AddressFamily::Inet) => Ipv4Addr::UNSPECIFIED.into(),
        (None, _) => Ipv6Addr::UNSPECIFIED.into(),
    };
    format!("{address}/{}", route.header.destination_prefix_length).parse().ok()
}

fn collect_gateways(attributes: &[RouteAttribute], gateways: &mut BTreeSet<IpAddr>) {
    for attribute in attributes {
        match attribute {
            RouteAttribute::Gateway(address) => gateways.extend(ip_address(address)),
            RouteAttribute::Via(RouteVia::Inet(address)) => {
                gateways.insert(IpAddr::V4(*address));
            }
            RouteAttribute::Via(RouteVia::Inet6(address)) => {
                gateways.insert(IpAddr::V6(*address));
            }
            RouteAttribute::MultiPath(next_hops) => {
                for next_hop in next_hops {
                    collect_gateways(&next_hop.attributes, gateways);
                }
            }
            _ => {}
        }
    }
}

fn ip_address(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

/// The kernel's answer; a connection that broke is an I/O error.
fn errno(error: rtnetlink::Error) -> Errno {
    match error {
        rtnetlink::Error::NetlinkError(message) => Errno::from_raw(-message.raw_code()),
        _ => Errno::EIO,
    }
}

fn refused(doing: &str, prefix: &Prefix, errno: Errno) -> anyhow::Error {
    let hint = match errno {
        Errno::EPERM => "; this needs CAP_NET_ADMIN",
        // IPv4 misses the source address on a lo that is down, IPv6 the interface.
        Errno::EINVAL | Errno::ENETDOWN | Errno::ENODEV => {
            "; is the interface lo up and has it 127.0.0.1 and ::1? `ip link set lo up` sees to it"
        }
        Errno::EACCES | Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP => {
            "; IPv6 seems to be switched off here, see `sysctl net.ipv6.conf.lo.disable_ipv6`"
        }
        _ => "",
    };
    anyhow::anyhow!("{doing} the local route to {prefix}: {}{hint}", errno.desc())
}

#[cfg(test)]
mod tests;
