//! `anyportctl fleet rollout`: gives rings a rule set one by one, and takes it back if nodes fail.

use std::{cell::Cell, collections::BTreeMap, path::PathBuf, time::Duration};

use serde::Serialize;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep},
};

use super::{
    bar::Bar,
    change::{Change, How, Prepared, RingChanged},
    publish::{pointer_of, read},
};
use crate::{
    api::{Problem, ProblemKind},
    cli::{Output, lists::Source},
    fleet::{
        etcd::{Etcd, Node, Ring, Skipped},
        layout::{Hash, Name, Pointer},
        report::{Health, NodeState},
    },
    text::{list_of, remark},
};

/// How often the nodes' reports are read.
const INTERVAL: Duration = Duration::from_millis(500);

/// Gives several rings a set, one after the other, for as long as their nodes stay well.
///
/// Each ring gets the set once the previous ring has proven it: all of its nodes that report have it active within the time that
/// --within gives, and then for the time that --gate gives none of them refuses it, gets degraded or goes. Otherwise the ring gets back
/// what it had, and the rings behind it are not touched. If this command is interrupted meanwhile, the ring keeps what it has, and the
/// command says which ring has what.
#[derive(Debug, clap::Args)]
pub(super) struct Rollout {
    /// The file, as for publish; - for standard input [default: what the first ring has]
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// The rings, in order, such as canary,main
    #[arg(long, required = true, value_name = "RINGS", value_delimiter = ',')]
    rings: Vec<Name>,
    /// How long a ring has to stay well before the next one
    #[arg(long, value_name = "TIME", value_parser = crate::human_duration::parse, default_value = "5m")]
    gate: Duration,
    /// How long nodes may take to have the set active
    #[arg(long, value_name = "TIME", value_parser = crate::human_duration::parse, default_value = "2m")]
    within: Duration,
    #[command(flatten)]
    how: How,
}

