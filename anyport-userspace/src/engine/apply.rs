//! Rules from a file: all that were applied before go, in the same step in which the new ones come.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, HashSet},
    mem,
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::{info, warn};

use super::{
    Engine,
    commands::conflict_problem,
    kept::Keep,
    services::{Running, expect_fallbacks},
};
use crate::{
    api::{Applied, Apply, Changed, Kind, Problem},
    rules::{
        Change, Conflict, Held, Origin, Prefix, PrefixRules, Rule, ServiceName, Terms,
        file::RuleFile,
        lines::{Line, LineRule},
    },
    service::ServiceConfig,
};

/// Seconds for which something may wait to be confirmed: a day.
const LONGEST_WAIT: u64 = 24 * 60 * 60;

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
    /// See [`Kind`]. Nothing has changed.
    pub async fn apply(&mut self, text: String, options: &Apply) -> Result<Applied, Problem> {
        if !options.dry_run {
            self.expect_confirmed()?;
        }
        if options.confirm.is_some_and(|seconds| !(1..=LONGEST_WAIT).contains(&seconds)) {
            return Err(Problem::new(
                Kind::Invalid,
                format!("the time for the confirmation has to be from 1 to {LONGEST_WAIT} seconds"),
            ));
        }
        self.progress.begin("reading the rules", 1);
        let intent = self.intent(&text, Origin::Applied, options)?;
        self.expect_room_for(&intent.change, self.config().max_rules)?;
        if !options.force {
            self.expect_safe(&intent.change).await?;
        }
        let Intent { change, opened, closed, has_services, mut answer, .. } = intent;
        if options.dry_run || (change.is_empty() && opened.is_empty() && closed.is_empty()) {
            answer.generation = self.kernel.generation();
            return Ok(answer);
        }
        let services = self.replace_services(opened, &closed, Origin::Applied).await?;
        // What was read from lines says what the rules say now, line for line.
        let lines = (!has_services).then_some(text);
        let back = options.confirm.map(|_| (change.clone().inverse(), lines.clone()));
        let keep = if back.is_some() { Keep::InMemory } else { Keep::AppliedOnDisk(lines) };
        if let Err(problem) = self.change(change, keep).await {
            self.put_back(services).await;
            self.repair().await;
            return Err(problem);
        }
        answer.generation = self.kernel.generation();
        answer.notes.extend(self.kernel.notes_on_routes());
        match (back, options.confirm) {
            (Some((back, lines)), Some(seconds)) => {
                let until = Instant::now() + Duration::from_secs(seconds);
                self.unconfirmed = Some(Unconfirmed { until, back, services, lines });
                answer.confirm_within = Some(seconds);
            }
            _ => self.close_replaced(services).await,
        }
        Ok(answer)
    }

    /// Keeps what waits for it.
    ///
    /// # Errors
    /// Nothing waits, or the state can't be kept: then it still waits.
    pub async fn confirm(&mut self) -> Result<Changed, Problem> {
        let Some(mut unconfirmed) = self.unconfirmed.take() else {
            return Err(Problem::new(Kind::NotFound, "nothing waits to be confirmed")
                .hint("if the time was over, the rules before are in force again; apply the file once more"));
        };
        if let Err(error) = self.save(&unconfirmed.back, unconfirmed.lines.take()) {
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
            Ok(()) => info!("the rules before are in force again"),
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
                Kind::Conflict,
                format!("what was applied waits to be confirmed and is rolled back in {left} s"),
            )
            .hint("anyportctl confirm keeps it; or wait until it is rolled back")),
        }
    }

    /// What has to be done so that rules of this origin, and services where the file has them, are those of a file.
    pub(super) fn intent(&mut self, text: &str, origin: Origin, options: &Apply) -> Result<Intent, Problem> {
        let invalid = |why: String| Problem::new(Kind::Invalid, why);
        let RuleFile { services, mut rules } =
            RuleFile::parse(text, |terms| self.desired.shared(terms)).map_err(|error| invalid(error.to_string()))?;
        let mut answer = Applied { dry_run: options.dry_run, ..Applied::default() };
        let has_services = services.is_some();
        let (opened, closed) = match services {
            Some(services) => self.service_steps(services, origin, &mut answer)?,
            // A set of the fleet is the same on every node, whatever came before it.
            None if origin == Origin::Fleet => self.service_steps(Vec::new(), origin, &mut answer)?,
            None => (Vec::new(), Vec::new()),
        };
        if !rules.is_sorted_by_key(|((prefix, _), _)| *prefix) {
            rules.sort_by_key(|((prefix, _), _)| *prefix);
        }
        self.expect_services(&rules, &opened, &closed)?;
        let goes = |name: &ServiceName| closed.contains(name) || opened.iter().any(|it| it.name == *name);
        expect_fallbacks(&self.services.configs().filter(|it| !goes(&it.name)).chain(&opened).collect::<Vec<_>>())?;
        let change = self.difference(&rules, origin, options.prune, &mut answer)?;
        self.expect_unused(&closed, &change)?;
        let is_plain = !has_services && rules.chunk_by(|a, b| a.0.0 == b.0.0).all(has_no_double);
        Ok(Intent { change, opened, closed, has_services, is_plain, answer })
    }

    /// Which services have to be opened and closed, so that those of this origin are these.
    pub(super) fn service_steps(
        &self,
        services: Vec<ServiceConfig>,
        origin: Origin,
        answer: &mut Applied,
    ) -> Result<(Vec<ServiceConfig>, Vec<ServiceName>), Problem> {
        let names: Vec<_> = services.iter().map(|it| it.name.clone()).collect();
        let mut opened = Vec::new();
        for service in services {
            self.services.expect_enforceable(&service)?;
            match self.services.get(&service.name) {
                Some(running) if *running.config() == service => continue,
                // The one that is there when nobody has made one of its name.
                Some(running) if running.origin() == origin || running.is_preset() => {
                    answer.services.push(format!("~ {}", service.name));
                }
                Some(running) => {
                    let whose = match running.origin() {
                        Origin::Config => "in the configuration",
                        Origin::Fleet => "in the fleet's set",
                        Origin::Applied => "applied from a file",
                        Origin::Added => "added by hand",
                    };
                    return Err(Problem::new(
                        Kind::Conflict,
                        format!("the service {} is {whose} with other settings", service.name),
                    )
                    .hint("use another name, or give both the same settings"));
                }
                None => answer.services.push(format!("+ {}", service.name)),
            }
            opened.push(service);
        }
        let is_gone = |(name, running): &(&ServiceName, &Running)| running.origin() == origin && !names.contains(name);
        let mut closed: Vec<_> = self.services.iter().filter(is_gone).map(|(name, _)| name.clone()).collect();
        let preset = ServiceConfig::default_service();
        if closed.contains(&preset.name) {
            // That one is there whenever nobody has made one of its name.
            closed.retain(|name| *name != preset.name);
            answer.services.push(format!("~ {}", preset.name));
            opened.push(preset);
        }
        answer.services.extend(closed.iter().map(|name| format!("- {name}")));
        Ok((opened, closed))
    }

    /// Every rule must steer to a service that will be there.
    pub(super) fn expect_services(
        &self,
        rules: &[(LineRule, u32)],
        opened: &[ServiceConfig],
        closed: &[ServiceName],
    ) -> Result<(), Problem> {
        let is_there = |name: &ServiceName| {
            opened.iter().any(|it| it.name == *name) || self.services.get(name).is_some() && !closed.contains(name)
        };
        let mut last: Option<&ServiceName> = None;
        for ((_, terms), line) in rules {
            if last != Some(&terms.service) && !is_there(&terms.service) {
                return Err(Problem::new(
                    Kind::NotFound,
                    format!("{}there is no service {}", at_line(*line), terms.service),
                )
                .hint(self.services.hint_at_names()));
            }
            last = Some(&terms.service);
        }
        Ok(())
    }

    /// No rule that stays may steer to a service that goes.
    pub(super) fn expect_unused(&self, closed: &[ServiceName], change: &Change) -> Result<(), Problem> {
        if closed.is_empty() {
            return Ok(());
        }
        let goes = |prefix: &Prefix| change.removed.binary_search_by_key(prefix, |(it, _)| *it).is_ok();
        let stay =
            self.desired.rules().prefixes().filter(|(prefix, _)| !goes(prefix)).map(|(prefix, rules)| (*prefix, rules));
        let come = change.added.iter().map(|(prefix, rules)| (*prefix, rules));
        let mut all = stay.chain(come).flat_map(|(prefix, rules)| rules.numbered(prefix));
        match all.find(|rule| closed.contains(&rule.terms.service)) {
            None => Ok(()),
            Some(rule) => Err(Problem::new(
                Kind::Conflict,
                format!(
                    "there would be no service {} any more, but a rule stays that steers to it: {}",
                    rule.terms.service,
                    rule.to_rule()
                ),
            )
            .hint("keep the service in the file, or remove that rule first")),
        }
    }

    /// What has to change so that the rules of this origin are these, which are sorted by prefix.
    pub(super) fn difference(
        &self,
        rules: &[(LineRule, u32)],
        origin: Origin,
        prune: bool,
        answer: &mut Applied,
    ) -> Result<Change, Problem> {
        let mut change = Change::default();
        let mut here = self.desired.rules().prefixes().peekable();
        let mut there = rules.chunk_by(|a, b| a.0.0 == b.0.0).peekable();
        loop {
            let next = match (here.peek(), there.peek()) {
                (None, None) => break,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some((prefix, _)), Some(new)) => (*prefix).cmp(&new[0].0.0),
            };
            let before = if next == Ordering::Greater { None } else { here.next() };
            let new = if next == Ordering::Less { None } else { there.next() };
            let Some(prefix) = before.map(|(prefix, _)| *prefix).or(new.map(|new| new[0].0.0)) else { break };
            let before = before.map(|(_, rules)| rules);
            answer.change_prefix(&mut change, prefix, before, new.unwrap_or_default(), (origin, prune))?;
        }
        Ok(change)
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

