//! Events: what the programs publish about the connections and flows that they judge, and the subscribers' filters.

use bytemuck::{Pod, Zeroable};

use crate::flow::{Flow, Version};

/// Most subscribers at a time.
pub const SUBSCRIBERS: usize = 8;
/// Bytes of the ring buffer: some 4000 events that the daemon has not taken yet.
pub const RING_BYTES: usize = 1 << 18;
/// Flows of datagrams that are remembered, so that not each of their datagrams is published.
pub const RECENT: usize = 1 << 12;
/// A flow is new again after so many nanoseconds without a datagram that was judged: 30 s.
const SILENCE: u64 = 30_000_000_000;

/// Handed to a socket of the service.
pub const STEERED: u8 = 1;
/// Refused, as the service has no socket for it.
pub const NO_SOCKET: u8 = 2;
/// Dropped, as the socket could not be assigned: fragments at `tc` among them.
pub const ASSIGN_ERROR: u8 = 4;
/// Refused, as the service does not take its source.
pub const DENIED: u8 = 8;

/// A connection or a flow of datagrams has begun, or was kept from that.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Event {
    /// Nanoseconds since the system has started, without those in which it slept (`CLOCK_MONOTONIC`).
    pub time: u64,
    /// The client's address, as [`Address`](crate::flow::Address) has it.
    pub source: [u64; 2],
    /// The original destination's address, likewise.
    pub address: [u64; 2],
    /// The number of the rule that decided.
    pub rule: u32,
    /// The slot of the service; 0 for [`DENIED`].
    pub service: u32,
    /// The client's port, in host byte order.
    pub source_port: u16,
    /// The original destination's port, in host byte order.
    pub port: u16,
    /// 4 or 6.
    pub ip_version: u8,
    /// IP protocol number, 6 or 17.
    pub protocol: u8,
    /// What became of it: one of the constants above.
    pub outcome: u8,
    /// The subscribers that get the event, a bit each.
    pub subscribers: u8,
}

/// Which events a subscriber wants.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Filter {
    /// First bits of the original destination's address.
    pub address: [u64; 2],
    /// Which bits those are.
    pub address_mask: [u64; 2],
    /// First bits of the client's address.
    pub source: [u64; 2],
    /// Which bits those are.
    pub source_mask: [u64; 2],
    /// Events for which the ring buffer had no room. Counted by the programs.
    pub missed: u64,
    /// One of so many is published, chosen at random; all if 0.
    pub sample: u32,
    /// The slot of the service; 0 for all. What is refused without asking for a service is published all the same.
    pub service: u32,
    /// 4 or 6; 0 for both.
    pub ip_version: u8,
    /// IP protocol number; 0 for all.
    pub protocol: u8,
    /// Which outcomes, of the constants above.
    pub outcomes: u8,
    /// Nothing.
    pub reserved: u8,
    /// The original destination's port, in host byte order; 0 for all.
    pub port: u16,
    /// Nothing.
    pub reserved_too: u16,
}

const _: () = {
    assert!(size_of::<Event>() == 56);
    assert!(size_of::<Filter>() == 88);
};

impl Event {
    /// What became of a flow; no subscriber is chosen yet.
    #[inline(always)]
    pub const fn new(flow: &Flow, source_port: u16, outcome: u8, time: u64) -> Self {
        Self {
            time,
            source: [flow.source.high, flow.source.low],
            address: [flow.address.high, flow.address.low],
            rule: 0,
            service: 0,
            source_port,
            port: flow.port,
            ip_version: match flow.address.version {
                Version::V4 => 4,
                Version::V6 => 6,
            },
            protocol: flow.transport.number(),
            outcome,
            subscribers: 0,
        }
    }

    /// A number for the flow and what became of it. Different flows seldom have the same, unless they are made so on purpose.
    #[inline(always)]
    pub fn mark(&self) -> u64 {
        let Self { source, address, source_port, port, protocol, outcome, .. } = *self;
        let kind = u64::from(protocol) << 8 | u64::from(outcome);
        let mut mark = 0;
        mark = mix(mark, source[0]);
        mark = mix(mark, source[1]);
        mark = mix(mark, address[0]);
        mark = mix(mark, address[1]);
        mix(mark, kind << 32 | u64::from(source_port) << 16 | u64::from(port))
    }
}

impl Filter {
    /// Whether the subscriber wants this event, sampling aside.
    #[inline(always)]
    pub fn wants(&self, event: &Event) -> bool {
        let is_within = |address: &[u64; 2], bits: &[u64; 2], mask: &[u64; 2]| {
            ((address[0] ^ bits[0]) & mask[0]) | ((address[1] ^ bits[1]) & mask[1]) == 0
        };
        self.outcomes & event.outcome != 0
            && (self.port == 0 || self.port == event.port)
            && (self.protocol == 0 || self.protocol == event.protocol)
            && (self.ip_version == 0 || self.ip_version == event.ip_version)
            && (self.service == 0 || event.service == 0 || self.service == event.service)
            && is_within(&event.address, &self.address, &self.address_mask)
            && is_within(&event.source, &self.source, &self.source_mask)
    }

    /// Whether this number, random among all of 32 bits, is that of the one event that is published of so many.
    #[inline(always)]
    pub const fn is_sampled(&self, random: u32) -> bool {
        (random as u64 * self.sample as u64) >> 32 == 0
    }
}

