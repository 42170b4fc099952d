//! `anyportctl drain` and `undrain`: take this node out of service and put it back.

use std::time::{Duration, Instant};

use super::{Output, completion};
use crate::{
    api::{Changed, Client, DrainRequest, DrainState, DrainView, Problem, ProblemKind, Undrain},
    rules::{Prefix, ServiceName},
    text::list_of,
};

/// How often it is looked how far a drain is.
const INTERVAL: Duration = Duration::from_millis(200);
/// How long the router may be deaf.
const PATIENCE: Duration = Duration::from_secs(5);

/// Takes this node out of service, or a part of it, without touching a connection that is established.
///
/// What is announced of it is withdrawn. Then the routers of others have their time (--wait). Then new connections are refused, as where a
/// service has no live socket. It stays so, also after a restart, until anyportctl undrain. The command returns when new
/// connections are refused, and says how many connections are left; if it is interrupted, the drain goes on.
#[derive(Debug, clap::Args)]
pub(super) struct Drain {
    /// What to take out of service: the rules inside of these; the whole node if nothing is named
    #[arg(value_name = "PREFIX", add = completion::prefixes())]
    prefixes: Vec<Prefix>,
    /// The rules that steer to this service
    #[arg(long, value_name = "NAME", add = completion::services())]
    service: Option<ServiceName>,
    /// From the withdrawal to the first new connection that is refused, such as 30s or 2m. With 0s the router is not waited for either
    #[arg(long, value_name = "TIME", value_parser = crate::human_duration::parse, default_value = "30s")]
    wait: Duration,
}

impl Drain {
    pub(super) async fn run(self, client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
        let Self { prefixes, service, wait } = self;
        let is_meant = |view: &DrainView| match (&view.service, &view.prefix) {
            (None, None) => service.is_none() && prefixes.is_empty(),
            (name, prefix) => {
                (name.is_some() && *name == service) || prefix.is_some_and(|prefix| prefixes.contains(&prefix))
            }
        };
        let request = DrainRequest { service: service.clone(), prefixes: prefixes.clone(), wait: wait.as_secs() };
        let begun = Instant::now();
        let mut views: Vec<DrainView> = client.post("/v1/drain", &request).await?;
        loop {
            views.retain(is_meant);
            if views.iter().all(|view| view.state == DrainState::Refusing) {
                return out.print(&views, |views| text(views));
            }
            if let Some(why) = views.iter().find_map(|view| view.why.as_ref())
                && begun.elapsed() > PATIENCE
            {
                return Err(Problem::new(ProblemKind::Failed, format!("the router has not withdrawn it yet: {why}"))
                    .hint("the drain goes on when it has; --wait 0s refuses new connections all the same"));
            }
            tokio::time::sleep(INTERVAL).await;
            views = client.get("/v1/drain").await?;
        }
    }
}

/// Puts into service again what was drained. It is announced when it has been served for the hold-down.
#[derive(Debug, clap::Args)]
pub(super) struct UndrainOptions {
    /// As they were drained; everything if nothing is named
    #[arg(value_name = "PREFIX", add = completion::prefixes())]
    prefixes: Vec<Prefix>,
    /// As it was drained
    #[arg(long, value_name = "NAME", add = completion::services())]
    service: Option<ServiceName>,
}

impl UndrainOptions {
    pub(super) async fn run(self, client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
        let Self { prefixes, service } = self;
        let names: Vec<String> =
            service.iter().map(ToString::to_string).chain(prefixes.iter().map(ToString::to_string)).collect();
        let what = if names.is_empty() { "everything".to_owned() } else { list_of(&names) };
        let answer: Changed = client.delete("/v1/drain", &Undrain { service, prefixes }).await?;
        out.print_change(&answer, format!("{what} is served again"))
    }
}

fn text(views: &[DrainView]) -> String {
    let line = |view: &DrainView| match view.connections {
        Some(left) => format!("drained {}: {left} connections are left", subject(view)),
        None => format!("drained {}", subject(view)),
    };
    // The drain may have been ended meanwhile.
    if views.is_empty() {
        "it is not drained any more".to_owned()
    } else {
        views.iter().map(line).collect::<Vec<_>>().join("\n")
    }
}

/// What is drained.
pub(super) fn subject(view: &DrainView) -> String {
    match (&view.service, &view.prefix) {
        (Some(name), _) => format!("service {name}"),
        (_, Some(prefix)) => prefix.to_string(),
        (None, None) => "the node".to_owned(),
    }
}
