//! `AnyIP`: `local` routes that make whole prefixes addresses of this host.
//!
//! They stand in the table `local` with a protocol number of our own, so that `ip route show table local proto 165`
//! lists them, and only those are ever removed. There are as few of them as cover the addresses.

mod coverage;
mod netlink;
mod watch;
mod wire;

use std::{
    collections::{BTreeSet, HashSet},
    fmt,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Context as _;
use nix::{
    errno::Errno,
    net::if_::{if_indextoname, if_nametoindex},
};

use self::{
    coverage::position,
    netlink::{Found, Netlink},
    wire::{Change, Lookup, RouteHeader, destination, family},
};
pub use self::{
    coverage::{Coverage, Difference, Edits},
    watch::{News, Watch},
};
use crate::rules::Prefix;

/// The route protocol that marks anyport's routes. Unassigned in `/etc/iproute2/rt_protos`.
pub const ROUTE_PROTOCOL: u8 = 165;

/// `lo` has this index in every network namespace.
const LOOPBACK_INDEX: u32 = 1;

/// A route as the kernel holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Where it leads to.
    pub block: Prefix,
    /// Whether it ends at this host.
    pub is_local: bool,
    /// The program that made it, see `/etc/iproute2/rt_protos`.
    pub protocol: u8,
}

/// What the kernel's routing tables say of addresses of this host, whichever program made the routes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalTable {
    /// The addresses that the table `local` makes local.
    pub local: Coverage,
    /// The addresses whose packets the table `local` has thrown away: blackhole, unreachable, prohibit, throw.
    pub refused: Vec<Prefix>,
    /// Tables besides `local` in which every IPv4 address is local, as set-ups with packet marks have them.
    pub all_local_tables: usize,
}

/// The way of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnswerWay {
    /// It leaves by an interface, by the route to a block.
    By {
        /// The interface, where the route names one.
        interface: Option<String>,
        /// Where the route leads.
        block: Prefix,
    },
    /// It does not leave: why.
    Stopped(&'static str),
}

/// What holds local routes: the kernel, or what stands in for it in tests and simulations.
pub trait Holder: Send + fmt::Debug {
    /// The prefixes that the table `local` makes local.
    ///
    /// # Errors
    /// The kernel's.
    fn local(&mut self) -> anyhow::Result<Local>;
    /// Adds routes of ours. Returns the prefixes that were left as found, since there is the same route already.
    ///
    /// # Errors
    /// The kernel's.
    fn add(&mut self, prefixes: &[Prefix]) -> anyhow::Result<Vec<Prefix>>;
    /// Removes routes of ours, if they are there.
    ///
    /// # Errors
    /// The kernel's.
    fn remove(&mut self, prefixes: &[Prefix]) -> anyhow::Result<()>;
}

/// The routes of one network namespace, seen through a netlink socket.
///
/// A change that has begun goes on to its end, even if its caller waits for it no more; what comes next waits.
#[derive(Debug)]
pub struct Routes {
    netlink: Arc<Mutex<Netlink>>,
    holder: Arc<Mutex<dyn Holder>>,
}

impl Routes {
    /// Opens a netlink socket in the thread's network namespace.
    pub fn open() -> anyhow::Result<Self> {
        let netlink = Arc::new(Mutex::new(open()?));
        let holder = Arc::clone(&netlink);
        Ok(Self { netlink, holder })
    }

    /// Changes nothing but what `holder` holds.
    pub(crate) fn held_by(holder: Arc<Mutex<dyn Holder>>) -> anyhow::Result<Self> {
        Ok(Self { netlink: Arc::new(Mutex::new(open()?)), holder })
    }

    /// Reports what others do to routes of ours, and to interfaces. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The kernel's.
    pub fn watch(&self) -> anyhow::Result<Watch> {
        Watch::open(self.netlink.lock().unwrap_or_else(PoisonError::into_inner).port)
    }

    /// The prefixes that our routes make local, in order.
    pub async fn ours(&self) -> anyhow::Result<Vec<Prefix>> {
        self.change(|holder| Ok(holder.local()?.ours)).await
    }

    /// Those of the blocks for which there is no local route, neither of ours nor of others.
    pub async fn missing(&self, coverage: &Coverage) -> anyhow::Result<Vec<Prefix>> {
        let wanted: Vec<Prefix> = coverage.blocks().collect();
        self.change(move |holder| {
            let Local { ours, others } = holder.local()?;
            let Difference { added, .. } = Difference::between(ours.into_iter(), wanted.into_iter());
            Ok(added.into_iter().filter(|it| !others.contains(it)).collect())
        })
        .await
    }

