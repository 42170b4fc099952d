//! Drift: what others take out of the kernel is noticed and put back.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant, SystemTime},
};

use tracing::{error, info, warn};

use super::Kernel;
use crate::{
    api::RepairView,
    engine::{
        desired::{Desired, Steps},
        services::Services,
    },
    rules::Prefix,
    steering::{Drift, ObjectKind},
};

/// So often in a row things are put back at once. What takes them away once more manages them too, and is not fought.
const PATIENCE: u32 = 5;
/// What belongs to one row: how long after it was put back something may be lost again.
const ROW: Duration = Duration::from_mins(2);
/// Before something is put back once more, or another try where that failed. It is doubled each time.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_mins(1);
/// How often all local routes are listed without a reason to.
const ROUTES_INTERVAL: Duration = Duration::from_mins(1);
/// And how many times longer than listing them takes the pause between two lists is at least.
const ROUTES_SHARE: u32 = 20;

/// A pause that grows with each failure.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct BackOff {
    tries: u32,
    until: Option<Instant>,
}

impl BackOff {
    pub(super) fn is_over(&self) -> bool {
        self.until.is_none_or(|until| until <= Instant::now())
    }

    pub(super) fn fail(&mut self) -> Duration {
        let pause = (FIRST_PAUSE * 2_u32.saturating_pow(self.tries)).min(LONGEST_PAUSE);
        self.tries = self.tries.saturating_add(1);
        self.until = Some(Instant::now() + pause);
        pause
    }
}

/// What was lost and put back, by kind.
#[derive(Debug, Default)]
pub(super) struct RepairsByKind(BTreeMap<ObjectKind, Repairs>);

/// Things of one kind.
#[derive(Debug)]
struct Repairs {
    /// How often they were put back.
    times: u64,
    /// What was put back last, and when.
    what: String,
    at: SystemTime,
    /// Times in a row, the first of them, and when it goes on.
    row: u32,
    since: SystemTime,
    last: Option<Instant>,
    pause: BackOff,
    /// What is gone at the moment, and why it could not be put back.
    lost: Option<String>,
    failure: Option<String>,
}

impl Repairs {
    fn new() -> Self {
        let now = SystemTime::now();
        Self {
            times: 0,
            what: String::new(),
            at: now,
            row: 0,
            since: now,
            last: None,
            pause: BackOff::default(),
            lost: None,
            failure: None,
        }
    }

    fn is_in_a_row(&self) -> bool {
        self.last.is_some_and(|last| last.elapsed() < ROW)
    }

    fn put_back(&mut self, what: String) {
        if !self.is_in_a_row() {
            (self.row, self.since, self.pause) = (0, SystemTime::now(), BackOff::default());
        }
        self.times += 1;
        self.row += 1;
        (self.what, self.at, self.last) = (what, SystemTime::now(), Some(Instant::now()));
        self.failure = None;
        if self.row >= PATIENCE {
            self.pause.fail();
        }
    }
}

impl RepairsByKind {
    fn of(&mut self, kind: ObjectKind) -> &mut Repairs {
        self.0.entry(kind).or_insert_with(Repairs::new)
    }

    /// Notes what is lost now. What was lost before and is not any more has been put back, by us if we have `tried`.
    fn note(&mut self, lost: &[Drift], tried: bool) {
        for (kind, repairs) in &mut self.0 {
            let is_lost = lost.iter().any(|loss| loss.kind == *kind);
            if let Some(what) = repairs.lost.take_if(|_| !is_lost) {
                if tried || repairs.failure.is_some() {
                    warn!("another program removed {what}: it is put back");
                    repairs.put_back(what);
                } else {
                    info!("another program has put back {what}");
                }
            }
        }
        let mut by_kind: BTreeMap<ObjectKind, Vec<&str>> = BTreeMap::new();
        for loss in lost {
            by_kind.entry(loss.kind).or_default().push(&loss.what);
        }
        for (kind, whats) in by_kind {
            self.of(kind).lost = Some(in_words(&whats));
        }
    }

    /// Whether something that is lost is to be put back now.
    fn is_due(&self) -> bool {
        self.0.values().any(|repairs| {
            repairs.lost.is_some() && (repairs.pause.is_over() || !repairs.is_in_a_row() && repairs.failure.is_none())
        })
    }

    fn failed(&mut self, why: &str) {
        for repairs in self.0.values_mut() {
            let Some(what) = &repairs.lost else { continue };
            let pause = repairs.pause.fail();
            error!("{what} is gone and could not be put back, which is tried again in {} s: {why}", pause.as_secs());
            repairs.failure = Some(why.to_owned());
        }
    }

    fn views(&self) -> Vec<RepairView> {
        let repaired = self.0.iter().filter(|(_, repairs)| repairs.times > 0);
        let views = repaired.map(|(kind, repairs)| RepairView {
            kind: *kind,
            times: repairs.times,
            last: repairs.what.clone(),
            at: humantime::format_rfc3339_seconds(repairs.at).to_string(),
        });
        views.collect()
    }

