use super::{
    Output,
    show::{list_of, table},
};
use crate::{
    api::{AddPrefixes, Changed, Client, PrefixView, Problem, RemovePrefixes},
    rules::{PortSet, Prefix, Protocol, ServiceName},
};

/// Steers prefixes to a service: all of those that are given, or none.
#[derive(Debug, clap::Args)]
pub(super) struct Add {
    /// What to steer
    #[arg(
        required = true,
        value_name = "PREFIX",
        help = "Prefixes such as 192.0.2.0/24 or 2001:db8::/32; a bare address is a prefix of its own"
    )]
    prefixes: Vec<Prefix>,
    /// Transports to steer
    #[arg(long, value_enum, default_value_t)]
    protocol: Protocol,
    /// Ports to steer, such as 80,443,8000-8999
    #[arg(long, default_value = "1-65535")]
    ports: PortSet,
    /// Ports to leave to the host, such as 22,179
    #[arg(long, default_value = "", hide_default_value = true, value_name = "PORTS")]
    except: PortSet,
    /// Who receives
    #[arg(long, default_value = "default", value_name = "NAME")]
    service: ServiceName,
    /// Leave the routing of the prefixes alone
    #[arg(long)]
    no_route: bool,
    /// Go on although listening sockets are shadowed or the host may be cut off
    #[arg(long)]
    force: bool,
}

impl Add {
    pub(super) async fn run(self, client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
        let Self { prefixes, protocol, ports, except, service, no_route, force } = self;
        let done = format!("steering {} to {service}", list_of(&prefixes));
        let request = AddPrefixes { prefixes, protocol, ports, except, service, route: !no_route, force };
        let answer: Changed = client.post("/v1/prefixes", &request).await?;
        out.print_change(&answer, done)
    }
}

/// Removes every rule of exactly these prefixes; the options narrow it to those that match.
#[derive(Debug, clap::Args)]
pub(super) struct Remove {
    /// The prefixes, as they were added
    #[arg(required = true, value_name = "PREFIX")]
    prefixes: Vec<Prefix>,
    /// Only rules with this protocol
    #[arg(long, value_enum)]
    protocol: Option<Protocol>,
    /// Only rules with exactly these ports
    #[arg(long)]
    ports: Option<PortSet>,
    /// Only rules with exactly these exceptions
    #[arg(long, value_name = "PORTS")]
    except: Option<PortSet>,
    /// Only rules that steer to this service
    #[arg(long, value_name = "NAME")]
    service: Option<ServiceName>,
}

impl Remove {
    pub(super) async fn run(self, client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
        let Self { prefixes, protocol, ports, except, service } = self;
        let prefixes_given = list_of(&prefixes);
        let request = RemovePrefixes { prefixes, protocol, ports, except, service };
        let answer: Changed = client.delete("/v1/prefixes", &request).await?;
        let rules = if answer.changed == 1 { "1 rule".into() } else { format!("{} rules", answer.changed) };
        out.print_change(&answer, format!("removed {rules} of {prefixes_given}"))
    }
}

pub(super) async fn list(client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
    let views: Vec<PrefixView> = client.get("/v1/prefixes").await?;
    out.print(&views, |views| {
        if views.is_empty() {
            return "nothing is steered; anyportctl add-prefix 192.0.2.0/24 would steer that prefix".into();
        }
        let header = ["PREFIX", "PROTOCOL", "PORTS", "EXCEPT", "SERVICE", "ROUTE", "ORIGIN", "STEERED", "DROPPED"];
        table(header, views.iter().map(row))
    })
}

fn row(view: &PrefixView) -> [String; 9] {
    let PrefixView { prefix, protocol, ports, except, service, route, origin, steered, dropped } = view;
    let or_dash = |ports: &PortSet| if ports.is_empty() { "-".into() } else { ports.to_string() };
    [
        prefix.to_string(),
        protocol.to_string(),
        or_dash(ports),
        or_dash(except),
        service.to_string(),
        if *route { "yes" } else { "no" }.into(),
        origin.to_string(),
        steered.to_string(),
        dropped.to_string(),
    ]
}
