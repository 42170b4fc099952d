//! Steering at the ingress of interfaces.
//!
//! The program sees every packet, so it finds out by itself which packets belong to an existing socket, and assigns the
//! socket again for each packet that does not (`bpf_sk_assign` for tc, since Linux 5.7).

use anyport_common::{
    flow::{Address, Flow, Transport, Version},
    maps::REFUSE,
    packet::{self, Bytes, Packet},
    table::Verdict,
};
use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_F_CURRENT_NETNS, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::{bpf_sk_lookup_udp, bpf_sk_release, bpf_skb_load_bytes, bpf_skc_lookup_tcp},
    programs::TcContext,
};
use core::{mem::MaybeUninit, ptr::NonNull};

use crate::{
    maps::{covers, judge, socket},
    outcome::{Outcome, record},
    sockets,
};

// Of `linux/if_packet.h`.
const PACKET_HOST: u32 = 0;
const PACKET_OTHERHOST: u32 = 3;
const TCP_ESTABLISHED: u32 = 1;
const TCP_TIME_WAIT: u32 = 6;
const TCP_LISTEN: u32 = 10;
const NETNS: u64 = BPF_F_CURRENT_NETNS as u64;

struct Frame<'a>(&'a TcContext);

impl Bytes for Frame<'_> {
    #[inline(always)]
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the helper writes `N` bytes or fails.
        unsafe {
            let failed = bpf_skb_load_bytes(self.0.as_ptr().cast(), offset, bytes.as_mut_ptr().cast(), N as u32);
            (failed == 0).then(|| bytes.assume_init())
        }
    }
}

pub fn steer_ethernet(ctx: &TcContext) -> i32 {
    if is_for_others(ctx) {
        return TC_ACT_UNSPEC;
    }
    match packet::from_ethernet(&Frame(ctx)) {
        Some(packet) if is_taken(ctx, &packet) => steer(ctx, &packet),
        _ => TC_ACT_UNSPEC,
    }
}

pub fn steer_ip(ctx: &TcContext) -> i32 {
    if is_for_others(ctx) {
        return TC_ACT_UNSPEC;
    }
    match packet::from_ip(&Frame(ctx)) {
        Some(packet) if is_taken(ctx, &packet) => steer(ctx, &packet),
        _ => TC_ACT_UNSPEC,
    }
}

/// Whether the frame is not for this host, or not for this interface of it.
///
/// Ingress comes before bridges, macvlan and VLANs take what is theirs (`__netif_receive_skb_core`, net/core/dev.c, read in 6.12). What is
/// addressed to another link-layer address is `PACKET_OTHERHOST` by then (`eth_type_trans`); IP drops it where nobody has taken it. A
/// frame of a VLAN comes again on that VLAN's interface, and is dropped where the host has none; VLAN 0 is a mark of priority alone.
#[inline(always)]
fn is_for_others(ctx: &TcContext) -> bool {
    const VLAN_ID: u32 = 0x0fff;
    let skb = ctx.skb.skb;
    // SAFETY: the kernel's own, whose fields the verifier has it read.
    let (kind, has_vlan, vlan) = unsafe { ((*skb).pkt_type, (*skb).vlan_present, (*skb).vlan_tci) };
    kind == PACKET_OTHERHOST || (has_vlan != 0 && vlan & VLAN_ID != 0)
}

/// Whether IP takes such a packet from such a frame: no TCP from a frame for all or many (`tcp_v4_rcv`, net/ipv4/tcp_ipv4.c).
#[inline(always)]
fn is_taken(ctx: &TcContext, packet: &Packet) -> bool {
    // SAFETY: as above.
    let kind = unsafe { (*ctx.skb.skb).pkt_type };
    kind == PACKET_HOST || packet.flow.transport != Transport::Tcp
}

/// `TC_ACT_UNSPEC` (`TCX_NEXT` is the same number) leaves the packet to the programs behind this one.
#[inline(always)]
fn steer(ctx: &TcContext, packet: &Packet) -> i32 {
    if packet.is_unreadable {
        // Left alone, it could reach a socket of the host at a port that is steered. Which rule would have decided
        // is not known, so none counts it.
        return if covers(packet.flow.address) { TC_ACT_SHOT } else { TC_ACT_UNSPEC };
    }
    let flow = &packet.flow;
    let (rule, service) = match judge(flow) {
        Verdict::Unmatched | Verdict::Host { .. } => return TC_ACT_UNSPEC,
        Verdict::Steer { rule, service } => (rule, Some(service)),
        Verdict::Deny { rule } => (rule, None),
    };
    if belongs_to_a_socket(ctx, packet) {
        return TC_ACT_UNSPEC;
    }
    let Some(service) = service else {
        record(ctx, flow, packet.source_port, rule, Outcome::Denied);
        // Reassembly forgets the assignment of what refuses.
        return if packet.is_fragmented { TC_ACT_SHOT } else { refuse(ctx, flow) };
    };
    if packet.is_fragmented {
        // Reassembly forgets the assignment, and the whole datagram could reach a socket of the host.
        record(ctx, flow, packet.source_port, rule, Outcome::Fragment { service });
        return TC_ACT_SHOT;
    }
    let Some(socket) = socket(service, flow) else {
        record(ctx, flow, packet.source_port, rule, Outcome::NoSocket { service });
        return refuse(ctx, flow);
    };
    let error = sockets::assign(ctx, socket, 0);
    if error != 0 {
        record(ctx, flow, packet.source_port, rule, Outcome::AssignError { service, error });
        return TC_ACT_SHOT;
    }
    record(ctx, flow, packet.source_port, rule, Outcome::Steered { service });
    TC_ACT_UNSPEC
}

