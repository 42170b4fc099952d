//! What rules take from the host itself: addresses that it gets, servers that start and others that it comes to talk to while the
//! rules are there, and what the configuration takes from the first moment on. Commands are refused for that ([`super::safety`]);
//! here it can only be said, or an address be left to the host by a rule of its own.

mod peers;
mod seen;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use anyport_common::flow::Transport;
use tracing::{error, info};

use self::seen::Seen;
use super::{Engine, kept::Keep};
use crate::{
    config::Winner,
    host::{self, Host, Listener},
    rules::{Change, Draft, Origin, Prefix, Rule, RuleRef, RuleSet, RuleSpec},
};

/// How often it is looked what of the host's own rules take.
const INTERVAL: Duration = Duration::from_secs(2);
/// How often others are looked for that the host talks to. Even on an idle host the kernel goes through its whole table of connections.
const INTERVAL_OF_PEERS: Duration = Duration::from_secs(10);
/// So much of it is told.
const MOST: usize = 64;

/// What was seen last.
#[derive(Debug)]
pub(super) struct Shadow {
    /// Of what is the host's own.
    own_things: Seen,
    /// Of others that it talks to.
    peers: Seen,
    /// Sockets of this process that lie at steered addresses, such as those that answer datagrams.
    own: HashSet<u64>,
    /// The addresses that are left to the host, as far as others have no rules about them.
    left: BTreeSet<Prefix>,
}

/// Something of the host's that a rule takes packets from, or another host that gets no packets of this one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Shadowed {
    Address { address: IpAddr, interface: String, prefix: Prefix },
    Listener { is_udp: bool, local: SocketAddr, at: IpAddr, inode: u64 },
    Peer { address: IpAddr, role: String },
}

impl Default for Shadow {
    fn default() -> Self {
        Self {
            own_things: Seen::every(INTERVAL),
            peers: Seen::every(INTERVAL_OF_PEERS),
            own: HashSet::new(),
            left: BTreeSet::new(),
        }
    }
}

impl Shadow {
    /// In words.
    pub(super) fn found(&self) -> impl Iterator<Item = &str> {
        self.own_things.found().chain(self.peers.found()).take(MOST)
    }

    fn knows(&self, inode: u64) -> bool {
        self.own_things.all().any(|it| matches!(it, Shadowed::Listener { inode: known, .. } if *known == inode))
    }

    /// Those of the sockets that are not this process's.
    fn others<'a>(
        &mut self,
        seen: Vec<(&'a Listener, IpAddr, RuleRef<'a>)>,
    ) -> Vec<(&'a Listener, IpAddr, RuleRef<'a>)> {
        let inodes: HashSet<u64> = seen.iter().map(|(listener, ..)| listener.inode).collect();
        self.own.retain(|inode| inodes.contains(inode));
        // To list the own ones takes long where there are many connections.
        if inodes.iter().any(|inode| !self.own.contains(inode) && !self.knows(*inode)) {
            self.own = &host::own_inodes() & &inodes;
        }
        seen.into_iter().filter(|(listener, ..)| !self.own.contains(&listener.inode)).collect()
    }
}

impl Engine {
    /// Looks what rules take from the host, and what they keep it from.
    pub(super) async fn look_for_shadowed(&mut self) {
        if self.shadow.own_things.is_due() {
            let begun = Instant::now();
            let seen = self.see_shadowed().await;
            self.shadow.own_things.note(begun, seen.context("look whether rules take from the host what is its own"));
        }
        if self.shadow.peers.is_due() {
            let begun = Instant::now();
            let seen = self.see_peers().await;
            self.shadow.peers.note(begun, seen.context("look whether routes of rules cut the host off from others"));
        }
    }

    async fn see_shadowed(&mut self) -> anyhow::Result<BTreeMap<Shadowed, String>> {
        if self.desired.rules().is_empty() {
            return Ok(BTreeMap::new());
        }
        let host = self.kernel.look_at_host()?;
        self.leave_addresses(&host).await;
        let rules = self.desired.rules();
        let receivers: HashSet<u64> =
            self.services.iter().flat_map(|(_, it)| self.services.sockets_of(it)).map(|it| it.cookie).collect();
        let mut seen = addresses(rules, &host);
        let listeners = host.listeners.iter().filter(|it| !receivers.contains(&it.cookie));
        let own_addresses = steered_addresses(rules, &host);
        let taken = listeners.filter_map(|it| taken_from(rules, it, &own_addresses)).collect();
        let taken = self.shadow.others(taken);
        let new = taken.iter().map(|(listener, ..)| listener.inode);
        let owners = host::owners(&new.filter(|inode| !self.shadow.knows(*inode)).collect());
        // One that this one has succeeded goes on with the flows that it has.
        let own_name = host::process_name(std::process::id());
        for (listener, at, rule) in taken {
            let owner = owners.get(&listener.inode);
            if owner.is_some_and(|it| Some(&it.name) == own_name.as_ref()) {
                continue;
            }
            let what = Shadowed::Listener {
                is_udp: listener.transport == Transport::Udp,
                local: listener.local,
                at,
                inode: listener.inode,
            };
            let (socket, port) = (host::show(listener, owner), listener.local.port());
            seen.insert(
                what,
                format!(
                    "the socket {socket} is not reached at {at}: the rule {} takes its packets; keep the port with \
                     --except {port}, or have the server use another address",
                    rule.to_rule()
                ),
            );
        }
        Ok(seen)
    }

