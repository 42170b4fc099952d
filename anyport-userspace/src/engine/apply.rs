//! Rules from a file: all that were applied before go, in the same step in which the new ones come.

use std::{
    collections::BTreeMap,
    mem,
    time::{Duration, Instant},
};

use tracing::warn;

use super::{
    Engine,
    difference::{difference, expect_unused, has_no_double},
    kept::Keep,
    services::{Running, expect_fallbacks},
};
use crate::{
    api::{Applied, Apply, Changed, LONGEST_WAIT, Problem, ProblemKind},
    events::Author,
    rule_file::RuleFile,
    rules::{Change, Origin, ServiceName},
    service::ServiceConfig,
};

/// What an apply has done that rolls back by itself unless it is confirmed.
#[derive(Debug)]
pub(super) struct Unconfirmed {
    pub(super) until: Instant,
    back: Change,
    services: Replaced,
    /// The rules as lines, if that is what they were read from.
    lines: Option<String>,
}

/// The services that an apply has closed or replaced, and those that it has opened.
#[derive(Debug, Default)]
pub(super) struct Replaced {
    before: BTreeMap<ServiceName, Running>,
    opened: Vec<ServiceName>,
}

/// What an apply will do.
#[derive(Default)]
pub(super) struct Intent {
    pub(super) change: Change,
    /// Services to open, in place of those of the same name.
    pub(super) opened: Vec<ServiceConfig>,
    pub(super) closed: Vec<ServiceName>,
    pub(super) has_services: bool,
    /// Whether the file has nothing but rules, and each of them once.
    pub(super) is_plain: bool,
    pub(super) answer: Applied,
}

impl Engine {
    /// Makes the applied rules, and services where the file has them, equal to a file.
    ///
    /// # Errors
    /// See [`ProblemKind`]. Nothing has changed.
    pub async fn apply(&mut self, text: String, options: &Apply) -> Result<Applied, Problem> {
        if !options.dry_run {
            self.expect_confirmed()?;
        }
        if options.confirm.is_some_and(|seconds| !(1..=LONGEST_WAIT).contains(&seconds)) {
            return Err(Problem::new(
                ProblemKind::Invalid,
                format!("the time for the confirmation has to be from 1 to {LONGEST_WAIT} seconds"),
            ));
        }
        self.progress.begin("reading the rules", 1);
        let mut intent = self.intent(&text, Origin::Applied, options)?;
        self.expect_room_for(&intent.change, self.config().max_rules)?;
        if !options.force {
            self.expect_safe(&intent.change).await?;
            let origins = if options.prune { &[Origin::Applied, Origin::Added][..] } else { &[Origin::Applied] };
            self.expect_most_stay(&intent.change, origins, &mut intent.answer)?;
        }
        let Intent { change, opened, closed, has_services, mut answer, .. } = intent;
        if options.dry_run || (change.is_empty() && opened.is_empty() && closed.is_empty()) {
            answer.generation = self.kernel.generation();
            return Ok(answer);
        }
        let services = self.replace_services(opened, &closed, Origin::Applied).await?;
        // What was read from lines says what the rules say now, line for line.
        let lines = (!has_services).then_some(text);
        let (keep, lines) =
            if options.confirm.is_some() { (Keep::InMemory, lines) } else { (Keep::AppliedOnDisk(lines), None) };
        let done = match self.change(change, keep).await {
            Ok(done) => done,
            Err(problem) => {
                self.put_back(services).await;
                self.repair().await;
                return Err(problem);
            }
        };
        answer.generation = self.kernel.generation();
        answer.notes.extend(self.kernel.notes_on_routes());
        match options.confirm {
            Some(seconds) => {
                let until = Instant::now() + Duration::from_secs(seconds);
                self.unconfirmed = Some(Unconfirmed { until, back: done.inverse(), services, lines });
                answer.confirm_within = Some(seconds);
            }
            None => self.close_replaced(services).await,
        }
        Ok(answer)
    }

    /// Keeps what waits for it.
    ///
    /// # Errors
    /// Nothing waits, or the state can't be kept: then it still waits.
    pub async fn confirm(&mut self) -> Result<Changed, Problem> {
        let Some(mut unconfirmed) = self.unconfirmed.take() else {
            return Err(Problem::new(ProblemKind::NotFound, "nothing waits to be confirmed")
                .hint("if the time was over, the previous rules are active again; apply the file once more"));
        };
        if let Err(error) = self.keep_applied(&unconfirmed.back, unconfirmed.lines.take()) {
            self.unconfirmed = Some(unconfirmed);
            return Err(error.into());
        }
        self.close_replaced(unconfirmed.services).await;
        Ok(self.changed(1, Vec::new()))
    }

