//! What a node does: it follows the pointer of its ring, and keeps the set that it has whenever the next one can't be
//! fetched or must not be followed.

use std::{
    convert::Infallible,
    fmt,
    future::Future,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant as SystemInstant},
};

use anyhow::{Context as _, anyhow, bail};
use rustix::rand::{GetRandomFlags, getrandom};
use tokio::time::{Instant, sleep, timeout};
use tracing::{error, info, warn};

use super::{
    layout::{Hash, Name, Pointer, STEP, Seen, Time},
    report::{Health, Refused, Report},
    signing::{NodeKey, PublicKeys},
    source::{Error, Source},
};
use crate::{
    api::{Problem, ProblemKind, RefusedView},
    fleet::{Condition, FleetBoard, LineEdits},
    store::FleetState,
};

/// How long an answer may take before the request is repeated: a few bytes, or a set of up to 256 MiB.
const ANSWER: Duration = Duration::from_secs(10);
const WHOLE_SET: Duration = Duration::from_mins(5);
/// Bytes of the largest set that is kept in memory, for the next one to be made out of it.
const KEPT: usize = 32 << 20;
/// How often the agent checks whether this node has changed.
const LOOK: Duration = Duration::from_secs(2);
/// How often the pointer is read though nothing was said to have changed: in case that a watch was lost without a word, and while
/// it makes no sense.
const RESYNC: Duration = Duration::from_mins(5);
const UNREADABLE: Duration = Duration::from_secs(10);
/// How often the active rules are compared with the active set.
const COMPARE: Duration = Duration::from_mins(30);
/// Pauses between attempts to reach the source, and between those with what may work later; both grow.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));
const LATER: (Duration, Duration) = (Duration::from_secs(5), Duration::from_mins(5));

/// What an agent applies sets to: a daemon.
#[expect(async_fn_in_trait, reason = "an agent stays on its thread, so nothing has to be Send")]
pub trait Target {
    /// Activates a set and keeps it, with where the node stands then. `edits` are from the set that was taken last.
    ///
    /// # Errors
    /// It is not taken, and nothing has changed.
    async fn take(&mut self, text: Arc<str>, edits: Option<LineEdits>, state: &FleetState) -> Result<(), Problem>;

    /// Keeps where the node stands; the active set stays.
    ///
    /// # Errors
    /// It could not be written.
    async fn note(&mut self, state: &FleetState) -> anyhow::Result<()>;

    /// Compares the active rules with the set that is kept, whose hash has to be this one.
    ///
    /// # Errors
    /// The two differ, or the set can't be read: how.
    async fn compare(&mut self, set: &Hash) -> Result<(), String>;

    /// How the daemon is.
    async fn condition(&mut self) -> Condition;
}

/// Who a node is, and which keys it trusts.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The ring whose pointer it follows.
    pub ring: Name,
    /// Its name.
    pub node: Name,
    /// Keys of which one has to have signed a pointer, if any has to.
    pub keys: Option<PublicKeys>,
    /// By which its reports are known.
    pub key: Arc<NodeKey>,
}

/// Follows a source, and has a target do what that says.
#[derive(Debug)]
pub struct Agent<S, T> {
    identity: Identity,
    source: S,
    target: T,
    board: Arc<FleetBoard>,
    state: FleetState,
    /// The active set, once it was fetched and if it is not too large to be kept for the next one.
    text: Option<Arc<str>>,
    /// What was seen last, to be tried again.
    latest: Option<Seen<Pointer>>,
    refusal: Option<Refusal>,
    since: Time,
    /// What was reported last.
    reported: Option<Report>,
    /// How the target was then, and whether another process writes this node's report.
    condition: Option<(Condition, Option<String>)>,
    /// When the active rules are compared next.
    next_comparison: Instant,
    /// The next pause while the source is away.
    pause: Duration,
}

/// What is not followed.
#[derive(Debug)]
struct Refusal {
    /// Nothing if it could not be read.
    pointer: Option<Pointer>,
    error: String,
    at: Time,
    /// What the daemon was like then.
    basis: u64,
    /// When it is tried again though nothing has changed, and the pause before that; for what may pass by itself.
    again: Option<(Instant, Duration)>,
    /// The set, if it has come.
    text: Option<Arc<str>>,
}

