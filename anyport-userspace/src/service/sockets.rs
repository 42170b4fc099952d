//! Opening the groups of transparent sockets that packets are steered to.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroUsize,
    os::fd::OwnedFd,
    process,
    sync::Arc,
};

use anyhow::Context as _;
use anyport_common::flow::Transport;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use socket2::Socket;

use super::socket_options;
use crate::{
    rules::{Family, Protocol, ServiceName},
    steering::{GroupSocket, Holder},
};

/// One of a service's sockets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SocketInfo {
    /// Its address family.
    pub family: Family,
    /// Its transport, `tcp` or `udp`.
    pub protocol: Protocol,
    /// Where it is bound.
    pub local: SocketAddr,
    /// The kernel's name for it, as `ss --extended` shows it.
    pub cookie: u64,
    /// The process that serves it.
    pub pid: u32,
}

/// Sockets that share one address and port: the kernel spreads over them what is steered to any of them.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) family: Family,
    pub(super) transport: Transport,
    pub(super) bound: SocketAddr,
    /// At least one.
    pub(super) sockets: Vec<Socket>,
}

impl Group {
    /// Opens a group of `size` sockets, non-blocking, on a free port of the loopback address. None if the host
    /// does not have the family.
    ///
    /// A group out of sockets that were kept goes on where it was. It may be larger than `size`: what waits at
    /// each of them is not lost.
    pub(super) fn open(
        family: Family,
        transport: Transport,
        size: NonZeroUsize,
        kept: Vec<OwnedFd>,
    ) -> anyhow::Result<Option<Self>> {
        let what = || format!("open {size} {} sockets over {family}", Protocol::from(transport));
        if let Some(group) = Self::of_kept(family, transport, kept) {
            return group.fill(size).map(Some).with_context(what);
        }
        let first = match socket_options::listening(family, transport) {
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => return Ok(None),
            first => first.map_err(explain).with_context(what)?,
        };
        let group = Self::around(family, transport, first, size);
        group.map(Some).map_err(explain).with_context(what)
    }

    fn around(family: Family, transport: Transport, first: Socket, size: NonZeroUsize) -> io::Result<Self> {
        let loopback = match family {
            Family::Ipv4 => SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            Family::Ipv6 => SocketAddr::from((Ipv6Addr::LOCALHOST, 0)),
        };
        // The first socket takes its port alone and opens it for sharing afterwards. With SO_REUSEPORT from the
        // start the kernel may choose a UDP port that another group of ours has, and the two would become one.
        first.bind(&loopback.into())?;
        first.set_reuse_port(true)?;
        let bound = first.local_addr()?.as_socket().ok_or(io::ErrorKind::InvalidData)?;
        Self { family, transport, bound, sockets: vec![first] }.fill(size)
    }

    /// Those of the sockets that are bound where the first of them is. There are others only after a crash between the
    /// end of a service and the beginning of another of the same name.
    fn of_kept(family: Family, transport: Transport, kept: Vec<OwnedFd>) -> Option<Self> {
        let bound = |socket: &Socket| socket.local_addr().ok()?.as_socket();
        let mut sockets: Vec<Socket> = kept.into_iter().map(Socket::from).collect();
        let first = sockets.iter().find_map(bound)?;
        sockets.retain(|socket| bound(socket) == Some(first));
        Some(Self { family, transport, bound: first, sockets })
    }

    /// Opens what is missing to `size` sockets, and has all of them listen.
    fn fill(mut self, size: NonZeroUsize) -> io::Result<Self> {
        while self.sockets.len() < size.get() {
            let socket = socket_options::listening(self.family, self.transport)?;
            socket.set_reuse_port(true)?;
            socket.bind(&self.bound.into())?;
            self.sockets.push(socket);
        }
        if self.transport == Transport::Tcp {
            for socket in &self.sockets {
                // What it accepts inherits this, and would otherwise keep a server of the host from being bound to the wildcard
                // address and the port that a client has dialled, here and after the end of the connection (TIME_WAIT).
                socket.set_reuse_address(true)?;
                // The kernel takes as much as net.core.somaxconn allows.
                socket.listen(i32::MAX)?;
            }
        }
        Ok(self)
    }

