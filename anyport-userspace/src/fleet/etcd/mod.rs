//! Reads and changes the records of a fleet in etcd.
//!
//! Every change of a ring is one transaction that compares the revision of its pointer, so that of two operators one
//! succeeds and the other one gets an error. What is asked while etcd elects a leader is asked again, for as long as the
//! caller is patient. A transaction whose answer was lost may have been carried out: the one that follows then fails by its
//! comparison, and finds what it wanted to write.

pub(super) mod client;
pub(super) mod messages;
mod records;

use std::{collections::HashSet, error::Error as _, future::Future, time::Duration};

use serde::Serialize;
use tokio::time::{Instant, sleep, timeout};
use tonic::Code;

pub(super) use self::records::read_pointer;
pub use self::records::{Node, Ring, Skipped};
use self::records::{history_of, nodes_of, read_record};
use self::{
    client::{Client, Error},
    messages::{
        Compare, CompareResult, DeleteRangeRequest, KeyValue, OperationResponse, PutRequest, RangeRequest,
        RangeResponse, RequestOp, ResponseHeader, TxnRequest, TxnResponse,
    },
};
use super::{
    delta::Delta,
    layout::{HISTORY, Hash, Keys, Manifest, Name, Pointer, Seen},
    pack::{CHUNK, Packed},
    settings::Endpoints,
};
use crate::{
    api::{Problem, ProblemKind},
    text::remark,
};

/// A member of etcd that takes longer is asked again, or another one is.
const ATTEMPT: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(100);
/// Manifest and chunks that are fetched at once.
const PAGE: i64 = 3;
/// How many times smaller than a set has to be what makes it out of another one.
const WORTH: usize = 4;
/// Records that are read at once, and by what that is divided while they are too large.
const PAGES: (i64, i64) = (1_000, 32);
/// Bytes of the largest record that is read: a report has some hundred.
const LARGEST_RECORD: usize = 64 << 10;
/// Records, and bytes of them, that are read below one prefix: twice as many nodes as docs/fleet.md considers.
const MOST_RECORDS: usize = 20_000;
const MOST_BYTES: usize = 64 << 20;
/// How often a set is stored again that others have removed meanwhile.
const STORE_ATTEMPTS: usize = 5;

/// What helps where etcd is full.
const FULL: &str = "etcd is full, and nodes go on with what they have: `etcdctl compact REVISION` with the revision that `etcdctl \
                    endpoint status -w json` shows, `etcdctl defrag` for each member, then `etcdctl alarm disarm`";

/// A connection to etcd.
#[derive(Clone)]
pub struct Etcd {
    pub(super) client: Client,
    pub(super) keys: Keys,
    patience: Duration,
    /// The members, for messages.
    urls: String,
}

impl std::fmt::Debug for Etcd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Etcd").field("urls", &self.urls).field("keys", &self.keys).finish_non_exhaustive()
    }
}

/// What became of a change.
#[derive(Debug)]
pub enum Swapped {
    /// It is there, as of this revision.
    Done(i64),
    /// The pointer was another one by then.
    Lost(Option<Box<Seen<Pointer>>>),
    /// The set had been removed by then.
    SetGone,
}

impl Etcd {
    /// Connects, and asks nothing unless there is a user.
    ///
    /// # Errors
    /// The user is not let in; or no member answers for as long as `patience` says, which is how long every request is tried.
    pub async fn connect(endpoints: &Endpoints, patience: Duration) -> Result<Self, Problem> {
        let Endpoints { urls, keys, options } = endpoints;
        let names = urls.join(", ");
        let client = retry(&names, patience, "connect", || Client::connect(urls, options)).await?;
        Ok(Self { client, keys: keys.clone(), patience, urls: names })
    }

    /// Asks until there is an answer or patience is over.
    async fn ask<T, F: Future<Output = Result<T, Error>>>(
        &self,
        what: &str,
        request: impl Fn() -> F,
    ) -> Result<T, Problem> {
        retry(&self.urls, self.patience, what, request).await
    }

