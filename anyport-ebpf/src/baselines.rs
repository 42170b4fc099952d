//! What anyport is measured against: lookups by a program that does nothing, one that asks an LPM trie, and one that makes a
//! single load, which is the least that a lookup in a table that is not in the caches can cost; and a relay that moves data
//! in the kernel. They are for `cargo xtask bench` only; anyportd does not have them.

#![no_std]
#![no_main]

use anyport_common::{
    maps::{MAX_SERVICES, SOCKETS_PER_SERVICE},
    table::{LINE_WORDS, SEGMENT_BITS, SEGMENT_WORDS},
};
use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_F_MMAPABLE,
        sk_action::{SK_DROP, SK_PASS},
    },
    btf_maps::{Array, ArrayOfMaps, LpmTrie, PerCpuArray, SockHash, SockMap, lpm_trie::Key},
    helpers::{bpf_map_lookup_elem, bpf_sk_assign, bpf_sk_release},
    macros::{btf_map, sk_lookup, stream_verdict},
    programs::{SkBuffContext, SkLookupContext},
};
use core::ptr::{self, NonNull};

const AF_INET: u32 = 2;

/// What a rule of the trie matches: everything up to the port is part of the prefix.
#[repr(C)]
#[derive(Clone, Copy)]
struct Destination {
    protocol: u8,
    /// In network byte order; 0 stands for all ports.
    port: [u8; 2],
    /// IPv4 as a mapped address.
    address: [u8; 16],
    /// Nothing; no prefix is so long.
    reserved: u8,
}

const FULL: u32 = 8 + 16 + 128;

/// To which service a prefix is steered, and how long it is.
#[repr(C)]
#[derive(Clone, Copy)]
struct Binding {
    service: u32,
    prefix_len: u32,
}

/// What is counted for a service.
#[repr(C)]
struct Counts {
    steered: u64,
    errors: u64,
}

#[btf_map(name = "baseline_trie")]
static TRIE: LpmTrie<Destination, Binding, 1> = LpmTrie::new();

#[btf_map(name = "baseline_sock")]
static SOCKETS: SockMap<{ (MAX_SERVICES * SOCKETS_PER_SERVICE) as usize }> = SockMap::new();

#[btf_map(name = "baseline_count")]
static COUNTS: PerCpuArray<Counts, { MAX_SERVICES as usize }> = PerCpuArray::new();

/// The words of a table such as anyport's, all of them zero, in memory of the same kind.
#[repr(transparent)]
struct Segment([u64; SEGMENT_WORDS]);

#[btf_map(name = "baseline_words")]
static WORDS: ArrayOfMaps<Array<Segment, 1, { BPF_F_MMAPABLE as usize }>, 64> = ArrayOfMaps::new();

/// Shows the loader the type of a segment.
#[btf_map(name = "baseline_type")]
static TYPE: Array<Segment, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// How many cache lines they are, a power of two; set by the loader.
#[unsafe(no_mangle)]
static LINES: u32 = 1;

/// What the statistics themselves cost.
#[sk_lookup]
pub fn baseline_empty(_ctx: SkLookupContext) -> u32 {
    SK_PASS
}

/// The usual design: one trie for all rules, asked for the port and for all ports; the longer prefix wins.
#[sk_lookup]
pub fn baseline_lpm(ctx: SkLookupContext) -> u32 {
    let (destination, offset) = destination(&ctx);
    match binding(destination) {
        Some(Binding { service, .. }) => steer(&ctx, service, offset),
        None => SK_PASS,
    }
}

/// The least: each address has a cache line of its own, as far as there are so many, which says where to steer to.
#[sk_lookup]
pub fn baseline_load(ctx: SkLookupContext) -> u32 {
    let (destination, offset) = destination(&ctx);
    // Any multiplication that spreads what differs.
    const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
    let [high, low] = [0, 8].map(|at| {
        let half = &destination.address[at..at + 8];
        u64::from_be_bytes([half[0], half[1], half[2], half[3], half[4], half[5], half[6], half[7]])
    });
    // SAFETY: the reference is valid; the loader has changed the value.
    let lines = unsafe { ptr::read_volatile(&raw const LINES) };
    let line = ((high ^ low).wrapping_mul(SPREAD) >> 32) as u32 & lines.wrapping_sub(1);
    let word = line.wrapping_mul(LINE_WORDS);
    match WORDS.get_value(word >> SEGMENT_BITS, &0) {
        Some(Segment(words)) => steer(&ctx, words[word as usize % SEGMENT_WORDS] as u32 + 1, offset),
        None => SK_PASS,
    }
}

