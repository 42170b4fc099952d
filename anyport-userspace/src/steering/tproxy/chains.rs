//! Our chains and sets of one family.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use anyport_common::{flow::Transport, maps::Counters};

use super::{
    chain_rules::{self, Family},
    change::{self, Element, State, Step, Target, Way},
    counted::Counted,
    groups::{FEW, Key, Prefixes, Sockets, number},
    ip_table::IpTable,
    mangle_table::{self, MANGLE, RULES_CHAIN, Shown},
    nftables,
    refusal::Refusal,
    sets::{self, Sets},
};
use crate::{
    host,
    rules::{Prefix, RuleSet, RuleView},
    steering::{Drift, ObjectKind, Plan},
    sys,
};

/// How often the legacy tables are checked, which takes a tool.
const LEGACY_INTERVAL: Duration = Duration::from_secs(4);

/// As many lines as iptables replaces in a second or so. A packet that none of them matches passes all of them.
const MAX_LINES: usize = 16_384;

/// The chains and sets of one family, which are there only while there are rules.
#[derive(Debug)]
pub(super) struct Chains {
    pub(super) family: Family,
    pub(super) table: IpTable,
    /// Or why what has no live socket is dropped and not refused.
    refusal: Result<Refusal, String>,
    sets: Sets,
    /// What the kernel holds, unless something failed half-way.
    pub(super) state: State,
    is_state_certain: bool,
    /// What was counted by lines and sets that are gone.
    counted: Counted,
    /// Whether what the kernel holds may be of an earlier daemon, who had other numbers for its rules.
    is_inherited: bool,
    look: Look,
}

/// What is known of our lines in the kernel since they were written.
#[derive(Debug, Default)]
struct Look {
    /// How many guards and lines of rules were written.
    written: (usize, usize),
    /// What the table showed at the first check.
    shown: Option<Shown>,
    /// What was lost at the last one.
    lost: Vec<Drift>,
    /// When `nf_tables` had which generation.
    generation: Option<u32>,
    at: Option<Instant>,
}

impl Chains {
    /// Tries out whether TPROXY works here. What an earlier daemon left is active until the first plan.
    pub(super) fn open(family: Family) -> anyhow::Result<Self> {
        let (tools, name) = match family {
            Family::V4 => ("iptables-restore and iptables-save", "IPv4"),
            Family::V6 => ("ip6tables-restore and ip6tables-save", "IPv6"),
        };
        let table = IpTable::find(family, &MANGLE)?
            .with_context(|| format!("{tools} are not in PATH; `apt-get install iptables`"))?;
        table.probe().with_context(|| {
            format!(
                "trying out TPROXY for {name}; it needs CAP_NET_ADMIN, CAP_NET_RAW and the kernel modules of \
                 `modprobe -a xt_TPROXY xt_socket xt_multiport xt_comment`"
            )
        })?;
        let sets = Sets::new(family, &sets::names(family)?);
        let (state, counted) = (State::default(), Counted::default());
        let refusal = Refusal::open(family).map_err(|error| format!("{error:#}"));
        Ok(Self {
            family,
            table,
            refusal,
            sets,
            state,
            is_state_certain: false,
            counted,
            is_inherited: true,
            look: Look::default(),
        })
    }

    /// Makes the kernel steer by a plan. `previous` are the rules of the previous plan, from which this one differs only in
    /// the prefixes `changed`; nothing if that is not known. Counts go on for the rules that stay.
    pub(super) fn apply(
        &mut self,
        plan: &Plan<'_>,
        previous: &RuleSet,
        changed: Option<&[Prefix]>,
    ) -> anyhow::Result<()> {
        self.sets.sweep();
        let changed = changed.filter(|_| self.is_state_certain);
        let mut way = self.way(plan, previous, changed, FEW)?;
        let mut limit = "prefixes of one length of which the same is said share a line".to_owned();
        if way.steps.iter().any(|step| matches!(step, Step::Make(_)))
            && let Err(error) = self.sets.try_out(&self.table)
        {
            tracing::debug!("a line for each prefix: {error:#}");
            limit = format!("{error:#}");
            way = self.way(plan, previous, changed, usize::MAX)?;
        }
        if let Some(Step::Lines { lines, .. }) = way.steps.last()
            && lines.len() > MAX_LINES
        {
            bail!("these rules take {} lines of iptables, and {MAX_LINES} is the limit; {limit}", lines.len());
        }
        self.go(way, previous, plan).with_context(|| format!("handing rules for {:?} to iptables", self.family))
    }

