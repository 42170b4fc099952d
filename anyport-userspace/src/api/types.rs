//! The types of the control API's requests and answers, and the limits of their sizes.

use std::{num::NonZeroU16, path::PathBuf, time::Duration};

use nix::time::{ClockId, clock_gettime};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{AnnounceView, DrainView, Problem, ProblemKind};
use crate::{
    plain_words::plain,
    rules::{Origin, PortSet, Prefix, Protocol, RuleSpec, ServiceName, with_terms},
    service::{HandlerKind, Limits, Mark, Registrant, ServiceStats, SocketInfo, UpstreamView},
    steering::{self, BackEnd},
};

/// Bytes of the largest body. Most requests are a few lines.
pub(crate) const MAX_BODY: usize = 1 << 20;

/// Bytes of the largest file that can be applied.
pub(crate) const MAX_FILE: usize = 256 << 20;

/// Seconds that a request can have the daemon wait at most.
pub(crate) const LONGEST_WAIT: u64 = 24 * 60 * 60;

/// Header with the id that a client gives to a command, by which its outcome is remembered.
pub(crate) const ID_HEADER: &str = "x-anyport-request";
/// Header of a command that is asked for again: when it was asked for first, see [`since_boot`].
pub(crate) const FIRST_HEADER: &str = "x-anyport-first";

/// Milliseconds since the host was started (`CLOCK_BOOTTIME`), which the processes at both ends of a Unix socket see alike.
pub(crate) fn since_boot() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// The problem of a request beyond its limit.
pub(crate) fn too_large(error: String, limit: usize) -> Problem {
    Problem::new(ProblemKind::TooLarge, error).hint(format!("{limit} bytes are the limit; send several requests"))
}

/// Reads a request's body.
///
/// # Errors
/// The body is not JSON of that shape: says where and why.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    let invalid = |why: &str| {
        Problem::new(ProblemKind::Invalid, format!("read the body of the request: {why}"))
            .hint("docs/api.md describes the requests")
    };
    // serde reads the fields of a struct from a list, too: an empty one would be a request in which everything is left out.
    if body.trim_ascii_start().starts_with(b"[") {
        return Err(invalid("it is a list; requests are objects, in braces"));
    }
    serde_json::from_slice(body).map_err(|error| invalid(&plain(&error.to_string())))
}

with_terms! {
    /// Body of `POST /v1/prefixes`: one rule for each of the prefixes.
    pub struct AddPrefixes {
        /// All of them are added, or none.
        #[schemars(length(min = 1))]
        pub prefixes: Vec<Prefix>,
        ..RuleSpec,
        /// Whether to go on although listening sockets are shadowed or the host may be cut off.
        #[serde(default)]
        pub force: bool,
    }
}

/// Body of `DELETE /v1/prefixes`: every rule of exactly these prefixes that matches what else is given.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RemovePrefixes {
    /// Each of them must have a rule that matches.
    #[schemars(length(min = 1))]
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
    /// Only rules about these clients.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Prefix>,
    /// Only rules that steer to this service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceName>,
}

impl RemovePrefixes {
    /// Whether a rule of one of the prefixes is meant.
    pub fn selects(&self, terms: &RuleSpec) -> bool {
        self.protocol.is_none_or(|it| it == terms.protocol)
            && self.ports.as_ref().is_none_or(|it| *it == terms.ports)
            && self.except.as_ref().is_none_or(|it| *it == terms.except)
            && self.source.is_none_or(|it| terms.source == Some(it))
            && self.service.as_ref().is_none_or(|it| *it == terms.service)
    }
}

/// Query of `POST /v1/apply`; its body is the file.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Apply {
    /// Say what would change, and change nothing.
    pub dry_run: bool,
    /// Go back to what was before unless `POST /v1/confirm` follows within so many seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = LONGEST_WAIT))]
    pub confirm: Option<u64>,
    /// Remove the rules that were added by hand, too.
    pub prune: bool,
    /// Go on although most of the rules go, listening sockets are shadowed or the host may be cut off.
    pub force: bool,
}

