//! `anyportctl services`, `add-service` and `remove-service`.

use std::{borrow::Cow, collections::BTreeSet};

use super::{
    Output, completion,
    show::ago,
    table::{Column, Row, number, table, text},
    tone::Tone,
};
use crate::{
    api::{Changed, Client, Problem, ServiceView},
    rules::ServiceName,
    service::{ServiceConfig, ServiceTable, UpstreamState, UpstreamView},
};

/// Opens a new service, to which add-prefix --service can steer.
#[derive(Debug, clap::Args)]
pub(super) struct Add {
    #[command(flatten)]
    service: ServiceTable,
}

impl Add {
    pub(super) async fn run(self, client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
        let config = ServiceConfig::from(self.service);
        let done = format!("service {} is open", config.name);
        let answer: Changed = client.post("/v1/services", &config).await?;
        out.print_change(&answer, done)
    }
}

/// Closes a service. Its established connections go on.
#[derive(Debug, clap::Args)]
pub(super) struct Remove {
    /// Its name
    #[arg(add = completion::services())]
    name: ServiceName,
}

impl Remove {
    pub(super) async fn run(self, client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
        let answer: Changed = client.delete(&format!("/v1/services/{}", self.name), &()).await?;
        out.print_change(&answer, format!("service {} is closed", self.name))
    }
}

pub(super) async fn list(client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
    let views: Vec<ServiceView> = client.get("/v1/services").await?;
    let width = out.width();
    out.print(&views, |views| lists(views, width))
}

/// The services, and the upstreams of all of them.
pub(super) fn lists(views: &[ServiceView], width: Option<usize>) -> String {
    let mut text = table(&COLUMNS, views.iter().map(row), width);
    let upstreams = || views.iter().flat_map(|view| view.upstreams.iter().map(move |it| (view, it)));
    if upstreams().next().is_some() {
        text.push_str("\n\n");
        text.push_str(&table(&UPSTREAMS, upstreams().map(|(view, it)| upstream_row(view, it)), width));
    }
    text
}

const COLUMNS: [Column; 15] = [
    text("NAME"),
    text("HANDLER").rank(1),
    text("ORIGIN").rank(11),
    number("RULES").rank(9),
    number("SOCKETS").rank(10),
    number("STEERED"),
    number("NO-SOCKET").rank(6),
    number("UNASSIGNED").rank(8),
    number("DENIED").rank(7),
    number("ACTIVE"),
    number("ACCEPTED").rank(2),
    number("REFUSED").rank(3),
    number("DATAGRAMS").rank(4),
    number("ANSWERED").rank(5),
    text("PID").rank(12),
];

const UPSTREAMS: [Column; 9] = [
    text("SERVICE").rank(3),
    text("UPSTREAM"),
    text("STATE"),
    number("OPEN"),
    number("TOTAL").rank(4),
    number("FAILED").rank(2),
    number("BYTES-TO").rank(5),
    number("BYTES-FROM").rank(6),
    text("NOTE").rank(1).least(24),
];

fn row(view: &ServiceView) -> Row<'_, 15> {
    let cells = [
        view.name.to_string(),
        view.mark.map_or_else(|| view.handler.to_string(), |mark| format!("{} ({mark})", view.handler)),
        view.origin.to_string(),
        view.rules.to_string(),
        view.sockets.len().to_string(),
        view.steered.to_string(),
        view.no_socket.to_string(),
        view.assign_error.to_string(),
        view.stats.denied.to_string(),
        view.stats.active.to_string(),
        view.stats.accepted.to_string(),
        view.stats.refused().to_string(),
        view.stats.datagrams.to_string(),
        view.stats.answered.to_string(),
        pids(view),
    ];
    cells.map(Cow::from).into()
}

fn upstream_row<'a>(service: &ServiceView, view: &UpstreamView) -> Row<'a, 9> {
    let how_long = view.since.map(|since| format!("for {}", ago(since)));
    let note: Vec<String> = how_long.into_iter().chain(view.why.clone()).chain(view.name.clone()).collect();
    let tone = match view.state {
        UpstreamState::Up => Tone::Plain,
        UpstreamState::Down | UpstreamState::Ejected => Tone::Bad,
        UpstreamState::Gone => Tone::Doubtful,
    };
    let cells = [
        service.name.to_string(),
        view.address.clone(),
        view.state.to_string(),
        view.active.to_string(),
        view.connections.to_string(),
        view.failures.to_string(),
        view.bytes_to.to_string(),
        view.bytes_from.to_string(),
        note.join(": "),
    ];
    Row { cells: cells.map(Cow::from), tone }
}

/// The processes that serve it.
fn pids(view: &ServiceView) -> String {
    let pids: BTreeSet<u32> = view.sockets.iter().map(|socket| socket.pid).collect();
    let pids: Vec<String> = pids.iter().map(ToString::to_string).collect();
    if pids.is_empty() { "-".into() } else { pids.join(",") }
}
