//! What the engine shows to those who only look: a snapshot, for which they need no engine. So nobody who looks waits for a command, and
//! no command for them.
//!
//! There is a new one after each command and each check, and it shares its rules with the engine. Services and the state of the whole
//! are as they were then; what rules count is read when it is asked for, where the back end lets others read it.

use std::{
    cell::RefCell,
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use anyport_common::maps::Counters;

use super::{
    Engine,
    desired::Drains,
    drain::with_connections,
    views::{Counted, Sums},
};
use crate::{
    api::{DrainView, Problem, ServiceView, StatusView},
    events::EventBus,
    rules::{RuleRef, RuleSet, ServiceName},
    steering::SharedCounters,
};

/// How many times longer than reading counters took what was read is good for.
pub(super) const SHARE: u32 = 20;

/// Counters of so many rules are read at a time.
const READS: usize = 1024;

/// What the engine knew at a moment.
#[derive(Debug)]
pub struct Snapshot {
    pub(super) rules: RuleSet,
    pub(super) drains: Drains,
    /// The slots of the services.
    pub(super) slots: Vec<(u16, ServiceName)>,
    pub(super) events: Arc<EventBus>,
    /// Without what rules counted.
    pub(super) status: StatusView,
    services: Vec<ServiceView>,
    /// What rules left that are gone.
    past: HashMap<ServiceName, Counters>,
    /// What rules take from the host.
    pub(super) shadowed: Vec<String>,
    pub(super) counts: Counts,
}

/// Gives what a rule has counted.
pub(super) type Reader<'a> = Box<dyn Fn(&RuleRef<'_>) -> Counters + 'a>;

/// Where counters of rules are read.
#[derive(Clone, Debug)]
pub(super) struct Counts {
    source: Source,
    unmatched: u64,
    /// When they were read, where each look costs something.
    read: Option<(Instant, Duration)>,
}

#[derive(Clone, Debug)]
enum Source {
    /// In memory that the kernel writes.
    Shared(Arc<dyn SharedCounters>),
    /// As the kernel said when it was asked, about the rules as they were then: numbers may be others' by now, and the sums are those of
    /// that moment.
    Known(Arc<HashMap<u32, Counters>>, RuleSet, Arc<Sums>),
}

impl Default for Counts {
    fn default() -> Self {
        Self { source: Source::Known(Arc::default(), RuleSet::default(), Arc::default()), unmatched: 0, read: None }
    }
}

impl Counts {
    /// Gives the counters of a rule. To be held for a short time only, see [`SharedCounters::read`].
    pub(super) fn reader(&self) -> Reader<'_> {
        match &self.source {
            Source::Shared(counters) => {
                let read = counters.read();
                Box::new(move |rule| read(rule.number))
            }
            Source::Known(known, rules, _) => Box::new(|rule| {
                let counters = known.get(&rule.number).copied();
                counters.filter(|_| rules.has_under_its_number(rule)).unwrap_or_default()
            }),
        }
    }

    fn is_fresh(&self) -> bool {
        self.read.is_some_and(|(at, took)| at.elapsed() < took * SHARE)
    }
}

/// Whether the kernel is asked for counters that only it can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    /// If what it said last is too old.
    IfOld,
    /// What it said last has to do.
    Never,
}

impl Engine {
    /// Has subscribers of services hear of these as they are now.
    pub(super) fn follow_events(&self) {
        let slot = |name: &ServiceName| self.services.get(name).map(super::services::Running::slot);
        self.kernel.events().follow(slot);
    }

    /// What the engine knows now. What of counters is not read again is taken from the snapshot before.
    ///
    /// # Errors
    /// The counters can't be read.
    pub(super) fn snapshot(&self, before: Option<&Snapshot>, ask: Ask) -> anyhow::Result<Snapshot> {
        let counts = self.counts(before.map(|it| &it.counts), ask)?;
        let services = self.services_themselves();
        Ok(Snapshot {
            rules: self.desired.rules().clone(),
            drains: self.desired.drains().clone(),
            slots: self.services.iter().map(|(name, it)| (it.slot(), name.clone())).collect(),
            events: Arc::clone(self.kernel.events()),
            status: self.status_itself(counts.unmatched, &services),
            services,
            past: self.services.past().counters().map(|(name, counters)| (name.clone(), *counters)).collect(),
            shadowed: self.shadow.found().map(str::to_owned).collect(),
            counts,
        })
    }

    fn counts(&self, before: Option<&Counts>, ask: Ask) -> anyhow::Result<Counts> {
        if let Some(counters) = self.kernel.shared_counters() {
            return Ok(Counts { source: Source::Shared(counters), unmatched: self.kernel.unmatched()?, read: None });
        }
        let before = before.cloned().unwrap_or_default();
        if ask == Ask::Never || before.is_fresh() {
            return Ok(before);
        }
        let begun = Instant::now();
        let counters = self.kernel.counters()?;
        let rules = self.desired.rules();
        let mut known = HashMap::new();
        let mut note = |Counted { rule, counters, .. }: Counted<'_>| {
            if counters != Counters::default() {
                known.insert(rule.number, counters);
            }
        };
        let sums = Sums::read(rules, |rule| counters(rule.number), &mut note).with(self.services.past().counters());
        let unmatched = self.kernel.unmatched()?;
        let source = Source::Known(Arc::new(known), rules.clone(), Arc::new(sums));
        Ok(Counts { source, unmatched, read: Some((Instant::now(), begun.elapsed())) })
    }
}

impl Snapshot {
    /// What all rules have counted. Takes about 0.4 microseconds for each rule.
    pub(super) fn sums(&self) -> Sums {
        if let Source::Known(.., sums) = &self.counts.source {
            return Sums::clone(sums);
        }
        let reader = RefCell::new((0, None));
        let counters = |rule: &RuleRef<'_>| {
            let (reads, reader) = &mut *reader.borrow_mut();
            // Let go of before it is taken again, for a plan that waits.
            if *reads % READS == 0 {
                *reader = None;
            }
            *reads += 1;
            reader.get_or_insert_with(|| self.counts.reader())(rule)
        };
        Sums::read(&self.rules, counters, |_| ()).with(&self.past)
    }

    /// The state of the whole.
    pub(super) fn status(&self, sums: &Sums) -> StatusView {
        let mut status = self.status.clone();
        sums.add_to_status(&mut status.totals);
        status
    }

    /// The services by name.
    pub(super) fn services(&self, sums: &Sums) -> Vec<ServiceView> {
        let mut services = self.services.clone();
        sums.add_to_services(&mut services);
        let mut rules: HashMap<&ServiceName, usize> = HashMap::new();
        for (_, of_prefix) in self.rules.prefixes() {
            for rule in of_prefix {
                *rules.entry(&rule.terms.service).or_default() += 1;
            }
        }
        // The sums may be a little older.
        for view in &mut services {
            view.rules = rules.get(&view.name).copied().unwrap_or_default();
        }
        services
    }

    /// What is drained, and how many connections each of it has still.
    ///
    /// # Errors
    /// The kernel does not list its connections.
    pub fn drains(&self) -> Result<Vec<DrainView>, Problem> {
        with_connections(self.status.drained.clone(), &self.rules, &self.drains)
    }
}
