//! Steering where the kernel looks a socket up.
//!
//! Established TCP connections and connected UDP sockets are found before this runs, defragmentation and the
//! host's input firewall are behind it (Documentation/bpf/prog_sk_lookup.rst, since Linux 5.9).

use anyport_common::{
    flow::{Address, Flow, Transport},
    table::Verdict,
};
use aya_ebpf::{
    EbpfContext as _,
    bindings::sk_action::{SK_DROP, SK_PASS},
    helpers::{bpf_sk_assign, bpf_sk_release},
    programs::SkLookupContext,
};
use aya_log_ebpf::debug;

use crate::maps::{count, judge, socket};

const AF_INET: u32 = 2;

pub fn steer(ctx: &SkLookupContext) -> u32 {
    let Some(flow) = flow(ctx) else {
        return SK_PASS;
    };
    match judge(&flow) {
        Verdict::Unmatched | Verdict::Host { .. } => SK_PASS,
        Verdict::Steer { rule, service } => assign(ctx, &flow, rule, service),
    }
}

#[inline(always)]
fn assign(ctx: &SkLookupContext, flow: &Flow, rule: u32, service: u16) -> u32 {
    let Some(socket) = socket(service, flow) else {
        count(rule, |counters| &mut counters.no_socket);
        debug!(ctx, "rule {} port {}: service {} has no socket", rule, flow.port, service);
        return SK_DROP;
    };
    // SAFETY: the socket is referenced until it is released below; both pointers are the kernel's own.
    let error = unsafe {
        let error = bpf_sk_assign(ctx.as_ptr(), socket.as_ptr().cast(), 0);
        bpf_sk_release(socket.as_ptr().cast());
        error
    };
    if error != 0 {
        count(rule, |counters| &mut counters.assign_error);
        debug!(ctx, "rule {} port {}: bpf_sk_assign: {}", rule, flow.port, error);
        return SK_DROP;
    }
    count(rule, |counters| &mut counters.steered);
    debug!(ctx, "rule {} port {}: steered to service {}", rule, flow.port, service);
    SK_PASS
}

#[inline(always)]
fn flow(ctx: &SkLookupContext) -> Option<Flow> {
    // SAFETY: the verifier lets a program read these fields of its context.
    let (family, protocol, port) = unsafe {
        let lookup = ctx.lookup;
        ((*lookup).family, (*lookup).protocol, (*lookup).local_port)
    };
    let address = if family == AF_INET {
        // SAFETY: as above.
        Address::v4(u32::from_be(unsafe { (*ctx.lookup).local_ip4 }))
    } else {
        // SAFETY: as above; the kernel allows 32-bit reads of this field only.
        let [a, b, c, d] = unsafe {
            let words = &raw const (*ctx.lookup).local_ip6;
            [(*words)[0], (*words)[1], (*words)[2], (*words)[3]]
        };
        let half = |first, second| u64::from(u32::from_be(first)) << 32 | u64::from(u32::from_be(second));
        Address::v6(half(a, b), half(c, d))
    };
    Some(Flow { address, transport: Transport::from_number(protocol as u8)?, port: port as u16 })
}
