//! The hosts of a test: a client, the host that runs anyport, and a server behind it, joined by cables.
//!
//! ```text
//! client 198.51.100.1 ── 198.51.100.2 anyport host 203.0.113.1 ── 203.0.113.2, .3 server
//!        2001:db8:c::1 ── 2001:db8:c::2            2001:db8:d::1 ── 2001:db8:d::2, ::3
//! ```
//!
//! The client sends everything it doesn't know to the anyport host, which forwards.

use crate::netns::Netns;

/// The client's addresses.
pub const CLIENT: [&str; 2] = ["198.51.100.1", "2001:db8:c::1"];
/// The anyport host's addresses on the client's side.
pub const HOST: [&str; 2] = ["198.51.100.2", "2001:db8:c::2"];
/// The server's first addresses.
pub const SERVER: [&str; 2] = ["203.0.113.2", "2001:db8:d::2"];
/// The server's second addresses.
pub const SECOND: [&str; 2] = ["203.0.113.3", "2001:db8:d::3"];

/// Three hosts in three namespaces.
#[derive(Clone, Debug)]
pub struct Topology {
    /// Dials from outside.
    pub client: Netns,
    /// Runs the daemon.
    pub host: Netns,
    /// An ordinary server that is reached through the anyport host.
    pub server: Netns,
}

impl Default for Topology {
    fn default() -> Self {
        Self::new()
    }
}

impl Topology {
    /// The three hosts, joined.
    pub fn new() -> Self {
        let (client, host, server) = (Netns::new(), Netns::new(), Netns::new());
        host.sysctl("net.ipv4.ip_forward", "1");
        host.sysctl("net.ipv6.conf.all.forwarding", "1");
        // Every dial that leads nowhere is told so, however many there are.
        host.sysctl("net.ipv4.icmp_ratelimit", "0");
        host.sysctl("net.ipv6.icmp.ratelimit", "0");
        client.join(
            &host,
            ("eth0", &["198.51.100.1/30", "2001:db8:c::1/64"]),
            ("client", &["198.51.100.2/30", "2001:db8:c::2/64"]),
        );
        server.join(
            &host,
            ("eth0", &["203.0.113.2/28", "203.0.113.3/28", "2001:db8:d::2/64", "2001:db8:d::3/64"]),
            ("server", &["203.0.113.1/28", "2001:db8:d::1/64"]),
        );
        client.ip("route add default via 198.51.100.2");
        client.ip("-6 route add default via 2001:db8:c::2");
        server.ip("route add default via 203.0.113.1");
        server.ip("-6 route add default via 2001:db8:d::1");
        Self { client, host, server }
    }
}
