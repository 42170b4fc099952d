//! What every change of a ring has in common, be it published, promoted or rolled back.

use std::{fs, path::PathBuf};

use nix::unistd::{Uid, User};
use serde::Serialize;

use super::bar::Bar;
use crate::{
    api::{Problem, ProblemKind},
    fleet::{
        difference::{Content, Difference},
        etcd::{Etcd, Ring, Swapped},
        layout::{Hash, Name, Pointer, Seen, Time},
        pack::Packed,
        signing::SigningKey,
    },
    text::list_of,
};

/// Lines of the difference that people get to see, unless they asked for it.
const SHOWN: usize = 20;
/// How often a set is stored again that others have removed just before a ring was to point to it.
const ATTEMPTS: usize = 3;

/// How to change a ring.
#[derive(Debug, clap::Args)]
pub(super) struct How {
    /// Print the difference and change nothing
    #[arg(long)]
    pub(super) dry_run: bool,
    /// What it is about, for the history
    #[arg(long, value_name = "TEXT")]
    note: Option<String>,
    /// Private key of Ed25519 to sign with, in PEM
    #[arg(long, env = "ANYPORT_SIGNING_KEY", value_name = "FILE")]
    signing_key: Option<PathBuf>,
    /// Go on although most rules would go, a signature would be missing, or nodes are not well
    #[arg(long)]
    pub(super) force: bool,
}

/// What has become of a ring, or would.
#[derive(Clone, Debug, Serialize)]
pub(super) struct RingChanged {
    /// Whether only the difference was asked for.
    pub(super) dry_run: bool,
    /// Whether the ring has another pointer now.
    pub(super) changed: bool,
    ring: Name,
    /// Of the pointer that the ring has now, or would have.
    pub(super) sequence: u64,
    pub(super) set: Hash,
    added: usize,
    removed: usize,
    unchanged: usize,
    services: Vec<String>,
    /// After a dry run: a line for each rule that would come or go.
    #[serde(skip_serializing_if = "Option::is_none")]
    difference: Option<Vec<String>>,
    notes: Vec<String>,
    #[serde(skip)]
    lines: Vec<String>,
}

/// A set that has been read and found right.
pub(super) struct Prepared {
    packed: Packed,
    content: Content,
}

impl Prepared {
    pub(super) fn new(text: &str) -> Result<Self, Problem> {
        let content = Content::parse(text)?;
        let packed = Packed::new(text).map_err(|error| Problem::new(ProblemKind::TooLarge, error.to_string()))?;
        Ok(Self { packed, content })
    }
}

/// How to change a ring, with the key read.
pub(super) struct Change<'a> {
    pub(super) how: &'a How,
    key: Option<SigningKey>,
}

impl How {
    /// Reads the key.
    pub(super) fn read(&self) -> Result<Change<'_>, Problem> {
        let key = self.signing_key.as_ref().map(|file| {
            let invalid = |why: String| Problem::new(ProblemKind::Invalid, format!("read {}: {why}", file.display()));
            let pem = fs::read(file).map_err(|error| invalid(error.to_string()))?;
            SigningKey::from_pem(&pem).map_err(|error| invalid(error.to_string()))
        });
        Ok(Change { how: self, key: key.transpose()? })
    }
}

