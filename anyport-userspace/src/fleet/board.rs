//! What a daemon and the agent of its fleet say to each other: how the daemon is, and where it stands in the fleet.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use crate::{
    api::{FleetView, RefusedView},
    back_end::BackEnd,
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
    /// Those that the first set has, once for each time that they go.
    pub removed: String,
    /// Those that the second set has, once for each time that they come.
    pub added: String,
}

/// What the agent publishes of the fleet, for those who ask for the status.
#[derive(Debug)]
pub struct FleetBoard(Mutex<Standing>);

#[derive(Debug)]
struct Standing {
    view: FleetView,
    heard: Option<Instant>,
    twin: Option<String>,
    /// When it became silent, for people and for this process.
    silent: (SystemTime, Instant),
}

impl FleetBoard {
    /// Before etcd was asked for the first time.
    pub fn new(view: FleetView, state: &FleetState) -> Self {
        let board =
            Self(Mutex::new(Standing { view, heard: None, twin: None, silent: (SystemTime::now(), Instant::now()) }));
        board.stands(state);
        board
    }

    fn told(&self) -> MutexGuard<'_, Standing> {
        // A thread that panicked has changed all or nothing: each change is an assignment.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This is active and was seen.
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

    /// Whether this node's report stands in etcd, or why not. Returns whether that is new.
    pub fn reports(&self, outcome: Result<(), String>) -> bool {
        let error = outcome.err();
        let view = &mut self.told().view;
        let is_new = view.report_error != error;
        view.report_error = error;
        is_new
    }

    /// Another process writes this node's report, or not any more. Returns whether that is new.
    pub fn has_twin(&self, complaint: Option<String>) -> bool {
        let told = &mut self.told();
        let is_new = told.twin != complaint;
        told.twin = complaint;
        is_new
    }

    /// What is to be said of a process that writes this node's report.
    pub fn twin(&self) -> Option<String> {
        self.told().twin.clone()
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
        let FleetView { ring, sequence, seen, refused, error, report_error, .. } = &told.view;
        let mut degraded = Vec::new();
        if let Some(RefusedView { sequence: wanted, error, .. }) = refused {
            let wanted = wanted.map_or_else(String::new, |it| format!(" with the sequence {it}"));
            let stays = if *sequence > 0 { format!("{sequence} stays active") } else { "nothing changes".to_owned() };
            degraded.push(format!("the pointer of the ring {ring}{wanted} is not followed, and {stays}: {error}"));
        }
        if told.view.missing && *seen > 0 {
            degraded.push(format!(
                "etcd has no pointer of the ring {ring}, of which {seen} was seen: it was wiped, or the ring removed; the \
                 active set stays"
            ));
        }
        degraded.extend(report_error.iter().map(|why| format!("can't report to the fleet: {why}")));
        degraded.extend(told.twin.clone());
        let (since, at) = told.silent;
        if !told.view.connected && at.elapsed() >= SILENCE {
            let since = humantime::format_rfc3339_seconds(since);
            let why = error.as_deref().unwrap_or("nothing has come back yet");
            degraded.push(format!("etcd has not answered since {since}, and the active set stays: {why}"));
        }
        degraded
    }
}
