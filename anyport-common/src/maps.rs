//! The entries of the BPF maps, as an administrator sees them with `bpftool map dump`, and the maps' sizes.

use bytemuck::{Pod, Zeroable};

use crate::table::{NUMBER_BITS, OFFSET_BITS, SEGMENT_BITS};

/// Changes whenever programs and user space of different versions could misunderstand each other's maps.
pub const ABI: u32 = 7;

/// Names of the maps in the kernel, where 15 characters are the limit.
pub mod names {
    /// One [`super::Control`].
    pub const CONTROL: &str = "anyport_control";
    /// Segments of the words that [`crate::table`] describes.
    pub const TABLE: &str = "anyport_table";
    /// A [`super::RuleEntry`] by rule number: the rule set for a human reader.
    pub const RULES: &str = "anyport_rules";
    /// The [`super::PortEntry`]s of the rules that have more than one range.
    pub const PORTS: &str = "anyport_ports";
    /// Packets that were handed to a socket, by rule number, in portions and by CPU.
    pub const COUNTS: &str = "anyport_counts";
    /// [`super::Drops`] by rule number, in portions.
    pub const DROPS: &str = "anyport_drops";
    /// A segment of the table, of which only the type matters.
    pub const SEGMENT: &str = "anyport_segment";
    /// A counter of packets that were handed to a socket, of which only the type matters.
    pub const COUNTER: &str = "anyport_counter";
    /// A portion of the drops, of which only the type matters.
    pub const PORTION: &str = "anyport_portion";
    /// A [`super::Batch`] for each of the first CPUs.
    pub const BATCHES: &str = "anyport_journal";
    /// [`super::Totals`], per CPU.
    pub const TOTALS: &str = "anyport_totals";
    /// The services' sockets.
    pub const SOCKETS: &str = "anyport_sockets";
    /// A ring buffer of [`crate::event::Event`]s.
    pub const EVENTS: &str = "anyport_events";
    /// A [`crate::event::Filter`] for each subscriber.
    pub const FILTERS: &str = "anyport_filters";
}

/// Most segments of the table, of 512 KiB each: 512 MiB. They are made as they are needed.
pub const MAX_SEGMENTS: u32 = 1 << 10;
/// Most rules at a time that the maps can hold; the daemon's own limit is lower.
pub const MAX_RULES: u32 = 1 << NUMBER_BITS;
/// Sockets of a service: one for each transport and family, see [`crate::flow::Flow::socket_offset`].
pub const SOCKETS_PER_SERVICE: u32 = 4;
/// Most services at a time, the [`REFUSE`] slot included.
pub const MAX_SERVICES: u32 = 1 << 10;
/// The slot of the sockets that answer with a refusal, for hooks that can't refuse by themselves.
pub const REFUSE: u16 = 0;

/// Rules that are counted in one portion.
pub const PORTION_RULES: u32 = 1 << 15;
/// Portions that cover [`MAX_RULES`].
pub const PORTIONS: u32 = MAX_RULES / PORTION_RULES;
/// Sets of counters: the first one is shared by all CPUs that have none of their own, the others are those of the
/// first CPUs.
pub const COUNTER_SETS: u32 = 33;
/// Packets that a [`Batch`] has room for.
pub const BATCH_ENTRIES: usize = 60;

/// Generations whose roots stand side by side, so that one store switches between them.
pub const GENERATIONS: usize = 64;

/// The single entry of the control map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct Control {
    /// [`ABI`] of the programs and maps.
    pub abi: u32,
    /// Which of the generations is active.
    pub current: u32,
    /// Not 0 if packets are counted in [`Batch`]es; else they are counted one by one.
    pub is_batched: u64,
    /// Which subscribers there are for events, a bit each.
    pub subscribers: u64,
    /// The generations.
    pub generations: [Generation; GENERATIONS],
}

/// A generation: [`crate::table::Slot`]s that cover the address space of each family.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Generation {
    /// Counts the generations.
    pub number: u64,
    /// For IPv4.
    pub v4: u64,
    /// For IPv6.
    pub v6: u64,
}

/// Says that a [`PortEntry`] or the ports of a [`RuleEntry`] are steered.
pub const ACTION_STEER: u8 = 1;
/// Says that a [`PortEntry`] is left to the host.
pub const ACTION_EXCEPT: u8 = 2;

/// A rule, at its number in the map of rules; `ip_version` is 0 where there is none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct RuleEntry {
    /// The prefix in network byte order; IPv4 takes the first four bytes.
    pub prefix: [u8; 16],
    /// The clients that the rule is about, likewise.
    pub source: [u8; 16],
    /// 4 or 6.
    pub ip_version: u8,
    /// The prefix length.
    pub prefix_len: u8,
    /// The length of the source; 0 if the rule is about all clients.
    pub source_len: u8,
    /// IP protocol number, 6 or 17; 0 for both.
    pub protocol: u8,
    /// First port that is steered, in host byte order; where there are several ranges, of the first one.
    pub first_port: u16,
    /// Last port that is steered; where there are several ranges, of the last one.
    pub last_port: u16,
    /// Where the ranges stand in the map of ports, if there are several or some are left to the host; else 0.
    pub ports_at: u32,
    /// How many stand there.
    pub ports: u32,
    /// The service's slot: its sockets stand at four times this in the sockets map.
    pub service: u32,
    /// Nothing.
    pub reserved: u32,
}

/// One port range of a rule.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct PortEntry {
    /// First port of the range, in host byte order.
    pub first_port: u16,
    /// Last port of the range, in host byte order.
    pub last_port: u16,
    /// [`ACTION_STEER`] or [`ACTION_EXCEPT`].
    pub action: u8,
    /// Nothing.
    pub reserved: [u8; 3],
}

/// What became of the packets that a rule could not hand to a socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Drops {
    /// Packets dropped since the service had no live socket.
    pub no_socket: u64,
    /// Packets dropped since the socket could not be assigned, fragments at tc among them.
    pub assign_error: u64,
    /// Packets dropped since the service does not take their source.
    pub denied: u64,
}

/// What became of the packets that a rule decided about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Lookups that ended at the service's socket.
    pub steered: u64,
    /// Packets dropped since the service had no live socket.
    pub no_socket: u64,
    /// Packets dropped since the socket could not be assigned, fragments at tc among them.
    pub assign_error: u64,
    /// Packets dropped since the service does not take their source.
    pub denied: u64,
}

/// Packets of a CPU that were handed to a socket and are not counted yet. Among many rules the counter of one is never in
/// the processor's caches: counting many packets at once lets it fetch the counters all at the same time.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct Batch {
    /// How many entries there are and, above the last 32 bits, how often all were counted and the batch was emptied.
    pub state: u64,
    /// Not 0 while a program writes here: one that interrupts it counts by itself.
    pub is_busy: u32,
    /// Nothing.
    pub reserved: u32,
    /// The rules' numbers, a packet each.
    pub entries: [u32; BATCH_ENTRIES],
}

/// What became of the packets that no rule steers.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Totals {
    /// No rule matched.
    pub unmatched: u64,
    /// A rule leaves them to the host.
    pub excepted: u64,
}

const _: () = {
    assert!(size_of::<Control>() == 24 + 24 * GENERATIONS);
    assert!(size_of::<RuleEntry>() == 56);
    assert!(size_of::<PortEntry>() == 8);
    assert!(size_of::<Drops>() == 24);
    assert!(size_of::<Batch>() == 256, "cache lines of its own");
    assert!(MAX_SEGMENTS << SEGMENT_BITS <= 1 << OFFSET_BITS);
};
