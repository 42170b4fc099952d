//! `forward`: clients are connected to upstreams.

pub mod config;
mod connect;
mod flows;
mod header;
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
    time::Duration,
};

use anyport_common::flow::Transport;
use arc_swap::ArcSwap;
use tokio::{
    net::TcpStream,
    sync::Notify,
    time::{Instant, timeout},
};

pub use self::upstream::{UpstreamState, UpstreamView};
use self::{
    config::ForwardConfig,
    header::{LONGEST_READ, LONGEST_WRITTEN, Parsed},
    names::Names,
    relay::{Limits, relay, reset},
    transparent::Returns,
    upstream::{Balancer, Upstream},
};
pub(super) use self::{
    connect::set_up_listener,
    relay::{End, Outcome},
    udp::UdpForwarder,
    upkeep::keep_up,
};
use super::{datagram::Ends, descriptors::DescriptorPool};

/// How long a peer that has to send a PROXY header may take.
const HEADER_TIMEOUT: Duration = Duration::from_secs(3);

/// What all workers of one service share.
#[derive(Debug)]
pub(super) struct Forwarder {
    /// The service's name.
    name: String,
    config: ForwardConfig,
    upstreams: ArcSwap<Vec<Arc<Upstream>>>,
    balancer: Balancer,
    names: Mutex<Names>,
    /// Whether every name has been asked for once.
    is_resolved: AtomicBool,
    resolved: Notify,
    returns: Returns,
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
pub(super) struct Served {
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
        upstream.connected();
        Self(upstream)
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.closed();
    }
}

impl Forwarder {
    pub(super) fn new(name: String, config: ForwardConfig) -> Self {
        let names = Names::of(&config.upstreams);
        Self {
            name,
            upstreams: ArcSwap::from_pointee(names::upstreams(&config.upstreams, &names, &[])),
            balancer: Balancer::default(),
            is_resolved: AtomicBool::new(names.is_empty()),
            names: Mutex::new(names),
            resolved: Notify::new(),
            returns: Returns::default(),
            config,
        }
    }

    /// Serves one connection to its end. A client that can't be connected is reset.
    pub(super) async fn serve(&self, mut client: TcpStream, peer: Ends, pool: &DescriptorPool) -> Served {
        let mut first = Vec::new();
        let ends = match self.ends(&mut client, peer, &mut first).await {
            Ok(ends) => ends,
            Err(refusal) => {
                reset(&client);
                return Served { ends: peer, upstream: None, end: Err(refusal) };
            }
        };
        let (upstream, connected) = match self.connect(ends).await {
            Ok(connected) => connected,
            Err(refusal) => {
                reset(&client);
                return Served { ends, upstream: None, end: Err(refusal) };
            }
        };
        let mut header = 0;
        if let Some(version) = self.config.proxy_protocol {
            let mut told = Vec::with_capacity(LONGEST_WRITTEN + first.len());
            header::write(version, Transport::Tcp, ends, &mut told);
            header = told.len();
            told.append(&mut first);
            first = told;
        }
        let limits = Limits {
            idle: self.config.idle_timeout.0,
            end: self.config.max_duration.map(|longest| Instant::now() + longest.0),
        };
        let outcome = relay(client, upstream, first, header, limits, pool, &connected.0.traffic).await;
        Served { ends, upstream: Some(Arc::clone(&connected.0)), end: Ok(outcome) }
    }

    /// Who dialled what: by the word of the peer, if it is one of those that have to tell. What it sent behind that is
    /// put into `first`.
    async fn ends(&self, client: &mut TcpStream, peer: Ends, first: &mut Vec<u8>) -> Result<Ends, Refusal> {
        let address = peer.client.ip().to_canonical();
        if !self.config.accept_proxy.iter().any(|prefix| prefix.contains(address)) {
            return Ok(peer);
        }
        match timeout(HEADER_TIMEOUT, read_header(client, first)).await {
            Ok(Ok(told)) => Ok(told.unwrap_or(peer)),
            Ok(Err(error)) => Err(Refusal::Header(error)),
            Err(_) => Err(Refusal::Header(io::ErrorKind::TimedOut.into())),
        }
    }

    async fn connect(&self, ends: Ends) -> Result<(TcpStream, Connected), Refusal> {
        self.wait_for_names().await;
        let mut last = io::Error::other("none is up");
        // Allocated with the first failure only.
        let mut tried = Vec::new();
        while tried.len() <= self.config.retries as usize {
            let Some(upstream) = self.choose(ends, &tried) else { break };
            let to = upstream.target(ends.dialled.port());
            let source = self.config.transparent_source.then(|| ends.client.ip());
            match connect::connect(&self.config, to, source).await {
                Ok(stream) => return Ok((stream, Connected::to(upstream))),
                Err(error) => {
                    if source.is_some() && error.kind() == io::ErrorKind::TimedOut {
                        self.returns.doubt(to.ip(), ends.client.ip());
                    }
                    self.note_failure(&upstream, &error);
                    last = error;
                    tried.push(upstream);
                }
            }
        }
        Err(Refusal::Upstream(last))
    }

    fn choose(&self, ends: Ends, tried: &[Arc<Upstream>]) -> Option<Arc<Upstream>> {
        let is_allowed = |upstream: &Arc<Upstream>| {
            let can_have_source = upstream.address.is_ipv4() == ends.client.is_ipv4();
            // To dial what was dialled would come back here, for ever.
            let is_loop = upstream.target(ends.dialled.port()) == ends.dialled;
            !is_loop
                && (can_have_source || !self.config.transparent_source)
                && !tried.iter().any(|it| Arc::ptr_eq(it, upstream))
        };
        let upstreams = self.upstreams.load();
        self.balancer.choose(self.config.balance, ends.client.ip(), &upstreams, is_allowed).cloned()
    }

    fn note_failure(&self, upstream: &Upstream, error: &io::Error) {
        if upstream.failed(error, self.config.ejection) {
            let time = self.config.ejection.time;
            tracing::warn!("service {}: the upstream {upstream} gets no clients for {time}: {error}", self.name);
        }
    }

    /// A daemon that has just started may not have asked for the names yet.
    async fn wait_for_names(&self) {
        if !self.is_resolved.load(Relaxed) {
            let resolved = async {
                let mut resolved = std::pin::pin!(self.resolved.notified());
                resolved.as_mut().enable();
                if !self.is_resolved.load(Relaxed) {
                    resolved.await;
                }
            };
            // Without an answer the upstreams that are addresses have to do.
            timeout(self.config.connect_timeout.0, resolved).await.ok();
        }
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
        let all = upstreams.chain(names).chain(returns);
        all.map(|what| format!("service {}: {what}", self.name)).collect()
    }
}

/// Reads the header, and into `rest` what came behind it. No ends if the peer speaks for itself.
async fn read_header(client: &mut TcpStream, rest: &mut Vec<u8>) -> io::Result<Option<Ends>> {
    let mut bytes = Vec::with_capacity(LONGEST_READ);
    loop {
        client.readable().await?;
        match client.try_read_buf(&mut bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        }
        match header::parse(&bytes) {
            Ok(Parsed::Incomplete) => {}
            Ok(Parsed::Header { ends, length }) => {
                *rest = bytes.split_off(length);
                return Ok(ends);
            }
            Err(malformed) => return Err(io::Error::new(io::ErrorKind::InvalidData, malformed)),
        }
    }
}
