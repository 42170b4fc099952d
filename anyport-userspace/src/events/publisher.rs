//! Events that this process makes, where no BPF program does.

use std::sync::Arc;

use anyport_common::{
    event::{DENIED, Event, STEERED},
    flow::{Flow, Transport},
    table::Verdict,
};
use nix::time::{ClockId, clock_gettime};

use super::EventBus;
use crate::{datagram::Ends, rules::to_address, table::Published};

/// Publishes what arrives at a service.
#[derive(Clone, Debug)]
pub struct EventPublisher {
    bus: Arc<EventBus>,
    rules: Arc<Published>,
}

impl EventPublisher {
    /// One that asks these rules which of them was the reason.
    pub fn new(bus: Arc<EventBus>, rules: Arc<Published>) -> Self {
        Self { bus, rules }
    }

    /// Whether there is a subscriber.
    pub fn is_heard(&self) -> bool {
        self.bus.is_heard()
    }

    /// Publishes a connection, or a datagram.
    pub fn publish(&self, transport: Transport, Ends { client, dialled }: Ends, is_denied: bool) {
        let flow = Flow {
            source: to_address(client.ip()),
            address: to_address(dialled.ip()),
            transport,
            port: dialled.port(),
        };
        // What was accepted before a rule went, or at the service's own address.
        let Verdict::Steer { rule, service } = self.rules.read(|reader| reader.lookup(&flow)) else { return };
        let outcome = if is_denied { DENIED } else { STEERED };
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC)
            .map_or(0, |it| u64::try_from(it.tv_sec() * 1_000_000_000 + it.tv_nsec()).unwrap_or_default());
        let event = Event { rule, service: service.into(), ..Event::new(&flow, client.port(), outcome, now) };
        // Good enough for sampling: the low bits of the time, spread over all bits.
        let random = u32::try_from(now & u64::from(u32::MAX)).unwrap_or_default().wrapping_mul(0x9e37_79b9);
        self.bus.publish(event, random);
    }
}