/// Answer of `POST /v1/apply`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct Applied {
    /// Whether nothing has changed since only the difference was asked for.
    pub dry_run: bool,
    /// The generation that the kernel holds now.
    pub generation: u64,
    /// Rules that have come, or would come.
    pub added: usize,
    /// Rules that have gone, or would go.
    pub removed: usize,
    /// Rules of the file that were active already.
    pub unchanged: usize,
    /// Rules of the configuration that stay beside those of the file.
    pub kept_of_config: usize,
    /// Rules of the fleet that stay beside those of the file.
    #[serde(default)]
    pub kept_of_fleet: usize,
    /// Rules that were added by hand and stay beside those of the file.
    pub kept_added: usize,
    /// Services that come (`+ name`), go (`- name`) or get other settings (`~ name`).
    pub services: Vec<String>,
    /// After a dry run: a line for each rule that would come (`+ rule`) or go (`- rule`), in order of precedence.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub difference: Vec<String>,
    /// Seconds within which it has to be confirmed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirm_within: Option<u64>,
    /// What the caller should know although it worked.
    pub notes: Vec<String>,
}

/// Query of `POST /v1/reload`, which reads the configuration file again.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Reload {
    /// Say what would change, and change nothing.
    pub dry_run: bool,
    /// Go on although most of the rules go, listening sockets are shadowed or the host may be cut off.
    pub force: bool,
}

/// Answer of `POST /v1/reload`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct Reloaded {
    /// As [`Applied::dry_run`].
    pub dry_run: bool,
    /// As [`Applied::generation`].
    pub generation: u64,
    /// As [`Applied::added`].
    pub added: usize,
    /// As [`Applied::removed`].
    pub removed: usize,
    /// As [`Applied::unchanged`].
    pub unchanged: usize,
    /// As [`Applied::services`].
    pub services: Vec<String>,
    /// Settings of `[daemon]` that have changed, or would (`name: before -> after`).
    pub settings: Vec<String>,
    /// Those that differ from what is active and take a restart.
    pub takes_restart: Vec<String>,
    /// As [`Applied::difference`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub difference: Vec<String>,
    /// As [`Applied::notes`].
    pub notes: Vec<String>,
}

/// Answer of `GET /v1/progress`: what a long command is doing; all empty where none is under way.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct ProgressView {
    /// In words.
    pub doing: String,
    /// Which step this is, from 1 on.
    pub step: u32,
    /// How many there are.
    pub steps: u32,
}

/// A rule and what became of its packets, in texts of the JSON: there may be a million of them.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct PrefixView<'a> {
    /// The prefix.
    pub prefix: &'a str,
    /// The transports.
    pub protocol: Protocol,
    /// Steered ports.
    pub ports: &'a str,
    /// Ports left to the host.
    pub except: &'a str,
    /// The clients that are steered; all of them if there is none.
    #[serde(default, borrow, skip_serializing_if = "Option::is_none")]
    pub source: Option<&'a str>,
    /// Who receives.
    pub service: &'a str,
    /// Whether anyport keeps a local route for the prefix.
    pub route: bool,
    /// Where the rule came from.
    pub origin: Origin,
    /// Packets that were handed to the service's socket: the first of each connection, and each datagram.
    pub steered: u64,
    /// Packets dropped since the service had no live socket, the kernel would not assign it, or the service does not take
    /// their source.
    pub dropped: u64,
    /// Of these, those for which there was no live socket.
    pub no_socket: u64,
    /// Of these, those whose source the service does not take.
    pub denied: u64,
    /// Whether it is drained: new connections are refused, or will be.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub drained: bool,
}

