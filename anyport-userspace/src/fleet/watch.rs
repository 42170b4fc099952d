//! What a node has of etcd: its ring's pointer as it changes, sets, and a place for its report.

use std::time::{Duration, Instant};

use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant as TokioInstant, interval_at, sleep, timeout},
};
use tonic::{Status, Streaming};
use tracing::debug;

use super::{
    delta::Delta,
    etcd::{
        Etcd, causes,
        client::Error,
        is_transient,
        messages::{
            Compare, CompareResult, EventType, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseKeepAliveResponse,
            PutRequest, RequestOp, TxnRequest, WatchRequest, WatchResponse,
        },
        read_pointer, to_json,
    },
    layout::{Hash, Member, Name, Pointer, Report, Seen, Time},
};
use crate::api::{Problem, ProblemKind};

/// Seconds after which a node that says nothing is missing.
pub const LEASE: i64 = 30;
/// How often a node says that it is there. Ten nodes make one such message a second.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// After a watch has ended. What ends every watch at once would otherwise be asked for without end.
const RESYNC_PAUSE: Duration = Duration::from_millis(200);
/// How long one member may take with a report or to begin a watch, and how long all of them may.
const ATTEMPT: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(5);
/// How long after a failure reporting is tried again.
const PAUSE: Duration = Duration::from_secs(2);

/// A ring's pointer in etcd, and the sets that it points to.
#[derive(Debug)]
pub struct EtcdSource {
    etcd: Etcd,
    ring: Name,
    watch: Option<Streaming<WatchResponse>>,
    /// etcd's revision up to which the pointer is known.
    known: i64,
    /// What was returned last. Revisions alone do not distinguish pointers: etcd that was restored from a backup gives the
    /// same ones again.
    told: Option<Seen<Pointer>>,
    has_told: bool,
    reporter: Reporter,
}

impl EtcdSource {
    /// Of a ring, for one of its nodes. To be called within a runtime.
    pub fn new(etcd: Etcd, ring: Name) -> Self {
        let reporter = Reporter::start(etcd.clone());
        Self { etcd, ring, watch: None, known: 0, told: None, has_told: false, reporter }
    }

    /// The pointer as it is now.
    ///
    /// # Errors
    /// etcd does not answer, or what is there is no pointer.
    pub async fn pointer(&mut self) -> Result<Option<Seen<Pointer>>, Problem> {
        self.watch = None;
        let (pointer, revision) = self.etcd.pointer(&self.ring).await?;
        self.known = revision;
        self.tell(pointer.as_ref());
        Ok(pointer)
    }

    /// Waits until the pointer differs from what was returned last. Where the watch was lost, or what it would begin with has been
    /// compacted, the pointer is read again: so nothing is missed, also if etcd was restored from a backup and counts from less.
    ///
    /// # Errors
    /// etcd does not answer, or what is there is no pointer. The next call starts over.
    pub async fn changed(&mut self) -> Result<Option<Seen<Pointer>>, Problem> {
        loop {
            let Some(stream) = &mut self.watch else {
                let (told, has_told) = (self.told.clone(), self.has_told);
                let pointer = self.pointer().await?;
                if !has_told || pointer != told {
                    return Ok(pointer);
                }
                self.watch = Some(self.begin().await?);
                continue;
            };
            let answer = match stream.message().await {
                Ok(Some(answer)) if !answer.canceled => answer,
                ended => {
                    debug!("the watch of the ring {} has ended: {}", self.ring, why_ended(ended));
                    self.watch = None;
                    sleep(RESYNC_PAUSE).await;
                    continue;
                }
            };
            let Some(event) = answer.events.last() else { continue };
            let Some(entry) = &event.kv else { continue };
            let pointer = if event.r#type() == EventType::Put { Some(read_pointer(entry)?) } else { None };
            self.tell(pointer.as_ref());
            return Ok(pointer);
        }
    }

    fn tell(&mut self, pointer: Option<&Seen<Pointer>>) {
        self.told = pointer.cloned();
        self.has_told = true;
    }

    /// Watches from behind what is known.
    async fn begin(&self) -> Result<Streaming<WatchResponse>, Problem> {
        let request = WatchRequest::new(&self.etcd.keys.ring(&self.ring), self.known + 1);
        soon(|| self.etcd.client.watch(request.clone())).await.map_err(|error| {
            let what = format!("watch the pointer of the ring {} in etcd: {}", self.ring, causes(&error));
            Problem::new(ProblemKind::NoDaemon, what)
        })
    }

    /// The text of a set, which has that hash.
    ///
    /// # Errors
    /// etcd does not answer, or the set is not there or spoilt.
    pub async fn set(&mut self, hash: &Hash) -> Result<String, Problem> {
        self.etcd.set(hash).await
    }

    /// What makes one set out of another; nothing if that is not there.
    ///
    /// # Errors
    /// etcd does not answer, or what is there makes no sense.
    pub async fn delta(&mut self, from: &Hash, to: &Hash) -> Result<Option<Delta>, Problem> {
        self.etcd.delta(from, to).await
    }

    /// When etcd has answered a report or a sign of life last.
    pub fn answered(&self) -> Option<Instant> {
        *self.reporter.answered.borrow()
    }

    /// Has this report stand in etcd, for as long as the source lives, as soon as etcd answers.
    pub fn report(&mut self, report: Report) {
        self.reporter.latest.send_replace(Some(report));
    }
}