    /// Leaves the host's addresses to the host by rules of their own, or not, as the setting demands.
    async fn leave_addresses(&mut self, host: &Host) {
        // What was applied may still be taken back.
        if self.unconfirmed.is_some() {
            return;
        }
        let (change, wanted) = self.left_addresses(host);
        if change.is_empty() {
            self.shadow.left = wanted;
            return;
        }
        let list =
            |side: &[(Prefix, _)]| side.iter().map(|(prefix, _)| prefix.to_string()).collect::<Vec<_>>().join(", ");
        let (came, went) = (list(&change.added), list(&change.removed));
        match self.change(change, Keep::InMemory).await {
            Ok(_) => {
                self.shadow.left = wanted;
                info!("addresses left to the host (own-addresses): [{came}], no more: [{went}]");
            }
            Err(problem) => error!("leave addresses to the host (own-addresses): {}", problem.error),
        }
    }

    /// The rules that come and go for that, and which addresses are left.
    fn left_addresses(&mut self, host: &Host) -> (Change, BTreeSet<Prefix>) {
        let wanted: BTreeSet<Prefix> = match self.config().own_addresses {
            Winner::Rule => BTreeSet::new(),
            Winner::Host => inside(self.desired.rules(), host).map(|(address, ..)| Prefix::host(address)).collect(),
        };
        let terms = self.desired.shared(RuleSpec::left_to_host());
        let mut draft = Draft::of(self.desired.rules());
        for prefix in self.shadow.left.iter().filter(|it| !wanted.contains(it)) {
            draft.prefix(*prefix).remove_origin(Origin::Host);
        }
        for prefix in &wanted {
            let is_free = draft.of_prefix(prefix).is_none();
            if is_free {
                let rule = Rule { prefix: *prefix, terms: terms.clone(), origins: Origin::Host.into() };
                // There is nothing that it could contradict.
                let _ = draft.prefix(*prefix).insert(&rule);
            }
        }
        (draft.finish(), wanted)
    }
}

/// The addresses of interfaces that lie inside of a steered prefix and have no rule of their own, each with the prefix. Those of `lo`
/// are there for what is steered, as a rule.
fn inside<'a>(rules: &'a RuleSet, host: &'a Host) -> impl Iterator<Item = (IpAddr, &'a str, Prefix)> {
    host.addresses.iter().filter(|(_, interface)| interface != "lo").filter_map(|(address, interface)| {
        let own = Prefix::host(*address);
        let is_others = |it: &crate::rules::RuleEntry| it.origins != Origin::Host.into();
        let (prefix, _) = rules.around(own).find(|(_, rules)| rules.iter().any(is_others))?;
        (prefix != own).then_some((*address, interface.as_str(), prefix))
    })
}

/// Those of them that rules take.
fn addresses(rules: &RuleSet, host: &Host) -> BTreeMap<Shadowed, String> {
    let is_left = |address: IpAddr| rules.of_prefix(&Prefix::host(address)).is_some();
    let taken = inside(rules, host).filter(|(address, ..)| !is_left(*address));
    let texts = taken.map(|(address, interface, prefix)| {
        let text = format!(
            "the address {address} of {interface} is inside of the steered prefix {prefix}, whose rules take its packets; \
             own-addresses = \"host\" leaves it to the host, and a rule of its own says what becomes of it"
        );
        (Shadowed::Address { address, interface: interface.to_owned(), prefix }, text)
    });
    texts.collect()
}

/// The host's addresses of which rules say anything.
fn steered_addresses(rules: &RuleSet, host: &Host) -> BTreeSet<IpAddr> {
    let addresses = host.addresses.iter().map(|(address, _)| *address);
    addresses.filter(|address| rules.around(Prefix::host(*address)).next().is_some()).collect()
}

/// Where a rule takes packets from a listener, and which rule that is.
fn taken_from<'a>(
    rules: &'a RuleSet,
    listener: &'a Listener,
    own_addresses: &BTreeSet<IpAddr>,
) -> Option<(&'a Listener, IpAddr, RuleRef<'a>)> {
    let (transport, port) = (listener.transport, listener.local.port());
    let taken = |at: IpAddr| Some((listener, at, taking(rules, transport, at, port)?));
    match listener.local.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => own_addresses.iter().filter(|it| it.is_ipv4()).find_map(|it| taken(*it)),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => {
            let is_reached = |it: &&IpAddr| it.is_ipv6() || !listener.is_ipv6_only;
            own_addresses.iter().filter(is_reached).find_map(|it| taken(*it))
        }
        local => taken(local),
    }
}

