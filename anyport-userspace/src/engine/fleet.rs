//! The set of the fleet: taken as a file is applied, and kept apart from what was applied and added on this node.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use super::{Engine, apply::Intent, kept::Keep};
use crate::{
    api::{Applied, Apply, FleetView, Kind, Problem, RefusedView},
    rules::{Change, Origin, Prefix, Terms, lines},
    steering::BackEnd,
    store::FleetState,
};

/// How long etcd may be silent before that is something which does not work as it should.
const SILENCE: Duration = Duration::from_secs(10);

/// How a daemon is, as far as its fleet wants to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// The back end in use.
    pub back_end: BackEnd,
    /// The generation that the kernel holds.
    pub generation: u64,
    /// What does not work as it should, apart from the fleet.
    pub degraded: Vec<String>,
    /// Changes when a set that was refused might be taken: with rules, services and limits of this node.
    pub basis: u64,
}

/// Lines by which two sets differ, each with its end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LineEdits {
    /// Those that the former one has, once for each time that they go.
    pub removed: String,
    /// Those that the latter one has, once for each time that they come.
    pub added: String,
}

impl Engine {
    /// Makes rules and services of the fleet equal to a set, and keeps it with the state. What was configured, applied and added
    /// on this node stays, and must not contradict it. Where it is known by which lines it differs from the active set, only those
    /// are read, if that is enough.
    ///
    /// # Errors
    /// See [`Kind`]. Nothing has changed.
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
        // No failure that may pass: who has fewer rules or a higher limit is asked again.
        self.expect_room_for(&intent.change, self.config().max_rules)
            .map_err(|problem| Problem { kind: Kind::Unsafe, ..problem })?;
        self.expect_few_removed(&intent.change)?;
        self.expect_safe(&intent.change).await?;
        let Intent { change, opened, closed, is_plain, mut answer, .. } = intent;
        if change.is_empty() && opened.is_empty() && closed.is_empty() {
            self.save_fleet(state, Some(&text))?;
        } else {
            let services = self.replace_services(opened, &closed, Origin::Fleet).await?;
            if let Err(problem) = self.change(change, Keep::SetOnDisk { state, text }).await {
                self.put_back(services).await;
                self.repair().await;
                return Err(problem);
            }
            self.close_replaced(services).await;
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
        let mut edited: BTreeMap<Prefix, [Vec<&Arc<Terms>>; 2]> = BTreeMap::new();
        for (side, rules) in [&gone, &come].into_iter().enumerate() {
            for ((prefix, terms), _) in rules {
                edited.entry(*prefix).or_default()[side].push(terms);
            }
        }
        let mut intent = Intent { is_plain: true, ..Intent::default() };
        for (prefix, [gone, come]) in edited {
            let before = self.desired.rules().of_prefix(&prefix);
            let of_fleet = before.into_iter().flatten().filter(|it| it.origins.contains(Origin::Fleet));
            let mut rules: Vec<&Arc<Terms>> = of_fleet.map(|held| &held.terms).collect();
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

    /// What is told of the fleet, if this node belongs to one.
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
        self.progress.begin("writing the rules down", 5);
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
            Kind::Unsafe,
            format!(
                "it would take {gone} of the {before} rules of the fleet away, and max-removal allows {percent} %: raise that in \
                 the section [fleet] of the configuration and reload it, or go there in several sets"
            ),
        ))
    }
}

/// What the agent tells of the fleet, for those who ask for the status.
#[derive(Debug)]
pub struct FleetBoard(Mutex<Told>);

#[derive(Debug)]
struct Told {
    view: FleetView,
    heard: Option<Instant>,
    /// When it became silent, for people and for this process.
    silent: (SystemTime, Instant),
}

impl FleetBoard {
    /// Before etcd was asked for the first time.
    pub fn new(view: FleetView, state: &FleetState) -> Self {
        let board = Self(Mutex::new(Told { view, heard: None, silent: (SystemTime::now(), Instant::now()) }));
        board.stands(state);
        board
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        // Whoever panicked has told all or nothing: each change is an assignment.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This is in force and was seen.
    pub fn stands(&self, state: &FleetState) {
        let FleetState { sequence, set, since, seen, .. } = state.clone();
        let view = &mut self.told().view;
        *view = FleetView { sequence, set, since, seen, ..view.clone() };
    }

    /// etcd has answered then, and still does as far as is known.
    pub fn heard(&self, at: Instant) {
        let mut told = self.told();
        told.heard = told.heard.max(Some(at));
        (told.view.connected, told.view.error) = (true, None);
    }

    /// etcd does not answer.
    pub fn lost(&self, error: String) {
        let mut told = self.told();
        if told.view.connected {
            told.silent = (SystemTime::now(), Instant::now());
        }
        (told.view.connected, told.view.error) = (false, Some(error));
    }

    /// Whether etcd has no pointer of the ring.
    pub fn missing(&self, is_missing: bool) {
        self.told().view.missing = is_missing;
    }

    /// What is refused now, if anything is.
    pub fn refuse(&self, refused: Option<RefusedView>) {
        self.told().view.refused = refused;
    }

    /// All of it.
    pub fn view(&self) -> FleetView {
        let told = self.told();
        let contact_age = told.heard.map(|at| at.elapsed().as_secs_f64());
        FleetView { contact_age, ..told.view.clone() }
    }

    /// What does not work as it should.
    pub fn degraded(&self) -> Vec<String> {
        let told = self.told();
        let FleetView { ring, sequence, seen, refused, error, .. } = &told.view;
        let mut degraded = Vec::new();
        if let Some(RefusedView { sequence: wanted, error, .. }) = refused {
            let wanted = wanted.map_or_else(String::new, |it| format!(" with the sequence {it}"));
            let stays = if *sequence > 0 { format!("{sequence} stays in force") } else { "nothing changes".to_owned() };
            degraded.push(format!("the pointer of the ring {ring}{wanted} is not followed, and {stays}: {error}"));
        }
        if told.view.missing && *seen > 0 {
            degraded.push(format!(
                "etcd has no pointer of the ring {ring}, of which {seen} was seen: it was wiped, or the ring removed; what is in \
                 force stays"
            ));
        }
        let (since, at) = told.silent;
        if !told.view.connected && at.elapsed() >= SILENCE {
            let since = humantime::format_rfc3339_seconds(since);
            let why = error.as_deref().unwrap_or("nothing has come back yet");
            degraded.push(format!("etcd has not answered since {since}, and what is in force stays: {why}"));
        }
        degraded
    }
}
