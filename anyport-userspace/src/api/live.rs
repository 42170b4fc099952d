//! What is watched while it happens.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{AnnounceState, AnnounceView, AnnouncedPrefix, DrainView, FleetView, StatusView, Totals, advice};
use crate::{
    back_end::BackEnd,
    rules::{Protocol, ServiceName},
    service::{HandlerKind, UpstreamState},
};

/// How many drains and announced prefixes are named.
const NAMED: usize = 100;

/// Answer of `GET /v1/live`: counts, and rates since they were counted before.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct LiveView {
    /// The daemon's version.
    pub version: String,
    /// The process that accepts.
    pub pid: u32,
    /// The back end in use.
    pub backend: BackEnd,
    /// The generation that the kernel holds.
    pub generation: u64,
    /// Number of rules.
    pub rules: usize,
    /// Why clients had better go elsewhere, if they had.
    pub unready: Option<String>,
    /// What does not work as it should; empty when all is well.
    pub degraded: Vec<String>,
    /// How many seconds ago was counted.
    pub age: f64,
    /// How many seconds before that was counted before: over that time the rates are means. Nothing if it was never, and then there
    /// are no rates.
    pub window: Option<f64>,
    /// The services by name.
    pub services: Vec<LiveService>,
    /// The prefixes with the highest rates of packets, the highest first; then those with most packets.
    pub prefixes: Vec<LivePrefix>,
    /// How many prefixes are left out.
    pub prefixes_omitted: usize,
    /// What else `status` tells that is worth watching.
    #[serde(flatten)]
    pub node: LiveNode,
}

/// The state of the node beside what is steered, for [`LiveView`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct LiveNode {
    /// The host's name.
    pub host: String,
    /// What to do about each of what is degraded.
    pub advice: Vec<LiveAdvice>,
    /// How many rules there may be.
    pub max_rules: usize,
    /// File descriptors that clients may take.
    pub client_descriptors: usize,
    /// How many of them they take.
    pub client_descriptors_in_use: usize,
    /// Seconds until what was applied is rolled back, if it waits to be confirmed.
    pub unconfirmed: Option<u64>,
    /// Sums since the daemon's start.
    pub totals: Totals,
    /// What is drained.
    pub drained: Vec<DrainView>,
    /// Where this node stands in its fleet, if it belongs to one.
    pub fleet: Option<FleetView>,
    /// What is announced, where something is to be.
    pub announce: Option<LiveAnnounce>,
}

/// What to do about something, for [`LiveNode`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LiveAdvice {
    /// In a few words.
    pub action: String,
    /// The document that has more.
    pub document: String,
}

/// What is announced, for [`LiveNode`].
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct LiveAnnounce {
    /// Whether the router knows.
    pub told: bool,
    /// How many prefixes are announced.
    pub announced: usize,
    /// How many prefixes may be.
    pub all: usize,
    /// The first of those that are not announced, then of the others.
    pub prefixes: Vec<AnnouncedPrefix>,
}

impl LiveNode {
    /// Of a host with this name.
    pub(crate) fn new(host: String, status: &StatusView) -> Self {
        let advice = status.degraded.iter().map(|it| {
            let (action, document) = advice(it);
            LiveAdvice { action: action.to_owned(), document: document.to_owned() }
        });
        Self {
            host,
            advice: advice.collect(),
            max_rules: status.max_rules,
            client_descriptors: status.client_descriptors,
            client_descriptors_in_use: status.client_descriptors_in_use,
            unconfirmed: status.unconfirmed,
            totals: status.totals,
            drained: status.drained.iter().take(NAMED).cloned().collect(),
            fleet: status.fleet.clone(),
            announce: status.announce.as_ref().map(LiveAnnounce::new),
        }
    }
}

impl LiveAnnounce {
    fn new(view: &AnnounceView) -> Self {
        let (announced, others): (Vec<_>, Vec<_>) =
            view.prefixes.iter().partition(|it| it.state == AnnounceState::Announced);
        Self {
            told: view.told,
            announced: announced.len(),
            all: view.prefixes.len(),
            prefixes: others.into_iter().chain(announced).take(NAMED).cloned().collect(),
        }
    }
}

/// A service, for [`LiveView`].
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct LiveService {
    /// Its name.
    pub name: ServiceName,
    /// What it does with what it accepts.
    pub handler: HandlerKind,
    /// Number of rules that steer to it.
    pub rules: usize,
    /// Number of its sockets.
    pub sockets: usize,
    /// Connections that are open.
    pub active: u64,
    /// Counted since the daemon's start.
    pub counts: ServiceCounts<u64>,
    /// In a second.
    pub rates: Option<ServiceCounts<f64>>,
    /// Where `forward` connects clients to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub upstreams: Vec<LiveUpstream>,
}

