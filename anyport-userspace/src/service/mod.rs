//! The daemon's own services: groups of sockets, and handlers for what arrives on them.

mod answers;
mod config;
mod conversations;
mod counts;
mod descriptors;
mod event_loop;
pub mod forward;
mod handlers;
mod histogram;
mod limits;
mod log;
mod mark;
mod raw;
mod registrant;
mod reply;
mod socket_options;
mod sockets;
mod stats;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;
mod witness;
mod workers;

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd as _, BorrowedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context as _, bail};
use anyport_common::{flow::Transport, maps::SOCKETS_PER_SERVICE};
use socket2::Socket;
use tokio::{net::UdpSocket, runtime::Handle, sync::Notify, task::JoinSet};

pub(crate) use config::ServiceTable;
pub use config::{HandlerKind, ServiceConfig};
pub use descriptors::DescriptorPool;
pub use forward::{Lineages, UpstreamState, UpstreamView};
pub use histogram::{ConnectionTimes, Distribution};
pub use limits::{Capacity, Limits, Rate};
pub use mark::Mark;
pub use registrant::Registrant;
pub use sockets::SocketInfo;
pub use stats::ServiceStats;
pub use witness::{OwnedGuard, Witness};
pub use workers::{WorkerHandles, Workers};

use self::{
    answers::{Answering, MAX_ANSWERING},
    forward::{Forwarder, UdpForwarder},
    histogram::{Histogram, Times},
    limits::{Gate, LimitScope},
    log::ConnectionLog,
    reply::UdpWorker,
    sockets::Group,
    stats::TcpCounts,
    tcp::{Acceptor, ListenerContext},
    udp::Receiver,
};
pub use crate::rules::Family;
use crate::{
    closing::PassedFd,
    datagram::{self, Ends},
    events::EventPublisher,
    keeper::Link,
    privileges,
    steering::GroupSocket,
    sys,
};

/// Whether the source of a datagram is itself steered for what comes from the original destination, so that an answer
/// would come back to us. Asked for each datagram that is to be answered, source first.
pub type LoopGuard = Arc<dyn Fn(SocketAddr, SocketAddr) -> bool + Send + Sync>;

/// Whether a packet of this host, from an address to an address and port, is steered to a service of the handler `forward`.
/// Asked for each connection and each flow that is forwarded.
pub type ForwardGuard = Arc<dyn Fn(Transport, IpAddr, SocketAddr) -> bool + Send + Sync>;

/// Whether the original destination is steered to the service that answers. Asked for each answer of an owner, and for each
/// flow that is forwarded when rules change.
pub type AnswerGuard = Arc<dyn Fn(Ends) -> bool + Send + Sync>;

/// The queue of a listening socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queue {
    /// The kernel's name for the socket.
    pub cookie: u64,
    /// How many connections wait to be accepted.
    pub waiting: u32,
    /// How many have been so far, where that is known.
    pub accepted: Option<u64>,
}

/// What all services of a daemon have in common.
#[derive(Clone)]
pub struct SharedContext {
    /// Who serve: each has one socket of each group.
    pub workers: WorkerHandles,
    /// Does what is not about single connections or datagrams.
    pub control: Handle,
    /// Descriptors for what clients bring about.
    pub descriptors: DescriptorPool,
    /// How many connections and flows they may have.
    pub capacity: Capacity,
    /// Whether services have to refuse sources that they do not take, since the back end leaves that to them.
    pub sees_to_sources: bool,
    /// Tells which sources are steered.
    pub loop_guard: LoopGuard,
    /// Tells which upstreams are steered to `forward`.
    pub forward_guard: ForwardGuard,
    /// Services of `forward` and those that they replace.
    pub lineages: Lineages,
    /// Publishes events of what arrives, where the back end does not.
    pub publisher: Option<EventPublisher>,
    /// Knows the clients of registered sockets.
    pub witness: Arc<Witness>,
    /// Keeps the services' sockets for a process that comes later.
    pub keeper: Link,
}

impl fmt::Debug for SharedContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedContext").field("workers", &self.workers).finish_non_exhaustive()
    }
}

