//! Others that the host talks to, and that a local route of ours keeps it from: what it sends there stays here.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
};

use super::{Engine, MOST, Shadowed};
use crate::{
    host::{self, Peer, Role, show_peer},
    rules::{Prefix, RuleSet},
};

impl Engine {
    /// Those of them whose packets stay here by now.
    pub(super) async fn see_peers(&self) -> anyhow::Result<BTreeMap<Shadowed, String>> {
        let own: BTreeSet<IpAddr> = host::addresses()?.into_iter().map(|(address, _)| address).collect();
        let inside = self.kernel.peers_inside(&own).await?;
        let mut cut_off = Vec::new();
        for (what, (peer, prefix)) in meant(self.desired.rules(), inside).into_iter().take(MOST) {
            // A route of its own may lead there all the same.
            if self.kernel.route_to(peer.address).await?.is_some_and(|route| route.is_local) {
                cut_off.push((what, peer, prefix));
            }
        }
        let known: BTreeSet<&Shadowed> = self.shadow.peers.all().collect();
        let new = cut_off.iter().filter(|(what, ..)| !known.contains(what));
        let sockets: HashSet<u64> = new.filter_map(|(_, peer, _)| connection_of(peer)).collect();
        let owners = host::owners(&sockets);
        let texts = cut_off.into_iter().map(|(what, peer, prefix)| {
            let by = match &peer.role {
                Role::Neighbour { interface, .. } => format!("dev {interface}"),
                _ => "via ROUTER dev INTERFACE".to_owned(),
            };
            let text = format!(
                "{} is inside of the steered prefix {prefix}: what this host sends there stays here; leave it out of \
                 what is steered, or give it a route of its own: ip route add {} {by} table local",
                show_peer(&peer, &owners),
                peer.address
            );
            (what, text)
        });
        Ok(texts.collect())
    }
}

/// The socket of a connection.
fn connection_of(peer: &Peer) -> Option<u64> {
    match &peer.role {
        Role::Connected(connection) => Some(connection.inode),
        _ => None,
    }
}

/// Those that nobody can have meant to cut off, each with the prefix that does it: a rule about the very address is meant.
fn meant(rules: &RuleSet, peers: Vec<Peer>) -> BTreeMap<Shadowed, (Peer, Prefix)> {
    let inside = peers.into_iter().filter_map(|peer| {
        // What is stale has not been heard of since it was cut off, and all hosts of a network have a route of their own.
        if matches!(peer.role, Role::Neighbour { is_stale: true, .. } | Role::Broadcast(_)) {
            return None;
        }
        let own = Prefix::host(peer.address);
        let (prefix, _) = rules.around(own).find(|(prefix, rules)| *prefix == own || rules.is_routed())?;
        let role = show_peer(&peer, &HashMap::new());
        (prefix != own).then_some((Shadowed::Peer { address: peer.address, role }, (peer, prefix)))
    });
    inside.collect()
}

#[cfg(test)]
mod tests {
    use super::{Peer, Role, RuleSet, Shadowed, meant};
    use crate::rules::{Origin, RuleText};

    #[test]
    fn what_was_meant_is_not_told() {
        let mut rules = RuleSet::default();
        for rule in [
            r#"{"prefix": "192.0.2.0/24"}"#,
            r#"{"prefix": "192.0.2.7"}"#,
            r#"{"prefix": "192.0.2.128/25", "route": false}"#,
        ] {
            rules.insert(&serde_json::from_str::<RuleText>(rule).unwrap().into_rule(Origin::Added)).unwrap();
        }
        let neighbour = |is_stale| Role::Neighbour { interface: "eth0".into(), is_stale };
        let peers = [
            ("192.0.2.1", Role::Gateway),
            ("192.0.2.7", Role::Resolver),
            ("192.0.2.129", neighbour(false)),
            ("192.0.2.130", neighbour(true)),
            ("192.0.2.255", Role::Broadcast("eth0".into())),
            ("198.51.100.1", Role::Gateway),
        ];
        let peers = peers.map(|(address, role)| Peer { address: address.parse().unwrap(), role });
        let told = meant(&rules, peers.to_vec());
        let told: Vec<(String, String)> = told
            .into_iter()
            .map(|(what, (_, prefix))| {
                let Shadowed::Peer { role, .. } = what else { panic!("{what:?}") };
                (role, prefix.to_string())
            })
            .collect();
        let expected =
            [("the gateway 192.0.2.1", "192.0.2.0/24"), ("the neighbour 192.0.2.129 on eth0", "192.0.2.0/24")];
        assert_eq!(told, expected.map(|(role, prefix)| (role.to_owned(), prefix.to_owned())));
    }
}