/// An upstream, for [`LiveService`].
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct LiveUpstream {
    /// `ADDR:PORT`, or `ADDR:*`.
    pub address: String,
    /// Whether clients are connected to it.
    pub state: UpstreamState,
    /// Why it is not up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Connections that are open.
    pub active: u64,
    /// Connections that came to be.
    #[serde(default)]
    pub connections: u64,
    /// Connections that did not.
    #[serde(default)]
    pub failures: u64,
}

/// A prefix, as far as its rules steer a protocol to a service.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct LivePrefix {
    /// The prefix.
    pub prefix: String,
    /// The transports.
    pub protocol: Protocol,
    /// Who receives.
    pub service: ServiceName,
    /// Counted since the rules were made.
    pub counts: PrefixCounts<u64>,
    /// In a second.
    pub rates: Option<PrefixCounts<f64>>,
}

/// What is counted for a service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "ServiceCounts_{T}", bound = "T: JsonSchema + Default + Serialize")]
pub struct ServiceCounts<T> {
    /// Packets that its rules handed to it: the first of each connection, and each datagram.
    pub steered: T,
    /// Packets of its rules that were dropped, for whichever of the following three reasons.
    pub dropped: T,
    /// Dropped since it had no live socket.
    #[serde(default)]
    pub no_socket: T,
    /// Dropped since the kernel would not assign its socket.
    #[serde(default)]
    pub assign_error: T,
    /// Dropped since it does not take their source.
    #[serde(default)]
    pub denied: T,
    /// Attempts to connect and datagrams that the kernel dropped since the queue of its socket was full.
    #[serde(default)]
    pub full_queues: T,
    /// Connections accepted, those that were then refused included.
    pub accepted: T,
    /// Connections and flows refused: over a limit, or of a source that it does not take.
    pub refused: T,
    /// Datagrams received.
    pub datagrams: T,
    /// Bytes of clients.
    pub bytes_from_clients: T,
    /// Bytes for clients.
    pub bytes_to_clients: T,
}

/// What is counted for a prefix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "PrefixCounts_{T}")]
pub struct PrefixCounts<T> {
    /// Packets that its rules handed to the service.
    pub steered: T,
    /// Packets of its rules that were dropped.
    pub dropped: T,
}

impl ServiceCounts<u64> {
    /// How much these have risen since `before`, in a second.
    pub(crate) fn rates_since(&self, before: &Self, seconds: f64) -> ServiceCounts<f64> {
        let rate = |count: fn(&Self) -> u64| rate(count(self), count(before), seconds);
        ServiceCounts {
            steered: rate(|it| it.steered),
            dropped: rate(|it| it.dropped),
            no_socket: rate(|it| it.no_socket),
            assign_error: rate(|it| it.assign_error),
            denied: rate(|it| it.denied),
            full_queues: rate(|it| it.full_queues),
            accepted: rate(|it| it.accepted),
            refused: rate(|it| it.refused),
            datagrams: rate(|it| it.datagrams),
            bytes_from_clients: rate(|it| it.bytes_from_clients),
            bytes_to_clients: rate(|it| it.bytes_to_clients),
        }
    }
}

impl PrefixCounts<u64> {
    /// As [`ServiceCounts::rates_since`].
    pub(crate) fn rates_since(&self, before: &Self, seconds: f64) -> PrefixCounts<f64> {
        PrefixCounts {
            steered: rate(self.steered, before.steered, seconds),
            dropped: rate(self.dropped, before.dropped, seconds),
        }
    }

    /// All packets.
    pub(crate) fn packets(&self) -> u64 {
        self.steered.saturating_add(self.dropped)
    }
}

/// How much a count has risen. One that is lower than before was reset since.
pub(crate) fn increase(now: u64, before: u64) -> u64 {
    now.checked_sub(before).unwrap_or(now)
}

fn rate(now: u64, before: u64, seconds: f64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "beyond 2^53 a rate need not be exact")]
    let rate = increase(now, before) as f64 / seconds;
    // Nobody wants to read more digits.
    (rate * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::PrefixCounts;

    #[test]
    fn rates_are_never_negative() {
        let now = PrefixCounts { steered: 30, dropped: 5 };
        let rates = now.rates_since(&PrefixCounts { steered: 10, dropped: 7 }, 1.5);
        assert_eq!(rates, PrefixCounts { steered: 13.333, dropped: 3.333 });
    }
}
