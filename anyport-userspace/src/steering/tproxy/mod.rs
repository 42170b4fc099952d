//! The back end without BPF: rules for iptables' TPROXY target, which assigns a socket to a packet before the kernel
//! looks one up.
//!
//! The tools of iptables do the work, so it comes out right in the nft flavour and in the legacy one. Our chains
//! stand in the table mangle; each change is one transaction a family.

mod lines;
mod nftables;
mod table;

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
};

use anyhow::{Context as _, anyhow};
use anyport_common::{flow::Transport, maps::Counters};

use self::{
    lines::{Family, Line},
    table::{RULES_CHAIN, Table},
};
use super::{BackEnd, NumberedRule, Plan, Steering};
use crate::host;

/// The TPROXY back end at work.
#[derive(Debug)]
pub struct Tproxy {
    v4: Chains,
    /// Or why IPv6 can't be steered here.
    v6: Result<Chains, String>,
    /// What was applied last.
    plan: Plan,
}

/// Our chains of one family, which are there only while there are rules.
#[derive(Debug)]
struct Chains {
    family: Family,
    table: Table,
    is_in_use: bool,
    /// The sockets of others that the guards name.
    waiting: Vec<SocketAddr>,
    /// What was counted before the chains were last replaced, which sets the kernel's counters to zero.
    counted: HashMap<u32, Counters>,
}

impl Tproxy {
    /// Tries out whether TPROXY works here, and removes what an earlier daemon left.
    ///
    /// # Errors
    /// What is missing for IPv4 and how to get it. IPv6 is asked for only when there are rules for it.
    pub fn open() -> anyhow::Result<Self> {
        let v4 = Chains::open(Family::V4)?;
        let v6 = Chains::open(Family::V6).map_err(|error| format!("{error:#}"));
        if let Err(error) = &v6 {
            tracing::warn!("tproxy can't steer IPv6: {error}");
        }
        Ok(Self { v4, v6, plan: Plan::default() })
    }

    fn chains(&self) -> impl Iterator<Item = &Chains> {
        std::iter::once(&self.v4).chain(&self.v6)
    }
}

impl Steering for Tproxy {
    fn back_end(&self) -> BackEnd {
        BackEnd::Tproxy
    }

    fn apply(&mut self, plan: &Plan) -> anyhow::Result<()> {
        let v4 = lines::lines(plan, Family::V4)?;
        let v6 = lines::lines(plan, Family::V6)?;
        // A number may be another rule's now, which begins at zero.
        let before: HashMap<_, _> = self.plan.rules.iter().map(|it| (it.number, &it.rule)).collect();
        let stays = |it: &&NumberedRule| before.get(&it.number).is_some_and(|rule| rule.says_the_same_as(&it.rule));
        let staying = plan.rules.iter().filter(stays).map(|it| it.number).collect();
        self.v4.apply(&v4, &staying)?;
        match &mut self.v6 {
            Ok(chains) => chains.apply(&v6, &staying)?,
            Err(_) if v6.is_empty() => {}
            Err(error) => return Err(anyhow!("rules for IPv6: {error}")),
        }
        self.plan.clone_from(plan);
        Ok(())
    }

    /// Steers past the UDP sockets of others that have come since.
    fn refresh(&mut self) -> anyhow::Result<()> {
        let mut is_new = false;
        for chains in self.chains() {
            let lines = lines::lines(&self.plan, chains.family)?;
            is_new |= waiting_sockets(&lines)? != chains.waiting;
        }
        if is_new { self.apply(&self.plan.clone()) } else { Ok(()) }
    }

    fn degraded(&self) -> Vec<String> {
        self.v6.as_ref().err().map(|error| format!("tproxy can't steer IPv6: {error}")).into_iter().collect()
    }

    fn counters(&self) -> anyhow::Result<HashMap<u32, Counters>> {
        let mut counters = HashMap::new();
        for chains in self.chains() {
            counters.extend(chains.counters()?);
        }
        Ok(counters)
    }

