//! From one rule set to the next.

use std::{
    collections::{HashMap, HashSet},
    fmt::Write as _,
    mem,
    ops::Range,
    sync::Arc,
    time::Instant,
};

use anyhow::Context as _;
use anyport_common::maps::Counters;
use tracing::{error, info};

use super::{Engine, mend::BackOff};
use crate::{
    api::Problem,
    routes::{Coverage, Difference, Edits},
    rules::{Change, Numbered, Origin, Prefix, PrefixRules, ServiceName, SourceLists, Terms, lines::Line},
    steering::{Plan, ServiceSockets},
    store::{FleetState, State},
    table::Receiver,
};

/// Where more prefixes than this are concerned, everything is compared rather than one after the other.
const MANY: usize = 4096;

/// Whether a change is there after a restart.
#[derive(Debug)]
pub(super) enum Keep {
    OnDisk,
    /// So that what is kept of the applied rules are these lines, if there are any.
    AppliedOnDisk(Option<String>),
    /// The set of the fleet, with what it belongs to.
    SetOnDisk {
        state: FleetState,
        text: Arc<str>,
    },
    /// Not yet: it may be taken back.
    InMemory,
}

/// The prefixes that a change concerns, and what becomes of rule numbers.
#[derive(Debug, Default)]
pub(super) struct Steps {
    prefixes: Vec<Prefix>,
    fresh: Vec<Range<u32>>,
    freed: Vec<Range<u32>>,
    moved: Vec<(u32, u32)>,
}

impl Engine {
    /// Makes the kernel and the state file equal to the rules after a change and the services at hand, or leaves both
    /// as they are.
    pub(super) async fn change(&mut self, mut change: Change, keep: Keep) -> Result<(), Problem> {
        let steps = self.number(&mut change)?;
        self.rules.apply(&change);
        let result = match self.put_in_force(&change, &steps).await {
            Ok(()) => match keep {
                Keep::InMemory => Ok(()),
                Keep::OnDisk => self.save(&change, None),
                Keep::AppliedOnDisk(lines) => self.save(&change, lines),
                Keep::SetOnDisk { state, text } => self.save_fleet(state, Some(&text)),
            },
            Err(error) => Err(error),
        };
        let unused = if result.is_ok() { &steps.freed } else { &steps.fresh };
        for range in unused {
            self.rule_numbers.give_back(range.clone());
        }
        let Err(error) = result else { return Ok(()) };
        let back = change.inverse();
        self.rules.apply(&back);
        self.note_added(&back);
        self.coverage = self.wanted_coverage();
        self.repair().await;
        Err(error.into())
    }

    /// Keeps what has to be there after a restart. The rules that were applied are written again only if they changed;
    /// `lines` may say the same as they do.
    pub(super) fn save(&mut self, change: &Change, lines: Option<String>) -> anyhow::Result<()> {
        self.progress.begin("writing the rules down", 5);
        let is_applied =
            |(_, rules): &(Prefix, PrefixRules)| rules.iter().any(|it| it.origins.contains(Origin::Applied));
        let is_written = change.removed.iter().chain(&change.added).any(is_applied);
        let applied = is_written.then(|| {
            lines.unwrap_or_else(|| {
                let mut text = String::new();
                for rule in self.rules.iter().filter(|it| it.origins.contains(Origin::Applied)) {
                    let _ = writeln!(text, "{}", Line(&rule.prefix, rule.terms));
                }
                text
            })
        });
        self.note_added(change);
        let services = |origin| {
            let services = self.services.values().filter(move |it| it.origin == origin);
            services.map(|it| it.service.config().clone()).collect()
        };
        let of_prefix = |prefix| self.rules.of_prefix(prefix).into_iter().flat_map(|it| it.numbered(*prefix));
        let rules = self.added.iter().flat_map(of_prefix).filter(|it| it.origins.contains(Origin::Added));
        let state = State {
            services: services(Origin::Added),
            rules: rules.map(Numbered::to_rule).collect(),
            applied_services: services(Origin::Applied),
            ..State::default()
        };
        self.store.save(&state, applied.as_deref())
    }

    /// Notes which of these prefixes have rules that were added by hand.
    fn note_added(&mut self, change: &Change) {
        for prefix in change.prefixes() {
            let rules = self.rules.of_prefix(&prefix);
            if rules.is_some_and(|rules| rules.iter().any(|it| it.origins.contains(Origin::Added))) {
                self.added.insert(prefix);
            } else {
                self.added.remove(&prefix);
            }
        }
    }