    /// The group as back ends see it.
    pub(super) fn handle(&self) -> anyhow::Result<GroupSocket> {
        let first = self.sockets[0].try_clone().context("duplicate a socket")?;
        let cookie = first.cookie().context("read the cookie of a socket")?;
        Ok(GroupSocket { cookie, bound: self.bound, holder: Holder::Us(Arc::new(OwnedFd::from(first))) })
    }

    /// The group's sockets as people see them.
    pub(super) fn info(&self) -> anyhow::Result<Vec<SocketInfo>> {
        let info = self.sockets.iter().map(|socket| {
            Ok(SocketInfo {
                family: self.family,
                protocol: self.transport.into(),
                local: self.bound,
                cookie: socket.cookie().context("read the cookie of a socket")?,
                pid: process::id(),
            })
        });
        info.collect()
    }
}

/// Beginning of the names under which the sockets of a group are kept.
pub(super) fn kept_prefix(service: &ServiceName, family: Family, transport: Transport) -> String {
    format!("{service}/{}-{}/", Protocol::from(transport), family.to_string().to_lowercase())
}

/// The name under which a socket is kept.
pub(super) fn kept_name(service: &ServiceName, SocketInfo { family, protocol, cookie, .. }: &SocketInfo) -> String {
    format!("{service}/{protocol}-{}/{cookie}", family.to_string().to_lowercase())
}

/// Adds what to do about it.
fn explain(error: io::Error) -> anyhow::Error {
    let hint = match error.raw_os_error() {
        Some(libc::EPERM) => "transparent sockets need CAP_NET_ADMIN: run as root or give the daemon that capability",
        Some(libc::EMFILE) => "raise the daemon's limit of open files (LimitNOFILE=) or use fewer workers",
        Some(libc::ENFILE) => "raise the sysctl fs.file-max",
        Some(libc::EADDRINUSE) => "no port is free: widen the sysctl net.ipv4.ip_local_port_range",
        _ => return error.into(),
    };
    anyhow::Error::from(error).context(hint)
}

#[cfg(test)]
mod tests {
    use std::{io, num::NonZeroUsize};

    use anyport_common::flow::Transport;

    use super::{Family, Group, explain};

    #[test]
    fn a_group_shares_one_port_and_lets_go_of_it() {
        for family in [Family::Ipv4, Family::Ipv6] {
            for transport in [Transport::Tcp, Transport::Udp] {
                let size = NonZeroUsize::new(3).unwrap();
                let group = Group::open(family, transport, size, Vec::new()).unwrap().unwrap();
                let other = Group::open(family, transport, size, Vec::new()).unwrap().unwrap();
                assert_ne!(group.bound, other.bound);
                assert!(group.bound.ip().is_loopback());
                for socket in &group.sockets {
                    assert_eq!(socket.local_addr().unwrap().as_socket(), Some(group.bound));
                    assert!(socket.reuse_port().unwrap() && socket.nonblocking().unwrap());
                    assert_eq!(socket.is_listener().unwrap(), transport == Transport::Tcp);
                    assert_eq!(socket.reuse_address().unwrap(), transport == Transport::Tcp);
                    match family {
                        Family::Ipv4 => assert!(socket.ip_transparent_v4().unwrap()),
                        Family::Ipv6 => assert!(socket.ip_transparent_v6().unwrap() && socket.only_v6().unwrap()),
                    }
                }
                let info = group.info().unwrap();
                assert_eq!(info.len(), 3);
                assert!(info[0].cookie != info[1].cookie && info[1].cookie != info[2].cookie);
            }
        }
    }

    #[test]
    fn failures_say_what_to_do() {
        let error = explain(io::Error::from_raw_os_error(libc::EPERM)).context("open sockets");
        let text = format!("{error:#}");
        assert!(text.contains("CAP_NET_ADMIN") && text.contains("os error 1"), "{text}");
    }
}