/// Whether each of the rules of a prefix is there once.
fn has_no_double(rules: &[(LineRule, u32)]) -> bool {
    let mut seen = HashSet::new();
    rules.len() == 1 || rules.iter().all(|((_, terms), _)| seen.insert(terms))
}

/// Whether the rules of this origin of a prefix are these already.
fn is_same(before: &PrefixRules, new: &[(LineRule, u32)], origin: Origin, prune: bool) -> bool {
    let mut applied = before.iter().filter(|it| it.origins.contains(origin));
    let is_pruned = prune && before.iter().any(|it| it.origins.contains(Origin::Added));
    !is_pruned
        && new.len() <= 1
        && applied.next().map(|it| &it.terms) == new.first().map(|((_, terms), _)| terms)
        && applied.next().is_none()
}

/// The rules of a prefix once those of this origin are these.
fn after(
    prefix: Prefix,
    before: Option<&PrefixRules>,
    new: &[(LineRule, u32)],
    origin: Origin,
    prune: bool,
) -> Result<PrefixRules, Problem> {
    let mut after = before.cloned().unwrap_or_default();
    after.remove_origin(origin);
    if prune {
        after.remove_origin(Origin::Added);
    }
    let held = new.iter().map(|((_, terms), _)| Held { terms: Arc::clone(terms), origins: origin.into() });
    after.extend(prefix, held).map_err(|conflict| {
        let line_of = |rule: &Rule| new.iter().find(|((_, terms), _)| *terms == rule.terms).map(|(_, line)| line);
        let line = match &conflict {
            Conflict::Targets { new, old, .. } => line_of(new).max(line_of(old)),
            Conflict::Route(_) => new.first().map(|(_, line)| line),
        };
        let Problem { kind, error, hint } = conflict_problem(&conflict);
        let error = format!("{}{error}", at_line(line.copied().unwrap_or_default()));
        Problem { kind, error, hint }
    })?;
    Ok(after)
}