/// How far a rollout has come, a line each.
#[derive(Serialize)]
struct Progress {
    ring: Name,
    step: Step,
    sequence: u64,
    set: Hash,
    /// Nodes that are watched.
    nodes: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Step {
    /// All nodes that are watched have the set active.
    Applied,
    /// They stayed well for the time of the gate.
    Passed,
    /// The ring has got back what it had.
    RolledBack,
}

/// The nodes of a ring before it is changed, and how they were.
type Watched = BTreeMap<Name, Health>;

/// How a ring does.
#[derive(Debug, PartialEq, Eq)]
enum RingHealth {
    /// So many nodes have the set active, and nothing is wrong.
    Well { applied: usize },
    /// Why it should not have the set.
    Worse(String),
    /// Another client has changed the ring.
    Overtaken,
}

/// How far a rollout has come.
#[derive(Clone, Copy, Default)]
struct Reached {
    /// Which of the rings it is at.
    ring: usize,
    step: Reaching,
}

#[derive(Clone, Copy, Default)]
enum Reaching {
    #[default]
    Before,
    Changing,
    Watching {
        sequence: u64,
    },
}

/// Ends when the operator has enough, by Ctrl-C or a signal of a program.
fn interrupted() -> Result<impl Future<Output = ()>, Problem> {
    let failed = |error| Problem::new(ProblemKind::Failed, format!("wait for signals: {error}"));
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

/// Why a ring is not followed by the next one.
enum Stop {
    /// It should not have the set.
    Worse(String),
    Failed(Problem),
}

impl From<Problem> for Stop {
    fn from(problem: Problem) -> Self {
        Self::Failed(problem)
    }
}

impl Rollout {
    pub(super) async fn run(
        self,
        connect: impl AsyncFnOnce() -> Result<Etcd, Problem>,
        out: &mut Output<'_>,
    ) -> Result<(), Problem> {
        self.validate()?;
        let of_file = self.file.clone().map(|file| read(&Source::of(file))).transpose()?;
        let change = self.how.read()?;
        let etcd = connect().await?;
        let set = if let Some(set) = of_file {
            set
        } else {
            let first = etcd.ring(&self.rings[0]).await?;
            let pointer = pointer_of(&first)?;
            change.expect_trusted(pointer)?;
            Prepared::new(&etcd.set(&pointer.set).await?)?
        };
        let reached = Cell::new(Reached::default());
        let interrupted = interrupted()?;
        tokio::select! {
            done = self.all_rings(&etcd, &set, &change, &reached, out) => done,
            () = interrupted => Err(self.leave(&reached.get(), &set.hash())),
        }
    }

    async fn all_rings(
        &self,
        etcd: &Etcd,
        set: &Prepared,
        change: &Change<'_>,
        reached: &Cell<Reached>,
        out: &mut Output<'_>,
    ) -> Result<(), Problem> {
        for (at, name) in self.rings.iter().enumerate() {
            reached.set(Reached { ring: at, step: Reaching::Before });
            let untouched = &self.rings[at + 1..];
            self.ring(etcd, name, set, change, reached, out).await.map_err(|problem| Problem {
                error: match untouched {
                    [] => problem.error,
                    rest => format!("{}; not touched: {}", problem.error, list_of(rest)),
                },
                ..problem
            })?;
        }
        Ok(())
    }

    /// Says which ring has what where the operator has interrupted the command.
    fn leave(&self, reached: &Reached, set: &Hash) -> Problem {
        let (passed, rest) = self.rings.split_at(reached.ring);
        let [name, untouched @ ..] = rest else { return Problem::new(ProblemKind::Failed, "interrupted") };
        let set = set.short();
        let mut parts = vec!["interrupted".to_owned()];
        if !passed.is_empty() {
            parts.push(format!("passed, with the set {set}: {}", list_of(passed)));
        }
        let (what, hint) = match reached.step {
            Reaching::Before => (format!("the ring {name} was not changed"), String::new()),
            Reaching::Changing => (
                format!("the ring {name} was about to be changed, which may have been done"),
                format!("see anyportctl fleet history --ring {name}"),
            ),
            Reaching::Watching { sequence } => (
                format!(
                    "the ring {name} has the set {set} as sequence {sequence} and keeps it, but has not passed the gate"
                ),
                format!(
                    "anyportctl fleet status --ring {name} shows how it does, and anyportctl fleet rollback --ring {name} takes the set back"
                ),
            ),
        };
        parts.push(what);
        if !untouched.is_empty() {
            parts.push(format!("not touched: {}", list_of(untouched)));
        }
        Problem::new(ProblemKind::Failed, parts.join("; ")).hint(hint)
    }

    fn validate(&self) -> Result<(), Problem> {
        let twice = self.rings.iter().enumerate().find(|(at, name)| self.rings[..*at].contains(name));
        match twice {
            Some((_, name)) => {
                Err(Problem::new(ProblemKind::Invalid, format!("the ring {name} is named twice in --rings")))
            }
            None => Ok(()),
        }
    }

    /// Gives one ring the set, and sees it through.
    async fn ring(
        &self,
        etcd: &Etcd,
        name: &Name,
        set: &Prepared,
        change: &Change<'_>,
        reached: &Cell<Reached>,
        out: &mut Output<'_>,
    ) -> Result<(), Problem> {
        let before = etcd.ring(name).await?;
        let watched = watched(&before);
        if let Some(Skipped { key, why }) = before.skipped.first().filter(|_| !self.how.force && !self.how.dry_run) {
            return Err(Problem::new(
                ProblemKind::Unsafe,
                format!("not all that is said of the ring {name} can be read, so nobody knows of all its nodes: {key}: {why}"),
            )
            .hint(format!("see anyportctl fleet status --ring {name}; --force goes on with the nodes that report")));
        }
        if watched.is_empty() && !self.how.force && !self.how.dry_run {
            return Err(Problem::new(
                ProblemKind::Unsafe,
                format!("no node of the ring {name} reports, so none can prove the set"),
            )
            .hint("--force goes on without"));
        }
        reached.set(Reached { step: Reaching::Changing, ..reached.get() });
        let changed = change.make(etcd, &before, set, Some("rollout".into())).await?;
        reached.set(Reached { step: Reaching::Watching { sequence: changed.sequence }, ..reached.get() });
        out.print_one(&changed, RingChanged::text)?;
        if changed.dry_run {
            return Ok(());
        }
        let trial = Trial { etcd, name, sequence: changed.sequence, set: changed.set, watched };
        let reason = match trial.see_through(self, out).await {
            Ok(()) => return Ok(()),
            Err(Stop::Failed(problem)) => {
                let what = format!("{}; the ring {name} keeps the set {}", problem.error, changed.set.short());
                return Err(Problem { error: what, ..problem });
            }
            Err(Stop::Worse(reason)) => reason,
        };
        let back = if changed.changed { before.pointer.as_ref().map(|it| &it.value) } else { None };
        trial.stop(reason, back, change, out).await
    }
}

/// A ring that has just got a set.
struct Trial<'a> {
    etcd: &'a Etcd,
    name: &'a Name,
    sequence: u64,
    set: Hash,
    watched: Watched,
}

impl Trial<'_> {
    /// Waits until all nodes have the set active, and then for the time of the gate.
    async fn see_through(&self, rollout: &Rollout, out: &mut Output<'_>) -> Result<(), Stop> {
        let mut bar = Bar::new();
        let end = Instant::now() + rollout.within;
        while let Some(left) = self.not_applied().await? {
            let total = self.watched.len();
            bar.show(total - left.len(), total, &format!("nodes of {} have it", self.name));
            if Instant::now() >= end {
                let within = humantime::format_duration(rollout.within);
                let why = format!("{} of {total} nodes do not have it within {within}: {}", left.len(), list_of(&left));
                return Err(Stop::Worse(why));
            }
            sleep(INTERVAL).await;
        }
        bar.clear();
        self.tell(Step::Applied, None, out)?;
        let begun = Instant::now();
        while let Some(left) = rollout.gate.checked_sub(begun.elapsed()).filter(|left| !left.is_zero()) {
            let seconds = |time: Duration| usize::try_from(time.as_secs()).unwrap_or(usize::MAX);
            bar.show(seconds(begun.elapsed()), seconds(rollout.gate), &format!("s, and {} is well", self.name));
            sleep(INTERVAL.min(left)).await;
            self.not_applied().await?;
        }
        bar.clear();
        Ok(self.tell(Step::Passed, None, out)?)
    }