    async fn transact(&self, what: &str, txn: &TxnRequest) -> Result<TxnResponse, Problem> {
        self.ask(what, || self.client.txn(txn.clone())).await
    }

    /// Reads several things at one revision.
    async fn get_all<const N: usize>(&self, what: &str, gets: [RangeRequest; N]) -> Result<TxnResponse, Problem> {
        let txn = TxnRequest { success: gets.map(RequestOp::from).into(), ..TxnRequest::default() };
        self.transact(what, &txn).await
    }

    async fn get(&self, what: &str, request: RangeRequest) -> Result<RangeResponse, Problem> {
        self.ask(what, || self.client.range(request.clone())).await
    }

    async fn put(&self, what: &str, request: PutRequest) -> Result<i64, Problem> {
        let answer = self.ask(what, || self.client.put(request.clone())).await?;
        Ok(revision(answer.header.as_ref()))
    }

    /// A ring's pointer, and the revision that etcd is at.
    ///
    /// # Errors
    /// etcd does not answer; or what is there is no pointer.
    pub async fn pointer(&self, ring: &Name) -> Result<(Option<Seen<Pointer>>, i64), Problem> {
        let what = format!("read the pointer of the ring {ring}");
        let answer = self.get(&what, RangeRequest::key(&self.keys.ring(ring))).await?;
        Ok((answer.kvs.first().map(read_pointer).transpose()?, revision(answer.header.as_ref())))
    }

    /// A ring, all of it at one moment. What nodes and others have written there can't keep it from being read: what is no record
    /// or too much is skipped, and named.
    ///
    /// # Errors
    /// etcd does not answer; or what is there is no pointer.
    pub async fn ring(&self, name: &Name) -> Result<Ring, Problem> {
        match self.ring_as_it_is(name).await? {
            (_, Some(problem)) => Err(problem),
            (ring, None) => Ok(ring),
        }
    }

    /// The same, where what is there may be no pointer: why not.
    ///
    /// # Errors
    /// etcd does not answer.
    pub async fn ring_as_it_is(&self, name: &Name) -> Result<(Ring, Option<Problem>), Problem> {
        self.read_ring(name).await
    }

    async fn read_ring(&self, name: &Name) -> Result<(Ring, Option<Problem>), Problem> {
        let (keys, what) = (&self.keys, format!("read the ring {name}"));
        let answer = self.get(&what, RangeRequest::key(&keys.ring(name))).await?;
        let revision = revision(answer.header.as_ref());
        let (pointer, problem) = match answer.kvs.first().map(read_pointer).transpose() {
            Ok(pointer) => (pointer, None),
            Err(problem) => (None, Some(problem)),
        };
        let mut skipped = Vec::new();
        let history = self.read_below(&what, &keys.history(name), revision, &mut skipped).await?;
        let reports = self.read_below(&what, &keys.nodes_of(name), revision, &mut skipped).await?;
        let members = self.read_below(&what, &keys.members_of(name), revision, &mut skipped).await?;
        let history = history_of(keys, name, &history, &mut skipped);
        let nodes = nodes_of(keys, name, &reports, &members, &mut skipped);
        Ok((Ring { name: name.clone(), pointer, history, nodes, skipped }, problem))
    }