    /// Keeps what was counted for a daemon that comes later.
    pub(super) fn keep_counters(&self) -> anyhow::Result<()> {
        let counters = self.steering.counters()?;
        let counted = self.rules.iter().map(|rule| (rule.prefix, Arc::clone(rule.terms), counters(rule.number)));
        self.store.save_counters(counted.filter(|(_, _, it)| *it != Counters::default()))
    }

    /// Goes on with what an earlier daemon counted for rules that are still there.
    pub(super) fn restore_counters(&mut self) -> anyhow::Result<()> {
        let mut counted = Vec::new();
        for (prefix, rules) in self.store.counters() {
            let Some(of_prefix) = self.rules.of_prefix(&prefix) else { continue };
            for rule in of_prefix.numbered(prefix) {
                let before = rules.iter().filter(|(terms, _)| terms == rule.terms);
                counted.extend(before.map(|(_, counters)| (rule.number, *counters)));
            }
        }
        self.steering.count_on(&counted)?;
        self.counters_kept = Some(Instant::now());
        Ok(())
    }

    /// Puts the first rules of all in force.
    ///
    /// # Errors
    /// What the kernel refused.
    pub(super) async fn start_with(&mut self, mut change: Change) -> anyhow::Result<()> {
        let is_added = |(_, rules): &&(Prefix, PrefixRules)| rules.iter().any(|it| it.origins.contains(Origin::Added));
        self.added = change.added.iter().filter(is_added).map(|(prefix, _)| *prefix).collect();
        let steps = self.number(&mut change)?;
        self.rules.apply(&change);
        // Routes of a daemon that was killed stay where they are still wanted.
        let wanted = self.wanted_coverage();
        self.routes.set(&self.coverage.intersection(&wanted)).await?;
        self.steer(None, &steps)?;
        self.foreign_routes = self.routes.set(&wanted).await?;
        self.coverage = wanted;
        Ok(())
    }

    /// Makes the kernel equal to the rules, whatever it holds.
    pub(super) async fn repair(&mut self) {
        let steered = self.steering.forget_lost().and_then(|()| self.steer(None, &Steps::default()));
        let result = match steered {
            Ok(()) => self.routes.set(&self.coverage).await,
            Err(error) => Err(error),
        };
        match result {
            Ok(foreign) => {
                self.foreign_routes = foreign;
                self.broken = None;
                self.repairs = BackOff::default();
            }
            Err(error) => {
                let pause = self.repairs.fail();
                error!("make the kernel hold the rules, which is tried again in {} s: {error:#}", pause.as_secs());
                self.broken = Some(format!("the kernel may not hold these rules, which is tried again: {error:#}"));
            }
        }
    }

    /// Numbers the rules of a change. Prefixes whose rules stay as they are keep their numbers.
    fn number(&mut self, change: &mut Change) -> anyhow::Result<Steps> {
        let mut steps = Steps::default();
        let mut former = change.removed.iter().peekable();
        let mut fresh: Vec<&mut PrefixRules> = Vec::new();
        let mut moving: Vec<(usize, &PrefixRules)> = Vec::new();
        for (prefix, rules) in &mut change.added {
            while let Some((gone, before)) = former.next_if(|(it, _)| it < prefix) {
                steps.prefixes.push(*gone);
                push(&mut steps.freed, numbers_of(before));
            }
            if let Some((_, before)) = former.next_if(|(it, _)| it == prefix) {
                if before.say_the_same_as(rules) {
                    rules.first_number = before.first_number;
                    continue;
                }
                push(&mut steps.freed, numbers_of(before));
                moving.push((fresh.len(), before));
            }
            steps.prefixes.push(*prefix);
            fresh.push(rules);
        }
        for (gone, before) in former {
            steps.prefixes.push(*gone);
            push(&mut steps.freed, numbers_of(before));
        }
        self.give_numbers(&mut fresh, &mut steps.fresh)?;
        for (at, before) in moving {
            let (now, after) = (fresh[at].first_number.., fresh[at].iter());
            let places: HashMap<&Terms, u32> =
                before.iter().map(|held| &*held.terms).zip(before.first_number..).collect();
            for (number, held) in now.zip(after) {
                steps.moved.extend(places.get(&*held.terms).map(|before| (*before, number)));
            }
        }
        Ok(steps)
    }

