//! What a program records about each packet that a rule decided: a counter, an event and a line of the debug log.

use anyport_common::{
    event::{ASSIGN_ERROR, DENIED, NO_SOCKET, STEERED},
    flow::Flow,
};
use aya_ebpf::EbpfContext;
use aya_log_ebpf::debug;

use crate::{
    events::publish,
    maps::{count_drop, count_steered},
};

/// What a program did with a packet that a rule decided.
#[derive(Clone, Copy)]
pub enum Outcome {
    /// The packet was handed to a socket of this service.
    Steered { service: u16 },
    /// The service does not allow the source.
    Denied,
    /// This service has no socket for the packet.
    NoSocket { service: u16 },
    /// A fragment for this service: reassembly would forget the assignment.
    Fragment { service: u16 },
    /// `bpf_sk_assign` refused the socket of this service with this error number.
    AssignError { service: u16, error: i64 },
}

/// Counts the packet, publishes an event and writes a line to the debug log. It is inlined where the outcome is
/// constant, so that a program has only the instructions of that outcome.
#[inline(always)]
pub fn record(ctx: &impl EbpfContext, flow: &Flow, source_port: u16, rule: u32, outcome: Outcome) {
    let (service, event) = match outcome {
        Outcome::Steered { service } => (service, STEERED),
        Outcome::Denied => (0, DENIED),
        Outcome::NoSocket { service } => (service, NO_SOCKET),
        Outcome::Fragment { service } | Outcome::AssignError { service, .. } => (service, ASSIGN_ERROR),
    };
    match event {
        STEERED => count_steered(rule),
        _ => count_drop(rule, event),
    }
    publish(flow, source_port, rule, service, event);
    match outcome {
        Outcome::Steered { service } => {
            debug!(ctx, "rule {} port {}: steered to service {}", rule, flow.port, service);
        }
        Outcome::Denied => debug!(ctx, "rule {} port {}: the service does not take the source", rule, flow.port),
        Outcome::NoSocket { service } => {
            debug!(ctx, "rule {} port {}: service {} has no socket", rule, flow.port, service);
        }
        Outcome::Fragment { .. } => debug!(ctx, "rule {} port {}: dropped a fragment", rule, flow.port),
        Outcome::AssignError { error, .. } => {
            debug!(ctx, "rule {} port {}: bpf_sk_assign: {}", rule, flow.port, error);
        }
    }
}