    /// All records below a prefix as of a revision, up to a number and a size. Where that is compacted meanwhile, which any client of
    /// etcd can do, as of the present one.
    async fn read_below(
        &self,
        what: &str,
        prefix: &str,
        revision: i64,
        skipped: &mut Vec<Skipped>,
    ) -> Result<Vec<KeyValue>, Problem> {
        let mut records = Vec::new();
        let (mut bytes, mut page) = (0, PAGES.0);
        let mut request = RangeRequest { revision, ..RangeRequest::prefix(prefix) };
        loop {
            request.limit = page;
            let answer = match self.get_unless_too_large(what, &request).await {
                Err(problem) if request.revision != 0 && problem.error.contains("compacted") => {
                    request.revision = 0;
                    continue;
                }
                answer => answer?,
            };
            let RangeResponse { kvs, more, .. } = match answer {
                Some(answer) => answer,
                None if page > 1 => {
                    page = (page / PAGES.1).max(1);
                    continue;
                }
                // Without its value.
                None => self.get(what, request.clone().keys_only()).await?,
            };
            let Some(last) = kvs.last() else { return Ok(records) };
            // The least key behind this one.
            request.key = [last.key.as_slice(), b"\0"].concat();
            for entry in kvs {
                let length = entry.key.len() + entry.value.len();
                bytes += length;
                let why = match () {
                    () if entry.value.is_empty() => "it is empty, or too large to be read".to_owned(),
                    () if length > LARGEST_RECORD => {
                        format!("it has {length} bytes, and a record has {LARGEST_RECORD} at most")
                    }
                    () => {
                        records.push(entry);
                        continue;
                    }
                };
                skipped.push(Skipped::new(&entry.key, &why));
            }
            if !more {
                return Ok(records);
            }
            if records.len() + skipped.len() >= MOST_RECORDS || bytes >= MOST_BYTES {
                skipped.push(Skipped::new(
                    &request.key,
                    &format!("it and what is behind it: {MOST_RECORDS} records or {MOST_BYTES} bytes are read at most"),
                ));
                return Ok(records);
            }
            page = PAGES.0;
        }
    }

    /// Nothing if the answer would be larger than what is taken.
    async fn get_unless_too_large(&self, what: &str, request: &RangeRequest) -> Result<Option<RangeResponse>, Problem> {
        self.ask(what, || async {
            match self.client.range(request.clone()).await {
                Err(Error::Status(status)) if status.code() == Code::OutOfRange && is_of_client(&status) => Ok(None),
                answer => answer.map(Some),
            }
        })
        .await
    }

    /// The names of all rings that have a pointer or nodes.
    ///
    /// # Errors
    /// etcd does not answer.
    pub async fn ring_names(&self) -> Result<Vec<Name>, Problem> {
        let mut names = Vec::new();
        for prefix in [self.keys.rings(), self.keys.members(), self.keys.nodes()] {
            self.ring_names_below(&prefix, &mut names).await?;
        }
        names.sort();
        names.dedup();
        Ok(names)
    }

    /// Goes from ring to ring, however many keys each has.
    async fn ring_names_below(&self, prefix: &str, names: &mut Vec<Name>) -> Result<(), Problem> {
        let mut request = RangeRequest { limit: 1, ..RangeRequest::prefix(prefix).keys_only() };
        for _ in 0..MOST_RECORDS {
            let answer = self.get("list the rings", request.clone()).await?;
            let Some(entry) = answer.kvs.first() else { break };
            let rest = entry.key.strip_prefix(prefix.as_bytes()).unwrap_or_default();
            let end = rest.iter().position(|it| *it == b'/').unwrap_or(rest.len());
            names.extend(std::str::from_utf8(&rest[..end]).ok().and_then(|name| name.parse::<Name>().ok()));
            // Behind all that begins with the same name and a slash, or behind the key.
            let next = if end < rest.len() { b'/' + 1 } else { 0 };
            request.key = [prefix.as_bytes(), &rest[..end], &[next]].concat();
        }
        Ok(())
    }

