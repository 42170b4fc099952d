//! Requests for events, and the lines of the answer.

use std::{
    net::SocketAddr,
    num::{NonZeroU16, NonZeroU32},
};

use anyport_common::event::{ASSIGN_ERROR, DENIED, NO_SOCKET, STEERED};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Problem, ProblemKind};
use crate::{
    events::ChangeView,
    rules::{Prefix, Protocol, ServiceName},
};

/// Query of `GET /v1/events`: which connections and flows to publish.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    /// Those to addresses of this prefix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix: Option<Prefix>,
    /// Those of clients with such an address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Prefix>,
    /// Those over these transports.
    #[serde(default = "both")]
    pub protocol: Protocol,
    /// Those to this port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<NonZeroU16>,
    /// Those that rules steer to this service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceName>,
    /// Those of which this became.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Wanted>,
    /// One of so many, chosen at random.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample: Option<NonZeroU32>,
}

fn both() -> Protocol {
    Protocol::Both
}

impl Listen {
    /// Whether it is about everything, so that changes are told, too.
    pub fn is_about_all(&self) -> bool {
        let Self { prefix, source, protocol, port, service, outcome, sample: _ } = self;
        let is_narrowed = prefix.is_some() || source.is_some() || port.is_some() || service.is_some();
        !is_narrowed && outcome.is_none() && *protocol == Protocol::Both
    }

    /// Checks what the types leave open.
    ///
    /// # Errors
    /// No packet can be so.
    pub fn validate(&self) -> Result<(), Problem> {
        match (self.prefix, self.source) {
            (Some(prefix), Some(source)) if prefix.is_ipv4() != source.is_ipv4() => Err(Problem::new(
                ProblemKind::Invalid,
                format!("no packet goes from {source} to {prefix}: the two must be of the same IP version"),
            )),
            _ => Ok(()),
        }
    }
}

/// Which outcomes to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Wanted {
    /// What a socket got.
    Steered,
    /// What was refused or dropped.
    Dropped,
}

impl Wanted {
    /// As the programs know them.
    pub(crate) fn bits(self) -> u8 {
        match self {
            Self::Steered => STEERED,
            Self::Dropped => NO_SOCKET | ASSIGN_ERROR | DENIED,
        }
    }
}

/// A connection or a flow of datagrams has begun, or was kept from that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EventView {
    /// When the packet was judged, by RFC 3339, in UTC.
    pub time: String,
    /// `tcp` or `udp`.
    pub protocol: Protocol,
    /// The client.
    pub from: SocketAddr,
    /// The original destination.
    pub to: SocketAddr,
    /// What became of the packet.
    pub outcome: Outcome,
    /// The service that the rule names; nothing if the rule has gone since and the service with it.
    pub service: Option<ServiceName>,
    /// The prefix of the rule that decided; nothing if it has gone since.
    pub prefix: Option<Prefix>,
}

/// What becomes of a first packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// A socket of the service has it.
    Steered,
    /// Refused: the service has no socket for it.
    NoSocket,
    /// Refused: the service does not take its source.
    Denied,
    /// Dropped: the socket could not be assigned, such as for a fragment with `tc`.
    AssignError,
}

/// A line of `GET /v1/events`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum EventLine {
    /// An event that the request asks for.
    Event(EventView),
    /// A change of rules or services.
    Change(ChangeView),
    /// So many events are lost, since they came faster than they were taken.
    Missed {
        /// How many more than those that were reported before.
        missed: u64,
    },
    /// Something about all events, or what rules take from the host itself.
    Note {
        /// In words.
        note: String,
    },
}