/// Why a pointer was not followed.
enum Failure {
    /// The source has gone meanwhile.
    Lost(anyhow::Error),
    /// It must not be followed, or could not be.
    Refused { error: String, may_pass: bool, text: Option<Arc<str>> },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost(error) => write!(f, "{error:#}"),
            Self::Refused { error, .. } => f.write_str(error),
        }
    }
}

impl Failure {
    fn refused(error: String) -> Self {
        Self::Refused { error, may_pass: false, text: None }
    }
}

/// The pointer, as far as it can be read.
type Sighting = Result<Option<Seen<Pointer>>, String>;

impl<S: Source, T: Target> Agent<S, T> {
    /// One that stands where its daemon does, by what that has kept.
    pub fn new(identity: Identity, source: S, target: T, board: Arc<FleetBoard>, state: FleetState) -> Self {
        let state = FleetState { ring: identity.ring.to_string(), ..state };
        let since = state.since.as_ref().and_then(|it| it.parse().ok()).unwrap_or_else(Time::now);
        let (text, latest, refusal, reported, condition) = (None, None, None, None, None);
        let (pause, next_comparison) = (PAUSES.0, Instant::now() + some_of(COMPARE));
        Self {
            identity,
            source,
            target,
            board,
            state,
            text,
            latest,
            refusal,
            since,
            reported,
            condition,
            next_comparison,
            pause,
        }
    }

    /// Runs until it is dropped. Whatever the source does, the target keeps what it has.
    pub async fn run(mut self) -> Infallible {
        self.keep_key().await;
        loop {
            let Err(error) = self.follow().await;
            if self.board.view().error.is_none() {
                warn!("etcd is not there, and the active set stays: {error:#}");
            }
            self.board.lost(format!("{error:#}"));
            sleep(some_of(self.pause)).await;
            self.pause = (self.pause * 2).min(PAUSES.1);
        }
    }

    /// The next process is to be known by the same key.
    async fn keep_key(&mut self) {
        let seed = Some(self.identity.key.seed());
        if self.state.key != seed {
            self.state.key = seed;
            if let Err(error) = self.target.note(&self.state).await {
                warn!("keep the key of this node: {error:#}");
            }
        }
    }

    /// From reading the pointer afresh until the source is lost.
    async fn follow(&mut self) -> anyhow::Result<Infallible> {
        // Whatever had been reported there may be gone.
        self.reported = None;
        self.look().await?;
        self.pause = PAUSES.0;
        info!("following the ring {} as {}", self.identity.ring, self.identity.node);
        let mut next_look = self.next_look();
        loop {
            self.report().await;
            match self.wait(next_look).await {
                Some(seen) => {
                    let sighting = sighting(seen)?;
                    self.board.heard(SystemInstant::now());
                    self.heed(sighting).await?;
                    next_look = self.next_look();
                }
                None if next_look <= Instant::now() => {
                    self.look().await?;
                    next_look = self.next_look();
                }
                None => self.try_again().await?,
            }
            if self.next_comparison <= Instant::now() {
                self.compare().await;
            }
        }
    }

    /// Waits for a change of the pointer, for as long as nothing else is to be done.
    async fn wait(&mut self, next_look: Instant) -> Option<Result<Option<Seen<Pointer>>, Error>> {
        let is_readable = self.is_readable();
        let again = self.refusal.as_ref().and_then(|it| Some(it.again?.0));
        let end = [Some(next_look), Some(self.next_comparison), again].into_iter().flatten().min()?;
        let Self { source, target, condition, board, .. } = self;
        // A call that was dropped starts over, so it must not be dropped at every check.
        let mut changed = pin!(source.changed());
        loop {
            tokio::select! {
                seen = &mut changed, if is_readable => return Some(seen),
                () = sleep(LOOK.min(end.saturating_duration_since(Instant::now()))) => {}
            }
            let now = (target.condition().await, board.twin());
            if end <= Instant::now() || *condition != Some(now) {
                return None;
            }
        }
    }

