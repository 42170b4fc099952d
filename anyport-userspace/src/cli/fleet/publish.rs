//! `anyportctl fleet publish`, `promote` and `rollback`: give a ring another rule set.

use super::change::{How, Prepared, RingChanged};
use crate::{
    api::{Problem, ProblemKind},
    cli::{
        Output,
        lists::{Reading, Source},
    },
    fleet::{
        etcd::{Etcd, Ring, Skipped},
        layout::{Name, Pointer},
    },
};

/// Gives a ring the rules of a file, which is checked before anything is written.
///
/// The file is one for `anyportctl apply`: the tables `[[service]]` and `[[rule]]`, or a rule a line.
#[derive(Debug, clap::Args)]
pub(super) struct Publish {
    #[command(flatten)]
    source: Source,
    /// The ring
    #[arg(long, value_name = "RING")]
    ring: Name,
    #[command(flatten)]
    how: How,
}

impl Publish {
    pub(super) async fn run(
        self,
        connect: impl AsyncFnOnce() -> Result<Etcd, Problem>,
        out: &mut Output<'_>,
    ) -> Result<(), Problem> {
        let Self { source, ring, how } = self;
        let set = read(&source)?;
        let change = how.read()?;
        let etcd = connect().await?;
        let answer = change.make(&etcd, &etcd.ring(&ring).await?, &set, None).await?;
        out.print(&answer, RingChanged::text)
    }
}

/// Reads and checks a file.
pub(super) fn read(source: &Source) -> Result<Prepared, Problem> {
    let name = source.name().display();
    let Reading { text, notes } = source.read()?;
    let set =
        Prepared::new(&text).map_err(|problem| Problem { error: format!("{name}: {}", problem.error), ..problem })?;
    Ok(set.with_notes(notes))
}

/// Gives a ring the set that another one has now.
#[derive(Debug, clap::Args)]
pub(super) struct Promote {
    /// The ring that has it
    #[arg(long, value_name = "RING")]
    from: Name,
    /// The ring that is to have it
    #[arg(long, value_name = "RING")]
    to: Name,
    #[command(flatten)]
    how: How,
}

impl Promote {
    pub(super) async fn run(self, etcd: &Etcd, out: &mut Output<'_>) -> Result<(), Problem> {
        let Self { from, to, how } = self;
        let source = etcd.ring(&from).await?;
        let pointer = pointer_of(&source)?;
        if !how.force {
            expect_proven(&source)?;
        }
        let change = how.read()?;
        change.expect_trusted(pointer)?;
        let set = Prepared::new(&etcd.set(&pointer.set).await?)?;
        let what = format!("promoted from {from} {}", pointer.sequence);
        let answer = change.make(etcd, &etcd.ring(&to).await?, &set, Some(what)).await?;
        out.print(&answer, RingChanged::text)
    }
}

/// What a ring points to.
pub(super) fn pointer_of(ring: &Ring) -> Result<&Pointer, Problem> {
    ring.pointer.as_ref().map(|it| &it.value).ok_or_else(|| {
        Problem::new(ProblemKind::NotFound, format!("the ring {} has no set", ring.name))
            .hint(format!("anyportctl fleet publish FILE --ring {} gives it one", ring.name))
    })
}

/// A set that some node has not taken or not taken well goes no further by itself.
fn expect_proven(ring: &Ring) -> Result<(), Problem> {
    let name = &ring.name;
    let refuse = |why: String| {
        Err(Problem::new(ProblemKind::Unsafe, why)
            .hint(format!("see anyportctl fleet status --ring {name}; --force promotes it all the same")))
    };
    if let Some(Skipped { key, why }) = ring.skipped.first() {
        return refuse(format!("not all that is said of the ring {name} can be read: {key}: {why}"));
    }
    let unwell = super::nodes::unwell(ring);
    match unwell.as_slice() {
        [] if ring.nodes.is_empty() => refuse(format!("no node of the ring {name} has tried its set")),
        [] => Ok(()),
        unwell => refuse(format!("not all is well in the ring {name}: {}", crate::text::list_of(unwell))),
    }
}

/// Gives a ring a set that it had before. That is a change like any other, with the next sequence.
#[derive(Debug, clap::Args)]
pub(super) struct Rollback {
    /// The ring
    #[arg(long, value_name = "RING")]
    ring: Name,
    /// What the ring had as of this sequence [default: the last set that differs from the present one]
    #[arg(long, value_name = "SEQUENCE")]
    to: Option<u64>,
    #[command(flatten)]
    how: How,
}

impl Rollback {
    pub(super) async fn run(self, etcd: &Etcd, out: &mut Output<'_>) -> Result<(), Problem> {
        let Self { ring, to, how } = self;
        let ring = etcd.ring(&ring).await?;
        let target = target(&ring, to)?;
        let change = how.read()?;
        change.expect_trusted(target)?;
        let set = Prepared::new(&etcd.set(&target.set).await?)?;
        let what = format!("rolled back to {}", target.sequence);
        let answer = change.make(etcd, &ring, &set, Some(what)).await?;
        out.print(&answer, RingChanged::text)
    }
}

fn target(ring: &Ring, to: Option<u64>) -> Result<&Pointer, Problem> {
    let name = &ring.name;
    let missing = |what: String| {
        Problem::new(ProblemKind::NotFound, what)
            .hint(format!("anyportctl fleet history --ring {name} shows what there is"))
    };
    let mut newest_first = ring.history.iter().rev();
    if let Some(to) = to {
        return newest_first
            .find(|it| it.sequence == to)
            .ok_or_else(|| missing(format!("the history of the ring {name} has no sequence {to}")));
    }
    let present = pointer_of(ring)?;
    newest_first
        .find(|it| it.sequence < present.sequence && it.set != present.set)
        .ok_or_else(|| missing(format!("the ring {name} has never had another set")))
}
