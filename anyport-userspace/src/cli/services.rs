//! `anyportctl services`, `add-service` and `remove-service`.

use std::collections::BTreeSet;

use super::{
    Output,
    show::{ago, table},
};
use crate::{
    api::{Changed, Client, Problem, ServiceView},
    rules::ServiceName,
    service::{ServiceConfig, ServiceTable, UpstreamView},
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
    out.print(&views, |views| {
        let header = [
            "NAME",
            "HANDLER",
            "ORIGIN",
            "RULES",
            "SOCKETS",
            "STEERED",
            "NO-SOCKET",
            "UNASSIGNED",
            "DENIED",
            "ACTIVE",
            "ACCEPTED",
            "REFUSED",
            "DATAGRAMS",
            "ANSWERED",
            "PID",
        ];
        let mut text = table(header, views.iter().map(|view| row(view).map(Into::into)));
        let upstreams = || views.iter().flat_map(|view| view.upstreams.iter().map(move |it| (view, it)));
        if upstreams().next().is_some() {
            let header = ["SERVICE", "UPSTREAM", "STATE", "OPEN", "TOTAL", "FAILED", "TO", "FROM", "NOTE"];
            text.push_str("\n\n");
            text.push_str(&table(header, upstreams().map(|(view, it)| upstream_row(view, it).map(Into::into))));
        }
        text
    })
}

fn row(view: &ServiceView) -> [String; 15] {
    [
        view.name.to_string(),
        view.handler.to_string(),
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
    ]
}

fn upstream_row(service: &ServiceView, view: &UpstreamView) -> [String; 9] {
    let since = view.since.map(|since| format!("since {}", ago(since)));
    let note: Vec<String> = view.name.clone().into_iter().chain(since).chain(view.why.clone()).collect();
    [
        service.name.to_string(),
        view.address.clone(),
        view.state.to_string(),
        view.active.to_string(),
        view.connections.to_string(),
        view.failures.to_string(),
        view.bytes_to.to_string(),
        view.bytes_from.to_string(),
        note.join(": "),
    ]
}

/// The processes that serve it.
fn pids(view: &ServiceView) -> String {
    let pids: BTreeSet<u32> = view.sockets.iter().map(|socket| socket.pid).collect();
    let pids: Vec<String> = pids.iter().map(ToString::to_string).collect();
    if pids.is_empty() { "-".into() } else { pids.join(",") }
}
