//! `anyportctl events`: prints connections and flows as they begin.

use std::{
    io::{self, Write as _},
    num::{NonZeroU16, NonZeroU32, NonZeroU64},
    ops::ControlFlow,
};

use super::{Output, Reader, completion, path};
use crate::{
    api::{Client, EventLine, EventView, Listen, Outcome, Problem, Wanted},
    rules::{Prefix, Protocol, ServiceName},
};

/// Prints a line for each connection and each flow of datagrams that begins, or that is kept from it.
///
/// Without options that narrow it down, changes of rules and services are told, too, with those who made them.
#[derive(Debug, clap::Args)]
pub(super) struct Events {
    /// Only those to addresses of this prefix
    #[arg(long, value_name = "PREFIX", add = completion::prefixes())]
    prefix: Option<Prefix>,
    /// Only those of clients with such an address
    #[arg(long, value_name = "PREFIX")]
    source: Option<Prefix>,
    /// Only those over this transport
    #[arg(long, value_enum, default_value_t = Protocol::Both)]
    protocol: Protocol,
    /// Only those to this port
    #[arg(long)]
    port: Option<NonZeroU16>,
    /// Only those that rules steer to this service
    #[arg(long, value_name = "NAME", add = completion::services())]
    service: Option<ServiceName>,
    /// Only those of which this became
    #[arg(long, value_enum)]
    outcome: Option<Wanted>,
    /// One of so many, chosen at random
    #[arg(long, value_name = "N")]
    sample: Option<NonZeroU32>,
    /// End after so many connections and flows
    #[arg(long, value_name = "N")]
    count: Option<NonZeroU64>,
}

impl Events {
    pub(super) async fn run(self, client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
        let Self { prefix, source, protocol, port, service, outcome, sample, count } = self;
        let request = Listen { prefix, source, protocol, port, service, outcome, sample };
        request.validate()?;
        let mut left = count.map(NonZeroU64::get);
        let hear = |line: EventLine| {
            let reader = match &line {
                EventLine::Missed { .. } | EventLine::Note { .. } if out.is_for_people() => {
                    // Beside the events, where nobody who counts lines counts it.
                    writeln!(io::stderr(), "{}", text(&line)).ok();
                    Reader::There
                }
                _ => out.print_one(&line, text)?,
            };
            if let (Some(left), EventLine::Event(_)) = (&mut left, line) {
                *left -= 1;
            }
            let is_enough = left == Some(0) || reader == Reader::Gone;
            Ok(if is_enough { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        };
        client.hear(&path("/v1/events", &request)?, hear).await
    }
}

fn text(line: &EventLine) -> String {
    match line {
        EventLine::Event(event) => sentence(event),
        EventLine::Change(change) => format!("{} {change}", change.time),
        EventLine::Missed { missed } => format!("{missed} events were missed: they came too fast"),
        EventLine::Note { note } => format!("note: {note}"),
    }
}

fn sentence(event: &EventView) -> String {
    let EventView { time, protocol, from, to, outcome, service, prefix } = event;
    let name = service.as_ref().map_or("a service that has gone", ServiceName::as_str);
    let what = match outcome {
        Outcome::Steered => format!("steered to {name}"),
        Outcome::NoSocket => format!("refused: {name} has no socket for it"),
        Outcome::Denied => format!("refused: {name} does not take the source"),
        Outcome::AssignError => format!("dropped: the socket of {name} could not be assigned"),
    };
    let rule = prefix.map_or_else(|| "a rule that has gone".to_owned(), |it| it.to_string());
    format!("{time} {protocol} {from} to {to} {what} by {rule}")
}
