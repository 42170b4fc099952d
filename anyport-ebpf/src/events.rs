//! Events that the programs publish to subscribers. Without a subscriber this costs a look at one word.

use anyport_common::{
    event::{Event, Filter, RECENT, RING_BYTES, SUBSCRIBERS, goes_on, remembered},
    flow::{Flow, Transport},
};
use aya_ebpf::{
    bindings::BPF_F_MMAPABLE,
    btf_maps::{Array, PerCpuArray, RingBuf},
    helpers::{bpf_get_prandom_u32, bpf_ktime_get_ns},
    macros::btf_map,
};
use core::ptr;

use crate::maps::{add_one, subscribers};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;

#[btf_map(name = "anyport_events")]
static EVENTS: RingBuf<Event, RING_BYTES> = RingBuf::new();

#[btf_map(name = "anyport_filters")]
static FILTERS: Array<Filter, SUBSCRIBERS, MMAPABLE> = Array::new();

/// Flows of datagrams of which an event was published, each in the place that its mark names; a later one takes the place of an earlier one.
#[btf_map(name = "anyport_recent")]
static RECENT_FLOWS: Array<u64, RECENT> = Array::new();

/// Where an event is made. The verifier does not follow what stands in a map, and so has no more paths to walk for each subscriber.
#[btf_map(name = "anyport_event")]
static EVENT: PerCpuArray<Event, 1> = PerCpuArray::new();

/// Publishes what became of the first packet of a connection or flow.
#[inline(always)]
pub fn publish(flow: &Flow, source_port: u16, rule: u32, service: u16, outcome: u8) {
    let subscribers = subscribers();
    if subscribers == 0 {
        return;
    }
    if let Some(event) = EVENT.get_ptr_mut(0) {
        // SAFETY: the helper takes nothing and gives a number.
        let time = unsafe { bpf_ktime_get_ns() };
        // SAFETY: the value is valid, aligned and this CPU's own.
        unsafe {
            *event = Event { rule, service: service.into(), ..Event::new(flow, source_port, outcome, time) };
        }
        let is_flow = matches!(flow.transport, Transport::Udp);
        anyport_publish(subscribers, is_flow.into());
    }
}

/// A global function, which the verifier walks once, not at each call (Linux 5.6).
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn anyport_publish(subscribers: u32, is_flow: u32) -> u32 {
    let Some(event) = EVENT.get_ptr_mut(0) else { return 0 };
    // SAFETY: the value is valid, aligned and this CPU's own.
    let event = unsafe { &mut *event };
    for number in 0..SUBSCRIBERS as u32 {
        if subscribers >> number & 1 != 0
            && let Some(filter) = FILTERS.get(number)
            && filter.wants(event)
            // SAFETY: the helper takes nothing and gives a number.
            && filter.is_sampled(unsafe { bpf_get_prandom_u32() })
        {
            event.subscribers |= 1 << number;
        }
    }
    if event.subscribers != 0 && (is_flow == 0 || !is_recent(event)) && EVENTS.output(*event, 0).is_err() {
        for number in 0..SUBSCRIBERS as u32 {
            if u32::from(event.subscribers) >> number & 1 != 0
                && let Some(filter) = FILTERS.get_ptr_mut(number)
            {
                // SAFETY: the counter is valid and aligned.
                unsafe { add_one(&raw mut (*filter).missed) };
            }
        }
    }
    0
}

/// Whether a flow of datagrams was published a while ago and goes on. It is remembered.
#[inline(always)]
fn is_recent(event: &Event) -> bool {
    let mark = event.mark();
    let Some(place) = RECENT_FLOWS.get_ptr_mut((mark % RECENT as u64) as u32) else { return false };
    // SAFETY: the place is valid and aligned. Programs on other CPUs write to it, too; what is lost by that is published twice.
    unsafe {
        let before = ptr::read_volatile(place);
        ptr::write_volatile(place, remembered(mark, event.time));
        goes_on(before, mark, event.time)
    }
}
