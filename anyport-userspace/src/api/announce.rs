//! Views of announced prefixes and of drains.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::LONGEST_WAIT;
use crate::rules::{Prefix, ServiceName};

/// Seconds that a drain waits for the routers of others.
const DEFAULT_WAIT: u64 = 30;

/// What is announced, in [`super::StatusView`].
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct AnnounceView {
    /// The file that the router reads.
    pub file: PathBuf,
    /// The control socket by which it is told to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reload: Option<PathBuf>,
    /// Whether the router knows; if not, `degraded` has the reason.
    pub told: bool,
    /// How many times prefixes were announced and withdrawn, by this process.
    pub announcements: u64,
    /// As above.
    pub withdrawals: u64,
    /// The prefixes that may be announced.
    pub prefixes: Vec<AnnouncedPrefix>,
}

/// What becomes of a prefix.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct AnnouncedPrefix {
    /// Which one.
    pub prefix: Prefix,
    /// Whether it is announced, or what kind of reason there is if not.
    pub state: AnnounceState,
    /// Since when, by RFC 3339.
    pub since: String,
    /// Why it is not served, or was not before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// What becomes of a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AnnounceState {
    /// It is announced.
    Announced,
    /// It is served, but not for long enough.
    Held,
    /// It is not served.
    Unserved,
    /// It is drained.
    Drained,
}

/// Body of `POST /v1/drain`: what is not to be served any more, which is the whole node if neither is given.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DrainRequest {
    /// What steers to this service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceName>,
    /// What is steered inside of these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prefixes: Vec<Prefix>,
    /// Seconds from the withdrawal until new connections are refused.
    #[serde(default = "default_wait")]
    #[schemars(range(max = LONGEST_WAIT))]
    pub wait: u64,
}

/// Body of `DELETE /v1/drain`: what is to be served again, which is everything if neither is given.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Undrain {
    /// As it was drained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceName>,
    /// As they were drained.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub prefixes: Vec<Prefix>,
}

/// Something that is drained: what steers to a service, what is steered inside of a prefix, or, without both, the whole node.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct DrainView {
    /// To which service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceName>,
    /// Inside of which prefix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix: Option<Prefix>,
    /// How far it is.
    pub state: DrainState,
    /// Seconds until new connections are refused, while it waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left: Option<u64>,
    /// Why the router has not been told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Connections, and connected flows of datagrams, that are open still. Only where they are asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<u64>,
}

/// How far a drain is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DrainState {
    /// The router has not been told yet.
    Withdrawing,
    /// Others take notice meanwhile.
    Waiting,
    /// New connections are refused.
    Refusing,
}

fn default_wait() -> u64 {
    DEFAULT_WAIT
}
