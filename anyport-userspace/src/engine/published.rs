//! Events, as the daemon understands them.

use std::{
    collections::HashSet,
    num::{NonZeroU16, NonZeroU32},
    time::{Duration, SystemTime},
};

use anyport_common::{
    event::{DENIED, Event, Filter, NO_SOCKET, STEERED},
    flow::{Address, Flow, Transport},
};
use bytemuck::Zeroable as _;
use nix::time::{ClockId, clock_gettime};
use tokio::sync::broadcast::Receiver;

use super::snapshot::Snapshot;
use crate::{
    api::{EventLine, EventView, Listen, Outcome, Problem, ProblemKind, Wanted},
    events::{ChangeView, Subscriber, TooManySubscribers},
    rules::{self, Prefix, Protocol, RuleRef, from_address},
};

impl Snapshot {
    /// Adds a subscriber.
    ///
    /// # Errors
    /// There is no such service, there are too many subscribers, or the kernel refuses.
    pub fn listen(&self, request: &Listen) -> Result<Subscriber, Problem> {
        let mut filter = request.filter();
        if let Some(service) = &request.service {
            let slot = self.slots.iter().find(|(_, name)| name == service).map(|(slot, _)| *slot);
            let unknown = || Problem::new(ProblemKind::NotFound, format!("there is no service {service}"));
            filter.service = slot.ok_or_else(unknown)?.into();
        }
        self.events.listen(filter, request.service.clone()).map_err(|error| {
            let problem = Problem::new(ProblemKind::Failed, format!("listen to events: {error:#}"));
            if error.is::<TooManySubscribers>() {
                problem.hint("end one of those that run: pgrep -f 'anyportctl events'")
            } else {
                problem
            }
        })
    }

    /// The changes from now on.
    pub fn changes(&self) -> Receiver<ChangeView> {
        self.events.changes()
    }

    /// What is to be said before all events.
    pub fn note_on_events(&self) -> Option<EventLine> {
        (!self.events.is_connected()).then(|| EventLine::Note {
            note: format!(
                "with {} events come from the services of this daemon: what it can't hand to one, and what goes to registered sockets, \
                 is not told",
                self.status.backend
            ),
        })
    }

    /// What rules take from the host, a note each, but for those that `told` has already, which learns of the others.
    pub fn notes_on_host(&self, told: &mut HashSet<String>) -> Vec<EventLine> {
        told.retain(|it| self.shadowed.contains(it));
        let new = self.shadowed.iter().filter(|it| told.insert((*it).clone()));
        new.map(|note| EventLine::Note { note: note.clone() }).collect()
    }

    /// An event with what the daemon knows of it, unless it is not one of the service that was asked for.
    pub fn describe(&self, event: &Event, request: &Listen, clock: &Clock) -> Option<EventView> {
        let flow = flow(event)?;
        let rule = rules::considered(&self.rules, &flow).find(|it| it.number == event.rule);
        let prefix = rule.as_ref().map(|it| it.prefix);
        let by_slot = || self.slots.iter().find(|(slot, _)| u32::from(*slot) == event.service).map(|(_, name)| name);
        let service = rule.as_ref().map(|RuleRef { terms, .. }| &terms.service).or_else(by_slot).cloned();
        if request.service.is_some() && request.service != service {
            return None;
        }
        Some(EventView {
            time: humantime::format_rfc3339_micros(clock.time_of(event)).to_string(),
            protocol: flow.transport.into(),
            from: (from_address(flow.source), event.source_port).into(),
            to: (from_address(flow.address), flow.port).into(),
            outcome: match event.outcome {
                STEERED => Outcome::Steered,
                NO_SOCKET => Outcome::NoSocket,
                DENIED => Outcome::Denied,
                _ => Outcome::AssignError,
            },
            service,
            prefix,
        })
    }
}

fn flow(event: &Event) -> Option<Flow> {
    let address = |[high, low]: [u64; 2]| match event.ip_version {
        // Of the first half, IPv4 has the first half.
        4 => Address::v4(u32::try_from(high >> 32).unwrap_or_default()),
        _ => Address::v6(high, low),
    };
    let transport = Transport::from_number(event.protocol)?;
    Some(Flow { source: address(event.source), address: address(event.address), transport, port: event.port })
}

/// When the system was started, by the clock on the wall.
#[derive(Clone, Copy, Debug)]
pub struct Clock(SystemTime);

impl Clock {
    /// As things are now.
    pub fn now() -> Self {
        let since_start = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
        Self(SystemTime::now().checked_sub(since_start).unwrap_or(SystemTime::UNIX_EPOCH))
    }

    fn time_of(self, event: &Event) -> SystemTime {
        self.0.checked_add(Duration::from_nanos(event.time)).unwrap_or(self.0)
    }
}

impl Listen {
    /// The filter for the programs, without the service.
    fn filter(&self) -> Filter {
        let Self { prefix, source, protocol, port, service: _, outcome, sample } = self;
        let version = |prefix: Option<Prefix>| prefix.map(|it| if it.is_ipv4() { 4 } else { 6 });
        let protocol = match protocol {
            Protocol::Tcp => Transport::Tcp.number(),
            Protocol::Udp => Transport::Udp.number(),
            Protocol::Both => 0,
        };
        let ip_version = version(*prefix).or(version(*source)).unwrap_or(0);
        let (address, address_mask) = bits(*prefix);
        let (source, source_mask) = bits(*source);
        Filter {
            address,
            address_mask,
            source,
            source_mask,
            sample: sample.map_or(0, NonZeroU32::get),
            ip_version,
            protocol,
            outcomes: outcome.map_or(u8::MAX, Wanted::bits),
            port: port.map_or(0, NonZeroU16::get),
            ..Filter::zeroed()
        }
    }
}

/// The first bits of the addresses of a prefix, and which bits those are.
fn bits(prefix: Option<Prefix>) -> ([u64; 2], [u64; 2]) {
    let Some(prefix) = prefix else { return ([0; 2], [0; 2]) };
    let Address { high, low, .. } = prefix.first();
    let mask = u128::MAX.checked_shl(128 - u32::from(prefix.len())).unwrap_or(0);
    let half = |bits: u128| u64::try_from(bits & u128::from(u64::MAX)).unwrap_or_default();
    ([high, low], [half(mask >> 64), half(mask)])
}