/// Where a rule stands, to begin a message with. Line 0 is nowhere.
fn at_line(line: u32) -> String {
    if line == 0 { String::new() } else { format!("line {line}: ") }
}

impl Applied {
    /// Gives a prefix these rules of an origin, in place of those of it that it has and, if asked to, of those that were added by
    /// hand. Prefixes come in order.
    pub(super) fn change_prefix(
        &mut self,
        change: &mut Change,
        prefix: Prefix,
        before: Option<&PrefixRules>,
        new: &[(LineRule, u32)],
        (origin, prune): (Origin, bool),
    ) -> Result<(), Problem> {
        if let Some(before) = before.filter(|before| is_same(before, new, origin, prune)) {
            self.unchanged += new.len();
            self.count_others(Some(before), origin, new.len());
            return Ok(());
        }
        let after = after(prefix, before, new, origin, prune)?;
        self.tell(prefix, before, &after, origin);
        if before.is_none_or(|before| *before != after) {
            change.removed.extend(before.map(|before| (prefix, before.clone())));
            if !after.is_empty() {
                change.added.push((prefix, after));
            }
        }
        Ok(())
    }

    /// Notes what becomes of a prefix's rules.
    fn tell(&mut self, prefix: Prefix, before: Option<&PrefixRules>, after: &PrefixRules, origin: Origin) {
        let was: HashSet<&Terms> = before.into_iter().flatten().map(|held| &*held.terms).collect();
        let is: HashSet<&Terms> = before.into_iter().flat_map(|_| after).map(|held| &*held.terms).collect();
        for held in before.into_iter().flatten() {
            if !is.contains(&*held.terms) {
                self.removed += 1;
                self.note_difference(|| format!("- {}", Line(&prefix, &held.terms)));
            }
        }
        for held in after {
            if !was.contains(&*held.terms) {
                self.added += 1;
                self.note_difference(|| format!("+ {}", Line(&prefix, &held.terms)));
            } else if held.origins.contains(origin) {
                self.unchanged += 1;
            }
        }
        let of_origin = after.iter().filter(|it| it.origins.contains(origin)).count();
        self.count_others(Some(after), origin, of_origin);
    }

    fn note_difference(&mut self, line: impl FnOnce() -> String) {
        if self.dry_run {
            self.difference.push(line());
        }
    }

    /// Counts the rules that stay though the file does not have them.
    fn count_others(&mut self, rules: Option<&PrefixRules>, origin: Origin, of_origin: usize) {
        let Some(rules) = rules.filter(|rules| rules.len() > of_origin) else { return };
        for held in rules.iter().filter(|it| !it.origins.contains(origin)) {
            if held.origins.contains(Origin::Config) {
                self.kept_of_config += 1;
            } else if held.origins.contains(Origin::Fleet) {
                self.kept_of_fleet += 1;
            } else {
                self.kept_added += 1;
            }
        }
    }
}
