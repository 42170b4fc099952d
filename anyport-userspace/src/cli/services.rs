use super::{Output, show::table};
use crate::{
    api::{Changed, Client, Problem, ServiceView},
    rules::ServiceName,
    service::{HandlerKind, ServiceConfig},
};

/// Opens a new service, to which add-prefix --service can steer.
#[derive(Debug, clap::Args)]
pub(super) struct Add {
    /// Its name: lower-case letters, digits, and . _ - inside
    name: ServiceName,
    /// What it does with what it accepts
    #[arg(long, value_enum)]
    handler: HandlerKind,
    /// What discard sends first on a TCP connection
    #[arg(long, value_name = "TEXT")]
    banner: Option<String>,
}

impl Add {
    pub(super) async fn run(self, client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
        let Self { name, handler, banner } = self;
        let done = format!("service {name} is open");
        let answer: Changed = client.post("/v1/services", &ServiceConfig { name, handler, banner }).await?;
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
            "ACTIVE",
            "ACCEPTED",
            "DATAGRAMS",
            "ANSWERED",
        ];
        table(header, views.iter().map(|view| row(view).map(Into::into)))
    })
}

fn row(view: &ServiceView) -> [String; 12] {
    [
        view.name.to_string(),
        view.handler.to_string(),
        view.origin.to_string(),
        view.rules.to_string(),
        view.sockets.len().to_string(),
        view.steered.to_string(),
        view.no_socket.to_string(),
        view.assign_error.to_string(),
        view.stats.active.to_string(),
        view.stats.accepted.to_string(),
        view.stats.datagrams.to_string(),
        view.stats.answered.to_string(),
    ]
}
