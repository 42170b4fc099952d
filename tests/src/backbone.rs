//! The network of a fleet: hosts and etcd's members around a router, each on a cable of its own.
//!
//! ```text
//! host 0   203.0.113.1 ── 203.0.113.2 ┌────────┐ 198.51.100.18 ── 198.51.100.17   member 0
//! host 1   203.0.113.5 ── 203.0.113.6 │ router │ 198.51.100.22 ── 198.51.100.21   member 1
//! …                                   └────────┘ …
//!                                     198.51.100.9, where one member may be that never loses its cable
//! ```

use std::net::IpAddr;

use crate::netns::Netns;

/// An address of the router, which all hosts reach.
const ROUTER: [u8; 4] = [198, 51, 100, 9];
/// All addresses of the router and of members.
const MIDDLE: &str = "198.51.100.0/27";

/// The router and hosts that have a cable to it.
#[derive(Debug)]
pub struct Backbone {
    /// In the middle.
    pub router: Netns,
    /// Around it.
    pub hosts: Vec<Netns>,
}

impl Backbone {
    /// A router with so many hosts.
    pub fn new(hosts: usize) -> Self {
        let router = Netns::new();
        router.sysctl("net.ipv4.ip_forward", "1");
        router.ip(&format!("address add {}/32 dev lo", IpAddr::from(ROUTER)));
        let join = |number: usize| {
            let host = Netns::new();
            let [here, there] = [1, 2].map(|last| format!("203.0.113.{}/30", 4 * number + last));
            host.join(&router, ("eth0", &[&here]), (&format!("node{number}"), &[&there]));
            host
        };
        let hosts: Vec<Netns> = (0..hosts).map(join).collect();
        let backbone = Self { router, hosts };
        (0..backbone.hosts.len()).for_each(|host| backbone.route(host));
        backbone
    }

    /// A prefix that holds a host's own address.
    pub fn prefix_of(host: usize) -> String {
        format!("203.0.113.{}/30", 4 * host)
    }

    /// The router as the place of a cluster's only member.
    pub fn center(&self) -> (Netns, IpAddr) {
        (self.router.clone(), ROUTER.into())
    }

    /// Places for so many members of a cluster, at most four, around the router. To be asked for once.
    pub fn members(&self, count: u8) -> Vec<(Netns, IpAddr)> {
        let join = |number: u8| {
            let member = Netns::new();
            let [here, there] = [1, 2].map(|last| IpAddr::from([198, 51, 100, 16 + 4 * number + last]));
            let (here_long, there_long) = (format!("{here}/30"), format!("{there}/30"));
            member.join(&self.router, ("eth0", &[&here_long]), (&format!("member{number}"), &[&there_long]));
            member.ip(&format!("route add default via {there}"));
            (member, here)
        };
        (0..count).map(join).collect()
    }

    /// Pulls a host's cable.
    pub fn cut(&self, host: usize) {
        self.hosts[host].ip("link set eth0 down");
    }

    /// Puts it back.
    pub fn mend(&self, host: usize) {
        self.hosts[host].ip("link set eth0 up");
        // It went with the interface.
        self.route(host);
    }

    fn route(&self, host: usize) {
        self.hosts[host].ip(&format!("route add {MIDDLE} via 203.0.113.{}", 4 * host + 2));
    }
}