/// A service at work: its sockets are open and tasks wait at them. Ends when dropped.
#[derive(Debug)]
pub struct Service {
    config: Arc<ServiceConfig>,
    groups: [Option<GroupSocket>; SOCKETS_PER_SERVICE as usize],
    sockets: Vec<SocketInfo>,
    tcp: Vec<Arc<ListenerContext>>,
    udp: Vec<Arc<UdpWorker>>,
    forwarder: Option<Arc<Forwarder>>,
    listeners: Vec<Arc<Socket>>,
    receivers: Vec<Arc<UdpSocket>>,
    keeper: Link,
    /// They serve what arrives at these.
    tasks: JoinSet<()>,
    /// They send answers for owners of registered sockets.
    answering: JoinSet<()>,
}

impl Service {
    /// Opens the service's sockets and serves what arrives there.
    pub fn start(config: ServiceConfig, commons: &SharedContext) -> anyhow::Result<Self> {
        config.validate()?;
        let name = config.name.clone();
        Start::new(config, commons).finish().with_context(|| format!("start the service {name}"))
    }

    /// What the service was made of.
    pub fn config(&self) -> &ServiceConfig {
        &self.config
    }

    /// One socket of each group: TCP and UDP over IPv4, then TCP and UDP over IPv6. None where the host has no such
    /// family. A group receives for as long as anyone holds this, even after the service has ended.
    pub fn groups(&self) -> [Option<GroupSocket>; SOCKETS_PER_SERVICE as usize] {
        self.groups.clone()
    }

    /// All sockets.
    pub fn sockets(&self) -> &[SocketInfo] {
        &self.sockets
    }

    /// What has been counted so far.
    pub fn stats(&self) -> ServiceStats {
        let mut stats = ServiceStats::default();
        for site in &self.tcp {
            stats.add_tcp(&site.counts);
        }
        for worker in &self.udp {
            stats.add_udp(&worker.counts);
        }
        // A kernel that does not tell has nothing to tell.
        let drops = |socket: BorrowedFd<'_>| u64::from(sys::drops(socket).unwrap_or_default());
        stats.listen_drops = self.listeners.iter().map(|it| drops(it.as_fd())).sum();
        stats.receive_drops = self.receivers.iter().map(|it| drops(it.as_fd())).sum();
        stats
    }

    /// How long connections waited to be accepted, and how long they lasted.
    pub fn times(&self) -> ConnectionTimes {
        let of = |which: fn(&Times) -> &Histogram| {
            let histograms: Vec<_> = self.tcp.iter().map(|site| which(&site.counts.times)).collect();
            Distribution::of(&histograms)
        };
        ConnectionTimes { durations: of(|times| &times.durations), waits: of(|times| &times.waits) }
    }

    /// The upstreams of `forward`.
    pub fn upstreams(&self) -> Vec<UpstreamView> {
        self.forwarder.as_ref().map(|forwarder| forwarder.views()).unwrap_or_default()
    }

    /// Whether it is known by now which upstreams there are: each name has been asked for once.
    pub fn knows_upstreams(&self) -> bool {
        self.forwarder.as_ref().is_none_or(|forwarder| forwarder.is_resolved())
    }

    /// The queues of connections that wait to be accepted, of all listening sockets of which the kernel tells.
    pub fn queues(&self) -> Vec<Queue> {
        let queue = |(listener, site): (&Arc<Socket>, &Arc<ListenerContext>)| {
            let cookie = listener.cookie().ok()?;
            let waiting = sys::waiting(listener.as_fd()).ok()?;
            Some(Queue { cookie, waiting, accepted: Some(site.counts.accepted.get()) })
        };
        self.listeners.iter().zip(&self.tcp).filter_map(queue).collect()
    }

    /// What does not work as it should.
    pub fn degraded(&self) -> Vec<String> {
        self.forwarder.as_ref().map(|forwarder| forwarder.degraded()).unwrap_or_default()
    }

    /// Has answers sent for an owner of registered sockets, who writes them to this connection, until the owner closes it.
    ///
    /// # Errors
    /// There are too many such connections, or the kernel does not let us watch this one.
    pub fn answer_for(&mut self, owner: PassedFd, is_ours: AnswerGuard, commons: &SharedContext) -> anyhow::Result<()> {
        while self.answering.try_join_next().is_some() {}
        let Some(worker) = self.udp.first() else { bail!("the service {} answers by itself", self.config.name) };
        if self.answering.len() >= MAX_ANSWERING {
            bail!("{MAX_ANSWERING} owners have a connection for answers of the service {} already", self.config.name);
        }
        let turn = self.answering.len() % commons.workers.count();
        let handle = commons.workers.iter().nth(turn).context("there is no worker")?;
        let _context = handle.enter();
        let owner = sys::watch_readable(owner).context("watch the connection for answers")?;
        let loop_guard = Arc::clone(&commons.loop_guard);
        let (worker, witness, service) = (Arc::clone(worker), Arc::clone(&commons.witness), self.config.name.clone());
        self.answering.spawn_on(Answering { owner, worker, is_ours, loop_guard, witness, service }.run(), handle);
        Ok(())
    }

