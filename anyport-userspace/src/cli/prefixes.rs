//! `anyportctl add-prefix`, `remove-prefix` and `prefixes`: the rules.

use std::{num::NonZeroU16, str::FromStr};

use serde_json::value::RawValue;

use super::{
    Output, completion,
    lists::Source,
    path,
    show::count,
    table::{Column, Row, number, table, text},
    tone::Tone,
};
use crate::{
    api::{AddPrefixes, Changed, Client, ListPrefixes, PrefixView, Problem, ProblemKind, RemovePrefixes},
    rules::{InvalidText, PortSet, Prefix, Protocol, RuleSpec, ServiceName},
    text::list_of,
};

/// Steers prefixes to a service: all of those that are given, or none.
#[derive(Debug, clap::Args)]
pub(super) struct Add {
    /// What to steer
    #[arg(
        required = true,
        value_name = "PREFIX",
        help = "Prefixes such as 192.0.2.0/24 or 2001:db8::/32; a bare address is a prefix of its own; - for a list of them on \
                standard input, in any format of apply"
    )]
    prefixes: Vec<Wanted>,
    /// Transports to steer
    #[arg(long, value_enum, default_value_t)]
    protocol: Protocol,
    /// Ports to steer, such as 80,443,8000-8999
    #[arg(long, default_value = "1-65535")]
    ports: PortSet,
    /// Ports to leave to the host, such as 22,179
    #[arg(long, default_value = "", hide_default_value = true, value_name = "PORTS")]
    except: PortSet,
    /// Only clients of this prefix
    #[arg(long, value_name = "PREFIX")]
    source: Option<Prefix>,
    /// Who receives
    #[arg(long, default_value = "default", value_name = "NAME", add = completion::services())]
    service: ServiceName,
    /// Leave the routing of the prefixes alone
    #[arg(long)]
    no_route: bool,
    /// Go on although listening sockets are shadowed or the host may be cut off
    #[arg(long)]
    force: bool,
}

/// A prefix, or those on standard input.
#[derive(Clone, Debug)]
enum Wanted {
    Prefix(Prefix),
    Listed,
}

impl FromStr for Wanted {
    type Err = InvalidText;

    fn from_str(given: &str) -> Result<Self, InvalidText> {
        if given == "-" { Ok(Self::Listed) } else { given.parse().map(Self::Prefix) }
    }
}

impl Add {
    pub(super) async fn run(self, client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
        let Self { prefixes, protocol, ports, except, source, service, no_route, force } = self;
        let mut all = Vec::with_capacity(prefixes.len());
        for wanted in prefixes {
            match wanted {
                Wanted::Prefix(prefix) => all.push(prefix),
                Wanted::Listed => all.extend(Source::of("-".into()).prefixes()?),
            }
        }
        let prefixes = all;
        let done = format!("steering {} to {service}", list_of(&prefixes));
        let terms = RuleSpec { protocol, ports, except, source, service, route: !no_route };
        let request = AddPrefixes::of(prefixes, terms, force);
        let answer: Changed = client.post("/v1/prefixes", &request).await?;
        out.print_change(&answer, done)
    }
}

/// Removes every rule of exactly these prefixes; the options narrow it to those that match.
#[derive(Debug, clap::Args)]
pub(super) struct Remove {
    /// The prefixes, as they were added
    #[arg(required = true, value_name = "PREFIX", add = completion::prefixes())]
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
    /// Only rules about the clients of exactly this prefix
    #[arg(long, value_name = "PREFIX")]
    source: Option<Prefix>,
    /// Only rules that steer to this service
    #[arg(long, value_name = "NAME", add = completion::services())]
    service: Option<ServiceName>,
}

impl From<Remove> for RemovePrefixes {
    fn from(Remove { prefixes, protocol, ports, except, source, service }: Remove) -> Self {
        Self { prefixes, protocol, ports, except, source, service }
    }
}

impl Remove {
    pub(super) async fn run(self, client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
        let request = RemovePrefixes::from(self);
        let answer: Changed = client.delete("/v1/prefixes", &request).await?;
        let prefixes = list_of(&request.prefixes);
        out.print_change(&answer, format!("removed {} of {prefixes}", count(answer.changed, "rule")))
    }
}

