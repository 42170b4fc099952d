//! anyport's BPF programs: two ways to hand a packet to a service's socket, over the same maps, and what explains it.

#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![expect(internal_features, reason = "atomic addition, which the standard library has only where there is also CAS")]

mod events;
mod explain;
mod maps;
mod outcome;
mod sk_lookup;
mod sockets;
mod tc;

use aya_ebpf::{
    bindings::sk_action,
    macros::{classifier, sk_lookup as sk_lookup_program, sk_reuseport},
    programs::{SkLookupContext, SkReuseportContext, TcContext},
};

/// Socket lookup: runs where the kernel looks for a listening TCP or an unconnected UDP socket.
#[sk_lookup_program]
pub fn anyport_sk(ctx: SkLookupContext) -> u32 {
    sk_lookup::steer(&ctx)
}

/// Ingress of interfaces whose packets begin with an Ethernet header.
#[classifier]
pub fn anyport_eth(ctx: TcContext) -> i32 {
    tc::steer_ethernet(&ctx)
}

/// Ingress of interfaces whose packets begin with the IP header, such as tunnels.
#[classifier]
pub fn anyport_ip(ctx: TcContext) -> i32 {
    tc::steer_ip(&ctx)
}

/// Says what becomes of a flow. Attached nowhere.
#[classifier]
pub fn anyport_explain(ctx: TcContext) -> i32 {
    explain::explain(&ctx)
}

/// Selects no socket of a group, so that the kernel answers with a refusal (a reset for TCP, port
/// unreachable for UDP). Serves the tc programs, which can drop a packet only in silence.
#[sk_reuseport]
pub fn anyport_refuse(_ctx: SkReuseportContext) -> u32 {
    sk_action::SK_DROP
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Never compiled in: the verifier refuses a program with an endless loop.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