    fn next_look(&self) -> Instant {
        Instant::now() + some_of(if self.is_readable() { RESYNC } else { UNREADABLE })
    }

    fn is_readable(&self) -> bool {
        self.refusal.as_ref().is_none_or(|it| it.pointer.is_some())
    }

    /// Reads the pointer, and follows it.
    async fn look(&mut self) -> anyhow::Result<()> {
        let seen = limited(ANSWER, self.source.pointer(), "read the pointer").await;
        let sighting = sighting(seen)?;
        self.board.heard(SystemInstant::now());
        self.heed(sighting).await
    }

    async fn heed(&mut self, sighting: Sighting) -> anyhow::Result<()> {
        self.board.missing(sighting == Ok(None));
        self.latest = None;
        match sighting {
            Ok(None) => {
                if self.state.seen > 0 {
                    warn!("etcd has no pointer of the ring {}, and the active set stays", self.identity.ring);
                }
                self.forgive();
            }
            Ok(Some(seen)) => {
                self.latest = Some(seen.clone());
                self.follow_pointer(seen.value).await?;
            }
            Err(error) if self.refusal.as_ref().is_some_and(|it| it.pointer.is_none() && it.error == error) => {}
            Err(error) => self.refuse(None, error, None, None).await,
        }
        Ok(())
    }

    /// Whatever may have gone wrong in this process: the active rules are those of the set, or are made so.
    async fn compare(&mut self) {
        self.next_comparison = Instant::now() + some_of(COMPARE);
        let Some(set) = self.state.set.as_ref().and_then(|it| it.parse().ok()) else { return };
        let Err(difference) = self.target.compare(&set).await else { return };
        error!("the active rules are not those of the set {}, which is taken again: {difference}", set.short());
        let taken = async {
            let text = self.fetch(&set).await.map_err(|failure| failure.to_string())?;
            self.target.take(text, None, &self.state).await.map_err(|problem| problem.error)
        };
        if let Err(error) = taken.await {
            error!("the set {} can't be taken again: {error}", set.short());
            // The connection may have gone with that, and what was reported there.
            self.reported = None;
        }
    }

    /// What was refused is tried again when the node has changed, or after a while where it may have passed.
    async fn try_again(&mut self) -> anyhow::Result<()> {
        let Some(Refusal { pointer: Some(pointer), .. }) = &self.refusal else { return Ok(()) };
        let pointer = pointer.clone();
        self.follow_pointer(pointer).await
    }

    async fn follow_pointer(&mut self, pointer: Pointer) -> anyhow::Result<()> {
        if self.has_in_force(&pointer) {
            self.forgive();
            return Ok(());
        }
        let mut previous = None;
        if self.refusal.as_ref().is_some_and(|it| it.pointer.as_ref() == Some(&pointer)) {
            let basis = self.target.condition().await.basis;
            let is_due = |it: &Refusal| it.basis != basis || it.again.is_some_and(|(at, _)| at <= Instant::now());
            previous = self.refusal.take_if(|it| is_due(it));
            if previous.is_none() {
                return Ok(());
            }
        }
        let text = previous.as_mut().and_then(|it| it.text.take());
        match self.attempt(&pointer, text).await {
            Ok(()) => {
                info!(
                    "the set {} is active: ring {}, sequence {}",
                    pointer.set.short(),
                    pointer.ring,
                    pointer.sequence
                );
                self.forgive();
            }
            Err(Failure::Lost(error)) => return Err(error),
            Err(Failure::Refused { error, may_pass, text }) => {
                let pause = match previous.and_then(|it| it.again) {
                    Some((_, pause)) => (pause * 2).min(LATER.1),
                    None => LATER.0,
                };
                self.refuse(Some(pointer), error, may_pass.then_some(pause), text).await;
            }
        }
        Ok(())
    }

    fn has_in_force(&self, pointer: &Pointer) -> bool {
        let FleetState { sequence, set, .. } = &self.state;
        pointer.ring == self.identity.ring && *sequence == pointer.sequence && *set == Some(pointer.set.to_string())
    }

