//! A kernel that does what it is asked to, or half of it, or says so falsely.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    ops::Range,
    sync::{Arc, Mutex, MutexGuard},
};

use anyhow::{bail, ensure};
use anyport_common::{
    flow::Flow,
    maps::{Counters, SOCKETS_PER_SERVICE},
};

use crate::{
    routes::{Holder, Local},
    rules::{Prefix, RuleSpec},
    steering::{BackEnd, Decided, Drift, ObjectKind, Plan, Steering},
};

/// As good as it has to be, and the same for each seed (`SplitMix64`).
#[derive(Debug)]
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.number() % limit as u64).unwrap()
    }

    pub(super) fn one_in(&mut self, many: usize) -> bool {
        self.below(many) == 0
    }

    pub(super) fn one_of<T: Copy>(&mut self, all: &[T]) -> Option<T> {
        if all.is_empty() { None } else { Some(all[self.below(all.len())]) }
    }
}

/// When something fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    Before,
    HalfWay,
    After,
}

pub(in crate::engine) type Numbered = (u32, RuleSpec);

/// What the kernel holds.
#[derive(Debug)]
pub(in crate::engine) struct World {
    pub(super) random: Random,
    /// One of so many steps fails; nothing does otherwise.
    pub(in crate::engine) fails: Option<usize>,
    pub(in crate::engine) rules: BTreeMap<Prefix, Vec<Numbered>>,
    /// By place, the cookie.
    pub(super) sockets: BTreeMap<u32, u64>,
    pub(super) is_attached: bool,
    pub(in crate::engine) routes: BTreeSet<Prefix>,
    /// How many packets were steered, by the number of the rule.
    steered: BTreeMap<u32, u64>,
}

impl World {
    /// An empty kernel in which nothing fails; what will is the same for each seed.
    pub(in crate::engine) fn new(seed: u64) -> Self {
        Self {
            random: Random(seed ^ 0x5eed),
            fails: None,
            rules: BTreeMap::new(),
            sockets: BTreeMap::new(),
            is_attached: false,
            routes: BTreeSet::new(),
            steered: BTreeMap::new(),
        }
    }

    fn fault(&mut self) -> Option<Fault> {
        let many = self.fails?;
        if !self.random.one_in(many) {
            return None;
        }
        self.random.one_of(&[Fault::Before, Fault::HalfWay, Fault::After])
    }

    /// Packets come.
    pub(super) fn steer(&mut self) {
        let Self { random, rules, steered, .. } = self;
        for (number, _) in rules.values().flatten() {
            *steered.entry(*number).or_default() += random.number() % 3;
        }
    }

    /// Begins, or goes on, to count for rules as back ends do.
    fn renumber(&mut self, plan: &Plan<'_>) {
        self.steered.retain(|number, _| !plan.fresh.iter().any(|range| range.contains(number)));
        for (before, now) in plan.moved {
            *self.steered.entry(*now).or_default() += self.steered.get(before).copied().unwrap_or_default();
        }
    }

    fn counters(&self, number: u32) -> Counters {
        Counters { steered: self.steered.get(&number).copied().unwrap_or_default(), ..Counters::default() }
    }

    /// Another program takes something away. Returns whether that was a route.
    pub(super) fn lose(&mut self) -> bool {
        match self.random.below(4) {
            0 => {
                let all: Vec<_> = self.rules.keys().copied().collect();
                self.random.one_of(&all).map(|it| self.rules.remove(&it));
            }
            1 => {
                let all: Vec<_> = self.sockets.keys().copied().collect();
                self.random.one_of(&all).map(|it| self.sockets.remove(&it));
            }
            2 => self.is_attached = false,
            _ => {
                let all: Vec<_> = self.routes.iter().copied().collect();
                self.random.one_of(&all).map(|it| self.routes.remove(&it));
                return true;
            }
        }
        false
    }
}

pub(in crate::engine) type Shared = Arc<Mutex<World>>;

pub(in crate::engine) fn open(world: &Shared) -> MutexGuard<'_, World> {
    world.lock().unwrap()
}

/// Changes what has changed, and takes for granted that the rest is as it left it.
#[derive(Debug)]
pub(in crate::engine) struct Simulated {
    world: Shared,
    rules: Option<BTreeMap<Prefix, Vec<Numbered>>>,
    sockets: BTreeMap<u32, u64>,
}

impl Simulated {
    pub(in crate::engine) fn new(world: &Shared) -> Self {
        // Another daemon counts in memory of its own.
        open(world).steered.clear();
        Self { world: Arc::clone(world), rules: None, sockets: BTreeMap::new() }
    }

    fn fallibly<T>(&self, work: impl FnOnce() -> T) -> anyhow::Result<T> {
        let fault = open(&self.world).fault();
        ensure!(!matches!(fault, Some(Fault::Before | Fault::HalfWay)), "simulated fault before");
        let done = work();
        ensure!(fault.is_none(), "simulated fault after");
        Ok(done)
    }
}

fn numbered(plan: &Plan<'_>, prefix: &Prefix) -> Vec<Numbered> {
    let rules = plan.rules.of_prefix(prefix).into_iter().flat_map(|rules| rules.numbered(*prefix));
    rules.map(|rule| (rule.number, RuleSpec::clone(rule.terms))).collect()
}

fn cookies(services: &[crate::steering::ServiceSockets]) -> BTreeMap<u32, u64> {
    let places = services.iter().flat_map(|service| {
        let first = u32::from(service.slot) * SOCKETS_PER_SERVICE;
        (first..).zip(&service.groups).filter_map(|(place, group)| Some((place, group.as_ref()?.cookie)))
    });
    places.collect()
}

impl Steering for Simulated {
    fn back_end(&self) -> BackEnd {
        // One with a table of its own, so that the engine has none.
        BackEnd::SkLookup
    }

