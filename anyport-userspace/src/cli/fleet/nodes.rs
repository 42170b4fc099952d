//! `anyportctl fleet status`, `forget` and `remove`: the state of each node of a ring.

use std::{borrow::Cow, fmt::Write as _, time::Duration};

use serde::Serialize;
use tokio::time::sleep;

use super::metrics;
use crate::{
    api::{Problem, ProblemKind},
    cli::{
        Output, Reader,
        show::{ago, count},
        table::{Column, Row, number, table, text},
        tone::Tone,
    },
    fleet::{
        etcd::{Etcd, Node, Ring, Skipped},
        layout::{Name, Pointer},
        report::{Health, NodeState, Report},
    },
    text::{list_of, remark},
};

/// Shows what each node has, and which are behind, refuse or are missing.
#[derive(Debug, clap::Args)]
pub(super) struct Status {
    /// Only this ring
    #[arg(long, value_name = "RING")]
    ring: Option<Name>,
    /// Show it again and again, every 2 seconds or at this interval
    #[arg(long, value_name = "TIME", value_parser = crate::human_duration::parse, num_args = 0..=1, default_missing_value = "2s")]
    watch: Option<Duration>,
    /// Print metrics in the text format of Prometheus, for a collector that reads files
    #[arg(long, conflicts_with = "watch")]
    metrics: bool,
}

/// Records that were left out which people get to see; JSON has all of them.
const SHOWN: usize = 10;

/// A ring and its nodes.
#[derive(Debug, Serialize)]
pub(super) struct RingView {
    pub(super) ring: Name,
    /// What the nodes are to have.
    pub(super) pointer: Option<Pointer>,
    /// Why that can't be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
    /// How many nodes are in which state.
    pub(super) summary: Summary,
    nodes: Vec<NodeView>,
    /// What was not taken for a record of the ring.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) skipped: Vec<Skipped>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Summary {
    nodes: usize,
    pub(super) current: usize,
    pub(super) behind: usize,
    pub(super) refused: usize,
    pub(super) ahead: usize,
    pub(super) missing: usize,
    /// In whatever state they are.
    pub(super) degraded: usize,
}

#[derive(Debug, Serialize)]
struct NodeView {
    node: Name,
    state: NodeState,
    /// For how many seconds its set has been active.
    #[serde(skip_serializing_if = "Option::is_none")]
    age: Option<u64>,
    /// What it says itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    report: Option<Report>,
}

impl Status {
    pub(super) async fn run(self, etcd: &Etcd, out: &mut Output<'_>) -> Result<(), Problem> {
        let Some(interval) = self.watch else {
            let (rings, problem) = self.look(etcd).await?;
            if self.metrics {
                out.print_line(&metrics::text(&rings))?;
            } else {
                let width = out.width();
                out.print(&rings, |rings| shown(rings, width))?;
            }
            return problem.map_or(Ok(()), Err);
        };
        loop {
            let (rings, _) = self.look(etcd).await?;
            let width = out.width();
            if out.print_one(&rings, |rings| shown(rings, width) + "\n")? == Reader::Gone {
                return Ok(());
            }
            sleep(interval).await;
        }
    }

    /// All rings that were asked for; and what is wrong with the first one that can't be read.
    async fn look(&self, etcd: &Etcd) -> Result<(Vec<RingView>, Option<Problem>), Problem> {
        let names = match &self.ring {
            Some(ring) => vec![ring.clone()],
            None => etcd.ring_names().await?,
        };
        let (mut rings, mut first) = (Vec::with_capacity(names.len()), None);
        for name in &names {
            let (ring, problem) = etcd.ring_as_it_is(name).await?;
            if self.ring.is_some() && problem.is_none() && ring.is_unknown() {
                let others = list_of(&etcd.ring_names().await?);
                let what = format!("there is no ring {name}, and no node of it has reported");
                let hint = if others.is_empty() { String::new() } else { format!("there are {others}") };
                return Err(Problem::new(ProblemKind::NotFound, what).hint(hint));
            }
            rings.push(view(ring, problem.as_ref()));
            first = first.or(problem);
        }
        Ok((rings, first))
    }
}

