//! Keeps a node's report in etcd, under a lease that ends with the node, and tells where that does not work.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, interval_at, sleep},
};
use tonic::Streaming;
use tracing::warn;

use super::{
    FleetBoard,
    etcd::{
        Etcd, causes,
        client::Error,
        is_transient,
        messages::{
            Compare, CompareResult, EventType, KeyValue, LeaseGrantRequest, LeaseKeepAliveRequest,
            LeaseKeepAliveResponse, PutRequest, RangeRequest, RequestOp, TxnRequest, WatchRequest, WatchResponse,
        },
        parts, revision, to_json,
    },
    layout::Time,
    report::{Member, Report, SignedReport},
    signing::NodeKey,
    watch::{soon, within},
};
use crate::api::Problem;

/// Seconds after which a node that says nothing is missing.
pub const LEASE: i64 = 30;
/// How often a node says that it is there. Ten nodes make one such message a second.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// How long after a failure reporting is tried again.
const PAUSE: Duration = Duration::from_secs(2);
/// How long reporting may fail for a reason that passes by itself: etcd elects a leader, or the report of this node's former process
/// is still there.
const PASSING: Duration = Duration::from_secs(LEASE as u64 + 5);
/// How often a report is written again though it is the same: whatever may have become of it in etcd.
const AGAIN: Duration = Duration::from_mins(5);
/// How long another process that reports as this node is complained about after it was seen. It writes only when something changes.
const TWIN: Duration = Duration::from_mins(10);
const TWIN_COMPLAINT: &str = "another process writes this node's report: a machine of the same name, perhaps a copy of this one with its \
                              state directory (give it another name and remove its fleet.json), or a client with this node's rights in \
                              etcd";

/// Keeps the last report in etcd, under a lease.
#[derive(Debug)]
pub(super) struct Reporter {
    latest: watch::Sender<Option<Report>>,
    task: JoinHandle<()>,
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Reporter {
    /// Begins with the first report. How it goes is told to the board.
    pub(super) fn start(etcd: Etcd, key: Arc<NodeKey>, board: Arc<FleetBoard>) -> Self {
        let (latest, mut reports) = watch::channel(None);
        let task = tokio::spawn(async move {
            let mut failing: Option<Instant> = None;
            // Nothing is granted before there is something to report.
            while let Some(first) = first_of(&mut reports).await {
                let place = Place { etcd: &etcd, key: &key, board: &board };
                let Err((failure, has_reported)) = place.keep(&first, &mut reports).await else { return };
                failing = failing.filter(|_| !has_reported).or(Some(Instant::now()));
                let passes = failing.is_some_and(|since| since.elapsed() < PASSING);
                match failure {
                    Failure::Passing(_) if passes => {}
                    Failure::Passing(why) | Failure::Lasting(why) => complain(&board, &why),
                }
                sleep(PAUSE).await;
            }
        });
        Self { latest, task }
    }

    /// Has this report stand in etcd as soon as etcd answers.
    pub(super) fn report(&self, report: Report) {
        self.latest.send_replace(Some(report));
    }
}

/// Waits for a report; nothing if there will be none.
async fn first_of(reports: &mut watch::Receiver<Option<Report>>) -> Option<Report> {
    reports.wait_for(Option::is_some).await.ok()?.clone()
}

/// Says it once.
fn complain(board: &FleetBoard, why: &str) {
    if board.reports(Err(why.to_owned())) {
        warn!("this node can't report to its fleet: {why}");
    }
}

/// Why there is no report.
enum Failure {
    /// It is tried again, and may well work.
    Passing(String),
    /// The operator has to do something.
    Lasting(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let why = causes(&error);
        // A lease can end before it is used: the process was frozen, or another client of etcd has revoked it.
        let is_of_lease = why.contains("lease not found");
        if matches!(error, Error::Ended(_)) || is_of_lease || is_transient(&error) {
            Self::Passing(why)
        } else {
            Self::Lasting(why)
        }
    }
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self::Lasting(problem.error)
    }
}

/// A node's place in etcd.
struct Place<'a> {
    etcd: &'a Etcd,
    key: &'a NodeKey,
    board: &'a FleetBoard,
}