#[inline(always)]
fn steer(ctx: &SkLookupContext, service: u32, offset: u32) -> u32 {
    let Some(socket) = socket(service * SOCKETS_PER_SERVICE + offset) else {
        count(service, |counts| &mut counts.errors);
        return SK_DROP;
    };
    // SAFETY: the socket is referenced until it is released below; both pointers are the kernel's own.
    let error = unsafe {
        let error = bpf_sk_assign(ctx.as_ptr(), socket.as_ptr(), 0);
        bpf_sk_release(socket.as_ptr());
        error
    };
    if error != 0 {
        count(service, |counts| &mut counts.errors);
        return SK_DROP;
    }
    count(service, |counts| &mut counts.steered);
    SK_PASS
}

#[inline(always)]
fn binding(destination: Destination) -> Option<Binding> {
    let exact = TRIE.get(&Key::new(FULL, destination)).copied();
    let any = TRIE.get(&Key::new(FULL, Destination { port: [0; 2], ..destination })).copied();
    match (exact, any) {
        (Some(exact), Some(any)) if any.prefix_len > exact.prefix_len => Some(any),
        (Some(exact), _) => Some(exact),
        (None, any) => any,
    }
}

/// The original destination, and which of a service's sockets serves it.
#[inline(always)]
fn destination(ctx: &SkLookupContext) -> (Destination, u32) {
    // SAFETY: the verifier lets a program read these fields of its context; of the addresses 32 bits at a time.
    let (family, protocol, port, words) = unsafe {
        let lookup = ctx.lookup;
        let family = (*lookup).family;
        let words = if family == AF_INET {
            // Volatile, else the compiler has both branches read from one pointer, which the verifier does not like.
            [0, 0, 0xffff_u32.to_be(), ptr::read_volatile(&raw const (*lookup).local_ip4)]
        } else {
            let local = &raw const (*lookup).local_ip6;
            [(*local)[0], (*local)[1], (*local)[2], (*local)[3]]
        };
        (family, (*lookup).protocol as u8, (*lookup).local_port as u16, words)
    };
    let mut address = [0; 16];
    for (bytes, word) in address.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    let is_udp = u32::from(protocol == 17);
    let offset = if family == AF_INET { is_udp } else { 2 + is_udp };
    (Destination { protocol, port: port.to_be_bytes(), address, reserved: 0 }, offset)
}

#[inline(always)]
fn socket(index: u32) -> Option<NonNull<core::ffi::c_void>> {
    // SAFETY: the map's address is what the loader replaces by the map; the key outlives the call.
    let socket =
        unsafe { bpf_map_lookup_elem(ptr::from_ref(&SOCKETS).cast_mut().cast(), ptr::from_ref(&index).cast()) };
    NonNull::new(socket.cast())
}

#[inline(always)]
fn count(service: u32, counter: impl Fn(&mut Counts) -> &mut u64) {
    if let Some(counts) = COUNTS.get_ptr_mut(service) {
        // SAFETY: the value is this CPU's own, and no other reference to it lives in this program.
        *counter(unsafe { &mut *counts }) += 1;
    }
}

/// The port at which the relay of `bench relay` accepts.
const RELAY_PORT: u32 = 9_500;

/// The sockets of the relay: that towards the upstream by the client's port, and that towards the client by the port of
/// the one towards the upstream, with bit 16 set.
#[btf_map(name = "baseline_pairs")]
static PAIRS: SockHash<u32, 4096> = SockHash::new();

/// Hands what arrives at one socket of a pair to the other.
#[stream_verdict]
pub fn baseline_relay(ctx: SkBuffContext) -> u32 {
    // SAFETY: the verifier lets a program read these fields of its context. The remote port is in network byte order.
    let (local, remote) = unsafe { ((*ctx.skb.skb).local_port, u32::from_be((*ctx.skb.skb).remote_port)) };
    let key = if local == RELAY_PORT { remote } else { 1 << 16 | local };
    PAIRS.redirect_skb(ctx, key, 0) as u32
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Never compiled in: the verifier refuses a program with an endless loop.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