    /// Activates what a pointer leads to.
    async fn attempt(&mut self, pointer: &Pointer, text: Option<Arc<str>>) -> Result<(), Failure> {
        self.expect_trusted(pointer).map_err(|error| Failure::refused(format!("{error:#}")))?;
        self.expect_next(pointer).map_err(|error| Failure::refused(format!("{error:#}")))?;
        let (text, edits) = match text {
            Some(text) => (text, None),
            None => match self.derive(pointer).await? {
                Some((text, edits)) => (text, Some(edits)),
                None => (self.fetch(&pointer.set).await?, None),
            },
        };
        // Not before its set is there: a pointer to nothing must not keep a later one of the same sequence out.
        (self.state.seen, self.state.seen_set) = (pointer.sequence, Some(pointer.set.to_string()));
        let now = Time::now();
        let state = FleetState {
            sequence: pointer.sequence,
            set: Some(pointer.set.to_string()),
            since: Some(now.to_string()),
            ..self.state.clone()
        };
        match self.target.take(Arc::clone(&text), edits, &state).await {
            Ok(()) => {
                self.text = (text.len() <= KEPT).then_some(text);
                (self.state, self.since) = (state, now);
                self.board.stands(&self.state);
                Ok(())
            }
            // Hints are for those who type commands.
            Err(Problem { kind, error, .. }) => {
                Err(Failure::Refused { error, may_pass: kind == ProblemKind::Failed, text: Some(text) })
            }
        }
    }

    /// Derives a set from the active one, if the delta is known. That is no reason for anything to fail: there is the whole set.
    async fn derive(&mut self, pointer: &Pointer) -> Result<Option<(Arc<str>, LineEdits)>, Failure> {
        let Pointer { set, from, .. } = pointer;
        let Some((before, from)) = self.text.as_ref().zip(from.as_ref()) else { return Ok(None) };
        if self.state.set != Some(from.to_string()) {
            return Ok(None);
        }
        let delta = match limited(ANSWER, self.source.delta(from, set), "fetch a delta").await {
            Ok(delta) => delta,
            Err(Error::Away(error)) => return Err(Failure::Lost(error)),
            Err(Error::Nonsense(error)) => {
                warn!("{error:#}: the whole set is fetched");
                None
            }
        };
        let made = delta.and_then(|it| it.apply(before).ok());
        Ok(made.filter(|(text, _)| set.expect(text).is_ok()).map(|(text, edits)| (text.into(), edits)))
    }

    async fn fetch(&mut self, hash: &Hash) -> Result<Arc<str>, Failure> {
        let text = match limited(WHOLE_SET, self.source.set(hash), "fetch a set").await {
            Ok(text) => text,
            Err(Error::Away(error)) => return Err(Failure::Lost(error)),
            Err(Error::Nonsense(error)) => {
                return Err(Failure::Refused { error: format!("{error:#}"), may_pass: true, text: None });
            }
        };
        // Whatever the source has checked: this is what nodes rely on.
        if let Err(found) = hash.expect(&text) {
            let error = format!("what etcd has as the set {hash} is another one, {found}");
            return Err(Failure::Refused { error, may_pass: true, text: None });
        }
        Ok(text.into())
    }

    fn expect_trusted(&self, pointer: &Pointer) -> anyhow::Result<()> {
        if pointer.ring != self.identity.ring {
            bail!("it is the pointer of the ring {}, which was copied there", pointer.ring);
        }
        self.identity.keys.as_ref().map_or(Ok(()), |keys| keys.verify(pointer)).context("it is not trusted")
    }

    /// A sequence is used once, and rises.
    fn expect_next(&self, pointer: &Pointer) -> anyhow::Result<()> {
        let FleetState { seen, seen_set, .. } = &self.state;
        if pointer.sequence < *seen {
            bail!(
                "its sequence {} is behind {seen}, which was seen already: etcd was restored from an older backup; publish again",
                pointer.sequence
            );
        }
        if *seen > 0 && pointer.sequence > seen.saturating_add(STEP) {
            bail!(
                "its sequence {} is more than {STEP} beyond {seen}, the last one: no command makes such steps; publish again",
                pointer.sequence
            );
        }
        if pointer.sequence == *seen && *seen_set != Some(pointer.set.to_string()) {
            bail!("the sequence {seen} led to another set before, and none is used twice: publish again");
        }
        Ok(())
    }