fn view(ring: Ring, problem: Option<&Problem>) -> RingView {
    let Ring { name, pointer, nodes, skipped, .. } = ring;
    let pointer = pointer.map(|it| it.value);
    let nodes: Vec<NodeView> = nodes
        .into_iter()
        .map(|Node { name, report, .. }| NodeView {
            node: name,
            state: NodeState::of(pointer.as_ref(), report.as_ref()),
            age: report.as_ref().map(|it| it.since.age().as_secs()),
            report,
        })
        .collect();
    let mut summary = Summary { nodes: nodes.len(), ..Summary::default() };
    for NodeView { state, report, .. } in &nodes {
        let count = match state {
            NodeState::Current => &mut summary.current,
            NodeState::Behind => &mut summary.behind,
            NodeState::Refused => &mut summary.refused,
            NodeState::Ahead => &mut summary.ahead,
            NodeState::Missing => &mut summary.missing,
        };
        *count += 1;
        summary.degraded += usize::from(report.as_ref().is_some_and(|it| it.health == Health::Degraded));
    }
    let error = problem.map(|it| it.error.clone());
    RingView { ring: name, pointer, error, summary, nodes, skipped }
}

fn shown(rings: &[RingView], width: Option<usize>) -> String {
    if rings.is_empty() {
        return "there is no ring; anyportctl fleet publish FILE --ring canary makes one".into();
    }
    let texts: Vec<String> = rings.iter().map(|ring| ring_text(ring, width)).collect();
    texts.join("\n\n")
}

const COLUMNS: [Column; 8] = [
    text("NODE"),
    text("STATE"),
    number("SEQUENCE").rank(2),
    text("SET").rank(4),
    text("BACK END").rank(5),
    text("HEALTH").rank(1),
    text("AGE").rank(3),
    text("VERSION").rank(6),
];

fn ring_text(view: &RingView, width: Option<usize>) -> String {
    let RingView { ring, pointer, error, summary, nodes, skipped } = view;
    let has = match (pointer, error) {
        (_, Some(error)) => error.clone(),
        (None, None) => "has no set".to_owned(),
        (Some(Pointer { sequence, set, published, by, .. }), None) => {
            format!("sequence {sequence}, set {}, published {published} by {}", set.short(), remark(by))
        }
    };
    let mut text = format!("ring {ring}: {has}\n{}", summary.text());
    if !nodes.is_empty() {
        text = format!("{text}\n{}", table(&COLUMNS, nodes.iter().map(row), width));
    }
    let troubles = nodes.iter().filter_map(|it| trouble(ring, &it.node, it.state, it.report.as_ref()));
    let shown = skipped.iter().take(SHOWN).map(|Skipped { key, why }| format!("left out: {key}: {why}"));
    let more = skipped.len().checked_sub(SHOWN).filter(|more| *more > 0).map(|more| format!("left out: {more} more"));
    for what in troubles.chain(shown).chain(more) {
        // Writing to a string does not fail.
        write!(text, "\n{what}").ok();
    }
    text
}

impl Summary {
    fn text(self) -> String {
        let Self { nodes, current, behind, refused, ahead, missing, degraded } = self;
        let counts = [
            (current, "current"),
            (behind, "behind"),
            (refused, "refused"),
            (ahead, "ahead"),
            (missing, "missing"),
            (degraded, "degraded"),
        ];
        let counts = counts.into_iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}"));
        let counts: Vec<String> = counts.collect();
        let nodes = if nodes == 0 { "no node has reported".to_owned() } else { count(nodes, "node") };
        format!("{nodes}{}{}", if counts.is_empty() { "" } else { ": " }, counts.join(", "))
    }
}

/// What a node says, in a table in which others stand, too.
fn cell(text: &str) -> String {
    const MOST: usize = 20;
    match text.char_indices().nth(MOST) {
        Some((at, _)) => format!("{}…", remark(&text[..at])),
        None => remark(text),
    }
}

fn row(view: &NodeView) -> Row<'_, 8> {
    let NodeView { node, state, age, report } = view;
    let Some(report) = report else {
        let mut cells = [const { Cow::Borrowed("-") }; 8];
        (cells[0], cells[1]) = (node.as_str().into(), state.to_string().into());
        return Row { cells, tone: Tone::Bad };
    };
    let tone = match (state, report.health) {
        (NodeState::Missing | NodeState::Refused, _) | (_, Health::Degraded) => Tone::Bad,
        (NodeState::Behind | NodeState::Ahead, _) => Tone::Doubtful,
        (NodeState::Current, _) => Tone::Plain,
    };
    let cells = [
        node.as_str().into(),
        state.to_string().into(),
        report.sequence.to_string().into(),
        report.set.map_or_else(|| "-".to_owned(), |it| it.short()).into(),
        cell(&report.backend).into(),
        report.health.to_string().into(),
        age.map_or_else(|| "-".to_owned(), ago).into(),
        cell(&report.version).into(),
    ];
    Row { cells, tone }
}