fn why_ended(answer: Result<Option<WatchResponse>, Status>) -> String {
    match answer {
        Ok(Some(answer)) if answer.compact_revision > 0 => format!("compacted up to {}", answer.compact_revision),
        Ok(Some(answer)) => answer.cancel_reason,
        Ok(None) => "the stream has ended".to_owned(),
        Err(status) => causes(&status.into()),
    }
}

/// Keeps the last report in etcd, under a lease.
#[derive(Debug)]
struct Reporter {
    latest: watch::Sender<Option<Report>>,
    /// When etcd has answered last.
    answered: watch::Receiver<Option<Instant>>,
    task: JoinHandle<()>,
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Reporter {
    fn start(etcd: Etcd) -> Self {
        let (latest, mut reports) = watch::channel(None);
        let (heard, answered) = watch::channel(None);
        let task = tokio::spawn(async move {
            // Nothing is granted before there is something to report.
            while reports.wait_for(Option::is_some).await.is_ok() {
                if let Err(error) = keep(&etcd, &mut reports, &heard).await {
                    debug!("report to etcd: {}", causes(&error));
                }
                sleep(PAUSE).await;
            }
        });
        Self { latest, answered, task }
    }
}

/// Writes each report under one lease, for as long as that can be kept alive.
async fn keep(
    etcd: &Etcd,
    reports: &mut watch::Receiver<Option<Report>>,
    heard: &watch::Sender<Option<Instant>>,
) -> Result<(), Error> {
    let lease = soon(|| etcd.client.grant_lease(LeaseGrantRequest { ttl: LEASE })).await?.id;
    let extend = LeaseKeepAliveRequest { id: lease };
    let (keeper, mut kept) = soon(|| etcd.client.keep_lease(extend)).await?;
    extended(&mut kept).await?;
    let mut ticks = interval_at(TokioInstant::now() + KEEP_ALIVE, KEEP_ALIVE);
    reports.mark_changed();
    loop {
        tokio::select! {
            changed = reports.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                let report = reports.borrow_and_update().clone();
                if let Some(report) = report {
                    soon(|| write(etcd, &report, lease)).await?;
                }
            }
            _ = ticks.tick() => {
                keeper.send(extend).await.map_err(|_| lease_ended())?;
                extended(&mut kept).await?;
            }
        }
        heard.send_replace(Some(Instant::now()));
    }
}

/// Waits until etcd has extended the lease.
async fn extended(kept: &mut Streaming<LeaseKeepAliveResponse>) -> Result<(), Error> {
    match within(async { Ok(kept.message().await?) }).await? {
        Some(answer) if answer.ttl > 0 => Ok(()),
        _ => Err(lease_ended()),
    }
}

fn lease_ended() -> Error {
    Error::Ended("the lease has ended".into())
}

async fn write(etcd: &Etcd, report: &Report, lease: i64) -> Result<(), Error> {
    let Report { ring, node, .. } = report;
    let json = |written: Result<String, Problem>| written.map_err(|error| Error::Ended(error.to_string()));
    let member = Member { node: node.clone(), ring: ring.clone(), since: Time::now() };
    let (key, member) = (etcd.keys.member(ring, node), json(to_json(&member))?);
    let put: RequestOp =
        PutRequest { lease, ..PutRequest::new(&etcd.keys.node(ring, node), json(to_json(report))?) }.into();
    let txn = TxnRequest {
        compare: vec![Compare::create_revision(&key, CompareResult::Greater, 0)],
        success: vec![put.clone()],
        failure: vec![put, PutRequest::new(&key, member).into()],
    };
    etcd.client.txn(txn).await.map(drop)
}

/// Asks again, since another member may know what the one that was asked does not: one that has no leader says so at once
/// and is asked most often for that. Fails soon, so that the caller starts over.
async fn soon<T, F: Future<Output = Result<T, Error>>>(request: impl Fn() -> F) -> Result<T, Error> {
    const AGAIN: Duration = Duration::from_millis(100);
    within(async {
        loop {
            match timeout(ATTEMPT, request()).await {
                Ok(Err(error)) if is_transient(&error) => sleep(AGAIN).await,
                Ok(answer) => return answer,
                Err(_) => {}
            }
        }
    })
    .await
}

async fn within<T>(request: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    timeout(PATIENCE, request).await.unwrap_or_else(|_| Err(Error::Ended("no answer in time".into())))
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, future::pending};

    use super::{Error, soon};

    #[tokio::test(start_paused = true)]
    async fn another_member_is_asked_where_one_can_not_answer() {
        let asked = Cell::new(0);
        let answer = soon(|| async {
            asked.set(asked.get() + 1);
            match asked.get() {
                1 => Err(tonic::Status::unavailable("no leader").into()),
                2 => pending().await,
                _ => Ok("here"),
            }
        });
        assert_eq!((answer.await.unwrap(), asked.get()), ("here", 3));
    }

    #[tokio::test(start_paused = true)]
    async fn what_no_member_would_do_is_not_asked_again() {
        let asked = Cell::new(0);
        let answer = soon(|| async {
            asked.set(asked.get() + 1);
            Err::<(), _>(Error::Ended("the lease has ended".into()))
        });
        answer.await.unwrap_err();
        assert_eq!(asked.get(), 1);
        soon(pending::<Result<(), _>>).await.unwrap_err();
    }
}