#[inline(always)]
const fn mix(mark: u64, word: u64) -> u64 {
    // A multiplication carries differences upwards only, so the upper half comes down after it.
    let product = (mark ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    product ^ product >> 32
}

/// What stands in the place of a flow with this mark that had a datagram at that time.
#[inline(always)]
pub const fn remembered(mark: u64, time: u64) -> u64 {
    // Units of some 1 s, of which 2^32 do not come to an end.
    (mark & !0xffff_ffff) | (time >> 30) & 0xffff_ffff
}

/// Whether what stands in the place of a flow says that it is one which goes on.
#[inline(always)]
pub const fn goes_on(place: u64, mark: u64, time: u64) -> bool {
    let silence = (time >> 30).wrapping_sub(place) & 0xffff_ffff;
    place >> 32 == mark >> 32 && place != 0 && silence <= SILENCE >> 30
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;

    use super::{ASSIGN_ERROR, DENIED, Event, Filter, NO_SOCKET, RECENT, STEERED, goes_on, remembered};
    use crate::flow::{Address, Flow, Transport};

    const FLOW: Flow = Flow {
        source: Address::v4(0xc633_6401),
        address: Address::v4(0xc000_024d),
        transport: Transport::Tcp,
        port: 443,
    };

    fn event(flow: &Flow, service: u32, outcome: u8) -> Event {
        Event { service, ..Event::new(flow, 9, outcome, 0) }
    }

    #[test]
    fn each_field_narrows() {
        let all = Filter { outcomes: STEERED | NO_SOCKET | ASSIGN_ERROR | DENIED, ..Filter::zeroed() };
        let steered = event(&FLOW, 3, STEERED);
        assert!(all.wants(&steered) && !Filter::zeroed().wants(&steered));
        let v6 = Flow { source: Address::v6(1, 2), address: Address::v6(0x2001_0db8 << 32, 7), ..FLOW };
        let udp = Flow { transport: Transport::Udp, ..FLOW };
        let others_port = Flow { port: 80, ..FLOW };
        let others_address = Flow { address: Address::v4(0xc000_034d), ..FLOW };
        let others_client = Flow { source: Address::v4(0xc633_6501), ..FLOW };
        let neighbour = Flow { address: Address::v6(0x2001_0db8 << 32, 6), ..v6 };
        let slash_24 = [0xffff_ff00 << 32, 0];
        for (filter, wanted, unwanted) in [
            (Filter { outcomes: DENIED, ..all }, event(&FLOW, 0, DENIED), steered),
            (Filter { service: 3, ..all }, steered, event(&FLOW, 4, STEERED)),
            (Filter { service: 3, ..all }, event(&FLOW, 0, DENIED), event(&FLOW, 4, NO_SOCKET)),
            (Filter { port: 443, ..all }, steered, event(&others_port, 3, STEERED)),
            (Filter { ip_version: 6, ..all }, event(&v6, 3, STEERED), steered),
            (Filter { protocol: 17, ..all }, event(&udp, 3, STEERED), steered),
            (
                Filter { address: [0xc000_0200 << 32, 0], address_mask: slash_24, ..all },
                steered,
                event(&others_address, 3, STEERED),
            ),
            (
                Filter { source: [0xc633_6400 << 32, 0], source_mask: slash_24, ..all },
                steered,
                event(&others_client, 3, STEERED),
            ),
            (
                Filter { address: [0x2001_0db8 << 32, 7], address_mask: [u64::MAX; 2], ..all },
                event(&v6, 3, STEERED),
                event(&neighbour, 3, STEERED),
            ),
        ] {
            assert!(filter.wants(&wanted) && !filter.wants(&unwanted), "{filter:?}");
        }
    }

    #[test]
    fn one_of_so_many_is_sampled() {
        for sample in [0, 1, 2, 10, 1000] {
            let filter = Filter { sample, ..Filter::zeroed() };
            let told = (0..1 << 16).filter(|it| filter.is_sampled(it << 16)).count();
            let expected = (1 << 16) / sample.max(1) as usize;
            assert!(told.abs_diff(expected) <= 1, "1 of {sample}: {told}");
        }
    }

    #[test]
    fn a_flow_goes_on_until_it_is_silent() {
        const SECOND: u64 = 1_000_000_000;
        let flow = Flow { transport: Transport::Udp, ..FLOW };
        let it = event(&flow, 3, STEERED);
        for other in [
            Event { source_port: 10, ..it },
            event(&flow, 3, NO_SOCKET),
            event(&Flow { port: 444, ..flow }, 3, STEERED),
            event(&Flow { address: Address::v4(0xc000_024e), ..flow }, 3, STEERED),
            event(&Flow { source: Address::v4(0xc633_6402), ..flow }, 3, STEERED),
        ] {
            assert!(!goes_on(remembered(other.mark(), SECOND), it.mark(), SECOND));
        }
        for time in [0, SECOND, 5_000_000_000 * SECOND] {
            let place = remembered(it.mark(), time);
            assert!(goes_on(place, it.mark(), time) && goes_on(place, it.mark(), time + 29 * SECOND));
            assert!(!goes_on(place, it.mark(), time + 32 * SECOND));
        }
        assert!(!goes_on(0, it.mark(), SECOND) && !goes_on(0, 0, 0));
    }

    /// Neighbours spread over the places.
    #[test]
    fn marks_differ() {
        let mut places = [0_u8; RECENT];
        for source_port in 0..u16::try_from(RECENT).unwrap() {
            let mark = Event { source_port, ..event(&FLOW, 3, STEERED) }.mark();
            places[usize::try_from(mark % RECENT as u64).unwrap()] += 1;
        }
        assert!(places.iter().all(|it| *it < 9));
        let used = places.iter().filter(|it| **it > 0).count();
        assert!(used > RECENT / 2, "{used} places are used");
    }
}
