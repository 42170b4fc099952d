//! What is left to say when all is over.

use std::{collections::BTreeMap, fmt, time::Instant};

use super::{
    end::{Settled, Standing},
    ledger::{Fault, Ledger},
    nodes::Node,
    publishing::Published,
};
use crate::steady::Tally;

/// What has happened, and what has become of it. Shown as a table in Markdown.
#[derive(Debug)]
pub struct Report {
    /// How often each fault has happened.
    pub faults: BTreeMap<Fault, u64>,
    /// What must not have happened.
    pub wrong: Vec<String>,
    rows: Vec<(String, String)>,
}

impl Report {
    pub(super) fn new(
        ledger: Ledger,
        nodes: &[Node],
        tallies: &[Tally],
        published: &Published,
        settled: [Settled; 3],
    ) -> Self {
        let (mut served, mut lost, mut failed) = (0, 0, 0);
        for (node, tally) in nodes.iter().zip(tallies) {
            let kills: Vec<Instant> = node.kills();
            let of_kills = tally.lost_in(&kills);
            let others = tally.failures.len() - of_kills;
            if others > 0 {
                ledger.wrong(format_args!("n{}: {others} connections failed:{}", node.number, tally.sample()));
            }
            (served, lost, failed) = (served + tally.served, lost + of_kills, failed + others);
        }
        let (faults, mut wrong) = ledger.close();
        let missing = Fault::ALL.iter().filter(|(fault, _)| !faults.contains_key(fault));
        wrong.extend(missing.map(|(_, name)| format!("this has not happened once: {name}")));
        let mut rows: Vec<(String, String)> = Vec::new();
        let mut row = |what: String, count: &dyn fmt::Display| rows.push((what, count.to_string()));
        for (fault, name) in Fault::ALL {
            row(name.to_owned(), &faults.get(&fault).unwrap_or(&0));
        }
        row("sets published".into(), &published.done.len());
        row("publishing given up, since etcd did not answer".into(), &published.unanswered.len());
        row("of these, published nevertheless".into(), &published.came_true());
        row("publishing refused, since the pointer had changed meanwhile".into(), &published.overtaken);
        row("publishing refused, since the pointer could not be read".into(), &published.refused);
        row("steered connections served".into(), &served);
        row("of a killed server, reset before the answer".into(), &lost);
        row("other connections that failed".into(), &failed);
        for (when, Settled { sequence, standings, time }) in
            ["as faults left it", "to a set that one must refuse", "to one that all can take"].iter().zip(settled)
        {
            let hold = standings.iter().filter(|it| matches!(it, Standing::Holds)).count();
            let refuse = standings.iter().filter(|it| matches!(it, Standing::Refuses(_))).count();
            let text = format!(
                "{hold} hold, {refuse} refuse and say why, of {}, after {:.1} s",
                nodes.len(),
                time.as_secs_f64()
            );
            row(format!("nodes and the pointer {when}, sequence {sequence}"), &text);
        }
        Self { faults, wrong, rows }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| what | how often |\n|---|---:|")?;
        self.rows.iter().try_for_each(|(what, count)| writeln!(f, "| {what} | {count} |"))
    }
}