    /// Closes the sockets that answers were sent from, so that they are in nobody's way, and ends flows that `is_ours` does
    /// not recognize. To be called whenever the kernel has new rules.
    pub fn rules_changed(&self, is_ours: &AnswerGuard) {
        for worker in &self.udp {
            let retired = lock(&worker.replies).forget();
            drop(retired);
        }
        if let Some(forwarder) = &self.forwarder {
            forwarder.rules_changed(is_ours);
        }
    }

    /// Closes the service's sockets; they are closed when this returns. Connections go on until they end by
    /// themselves, but those that wait to be accepted are refused.
    pub async fn stop(self) {
        for socket in &self.sockets {
            self.keeper.forget(sockets::kept_name(&self.config.name, socket));
        }
        self.leave().await;
    }

    /// As [`Self::stop`], but the keeper goes on to keep the sockets, so that those who wait are not refused.
    pub async fn leave(self) {
        let Self { mut tasks, mut answering, groups, .. } = self;
        drop(groups);
        tasks.shutdown().await;
        answering.shutdown().await;
    }
}

/// A service that is about to start.
struct Start<'a> {
    config: Arc<ServiceConfig>,
    commons: &'a SharedContext,
    /// For connections.
    gate: Arc<Gate>,
    /// For flows of datagrams.
    flow_gate: Arc<Gate>,
    tcp: Vec<Arc<ListenerContext>>,
    udp: Vec<Arc<UdpWorker>>,
    forwarder: Option<Arc<Forwarder>>,
    listeners: Vec<Arc<Socket>>,
    receivers: Vec<Arc<UdpSocket>>,
    reply_opened: Arc<Notify>,
    tasks: JoinSet<()>,
}

impl<'a> Start<'a> {
    fn new(config: ServiceConfig, commons: &'a SharedContext) -> Self {
        let forward = config.forward.as_deref();
        let forwarder = forward.map(|forward| {
            let guard = Arc::clone(&commons.forward_guard);
            Forwarder::start(config.name.to_string(), forward.clone(), guard, &commons.lineages)
        });
        let [gate, flow_gate] = gates(&config, commons).map(Arc::new);
        Self {
            config: Arc::new(config),
            commons,
            gate,
            flow_gate,
            forwarder,
            tcp: Vec::new(),
            udp: Vec::new(),
            listeners: Vec::new(),
            receivers: Vec::new(),
            reply_opened: Arc::default(),
            tasks: JoinSet::new(),
        }
    }

    fn finish(mut self) -> anyhow::Result<Service> {
        let mut groups = [const { None }; SOCKETS_PER_SERVICE as usize];
        let mut sockets = Vec::new();
        // In the order of `Flow::socket_offset`.
        let kinds = [Family::Ipv4, Family::Ipv6]
            .into_iter()
            .flat_map(|family| Transport::ALL.map(|transport| (family, transport)));
        for (handle, (family, transport)) in groups.iter_mut().zip(kinds) {
            if !self.config.has_sockets(transport) {
                continue;
            }
            let kept = self.commons.keeper.take(&sockets::kept_prefix(&self.config.name, family, transport));
            let Some(group) = Group::open(family, transport, self.commons.workers.count(), kept)? else {
                continue;
            };
            *handle = Some(group.handle()?);
            for (socket, info) in group.sockets.iter().zip(group.info()?) {
                self.commons.keeper.keep(sockets::kept_name(&self.config.name, &info), socket.as_fd());
                sockets.push(info);
            }
            // There may be more sockets than workers, where there were more workers before.
            for (socket, worker) in group.sockets.into_iter().zip(self.commons.workers.iter().cycle()) {
                let _context = worker.enter();
                match transport {
                    Transport::Tcp => self.accept(socket, worker)?,
                    Transport::Udp => self.receive(socket, group.bound, worker)?,
                }
            }
        }
        if self.config.handler == HandlerKind::Registered {
            // Nobody of us receives, but owners have their answers sent.
            self.udp.push(self.answering_worker());
        }
        let ageing = reply::age_replies(self.udp.clone(), self.reply_opened);
        self.tasks.spawn_on(ageing, self.commons.workers.first());
        if let Some(forwarder) = &self.forwarder {
            self.tasks.spawn_on(forward::keep_up(Arc::clone(forwarder)), &self.commons.control);
        }
        let Self { config, commons, tcp, udp, forwarder, listeners, receivers, tasks, .. } = self;
        let (keeper, answering) = (commons.keeper.clone(), JoinSet::new());
        Ok(Service { config, groups, sockets, tcp, udp, forwarder, listeners, receivers, keeper, tasks, answering })
    }

