//! `forward`: clients are connected to upstreams.

mod client;
pub mod config;
mod connect;
mod detour;
mod flows;
pub mod header;
mod lineage;
mod names;
mod pipe;
mod ports;
mod relay;
mod silence;
mod transparent;
mod udp;
mod upkeep;
mod upstream;

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use anyport_common::flow::Transport;
use arc_swap::ArcSwap;
use tokio::{sync::Notify, time::timeout};

pub(super) use self::{
    client::Client,
    lineage::departures,
    relay::{Outcome, RelayEnd},
    udp::UdpForwarder,
    upkeep::keep_up,
};
use self::{
    config::{Balance, ForwardConfig, OnDown},
    detour::Detours,
    lineage::Lineage,
    names::Names,
    transparent::Returns,
    upstream::{Balancer, Upstream},
};
pub use self::{
    lineage::Lineages,
    upstream::{UpstreamState, UpstreamView},
};
use super::{AnswerGuard, ForwardGuard, datagram::Ends};

/// What all workers of one service share.
#[derive(Debug)]
pub(super) struct Forwarder {
    /// The service's name.
    name: String,
    config: ForwardConfig,
    upstreams: ArcSwap<Vec<Arc<Upstream>>>,
    balancer: Balancer,
    names: Mutex<Names>,
    /// Whether some upstream was known, or every name has been asked for once.
    is_resolved: AtomicBool,
    resolved: Notify,
    returns: Returns,
    detours: Detours,
    lineage: Arc<Lineage>,
}

