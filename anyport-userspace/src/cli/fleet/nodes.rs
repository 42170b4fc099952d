//! `anyportctl fleet status` and `forget`: the state of each node of a ring.

use std::fmt::Write as _;

use serde::Serialize;

use crate::{
    api::{Problem, ProblemKind},
    cli::{
        Output,
        show::{ago, table},
    },
    fleet::{
        etcd::{Etcd, Node, Ring},
        layout::{Health, Name, NodeState, Pointer, Report},
    },
};

/// Shows what each node has, and which are behind, refuse or are missing.
#[derive(Debug, clap::Args)]
pub(super) struct Status {
    /// Only this ring
    #[arg(long, value_name = "RING")]
    ring: Option<Name>,
}

/// A ring and its nodes.
#[derive(Debug, Serialize)]
struct RingView {
    ring: Name,
    /// What the nodes are to have.
    pointer: Option<Pointer>,
    /// How many nodes are in which state.
    summary: Summary,
    nodes: Vec<NodeView>,
    /// Keys that hold no record that can be read.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unreadable: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
struct Summary {
    nodes: usize,
    current: usize,
    behind: usize,
    refused: usize,
    ahead: usize,
    missing: usize,
    /// In whatever state they are.
    degraded: usize,
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
        let names = match self.ring {
            Some(ring) => vec![ring],
            None => etcd.ring_names().await?,
        };
        let mut rings = Vec::with_capacity(names.len());
        for name in &names {
            rings.push(view(etcd.ring(name).await?));
        }
        out.print(&rings, |rings| text(rings))
    }
}

fn view(ring: Ring) -> RingView {
    let Ring { name, pointer, nodes, unreadable, .. } = ring;
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
    RingView { ring: name, pointer, summary, nodes, unreadable }
}

fn text(rings: &[RingView]) -> String {
    if rings.is_empty() {
        return "there is no ring; anyportctl fleet publish FILE --ring canary makes one".into();
    }
    let texts: Vec<String> = rings.iter().map(ring_text).collect();
    texts.join("\n\n")
}

fn ring_text(view: &RingView) -> String {
    let RingView { ring, pointer, summary, nodes, unreadable } = view;
    let has = match pointer {
        None => "has no set".to_owned(),
        Some(Pointer { sequence, set, published, by, .. }) => {
            format!("sequence {sequence}, set {}, published {published} by {by}", set.short())
        }
    };
    let mut text = format!("ring {ring}: {has}\n{}", summary.text());
    if !nodes.is_empty() {
        let header = ["NODE", "STATE", "SEQUENCE", "SET", "BACK END", "HEALTH", "AGE", "VERSION"];
        text = format!("{text}\n{}", table(header, nodes.iter().map(row)));
    }
    let troubles = nodes.iter().filter_map(|it| trouble(&it.node, it.state, it.report.as_ref()));
    let unreadable = unreadable.iter().map(|key| format!("what is under {key} can't be read"));
    for what in troubles.chain(unreadable) {
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
        format!("{nodes} nodes{}{}", if counts.is_empty() { "" } else { ": " }, counts.join(", "))
    }
}

fn row(view: &NodeView) -> [std::borrow::Cow<'_, str>; 8] {
    let NodeView { node, state, age, report } = view;
    let Some(report) = report else {
        let nothing = || "-".into();
        let state = state.to_string().into();
        return [node.as_str().into(), state, nothing(), nothing(), nothing(), nothing(), nothing(), nothing()];
    };
    [
        node.as_str().into(),
        state.to_string().into(),
        report.sequence.to_string().into(),
        report.set.map_or_else(|| "-".to_owned(), |it| it.short()).into(),
        report.backend.as_str().into(),
        report.health.to_string().into(),
        age.map_or_else(|| "-".to_owned(), ago).into(),
        report.version.as_str().into(),
    ]
}

/// What is wrong with a node, in words.
fn trouble(node: &Name, state: NodeState, report: Option<&Report>) -> Option<String> {
    let reason = match (state, report) {
        (NodeState::Missing, _) => {
            return Some(format!(
                "{node} does not report; if it is gone for good: anyportctl fleet forget {node} --ring RING"
            ));
        }
        (NodeState::Refused, Some(report)) => {
            report.refused.as_ref().map(|it| format!("refuses sequence {}: {}", it.sequence, it.error))
        }
        (NodeState::Ahead, Some(report)) => {
            Some(format!("has seen sequence {}: etcd has lost something", report.sequence))
        }
        _ => None,
    };
    let degraded =
        report.filter(|it| it.health == Health::Degraded).map(|it| format!("degraded: {}", it.degraded.join("; ")));
    let reasons: Vec<String> = reason.into_iter().chain(degraded).collect();
    (!reasons.is_empty()).then(|| format!("{node} {}", reasons.join("; ")))
}

/// What is wrong with the nodes of a ring, or not yet right.
pub(super) fn unwell(ring: &Ring) -> Vec<String> {
    let pointer = ring.pointer.as_ref().map(|it| &it.value);
    let unwell = ring.nodes.iter().filter_map(|Node { name, report, .. }| {
        let state = NodeState::of(pointer, report.as_ref());
        let is_well = state == NodeState::Current && report.as_ref().is_some_and(|it| it.health == Health::Good);
        (!is_well).then(|| trouble(name, state, report.as_ref()).unwrap_or_else(|| format!("{name} is {state}")))
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
}

/// Answer of forget.
#[derive(Serialize)]
struct Forgotten {
    ring: Name,
    forgotten: Vec<Name>,
}

impl Forget {
    pub(super) async fn run(self, etcd: &Etcd, out: &mut Output<'_>) -> Result<(), Problem> {
        let Self { nodes, ring } = self;
        for node in &nodes {
            if !etcd.forget(&ring, node).await? {
                return Err(Problem::new(ProblemKind::NotFound, format!("the ring {ring} has no node {node}")));
            }
        }
        out.print(&Forgotten { ring, forgotten: nodes }, |answer| {
            format!("forgot {}", crate::text::list_of(&answer.forgotten))
        })
    }
}
