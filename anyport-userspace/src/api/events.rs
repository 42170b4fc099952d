//! `GET /v1/events`: the request, the events as JSON lines, and the stream that sends them.

use std::{
    convert::Infallible,
    net::SocketAddr,
    num::{NonZeroU16, NonZeroU32},
    time::Duration,
};

use anyport_common::event::{ASSIGN_ERROR, DENIED, Event, NO_SOCKET, STEERED};
use axum::{
    body::{Body, Bytes},
    http::header::CONTENT_TYPE,
    response::{IntoResponse, Response},
};
use futures_util::stream;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::{Kind, Problem, Shared};
use crate::{
    engine::Clock,
    events::Listener,
    rules::{Prefix, Protocol, ServiceName},
};

/// Events that are sent at once.
const BATCH: usize = 256;
/// How often it is told what was missed, if nothing else is.
const INTERVAL: Duration = Duration::from_secs(1);

/// Query of `GET /v1/events`: which connections and flows to tell.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
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
    /// Checks what the types leave open.
    ///
    /// # Errors
    /// No packet can be so.
    pub fn validate(&self) -> Result<(), Problem> {
        match (self.prefix, self.source) {
            (Some(prefix), Some(source)) if prefix.is_ipv4() != source.is_ipv4() => Err(Problem::new(
                Kind::Invalid,
                format!("no packet goes from {source} to {prefix}: the two must be of the same IP version"),
            )),
            _ => Ok(()),
        }
    }
}

/// Which outcomes to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventView {
    /// When the packet was judged, by RFC 3339, in UTC.
    pub time: String,
    /// `tcp` or `udp`.
    pub protocol: Protocol,
    /// The client.
    pub from: SocketAddr,
    /// What it dialled.
    pub to: SocketAddr,
    /// What became of the packet.
    pub outcome: Outcome,
    /// The service that the rule names; nothing if the rule has gone since and the service with it.
    pub service: Option<ServiceName>,
    /// The prefix of the rule that decided; nothing if it has gone since.
    pub prefix: Option<Prefix>,
}

/// What becomes of a first packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Told {
    /// What was listened for.
    Event(EventView),
    /// So many events are lost, since they came faster than they were taken.
    Missed {
        /// How many more than those that were told before.
        missed: u64,
    },
    /// Something about all events.
    Note {
        /// In words.
        note: String,
    },
}

/// Answers with events as they come, until the client goes or the daemon ends.
pub(super) async fn tell(engine: Shared, request: Listen) -> Result<Response, Problem> {
    request.validate()?;
    let (listener, note) = {
        let engine = engine.lock().await;
        let engine = engine.as_ref().ok_or_else(super::stopping)?;
        (engine.listen(&request)?, engine.note_on_events())
    };
    // At once, so that whoever asked knows that it has begun.
    let first = note.iter().map(line).collect::<String>() + "\n";
    let telling = Telling { engine, listener, request, first: Some(first) };
    let lines = stream::unfold(telling, |mut telling| async {
        let lines = telling.next().await?;
        Some((Ok::<_, Infallible>(Bytes::from(lines)), telling))
    });
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

struct Telling {
    engine: Shared,
    listener: Listener,
    request: Listen,
    first: Option<String>,
}

impl Telling {
    /// The next lines; nothing when the daemon ends.
    async fn next(&mut self) -> Option<String> {
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        loop {
            let mut events: Vec<Event> = Vec::new();
            if let Ok(event) = timeout(INTERVAL, self.listener.next()).await {
                events.push(event?);
                events.extend(std::iter::from_fn(|| self.listener.try_next()).take(BATCH - 1));
            }
            let missed = Some(self.listener.missed()).filter(|it| *it > 0);
            let mut lines: String = missed.map(|missed| line(&Told::Missed { missed })).into_iter().collect();
            let engine = self.engine.lock().await;
            let (engine, clock) = (engine.as_ref()?, Clock::now());
            let views = events.iter().filter_map(|event| engine.describe(event, &self.request, &clock));
            lines.extend(views.map(|view| line(&Told::Event(view))));
            if !lines.is_empty() {
                return Some(lines);
            }
        }
    }
}

fn line(told: &Told) -> String {
    // These types are all text and numbers.
    serde_json::to_string(told).unwrap_or_default() + "\n"
}
