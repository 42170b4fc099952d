//! `GET /v1/events`: events as they come, a line of JSON each.

use std::{collections::HashSet, convert::Infallible, time::Duration};

use anyport_common::event::Event;
use axum::{
    body::{Body, Bytes},
    http::header::CONTENT_TYPE,
    response::{IntoResponse as _, Response},
};
use tokio::{
    sync::broadcast::{Receiver, error::RecvError},
    time::timeout,
};

use crate::{
    api::{EventLine, Listen, Problem},
    engine::{Clock, Shared},
    events::{ChangeView, Subscriber},
};

/// Events that are sent at once.
const BATCH: usize = 256;
/// How often a subscriber is told how many events it missed, if no events come.
const INTERVAL: Duration = Duration::from_secs(1);

/// Answers with events as they come, until the client goes or the daemon ends.
pub(super) fn stream(engine: Shared, request: Listen) -> Result<Response, Problem> {
    request.validate()?;
    let shown = engine.shown()?;
    let (listener, note) = (shown.listen(&request)?, shown.note_on_events());
    // At once, so that the client knows that the subscription has begun.
    let first = note.iter().map(line).collect::<String>() + "\n";
    let changes = request.is_about_all().then(|| shown.changes());
    let events = EventStream { engine, listener, changes, request, first: Some(first), told: HashSet::new() };
    let lines = futures_util::stream::unfold(events, |mut events| async {
        let lines = events.next().await?;
        Some((Ok::<_, Infallible>(Bytes::from(lines)), events))
    });
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

struct EventStream {
    engine: Shared,
    listener: Subscriber,
    changes: Option<Receiver<ChangeView>>,
    request: Listen,
    first: Option<String>,
    /// What was told of the host.
    told: HashSet<String>,
}

impl EventStream {
    /// The next lines; nothing when the daemon ends.
    async fn next(&mut self) -> Option<String> {
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        loop {
            let mut events: Vec<Event> = Vec::new();
            let Self { listener, changes, .. } = self;
            let news = async {
                tokio::select! {
                    event = listener.next() => News::Event(event),
                    change = next(changes) => News::Change(change),
                }
            };
            match timeout(INTERVAL, news).await {
                Ok(News::Event(event)) => {
                    events.push(event?);
                    events.extend(std::iter::from_fn(|| self.listener.try_next()).take(BATCH - 1));
                }
                Ok(News::Change(change)) => return Some(line(&change?)),
                Err(_) => {}
            }
            let missed = Some(self.listener.missed()).filter(|it| *it > 0);
            let mut lines: String = missed.map(|missed| line(&EventLine::Missed { missed })).into_iter().collect();
            // Without waiting for a command: events come while one is carried out, too.
            let (shown, clock) = (self.engine.shown().ok()?, Clock::now());
            lines.extend(shown.notes_on_host(&mut self.told).iter().map(line));
            let views = events.iter().filter_map(|event| shown.describe(event, &self.request, &clock));
            lines.extend(views.map(|view| line(&EventLine::Event(view))));
            if !lines.is_empty() {
                return Some(lines);
            }
        }
    }
}

/// What has come.
enum News {
    /// Nothing when the daemon ends.
    Event(Option<Event>),
    Change(Option<EventLine>),
}

/// The next change, for those who hear of changes.
async fn next(changes: &mut Option<Receiver<ChangeView>>) -> Option<EventLine> {
    match changes {
        None => std::future::pending().await,
        Some(changes) => match changes.recv().await {
            Ok(change) => Some(EventLine::Change(change)),
            Err(RecvError::Lagged(missed)) => Some(EventLine::Missed { missed }),
            Err(RecvError::Closed) => None,
        },
    }
}

fn line(event: &EventLine) -> String {
    // These types are all text and numbers.
    serde_json::to_string(event).unwrap_or_default() + "\n"
}