/// Why a client was not connected.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    /// It had to send a PROXY header.
    #[error("no PROXY header: {0}")]
    Header(#[source] io::Error),
    /// No upstream took it.
    #[error("no upstream: {0}")]
    Upstream(#[source] io::Error),
}

/// What became of a client.
#[derive(Debug)]
pub(super) struct Finished {
    /// As the proxy in front told them, if it did.
    pub(super) ends: Ends,
    pub(super) upstream: Option<Arc<Upstream>>,
    pub(super) end: Result<Outcome, Refusal>,
}

/// Counted as open at its upstream until this is dropped.
#[derive(Debug)]
struct Connected(Arc<Upstream>);

impl Connected {
    fn to(upstream: Arc<Upstream>) -> Self {
        upstream.opened();
        Self(upstream)
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.closed();
    }
}

impl Forwarder {
    /// For a service of this name, which may replace another one.
    pub(super) fn start(name: String, config: ForwardConfig, guard: ForwardGuard, lineages: &Lineages) -> Arc<Self> {
        let lineage = lineages.of(&name);
        let predecessor = lineage.current();
        let before = predecessor.as_ref().map(|it| it.upstreams.load_full()).unwrap_or_default();
        let mut names = match &predecessor {
            Some(predecessor) => super::lock(&predecessor.names).succeeded_by(&config.upstreams),
            None => Names::of(&config.upstreams),
        };
        let upstreams = names.upstreams(&config.upstreams, &before);
        for upstream in &upstreams {
            upstream.adopt(config.health_check.is_some(), config.ejection);
        }
        let forwarder = Arc::new(Self {
            name,
            balancer: Balancer::default(),
            is_resolved: AtomicBool::new(names.is_empty() || !upstreams.is_empty()),
            upstreams: ArcSwap::from_pointee(upstreams),
            names: Mutex::new(names),
            resolved: Notify::new(),
            returns: Returns::default(),
            detours: Detours::new(guard),
            lineage: Arc::clone(&lineage),
            config,
        });
        lineage.add(&forwarder);
        lineage::note_departure();
        forwarder
    }

    /// The service of this name that is there now.
    fn current(self: &Arc<Self>) -> Arc<Self> {
        self.lineage.current().unwrap_or_else(|| Arc::clone(self))
    }

    /// Whether an upstream that this service or one before it had gets no clients any more: it is down and another one is
    /// not, or it is not among the upstreams.
    fn has_left(&self, upstream: &Arc<Upstream>) -> bool {
        if !self.is_resolved() {
            return false;
        }
        let upstreams = self.upstreams.load();
        let is_here = upstreams.iter().any(|it| Arc::ptr_eq(it, upstream));
        let is_down = |it: &Upstream| it.state() == UpstreamState::Down;
        !is_here || (is_down(upstream) && !upstreams.iter().all(|it| is_down(it)))
    }

    /// Whether an upstream gets clients only if there is no other, and there is one.
    fn avoids(&self, upstream: &Upstream) -> bool {
        upstream.state() == UpstreamState::Ejected
            && self.upstreams.load().iter().any(|it| it.state() == UpstreamState::Up)
    }

    /// Whether another upstream has answered datagrams since that moment.
    fn others_answer_since(&self, upstream: &Arc<Upstream>, moment: u64) -> bool {
        self.upstreams.load().iter().any(|it| !Arc::ptr_eq(it, upstream) && it.has_answered_since(moment))
    }

    /// Whether connections to this upstream are to be closed.
    fn closes(self: &Arc<Self>, upstream: &Arc<Upstream>) -> bool {
        let current = self.current();
        current.config.on_down == OnDown::Close && current.has_left(upstream)
    }

    /// Takes into account that rules have changed: `is_ours` says which flows are still steered to this service.
    pub(super) fn rules_changed(&self, is_ours: &AnswerGuard) {
        for flows in self.lineage.flows() {
            flows.end_those_not_steered(is_ours);
        }
    }

    fn choose(&self, transport: Transport, ends: Ends, tried: &[Arc<Upstream>]) -> Option<Arc<Upstream>> {
        let source = self.config.transparent_source.then(|| ends.client.ip());
        let is_allowed = |upstream: &Arc<Upstream>| {
            let can_have_source = upstream.address.is_ipv4() == ends.client.is_ipv4();
            let to = upstream.target(ends.dialled.port());
            // To connect to the original destination would come back here, for ever.
            to != ends.dialled
                && !self.detours.is_one(&self.name, transport, source, to)
                && (can_have_source || !self.config.transparent_source)
                && !tried.iter().any(|it| Arc::ptr_eq(it, upstream))
        };
        let upstreams = self.upstreams.load();
        self.balancer.choose(self.config.balance, ends.client.ip(), &upstreams, is_allowed).cloned()
    }

    /// Notes that an upstream did not take a client. What this host lacks is no fault of the upstream's.
    fn note_failure(&self, upstream: &Upstream, error: &io::Error) {
        // Nor is a port of it that is closed, where clients choose the port and have been promised this upstream.
        let is_of_port = self.keeps_affinity_after(error) && upstream.port.is_none();
        if is_shortage(error) || is_of_port {
            return;
        }
        if upstream.failed(error, self.config.ejection) {
            let time = self.config.ejection.time;
            tracing::warn!("service {}: the upstream {upstream} gets no clients for {time}: {error}", self.name);
        }
    }

    /// Whether another upstream would be the wrong one: a client has always the same one, and that host is there.
    fn keeps_affinity_after(&self, error: &io::Error) -> bool {
        self.config.balance == Balance::SourceHash
            && matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset)
    }

    /// A daemon that has just started may not have asked for the names yet.
    pub(super) async fn wait_for_names(&self) {
        if !self.is_resolved() {
            let resolved = async {
                let mut resolved = std::pin::pin!(self.resolved.notified());
                resolved.as_mut().enable();
                if !self.is_resolved() {
                    resolved.await;
                }
            };
            // Without an answer the upstreams that are addresses have to do.
            timeout(self.config.connect_timeout.0, resolved).await.ok();
        }
    }

    /// Takes into account that a name has been asked for.
    fn note_resolved(&self) {
        if !self.upstreams.load().is_empty() || super::lock(&self.names).are_answered() {
            self.is_resolved.store(true, Relaxed);
            self.resolved.notify_waiters();
        }
    }

    /// Whether some upstream is known, or every name has been asked for once.
    pub(super) fn is_resolved(&self) -> bool {
        self.is_resolved.load(Relaxed)
    }

    /// What is known of the upstreams, and of those that are gone and still have connections.
    pub(super) fn views(&self) -> Vec<UpstreamView> {
        let here = self.upstreams.load();
        let gone = super::lock(&self.names).gone().filter_map(|upstream| upstream.view_as_gone()).collect::<Vec<_>>();
        here.iter().map(|upstream| upstream.view()).chain(gone).collect()
    }

    /// What does not work as it should.
    pub(super) fn degraded(&self) -> Vec<String> {
        let of_upstream = |view: UpstreamView| {
            let why = view.why?;
            Some(format!("the upstream {} is {} for {} s: {why}", view.address, view.state, view.since.unwrap_or(0)))
        };
        let upstreams = self.views().into_iter().filter_map(of_upstream);
        let names = super::lock(&self.names).complaints();
        let returns = self.returns.complaint();
        let all = upstreams.chain(names).chain(returns).chain(self.detours.complaint());
        all.map(|what| format!("service {}: {what}", self.name)).collect()
    }
}

/// Whether this host has no port left towards one upstream.
fn is_shortage_of_ports(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrNotAvailable | io::ErrorKind::AddrInUse)
}

/// Whether this host has no more ports, descriptors or memory.
fn is_shortage(error: &io::Error) -> bool {
    const SHORTAGES: [i32; 7] =
        [libc::EAGAIN, libc::EADDRINUSE, libc::EADDRNOTAVAIL, libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM];
    is_shortage_of_ports(error) || error.raw_os_error().is_some_and(|code| SHORTAGES.contains(&code))
}