    /// The text of a set.
    ///
    /// # Errors
    /// etcd does not answer; there is no such set; or what is there does not have that hash.
    pub async fn set(&self, hash: &Hash) -> Result<String, Problem> {
        let spoilt = |why: &dyn std::fmt::Display| {
            Problem::new(ProblemKind::Failed, format!("{why}"))
                .hint("publishing the same file again stores the set again")
        };
        let first = self.keys.set(hash);
        // Right behind the slash that chunks have after it.
        let (mut from, end) = (first.clone().into_bytes(), format!("{first}0"));
        let mut manifest: Option<Manifest> = None;
        let mut chunks: Vec<Vec<u8>> = Vec::new();
        loop {
            let request = RangeRequest {
                key: from.clone(),
                range_end: end.clone().into(),
                limit: PAGE,
                ..RangeRequest::default()
            };
            let RangeResponse { kvs, more, .. } = self.get(&format!("read the set {}", hash.short()), request).await?;
            for entry in kvs {
                // The least key behind this one.
                from = [entry.key.as_slice(), b"\0"].concat();
                if entry.key == first.as_bytes() {
                    let read: Manifest = read_record(&entry).map_err(|why| spoilt(&why))?;
                    read.validate().map_err(|why| spoilt(&why))?;
                    manifest = Some(read);
                } else if entry.key == self.keys.chunk(hash, chunks.len()).as_bytes() {
                    chunks.push(entry.value);
                }
            }
            let Some(manifest) = manifest else {
                return Err(Problem::new(ProblemKind::NotFound, format!("there is no set {hash} in etcd")));
            };
            if !more || chunks.len() >= manifest.chunks {
                chunks.truncate(manifest.chunks);
                return manifest.unpack(hash, &chunks).map_err(|why| spoilt(&why));
            }
        }
    }

    /// Whether a set is there, as it should be.
    ///
    /// # Errors
    /// etcd does not answer.
    pub async fn has(&self, hash: &Hash) -> Result<bool, Problem> {
        match self.set(hash).await {
            Ok(_) => Ok(true),
            Err(problem) if problem.kind == ProblemKind::NoDaemon => Err(problem),
            Err(_) => Ok(false),
        }
    }

    /// Stores a set unless it is there, and returns the revision of its manifest. Calls `progress` with how many of how
    /// many chunks are done.
    ///
    /// # Errors
    /// etcd does not answer or has no space left.
    pub async fn store(&self, packed: &Packed, progress: &mut dyn FnMut(usize, usize)) -> Result<i64, Problem> {
        let Packed { hash, manifest, .. } = packed;
        for _ in 0..STORE_ATTEMPTS {
            let there = self.manifest_revision(hash).await?;
            if there != 0 && self.set(hash).await.is_ok() {
                return Ok(there);
            }
            let mut compares = vec![Compare::mod_revision(&self.keys.set(hash), CompareResult::Equal, there)];
            for (number, chunk) in packed.chunks().enumerate() {
                let key = self.keys.chunk(hash, number);
                let revision = self.store_chunk(&key, chunk).await?;
                compares.push(Compare::mod_revision(&key, CompareResult::Equal, revision));
                progress(number + 1, manifest.chunks);
            }
            // The manifest comes last, and only where all chunks are still the ones that were written.
            let put = PutRequest::new(&self.keys.set(hash), to_json(manifest)?);
            let txn = TxnRequest { compare: compares, success: vec![put.into()], failure: Vec::new() };
            let answer = self.transact("store the set", &txn).await?;
            if answer.succeeded {
                return Ok(revision(answer.header.as_ref()));
            }
        }
        Err(Problem::new(
            ProblemKind::Conflict,
            format!("store the set {}: others remove or write it, again and again", hash.short()),
        ))
    }

    /// Stores the delta from the set that a ring has to this one, if that is much less than the set, and returns the hash
    /// of the ring's set.
    /// Nodes do without, so whatever fails here fails nothing else.
    pub async fn store_delta(&self, ring: &Ring, packed: &Packed) -> Option<Hash> {
        let from = ring.pointer.as_ref()?.value.set;
        let before = self.set(&from).await.ok()?;
        let delta = Delta::between(&before, packed.text()).pack().ok()?;
        if delta.len() > CHUNK || delta.len() > packed.stored() / WORTH {
            return None;
        }
        let put = PutRequest::new(&self.keys.delta(&from, &packed.hash), delta);
        self.put("store a delta", put).await.ok().map(|_| from)
    }

    /// What makes one set out of another; nothing if that is not there.
    ///
    /// # Errors
    /// etcd does not answer; or what is there makes no sense.
    pub async fn delta(&self, from: &Hash, to: &Hash) -> Result<Option<Delta>, Problem> {
        let answer = self.get("read a delta", RangeRequest::key(&self.keys.delta(from, to))).await?;
        let unpack = |it: &KeyValue| Delta::unpack(&it.value);
        answer.kvs.first().map(unpack).transpose().map_err(|why| Problem::new(ProblemKind::Failed, why.to_string()))
    }