    fn apply(&mut self, plan: &Plan<'_>) -> anyhow::Result<()> {
        let mut world = open(&self.world);
        let fault = world.fault();
        ensure!(fault != Some(Fault::Before), "simulated fault before a plan");
        world.renumber(plan);
        let known = self.rules.take();
        let prefixes: Vec<Prefix> = if let (Some(changed), Some(_)) = (plan.changed, &known) {
            changed.to_vec()
        } else {
            world.rules.clear();
            world.sockets.clear();
            self.sockets.clear();
            plan.rules.prefixes().map(|(prefix, _)| *prefix).collect()
        };
        let mut rules = known.unwrap_or_default();
        let half = prefixes.len() / 2;
        for (at, prefix) in prefixes.iter().enumerate() {
            ensure!(fault != Some(Fault::HalfWay) || at < half, "simulated fault in the middle of a plan");
            let now = numbered(plan, prefix);
            if now.is_empty() {
                rules.remove(prefix);
                world.rules.remove(prefix);
            } else {
                rules.insert(*prefix, now.clone());
                world.rules.insert(*prefix, now);
            }
        }
        let wanted = cookies(plan.services);
        for (place, cookie) in &wanted {
            if self.sockets.get(place) != Some(cookie) {
                world.sockets.insert(*place, *cookie);
            }
        }
        world.sockets.retain(|place, _| wanted.contains_key(place));
        self.sockets = wanted;
        world.is_attached = true;
        ensure!(fault.is_none(), "simulated fault after a plan");
        self.rules = Some(rules);
        Ok(())
    }

    fn lost(&mut self) -> anyhow::Result<Vec<Drift>> {
        let Some(rules) = &self.rules else { return Ok(Vec::new()) };
        let (is_same, has_sockets, is_attached) = self.fallibly(|| {
            let world = open(&self.world);
            (world.rules == *rules, world.sockets == self.sockets, world.is_attached)
        })?;
        let all = [(is_same, ObjectKind::Chain), (has_sockets, ObjectKind::Socket), (is_attached, ObjectKind::Link)];
        Ok(all
            .into_iter()
            .filter(|(is_there, _)| !is_there)
            .map(|(_, kind)| Drift::new(kind, kind.to_string()))
            .collect())
    }

    fn forget_lost(&mut self) -> anyhow::Result<()> {
        self.fallibly(|| ())?;
        let world = open(&self.world);
        if self.rules.as_ref() != Some(&world.rules) {
            self.rules = None;
        }
        self.sockets.retain(|place, cookie| world.sockets.get(place) == Some(cookie));
        Ok(())
    }

    fn unrepaired(&self) -> Option<&str> {
        None
    }

    fn counters(&self) -> anyhow::Result<Box<dyn Fn(u32) -> Counters + '_>> {
        self.fallibly(|| Box::new(|number| open(&self.world).counters(number)) as _)
    }

    fn left(&self, numbers: &[Range<u32>]) -> Vec<(u32, Counters)> {
        let world = open(&self.world);
        numbers.iter().cloned().flatten().map(|number| (number, world.counters(number))).collect()
    }

    fn can_adopt(&self, _cookie: u64) -> bool {
        false
    }

    fn unmatched(&self) -> anyhow::Result<u64> {
        Ok(0)
    }

    fn restore_counters(&mut self, counted: &[(u32, Counters)]) -> anyhow::Result<()> {
        self.fallibly(|| {
            let mut world = open(&self.world);
            for (number, counters) in counted {
                *world.steered.entry(*number).or_default() += counters.steered;
            }
        })
    }

    fn decide(&self, _flow: &Flow) -> anyhow::Result<Decided> {
        bail!("nobody asks")
    }

    fn detach(self: Box<Self>) -> anyhow::Result<()> {
        self.fallibly(|| {
            let mut world = open(&self.world);
            world.rules.clear();
            world.sockets.clear();
            world.is_attached = false;
        })
    }

    fn leave(self: Box<Self>) {}
}

#[derive(Debug)]
pub(in crate::engine) struct SimulatedRoutes(pub(in crate::engine) Shared);

impl SimulatedRoutes {
    fn change(
        &self,
        prefixes: &[Prefix],
        change: impl Fn(&mut BTreeSet<Prefix>, Prefix) -> bool,
    ) -> anyhow::Result<()> {
        let mut world = open(&self.0);
        // Nothing is asked of the kernel where there is nothing to do.
        let fault = if prefixes.is_empty() { None } else { world.fault() };
        let done = match fault {
            Some(Fault::Before) => 0,
            Some(Fault::HalfWay) => prefixes.len() / 2,
            _ => prefixes.len(),
        };
        for prefix in &prefixes[..done] {
            change(&mut world.routes, *prefix);
        }
        ensure!(fault.is_none(), "simulated fault of routes");
        Ok(())
    }
}

impl Holder for SimulatedRoutes {
    fn local(&mut self) -> anyhow::Result<Local> {
        let mut world = open(&self.0);
        ensure!(world.fault().is_none(), "simulated fault of a list of routes");
        let mut ours: Vec<_> = world.routes.iter().copied().collect();
        ours.sort_by_key(|prefix| (!prefix.is_ipv4(), prefix.bounds().0, prefix.len()));
        Ok(Local { ours, others: HashSet::new() })
    }

    fn add(&mut self, prefixes: &[Prefix]) -> anyhow::Result<Vec<Prefix>> {
        self.change(prefixes, BTreeSet::insert)?;
        Ok(Vec::new())
    }

    fn remove(&mut self, prefixes: &[Prefix]) -> anyhow::Result<()> {
        self.change(prefixes, |routes, prefix| routes.remove(&prefix))
    }
}