/// What is wrong with a node, in words.
fn trouble(ring: &Name, node: &Name, state: NodeState, report: Option<&Report>) -> Option<String> {
    let reason = match (state, report) {
        (NodeState::Missing, _) => {
            return Some(format!(
                "{node} does not report; if it is gone for good: anyportctl fleet forget {node} --ring {ring}"
            ));
        }
        (NodeState::Refused, Some(report)) => {
            report.refused.as_ref().map(|it| format!("refuses sequence {}: {}", it.sequence, remark(&it.error)))
        }
        (NodeState::Ahead, Some(report)) => Some(format!(
            "says that it has seen sequence {}: etcd was restored or wiped, or it is wrong; see docs/fleet.md",
            report.sequence
        )),
        _ => None,
    };
    // Of one that refuses, that is said.
    let degraded = report.filter(|it| it.health == Health::Degraded && !it.degraded.is_empty());
    let degraded = degraded.map(|it| format!("degraded: {}", remark(&it.degraded.join("; "))));
    let stale = report.filter(|it| it.is_stale());
    let stale = stale.map(|it| {
        format!("has written its report at {} and not since: it is gone and another client of etcd keeps its lease alive, or its clock is wrong", it.reported)
    });
    let reasons: Vec<String> = reason.into_iter().chain(degraded).chain(stale).collect();
    (!reasons.is_empty()).then(|| format!("{node} {}", reasons.join("; ")))
}

/// What is wrong with the nodes of a ring, or not yet right.
pub(super) fn unwell(ring: &Ring) -> Vec<String> {
    let pointer = ring.pointer.as_ref().map(|it| &it.value);
    let unwell = ring.nodes.iter().filter_map(|Node { name, report, .. }| {
        let state = NodeState::of(pointer, report.as_ref());
        let is_good = |it: &Report| it.health == Health::Good && !it.is_stale();
        let is_well = state == NodeState::Current && report.as_ref().is_some_and(is_good);
        (!is_well)
            .then(|| trouble(&ring.name, name, state, report.as_ref()).unwrap_or_else(|| format!("{name} is {state}")))
    });
    unwell.collect()
}

/// Does not miss nodes any more that are gone for good.
#[derive(Debug, clap::Args)]
pub(super) struct Forget {
    /// The nodes
    #[arg(required = true, value_name = "NODE")]
    nodes: Vec<Name>,
    /// Their ring
    #[arg(long, value_name = "RING")]
    ring: Name,
    /// Go on although they report: a report that another client has written goes, too
    #[arg(long)]
    force: bool,
}

/// Answer of forget.
#[derive(Serialize)]
struct Forgotten {
    ring: Name,
    forgotten: Vec<Name>,
}

impl Forget {
    pub(super) async fn run(self, etcd: &Etcd, out: &mut Output<'_>) -> Result<(), Problem> {
        let Self { nodes, ring, force } = self;
        for node in &nodes {
            if !etcd.forget(&ring, node, force).await? {
                return Err(Problem::new(ProblemKind::NotFound, format!("the ring {ring} has no node {node}")));
            }
        }
        out.print(&Forgotten { ring, forgotten: nodes }, |answer| format!("forgot {}", list_of(&answer.forgotten)))
    }
}

/// Removes a ring, with its history and what is known of its nodes.
#[derive(Debug, clap::Args)]
pub(super) struct Remove {
    /// The ring
    #[arg(value_name = "RING")]
    ring: Name,
    /// Go on although nodes of the ring report: they keep what they have
    #[arg(long)]
    force: bool,
}

/// Answer of remove.
#[derive(Serialize)]
struct Removed {
    ring: Name,
    removed: bool,
}

impl Remove {
    pub(super) async fn run(self, etcd: &Etcd, out: &mut Output<'_>) -> Result<(), Problem> {
        let Self { ring: name, force } = self;
        let (ring, problem) = etcd.ring_as_it_is(&name).await?;
        if problem.is_none() && ring.is_unknown() {
            return Err(Problem::new(ProblemKind::NotFound, format!("there is no ring {name}")));
        }
        let reporting: Vec<&Name> = ring.reports().map(|it| &it.node).collect();
        if !reporting.is_empty() && !force {
            return Err(Problem::new(
                ProblemKind::Unsafe,
                format!("nodes of the ring {name} report: {}", list_of(&reporting)),
            )
            .hint("give them another ring first, or go on by --force: they keep the set that they have"));
        }
        match problem {
            Some(problem) if !force => return Err(problem),
            _ => etcd.remove_ring(&ring).await?,
        }
        out.print(&Removed { ring: name, removed: true }, |answer| format!("removed the ring {}", answer.ring))
    }
}