    fn answering_worker(&self) -> Arc<UdpWorker> {
        let (descriptors, reply_opened) = (self.commons.descriptors.clone(), Arc::clone(&self.reply_opened));
        Arc::new(UdpWorker::new(descriptors, reply_opened, self.config.mark))
    }

    /// What it accepts inherits the mark.
    fn mark(&self, socket: &Socket) -> anyhow::Result<()> {
        let _raised = privileges::raise(privileges::NET_ADMIN);
        Mark::put_on(self.config.mark, socket).context("give a listening socket the service's mark (CAP_NET_ADMIN)")
    }

    fn accept(&mut self, socket: Socket, worker: &Handle) -> anyhow::Result<()> {
        self.mark(&socket)?;
        if let Some(forward) = &self.config.forward {
            socket_options::set_up_listener(&socket, &forward.tcp).context("set up a listening socket")?;
        }
        let site = Arc::new(ListenerContext {
            config: Arc::clone(&self.config),
            counts: TcpCounts::default(),
            gate: Arc::clone(&self.gate),
            descriptors: self.commons.descriptors.clone(),
            forwarder: self.forwarder.clone(),
            publisher: self.commons.publisher.clone(),
            log: ConnectionLog::of(&self.config),
        });
        let listener = Arc::new(socket);
        self.listeners.push(Arc::clone(&listener));
        let acceptor = Acceptor::new(listener, Arc::clone(&site)).context("watch a listening socket")?;
        self.tcp.push(site);
        self.tasks.spawn_on(acceptor.run(), worker);
        Ok(())
    }

    fn receive(&mut self, socket: Socket, bound: SocketAddr, worker: &Handle) -> anyhow::Result<()> {
        let socket = Arc::new(UdpSocket::from_std(socket.into()).context("watch a UDP socket")?);
        self.receivers.push(Arc::clone(&socket));
        let shared = self.answering_worker();
        let workers = self.commons.workers.count().get();
        let log = ConnectionLog::of(&self.config);
        let gate = Arc::clone(&self.flow_gate);
        let start = |forwarder| UdpForwarder::start(forwarder, Arc::clone(&shared), gate, bound, workers, log);
        let receiver = Receiver {
            socket: Arc::clone(&socket),
            bound,
            config: Arc::clone(&self.config),
            worker: Arc::clone(&shared),
            gate: Arc::clone(&self.flow_gate),
            loop_guard: Arc::clone(&self.commons.loop_guard),
            publisher: self.commons.publisher.clone(),
            forwarder: self.forwarder.clone().map(start),
        };
        self.udp.push(shared);
        self.tasks.spawn_on(receiver.run(), worker);
        Ok(())
    }
}

/// What connections and what flows of a service have to pass. A forwarded connection has two sockets, and so has a flow.
fn gates(config: &ServiceConfig, commons: &SharedContext) -> [Gate; 2] {
    let capacity = &commons.capacity;
    let sources = (commons.sees_to_sources && !config.sources.is_empty()).then(|| Arc::clone(&config.sources));
    let forward = config.forward.as_deref();
    let scopes: Vec<_> = LimitScope::of_service(config.limits).into_iter().collect();
    let of_flows = forward.map(|forward| LimitScope::of_flows(forward.udp.max_flows, config.limits));
    let flow_rooms = scopes.iter().cloned().chain(of_flows).collect();
    let proxies = forward.map(|forward| forward.accept_proxy.clone()).unwrap_or_default();
    let descriptors = if forward.is_some() { 2 } else { 1 };
    [
        Gate { scopes, capacity: capacity.clone(), descriptors, proxies, sources: sources.clone() },
        Gate { scopes: flow_rooms, capacity: capacity.clone(), descriptors, proxies: Vec::new(), sources },
    ]
}

/// Locks what no panic can leave half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