    fn lost_steering(&self) -> Option<&str> {
        let is_needed =
            |kind: &ObjectKind| !matches!(kind, ObjectKind::Pin | ObjectKind::Route | ObjectKind::Interface);
        self.0.iter().filter(|(kind, _)| is_needed(kind)).find_map(|(_, repairs)| repairs.lost.as_deref())
    }

    /// What is gone at the moment, and what others remove again and again.
    pub(super) fn degraded(&self, is_reconciled: bool) -> Vec<String> {
        let mut lines = Vec::new();
        // Interfaces come and go, and nothing is wrong with that.
        for (_, repairs) in self.0.iter().filter(|(kind, _)| **kind != ObjectKind::Interface) {
            let since = humantime::format_rfc3339_seconds(repairs.since);
            let row = format!("removed by others and put back {} times since {since}", repairs.row);
            match (&repairs.lost, &repairs.failure) {
                (Some(what), _) if !is_reconciled => lines.push(format!("{what} is gone, and is not put back (mend)")),
                (Some(what), Some(why)) => {
                    lines.push(format!("{what} is gone and could not be put back, which is tried again: {why}"));
                }
                (Some(what), None) if repairs.row >= PATIENCE => {
                    lines.push(format!("{what} is gone: {row}, and will be again after a pause"));
                }
                (Some(what), None) => lines.push(format!("{what} is gone, and is about to be put back")),
                (None, _) if repairs.row >= PATIENCE && repairs.is_in_a_row() => {
                    lines.push(format!("{} was {row}", repairs.what));
                }
                (None, _) => {}
            }
        }
        lines
    }
}