    fn way(
        &mut self,
        plan: &Plan<'_>,
        previous: &RuleSet,
        changed: Option<&[Prefix]>,
        few: usize,
    ) -> anyhow::Result<Way> {
        let Self { family, sets, state, refusal, .. } = self;
        let refusal = refusal.as_ref().ok().map(|it| it.at);
        let target = Target {
            family: *family,
            few,
            rules: plan.rules,
            sockets: Sockets::of(plan.services, *family, refusal),
            waiting: waiting_sockets(plan.rules, *family)?,
        };
        if let Some(changed) = changed
            && let Some(way) = change::from_state(state, previous, changed, &target, || sets.new_name())?
        {
            return Ok(way);
        }
        change::from_anything(target, || sets.new_name())
    }

    /// Steers past the UDP sockets of others that have come since.
    pub(super) fn refresh(&mut self, rules: &RuleSet) -> anyhow::Result<()> {
        self.sets.sweep();
        let waiting = waiting_sockets(rules.view(), self.family)?;
        if waiting == self.state.waiting || !self.is_state_certain {
            return Ok(());
        }
        self.replace_lines(&chain_rules::lines(&self.state.groups, rules.view()), &waiting)?;
        self.state.waiting = waiting;
        Ok(())
    }

    /// What of our chains and sets others have changed.
    pub(super) fn lost(&mut self) -> anyhow::Result<Vec<Drift>> {
        if !self.is_state_certain || self.state.groups.is_empty() {
            return Ok(Vec::new());
        }
        let mut lost = self.lost_lines()?;
        for group in self.state.groups.values() {
            let Prefixes::Set { name, len } = &group.prefixes else { continue };
            let there = nftables::set_len(name).with_context(|| format!("look at the set {name}"))?;
            if there.map(|there| there as usize) != Some(*len) {
                let there = there.map_or_else(|| "none".to_owned(), |there| there.to_string());
                lost.push(Drift::new(
                    ObjectKind::Set,
                    format!("what was in the set {name} ({there} of {len} prefixes are there)"),
                ));
            }
        }
        Ok(lost)
    }

    /// Has the next plan rebuild everything if something is lost.
    pub(super) fn forget_lost(&mut self) -> anyhow::Result<()> {
        if !self.lost()?.is_empty() {
            self.is_state_certain = false;
            if let Ok(refusal) = &mut self.refusal {
                refusal.forget();
            }
        }
        Ok(())
    }

    /// Shows the table only if anything may have changed: `nf_tables` numbers its changes; the legacy tables do not.
    fn lost_lines(&mut self) -> anyhow::Result<Vec<Drift>> {
        let generation = if self.table.is_legacy {
            None
        } else {
            Some(nftables::generation().context("ask nf_tables for its generation")?)
        };
        let is_known = match generation {
            None => self.look.at.is_some_and(|at| at.elapsed() < LEGACY_INTERVAL),
            known => self.look.generation == known,
        };
        if is_known {
            return Ok(self.look.lost.clone());
        }
        let now = Shown::of(&self.table.save()?);
        let (guards, rules) = self.look.written;
        let is_first = self.look.shown.is_none();
        let shown = *self.look.shown.get_or_insert(now);
        let mut changed = shown.changed(&now);
        if is_first && !now.is_complete(guards, rules) {
            changed.push("a part of the chains".to_owned());
            self.look.shown = None;
        }
        let family = self.family;
        let of_mangle = changed.into_iter().map(|what| format!("{what} of {family:?} in the table mangle"));
        let of_filter = self.refusal.as_ref().map_or(Ok(None), Refusal::lost)?;
        self.look.lost = of_mangle.chain(of_filter).map(|what| Drift::new(ObjectKind::Chain, what)).collect();
        self.look.generation = generation;
        self.look.at = Some(Instant::now());
        Ok(self.look.lost.clone())
    }

