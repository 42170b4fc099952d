//! The set of the fleet: taken as a file is applied, and kept apart from what was applied and added on this node.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
};

use super::{Engine, apply::Intent, kept::Keep};
use crate::{
    api::{Applied, Apply, Problem, ProblemKind},
    events::Author,
    fleet::{Condition, FleetBoard, LineEdits},
    rules::{Change, Origin, Prefix, RuleSpec, lines},
    store::FleetState,
};

impl Engine {
    /// Makes rules and services of the fleet equal to a set, and keeps it with the state. What was configured, applied and added
    /// on this node stays, and must not contradict it. Where it is known by which lines it differs from the active set, only those
    /// are read, if that is enough.
    ///
    /// # Errors
    /// See [`ProblemKind`]. Nothing has changed.
    pub async fn take_set(
        &mut self,
        text: Arc<str>,
        edits: Option<LineEdits>,
        state: FleetState,
    ) -> Result<Applied, Problem> {
        self.expect_confirmed()?;
        self.progress.begin("reading the rules", 1);
        let intent = match edits.and_then(|edits| self.intent_of_edits(&edits)) {
            Some(intent) => intent,
            None => self.intent(&text, Origin::Fleet, &Apply::default())?,
        };
        // No failure that may pass by itself: the set is tried again when the node has fewer rules or a higher limit.
        self.expect_room_for(&intent.change, self.config().max_rules)
            .map_err(|problem| Problem { kind: ProblemKind::Unsafe, ..problem })?;
        self.expect_few_removed(&intent.change)?;
        self.expect_safe(&intent.change).await?;
        let Intent { change, opened, closed, is_plain, mut answer, .. } = intent;
        if change.is_empty() && opened.is_empty() && closed.is_empty() {
            self.save_fleet(state, Some(&text))?;
        } else {
            let ring = Author::other(format!("the fleet's ring {}", state.ring));
            let sequence = state.sequence;
            let services = self.replace_services(opened, &closed, Origin::Fleet).await?;
            if let Err(problem) = self.change(change, Keep::SetOnDisk { state, text }).await {
                self.put_back(services).await;
                self.repair().await;
                return Err(problem);
            }
            self.close_replaced(services).await;
            let Applied { added, removed, services, .. } = &answer;
            let services = services.join(", ");
            let what = format!("sequence {sequence}: {added} rules added, {removed} removed, services: [{services}]");
            self.record(ring, "set", what);
        }
        self.kept.note_fleet_plain(is_plain);
        answer.generation = self.kernel.generation();
        Ok(answer)
    }

    /// What has to be done where the active set has each rule once and nothing else, and so has the one that these edits make of
    /// it. Nothing where that is not so, or where they make no sense: then the whole set has to be read.
    fn intent_of_edits(&mut self, LineEdits { removed, added }: &LineEdits) -> Option<Intent> {
        if !self.kept.is_fleet_plain() {
            return None;
        }
        let [gone, come] = [removed, added].map(|text| lines::parse(text, |terms| self.desired.shared(terms)));
        let (gone, come) = (gone.ok()?, come.ok()?);
        self.services.expect_for(&come, &[], &[]).ok()?;
        let mut edited: BTreeMap<Prefix, [Vec<&Arc<RuleSpec>>; 2]> = BTreeMap::new();
        for (side, rules) in [&gone, &come].into_iter().enumerate() {
            for ((prefix, terms), _) in rules {
                edited.entry(*prefix).or_default()[side].push(terms);
            }
        }
        let mut intent = Intent { is_plain: true, ..Intent::default() };
        for (prefix, [gone, come]) in edited {
            let before = self.desired.rules().of_prefix(&prefix);
            let of_fleet = before.into_iter().flatten().filter(|it| it.origins.contains(Origin::Fleet));
            let mut rules: Vec<&Arc<RuleSpec>> = of_fleet.map(|held| &held.terms).collect();
            for terms in gone {
                rules.swap_remove(rules.iter().position(|it| *it == terms)?);
            }
            for terms in come {
                if rules.contains(&terms) {
                    return None;
                }
                rules.push(terms);
            }
            let rules: Vec<_> = rules.into_iter().map(|terms| ((prefix, Arc::clone(terms)), 0)).collect();
            let Intent { change, answer, .. } = &mut intent;
            answer.change_prefix(change, prefix, before, &rules, (Origin::Fleet, false)).ok()?;
        }
        Some(intent)
    }