/// Query of `GET /v1/prefixes`: which rules to list.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ListPrefixes {
    /// Only rules of prefixes inside of this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within: Option<Prefix>,
    /// Only rules that steer to this service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceName>,
    /// Only rules that match this port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<NonZeroU16>,
    /// Only rules of prefixes behind this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Prefix>,
    /// No more rules than this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
}

/// A service, its sockets and what it did.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct ServiceView {
    /// Its name.
    pub name: ServiceName,
    /// What it does with what it accepts.
    pub handler: HandlerKind,
    /// What `discard` sends first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub banner: Option<String>,
    /// Who may register sockets for `registered`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub owners: Vec<Registrant>,
    /// Who receives what `registered` has no live socket for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<ServiceName>,
    /// Its limits on connections.
    #[serde(flatten)]
    pub limits: Limits,
    /// The mark of what it answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<Mark>,
    /// The sources that it takes, if it does not take all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub source_allow: Vec<Prefix>,
    /// The sources that it does not take.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub source_deny: Vec<Prefix>,
    /// Where it came from.
    pub origin: Origin,
    /// Number of rules that steer to it.
    pub rules: usize,
    /// Packets that its rules handed to it.
    pub steered: u64,
    /// Packets of its rules that were dropped since it had no live socket.
    pub no_socket: u64,
    /// Packets of its rules that were dropped since the kernel would not assign its socket.
    pub assign_error: u64,
    /// Its sockets.
    pub sockets: Vec<SocketInfo>,
    /// Where `forward` connects clients to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub upstreams: Vec<UpstreamView>,
    /// What it did.
    #[serde(flatten)]
    pub stats: ServiceStats,
}

/// Answer of `GET /v1/status`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
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
    /// How many rules there may be.
    pub max_rules: usize,
    /// Bytes of the kernel's memory that rules and counters take.
    pub bytes: u64,
    /// Number of services.
    pub services: usize,
    /// File descriptors that clients may take: the limit of open files less what anyportd needs itself.
    #[serde(default)]
    pub client_descriptors: usize,
    /// How many of them they take.
    #[serde(default)]
    pub client_descriptors_in_use: usize,
    /// Interfaces that are watched, where the back end works by interface.
    pub interfaces: Vec<String>,
    /// Addresses whose local route stays for connections that outlive their rule.
    pub draining: Vec<Prefix>,
    /// Sums over all rules and services.
    pub totals: Totals,
    /// Seconds until what was applied is rolled back, if it waits to be confirmed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unconfirmed: Option<u64>,
    /// What others changed outside and was put right, by kind.
    #[serde(default)]
    pub mended: Vec<RepairView>,
    /// Where this node stands in its fleet, if it belongs to one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fleet: Option<FleetView>,
    /// What is announced, where something is to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub announce: Option<AnnounceView>,
    /// What is drained.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drained: Vec<DrainView>,
    /// What does not work as it should; empty when all is well.
    pub degraded: Vec<String>,
}

/// Where a node stands in its fleet.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct FleetView {
    /// The ring that it follows.
    pub ring: String,
    /// Its name in the fleet.
    pub node: String,
    /// Where etcd is asked.
    pub etcd: Vec<String>,
    /// Whether etcd answers.
    pub connected: bool,
    /// Seconds since it has answered last; nothing if it has not since the start.
    pub contact_age: Option<f64>,
    /// What keeps it from answering.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Why this node's report does not stand in etcd, or not as it should.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report_error: Option<String>,
    /// The sequence of the active pointer; 0 before the first.
    pub sequence: u64,
    /// The active set, by its hash.
    pub set: Option<String>,
    /// Since when it is, by RFC 3339.
    pub since: Option<String>,
    /// The highest sequence that was seen.
    pub seen: u64,
    /// Whether etcd answers and has no pointer of the ring.
    pub missing: bool,
    /// What the pointer leads to, if it is not followed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<RefusedView>,
}