impl Change<'_> {
    /// Has a ring point to a set. What the change is by itself stands before the operator's note.
    pub(super) async fn make(
        &self,
        etcd: &Etcd,
        ring: &Ring,
        set: &Prepared,
        what: Option<String>,
    ) -> Result<RingChanged, Problem> {
        let Prepared { packed, content } = set;
        let mut notes = Vec::new();
        let before = present(etcd, ring, &mut notes).await?;
        let difference = content.since(&before);
        let foreign = content.foreign_services();
        if !foreign.is_empty() {
            notes.push(format!(
                "the set steers to services that it does not have, so nodes must: {}",
                list_of(&foreign)
            ));
        }
        let (behind, ahead) = (ring.pointer.as_ref().map_or(0, |it| it.value.sequence), ring.highest());
        if ahead > behind && behind > 0 {
            notes.push(format!(
                "etcd has lost something: the pointer's sequence is {behind}, and {ahead} has been there; the next one is {}",
                ahead.saturating_add(1)
            ));
        }
        let is_there = self.is_there(ring, &packed.hash);
        let sequence = if is_there { behind } else { next(ring)? };
        let answer = |changed, notes| {
            RingChanged::new(self.how.dry_run, changed, ring, sequence, packed, difference.clone(), notes)
        };
        if is_there {
            return Ok(answer(false, notes));
        }
        let unsafe_because = self.danger(ring, &before, content);
        if self.how.dry_run {
            notes.extend(unsafe_because.map(|it| format!("without --force it would be refused: {}", it.error)));
            return Ok(answer(true, notes));
        }
        if let Some(problem) = unsafe_because.filter(|_| !self.how.force) {
            return Err(problem);
        }
        let note = match (what, &self.how.note) {
            (Some(what), Some(note)) => Some(format!("{what}: {note}")),
            (what, note) => what.or_else(|| note.clone()),
        };
        self.write(etcd, ring, packed, sequence, note).await?;
        Ok(answer(true, notes))
    }

    /// Gives a ring back a set that it had, unless anybody has changed the ring since it got this sequence. Returns the new one.
    pub(super) async fn put_back(
        &self,
        etcd: &Etcd,
        name: &Name,
        since: u64,
        set: &Hash,
        note: String,
    ) -> Result<u64, Problem> {
        let Prepared { packed, .. } = Prepared::new(&etcd.set(set).await?)?;
        let ring = etcd.ring(name).await?;
        if ring.pointer.as_ref().is_none_or(|it| it.value.sequence != since) {
            return Err(lost(name, ring.pointer));
        }
        let sequence = next(&ring)?;
        self.write(etcd, &ring, &packed, sequence, Some(note)).await?;
        Ok(sequence)
    }

    /// Whether there is nothing to do. Where nodes are ahead, they don't follow the pointer that is there.
    fn is_there(&self, ring: &Ring, hash: &Hash) -> bool {
        ring.pointer.as_ref().is_some_and(|Seen { value, .. }| {
            value.set == *hash && value.sequence >= ring.highest() && (self.key.is_none() || value.signature.is_some())
        })
    }

    /// Why this should not be done.
    fn danger(&self, ring: &Ring, before: &Content, after: &Content) -> Option<Problem> {
        let name = &ring.name;
        let refuse = |why: String, hint: &str| Some(Problem::new(ProblemKind::Unsafe, why).hint(hint));
        let (was, is) = (before.rules(), after.rules());
        if is * 2 < was {
            return refuse(
                format!("of the {was} rules of the ring {name} only {is} would be left"),
                "--dry-run shows the difference, and --force goes on",
            );
        }
        let is_signed = ring.pointer.as_ref().is_some_and(|it| it.value.signature.is_some());
        if is_signed && self.key.is_none() {
            return refuse(
                format!("the pointer of the ring {name} is signed, and nodes that have a key follow no other"),
                "sign with --signing-key FILE, or go on without a signature by --force",
            );
        }
        None
    }

    /// Stores the set and has the ring point to it.
    async fn write(
        &self,
        etcd: &Etcd,
        ring: &Ring,
        packed: &Packed,
        sequence: u64,
        note: Option<String>,
    ) -> Result<(), Problem> {
        let (set, name) = (packed.hash, ring.name.clone());
        let signature = self.key.as_ref().map(|key| key.sign(&name, sequence, &set));
        let (by, from) = (whoami(), None);
        let mut pointer = Pointer { ring: name, sequence, set, published: Time::now(), by, note, from, signature };
        let mut bar = Bar::new();
        for _ in 0..ATTEMPTS {
            let manifest = etcd.store(packed, &mut |done, of| bar.show(done, of, "chunks stored")).await;
            bar.clear();
            let manifest = manifest?;
            pointer.from = etcd.store_delta(ring, packed).await;
            match etcd.swap(ring, &pointer, manifest).await? {
                Swapped::Done(_) => {
                    // What is left over goes with the next change, if it can't be removed now.
                    etcd.remove_unused_sets().await.ok();
                    return Ok(());
                }
                Swapped::Lost(other) => return Err(lost(&ring.name, other.map(|it| *it))),
                Swapped::SetGone => {}
            }
        }
        Err(Problem::new(
            ProblemKind::Conflict,
            format!("change the ring {}: others remove its set, again and again", ring.name),
        ))
    }
}