/// Some things, and how many more there are.
fn in_words(whats: &[&str]) -> String {
    const SOME: usize = 3;
    let named = whats[..whats.len().min(SOME)].join(", ");
    match whats.len().saturating_sub(SOME) {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}

/// When to list the local routes.
#[derive(Debug)]
pub(super) struct RoutesLook {
    /// Whether there was news of them.
    is_suspicious: bool,
    /// When they were listed last, and how long that took.
    at: Instant,
    took: Duration,
    /// The blocks whose routes were missing then.
    missing: Vec<Prefix>,
}

impl Default for RoutesLook {
    fn default() -> Self {
        Self { is_suspicious: false, at: Instant::now(), took: Duration::ZERO, missing: Vec::new() }
    }
}

impl RoutesLook {
    fn is_due(&self) -> bool {
        let is_wanted = self.is_suspicious || !self.missing.is_empty() || self.at.elapsed() >= ROUTES_INTERVAL;
        is_wanted && self.at.elapsed() >= self.took * ROUTES_SHARE
    }
}

impl Kernel {
    /// Has all pauses be over, and all rows.
    #[cfg(test)]
    pub(in crate::engine) fn hurry(&mut self) {
        self.retry.until = None;
        self.drift.0.values_mut().for_each(|repairs| (repairs.pause.until, repairs.last) = (None, None));
    }

    /// Has the next check include the routes, if there is reason for it.
    #[cfg(test)]
    pub(in crate::engine) fn look_at_once(&mut self) {
        self.routes_look.took = Duration::ZERO;
    }

    /// Notes that routes of ours may be gone.
    pub(in crate::engine) fn suspect_routes(&mut self) {
        self.routes_look.is_suspicious = true;
    }

    /// Has the back end check interfaces and sockets again, and notes what it has put right by itself.
    ///
    /// # Errors
    /// The kernel's.
    pub(in crate::engine) fn refresh(&mut self) -> anyhow::Result<()> {
        for Drift { kind, what } in self.steering.refresh()? {
            if kind == ObjectKind::Interface {
                info!("{what}");
            } else {
                warn!("another program removed {what}: it is put back");
            }
            self.drift.of(kind).put_back(what);
        }
        Ok(())
    }

    /// What is lost and what others remove again and again; `is_reconciled` says whether it is put back.
    pub(in crate::engine) fn drift(&self, is_reconciled: bool) -> Vec<String> {
        self.drift.degraded(is_reconciled)
    }

    /// What was put right, by kind.
    pub(in crate::engine) fn repairs(&self) -> Vec<RepairView> {
        self.drift.views()
    }

    /// What is gone at the moment without which nothing is steered. Routes are another matter, see [`Self::unsteered`].
    pub(in crate::engine) fn lost_steering(&self) -> Option<&str> {
        self.drift.lost_steering()
    }

    /// Why the kernel may not steer what is steered of a prefix.
    pub(in crate::engine) fn unsteered(&self, prefix: &Prefix) -> Option<String> {
        let lost = || self.drift.lost_steering().map(|what| format!("{what} is gone"));
        let is_missing = |block: &&Prefix| block.is_within(prefix) || prefix.is_within(block);
        let missing = || {
            let block = self.routes_look.missing.iter().find(is_missing)?;
            Some(format!("the local route to {block} is gone"))
        };
        self.broken.clone().or_else(lost).or_else(missing)
    }

    /// Puts back what others have removed, if that `is_wanted`.
    pub(in crate::engine) async fn reconcile(&mut self, desired: &Desired, services: &Services, is_wanted: bool) {
        // A repair of everything is already running.
        if self.broken.is_some() {
            return;
        }
        let Some(lost) = self.lost().await else { return };
        self.drift.note(&lost, false);
        if !is_wanted || !self.drift.is_due() {
            return;
        }
        let restored = self.restore(&lost, desired, services).await;
        let left = self.lost().await;
        if let Some(left) = &left {
            self.drift.note(left, true);
        }
        match restored {
            Err(error) => self.drift.failed(&format!("{error:#}")),
            Ok(()) if left.is_none_or(|left| !left.is_empty()) => {
                self.drift.failed(self.steering.unrepaired().unwrap_or("it is gone again at once"));
            }
            Ok(()) => {}
        }
    }

    /// What is not in the kernel any more. Nothing if that can't be found out.
    async fn lost(&mut self) -> Option<Vec<Drift>> {
        let lost = match self.steering.lost() {
            Ok(mut lost) => {
                lost.extend(self.wrong.as_ref().map(|what| Drift::new(ObjectKind::Table, what)));
                self.lost_routes().await.map(|routes| [lost, routes].concat())
            }
            Err(error) => Err(error),
        };
        let before = self.unseen.take();
        match lost {
            Ok(lost) => Some(lost),
            Err(error) => {
                let unseen = format!("it can't be seen whether the kernel has everything still: {error:#}");
                if before.as_ref() != Some(&unseen) {
                    error!("{unseen}");
                }
                self.unseen = Some(unseen);
                None
            }
        }
    }

    async fn lost_routes(&mut self) -> anyhow::Result<Vec<Drift>> {
        if self.routes_look.is_due() {
            let at = Instant::now();
            let missing = self.routes.missing(&self.coverage).await?;
            self.routes_look = RoutesLook { is_suspicious: false, at, took: at.elapsed(), missing };
        }
        let lost = |block| Drift::new(ObjectKind::Route, format!("the local route to {block}"));
        Ok(self.routes_look.missing.iter().map(lost).collect())
    }

    async fn restore(&mut self, lost: &[Drift], desired: &Desired, services: &Services) -> anyhow::Result<()> {
        if lost.iter().any(|loss| loss.kind != ObjectKind::Route) {
            self.steering.forget_lost()?;
            // Where the table itself is wrong, nothing of it is taken for granted.
            let changed = if self.wrong.take().is_some() { None } else { Some(&[][..]) };
            if let Err(error) = self.steer(desired, services, changed, &Steps::default()) {
                // Which of it the kernel holds is not known.
                self.broken = Some(format!("the kernel may not hold these rules, which is tried again: {error:#}"));
                return Err(error);
            }
        }
        if lost.iter().any(|loss| loss.kind == ObjectKind::Route) {
            self.foreign_routes = self.routes.set(&self.coverage).await?;
            self.routes_look.took = Duration::ZERO;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Drift, ObjectKind, PATIENCE, RepairsByKind, in_words};

    fn lost() -> [Drift; 1] {
        [Drift::new(ObjectKind::Chain, "the chain")]
    }

    fn times(drift: &RepairsByKind) -> u64 {
        drift.views().iter().map(|view| view.times).sum()
    }

    #[test]
    fn what_goes_again_and_again_comes_back_after_pauses() {
        let mut drift = RepairsByKind::default();
        for time in 1..=PATIENCE {
            drift.note(&lost(), false);
            assert!(drift.is_due(), "time {time}");
            drift.note(&[], true);
            assert_eq!(times(&drift), u64::from(time));
        }
        assert!(
            drift.degraded(true)[0].contains("removed by others and put back 5 times since"),
            "{:?}",
            drift.degraded(true)
        );
        drift.note(&lost(), false);
        assert!(!drift.is_due());
        assert!(drift.degraded(true)[0].contains("after a pause"), "{:?}", drift.degraded(true));
        // Others have put it back meanwhile.
        drift.note(&[], false);
        assert_eq!(times(&drift), u64::from(PATIENCE));
    }

    #[test]
    fn what_fails_is_said_and_tried_again() {
        let mut drift = RepairsByKind::default();
        drift.note(&lost(), false);
        drift.failed("no room");
        assert!(!drift.is_due() && times(&drift) == 0);
        assert!(drift.degraded(true)[0].contains("could not be put back, which is tried again: no room"));
        // By another try, or by a full rebuild.
        drift.note(&[], false);
        assert!(drift.degraded(true).is_empty() && times(&drift) == 1);
    }

    #[test]
    fn many_are_few_words() {
        assert_eq!(in_words(&["a"]), "a");
        assert_eq!(in_words(&["a", "b", "c", "d", "e"]), "a, b, c and 2 more");
    }
}
