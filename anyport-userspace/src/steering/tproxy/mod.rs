//! The back end without BPF: rules for iptables' TPROXY target, which assigns a socket to a packet before the kernel
//! looks one up.
//!
//! The tools of iptables do the work, so it comes out right in the nft flavour and in the legacy one. Our chains
//! stand in the table mangle, and one that refuses in the table filter; each change is one transaction a family.
//! Where there are many prefixes of which the same is said, a set of the tool `ipset` stands in the place of a line
//! for each.

mod chain_rules;
mod chains;
mod change;
mod counted;
mod explain;
mod groups;
mod ip_table;
mod mangle_table;
mod nftables;
mod refusal;
mod sets;
mod tool;

use std::ops::Range;

use anyhow::{Context as _, anyhow};
use anyport_common::{flow::Flow, maps::Counters};

use self::{
    chain_rules::{Family, LineTarget},
    chains::Chains,
    counted::Counted,
    explain::Live,
    ip_table::IpTable,
    mangle_table::MANGLE,
};
use super::{BackEnd, Decided, Drift, Fate, Plan, Steering};
use crate::rules::{Change, Prefix, RuleSet, RuleView};

/// Up to here a change is always carried out as such; a larger one only if it leaves more as it is than it changes.
const SMALL: usize = 1024;

/// The TPROXY back end at work.
#[derive(Debug)]
pub struct Tproxy {
    v4: Chains,
    /// Or why IPv6 can't be steered here.
    v6: Result<Chains, String>,
    /// The rules of the plan that was applied last.
    rules: RuleSet,
    /// Whether the kernel holds these rules, and not those of a plan that failed half-way.
    is_in_force: bool,
}

impl Tproxy {
    /// Tries out whether TPROXY works here. What an earlier daemon left is active until the first plan.
    ///
    /// # Errors
    /// What is missing for IPv4 and how to get it. IPv6 is asked for only when there are rules for it.
    pub fn open() -> anyhow::Result<Self> {
        let v4 = Chains::open(Family::V4)?;
        let v6 = Chains::open(Family::V6).map_err(|error| format!("{error:#}"));
        if let Err(error) = &v6 {
            tracing::warn!("tproxy can't steer IPv6: {error}");
        }
        Ok(Self { v4, v6, rules: RuleSet::default(), is_in_force: false })
    }

    fn chains(&self) -> impl Iterator<Item = &Chains> {
        std::iter::once(&self.v4).chain(&self.v6)
    }

    fn put_in_force(&mut self, plan: &Plan<'_>, changed: Option<&[Prefix]>) -> anyhow::Result<()> {
        self.v4.apply(plan, &self.rules, changed)?;
        match &mut self.v6 {
            Ok(chains) => chains.apply(plan, &self.rules, changed),
            Err(_) if plan.rules.within(Family::V6.everything()).next().is_none() => Ok(()),
            Err(error) => Err(anyhow!("rules for IPv6: {error}")),
        }
    }
}

impl Steering for Tproxy {
    fn back_end(&self) -> BackEnd {
        BackEnd::Tproxy
    }

    fn apply(&mut self, plan: &Plan<'_>) -> anyhow::Result<()> {
        let limit = SMALL.max(plan.rules.prefix_count() / 2);
        let changed = plan.changed.filter(|changed| self.is_in_force && changed.len() <= limit);
        self.is_in_force = false;
        self.put_in_force(plan, changed)?;
        match changed {
            Some(changed) => self.rules.apply(&difference(&self.rules, plan.rules, changed)),
            None => self.rules = plan.rules.to_set(),
        }
        self.is_in_force = true;
        Ok(())
    }

    fn refresh(&mut self) -> anyhow::Result<Vec<Drift>> {
        if self.is_in_force {
            for chains in std::iter::once(&mut self.v4).chain(&mut self.v6) {
                chains.refresh(&self.rules)?;
            }
        }
        Ok(Vec::new())
    }

    fn lost(&mut self) -> anyhow::Result<Vec<Drift>> {
        let mut lost = Vec::new();
        if self.is_in_force {
            for chains in std::iter::once(&mut self.v4).chain(&mut self.v6) {
                lost.extend(chains.lost()?);
            }
        }
        Ok(lost)
    }