impl Place<'_> {
    /// Writes each report under one lease, for as long as that can be kept alive. Ends well if there will be no more reports; else
    /// also says whether any was written.
    async fn keep(&self, first: &Report, reports: &mut watch::Receiver<Option<Report>>) -> Result<(), (Failure, bool)> {
        let held = async {
            let latest = reports.borrow_and_update().clone();
            let (lease, taken) = self.take(latest.as_ref().unwrap_or(first)).await?;
            let extend = LeaseKeepAliveRequest { id: lease };
            let (keeper, mut kept) = soon(|| self.etcd.client.keep_lease(extend)).await?;
            extended(&mut kept).await?;
            let request = WatchRequest::new(&self.etcd.keys.node(&first.ring, &first.node), taken + 1);
            let own = soon(|| self.etcd.client.watch(request.clone())).await?;
            Ok((Held { lease, member: taken, twin: None, again: Instant::now() + AGAIN }, keeper, kept, own))
        };
        let (mut held, keeper, mut kept, mut own) = held.await.map_err(|failure: Failure| (failure, false))?;
        self.well(&held);
        let extend = LeaseKeepAliveRequest { id: held.lease };
        let mut ticks = interval_at(Instant::now() + KEEP_ALIVE, KEEP_ALIVE);
        let ended = loop {
            let done = tokio::select! {
                changed = reports.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    let report = reports.borrow_and_update().clone();
                    match &report {
                        Some(report) => self.write(report, &held).await,
                        None => Ok(()),
                    }
                }
                _ = ticks.tick() => {
                    if held.again <= Instant::now() {
                        held.again = Instant::now() + AGAIN;
                        reports.mark_changed();
                    }
                    match keeper.send(extend).await {
                        Ok(()) => extended(&mut kept).await.map_err(Failure::from),
                        Err(_) => Err(lease_ended().into()),
                    }
                }
                answer = own.message() => match answer {
                    Ok(Some(answer)) if !answer.canceled => {
                        self.look_at(answer, &mut held, reports);
                        continue;
                    }
                    _ => Err(Failure::Passing("the watch of this node's report has ended".into())),
                },
            };
            if let Err(failure) = done {
                break failure;
            }
            held.twin = held.twin.filter(|seen| seen.elapsed() < TWIN);
            self.well(&held);
        };
        Err((ended, true))
    }

    /// etcd has taken what was to be written.
    fn well(&self, held: &Held) {
        self.board.heard(std::time::Instant::now());
        self.board.reports(Ok(()));
        if held.twin.is_none() {
            self.board.has_twin(None);
        }
    }

    /// Writes the first report and the member record, unless another node of this name is there. Returns the lease and the revision.
    async fn take(&self, report: &Report) -> Result<(i64, i64), Failure> {
        let Report { ring, node, .. } = report;
        let keys = [self.etcd.keys.member(ring, node), self.etcd.keys.node(ring, node)];
        let look = TxnRequest {
            success: keys.each_ref().map(|key| RequestOp::from(RangeRequest::key(key))).into(),
            ..TxnRequest::default()
        };
        let [members, nodes] = parts(soon(|| self.etcd.client.txn(look.clone())).await?);
        let (member, there) = (members.first(), nodes.first());
        let known = member.and_then(|it| serde_json::from_slice::<Member>(&it.value).ok());
        let ours = self.key.public();
        let other = known.as_ref().and_then(|it| it.key).filter(|key| *key != ours);
        if let Some(other) = other.filter(|_| there.is_some_and(|it| !self.is_own(it))) {
            return Err(Failure::Passing(format!(
                "another machine reports as the node {node} of the ring {ring}, with the key {}, and the one of this machine is {}: \
                 give one of them another name (node = \"NAME\" in [fleet])",
                other.short(),
                ours.short()
            )));
        }
        let since = known.filter(|it| it.key == Some(ours)).map_or_else(Time::now, |it| it.since);
        let record = Member { node: node.clone(), ring: ring.clone(), since, key: Some(ours) };
        let unchanged = |key: &str, entry: Option<&KeyValue>| {
            Compare::mod_revision(key, CompareResult::Equal, entry.map_or(0, |it| it.mod_revision))
        };
        // Right before it is used: every client of etcd may revoke a lease that nothing is under.
        let lease = soon(|| self.etcd.client.grant_lease(LeaseGrantRequest { ttl: LEASE })).await?.id;
        let txn = TxnRequest {
            compare: vec![unchanged(&keys[0], member), unchanged(&keys[1], there)],
            success: vec![PutRequest::new(&keys[0], to_json(&record)?).into(), self.put(report, lease)?],
            failure: Vec::new(),
        };
        let answer = soon(|| self.etcd.client.txn(txn.clone())).await?;
        if answer.succeeded { Ok((lease, revision(answer.header.as_ref()))) } else { Err(taken()) }
    }

    fn is_own(&self, entry: &KeyValue) -> bool {
        SignedReport::read(&entry.value).is_ok_and(|it| it.is_by(&self.key.public()))
    }

    fn put(&self, report: &Report, lease: i64) -> Result<RequestOp, Failure> {
        let record = SignedReport::record(report, self.key).map_err(|error| Failure::Lasting(error.to_string()))?;
        let key = self.etcd.keys.node(&report.ring, &report.node);
        Ok(PutRequest { lease, ..PutRequest::new(&key, record) }.into())
    }

    /// Writes a further report, unless the member record is another one by now.
    async fn write(&self, report: &Report, held: &Held) -> Result<(), Failure> {
        let member = self.etcd.keys.member(&report.ring, &report.node);
        let txn = TxnRequest {
            compare: vec![Compare::mod_revision(&member, CompareResult::Equal, held.member)],
            success: vec![self.put(report, held.lease)?],
            failure: Vec::new(),
        };
        let answer = soon(|| self.etcd.client.txn(txn.clone())).await?;
        if answer.succeeded { Ok(()) } else { Err(taken()) }
    }

    /// Looks at who writes at this node's place.
    fn look_at(&self, answer: WatchResponse, held: &mut Held, reports: &mut watch::Receiver<Option<Report>>) {
        for event in answer.events {
            match event.kv {
                Some(entry)
                    if event.r#type() == EventType::Put && (entry.lease != held.lease || !self.is_own(&entry)) =>
                {
                    // Not at once: the other one may do the same.
                    (held.twin, held.again) = (Some(Instant::now()), Instant::now());
                    if self.board.has_twin(Some(TWIN_COMPLAINT.into())) {
                        warn!("{TWIN_COMPLAINT}");
                    }
                }
                // It is to stand there all the same.
                _ if event.r#type() == EventType::Delete => reports.mark_changed(),
                _ => {}
            }
        }
    }
}

/// What a node holds while it reports.
struct Held {
    lease: i64,
    /// The revision of its member record.
    member: i64,
    /// When another process was seen to write its report.
    twin: Option<Instant>,
    /// When the report is written again.
    again: Instant,
}

fn taken() -> Failure {
    Failure::Passing("the records of this node were changed meanwhile, and not by it".into())
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
