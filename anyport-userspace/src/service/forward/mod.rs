//! `forward`: clients are connected to upstreams.

mod client;
pub mod config;
mod connect;
mod detour;
mod flows;
pub mod header;
mod names;
mod pipe;
mod relay;
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

pub use self::upstream::{UpstreamState, UpstreamView};
pub(super) use self::{
    client::Client,
    relay::{Outcome, RelayEnd},
    udp::UdpForwarder,
    upkeep::keep_up,
};
use self::{
    config::ForwardConfig,
    detour::Detours,
    names::Names,
    transparent::Returns,
    upstream::{Balancer, Upstream},
};
use super::{ForwardGuard, datagram::Ends};

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
    pub(super) fn new(name: String, config: ForwardConfig, guard: ForwardGuard) -> Self {
        let mut names = Names::of(&config.upstreams);
        let upstreams = names.upstreams(&config.upstreams, &[]);
        Self {
            name,
            balancer: Balancer::default(),
            is_resolved: AtomicBool::new(names.is_empty() || !upstreams.is_empty()),
            upstreams: ArcSwap::from_pointee(upstreams),
            names: Mutex::new(names),
            resolved: Notify::new(),
            returns: Returns::default(),
            detours: Detours::new(guard),
            config,
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
        if is_shortage(error) {
            return;
        }
        if upstream.failed(error, self.config.ejection) {
            let time = self.config.ejection.time;
            tracing::warn!("service {}: the upstream {upstream} gets no clients for {time}: {error}", self.name);
        }
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

    /// What is known of the upstreams.
    pub(super) fn views(&self) -> Vec<UpstreamView> {
        self.upstreams.load().iter().map(|upstream| upstream.view()).collect()
    }

    /// What does not work as it should.
    pub(super) fn degraded(&self) -> Vec<String> {
        let of_upstream = |view: UpstreamView| {
            let why = view.why?;
            Some(format!("the upstream {} is {} since {} s: {why}", view.address, view.state, view.since.unwrap_or(0)))
        };
        let upstreams = self.views().into_iter().filter_map(of_upstream);
        let names = super::lock(&self.names).complaints();
        let returns = self.returns.complaint();
        let all = upstreams.chain(names).chain(returns).chain(self.detours.complaint());
        all.map(|what| format!("service {}: {what}", self.name)).collect()
    }
}

/// Whether this host has no more ports, descriptors or memory.
fn is_shortage(error: &io::Error) -> bool {
    const SHORTAGES: [i32; 7] =
        [libc::EAGAIN, libc::EADDRINUSE, libc::EADDRNOTAVAIL, libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM];
    error.raw_os_error().is_some_and(|code| SHORTAGES.contains(&code))
}