    fn forget_lost(&mut self) -> anyhow::Result<()> {
        std::iter::once(&mut self.v4).chain(&mut self.v6).try_for_each(Chains::forget_lost)
    }

    fn unrepaired(&self) -> Option<&str> {
        None
    }

    fn degraded(&self) -> Vec<String> {
        let of_v6 = self.v6.as_ref().err().map(|error| format!("tproxy can't steer IPv6: {error}"));
        of_v6.into_iter().chain(self.chains().filter_map(Chains::cannot_refuse)).collect()
    }

    fn counters(&self) -> anyhow::Result<Box<dyn Fn(u32) -> Counters + '_>> {
        let mut counted = Counted::default();
        for chains in self.chains() {
            counted.add_all(&chains.counted(&self.rules)?);
        }
        Ok(Box::new(move |number| counted.rules.get(&number).copied().unwrap_or_default()))
    }

    fn left(&self, numbers: &[Range<u32>]) -> Vec<(u32, Counters)> {
        let mut counted = Counted::default();
        self.chains().for_each(|chains| counted.add_all(chains.counted_before()));
        let all = numbers.iter().cloned().flatten();
        all.filter_map(|number| Some((number, *counted.rules.get(&number)?))).collect()
    }

    fn can_adopt(&self, _cookie: u64) -> bool {
        // Sockets are looked for by their addresses, and stay transparent.
        true
    }

    fn unmatched(&self) -> anyhow::Result<u64> {
        self.chains().map(|chains| Ok(chains.counted_by_lines()?.unmatched)).sum()
    }

    fn restore_counters(&mut self, counted: &[(u32, Counters)]) -> anyhow::Result<()> {
        for (number, counters) in counted {
            self.v4.restore_counters(*number, counters);
        }
        Ok(())
    }

    fn decide(&self, flow: &Flow) -> anyhow::Result<Decided> {
        let Live { verdict, rule } = self.decide_live(flow)?;
        let (fate, bound) = match verdict {
            Some(LineTarget::Tproxy(bound)) => (Fate::Steer, Some(bound)),
            Some(LineTarget::Return) => (Fate::Host, None),
            Some(LineTarget::Drop | LineTarget::Refuse(_)) => (Fate::Drop, None),
            None => (Fate::Unmatched, None),
        };
        Ok(Decided { fate, rule, cookie: None, bound, generation: None })
    }

    /// What the lines take is not known.
    fn bytes(&self) -> u64 {
        self.chains().map(Chains::bytes).sum()
    }

    /// Nothing in the kernel goes with this process.
    fn leave(self: Box<Self>) {}

    fn detach(self: Box<Self>) -> anyhow::Result<()> {
        // Both families are tried, whatever becomes of the first.
        let Self { mut v4, v6, .. } = *self;
        let removals = [v4.remove(), v6.map_or(Ok(()), |mut v6| v6.remove())];
        removals.into_iter().collect()
    }
}

/// Finds out whether TPROXY works here for IPv4, and leaves nothing behind.
///
/// # Errors
/// What is missing and how to get it.
pub fn try_out() -> anyhow::Result<()> {
    Chains::open(Family::V4).map(drop)
}

/// From the rules of one plan to those of the next, which differ in these prefixes.
fn difference(before: &RuleSet, after: RuleView<'_>, changed: &[Prefix]) -> Change {
    let of = |rules: RuleView<'_>| {
        let some = changed.iter().filter_map(|prefix| Some((*prefix, rules.of_prefix(prefix)?.clone())));
        some.collect()
    };
    Change { removed: of(before.view()), added: of(after) }
}

/// Removes the chains and sets of an earlier daemon, for those who steer by another back end. Quick and silent where
/// there is no iptables.
pub fn remove_leftovers() -> anyhow::Result<()> {
    for family in [Family::V4, Family::V6] {
        let Some(table) = IpTable::find(family, &MANGLE)? else { continue };
        match table.save() {
            Ok(saved) => {
                chains::remove(&table, &saved, family)
                    .and_then(|()| refusal::remove_leftovers(family))
                    .context("removing what an earlier daemon left in iptables")?;
            }
            // Where iptables does not work, none of ours came to be. That must not keep another back end from work.
            Err(error) => tracing::debug!("looking for leftovers in iptables: {error:#}"),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
