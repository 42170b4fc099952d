//! From what the kernel holds before a change to what it is to hold after it.

use std::{collections::HashSet, mem};

use tracing::info;

use super::Kernel;
use crate::{
    engine::{
        Progress,
        desired::{Desired, Steps, Transition},
        services::Services,
    },
    log_limit::LogLimit,
    routes::{Coverage, Difference, Edits},
    rules::{Change, Prefix, PrefixRules, RuleSet},
};

/// Owners of sockets can cause this line.
static ACTIVATED: LogLimit = LogLimit::new();
/// Where more prefixes than this are concerned, everything is compared rather than one after the other.
const MANY: usize = 4096;

impl Kernel {
    /// From the kernel before a change to the kernel after it. The rules are those after it.
    pub(in crate::engine) async fn activate(
        &mut self,
        desired: &mut Desired,
        services: &Services,
        transition: &Transition,
        progress: &Progress,
    ) -> anyhow::Result<()> {
        let (change, steps) = (transition.change(), transition.steps());
        let mut routing = Routing::begin(self, desired.rules(), change);
        let is_lost = |prefix: &Prefix| !self.coverage.covers(prefix);
        let withdrawn: Vec<_> =
            change.removed.iter().filter(|(prefix, rules)| rules.is_routed() && is_lost(prefix)).collect();
        let mut rest = steps;
        let without_numbers;
        if !withdrawn.is_empty() {
            self.refuse(&withdrawn, desired, services, steps)?;
            self.keep_connections_of(&withdrawn, &mut routing)?;
            without_numbers =
                Steps { prefixes: steps.prefixes.clone(), freed: steps.freed.clone(), ..Steps::default() };
            rest = &without_numbers;
        }
        progress.begin("removing routes", 3);
        self.routes.apply(&routing.first(&self.coverage)).await?;
        progress.begin("compiling the rules", 4);
        self.steer(desired, services, Some(&rest.prefixes), rest)?;
        progress.begin("adding routes", 5);
        let second = routing.finish(&mut self.coverage, change);
        self.foreign_routes = self.routes.apply(&second).await?;
        services.rules_changed();
        if let Some(left_out) = ACTIVATED.next() {
            info!("generation {}: {} rules{left_out}", self.generation, desired.rules().len());
        }
        Ok(())
    }

    /// Refuses new connections at prefixes that will not be local any more, so that those that are there can be found.
    fn refuse(
        &mut self,
        withdrawn: &[&(Prefix, PrefixRules)],
        desired: &mut Desired,
        services: &Services,
        steps: &Steps,
    ) -> anyhow::Result<()> {
        let (refusing, fresh) = desired.refusing(withdrawn)?;
        let with_fresh = Steps {
            fresh: steps.fresh.iter().chain(&fresh).cloned().collect(),
            freed: Vec::new(),
            prefixes: steps.prefixes.clone(),
            moved: steps.moved.clone(),
        };
        let result = self.steer_through(refusing, desired, services, Some(&steps.prefixes), &with_fresh);
        desired.give_back(&fresh);
        result
    }

    /// Gives the connections of prefixes that are withdrawn a route of their own: established, waiting to be accepted,
    /// or in the middle of their handshake.
    fn keep_connections_of(
        &mut self,
        withdrawn: &[&(Prefix, PrefixRules)],
        routing: &mut Routing,
    ) -> anyhow::Result<()> {
        let withdrawn: HashSet<Prefix> = withdrawn.iter().map(|(prefix, _)| *prefix).collect();
        let is_withdrawn =
            |address: &Prefix| (0..=address.len()).any(|len| withdrawn.contains(&address.truncated(len)));
        let connected = (self.connected)()?;
        let kept: Vec<_> = connected.into_iter().map(Prefix::host).filter(is_withdrawn).collect();
        for address in &kept {
            routing.keep(&mut self.coverage, address);
        }
        self.draining.extend(kept);
        Ok(())
    }

    /// Removes the routes of connections that have ended and whose rule is gone.
    pub(in crate::engine) async fn end_draining(&mut self, rules: &RuleSet) -> anyhow::Result<()> {
        if self.draining.is_empty() {
            return Ok(());
        }
        let connected = (self.connected)()?;
        let ended: Vec<Prefix> = self.draining.extract_if(|prefix| !connected.contains(&prefix.address())).collect();
        let mut edits = Edits::default();
        for prefix in &ended {
            let around = rules.around(*prefix).filter(|(_, rules)| rules.is_routed()).map(|(prefix, _)| prefix);
            self.coverage.remove(prefix, around, &mut edits);
        }
        self.routes.apply(&edits.difference()).await.map(drop)
    }

    /// What the rules and the connections that outlive theirs make local.
    pub(super) fn wanted_coverage(&self, rules: &RuleSet) -> Coverage {
        let routed = rules.prefixes().filter(|(_, rules)| rules.is_routed()).map(|(prefix, _)| *prefix);
        routed.chain(self.draining.iter().copied()).collect()
    }
}

/// How the routes get from what is local before a change to what is local after it. In between, everything is local that is
/// so before and after, so that no connection is without a route for a moment.
enum Routing {
    /// One prefix after the other.
    Few(Edits),
    /// By comparing everything.
    Many { before: Coverage, after: Coverage },
}

impl Routing {
    /// Leaves the kernel with the coverage in between. The rules are those after the change.
    fn begin(kernel: &mut Kernel, rules: &RuleSet, change: &Change) -> Self {
        let is_routed = |(_, rules): &&(Prefix, PrefixRules)| rules.is_routed();
        let removed = change.removed.iter().filter(is_routed);
        if removed.clone().count() + change.added.iter().filter(is_routed).count() > MANY {
            let after = kernel.wanted_coverage(rules);
            let middle = kernel.coverage.intersection(&after);
            return Self::Many { before: mem::replace(&mut kernel.coverage, middle), after };
        }
        let mut edits = Edits::default();
        for (prefix, _) in removed {
            let overlapping = rules.around(*prefix).chain(rules.within(*prefix));
            let still_covered = overlapping.filter(|(_, rules)| rules.is_routed()).map(|(prefix, _)| prefix);
            let draining = kernel.draining.iter().filter(|it| it.is_within(prefix)).copied();
            kernel.coverage.remove(prefix, still_covered.chain(draining), &mut edits);
        }
        Self::Few(edits)
    }

    /// Leaves an address local that was so before.
    fn keep(&mut self, coverage: &mut Coverage, address: &Prefix) {
        match self {
            Self::Few(edits) => coverage.add(address, edits),
            Self::Many { after, .. } => {
                coverage.add(address, &mut Edits::default());
                after.add(address, &mut Edits::default());
            }
        }
    }

    /// From before the change to the coverage in between.
    fn first(&self, coverage: &Coverage) -> Difference {
        match self {
            Self::Few(edits) => edits.difference(),
            Self::Many { before, .. } => before.difference(coverage),
        }
    }

    /// From the coverage in between to the one after the change, which the coverage is then.
    fn finish(self, coverage: &mut Coverage, change: &Change) -> Difference {
        match self {
            Self::Few(_) => {
                let mut edits = Edits::default();
                for (prefix, _) in change.added.iter().filter(|(_, rules)| rules.is_routed()) {
                    coverage.add(prefix, &mut edits);
                }
                edits.difference()
            }
            Self::Many { after, .. } => {
                let difference = coverage.difference(&after);
                *coverage = after;
                difference
            }
        }
    }
}
