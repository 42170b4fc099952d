//! What others take out of the kernel is noticed and put back.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant, SystemTime},
};

use tracing::{error, info, warn};

use super::{Engine, change::Steps};
use crate::{
    api::MendedView,
    rules::Prefix,
    steering::{Kind, Loss},
};

/// So often in a row things are put back at once. Whoever takes them away once more manages them too, and is not fought.
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
pub(super) struct Mends(BTreeMap<Kind, Mend>);

/// Things of one kind.
#[derive(Debug)]
struct Mend {
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

impl Mend {
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

    fn mended(&mut self, what: String) {
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

impl Mends {
    fn of(&mut self, kind: Kind) -> &mut Mend {
        self.0.entry(kind).or_insert_with(Mend::new)
    }

    /// Notes what is lost now. What was lost before and is not any more has been put back, by us if we have `tried`.
    fn note(&mut self, lost: &[Loss], tried: bool) {
        for (kind, mend) in &mut self.0 {
            let is_lost = lost.iter().any(|loss| loss.kind == *kind);
            if let Some(what) = mend.lost.take_if(|_| !is_lost) {
                if tried || mend.failure.is_some() {
                    warn!("somebody removed {what}: it is put back");
                    mend.mended(what);
                } else {
                    info!("somebody has put back {what}");
                }
            }
        }
        let mut by_kind: BTreeMap<Kind, Vec<&str>> = BTreeMap::new();
        for loss in lost {
            by_kind.entry(loss.kind).or_default().push(&loss.what);
        }
        for (kind, whats) in by_kind {
            self.of(kind).lost = Some(in_words(&whats));
        }
    }

    /// Whether something that is lost is to be put back now.
    fn is_due(&self) -> bool {
        self.0
            .values()
            .any(|mend| mend.lost.is_some() && (mend.pause.is_over() || !mend.is_in_a_row() && mend.failure.is_none()))
    }

    fn failed(&mut self, why: &str) {
        for mend in self.0.values_mut() {
            let Some(what) = &mend.lost else { continue };
            let pause = mend.pause.fail();
            error!("{what} is gone and could not be put back, which is tried again in {} s: {why}", pause.as_secs());
            mend.failure = Some(why.to_owned());
        }
    }

    /// What was put right, by kind.
    pub(super) fn views(&self) -> Vec<MendedView> {
        let mended = self.0.iter().filter(|(_, mend)| mend.times > 0);
        let views = mended.map(|(kind, mend)| MendedView {
            kind: *kind,
            times: mend.times,
            last: mend.what.clone(),
            at: humantime::format_rfc3339_seconds(mend.at).to_string(),
        });
        views.collect()
    }

    /// What is gone at the moment without which nothing is steered. Routes are another matter, see [`RoutesLook::missing`].
    pub(super) fn lost_steering(&self) -> Option<&str> {
        let is_needed = |kind: &Kind| !matches!(kind, Kind::Pin | Kind::Route | Kind::Interface);
        self.0.iter().filter(|(kind, _)| is_needed(kind)).find_map(|(_, mend)| mend.lost.as_deref())
    }

    /// What is gone at the moment, and what others remove again and again.
    pub(super) fn degraded(&self, is_mending: bool) -> Vec<String> {
        let mut lines = Vec::new();
        // Interfaces come and go, and nothing is wrong with that.
        for (_, mend) in self.0.iter().filter(|(kind, _)| **kind != Kind::Interface) {
            let since = humantime::format_rfc3339_seconds(mend.since);
            let row = format!("removed by others and put back {} times since {since}", mend.row);
            match (&mend.lost, &mend.failure) {
                (Some(what), _) if !is_mending => lines.push(format!("{what} is gone, and is not put back (mend)")),
                (Some(what), Some(why)) => {
                    lines.push(format!("{what} is gone and could not be put back, which is tried again: {why}"));
                }
                (Some(what), None) if mend.row >= PATIENCE => {
                    lines.push(format!("{what} is gone: {row}, and will be again after a pause"));
                }
                (Some(what), None) => lines.push(format!("{what} is gone, and is about to be put back")),
                (None, _) if mend.row >= PATIENCE && mend.is_in_a_row() => {
                    lines.push(format!("{} was {row}", mend.what));
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
    /// The blocks that had no local route when that was looked at last.
    pub(super) fn missing(&self) -> &[Prefix] {
        &self.missing
    }

    fn is_due(&self) -> bool {
        let is_wanted = self.is_suspicious || !self.missing.is_empty() || self.at.elapsed() >= ROUTES_INTERVAL;
        is_wanted && self.at.elapsed() >= self.took * ROUTES_SHARE
    }
}

impl Engine {
    /// Has all pauses be over, and all rows.
    #[cfg(test)]
    pub(super) fn hurry(&mut self) {
        self.repairs.until = None;
        self.mends.0.values_mut().for_each(|mend| (mend.pause.until, mend.last) = (None, None));
    }

    /// Has the next look be one at the routes, too, if there is reason for it.
    #[cfg(test)]
    pub(super) fn look_at_once(&mut self) {
        self.routes_look.took = Duration::ZERO;
    }

    /// Notes that routes of ours may be gone.
    pub fn suspect_routes(&mut self) {
        self.routes_look.is_suspicious = true;
    }

    /// Notes what the back end has put right by itself.
    pub(super) fn note_put_right(&mut self, news: Vec<Loss>) {
        for Loss { kind, what } in news {
            if kind == Kind::Interface {
                info!("{what}");
            } else {
                warn!("somebody removed {what}: it is put back");
            }
            self.mends.of(kind).mended(what);
        }
    }

    /// Puts back what others have removed.
    pub(super) async fn mend(&mut self) {
        // Making everything equal to the rules is under way already.
        if self.broken.is_some() {
            return;
        }
        let Some(lost) = self.lost().await else { return };
        self.mends.note(&lost, false);
        if !self.config.mend || !self.mends.is_due() {
            return;
        }
        let put_back = self.restore(&lost).await;
        let left = self.lost().await;
        if let Some(left) = &left {
            self.mends.note(left, true);
        }
        match put_back {
            Err(error) => self.mends.failed(&format!("{error:#}")),
            Ok(()) if left.is_none_or(|left| !left.is_empty()) => self.mends.failed("it is gone again at once"),
            Ok(()) => {}
        }
    }

    /// What is not in the kernel any more. Nothing if that can't be found out.
    async fn lost(&mut self) -> Option<Vec<Loss>> {
        let lost = match self.steering.lost() {
            Ok(lost) => self.lost_routes().await.map(|routes| [lost, routes].concat()),
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

    async fn lost_routes(&mut self) -> anyhow::Result<Vec<Loss>> {
        if self.routes_look.is_due() {
            let at = Instant::now();
            let missing = self.routes.missing(&self.coverage).await?;
            self.routes_look = RoutesLook { is_suspicious: false, at, took: at.elapsed(), missing };
        }
        let lost = |block| Loss::new(Kind::Route, format!("the local route to {block}"));
        Ok(self.routes_look.missing.iter().map(lost).collect())
    }

    async fn restore(&mut self, lost: &[Loss]) -> anyhow::Result<()> {
        if lost.iter().any(|loss| loss.kind != Kind::Route) {
            self.steering.forget_lost()?;
            if let Err(error) = self.steer(Some(&[]), &Steps::default()) {
                // Which of it the kernel holds is not known.
                self.broken = Some(format!("the kernel may not hold these rules, which is tried again: {error:#}"));
                return Err(error);
            }
        }
        if lost.iter().any(|loss| loss.kind == Kind::Route) {
            self.foreign_routes = self.routes.set(&self.coverage).await?;
            self.routes_look.took = Duration::ZERO;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Kind, Loss, Mends, PATIENCE, in_words};

    fn lost() -> [Loss; 1] {
        [Loss::new(Kind::Chain, "the chain")]
    }

    fn times(mends: &Mends) -> u64 {
        mends.views().iter().map(|view| view.times).sum()
    }

    #[test]
    fn what_goes_again_and_again_comes_back_after_pauses() {
        let mut mends = Mends::default();
        for time in 1..=PATIENCE {
            mends.note(&lost(), false);
            assert!(mends.is_due(), "time {time}");
            mends.note(&[], true);
            assert_eq!(times(&mends), u64::from(time));
        }
        assert!(
            mends.degraded(true)[0].contains("removed by others and put back 5 times since"),
            "{:?}",
            mends.degraded(true)
        );
        mends.note(&lost(), false);
        assert!(!mends.is_due());
        assert!(mends.degraded(true)[0].contains("after a pause"), "{:?}", mends.degraded(true));
        // Somebody else has put it back meanwhile.
        mends.note(&[], false);
        assert_eq!(times(&mends), u64::from(PATIENCE));
    }

    #[test]
    fn what_fails_is_said_and_tried_again() {
        let mut mends = Mends::default();
        mends.note(&lost(), false);
        mends.failed("no room");
        assert!(!mends.is_due() && times(&mends) == 0);
        assert!(mends.degraded(true)[0].contains("could not be put back, which is tried again: no room"));
        // By another try, or by all being made anew.
        mends.note(&[], false);
        assert!(mends.degraded(true).is_empty() && times(&mends) == 1);
    }

    #[test]
    fn many_are_few_words() {
        assert_eq!(in_words(&["a"]), "a");
        assert_eq!(in_words(&["a", "b", "c", "d", "e"]), "a, b, c and 2 more");
    }
}
