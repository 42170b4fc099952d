//! What a node has of etcd: its ring's pointer as it changes, sets, and a place for its report.

use std::{sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use tokio::time::{sleep, timeout};
use tonic::{Status, Streaming};
use tracing::debug;

use super::{
    FleetBoard,
    delta::Delta,
    etcd::{
        Etcd, causes,
        client::Error,
        is_transient,
        messages::{Event, EventType, WatchRequest, WatchResponse},
        read_pointer,
    },
    layout::{Hash, Name, Pointer, Seen},
    report::Report,
    reporter::Reporter,
    signing::NodeKey,
};
use crate::api::{Problem, ProblemKind};

/// After a watch has ended. What ends every watch at once would otherwise be asked for without end.
const RESYNC_PAUSE: Duration = Duration::from_millis(200);
/// How long one member may take with a report or to begin a watch, and how long all of them may.
const ATTEMPT: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(5);

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
    /// Of a ring, for one of its nodes, which signs its reports with the key. How reporting goes is told to the board. To be called
    /// within a runtime.
    pub fn new(etcd: Etcd, ring: Name, key: Arc<NodeKey>, board: Arc<FleetBoard>) -> Self {
        let reporter = Reporter::start(etcd.clone(), key, board);
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
            let (news, end) = news(stream, self.known).await;
            if let Some(why) = end {
                debug!("the watch of the ring {} has ended: {why}", self.ring);
                self.watch = None;
                sleep(RESYNC_PAUSE).await;
            }
            let pointer = match news.as_slice() {
                [] => continue,
                [event] if self.watch.is_some() => {
                    let Some(entry) = &event.kv else { continue };
                    self.known = entry.mod_revision;
                    if event.r#type() == EventType::Put { Some(read_pointer(entry)?) } else { None }
                }
                // There may be more to come, of which only the last is of use.
                _ => {
                    // Should the caller lose patience here, the next call starts over and misses nothing.
                    let watch = self.watch.take();
                    let (pointer, revision) = self.etcd.pointer(&self.ring).await?;
                    (self.known, self.watch) = (revision, watch);
                    pointer
                }
            };
            if self.told != pointer {
                self.tell(pointer.as_ref());
                return Ok(pointer);
            }
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

    /// Has this report stand in etcd, for as long as the source lives, as soon as etcd answers.
    pub fn report(&mut self, report: Report) {
        self.reporter.report(report);
    }
}

/// Waits for changes behind a revision, and returns all that have come by then; and why there will be no more, if so.
async fn news(stream: &mut Streaming<WatchResponse>, known: i64) -> (Vec<Event>, Option<String>) {
    let mut news = Vec::new();
    let mut answer = stream.message().await;
    loop {
        match answer {
            Ok(Some(answer)) if !answer.canceled => news.extend(answer.events),
            ended => return (news, Some(why_ended(ended))),
        }
        news.retain(|it: &Event| it.kv.as_ref().is_some_and(|entry| entry.mod_revision > known));
        match stream.message().now_or_never() {
            Some(more) => answer = more,
            None => return (news, None),
        }
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

/// Asks again, since another member may know what the one that was asked does not: one that has no leader says so at once
/// and is asked most often for that. Fails soon, so that the caller starts over.
pub(super) async fn soon<T, F: Future<Output = Result<T, Error>>>(request: impl Fn() -> F) -> Result<T, Error> {
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

pub(super) async fn within<T>(request: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
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