    /// The revision of a set's manifest, 0 if there is none.
    ///
    /// # Errors
    /// etcd does not answer.
    pub async fn manifest_revision(&self, hash: &Hash) -> Result<i64, Problem> {
        let request = RangeRequest::key(&self.keys.set(hash)).keys_only();
        let answer = self.get(&format!("look for the set {}", hash.short()), request).await?;
        Ok(answer.kvs.first().map_or(0, |it| it.mod_revision))
    }

    async fn store_chunk(&self, key: &str, chunk: &[u8]) -> Result<i64, Problem> {
        let there = self.get("look for a chunk of the set", RangeRequest::key(key)).await?;
        if let Some(there) = there.kvs.first().filter(|it| it.value == chunk) {
            return Ok(there.mod_revision);
        }
        self.put("store a chunk of the set", PutRequest::new(key, chunk)).await
    }

    /// Has a ring point to another set, unless anybody has changed it since it was read, or has removed the set whose manifest
    /// has this revision. Of the history, the oldest records go.
    ///
    /// # Errors
    /// etcd does not answer: then the change may have been carried out or not.
    pub async fn swap(&self, ring: &Ring, pointer: &Pointer, manifest: i64) -> Result<Swapped, Problem> {
        let Ring { name, history, .. } = ring;
        let (key, set) = (self.keys.ring(name), self.keys.set(&pointer.set));
        let before = ring.pointer.as_ref().map_or(0, |it| it.revision);
        let compares = [
            Compare::mod_revision(&key, CompareResult::Equal, before),
            Compare::mod_revision(&set, CompareResult::Equal, manifest),
        ];
        let record = to_json(pointer)?;
        let mut changes: Vec<RequestOp> = vec![
            PutRequest::new(&key, record.clone()).into(),
            PutRequest::new(&self.keys.history_at(name, pointer.sequence), record).into(),
        ];
        let kept = usize::try_from(HISTORY - 1).unwrap_or(usize::MAX);
        if let Some(oldest) =
            history.len().checked_sub(kept).filter(|surplus| *surplus > 0).and_then(|at| history.get(at))
        {
            // A record of a sequence that nobody has published must not take the new one along.
            let end = self.keys.history_at(name, oldest.sequence.min(pointer.sequence));
            changes.push(DeleteRangeRequest::range(&self.keys.history(name), &end).into());
        }
        let look = RangeRequest::key(&key);
        let txn = TxnRequest { compare: compares.into(), success: changes, failure: vec![look.into()] };
        // A request without an answer may have been carried out, or be so yet: by a member that hangs and goes on.
        let answer = self.transact(&format!("change the ring {name}"), &txn).await.map_err(|problem| match problem.kind {
            ProblemKind::NoDaemon => problem.hint(format!(
                "the change may have been made, or may be yet; when etcd answers again, see anyportctl fleet history --ring {name} \
                 before you repeat the command; nodes go on meanwhile"
            )),
            _ => problem,
        })?;
        if answer.succeeded {
            return Ok(Swapped::Done(revision(answer.header.as_ref())));
        }
        let [found] = parts(answer);
        let found = found.first().map(read_pointer).transpose()?;
        Ok(match found {
            // An earlier attempt was carried out, and its answer was lost.
            Some(found) if found.value == *pointer => Swapped::Done(found.revision),
            found if found.as_ref().map_or(0, |it| it.revision) == before => Swapped::SetGone,
            found => Swapped::Lost(found.map(Box::new)),
        })
    }