    fn go(&mut self, way: Way, previous: &RuleSet, plan: &Plan<'_>) -> anyhow::Result<()> {
        let Way { steps, end, is_anew } = way;
        self.is_state_certain = false;
        let mut made = Vec::new();
        let mut is_renumbered = false;
        for step in steps {
            let done = match step {
                Step::Make(sets) => {
                    let done = self.sets.make(&sets);
                    made.extend(sets.into_iter().map(|(name, _)| name));
                    done
                }
                Step::Lines { lines, waiting } => self.replace_lines(&lines, &waiting).map(|()| {
                    // What is counted from now on is counted under the new numbers.
                    if !is_renumbered {
                        self.renumber(is_anew, previous, plan);
                        is_renumbered = true;
                    }
                }),
                Step::Elements { added, removed } => {
                    let moved = if is_renumbered { plan.moved } else { &[] };
                    self.note_counts_of(&removed, previous, moved);
                    Sets::change(&added, &removed)
                }
                Step::Wait => {
                    // Lines are gone through under RCU's read lock, as BPF programs are.
                    sys::wait_for_running_programs();
                    Ok(())
                }
            };
            if let Err(error) = done {
                // The kernel does not destroy those that lines name by now.
                self.sets.discard(made);
                return Err(error);
            }
        }
        if !is_renumbered {
            self.renumber(is_anew, previous, plan);
        }
        let gone: Vec<_> = if is_anew {
            // Some may be left of changes that failed half-way.
            sets::names(self.family)?
        } else {
            self.state.sets().map(|(_, set)| set.to_owned()).collect()
        };
        let staying: HashSet<_> = end.sets().map(|(_, set)| set).collect();
        self.sets.discard(gone.into_iter().filter(|set| !staying.contains(set.as_str())));
        self.state = end;
        self.is_state_certain = true;
        Ok(())
    }

    /// Puts these lines in the place of those that are there, and remembers what those had counted.
    fn replace_lines(&mut self, lines: &[chain_rules::ChainRule], waiting: &[SocketAddr]) -> anyhow::Result<()> {
        let saved = self.table.save()?;
        self.look = Look::default();
        if lines.is_empty() {
            self.table.remove(&saved)?;
            self.refusal.as_mut().map_or(Ok(()), Refusal::remove)?;
        } else {
            self.refusal.as_mut().map_or(Ok(()), Refusal::put_in_place)?;
            let rules: Vec<_> = lines.iter().map(ToString::to_string).collect();
            let guards = chain_rules::guards(lines, waiting, RULES_CHAIN);
            self.table.replace(&saved, &guards, &rules)?;
            self.look.written = (guards.len(), rules.len());
        }
        if !std::mem::take(&mut self.is_inherited) {
            self.counted.add_all(&mangle_table::counted(&saved));
        }
        Ok(())
    }

    /// Takes over what elements have counted that are about to go from their sets. The rules are numbered as before, but for those
    /// that are moved.
    fn note_counts_of(&mut self, elements: &[Element], rules: &RuleSet, moved: &[(u32, u32)]) {
        if elements.is_empty() {
            return;
        }
        let elements: HashSet<_> = elements.iter().map(|it| (it.set.as_str(), it.prefix)).collect();
        let sets: BTreeSet<_> = elements.iter().map(|(set, _)| *set).collect();
        let keys: HashMap<_, _> =
            self.state.sets().filter(|(_, set)| sets.contains(set)).map(|(key, set)| (set, key)).collect();
        let moved: HashMap<u32, u32> = moved.iter().copied().collect();
        match sets::counts(&sets.into_iter().collect::<Vec<_>>()) {
            Ok(counts) => {
                for (set, prefix, packets) in counts {
                    if elements.contains(&(set.as_str(), prefix))
                        && let Some(key) = keys.get(set.as_str())
                        && let Some(number) = number(rules.view(), prefix, key)
                    {
                        self.counted.add(moved.get(&number).copied().unwrap_or(number), key.effect, packets);
                    }
                }
            }
            Err(error) => tracing::warn!("what was counted of late is lost: {error:#}"),
        }
    }

