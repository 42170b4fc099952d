//! `anyportctl fleet history`: the rule sets that a ring had.

use serde::Serialize;

use crate::{
    api::Problem,
    cli::{
        Output,
        table::{Column, number, table, text},
    },
    fleet::{
        etcd::Etcd,
        layout::{Name, Pointer},
    },
    text::remark,
};

/// Shows what a ring had over time, the newest first.
#[derive(Debug, clap::Args)]
pub(super) struct History {
    /// The ring
    #[arg(long, value_name = "RING")]
    ring: Name,
}

/// What a ring had.
#[derive(Serialize)]
struct Entry<'a> {
    /// Whether the ring has it now.
    present: bool,
    #[serde(flatten)]
    pointer: &'a Pointer,
}

impl History {
    pub(super) async fn run(self, etcd: &Etcd, out: &mut Output<'_>) -> Result<(), Problem> {
        let ring = etcd.ring(&self.ring).await?;
        let present = ring.pointer.as_ref().map(|it| it.value.sequence);
        let entries: Vec<_> = ring
            .history
            .iter()
            .rev()
            .map(|pointer| Entry { present: present == Some(pointer.sequence), pointer })
            .collect();
        let width = out.width();
        out.print(&entries, |entries| shown(&self.ring, entries, width))
    }
}

const COLUMNS: [Column; 7] = [
    text(""),
    number("SEQUENCE"),
    text("SET").rank(2),
    text("PUBLISHED"),
    text("BY").rank(1),
    text("SIGNED").rank(4),
    text("NOTE").rank(3),
];

fn shown(ring: &Name, entries: &[Entry<'_>], width: Option<usize>) -> String {
    if entries.is_empty() {
        return format!("the ring {ring} has no history");
    }
    let rows = entries.iter().map(|Entry { present, pointer }| {
        let Pointer { sequence, set, published, by, note, signature, .. } = pointer;
        [
            if *present { "*" } else { "" }.into(),
            sequence.to_string().into(),
            set.short().into(),
            published.to_string().into(),
            remark(by).into(),
            if signature.is_some() { "yes" } else { "no" }.into(),
            note.as_deref().map_or_else(|| "-".into(), |note| remark(note).into()),
        ]
    });
    table(&COLUMNS, rows, width)
}