    /// Removes the sets that no pointer and no history names, and returns how many that were.
    ///
    /// # Errors
    /// etcd does not answer.
    pub async fn remove_unused_sets(&self) -> Result<usize, Problem> {
        let keys = &self.keys;
        let gets = [
            RangeRequest::prefix(&keys.rings()),
            RangeRequest::prefix(&keys.histories()),
            RangeRequest::prefix(&keys.sets()).keys_only(),
            RangeRequest::prefix(&keys.deltas()).keys_only(),
        ];
        let answer = self.get_all("look for unused sets", gets).await?;
        let now = revision(answer.header.as_ref());
        let [rings, histories, sets, deltas] = parts(answer);
        let mut used = HashSet::new();
        for entry in rings.iter().chain(&histories) {
            // What can't be read may name any set.
            let Ok(pointer) = read_pointer(entry) else { return Ok(0) };
            used.insert(pointer.value.set);
        }
        let found = sets.iter().filter_map(|it| keys.set_of(it.key_str()?));
        let unused: HashSet<Hash> = found.filter(|it| !used.contains(it)).collect();
        let mut removed = 0;
        for hash in unused {
            removed += usize::from(self.remove_unless_changed(&hash, now).await?);
        }
        let deltas = deltas.iter().filter_map(|it| keys.delta_to(it.key_str()?));
        for hash in deltas.filter(|it| !used.contains(it)).collect::<HashSet<_>>() {
            let delete = DeleteRangeRequest::prefix(&keys.deltas_to(&hash));
            self.ask("remove unused deltas", || self.client.delete(delete.clone())).await?;
        }
        Ok(removed)
    }

    /// Removes a set, unless any ring or the set has changed since a revision, and returns whether it did. A client that is
    /// about to point to it compares the revision of its manifest.
    ///
    /// # Errors
    /// etcd does not answer.
    pub async fn remove_unless_changed(&self, hash: &Hash, since: i64) -> Result<bool, Problem> {
        let set = self.keys.set(hash);
        let end = format!("{set}0");
        let unchanged = |key: &str| Compare::mod_revision(key, CompareResult::Less, since + 1);
        let compare = vec![
            unchanged(&self.keys.rings()).of_prefix(),
            unchanged(&self.keys.histories()).of_prefix(),
            unchanged(&set).up_to(&end),
        ];
        let remove = DeleteRangeRequest::range(&set, &end);
        let txn = TxnRequest { compare, success: vec![remove.into()], failure: Vec::new() };
        Ok(self.transact("remove an unused set", &txn).await?.succeeded)
    }

    /// Removes a ring: its pointer, its history and what is known of its nodes. Sets that only it had go with the next change.
    ///
    /// # Errors
    /// etcd does not answer; or the pointer was changed since the ring was read.
    pub async fn remove_ring(&self, ring: &Ring) -> Result<(), Problem> {
        let (keys, name) = (&self.keys, &ring.name);
        let below = [keys.history(name), keys.nodes_of(name), keys.members_of(name)];
        let mut success: Vec<RequestOp> = vec![DeleteRangeRequest::key(&keys.ring(name)).into()];
        success.extend(below.iter().map(|prefix| RequestOp::from(DeleteRangeRequest::prefix(prefix))));
        // What could not be read has no revision that is known.
        let before = ring.pointer.iter().map(|it| it.revision);
        let compare = before.map(|it| Compare::mod_revision(&keys.ring(name), CompareResult::Equal, it)).collect();
        let txn = TxnRequest { compare, success, failure: Vec::new() };
        if self.transact(&format!("remove the ring {name}"), &txn).await?.succeeded {
            return Ok(());
        }
        Err(Problem::new(ProblemKind::Conflict, format!("the ring {name} was changed meanwhile"))
            .hint(format!("see anyportctl fleet history --ring {name}, and repeat the command if it is still right")))
    }

