//! Steering where the kernel looks a socket up.
//!
//! Established TCP connections and connected UDP sockets are found before this runs, defragmentation and the
//! host's input firewall are behind it (Documentation/bpf/prog_sk_lookup.rst, since Linux 5.9).

use anyport_common::{
    flow::{Address, Flow, Transport},
    table::Verdict,
};
use aya_ebpf::{
    bindings::{
        BPF_SK_LOOKUP_F_REPLACE,
        sk_action::{SK_DROP, SK_PASS},
    },
    programs::SkLookupContext,
};

use crate::{
    maps::{judge, socket},
    outcome::{Outcome, record},
    sockets,
};

const AF_INET: u32 = 2;

pub fn steer(ctx: &SkLookupContext) -> u32 {
    let Some(flow) = flow(ctx) else {
        return SK_PASS;
    };
    match judge(&flow) {
        Verdict::Unmatched | Verdict::Host { .. } => SK_PASS,
        Verdict::Steer { rule, service } => assign(ctx, &flow, rule, service),
        Verdict::Deny { rule } => {
            record(ctx, &flow, source_port(ctx), rule, Outcome::Denied);
            SK_DROP
        }
    }
}

#[inline(always)]
fn assign(ctx: &SkLookupContext, flow: &Flow, rule: u32, service: u16) -> u32 {
    let Some(socket) = socket(service, flow) else {
        record(ctx, flow, source_port(ctx), rule, Outcome::NoSocket { service });
        return SK_DROP;
    };
    // Another program may have been attached before and have selected a socket. A rule wins over that, as it does
    // over the host's own sockets (Documentation/bpf/prog_sk_lookup.rst: the last selection counts if it replaces).
    let error = sockets::assign(ctx, socket, BPF_SK_LOOKUP_F_REPLACE.into());
    if error != 0 {
        record(ctx, flow, source_port(ctx), rule, Outcome::AssignError { service, error });
        return SK_DROP;
    }
    record(ctx, flow, source_port(ctx), rule, Outcome::Steered { service });
    SK_PASS
}

#[inline(always)]
fn source_port(ctx: &SkLookupContext) -> u16 {
    // SAFETY: the verifier lets a program read this field. Two bytes of it: before Linux 5.18 it had four, of which the kernel fills
    // the first two in the same way (commit 9a69e2b385f4).
    u16::from_be(unsafe { (*ctx.lookup).remote_port })
}

#[inline(always)]
fn flow(ctx: &SkLookupContext) -> Option<Flow> {
    // SAFETY: the verifier lets a program read these fields of its context.
    let (family, protocol, port) = unsafe {
        let lookup = ctx.lookup;
        ((*lookup).family, (*lookup).protocol, (*lookup).local_port)
    };
    let (address, source) = if family == AF_INET {
        // SAFETY: as above.
        let (local, remote) = unsafe { ((*ctx.lookup).local_ip4, (*ctx.lookup).remote_ip4) };
        (Address::v4(u32::from_be(local)), Address::v4(u32::from_be(remote)))
    } else {
        // SAFETY: as above; the kernel allows 32-bit reads of these fields only.
        let ([a, b, c, d], [e, f, g, h]) = unsafe {
            let local = &raw const (*ctx.lookup).local_ip6;
            let remote = &raw const (*ctx.lookup).remote_ip6;
            (
                [(*local)[0], (*local)[1], (*local)[2], (*local)[3]],
                [(*remote)[0], (*remote)[1], (*remote)[2], (*remote)[3]],
            )
        };
        let half = |first, second| u64::from(u32::from_be(first)) << 32 | u64::from(u32::from_be(second));
        (Address::v6(half(a, b), half(c, d)), Address::v6(half(e, f), half(g, h)))
    };
    Some(Flow { source, address, transport: Transport::from_number(protocol as u8)?, port: port as u16 })
}