    /// Makes exactly these addresses local by routes of ours, whatever was there before. Reads all local routes, and
    /// changes what differs. Returns what was left as found, as [`Self::add`] does.
    ///
    /// No address that was local and remains so is without a route in between.
    pub async fn set(&self, coverage: &Coverage) -> anyhow::Result<Vec<Prefix>> {
        let wanted: Vec<Prefix> = coverage.blocks().collect();
        self.change(move |holder| {
            let Local { ours, others } = holder.local()?;
            let Difference { removed, added } = Difference::between(ours.into_iter(), wanted.into_iter());
            let (mut left_as_found, missing) = added.into_iter().partition::<Vec<_>, _>(|it| others.contains(it));
            left_as_found.extend(holder.add(&missing)?);
            holder.remove(&removed)?;
            Ok(left_as_found)
        })
        .await
    }

    /// Adds the routes that came, and then removes those that went, without a look at the others. Returns what was
    /// left as found, as [`Self::add`] does.
    ///
    /// No address that was local and remains so is without a route in between. After an error,
    /// [`Difference::reversed`] leads back.
    pub async fn apply(&self, difference: &Difference) -> anyhow::Result<Vec<Prefix>> {
        let Difference { removed, added } = difference.clone();
        self.change(move |holder| {
            let left_as_found = holder.add(&added)?;
            holder.remove(&removed)?;
            Ok(left_as_found)
        })
        .await
    }

    /// Adds routes. Returns the prefixes that were left as found, since the table `local` holds the same route
    /// already. After an error, some may have been added.
    pub async fn add(&self, prefixes: &[Prefix]) -> anyhow::Result<Vec<Prefix>> {
        let prefixes = prefixes.to_vec();
        self.change(move |holder| holder.add(&prefixes)).await
    }

    /// Removes routes of ours, if they are there. After an error, some may have been removed.
    pub async fn remove(&self, prefixes: &[Prefix]) -> anyhow::Result<()> {
        let prefixes = prefixes.to_vec();
        self.change(move |holder| holder.remove(&prefixes)).await
    }

    /// The route that packets to this address take.
    pub async fn to(&self, address: IpAddr) -> anyhow::Result<Option<Route>> {
        self.with(move |netlink| {
            let found = netlink.find(Lookup::sent(address));
            let found = found.with_context(|| format!("looking up the route to {address}"))?;
            Ok(found.ok().map(|Found { block, route, .. }| Route {
                block,
                is_local: route.kind == libc::RTN_LOCAL,
                protocol: route.protocol,
            }))
        })
        .await
    }

    /// The way of an answer to a client; `from` is where the client has sent its packet, if that is local.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub async fn of_answer(&self, client: IpAddr, from: Option<IpAddr>, mark: u32) -> anyhow::Result<AnswerWay> {
        self.with(move |netlink| {
            let found = netlink.find(Lookup { from, mark, ..Lookup::sent(client) });
            Ok(match found.with_context(|| format!("looking up the way of an answer to {client}"))? {
                Ok(Found { block, interface, .. }) => {
                    let name = interface.and_then(|index| if_indextoname(index).ok());
                    AnswerWay::By { interface: name.map(|it| it.to_string_lossy().into_owned()), block }
                }
                Err(why) => AnswerWay::Stopped(match why {
                    Errno::EACCES => "a route of the type prohibit stops it",
                    Errno::EHOSTUNREACH => "a route of the type unreachable stops it",
                    Errno::EINVAL => "a route of the type blackhole drops it",
                    _ => "there is no route to the client",
                }),
            })
        })
        .await
    }

    /// Whether the kernel refuses what a client sends there by this interface for its source: mostly the filter of reverse paths.
    ///
    /// # Errors
    /// There is no such interface, or the kernel does not tell.
    pub async fn is_filtered(&self, client: IpAddr, to: IpAddr, interface: &str) -> anyhow::Result<bool> {
        let by = if_nametoindex(interface).with_context(|| format!("there is no interface {interface}"))?;
        self.with(move |netlink| {
            let found = netlink.find(Lookup { from: Some(client), by: Some(by), ..Lookup::sent(to) });
            let found = found.context("looking up the way of a packet that arrives")?;
            // Since Linux 6.13 every reason to refuse the source is EINVAL.
            Ok(found.is_err_and(|why| matches!(why, Errno::EXDEV | Errno::EINVAL)))
        })
        .await
    }

    /// The table `local`, and what else concerns local addresses.
    pub async fn local_table(&self) -> anyhow::Result<LocalTable> {
        self.with(local_table).await
    }

    /// The gateways of all routes of all tables.
    pub async fn gateways(&self) -> anyhow::Result<Vec<IpAddr>> {
        self.with(|netlink| {
            let mut gateways = BTreeSet::new();
            list(netlink, libc::RT_TABLE_UNSPEC, libc::RTN_UNICAST, |_, attributes| {
                wire::gateways(attributes, &mut |gateway| {
                    gateways.insert(gateway);
                });
            })?;
            Ok(gateways.into_iter().collect())
        })
        .await
    }

    async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Netlink) -> anyhow::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        let netlink = Arc::clone(&self.netlink);
        // A request holds no state on the socket that could be left half done.
        let work = move || work(&mut netlink.lock().unwrap_or_else(PoisonError::into_inner));
        tokio::task::spawn_blocking(work).await.context("asking for routes")?
    }

    async fn change<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut dyn Holder) -> anyhow::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        let holder = Arc::clone(&self.holder);
        let work = move || work(&mut *holder.lock().unwrap_or_else(PoisonError::into_inner));
        tokio::task::spawn_blocking(work).await.context("changing routes")?
    }
}