    /// The nodes that do not have the set active yet; nothing if all have.
    async fn not_applied(&self) -> Result<Option<Vec<Name>>, Stop> {
        let ring = self.etcd.ring(self.name).await?;
        match judge(&self.watched, &ring, self.sequence) {
            RingHealth::Well { applied } if applied == self.watched.len() => Ok(None),
            RingHealth::Well { .. } => {
                let pointer = ring.pointer.as_ref().map(|it| &it.value);
                let left = ring.nodes.iter().filter(|it| self.watched.contains_key(&it.name));
                let left = left.filter(|it| NodeState::of(pointer, it.report.as_ref()) != NodeState::Current);
                Ok(Some(left.map(|it| it.name.clone()).collect()))
            }
            RingHealth::Worse(why) => Err(Stop::Worse(why)),
            RingHealth::Overtaken => Err(Stop::Failed(
                Problem::new(
                    ProblemKind::Conflict,
                    format!("another client has changed the ring {} meanwhile", self.name),
                )
                .hint(format!("see anyportctl fleet history --ring {}", self.name)),
            )),
        }
    }

    /// Gives the ring back what it had.
    async fn stop(
        &self,
        reason: String,
        back: Option<&Pointer>,
        change: &Change<'_>,
        out: &mut Output<'_>,
    ) -> Result<(), Problem> {
        let Self { etcd, name, .. } = self;
        let stopped = format!("the rollout has stopped at the ring {name}: {reason}");
        let Some(back) = back else {
            let hint = format!(
                "it keeps the set that it has; anyportctl fleet publish or rollback --ring {name} changes that"
            );
            return Err(Problem::new(ProblemKind::Failed, stopped).hint(hint));
        };
        let note = format!("rolled back to {}, since the rollout has stopped: {reason}", back.sequence);
        match change.put_back(etcd, name, self.sequence, back, note).await {
            Ok(sequence) => {
                Self { sequence, set: back.set, watched: self.watched.clone(), ..*self }.tell(
                    Step::RolledBack,
                    Some(reason),
                    out,
                )?;
                Err(Problem::new(
                    ProblemKind::Failed,
                    format!("{stopped}; it was rolled back to the set {}", back.set.short()),
                )
                .hint(format!("see anyportctl fleet status --ring {name}")))
            }
            Err(problem) => Err(Problem {
                error: format!("{stopped}; and it could not be rolled back: {}", problem.error),
                hint: format!("anyportctl fleet rollback --ring {name} --to {}", back.sequence),
                ..problem
            }),
        }
    }

    fn tell(&self, step: Step, reason: Option<String>, out: &mut Output<'_>) -> Result<(), Problem> {
        let Self { name, sequence, set, watched, .. } = self;
        let progress =
            Progress { ring: (*name).clone(), step, sequence: *sequence, set: *set, nodes: watched.len(), reason };
        out.print_one(&progress, |progress| {
            let Progress { ring, sequence, nodes, .. } = progress;
            match progress.step {
                Step::Applied => format!("ring {ring}: all of {nodes} nodes have it active"),
                Step::Passed => format!("ring {ring}: passed the gate"),
                Step::RolledBack => format!("ring {ring}: rolled back, as sequence {sequence}"),
            }
        })?;
        Ok(())
    }
}