/// Has the kernel answer with a refusal; without the daemon's sockets for that, drops in silence.
#[inline(always)]
fn refuse(ctx: &TcContext, flow: &Flow) -> i32 {
    match socket(REFUSE, flow) {
        Some(socket) if sockets::assign(ctx, socket, 0) == 0 => TC_ACT_UNSPEC,
        _ => TC_ACT_SHOT,
    }
}

/// Whether the packet is to be left to the socket that the kernel itself will find.
///
/// An unconnected UDP socket of the host does not count: inside of a rule steering wins over it. Neither does any socket
/// for a fragment that may become a SYN: by then it may be gone, and a listener of the host is found.
#[inline(always)]
fn belongs_to_a_socket(ctx: &TcContext, packet: &Packet) -> bool {
    if packet.is_fragmented && packet.opens_connection {
        return false;
    }
    // The two look for the socket apart, since the verifier takes no instruction that reads sockets of two types.
    match packet.flow.transport {
        Transport::Udp => state_of_udp(ctx, packet) == Some(TCP_ESTABLISHED),
        Transport::Tcp => match state_of_tcp(ctx, packet) {
            None | Some(TCP_LISTEN) => false,
            Some(TCP_TIME_WAIT) => !packet.opens_connection || can_reopen(ctx, packet),
            Some(_) => true,
        },
    }
}

/// Whether the kernel can be trusted with a SYN that meets a connection in TIME_WAIT.
///
/// TPROXY ends the old connection and goes on with the listener (`nf_tproxy_handle_time_wait4`). A tc program can't
/// end it, and with the old one there, kernels since 6.11 drop a SYN that is assigned to a listener (commit
/// ff46e3b44219). Left alone, the kernel looks for a listener at the original destination. If there is none, its answer
/// has the client end the old connection, and the next SYN, at most a second later, finds the way free. If there is
/// one, it would get what is steered, and that must not be.
#[inline(always)]
fn can_reopen(ctx: &TcContext, packet: &Packet) -> bool {
    // No connection has this source port, so what is found is a listener.
    let without_port = Packet { source_port: 0, ..*packet };
    state_of_tcp(ctx, &without_port).is_none()
}

/// The state of the socket that the kernel finds for this packet of TCP, if there is one.
#[inline(always)]
fn state_of_tcp(ctx: &TcContext, packet: &Packet) -> Option<u32> {
    let (mut tuple, size) = tuple(packet);
    // SAFETY: the tuple is as long as `size` says; the socket is read only while it is referenced.
    unsafe {
        let tuple = tuple.as_mut_ptr().cast();
        let socket = NonNull::new(bpf_skc_lookup_tcp(ctx.as_ptr(), tuple, size, NETNS, 0))?;
        let state = (*socket.as_ptr()).state;
        bpf_sk_release(socket.as_ptr().cast());
        Some(state)
    }
}

/// The same for UDP.
#[inline(always)]
fn state_of_udp(ctx: &TcContext, packet: &Packet) -> Option<u32> {
    let (mut tuple, size) = tuple(packet);
    // SAFETY: as above.
    unsafe {
        let tuple = tuple.as_mut_ptr().cast();
        let socket = NonNull::new(bpf_sk_lookup_udp(ctx.as_ptr(), tuple, size, NETNS, 0))?;
        let state = (*socket.as_ptr()).state;
        bpf_sk_release(socket.as_ptr().cast());
        Some(state)
    }
}

/// The words of a `bpf_sock_tuple` and its length in bytes, which tells the kernel the IP version. All of them are
/// written for both versions, since the verifier refuses what the compiler makes of words that are not.
#[inline(always)]
fn tuple(packet: &Packet) -> ([u32; 9], u32) {
    let Flow { source, address: destination, .. } = packet.flow;
    let ports = u32::from(packet.source_port) << 16 | u32::from(packet.flow.port);
    let [a, b, c, d] = words(source);
    let [e, f, g, h] = words(destination);
    match destination.version {
        Version::V4 => ([a, e, ports.to_be(), 0, 0, 0, 0, 0, 0], 12),
        Version::V6 => ([a, b, c, d, e, f, g, h, ports.to_be()], 36),
    }
}

/// An address as four words in network byte order; IPv4 takes the first one.
#[inline(always)]
fn words(Address { high, low, .. }: Address) -> [u32; 4] {
    [((high >> 32) as u32).to_be(), (high as u32).to_be(), ((low >> 32) as u32).to_be(), (low as u32).to_be()]
}