fn open() -> anyhow::Result<Netlink> {
    Netlink::open().context("opening a netlink socket for routes")
}

impl Holder for Netlink {
    fn add(&mut self, prefixes: &[Prefix]) -> anyhow::Result<Vec<Prefix>> {
        let mut left_as_found = Vec::new();
        self.change(Change::Add, prefixes, |prefix, errno| match errno {
            Errno::EEXIST => {
                left_as_found.push(*prefix);
                Ok(())
            }
            _ => Err(refused("adding", prefix, errno)),
        })?;
        Ok(left_as_found)
    }

    fn remove(&mut self, prefixes: &[Prefix]) -> anyhow::Result<()> {
        self.change(Change::Remove, prefixes, |prefix, errno| match errno {
            Errno::ESRCH => Ok(()),
            _ => Err(refused("removing", prefix, errno)),
        })
    }

    fn local(&mut self) -> anyhow::Result<Local> {
        let mut local = Local::default();
        list(self, libc::RT_TABLE_LOCAL, libc::RTN_LOCAL, |route, attributes| {
            let Some(prefix) = destination(route, attributes) else { return };
            if route.protocol == ROUTE_PROTOCOL {
                local.ours.push(prefix);
            } else {
                local.others.insert(prefix);
            }
        })?;
        local.ours.sort_unstable_by_key(position);
        local.ours.dedup();
        Ok(local)
    }
}

/// The prefixes that the table `local` makes local.
#[derive(Debug, Default)]
pub struct Local {
    /// By routes of ours; in order, each once.
    pub ours: Vec<Prefix>,
    /// By routes of others.
    pub others: HashSet<Prefix>,
}

fn local_table(netlink: &mut Netlink) -> anyhow::Result<LocalTable> {
    let (mut local, mut refused, mut all_local_tables) = (Vec::new(), Vec::new(), 0);
    list(netlink, libc::RT_TABLE_LOCAL, libc::RTN_UNSPEC, |route, attributes| {
        let Some(prefix) = destination(route, attributes) else { return };
        match route.kind {
            libc::RTN_LOCAL => local.push(prefix),
            libc::RTN_BLACKHOLE | libc::RTN_UNREACHABLE | libc::RTN_PROHIBIT | libc::RTN_THROW => refused.push(prefix),
            // The broadcast addresses of interfaces, anycast and multicast, which the kernel adds by itself.
            _ => {}
        }
    })?;
    list(netlink, libc::RT_TABLE_UNSPEC, libc::RTN_LOCAL, |route, attributes| {
        let is_everything = destination(route, attributes).is_some_and(|prefix| prefix.is_everything());
        if is_everything && route.table != libc::RT_TABLE_LOCAL && i32::from(route.family) == libc::AF_INET {
            all_local_tables += 1;
        }
    })?;
    Ok(LocalTable { local: local.into_iter().collect(), refused, all_local_tables })
}

fn list(
    netlink: &mut Netlink,
    table: u8,
    kind: u8,
    mut found: impl FnMut(&RouteHeader, wire::Attributes<'_>),
) -> anyhow::Result<()> {
    for (name, is_ipv4) in [("IPv4", true), ("IPv6", false)] {
        let like = RouteHeader { family: family(is_ipv4), table, kind, ..RouteHeader::default() };
        netlink.list(&like, &mut found).with_context(|| format!("listing the routes of {name}"))?;
    }
    Ok(())
}

/// Whether a packet from `peer`, at the interface by which it is reached, to `address` would be taken by this host though
/// the address is not its own. If not, the name of that interface.
///
/// # Errors
/// There is no route to the peer, or the kernel does not answer.
pub async fn way_back(peer: IpAddr, address: IpAddr) -> anyhow::Result<Option<String>> {
    let routes = Routes::open()?;
    let look = move |netlink: &mut Netlink| {
        let there = netlink.find(Lookup::sent(peer))?;
        let interface = there.ok().and_then(|there| there.interface).context("there is no route to the upstream")?;
        let back = netlink.find(Lookup { from: Some(peer), by: Some(interface), ..Lookup::sent(address) })?;
        if back.is_ok_and(|back| back.route.kind == libc::RTN_LOCAL) {
            return Ok(None);
        }
        let name = if_indextoname(interface).context("name the interface")?;
        Ok(Some(name.to_string_lossy().into_owned()))
    };
    routes.with(look).await
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