/// The rule that steers packets to this address and port, of some clients at least.
fn taking(rules: &RuleSet, transport: Transport, at: IpAddr, port: u16) -> Option<RuleRef<'_>> {
    let around = rules.around(Prefix::host(at)).flat_map(|(prefix, rules)| rules.numbered(prefix));
    let mut about = around.filter(|rule| rule.terms.protocol.transports().contains(&transport));
    let decides = |rule: &RuleRef<'_>| match rule.terms.steers(port) {
        Some(true) => true,
        Some(false) => rule.terms.source.is_none(),
        None => false,
    };
    about.find(decides).filter(|rule| rule.terms.steers(port) == Some(true))
}

#[cfg(test)]
mod tests {
    use anyport_common::flow::Transport;

    use super::{Host, Listener, addresses, steered_addresses, taken_from};
    use crate::rules::{Origin, RuleSet, RuleSpec, RuleText};

    fn rules(rules: &[&str]) -> RuleSet {
        let mut set = RuleSet::default();
        for rule in rules {
            set.insert(&serde_json::from_str::<RuleText>(rule).unwrap().into_rule(Origin::Added)).unwrap();
        }
        set
    }

    fn host(addresses: &[(&str, &str)]) -> Host {
        let addresses =
            addresses.iter().map(|(address, interface)| (address.parse().unwrap(), (*interface).to_owned()));
        Host { addresses: addresses.collect(), ..Host::default() }
    }

    #[test]
    fn addresses_inside_of_wider_prefixes_are_taken() {
        let set =
            rules(&[r#"{"prefix": "192.0.2.0/24"}"#, r#"{"prefix": "192.0.2.7"}"#, r#"{"prefix": "2001:db8::/64"}"#]);
        let host = host(&[
            ("192.0.2.1", "eth0"),
            ("192.0.2.2", "lo"),
            ("192.0.2.7", "eth0"),
            ("198.51.100.1", "eth0"),
            ("2001:db8::1", "eth1"),
        ]);
        let found: Vec<String> = addresses(&set, &host).into_values().collect();
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("192.0.2.1 of eth0") && found[1].contains("2001:db8::1 of eth1"), "{found:?}");
    }

    #[test]
    fn a_rule_about_the_very_address_takes_the_place_of_the_host_s() {
        let mut set = rules(&[r#"{"prefix": "192.0.2.0/24"}"#]);
        let left = crate::rules::Rule {
            prefix: "192.0.2.1".parse().unwrap(),
            terms: RuleSpec::left_to_host().into(),
            origins: Origin::Host.into(),
        };
        assert!(left.terms.validate(&left.prefix).is_err(), "only the daemon makes rules that leave all to the host");
        set.insert(&left).unwrap();
        let host = host(&[("192.0.2.1", "eth0")]);
        assert!(addresses(&set, &host).is_empty());
        let own = serde_json::from_str::<RuleText>(r#"{"prefix": "192.0.2.1"}"#).unwrap().into_rule(Origin::Fleet);
        set.insert(&own).unwrap();
        let of_address = set.of_prefix(&left.prefix).unwrap();
        assert_eq!((of_address.len(), of_address.iter().next().unwrap().terms.clone()), (1, own.terms));
    }

    #[test]
    fn listeners_lose_what_rules_steer() {
        let set = rules(&[
            r#"{"prefix": "192.0.2.0/24", "except": "22"}"#,
            r#"{"prefix": "192.0.2.0/24", "ports": "25", "source": "198.51.100.0/24"}"#,
            r#"{"prefix": "2001:db8::/64", "protocol": "udp"}"#,
        ]);
        let host = host(&[("192.0.2.1", "eth0"), ("198.51.100.1", "eth0"), ("2001:db8::1", "eth0")]);
        let own = steered_addresses(&set, &host);
        for (transport, local, is_ipv6_only, taken_at) in [
            (Transport::Tcp, "0.0.0.0:80", false, Some("192.0.2.1")),
            (Transport::Tcp, "[::]:80", false, Some("192.0.2.1")),
            (Transport::Tcp, "[::]:80", true, None),
            (Transport::Udp, "[::]:80", true, Some("2001:db8::1")),
            (Transport::Udp, "0.0.0.0:80", false, None),
            (Transport::Tcp, "0.0.0.0:22", false, None),
            (Transport::Tcp, "192.0.2.200:25", false, Some("192.0.2.200")),
            (Transport::Tcp, "198.51.100.1:80", false, None),
            (Transport::Tcp, "127.0.0.1:80", false, None),
        ] {
            let local = local.parse().unwrap();
            let listener = Listener { transport, local, is_ipv6_only, inode: 1, cookie: 1, waiting: 0 };
            let taken = taken_from(&set, &listener, &own).map(|(_, at, _)| at.to_string());
            assert_eq!(taken.as_deref(), taken_at, "{transport:?} {local} {is_ipv6_only}");
        }
    }
}
