use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{Kind, Problem};
use crate::{
    rules::{Origin, PortSet, Prefix, Protocol, Rule, ServiceName},
    service::{HandlerKind, ServiceStats, SocketInfo},
    steering::BackEnd,
};

/// Bytes of the largest body. Most requests are a few lines.
pub(super) const MAX_BODY: usize = 1 << 20;

/// The problem of a request beyond [`MAX_BODY`].
pub(super) fn too_large(error: String) -> Problem {
    Problem::new(Kind::TooLarge, error).hint(format!("{MAX_BODY} bytes are the limit; send several requests"))
}

/// Reads a request's body.
///
/// # Errors
/// The body is not JSON of that shape: says where and why.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    serde_json::from_slice(body).map_err(|error| {
        Problem::new(Kind::Invalid, format!("read the body of the request: {error}"))
            .hint("docs/api.md describes the requests")
    })
}

/// Body of `POST /v1/prefixes`: one rule for each of the prefixes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddPrefixes {
    /// All of them are added, or none.
    pub prefixes: Vec<Prefix>,
    /// Transports to steer.
    #[serde(default)]
    pub protocol: Protocol,
    /// Ports to steer.
    #[serde(default = "PortSet::all")]
    pub ports: PortSet,
    /// Ports to leave to the host.
    #[serde(default)]
    pub except: PortSet,
    /// Who receives.
    #[serde(default = "ServiceName::default_service")]
    pub service: ServiceName,
    /// Whether to make the prefixes local.
    #[serde(default = "yes")]
    pub route: bool,
    /// Whether to go on although listening sockets are shadowed or the host may be cut off.
    #[serde(default)]
    pub force: bool,
}

fn yes() -> bool {
    true
}

/// Body of `DELETE /v1/prefixes`: every rule of exactly these prefixes that matches what else is given.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemovePrefixes {
    /// Each of them must have a rule that matches.
    pub prefixes: Vec<Prefix>,
    /// Only rules with this protocol.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// Only rules with these ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<PortSet>,
    /// Only rules with these exceptions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub except: Option<PortSet>,
    /// Only rules that steer to this service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceName>,
}

impl RemovePrefixes {
    /// Whether a rule is meant.
    pub fn selects(&self, rule: &Rule) -> bool {
        self.prefixes.contains(&rule.prefix)
            && self.protocol.is_none_or(|it| it == rule.protocol)
            && self.ports.as_ref().is_none_or(|it| *it == rule.ports)
            && self.except.as_ref().is_none_or(|it| *it == rule.except)
            && self.service.as_ref().is_none_or(|it| *it == rule.service)
    }
}

/// Answer to a change.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Changed {
    /// The generation that the kernel holds now.
    pub generation: u64,
    /// How many rules or services were added or removed; 0 if all was so already.
    pub changed: usize,
    /// What the caller should know although it worked.
    pub notes: Vec<String>,
}

/// A rule and what became of its packets.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PrefixView {
    /// The prefix.
    pub prefix: Prefix,
    /// The transports.
    pub protocol: Protocol,
    /// Steered ports.
    pub ports: PortSet,
    /// Ports left to the host.
    pub except: PortSet,
    /// Who receives.
    pub service: ServiceName,
    /// Whether anyport keeps a local route for the prefix.
    pub route: bool,
    /// Where the rule came from.
    pub origin: Origin,
    /// Packets that were handed to the service's socket: the first of each connection, and each datagram.
    pub steered: u64,
    /// Packets dropped since the service had no live socket or the kernel would not assign it.
    pub dropped: u64,
}

/// A service, its sockets and what it did.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServiceView {
    /// Its name.
    pub name: ServiceName,
    /// What it does with what it accepts.
    pub handler: HandlerKind,
    /// What `discard` sends first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub banner: Option<String>,
    /// Where it came from.
    pub origin: Origin,
    /// Number of rules that steer to it.
    pub rules: usize,
    /// Its sockets.
    pub sockets: Vec<SocketInfo>,
    /// What it did.
    #[serde(flatten)]
    pub stats: ServiceStats,
}

/// Answer of `GET /v1/status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StatusView {
    /// The daemon's version.
    pub version: String,
    /// The process that accepts.
    pub pid: u32,
    /// The back end in use.
    pub backend: BackEnd,
    /// All back ends, and why each is used or not.
    pub backends: Vec<BackEndView>,
    /// The generation that the kernel holds.
    pub generation: u64,
    /// Sockets in each group.
    pub workers: usize,
    /// Number of rules.
    pub rules: usize,
    /// Number of services.
    pub services: usize,
    /// Interfaces that are watched, where the back end works by interface.
    pub interfaces: Vec<String>,
    /// Addresses whose local route stays for connections that outlive their rule.
    pub draining: Vec<Prefix>,
    /// Sums over all rules and services.
    pub totals: Totals,
    /// What does not work as it should; empty when all is well.
    pub degraded: Vec<String>,
}

/// Sums for [`StatusView`].
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Totals {
    /// As [`PrefixView::steered`].
    pub steered: u64,
    /// As [`PrefixView::dropped`].
    pub dropped: u64,
    /// Connections that are open.
    pub active: u64,
}

/// A back end and why it is used or not.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BackEndView {
    /// Which one.
    pub name: BackEnd,
    /// Whether it works here; nothing if it was not tried.
    pub usable: Option<bool>,
    /// Why.
    pub reason: String,
}