    fn detach(self: Box<Self>) -> anyhow::Result<()> {
        // Both families are tried, whatever becomes of the first.
        let removals: Vec<_> =
            self.chains().map(|it| it.table.save().and_then(|saved| it.table.remove(&saved))).collect();
        removals.into_iter().collect()
    }
}

/// Removes the chains of an earlier daemon, for those who steer by another back end. Quick and silent where there
/// is no iptables.
pub fn remove_leftovers() -> anyhow::Result<()> {
    for family in [Family::V4, Family::V6] {
        let Some(table) = Table::find(family)? else { continue };
        match table.save() {
            Ok(saved) => table.remove(&saved).context("removing what an earlier daemon left in iptables")?,
            // Where iptables does not work, none of ours came to be. That must not keep another back end from work.
            Err(error) => tracing::debug!("looking for leftovers in iptables: {error:#}"),
        }
    }
    Ok(())
}

impl Chains {
    fn open(family: Family) -> anyhow::Result<Self> {
        let (tools, name) = match family {
            Family::V4 => ("iptables-restore and iptables-save", "IPv4"),
            Family::V6 => ("ip6tables-restore and ip6tables-save", "IPv6"),
        };
        let table =
            Table::find(family)?.with_context(|| format!("{tools} are not in PATH; `apt-get install iptables`"))?;
        table.save().and_then(|saved| table.remove(&saved)).and_then(|()| table.probe()).with_context(|| {
            format!(
                "trying out TPROXY for {name}; it needs CAP_NET_ADMIN, CAP_NET_RAW and the kernel modules of \
                 `modprobe -a xt_TPROXY xt_socket xt_multiport xt_comment`"
            )
        })?;
        Ok(Self { family, table, is_in_use: false, waiting: Vec::new(), counted: HashMap::new() })
    }

    /// Makes the chains consist of these lines. Counts go on for the rules that stay.
    fn apply(&mut self, lines: &[Line], staying: &HashSet<u32>) -> anyhow::Result<()> {
        let saved = self.table.save()?;
        let waiting = waiting_sockets(lines)?;
        let mut counted = self.count_on(&saved);
        counted.retain(|number, _| staying.contains(number));
        if lines.is_empty() {
            self.table.remove(&saved)
        } else {
            let rules: Vec<_> = lines.iter().map(ToString::to_string).collect();
            let guards = lines::guards(lines, &waiting, RULES_CHAIN);
            self.table.replace(&saved, &guards, &rules)
        }
        .with_context(|| format!("handing {} lines for {:?} to iptables", lines.len(), self.family))?;
        self.is_in_use = !lines.is_empty();
        self.waiting = waiting;
        self.counted = counted;
        Ok(())
    }

    fn counters(&self) -> anyhow::Result<HashMap<u32, Counters>> {
        Ok(if self.is_in_use { self.count_on(&self.table.save()?) } else { HashMap::new() })
    }

    /// What was counted up to now, given what the table shows.
    fn count_on(&self, saved: &str) -> HashMap<u32, Counters> {
        let mut counters = self.counted.clone();
        for (rule, since) in table::counters(saved) {
            let counters = counters.entry(rule).or_default();
            counters.steered += since.steered;
            counters.no_socket += since.no_socket;
        }
        counters
    }
}

/// The unconnected UDP sockets of others that stand at an address that is steered.
fn waiting_sockets(lines: &[Line]) -> anyhow::Result<Vec<SocketAddr>> {
    let mut sockets: Vec<_> = host::listeners()?
        .into_iter()
        .filter(|listener| listener.transport == Transport::Udp)
        .filter(|listener| lines.iter().any(|line| line.steers_udp_at(listener.local.ip())))
        .collect();
    if !sockets.is_empty() {
        let own = host::own_inodes();
        sockets.retain(|listener| !own.contains(&listener.inode));
    }
    let mut addresses: Vec<_> = sockets.into_iter().map(|listener| listener.local).collect();
    addresses.sort_unstable();
    addresses.dedup();
    Ok(addresses)
}

#[cfg(test)]
mod tests;