/// A pointer that a node does not follow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RefusedView {
    /// Its sequence; nothing if it could not be read.
    pub sequence: Option<u64>,
    /// The set that it leads to.
    pub set: Option<String>,
    /// Why it is not followed.
    pub error: String,
    /// Since when, by RFC 3339.
    pub at: String,
}

/// Things of one kind that others changed and that were put right.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct RepairView {
    /// Which kind.
    pub kind: steering::ObjectKind,
    /// How often, since the process began to serve.
    pub times: u64,
    /// What it was the last time.
    pub last: String,
    /// When that was, by RFC 3339.
    pub at: String,
}

/// Sums for [`StatusView`].
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct Totals {
    /// As [`PrefixView::steered`].
    pub steered: u64,
    /// As [`PrefixView::dropped`].
    pub dropped: u64,
    /// As [`ServiceStats::denied`].
    pub denied: u64,
    /// Packets that no rule matches, of those that the back end sees.
    pub unmatched: u64,
    /// Connections that are open.
    pub active: u64,
    /// As [`ServiceStats::refused`].
    pub refused: u64,
    /// As [`ServiceStats::listen_drops`].
    pub listen_drops: u64,
    /// As [`ServiceStats::receive_drops`].
    pub receive_drops: u64,
    /// Attempts to connect that found a queue full, of any server of the host, since the daemon started.
    #[serde(default)]
    pub queue_full: u64,
    /// Packets of the host, answers among them, to which there was no route, since the daemon started.
    #[serde(default)]
    pub no_route: u64,
}

/// Which program is to serve from now on.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TakeOver {
    /// Its file, with the whole path.
    pub executable: PathBuf,
}

/// Answer to a takeover: another process serves from now on.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Taken {
    /// The process that has served so far.
    pub pid: u32,
}

/// A back end and why it is used or not.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct BackEndView {
    /// Which one.
    pub name: BackEnd,
    /// Whether it works here; nothing if it was not tried.
    pub usable: Option<bool>,
    /// Why.
    pub reason: String,
}

#[cfg(test)]
mod tests {
    use super::{AddPrefixes, parse};
    use crate::api::Undrain;

    #[test]
    fn requests_are_objects() {
        assert!(parse::<Undrain>(b" {}").is_ok());
        let problem = parse::<Undrain>(b" []").unwrap_err();
        assert!(problem.error.contains("requests are objects"), "{problem}");
    }

    #[test]
    fn json_of_added_prefixes() {
        let rest = "\"protocol\":\"both\",\"ports\":\"80,443\",\"except\":\"443\",\"source\":\"198.51.100.0/24\",\
                    \"service\":\"trap\",\"route\":false";
        let request = format!("{{\"prefixes\":[\"192.0.2.0/24\",\"203.0.113.7/32\"],{rest},\"force\":true}}");
        let read: AddPrefixes = serde_json::from_str(&request).unwrap();
        assert_eq!(serde_json::to_string(&read).unwrap(), request);

        let defaults =
            "\"protocol\":\"tcp\",\"ports\":\"1-65535\",\"except\":\"\",\"service\":\"default\",\"route\":true";
        let read: AddPrefixes = serde_json::from_str("{\"prefixes\":[]}").unwrap();
        assert_eq!(serde_json::to_string(&read).unwrap(), format!("{{\"prefixes\":[],{defaults},\"force\":false}}"));

        for (json, wanted) in [
            (
                "{\"prefixes\":[],\"port\":\"1\"}",
                "unknown field `port`, expected one of `prefixes`, `protocol`, `ports`, `except`, `source`, `service`, \
                 `route`, `force` at line 1 column 21",
            ),
            ("{}", "missing field `prefixes` at line 1 column 2"),
            ("{\"prefixes\":7}", "invalid type: integer `7`, expected a sequence at line 1 column 13"),
        ] {
            assert_eq!(serde_json::from_str::<AddPrefixes>(json).unwrap_err().to_string(), wanted);
        }
    }
}