    fn give_numbers(&mut self, rules: &mut [&mut PrefixRules], fresh: &mut Vec<Range<u32>>) -> anyhow::Result<()> {
        let count = |rules: &PrefixRules| u32::try_from(rules.len()).unwrap_or(u32::MAX);
        let all = rules.iter().map(|it| u64::from(count(it))).sum::<u64>();
        if let Some(range) = u32::try_from(all).ok().and_then(|all| self.rule_numbers.take(all)) {
            let mut next = range.start;
            for rules in rules {
                rules.first_number = next;
                next += count(rules);
            }
            fresh.push(range);
            return Ok(());
        }
        for rules in rules {
            let Some(range) = self.rule_numbers.take(count(rules)) else {
                fresh.drain(..).for_each(|range| self.rule_numbers.give_back(range));
                anyhow::bail!(
                    "the rules in force and those that replace them are more than can be numbered; \
                     replace them in portions"
                );
            };
            rules.first_number = range.start;
            fresh.push(range);
        }
        Ok(())
    }

    /// From the kernel before a change to the kernel after it. The rules are those after it.
    async fn put_in_force(&mut self, change: &Change, steps: &Steps) -> anyhow::Result<()> {
        let mut routing = Routing::begin(self, change);
        let is_lost = |prefix: &Prefix| !self.coverage.covers(prefix);
        let given_up: Vec<_> =
            change.removed.iter().filter(|(prefix, rules)| rules.is_routed() && is_lost(prefix)).collect();
        let mut rest = steps;
        let without_numbers;
        if !given_up.is_empty() {
            self.refuse(&given_up, steps)?;
            self.keep_connections_of(&given_up, &mut routing)?;
            without_numbers =
                Steps { prefixes: steps.prefixes.clone(), freed: steps.freed.clone(), ..Steps::default() };
            rest = &without_numbers;
        }
        self.progress.begin("removing routes", 2);
        self.routes.apply(&routing.first(&self.coverage)).await?;
        self.progress.begin("compiling the rules", 3);
        self.steer(Some(&rest.prefixes), rest)?;
        self.progress.begin("adding routes", 4);
        let second = routing.finish(&mut self.coverage, change);
        self.foreign_routes = self.routes.apply(&second).await?;
        for running in self.services.values() {
            running.service.forget_replies();
        }
        info!("generation {}: {} rules", self.generation, self.rules.len());
        Ok(())
    }

    /// Has the back end steer by the rules, of which these prefixes have changed; nothing says that anything may have. What is drained
    /// is refused.
    pub(super) fn steer(&mut self, changed: Option<&[Prefix]>, steps: &Steps) -> anyhow::Result<()> {
        let refusals = self.refusals();
        self.rules.apply(&refusals);
        let steered = self.steer_as_is(changed, steps);
        self.rules.apply(&refusals.inverse());
        steered
    }

    fn steer_as_is(&mut self, changed: Option<&[Prefix]>, steps: &Steps) -> anyhow::Result<()> {
        self.generation += 1;
        let (slot, name) = (self.drained_slot, ServiceName::drained());
        let mut services =
            vec![ServiceSockets::refusing(), ServiceSockets { slot, name, ..ServiceSockets::refusing() }];
        for (name, running) in &self.services {
            let (groups, sources) = (self.groups_of(running), Arc::clone(&running.service.config().sources));
            services.push(ServiceSockets { slot: running.slot, name: name.clone(), groups, sources });
        }
        let plan = Plan {
            generation: self.generation,
            rules: &self.rules,
            changed,
            fresh: &steps.fresh,
            freed: &steps.freed,
            moved: &steps.moved,
            services: &services,
        };
        if let Some(table) = &mut self.own_table {
            // Whom services take is not known to this table, which only tells what is steered at all.
            let receiver = |slot| Receiver { slot, sources: SourceLists::EVERYBODY };
            let receivers: HashMap<_, _> = services.iter().map(|it| (&it.name, receiver(it.slot))).collect();
            let find = |name: &_| receivers.get(name).copied().with_context(|| format!("there is no service {name}"));
            let made = match changed {
                Some(prefixes) => table.change(&self.rules, prefixes, &find),
                None => table.make(&self.rules, &find),
            };
            if let Err(error) = made {
                table.abort();
                return Err(error);
            }
            // Before the first datagram can arrive that is to be seen as a loop.
            self.published.publish(table.reader());
            table.commit();
        }
        self.steering.apply(&plan)?;
        self.events.follow(|name| services.iter().find(|it| it.name == *name).map(|it| it.slot));
        if let Some(reader) = self.steering.reader() {
            self.published.publish(reader);
        }
        Ok(())
    }