fn watched(ring: &Ring) -> Watched {
    let reports = ring.nodes.iter().filter_map(|it| it.report.as_ref());
    reports.map(|it| (it.node.clone(), it.health)).collect()
}

/// How a ring does, compared with how its nodes were.
fn judge(watched: &Watched, ring: &Ring, sequence: u64) -> RingHealth {
    let pointer = ring.pointer.as_ref().map(|it| &it.value);
    if pointer.is_none_or(|it| it.sequence != sequence) {
        return RingHealth::Overtaken;
    }
    // Also those that came later. A node that refuses is degraded for that, and this says why.
    let mut refusals = ring.nodes.iter().filter_map(|Node { name, report, .. }| {
        let refused = report.as_ref()?.refused.as_ref().filter(|it| it.sequence == sequence)?;
        Some(format!("the node {name} refuses it: {}", remark(&refused.error)))
    });
    if let Some(refusal) = refusals.next() {
        return RingHealth::Worse(refusal);
    }
    let mut applied = 0;
    for (name, health) in watched {
        let report = ring.nodes.iter().find(|it| it.name == *name).and_then(|it| it.report.as_ref());
        let Some(report) = report else {
            return RingHealth::Worse(format!("the node {name} does not report any more"));
        };
        if report.is_stale() {
            return RingHealth::Worse(format!("the node {name} has not written a report since {}", report.reported));
        }
        if *health == Health::Good && report.health == Health::Degraded {
            return RingHealth::Worse(format!("the node {name} is degraded: {}", remark(&report.degraded.join("; "))));
        }
        applied += usize::from(NodeState::of(pointer, Some(report)) == NodeState::Current);
    }
    RingHealth::Well { applied }
}

#[cfg(test)]
mod tests {
    use super::{RingHealth, judge, watched};
    use crate::fleet::{
        etcd::{Node, Ring},
        layout::{Hash, Name, Pointer, Seen, Time},
        report::{Health, Refused, Report, sample},
    };

    fn report(node: &str, sequence: u64) -> Report {
        sample(node, "canary", sequence)
    }

    fn ring(sequence: u64, reports: Vec<Option<Report>>) -> Ring {
        let name: Name = "canary".parse().unwrap();
        let (set, by) = (Hash::of(&sequence.to_string()), "a".into());
        let value = Pointer {
            ring: name.clone(),
            sequence,
            set,
            published: Time::now(),
            by,
            note: None,
            from: None,
            signature: None,
        };
        let node = |(number, report)| Node { name: format!("n{number}").parse().unwrap(), report, since: None };
        let nodes = reports.into_iter().enumerate().map(node).collect();
        Ring { name, pointer: Some(Seen { value, revision: 1 }), history: Vec::new(), nodes, skipped: Vec::new() }
    }

    #[test]
    fn a_ring_is_compared_with_how_it_was() {
        let before = watched(&ring(1, vec![Some(report("n0", 1)), Some(report("n1", 1))]));
        let verdict = |first: Option<Report>| judge(&before, &ring(2, vec![first, Some(report("n1", 2))]), 2);
        assert_eq!(verdict(Some(report("n0", 1))), RingHealth::Well { applied: 1 });
        assert_eq!(verdict(Some(report("n0", 2))), RingHealth::Well { applied: 2 });
        let degraded = Report { health: Health::Degraded, degraded: vec!["why".into()], ..report("n0", 2) };
        let refused = Some(Refused { sequence: 2, set: Hash::of("2"), error: "why not".into() });
        for (worse, wanted) in [
            (None, "does not report"),
            (Some(degraded.clone()), "degraded: why"),
            (Some(Report { refused: refused.clone(), ..report("n0", 1) }), "refuses it: why not"),
            (Some(Report { refused: refused.clone(), ..degraded.clone() }), "refuses it: why not"),
        ] {
            let RingHealth::Worse(why) = verdict(worse) else { panic!("{wanted}") };
            assert!(why.contains(wanted), "{why}");
        }
        assert_eq!(judge(&before, &ring(3, Vec::new()), 2), RingHealth::Overtaken);
        // What was so before the change is no reason.
        let unwell = watched(&ring(1, vec![Some(degraded.clone()), None]));
        assert_eq!(judge(&unwell, &ring(2, vec![Some(degraded), None]), 2), RingHealth::Well { applied: 1 });
        // A node that came later.
        let other = Report { refused, ..report("n2", 1) };
        let now = ring(2, vec![Some(report("n0", 2)), Some(report("n1", 2)), Some(other)]);
        assert!(matches!(judge(&before, &now, 2), RingHealth::Worse(_)));
    }
}