/// The next sequence, which no node has ever seen.
fn next(ring: &Ring) -> Result<u64, Problem> {
    ring.highest().checked_add(1).ok_or_else(|| {
        Problem::new(ProblemKind::Failed, format!("the ring {} has no sequence left", ring.name))
            .hint("a node reports the highest one that there is; look for it with fleet status")
    })
}

/// What a ring has now.
async fn present(etcd: &Etcd, ring: &Ring, notes: &mut Vec<String>) -> Result<Content, Problem> {
    let Some(Seen { value, .. }) = &ring.pointer else { return Ok(Content::default()) };
    match etcd.set(&value.set).await.and_then(|text| Content::parse(&text)) {
        Err(problem) if problem.kind != ProblemKind::NoDaemon => {
            notes.push(format!("the ring's present set can't be compared with: {}", problem.error));
            Ok(Content::default())
        }
        content => content,
    }
}

/// Says who was first.
fn lost(ring: &Name, other: Option<Seen<Pointer>>) -> Problem {
    let what = match other {
        None => "its pointer was removed".to_owned(),
        Some(Seen { value: Pointer { sequence, set, published, by, note, .. }, .. }) => {
            let note = note.map(|note| format!(" ({note})")).unwrap_or_default();
            format!("{by} gave it the set {} as sequence {sequence} at {published}{note}", set.short())
        }
    };
    Problem::new(
        ProblemKind::Conflict,
        format!("the ring {ring} was changed meanwhile, and not by this command: {what}"),
    )
    .hint(format!("see anyportctl fleet history --ring {ring}, and repeat the command if it is still right"))
}

/// `USER@HOST`, as which the history knows who changed something.
fn whoami() -> String {
    let user = std::env::var("SUDO_USER").ok().filter(|name| !name.is_empty());
    let uid = Uid::current();
    let user = user.or_else(|| User::from_uid(uid).ok().flatten().map(|it| it.name)).unwrap_or_else(|| uid.to_string());
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{user}@{}", host.trim())
}

impl RingChanged {
    fn new(
        dry_run: bool,
        changed: bool,
        ring: &Ring,
        sequence: u64,
        packed: &Packed,
        difference: Difference,
        notes: Vec<String>,
    ) -> Self {
        let Difference { added, removed, unchanged, services, rules } = difference;
        let (ring, set) = (ring.name.clone(), packed.hash);
        let (difference, lines) = if dry_run { (Some(rules), Vec::new()) } else { (None, rules) };
        Self { dry_run, changed, ring, sequence, set, added, removed, unchanged, services, difference, notes, lines }
    }

    /// For people.
    pub(super) fn text(&self) -> String {
        let Self { ring, sequence, set, added, removed, unchanged, .. } = self;
        let mut lines: Vec<String> = self.services.iter().map(|service| format!("  service {service}")).collect();
        let rules = self.difference.as_ref().unwrap_or(&self.lines);
        let shown = if self.dry_run { rules.len() } else { SHOWN };
        lines.extend(rules.iter().take(shown).map(|rule| format!("  {rule}")));
        if let Some(more) = rules.len().checked_sub(shown).filter(|more| *more > 0) {
            lines.push(format!("  and {more} more"));
        }
        let what = format!("set {}, sequence {sequence}", set.short());
        lines.push(if !self.changed {
            format!("nothing to do, the ring {ring} has it already ({what})")
        } else if self.dry_run {
            format!("plan for the ring {ring}: {added} to add, {removed} to remove, {unchanged} unchanged; nothing was changed")
        } else {
            format!("ring {ring}: {added} added, {removed} removed, {unchanged} unchanged ({what})")
        });
        lines.extend(self.notes.iter().map(|note| format!("note: {note}")));
        lines.join("\n")
    }
}