    /// Refuses everybody new at prefixes that will not be local any more, so that whoever is in can be found.
    fn refuse(&mut self, given_up: &[&(Prefix, PrefixRules)], steps: &Steps) -> anyhow::Result<()> {
        let mut refusing = Change::default();
        let mut known: HashMap<*const Terms, Arc<Terms>> = HashMap::new();
        let mut fresh = Vec::new();
        for (prefix, before) in given_up {
            let mut rules = self.rules.of_prefix(prefix).cloned();
            refusing.removed.extend(rules.iter().map(|rules| (*prefix, rules.clone())));
            let is_alone = rules.is_none();
            let rules_here = rules.get_or_insert_with(PrefixRules::default);
            // The rules that are given up need their numbers no more, except to be refused under them.
            rules_here.first_number = before.first_number;
            for held in before {
                let terms = known
                    .entry(Arc::as_ptr(&held.terms))
                    .or_insert_with(|| Arc::new(Terms { service: ServiceName::nobody(), ..Terms::clone(&held.terms) }));
                rules_here.insert_unchecked(terms, held.origins);
            }
            if !is_alone {
                self.give_numbers(&mut [rules_here], &mut fresh)?;
            }
            refusing.added.extend(rules.map(|rules| (*prefix, rules)));
        }
        self.rules.apply(&refusing);
        let with_fresh = Steps {
            fresh: steps.fresh.iter().chain(&fresh).cloned().collect(),
            freed: Vec::new(),
            prefixes: steps.prefixes.clone(),
            moved: steps.moved.clone(),
        };
        let result = self.steer(Some(&steps.prefixes), &with_fresh);
        self.rules.apply(&refusing.inverse());
        for range in fresh {
            self.rule_numbers.give_back(range);
        }
        result
    }

    /// Gives the connections of prefixes that are given up a route of their own: established, waiting to be accepted,
    /// or in the middle of their handshake.
    fn keep_connections_of(
        &mut self,
        given_up: &[&(Prefix, PrefixRules)],
        routing: &mut Routing,
    ) -> anyhow::Result<()> {
        let given_up: HashSet<Prefix> = given_up.iter().map(|(prefix, _)| *prefix).collect();
        let is_given_up = |address: &Prefix| (0..=address.len()).any(|len| given_up.contains(&address.truncated(len)));
        let connected = (self.connected)()?;
        let kept: Vec<_> = connected.into_iter().map(Prefix::host).filter(is_given_up).collect();
        for address in &kept {
            routing.keep(&mut self.coverage, address);
        }
        self.draining.extend(kept);
        Ok(())
    }

    /// What the rules and the connections that outlive theirs make local.
    pub(super) fn wanted_coverage(&self) -> Coverage {
        let routed = self.rules.prefixes().filter(|(_, rules)| rules.is_routed()).map(|(prefix, _)| *prefix);
        routed.chain(self.draining.iter().copied()).collect()
    }
}

/// Appends numbers, to the last range where they follow it.
fn push(ranges: &mut Vec<Range<u32>>, numbers: Range<u32>) {
    match ranges.last_mut() {
        Some(last) if last.end == numbers.start => last.end = numbers.end,
        _ => ranges.push(numbers),
    }
}

fn numbers_of(rules: &PrefixRules) -> Range<u32> {
    rules.first_number..rules.first_number + u32::try_from(rules.len()).unwrap_or_default()
}

/// How the routes get from what is local before a change to what is local after it. On the way everything is local that
/// is so before and after, so that no connection is without a route for a moment.
enum Routing {
    /// One prefix after the other.
    Few(Edits),
    /// By comparing everything.
    Many { before: Coverage, after: Coverage },
}

impl Routing {
    /// Leaves the engine with the coverage on the way. Its rules are those after the change.
    fn begin(engine: &mut Engine, change: &Change) -> Self {
        let is_routed = |(_, rules): &&(Prefix, PrefixRules)| rules.is_routed();
        let removed = change.removed.iter().filter(is_routed);
        if removed.clone().count() + change.added.iter().filter(is_routed).count() > MANY {
            let after = engine.wanted_coverage();
            let middle = engine.coverage.intersection(&after);
            return Self::Many { before: mem::replace(&mut engine.coverage, middle), after };
        }
        let mut edits = Edits::default();
        for (prefix, _) in removed {
            let overlapping = engine.rules.around(*prefix).chain(engine.rules.within(*prefix));
            let still_covered = overlapping.filter(|(_, rules)| rules.is_routed()).map(|(prefix, _)| prefix);
            let draining = engine.draining.iter().filter(|it| it.is_within(prefix)).copied();
            engine.coverage.remove(prefix, still_covered.chain(draining), &mut edits);
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

    /// From before the change to the way.
    fn first(&self, coverage: &Coverage) -> Difference {
        match self {
            Self::Few(edits) => edits.difference(),
            Self::Many { before, .. } => before.difference(coverage),
        }
    }

    /// From the way to after the change, which the coverage is then.
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
