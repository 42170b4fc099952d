//! What every change of a ring has in common, be it published, promoted or rolled back.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nix::unistd::{Uid, User};
use serde::Serialize;

use super::bar::Bar;
use crate::{
    api::{Problem, ProblemKind},
    fleet::{
        difference::{Content, Difference},
        etcd::{Etcd, Ring, Swapped},
        layout::{Hash, Name, Pointer, STEP, Seen, Time},
        pack::Packed,
        signing::{PublicKeys, SigningKey},
    },
    rules::{InvalidText, are_most_gone},
    text::{list_of, remark},
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
    /// Public keys by which sets were signed before, while a key is replaced; a set that etcd names is signed again only if one of
    /// them, or the signing key, has signed it
    #[arg(long, value_name = "FILE")]
    former_keys: Option<PathBuf>,
    /// Give the change this sequence, after etcd was restored or wiped: nodes refuse those behind what they have seen
    #[arg(long, value_name = "SEQUENCE")]
    sequence: Option<u64>,
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
    /// Whether its set was gone from etcd or spoilt, and was stored again.
    stored_again: bool,
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
    /// What there is to say of how it was read.
    notes: Vec<String>,
}

impl Prepared {
    pub(super) fn new(text: &str) -> Result<Self, Problem> {
        let content = Content::parse(text)?;
        let packed = Packed::new(text).map_err(|error| Problem::new(ProblemKind::TooLarge, error.to_string()))?;
        Ok(Self { packed, content, notes: Vec::new() })
    }

    /// The same with what there is to say of it.
    pub(super) fn with_notes(self, notes: Vec<String>) -> Self {
        Self { notes, ..self }
    }

    pub(super) fn hash(&self) -> Hash {
        self.packed.hash
    }
}

/// How to change a ring, with the key read.
pub(super) struct Change<'a> {
    pub(super) how: &'a How,
    key: Option<SigningKey>,
    /// By which a pointer has to be signed for its set to be signed again.
    trusted: Option<PublicKeys>,
}

impl How {
    /// Reads the key.
    pub(super) fn read(&self) -> Result<Change<'_>, Problem> {
        let key = self.signing_key.as_ref().map(|file| read_key(file, SigningKey::from_pem)).transpose()?;
        let former = self.former_keys.as_ref().map(|file| read_key(file, PublicKeys::from_pem)).transpose()?;
        let trusted = key.as_ref().map(|key| match former {
            Some(former) => key.public().and(former),
            None => key.public(),
        });
        Ok(Change { how: self, key, trusted })
    }
}

fn read_key<T>(file: &Path, parse: impl FnOnce(&[u8]) -> Result<T, InvalidText>) -> Result<T, Problem> {
    let invalid = |why: String| Problem::new(ProblemKind::Invalid, format!("read {}: {why}", file.display()));
    let pem = fs::read(file).map_err(|error| invalid(error.to_string()))?;
    parse(&pem).map_err(|error| invalid(error.to_string()))
}