    /// Takes over what sets have counted that are about to go, and then the new numbers.
    fn renumber(&mut self, is_anew: bool, previous: &RuleSet, plan: &Plan<'_>) {
        if is_anew {
            match self.counted_by_sets(previous) {
                Ok(counted) => self.counted.add_all(&counted),
                Err(error) => tracing::warn!("what was counted of late is lost: {error:#}"),
            }
        }
        self.counted.renumber(plan);
    }

    fn counted_by_sets(&self, rules: &RuleSet) -> anyhow::Result<Counted> {
        let keys: HashMap<_, _> = self.state.sets().map(|(key, set)| (set, key)).collect();
        let mut counted = Counted::default();
        for (set, prefix, packets) in sets::counts(&keys.keys().copied().collect::<Vec<_>>())? {
            if let Some(key) = keys.get(set.as_str())
                && let Some(number) = number(rules.view(), prefix, key)
            {
                counted.add(number, key.effect, packets);
            }
        }
        Ok(counted)
    }

    /// All that was counted up to now.
    pub(super) fn counted(&self, rules: &RuleSet) -> anyhow::Result<Counted> {
        let mut counted = self.counted_by_lines()?;
        counted.add_all(&self.counted_by_sets(rules)?);
        Ok(counted)
    }

    /// What was counted by lines and sets that are gone.
    pub(super) fn counted_before(&self) -> &Counted {
        &self.counted
    }

    /// All that was counted up to now but for what the sets of the moment know.
    pub(super) fn counted_by_lines(&self) -> anyhow::Result<Counted> {
        let mut counted = self.counted.clone();
        if !self.state.groups.is_empty() {
            counted.add_all(&mangle_table::counted(&self.table.save()?));
        }
        Ok(counted)
    }

    /// Adds what was counted before we were at work.
    pub(super) fn restore_counters(&mut self, rule: u32, counters: &Counters) {
        self.counted.add_counters(rule, counters);
    }

    /// Which group a set stands for.
    pub(super) fn key_of(&self, set: &str) -> Option<&Key> {
        self.state.sets().find(|(_, name)| *name == set).map(|(key, _)| key)
    }

    /// What the sets take of the kernel's memory.
    pub(super) fn bytes(&self) -> u64 {
        self.state.sets().map(|(_, set)| sets::bytes(set).unwrap_or_default()).sum()
    }

    /// What does not work, if what has no live socket can't be refused.
    pub(super) fn cannot_refuse(&self) -> Option<String> {
        let why = self.refusal.as_ref().err()?;
        Some(format!("tproxy drops what has no live socket, and does not refuse it, over {:?}: {why}", self.family))
    }

    /// Takes everything out of the kernel.
    pub(super) fn remove(&mut self) -> anyhow::Result<()> {
        remove(&self.table, &self.table.save()?, self.family)?;
        self.refusal.as_mut().map_or(Ok(()), Refusal::remove)
    }
}

/// Removes our chains, given what the table shows, then our sets, which are in use until then.
pub(super) fn remove(table: &IpTable, saved: &str, family: Family) -> anyhow::Result<()> {
    table.remove(saved)?;
    sets::destroy_all(family)
}

/// The unconnected UDP sockets of others that stand at an address that is steered.
fn waiting_sockets(rules: RuleView<'_>, family: Family) -> anyhow::Result<Vec<SocketAddr>> {
    if rules.within(family.everything()).next().is_none() {
        return Ok(Vec::new());
    }
    let steers_udp_at = |address| {
        let mut around = rules.around(Prefix::host(address)).flat_map(|(_, rules)| rules.iter());
        around.any(|held| held.terms.protocol.transports().contains(&Transport::Udp))
    };
    let mut sockets: Vec<_> = host::listeners_of(Transport::Udp)?
        .into_iter()
        .filter(|listener| family.has(listener.local.ip()))
        .filter(|listener| steers_udp_at(listener.local.ip()))
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