    /// Compares the fleet's rules and services that are active with the set on the disk, once that is known to be the right one.
    ///
    /// # Errors
    /// How they differ, or why the set can't be read.
    pub fn compare_set(&mut self, is_right: impl FnOnce(&str) -> Result<(), String>) -> Result<(), String> {
        let text = self.kept.fleet_set().map_err(|error| format!("{error:#}"))?.ok_or("no set is kept")?;
        is_right(&text)?;
        let intent = self.intent(&text, Origin::Fleet, &Apply::default()).map_err(|problem| problem.error)?;
        if intent.change.is_empty() && intent.opened.is_empty() && intent.closed.is_empty() {
            return Ok(());
        }
        let Applied { added, removed, .. } = intent.answer;
        Err(format!("{added} rules are missing and {removed} are too many, or services differ"))
    }

    /// Keeps how far the pointer was seen to go; the active set stays.
    ///
    /// # Errors
    /// It could not be written.
    pub fn note_fleet(&mut self, state: FleetState) -> anyhow::Result<()> {
        self.save_fleet(state, None)
    }

    /// Where this node stands in its fleet.
    pub fn fleet_state(&self) -> &FleetState {
        self.kept.fleet()
    }

    /// What the status says of the fleet, if this node belongs to one.
    pub fn fleet_board(&self) -> Option<Arc<FleetBoard>> {
        self.fleet.clone()
    }

    /// How this daemon is.
    pub fn condition(&self) -> Condition {
        let mut hasher = DefaultHasher::new();
        let config = self.config();
        (self.kernel.generation(), config.max_rules, config.max_removal(), self.unconfirmed.is_some())
            .hash(&mut hasher);
        Condition {
            back_end: self.back_end(),
            generation: self.kernel.generation(),
            degraded: self.degraded_itself(),
            basis: hasher.finish(),
        }
    }

    fn save_fleet(&mut self, state: FleetState, text: Option<&str>) -> anyhow::Result<()> {
        self.progress.begin("writing the rules down", 2);
        self.kept.save_fleet(state, text)
    }

    /// Refuses a set that takes more of the fleet's rules away than `max-removal` allows.
    fn expect_few_removed(&self, change: &Change) -> Result<(), Problem> {
        let Some(percent) = self.config().max_removal() else { return Ok(()) };
        let before = self.desired.rules().iter().filter(|it| it.origins.contains(Origin::Fleet)).count();
        let mut gone = 0;
        for (prefix, rules) in &change.removed {
            let at = change.added.binary_search_by_key(prefix, |(it, _)| *it);
            let after = at.map(|at| &change.added[at].1).ok();
            let stays = |terms| {
                let mut rules = after.into_iter().flatten();
                rules.any(|it| it.origins.contains(Origin::Fleet) && it.terms == terms)
            };
            let of_fleet = rules.iter().filter(|it| it.origins.contains(Origin::Fleet));
            gone += of_fleet.filter(|it| !stays(it.terms.clone())).count();
        }
        if gone * 100 <= before * usize::from(percent.get()) {
            return Ok(());
        }
        Err(Problem::new(
            ProblemKind::Unsafe,
            format!(
                "it would take {gone} of the {before} rules of the fleet away, and max-removal allows {percent} %: raise that in \
                 the section [fleet] of the configuration and reload it, or go there in several sets"
            ),
        ))
    }
}