    /// Forgets that a node is one of a ring's. Returns whether it was. By force also what it reports.
    ///
    /// # Errors
    /// etcd does not answer; or the node lives.
    pub async fn forget(&self, ring: &Name, node: &Name, by_force: bool) -> Result<bool, Problem> {
        let (member, report) = (self.keys.member(ring, node), self.keys.node(ring, node));
        let mut compare = vec![Compare::create_revision(&member, CompareResult::Greater, 0)];
        if !by_force {
            compare.push(Compare::create_revision(&report, CompareResult::Equal, 0));
        }
        let txn = TxnRequest {
            compare,
            success: vec![DeleteRangeRequest::key(&member).into(), DeleteRangeRequest::key(&report).into()],
            failure: vec![RangeRequest::key(&member).into()],
        };
        let answer = self.transact(&format!("forget the node {node}"), &txn).await?;
        let forgotten = answer.succeeded;
        let [found] = if forgotten { [Vec::new()] } else { parts(answer) };
        if !found.is_empty() {
            return Err(Problem::new(ProblemKind::Conflict, format!("the node {node} of the ring {ring} reports")).hint(
                "stop it or give it another ring first; it would be back at its next report. Where somebody else has written that \
                 report, --force removes it",
            ));
        }
        Ok(forgotten)
    }
}

/// Tries until there is an answer or patience is over.
async fn retry<T, F: Future<Output = Result<T, Error>>>(
    urls: &str,
    patience: Duration,
    what: &str,
    request: impl Fn() -> F,
) -> Result<T, Problem> {
    let end = Instant::now() + patience;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let last = match timeout(ATTEMPT.min(left), request()).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) if is_transient(&error) => causes(&error),
            Ok(Err(error)) => return Err(refusal(urls, what, &error)),
            Err(_) => "no answer in time".to_owned(),
        };
        if Instant::now() + PAUSE >= end {
            return Err(Problem::new(ProblemKind::NoDaemon, format!("etcd at {urls} does not answer: {what}: {last}"))
                .hint("nodes go on with what they have; see whether etcd runs and has a leader, or name its members with --etcd"));
        }
        sleep(PAUSE).await;
    }
}

/// Whether the same request may well succeed later, or at another member.
pub(super) fn is_transient(error: &Error) -> bool {
    match error {
        Error::Transport(_) => true,
        // A connection that breaks during a request is reported with the code Unknown, which etcd never gives.
        Error::Status(status) => {
            matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Aborted)
                || status.source().is_some()
        }
        Error::Ended(_) => false,
    }
}

/// Whether the status was made here and not by etcd, which gives this code for revisions.
fn is_of_client(status: &tonic::Status) -> bool {
    status.message().contains("message length too large")
}

fn refusal(urls: &str, what: &str, error: &Error) -> Problem {
    let text = format!("etcd at {urls}: {what}: {}", causes(error));
    let Error::Status(status) = error else { return Problem::new(ProblemKind::Failed, text) };
    match status.code() {
        Code::PermissionDenied | Code::Unauthenticated => Problem::new(ProblemKind::NotPermitted, text)
            .hint("see the roles of the user that --user and --password-file name"),
        Code::InvalidArgument if status.message().contains("auth") => {
            Problem::new(ProblemKind::NotPermitted, text).hint("see --user and --password-file")
        }
        Code::ResourceExhausted if status.message().contains("space exceeded") => {
            Problem::new(ProblemKind::Failed, text).hint(FULL)
        }
        _ => Problem::new(ProblemKind::Failed, text),
    }
}

/// An error with all that led to it.
pub(super) fn causes(error: &Error) -> String {
    let (mut text, mut source) = (error.to_string(), error.source());
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    remark(&text)
}

/// What the gets of a transaction have found, in order.
pub(super) fn parts<const N: usize>(answer: TxnResponse) -> [Vec<KeyValue>; N] {
    let mut found = answer.responses.into_iter().map(|it| match it.response {
        Some(OperationResponse::Range(range)) => range.kvs,
        _ => Vec::new(),
    });
    std::array::from_fn(|_| found.next().unwrap_or_default())
}

pub(super) fn revision(header: Option<&ResponseHeader>) -> i64 {
    header.map_or(0, |it| it.revision)
}

pub(super) fn to_json(record: &impl Serialize) -> Result<String, Problem> {
    serde_json::to_string(record).map_err(|error| Problem::new(ProblemKind::Failed, format!("write a record: {error}")))
}