/// Lists the rules in order of precedence, with counters; the options narrow it to those that match.
#[derive(Debug, Default, clap::Args)]
pub(super) struct List {
    /// Only rules of prefixes inside of this one, itself included
    #[arg(long, value_name = "PREFIX", add = completion::prefixes())]
    within: Option<Prefix>,
    /// Only rules that steer to this service
    #[arg(long, value_name = "NAME", add = completion::services())]
    service: Option<ServiceName>,
    /// Only rules that steer this port or leave it to the host
    #[arg(long, value_name = "PORT")]
    port: Option<NonZeroU16>,
    /// Only rules of prefixes that come after this one in the list
    #[arg(long, value_name = "PREFIX", add = completion::prefixes())]
    after: Option<Prefix>,
    /// No more rules than this
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
}

impl List {
    pub(super) async fn run(self, client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
        if !out.is_for_people() {
            let body: Box<RawValue> = client.get(&self.path(self.limit)?).await?;
            // As the daemon wrote it: there may be a million rules.
            return if out.is_json() { out.print_text(body.get()) } else { out.print(&body, |_| String::new()) };
        }
        // One more tells whether there are more.
        let body: Box<RawValue> = client.get(&self.path(self.limit.map(|it| it.saturating_add(1)))?).await?;
        let views: Vec<PrefixView<'_>> = serde_json::from_str(body.get())
            .map_err(|error| Problem::new(ProblemKind::Failed, format!("read the rules: {error}")))?;
        out.print_text(&self.text(&views, out.width()))
    }

    /// What to ask the daemon for.
    fn path(&self, limit: Option<usize>) -> Result<String, Problem> {
        let Self { within, service, port, after, limit: _ } = self;
        let query = ListPrefixes { within: *within, service: service.clone(), port: *port, after: *after, limit };
        path("/v1/prefixes", &query)
    }

    /// For people. `views` may hold one more than they asked for.
    pub(super) fn text(&self, views: &[PrefixView<'_>], width: Option<usize>) -> String {
        let Self { within, service, port, after, limit } = self;
        if views.is_empty() {
            let is_narrowed = within.is_some() || service.is_some() || port.is_some() || after.is_some();
            return if is_narrowed {
                "there is no such rule".into()
            } else {
                "nothing is steered; anyportctl add-prefix 192.0.2.0/24 would steer that prefix".into()
            };
        }
        let (shown, more) = views.split_at(limit.unwrap_or(usize::MAX).min(views.len()));
        let text = table(&COLUMNS, shown.iter().map(row), width);
        let Some(next) = more.first() else { return text };
        // Rules of one prefix that the limit separates are shown once more, rather than never.
        match shown.iter().rev().find(|it| it.prefix != next.prefix) {
            Some(last) => format!("{text}\nthere are more, go on with --after {}", last.prefix),
            None => format!("{text}\nthere are more, a larger --limit shows them"),
        }
    }
}

const COLUMNS: [Column; 11] = [
    text("PREFIX"),
    text("PROTOCOL").rank(5),
    text("PORTS").rank(1).least(12),
    text("EXCEPT").rank(4).least(12),
    text("SOURCE").rank(6),
    text("SERVICE"),
    text("DRAIN").rank(2),
    text("ROUTE").rank(8),
    text("ORIGIN").rank(7),
    number("STEERED"),
    number("DROPPED").rank(3),
];

fn row<'a>(view: &PrefixView<'a>) -> Row<'a, 11> {
    let PrefixView {
        prefix, protocol, ports, except, source, service, route, origin, steered, dropped, drained, ..
    } = *view;
    let or_dash = |text: &'a str| if text.is_empty() { "-" } else { text }.into();
    let cells = [
        prefix.into(),
        protocol.as_str().into(),
        or_dash(ports),
        or_dash(except),
        source.unwrap_or("-").into(),
        service.into(),
        if drained { "drained" } else { "-" }.into(),
        if route { "yes" } else { "no" }.into(),
        origin.as_str().into(),
        steered.to_string().into(),
        dropped.to_string().into(),
    ];
    Row { cells, tone: if drained { Tone::Dim } else { Tone::Plain } }
}
