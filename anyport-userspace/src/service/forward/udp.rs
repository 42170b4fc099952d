//! Datagrams to upstreams, and their answers back to the clients.
//!
//! A flow is a client and an original destination. It has a connected socket of its own towards the upstream and, once the
//! client has said more than one thing, another one towards the client: the kernel finds that one before it asks where
//! to steer, so that a flow that lasts takes batches of datagrams from socket to socket and needs neither the worker's
//! socket nor the table. A single question, as in DNS, is answered through the sockets that all answers share.

use std::{
    cell::RefCell,
    fmt::Display,
    io,
    net::SocketAddr,
    sync::{
        Arc, LazyLock, Mutex, OnceLock, Weak,
        atomic::{AtomicU8, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyport_common::flow::Transport;
use socket2::SockRef;
use tokio::{
    io::Interest,
    net::UdpSocket,
    sync::Notify,
    task::{AbortHandle, yield_now},
    time::sleep,
};

use super::{
    Connected, Forwarder,
    config::{Balance, OnDownUdp, ProxyVersion},
    flows::{Flows, Idle, Used},
    header, is_shortage, is_shortage_of_ports,
    ports::{self, LocalEnd},
    silence::{Patience, Silence},
    upstream::Upstream,
};
use crate::{
    datagram::Ends,
    hops::{Hops, next_hops, tell_hop_limits},
    rules::Family,
    service::{
        AnswerGuard,
        limits::{self, Gate, Pass, Refused},
        lock,
        log::{ConnectionLog, Entry},
        reply::UdpWorker,
        socket_options,
    },
    sys::datagrams::{BATCH as BATCH_SIZE, Batch, Part, Sent, Stray},
};

/// How often it is looked for flows that are idle.
const SWEEP: Duration = Duration::from_secs(1);
/// A question without an answer for so long, in microseconds, does not wait for an upstream that others avoid.
const UNANSWERED: u64 = 1_000_000;

thread_local! {
    /// One for all flows of a worker: what is received is sent on at once.
    static BATCH: RefCell<Batch> = RefCell::default();
}

/// The flows of one UDP socket.
#[derive(Debug)]
pub(in crate::service) struct UdpForwarder {
    shared: Arc<Shared>,
}

/// What the flows of a UDP socket share.
#[derive(Debug)]
pub(super) struct Shared {
    forwarder: Arc<Forwarder>,
    worker: Arc<UdpWorker>,
    gate: Arc<Gate>,
    flows: Mutex<Flows<Flow>>,
    /// Raised with the first flow, and when no more will come.
    changed: Notify,
    /// Where the worker's socket is bound: what is said to it directly is not forwarded.
    bound: SocketAddr,
    log: ConnectionLog,
}

#[derive(Debug)]
struct Flow {
    ends: Ends,
    upstream: UdpSocket,
    /// Of that socket, which is closed before.
    _local: LocalEnd,
    /// Towards the client; nothing in it if there can't be one.
    client: OnceLock<Option<UdpSocket>>,
    chosen: Connected,
    /// The hop limit of what the client said last, one less; answers have it, too.
    hops: AtomicU8,
    /// Those of the two sockets.
    upstream_hops: Hops,
    client_hops: Hops,
    last_used: AtomicU64,
    /// When it began, if it is to be written down.
    logged: Option<Instant>,
    /// Bytes.
    to_upstream: AtomicU64,
    to_client: AtomicU64,
    /// Datagrams.
    questions: AtomicU64,
    answers: AtomicU64,
    silence: Silence,
    tasks: Mutex<Vec<AbortHandle>>,
    /// Nothing once its place is another's.
    pass: Mutex<Option<Pass>>,
}

impl Used for Flow {
    fn last_used(&self) -> u64 {
        self.last_used.load(Relaxed)
    }
}

impl Flow {
    /// Ends the flow's tasks, which hold its sockets.
    fn end(&self) {
        for task in lock(&self.tasks).drain(..) {
            task.abort();
        }
    }
}

impl Drop for UdpForwarder {
    /// Flows go on until they are idle.
    fn drop(&mut self) {
        self.shared.changed.notify_one();
    }
}

impl UdpForwarder {
    /// For the UDP socket that is bound to `bound`; one of `workers` that share the limit of flows. To be called where the
    /// socket is served.
    pub(in crate::service) fn start(
        forwarder: Arc<Forwarder>,
        worker: Arc<UdpWorker>,
        gate: Arc<Gate>,
        bound: SocketAddr,
        workers: usize,
        log: ConnectionLog,
    ) -> Self {
        let limit = forwarder.config.udp.max_flows.get() as usize / workers;
        let options = &forwarder.config.udp;
        let [dns, others] = [options.dns_idle_timeout, options.idle_timeout].map(|time| microseconds(time.0));
        let idle = Idle { dns, others };
        let flows = Mutex::new(Flows::new(limit, idle));
        let shared = Arc::new(Shared { forwarder, worker, gate, flows, changed: Notify::new(), bound, log });
        shared.forwarder.lineage.add_flows(&shared);
        tokio::spawn(sweep(Arc::downgrade(&shared)));
        Self { shared }
    }

    /// Sends on what a client said, with one hop less than it came with.
    pub(in crate::service) fn take(&self, ends: Ends, datagram: &[u8], hops: u8) {
        self.shared.take(ends, datagram, hops);
    }
}

impl Shared {
    /// See [`UdpForwarder::take`].
    fn take(self: &Arc<Self>, ends: Ends, datagram: &[u8], hops: u8) {
        let shared = self;
        let taken = BATCH.with_borrow_mut(|batch| {
            batch.put(datagram, hops);
            let known = lock(&shared.flows).get(&ends).cloned();
            if let Some(flow) = known {
                // The client goes on, so it is worth a socket; one that ends with an answer would lose what waits in it.
                if flow.client.get().is_none() && shared.forwarder.config.udp.responses.is_none() {
                    shared.connect_to_client(&flow);
                }
                if shared.send_to_upstream(&flow, batch).is_ok() {
                    return Ok(());
                }
            }
            // The first one, or the upstream that it went to has gone.
            let pass = match shared.admit(ends) {
                Ok(pass) => pass,
                Err(why) => {
                    shared.worker.counts.refused.raise(why);
                    return Ok(());
                }
            };
            let flow = shared.open(ends, pass)?;
            shared.send_to_upstream(&flow, batch)
        });
        if let Err(error) = taken {
            shared.worker.counts.unforwarded.raise();
            tracing::debug!("service {}: {} to {}: {error}", shared.forwarder.name, ends.client, ends.dialled);
        }
    }
}

/// Microseconds on a clock that began with the process, from 1 on.
fn moment() -> u64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    microseconds(START.elapsed()).saturating_add(1)
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Ends the flows that are idle, and those whose upstream has left, until there will be no more.
async fn sweep(shared: Weak<Shared>) {
    let mut departures = 0;
    while let Some(shared) = shared.upgrade() {
        let expired = lock(&shared.flows).expire(moment());
        let is_empty = lock(&shared.flows).len() == 0;
        for flow in expired {
            // Without that setting, what is said last needs no answer.
            if let Some(since) = flow.silence.since().filter(|_| shared.forwarder.config.udp.responses.is_some()) {
                shared.note_silence(&flow, since);
            }
            shared.ended(&flow, &"closed as idle");
        }
        if departures != super::departures() {
            departures = super::departures();
            shared.end_those_left();
        }
        if is_empty {
            // Only flows and their worker's socket hold it apart from this.
            if Arc::strong_count(&shared) == 1 {
                break;
            }
            shared.changed.notified().await;
        }
        drop(shared);
        sleep(SWEEP).await;
    }
}

impl Forwarder {
    /// A socket that is connected to the upstream that the balancing chooses, or to another one where this host has no way there.
    fn open_flow(&self, ends: Ends) -> io::Result<(Arc<Upstream>, UdpSocket, LocalEnd)> {
        let source = self.config.transparent_source.then_some(ends.client);
        let mut tried = Vec::new();
        let mut last = io::Error::other("no upstream is up");
        while tried.len() <= self.config.retries as usize {
            let Some(chosen) = self.choose(Transport::Udp, ends, &tried) else { break };
            let to = chosen.target(ends.dialled.port());
            match ports::open(to, source) {
                Ok((socket, local)) => return Ok((chosen, socket, local)),
                Err(error) => {
                    self.note_failure(&chosen, &error);
                    last = io::Error::new(error.kind(), format!("connect to {to}: {error}"));
                    // Towards another upstream ports may be left; nothing else would be there that is not here.
                    let is_of_upstream = is_shortage_of_ports(&error) && self.config.balance != Balance::SourceHash;
                    if is_shortage(&error) && !is_of_upstream {
                        break;
                    }
                }
            }
            tried.push(chosen);
        }
        Err(last)
    }
}

impl Shared {
    fn open(self: &Arc<Self>, ends: Ends, pass: Pass) -> io::Result<Arc<Flow>> {
        if ends.dialled == self.bound {
            return Err(io::Error::other("dialled the service's own socket"));
        }
        let forwarder = &self.forwarder;
        let (chosen, upstream, local) = forwarder.open_flow(ends)?;
        let flow = Arc::new(Flow {
            ends,
            upstream,
            _local: local,
            client: OnceLock::new(),
            chosen: Connected::to(chosen),
            hops: AtomicU8::new(0),
            upstream_hops: Hops::default(),
            client_hops: Hops::default(),
            last_used: AtomicU64::new(moment()),
            logged: self.log.picks().then(Instant::now),
            to_upstream: AtomicU64::new(0),
            to_client: AtomicU64::new(0),
            questions: AtomicU64::new(0),
            answers: AtomicU64::new(0),
            silence: Silence::default(),
            tasks: Mutex::default(),
            pass: Mutex::new(Some(pass)),
        });
        let gone = {
            let mut flows = lock(&self.flows);
            if flows.len() == 0 {
                self.changed.notify_one();
            }
            flows.insert(ends, Arc::clone(&flow))
        };
        if let Some(gone) = gone {
            self.evicted(&gone);
        }
        self.worker.counts.flows.raise();
        let task = tokio::spawn(answers(Arc::clone(self), Arc::clone(&flow)));
        lock(&flow.tasks).push(task.abort_handle());
        Ok(flow)
    }

    /// Lets a flow in, in the place of the oldest one if there is no other.
    fn admit(&self, ends: Ends) -> Result<Pass, Refused> {
        let client = ends.client.ip();
        let admitted = self.gate.admit(client);
        let oldest = match admitted {
            // A resolver has a flow for each question, so its old ones go, where they are among the oldest of all.
            Err(Refused::Share) => lock(&self.flows).remove_oldest(|it| limits::is_same_source(it.client.ip(), client)),
            Err(Refused::Total) => lock(&self.flows).remove_oldest(|_| true),
            _ => return admitted,
        };
        let Some(gone) = oldest else { return admitted };
        self.evicted(&gone);
        // Its sockets are closed when its tasks run next. Until then there are some more than the pool knows of, which has
        // left enough.
        let place = lock(&gone.pass).take();
        drop(place);
        self.gate.admit(client)
    }

    /// Gives a flow a socket towards the client, if the kernel has one for it.
    fn connect_to_client(self: &Arc<Self>, flow: &Arc<Flow>) {
        let Ends { client, dialled } = flow.ends;
        let opened = connected(client, Some(dialled)).and_then(|socket| {
            for socket in [&socket, &flow.upstream] {
                socket_options::set_up_large_flow(socket)?;
            }
            tell_hop_limits(&socket, if client.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 })?;
            Ok(socket)
        });
        let opened = opened.inspect_err(|error| {
            // Such as a socket of the host that has the port for itself.
            tracing::debug!("service {}: no socket from {dialled} to {client}: {error}", self.forwarder.name);
        });
        if flow.client.set(opened.ok()).is_ok() && matches!(flow.client.get(), Some(Some(_))) {
            let task = tokio::spawn(questions(Arc::clone(self), Arc::clone(flow)));
            lock(&flow.tasks).push(task.abort_handle());
        }
    }

    /// Ends the flow if its upstream refuses, or is silent and others avoid it.
    fn send_to_upstream(&self, flow: &Arc<Flow>, batch: &Batch) -> io::Result<()> {
        self.asked(flow)?;
        let to = flow.chosen.0.target(flow.ends.dialled.port());
        let sent = batch.by_hops(|received, part| {
            let Some(hops) = next_hops(received) else { return part.looped() };
            flow.hops.store(hops, Relaxed);
            if let Err(error) = flow.upstream_hops.set(&flow.upstream, to, hops) {
                return part.send_each(|_| Err(io::Error::new(error.kind(), "set the hop limit")));
            }
            match self.forwarder.config.proxy_protocol {
                Some(version) => send_with_header(flow, version, part),
                None => part.send(&flow.upstream),
            }
        });
        self.worker.counts.refused_loop.add(sent.looped);
        flow.chosen.0.traffic.add(sent.bytes, 0);
        self.worker.counts.traffic.add(sent.bytes, 0);
        flow.to_upstream.fetch_add(sent.bytes, Relaxed);
        flow.questions.fetch_add(sent.datagrams, Relaxed);
        // What came back by ICMP for an earlier datagram; other errors are of one datagram.
        if let Some(error @ (libc::ECONNREFUSED | libc::EHOSTUNREACH | libc::ENETUNREACH)) = sent.error {
            let error = io::Error::from_raw_os_error(error);
            self.fail(flow, &error);
            return Err(error);
        }
        self.worker.counts.unsent.add(sent.lost);
        Ok(())
    }

    fn send_to_client(&self, flow: &Arc<Flow>, batch: &Batch) {
        let now = moment();
        flow.last_used.store(now, Relaxed);
        flow.chosen.0.answered(now);
        let was_silent = flow.silence.answered();
        let hops = flow.hops.load(Relaxed);
        let sent = match flow.client.get() {
            Some(Some(client)) if flow.client_hops.set(client, flow.ends.client, hops).is_ok() => batch.send(client),
            _ => batch.send_each(|datagram| self.worker.answer(flow.ends, datagram, hops)),
        };
        flow.chosen.0.traffic.add(0, sent.bytes);
        self.worker.counts.traffic.add(0, sent.bytes);
        flow.to_client.fetch_add(sent.bytes, Relaxed);
        self.worker.counts.answered.add(sent.datagrams);
        self.worker.counts.unsent.add(sent.lost);
        let arrived = sent.datagrams + sent.lost;
        let before = flow.answers.fetch_add(arrived, Relaxed);
        let answers = before + arrived;
        if was_silent || (before == 0 && arrived > 0) {
            flow.chosen.0.succeeded();
        }
        let is_answered = |responses| answers >= flow.questions.load(Relaxed).saturating_mul(responses);
        if self.forwarder.config.udp.responses.map(|it| u64::from(it.get())).is_some_and(is_answered) {
            self.end(flow, &"answered");
        }
    }

    /// Ends a flow since its upstream refuses.
    fn fail(&self, flow: &Arc<Flow>, error: &io::Error) {
        self.forwarder.note_failure(&flow.chosen.0, error);
        self.end(flow, &format_args!("the upstream's side broke ({error})"));
    }

    /// Takes into account that the client says something, and may have waited for an answer.
    fn asked(&self, flow: &Arc<Flow>) -> io::Result<()> {
        let now = moment();
        let before = flow.last_used.swap(now, Relaxed);
        let config = &self.forwarder.config;
        let patience =
            Patience { limit: microseconds(config.connect_timeout.0), has_pauses: config.udp.responses.is_some() };
        if let Some(since) = flow.silence.asked(before, now, patience) {
            self.note_silence(flow, since);
        }
        if flow.silence.since().is_some_and(|since| now - since >= UNANSWERED) && self.is_avoided(flow) {
            self.end(flow, &"its upstream is ejected and does not answer");
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the upstream does not answer"));
        }
        Ok(())
    }

    fn is_avoided(&self, flow: &Flow) -> bool {
        let upstream = &flow.chosen.0;
        let current = self.forwarder.current();
        current.config.udp.on_down == OnDownUdp::Move && current.avoids(upstream)
    }

    /// Silence since that moment is a failure of the upstream if it has said nothing to others, either, and answers are
    /// expected: by the settings, or since it gave some to this client before and other upstreams still give some.
    fn note_silence(&self, flow: &Flow, since: u64) {
        let Forwarder { config, .. } = &*self.forwarder;
        let upstream = &flow.chosen.0;
        let has_answered = flow.answers.load(Relaxed) > 0;
        // A client that chooses the port may have chosen one where nothing answers, and has been promised this upstream.
        let is_of_port = config.balance == Balance::SourceHash && upstream.port.is_none();
        let is_expected = match config.udp.responses {
            Some(_) => has_answered || !is_of_port,
            None => has_answered && self.forwarder.current().others_answer_since(upstream, since),
        };
        if is_expected && !upstream.has_answered_since(since) {
            flow.silence.failed();
            let error = io::Error::new(io::ErrorKind::TimedOut, "no answer over UDP");
            self.forwarder.note_failure(upstream, &error);
        }
    }

    /// Ends flows to upstreams that get no clients any more: the clients' next datagrams go elsewhere.
    fn end_those_left(&self) {
        let current = self.forwarder.current();
        if current.config.udp.on_down == OnDownUdp::Move {
            self.end_if(|_, flow| current.has_left(&flow.chosen.0), "its upstream is down or taken out");
        }
    }

    /// Ends flows that are not steered to the service any more: the clients' next datagrams go where the rules say.
    pub(super) fn end_those_not_steered(&self, is_ours: &AnswerGuard) {
        if self.forwarder.current().config.udp.on_down == OnDownUdp::Move {
            self.end_if(|ends, _| !is_ours(*ends), "its rule was removed");
        }
    }

    fn end_if(&self, is_over: impl Fn(&Ends, &Flow) -> bool, reason: &str) {
        // Looked at without the lock, which datagrams wait for.
        let all: Vec<_> = lock(&self.flows).iter().map(|(ends, flow)| (*ends, Arc::clone(flow))).collect();
        for (ends, flow) in all {
            if is_over(&ends, &flow) {
                self.end(&flow, &reason);
            }
        }
    }

    fn end(&self, flow: &Arc<Flow>, reason: &dyn Display) {
        // The task that removed it from the table has reported its end.
        if lock(&self.flows).remove(&flow.ends, flow) {
            self.ended(flow, reason);
        }
    }

    fn evicted(&self, flow: &Flow) {
        self.worker.counts.evicted.raise();
        self.ended(flow, &"gave way to others");
    }

    /// Ends a flow that is not in the table any more.
    fn ended(&self, flow: &Flow, reason: &dyn Display) {
        flow.end();
        let Some(began) = flow.logged else { return };
        self.log.write(&Entry {
            began,
            transport: Transport::Udp,
            ends: flow.ends,
            upstream: Some(&flow.chosen.0),
            from_client: flow.to_upstream.load(Relaxed),
            to_client: flow.to_client.load(Relaxed),
            reason,
        });
    }
}

/// Each datagram has the header before it: there is no first one among datagrams.
fn send_with_header(flow: &Flow, version: ProxyVersion, part: Part<'_>) -> Sent {
    let mut with_header = Vec::new();
    part.send_each(|datagram| {
        with_header.clear();
        header::write(version, Transport::Udp, flow.ends, &mut with_header);
        with_header.extend(datagram);
        SockRef::from(&flow.upstream).send(&with_header).map(drop)
    })
}

/// Moves what the upstream says, until it refuses.
async fn answers(shared: Arc<Shared>, flow: Arc<Flow>) {
    let peer = flow.chosen.0.target(flow.ends.dialled.port());
    // What is another flow's answer is not this one's client's.
    let error = relay((&flow.upstream, peer), |batch| shared.send_to_client(&flow, batch), drop).await;
    shared.fail(&flow, &error);
}

/// Moves what the client says, until it is gone.
async fn questions(shared: Arc<Shared>, flow: Arc<Flow>) {
    let Some(Some(client)) = flow.client.get() else { return };
    let counts = &shared.worker.counts;
    let hand_on = |batch: &Batch| {
        counts.datagrams.add(batch.datagrams().count() as u64);
        if let Err(error) = shared.send_to_upstream(&flow, batch) {
            tracing::debug!("service {}: {:?}: {error}", shared.forwarder.name, flow.ends);
        }
    };
    // The flow's client is one of many at the same original destination, and each of them has a socket there.
    let reroute = |Stray { source, bytes, hops }| {
        counts.datagrams.raise();
        if shared.gate.allows(source.ip()) {
            shared.take(Ends { client: source, ..flow.ends }, &bytes, hops);
        }
    };
    let error = relay((client, flow.ends.client), hand_on, reroute).await;
    shared.end(&flow, &format_args!("the client's side broke ({error})"));
}

/// Hands on what arrives at a connected socket, batch by batch, until there is an error. What is not from the peer comes apart.
async fn relay((from, peer): (&UdpSocket, SocketAddr), hand_on: impl Fn(&Batch), stray: impl Fn(Stray)) -> io::Error {
    loop {
        // An ICMP error comes alone, without anything to read.
        if let Err(error) = from.ready(Interest::READABLE | Interest::ERROR).await {
            return error;
        }
        let mut strays = Vec::new();
        let received = BATCH.with_borrow_mut(|batch| {
            let received = batch.receive_from(from, peer, &mut strays);
            if received.is_ok() {
                hand_on(batch);
            }
            received.map(|count| count == BATCH_SIZE)
        });
        strays.into_iter().for_each(&stray);
        match received {
            // Other tasks run before what may still be there is read.
            Ok(true) => yield_now().await,
            Ok(false) => wait_for_more(from),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait_for_more(from),
            Err(error) => return error,
        }
    }
}

/// Says that nothing is left to read. What arrives from now on is a new event of the kernel's, so that it need not be asked
/// again.
fn wait_for_more(socket: &UdpSocket) {
    for interest in [Interest::READABLE, Interest::ERROR] {
        let nothing = || io::Result::<()>::Err(io::ErrorKind::WouldBlock.into());
        // That is what it answers, too.
        socket.try_io(interest, nothing).ok();
    }
}

/// A socket that is connected to `to`, from the address and port `from` if there is one, whosever it is.
fn connected(to: SocketAddr, from: Option<SocketAddr>) -> io::Result<UdpSocket> {
    let socket = socket_options::flow(to, from)?;
    UdpSocket::from_std(socket.into())
}