    /// Nothing is refused any more.
    fn forgive(&mut self) {
        self.refusal = None;
        self.board.refuse(None);
    }

    async fn refuse(
        &mut self,
        pointer: Option<Pointer>,
        error: String,
        pause: Option<Duration>,
        text: Option<Arc<str>>,
    ) {
        let sequence = pointer.as_ref().map(|it| it.sequence);
        let number = sequence.map_or_else(|| "unknown".to_owned(), |it| it.to_string());
        error!("the pointer of the ring {}, sequence {number}, is not followed: {error}", self.identity.ring);
        // After a restart it must still be known that this was seen.
        if pointer.as_ref().is_some_and(|it| it.sequence == self.state.seen)
            && let Err(error) = self.target.note(&self.state).await
        {
            warn!("keep which pointers were seen: {error:#}");
        }
        let at = Time::now();
        self.board.stands(&self.state);
        self.board.refuse(Some(RefusedView {
            sequence,
            set: pointer.as_ref().map(|it| it.set.to_string()),
            error: error.clone(),
            at: at.to_string(),
        }));
        let again = pause.map(|pause| (Instant::now() + some_of(pause), pause));
        let basis = self.target.condition().await.basis;
        self.refusal = Some(Refusal { pointer, error, at, basis, again, text });
    }

    /// Says how this node is, where that has changed.
    async fn report(&mut self) {
        let report = self.make_report().await;
        let is_same = |last: &Report| Report { reported: last.reported, ..report.clone() } == *last;
        if !self.reported.as_ref().is_some_and(is_same) {
            self.source.report(&report);
            self.reported = Some(report);
        }
    }

    async fn make_report(&mut self) -> Report {
        let (condition, twin) = (self.target.condition().await, self.board.twin());
        self.condition = Some((condition.clone(), twin.clone()));
        let Condition { back_end, generation, mut degraded, .. } = condition;
        degraded.extend(twin);
        let refused = self.refusal.as_ref().and_then(|it| {
            let Pointer { sequence, set, .. } = *it.pointer.as_ref()?;
            Some(Refused { sequence, set, error: it.error.clone() })
        });
        if let Some(Refusal { pointer: None, error, at, .. }) = &self.refusal {
            degraded.push(format!("since {at} the ring's pointer can't be read: {error}"));
        }
        let is_well = degraded.is_empty() && refused.is_none();
        Report {
            node: self.identity.node.clone(),
            ring: self.identity.ring.clone(),
            sequence: self.state.sequence,
            seen: self.state.seen,
            set: self.state.set.as_ref().and_then(|it| it.parse().ok()),
            revision: self.latest.as_ref().map_or(0, |it| it.revision),
            generation,
            backend: back_end.to_string(),
            health: if is_well { Health::Good } else { Health::Degraded },
            degraded,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            refused,
            since: self.since,
            reported: Time::now(),
        }
    }
}

/// What can't be read is no reason to ask again before it has changed.
fn sighting(seen: Result<Option<Seen<Pointer>>, Error>) -> anyhow::Result<Sighting> {
    match seen {
        Ok(seen) => Ok(Ok(seen)),
        Err(Error::Nonsense(error)) => Ok(Err(format!("{error:#}"))),
        Err(Error::Away(error)) => Err(error),
    }
}

async fn limited<T>(limit: Duration, answer: impl Future<Output = Result<T, Error>>, what: &str) -> Result<T, Error> {
    let late = |_| Error::Away(anyhow!("{what}: no answer from etcd within {} s", limit.as_secs()));
    timeout(limit, answer).await.map_err(late)?
}

/// At least half of a time, so that many nodes do not come at once.
fn some_of(time: Duration) -> Duration {
    let mut byte = [0; 1];
    // Without randomness all come at once, which is a burden and no more.
    getrandom(&mut byte, GetRandomFlags::empty()).ok();
    time.mul_f64(0.5 + f64::from(byte[0]) / 512.0)
}

#[cfg(test)]
mod tests;