impl Change<'_> {
    /// Checks that a set may be signed which etcd names and this command was not given: any client that writes to etcd may have put it
    /// there.
    pub(super) fn expect_trusted(&self, pointer: &Pointer) -> Result<(), Problem> {
        let Some(trusted) = self.trusted.as_ref().filter(|_| !self.how.force) else { return Ok(()) };
        trusted.verify(pointer).map_err(|error| {
            Problem::new(ProblemKind::Unsafe, format!("the set would be signed because etcd names it, and {error}")).hint(
                "publish the file instead; --former-keys FILE names keys that were replaced; --force signs what is there",
            )
        })
    }

    /// Has a ring point to a set. What the change is by itself stands before the operator's note.
    pub(super) async fn make(
        &self,
        etcd: &Etcd,
        ring: &Ring,
        set: &Prepared,
        what: Option<String>,
    ) -> Result<RingChanged, Problem> {
        let Prepared { packed, content, notes } = set;
        let mut notes = notes.clone();
        let before = present(etcd, ring, &mut notes).await?;
        let difference = content.since(before.as_ref().unwrap_or(&Content::default()));
        let foreign = content.foreign_services();
        if !foreign.is_empty() {
            notes.push(format!(
                "the set steers to services that it does not have, so nodes must: {}",
                list_of(&foreign)
            ));
        }
        if ring.pointer.is_none() && ring.nodes.is_empty() {
            notes.push(no_nodes(etcd, &ring.name).await?);
        }
        let highest = ring.highest();
        let is_there = self.is_there(ring, &packed.hash, highest);
        let sequence = if is_there { highest } else { next(ring, self.how.sequence, self.how.force)? };
        let beyond = beyond(ring, sequence.saturating_add(u64::from(is_there)));
        notes.extend(beyond.as_ref().map(|it| it.what.clone()));
        let answer = |changed, stored_again, notes| RingChanged {
            stored_again,
            ..RingChanged::new(self.how.dry_run, changed, ring, sequence, packed, difference.clone(), notes)
        };
        let unsafe_because = beyond.and_then(Beyond::danger);
        let unsafe_because =
            if is_there { unsafe_because } else { unsafe_because.or(self.danger(ring, before.as_ref(), content)) };
        if self.how.dry_run {
            notes.extend(unsafe_because.map(|it| format!("without --force it would be refused: {}", it.error)));
            return Ok(answer(!is_there, is_there && !etcd.has(&packed.hash).await?, notes));
        }
        if let Some(problem) = unsafe_because.filter(|_| !self.how.force) {
            return Err(problem);
        }
        if is_there {
            let is_lost = !etcd.has(&packed.hash).await?;
            if is_lost {
                store(etcd, packed).await?;
            }
            return Ok(answer(false, is_lost, notes));
        }
        let note = match (what, &self.how.note) {
            (Some(what), Some(note)) => Some(format!("{what}: {note}")),
            (what, note) => what.or_else(|| note.clone()),
        };
        self.write(etcd, ring, packed, sequence, note).await?;
        Ok(answer(true, false, notes))
    }

    /// Gives a ring back a set that it had, unless anybody has changed the ring since it got this sequence. Returns the new one.
    pub(super) async fn put_back(
        &self,
        etcd: &Etcd,
        name: &Name,
        since: u64,
        before: &Pointer,
        note: String,
    ) -> Result<u64, Problem> {
        let Prepared { packed, .. } = Prepared::new(&etcd.set(&before.set).await?)?;
        self.expect_trusted(before)?;
        let ring = etcd.ring(name).await?;
        if ring.pointer.as_ref().is_none_or(|it| it.value.sequence != since) {
            return Err(lost(name, ring.pointer));
        }
        let sequence = next(&ring, None, false)?;
        self.write(etcd, &ring, &packed, sequence, Some(note)).await?;
        Ok(sequence)
    }

    /// Whether there is nothing to do.
    fn is_there(&self, ring: &Ring, hash: &Hash, highest: u64) -> bool {
        ring.pointer.as_ref().is_some_and(|Seen { value, .. }| {
            let is_last = value.sequence == highest && self.how.sequence.is_none_or(|it| it == highest);
            value.set == *hash && is_last && (self.key.is_none() || value.signature.is_some())
        })
    }

    /// Why this should not be done.
    fn danger(&self, ring: &Ring, before: Option<&Content>, after: &Content) -> Option<Problem> {
        let name = &ring.name;
        let refuse = |why: String, hint: &str| Some(Problem::new(ProblemKind::Unsafe, why).hint(hint));
        let Some(before) = before else {
            return refuse(
                format!("what the ring {name} has now can't be read, so nobody knows how many rules would go"),
                "publish the file that the ring has, which stores its set again; or go on by --force",
            );
        };
        let (was, is) = (before.rules(), after.rules());
        if are_most_gone(was, is) {
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
        for _ in 0..ATTEMPTS {
            let manifest = store(etcd, packed).await?;
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

async fn store(etcd: &Etcd, packed: &Packed) -> Result<i64, Problem> {
    let mut bar = Bar::new();
    let manifest = etcd.store(packed, &mut |done, of| bar.show(done, of, "chunks stored")).await;
    bar.clear();
    manifest
}

/// The sequence of the next change: the one that was asked for, or else one more than the ring has had. What nodes say has no part in
/// it, since any of them can say anything.
fn next(ring: &Ring, asked: Option<u64>, by_force: bool) -> Result<u64, Problem> {
    let (name, highest) = (&ring.name, ring.highest());
    let (first, last) = (highest.saturating_add(1), highest.saturating_add(STEP));
    match asked {
        // Nodes refuse what is too far for them.
        Some(asked) if by_force || (first..=last).contains(&asked) => Ok(asked),
        Some(asked) => Err(Problem::new(
            ProblemKind::Invalid,
            format!("--sequence {asked}: the ring {name} has had {highest}, so the next one is {first} to {last}"),
        )
        .hint("--force takes any; nodes refuse one behind what they have seen, or far beyond it")),
        None if highest < u64::MAX => Ok(first),
        None => Err(Problem::new(ProblemKind::Failed, format!("the ring {name} has no sequence left after {highest}"))
            .hint(
                "if its nodes have not followed that one, --sequence SEQUENCE --force goes on behind what they have seen; else give \
                 them another ring (`ring` in their section [fleet], and a restart), and publish to that",
            )),
    }
}

/// Nodes that report to have seen a sequence or a higher one.
struct Beyond {
    what: String,
    /// Whether they are most of those that report.
    are_most: bool,
    remedy: String,
}

impl Beyond {
    /// One node that says so must not keep the ring from being changed; most of them will not follow.
    fn danger(self) -> Option<Problem> {
        self.are_most.then(|| Problem::new(ProblemKind::Unsafe, self.what).hint(self.remedy))
    }
}

/// Who would not follow a pointer with this sequence.
fn beyond(ring: &Ring, sequence: u64) -> Option<Beyond> {
    let beyond = ring.beyond(sequence);
    let highest = beyond.iter().map(|it| it.1).max()?;
    let nodes: Vec<String> = beyond.iter().map(|(node, seen)| format!("{node} ({seen})")).collect();
    let what = format!(
        "these nodes of the ring {} report to have seen the sequence {sequence} or a later one, of which etcd does not know: {}",
        ring.name,
        list_of(&nodes)
    );
    let remedy = format!(
        "if etcd was restored or wiped, --sequence {}{} goes on behind them; if only some say so, they may lie, and --force \
         goes on without them",
        highest.saturating_add(1),
        if highest >= ring.highest().saturating_add(STEP) { " --force" } else { "" }
    );
    Some(Beyond { what, are_most: beyond.len() * 2 > ring.reports().count(), remedy })
}

/// A ring that nobody has heard of may be a slip.
async fn no_nodes(etcd: &Etcd, ring: &Name) -> Result<String, Problem> {
    let others = etcd.ring_names().await?;
    let there_are =
        if others.is_empty() { "there are no rings yet".into() } else { format!("there are {}", list_of(&others)) };
    Ok(format!("the ring {ring} is new, and no node of it has reported; {there_are}"))
}

/// What a ring has now; nothing if that can't be read.
async fn present(etcd: &Etcd, ring: &Ring, notes: &mut Vec<String>) -> Result<Option<Content>, Problem> {
    let Some(Seen { value, .. }) = &ring.pointer else { return Ok(Some(Content::default())) };
    match etcd.set(&value.set).await.and_then(|text| Content::parse(&text)) {
        Err(problem) if problem.kind != ProblemKind::NoDaemon => {
            notes.push(format!("the ring's present set can't be compared with: {}", problem.error));
            Ok(None)
        }
        content => content.map(Some),
    }
}

/// Says who was first.
fn lost(ring: &Name, other: Option<Seen<Pointer>>) -> Problem {
    let what = match other {
        None => "its pointer was removed".to_owned(),
        Some(Seen { value: Pointer { sequence, set, published, by, note, .. }, .. }) => {
            let note = note.map(|note| format!(" ({})", remark(&note))).unwrap_or_default();
            let by = remark(&by);
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
        Self {
            dry_run,
            changed,
            stored_again: false,
            ring,
            sequence,
            set,
            added,
            removed,
            unchanged,
            services,
            difference,
            notes,
            lines,
        }
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
        lines.push(if self.stored_again && self.dry_run {
            format!("plan for the ring {ring}: it has the set already, which is gone from etcd or spoilt, and would be stored again ({what})")
        } else if self.stored_again {
            format!("ring {ring}: its set was gone from etcd or spoilt, and was stored again; its pointer stays ({what})")
        } else if !self.changed {
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
