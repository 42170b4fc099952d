//! Whether rules would cut the host off, or take from it what it serves itself.

use std::{collections::BTreeSet, net::IpAddr};

use super::Engine;
use crate::{
    api::{Applied, Problem, ProblemKind},
    host::{self, Peer, Role},
    rules::{Change, Origin, Origins, Prefix, PrefixRules, Rule, are_most_gone, special},
};

/// Up to so many rules may all go at once.
const FEW: usize = 10;

impl Engine {
    /// Why a change would cut the host off, or take from it what it serves itself; nothing if it does neither.
    pub(super) async fn objections(&self, change: &Change) -> anyhow::Result<Vec<String>> {
        let mut host = self.kernel.host().await?;
        let own: BTreeSet<IpAddr> = host.addresses.iter().map(|(address, _)| *address).collect();
        // Only a new local route keeps from others what this host sends them. To list connections takes tens of milliseconds.
        if change.added.iter().any(|(prefix, rules)| rules.is_routed() && !self.kernel.covers(prefix)) {
            // What is steered to this host already is not cut off by more of the same.
            let is_in_reach = |address| !self.kernel.covers(&Prefix::host(address));
            host.peers = host::peers(&own, &is_in_reach)?;
            host.peers.extend(self.needed().filter(|peer| is_in_reach(peer.address)));
        }
        let peers = host.peers.iter().map(|peer| peer.address);
        let addresses = own.iter().copied().chain(host.gateways.iter().copied()).chain(peers).collect();
        let concerned = concerned(change, &addresses);
        // Listing the listening sockets is expensive, and only matters where an address of the host is concerned.
        if !concerned.is_empty() {
            host.listeners = host::listeners()?;
        }
        Ok(host::objections(&concerned, &host))
    }

    /// Refuses what would cut the host off, or take from it what it serves itself.
    pub(super) async fn expect_safe(&self, change: &Change) -> Result<(), Problem> {
        let objections = self.objections(change).await?;
        if objections.is_empty() {
            return Ok(());
        }
        Err(Problem::new(ProblemKind::Unsafe, format!("refused for safety: {}", objections.join("; ")))
            .hint("--force does it anyway"))
    }

    /// Refuses what takes most rules of these origins away, as a file does that is empty or cut off. A dry run notes that.
    pub(super) fn expect_most_stay(
        &self,
        change: &Change,
        origins: &[Origin],
        answer: &mut Applied,
    ) -> Result<(), Problem> {
        let is_meant = |origins_of: Origins| origins.iter().any(|it| origins_of.contains(*it));
        let count = |rules: &[(Prefix, PrefixRules)]| {
            rules.iter().flat_map(|(_, rules)| rules).filter(|it| is_meant(it.origins)).count()
        };
        let (gone, come) = (count(&change.removed), count(&change.added));
        if come >= gone {
            return Ok(());
        }
        let before = self.desired.rules().iter().filter(|it| is_meant(it.origins)).count();
        let after = before + come - gone;
        if before <= FEW || !are_most_gone(before, after) {
            return Ok(());
        }
        let why = format!("refused for safety: of {before} rules only {after} would be left");
        if answer.dry_run {
            answer.notes.push(format!("without --force this is {why}"));
            return Ok(());
        }
        Err(Problem::new(ProblemKind::Unsafe, why).hint("--dry-run shows the difference, and --force goes on"))
    }

    /// What the daemon itself is configured to reach.
    fn needed(&self) -> impl Iterator<Item = Peer> {
        let etcd = self.config().fleet_view().map(|fleet| fleet.etcd).unwrap_or_default();
        let etcd = etcd.into_iter().filter_map(|url| {
            let address = url.parse::<hyper::Uri>().ok()?.host()?.trim_matches(['[', ']']).parse().ok()?;
            Some(Peer { address, role: Role::Needed("etcd at".to_owned()) })
        });
        let upstreams = self.services.configs().flat_map(|service| {
            let role = Role::Needed(format!("the upstream of the service {}", service.name));
            service.upstream_addresses().map(move |address| Peer { address, role: role.clone() })
        });
        upstreams.chain(etcd)
    }
}

/// The new rules whose prefixes contain one of these addresses, or everything, or addresses that any host needs.
fn concerned(change: &Change, addresses: &BTreeSet<IpAddr>) -> Vec<Rule> {
    let lens: BTreeSet<(bool, u8)> = change.added.iter().map(|(prefix, _)| (prefix.is_ipv4(), prefix.len())).collect();
    let around = addresses.iter().copied().map(Prefix::host).flat_map(|host| {
        let lens = lens.iter().filter(move |(is_ipv4, _)| *is_ipv4 == host.is_ipv4());
        lens.map(move |(_, len)| host.truncated(*len))
    });
    let everything = [true, false].map(|is_ipv4| Prefix::from_bits(is_ipv4, 0, 0));
    let needed = change.added.iter().map(|(prefix, _)| *prefix).filter(|it| !special::broken(it, true).is_empty());
    let prefixes: BTreeSet<Prefix> = around.chain(everything).chain(needed).collect();
    let mut concerned = Vec::new();
    for prefix in prefixes {
        let Some(added) = rules_of(&change.added, prefix) else { continue };
        let before = rules_of(&change.removed, prefix);
        for rule in added.numbered(prefix) {
            if !before.is_some_and(|before| before.iter().any(|held| held.terms == *rule.terms)) {
                concerned.push(rule.to_rule());
            }
        }
    }
    concerned
}

fn rules_of(changed: &[(Prefix, PrefixRules)], prefix: Prefix) -> Option<&PrefixRules> {
    changed.binary_search_by_key(&prefix, |(it, _)| *it).ok().map(|at| &changed[at].1)
}