    /// Goes back to the rules before an apply that was not confirmed in time.
    pub(super) async fn roll_back_if_due(&mut self) {
        let Some(Unconfirmed { back, services, .. }) = self.unconfirmed.take_if(|it| it.until <= Instant::now()) else {
            return;
        };
        warn!("nobody confirmed what was applied: going back to the rules before");
        // First the services that the rules before steer to.
        let opened = self.swap_in(services);
        match self.change(back.clone(), Keep::OnDisk).await {
            Ok(_) => {
                let what = "nobody confirmed what was applied: the previous rules are active again";
                self.record(Author::other("anyportd"), "rollback", what.to_owned());
            }
            Err(problem) => {
                let why = format!("go back to the rules before, which is tried again: {}", problem.error);
                self.kernel.note_broken(why);
                let until = Instant::now();
                self.unconfirmed = Some(Unconfirmed { until, back, services: Replaced::default(), lines: None });
            }
        }
        self.close_replaced(opened).await;
    }

    /// Seconds until what was applied is rolled back, if it waits to be confirmed.
    pub(super) fn unconfirmed_for(&self) -> Option<u64> {
        let until = self.unconfirmed.as_ref()?.until;
        Some(until.saturating_duration_since(Instant::now()).as_secs())
    }

    /// Refuses a change while another one waits to be confirmed, since going back would lose it.
    pub(super) fn expect_confirmed(&self) -> Result<(), Problem> {
        match self.unconfirmed_for() {
            None => Ok(()),
            Some(left) => Err(Problem::new(
                ProblemKind::Conflict,
                format!("what was applied waits to be confirmed and is rolled back in {left} s"),
            )
            .hint("anyportctl confirm keeps it; or wait until it is rolled back")),
        }
    }

    /// What has to be done so that rules of this origin, and services where the file has them, are those of a file.
    pub(super) fn intent(&mut self, text: &str, origin: Origin, options: &Apply) -> Result<Intent, Problem> {
        let invalid = |why: String| Problem::new(ProblemKind::Invalid, why);
        let RuleFile { services, mut rules } =
            RuleFile::parse(text, |terms| self.desired.shared(terms)).map_err(|error| invalid(error.to_string()))?;
        let mut answer = Applied { dry_run: options.dry_run, ..Applied::default() };
        let has_services = services.is_some();
        let (opened, closed) = match services {
            Some(services) => self.services.steps(services, origin, &mut answer)?,
            // A set of the fleet is the same on every node, whatever came before it.
            None if origin == Origin::Fleet => self.services.steps(Vec::new(), origin, &mut answer)?,
            None => (Vec::new(), Vec::new()),
        };
        if !rules.is_sorted_by_key(|((prefix, _), _)| *prefix) {
            rules.sort_by_key(|((prefix, _), _)| *prefix);
        }
        self.services.expect_for(&rules, &opened, &closed)?;
        let goes = |name: &ServiceName| closed.contains(name) || opened.iter().any(|it| it.name == *name);
        expect_fallbacks(&self.services.configs().filter(|it| !goes(&it.name)).chain(&opened).collect::<Vec<_>>())?;
        let change = difference(self.desired.rules(), &rules, origin, options.prune, &mut answer)?;
        expect_unused(self.desired.rules(), &closed, &change)?;
        let is_plain = !has_services && rules.chunk_by(|a, b| a.0.0 == b.0.0).all(has_no_double);
        Ok(Intent { change, opened, closed, has_services, is_plain, answer })
    }

    pub(super) async fn replace_services(
        &mut self,
        opened: Vec<ServiceConfig>,
        closed: &[ServiceName],
        origin: Origin,
    ) -> Result<Replaced, Problem> {
        let mut replaced = Replaced::default();
        for config in opened {
            let name = config.name.clone();
            let before = self.services.take(&name);
            replaced.before.extend(before.map(|before| (name.clone(), before)));
            let origin = if config == ServiceConfig::default_service() { Origin::Config } else { origin };
            if let Err(error) = self.open_service(config, origin) {
                self.put_back(replaced).await;
                return Err(error.into());
            }
            replaced.opened.push(name);
        }
        for name in closed {
            replaced.before.extend(self.services.take(name).map(|it| (name.clone(), it)));
        }
        Ok(replaced)
    }

    /// Puts the services back that were there before; what is returned are those in whose place they are now.
    fn swap_in(&mut self, Replaced { before, opened }: Replaced) -> Replaced {
        let mut out = Replaced::default();
        for name in opened {
            out.before.extend(self.services.take(&name).map(|it| (name, it)));
        }
        self.services.put_back(before);
        out
    }

    pub(super) async fn put_back(&mut self, services: Replaced) {
        let opened = self.swap_in(services);
        self.close_replaced(opened).await;
    }

    pub(super) async fn close_replaced(&mut self, mut services: Replaced) {
        for running in mem::take(&mut services.before).into_values() {
            self.close_service(running).await;
        }
    }
}
