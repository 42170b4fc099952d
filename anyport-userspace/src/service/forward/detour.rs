//! Upstreams that are steered to us.
//!
//! An upstream inside of a prefix that is steered to `forward` itself would bring each client back to us, by one service or
//! by several in a ring, until no descriptor is left.

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Mutex,
    time::{Duration, Instant},
};

use anyport_common::flow::Transport;
use socket2::{Domain, Socket, Type};

use crate::service::{ForwardGuard, lock};

/// For so long after the last one it is a complaint, and in this time there is one line of the log.
const INTERVAL: Duration = Duration::from_mins(1);

/// The detours of one service.
pub(super) struct Detours {
    guard: ForwardGuard,
    last: Mutex<Option<(SocketAddr, Instant)>>,
}

impl fmt::Debug for Detours {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Detours").field("last", &self.last).finish_non_exhaustive()
    }
}

impl Detours {
    pub(super) fn new(guard: ForwardGuard) -> Self {
        Self { guard, last: Mutex::default() }
    }

    /// Whether what goes to `to`, from the client's address if it keeps that, would come to a service that forwards.
    pub(super) fn is_one(&self, service: &str, transport: Transport, source: Option<IpAddr>, to: SocketAddr) -> bool {
        // Our routes have the host dial from there.
        let loopback = match to.ip() {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
        };
        // Without a local route it leaves the host, whatever is steered.
        if !(self.guard)(transport, source.unwrap_or(loopback), to) || !is_local(to).unwrap_or(true) {
            return false;
        }
        let now = Instant::now();
        let mut last = lock(&self.last);
        if last.is_none_or(|(_, at)| now.duration_since(at) >= INTERVAL) {
            tracing::warn!("service {service}: {}", refusal(to));
        }
        *last = Some((to, now));
        true
    }

    /// What was refused lately.
    pub(super) fn complaint(&self) -> Option<String> {
        let (to, at) = (*lock(&self.last))?;
        (at.elapsed() < INTERVAL).then(|| refusal(to))
    }
}

fn refusal(to: SocketAddr) -> String {
    format!(
        "the upstream {to} gets no clients, since it is steered to a service that forwards and they could come back for \
         ever; take it out of the rules (--except), or name another upstream"
    )
}

/// Whether what goes there stays on this host: it would be sent from the loopback address, or from where it goes.
fn is_local(to: SocketAddr) -> io::Result<bool> {
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM, None)?;
    // Sends nothing.
    socket.connect(&to.into())?;
    let source = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::InvalidData)?;
    Ok(source.ip().is_loopback() || source.ip() == to.ip())
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, sync::Arc};

    use anyport_common::flow::Transport;

    use super::Detours;

    #[test]
    fn only_what_is_steered_and_local_comes_back() {
        let guard = |transport, source: std::net::IpAddr, to: SocketAddr| {
            transport == Transport::Tcp && source.is_loopback() && to.port() == 80
        };
        let detours = Detours::new(Arc::new(guard));
        for (transport, to, expected) in [
            (Transport::Tcp, "127.0.0.9:80", true),
            (Transport::Tcp, "[::1]:80", true),
            (Transport::Tcp, "127.0.0.9:81", false),
            (Transport::Udp, "127.0.0.9:80", false),
        ] {
            assert_eq!(detours.is_one("edge", transport, None, to.parse().unwrap()), expected, "{to}");
        }
        let client = Some("198.51.100.1".parse().unwrap());
        assert!(!detours.is_one("edge", Transport::Tcp, client, "127.0.0.9:80".parse().unwrap()));
        assert!(detours.complaint().unwrap().contains("[::1]:80"), "the last one");
    }
}
