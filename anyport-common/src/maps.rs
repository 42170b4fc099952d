//! The entries of the BPF maps, as an operator sees them with `bpftool map dump`, and the maps' sizes.

use bytemuck::{Pod, Zeroable};

/// Changes whenever programs and user space of different versions could misunderstand each other's maps.
pub const ABI: u32 = 1;

/// Names of the maps in the kernel, where 15 characters are the limit.
pub mod names {
    /// One [`super::Control`].
    pub const CONTROL: &str = "anyport_control";
    /// The words that [`crate::table`] describes.
    pub const TABLE: &str = "anyport_table";
    /// A [`super::RuleEntry`] for each port range of each rule: the rule set for a human reader.
    pub const RULES: &str = "anyport_rules";
    /// [`super::Counters`] by rule, per CPU.
    pub const COUNTS: &str = "anyport_counts";
    /// The services' sockets.
    pub const SOCKETS: &str = "anyport_sockets";
}

/// Words of the table map: room for the generation in force and the one that replaces it. 4 MiB.
pub const TABLE_WORDS: u32 = 1 << 19;
/// Most rules at a time. Counters are 24 bytes a rule and CPU.
pub const MAX_RULES: u32 = 1 << 14;
/// Most port ranges of all rules together.
pub const MAX_RULE_ENTRIES: u32 = 1 << 16;
/// Sockets of a service: one for each transport and family, see [`crate::flow::Flow::socket_offset`].
pub const SOCKETS_PER_SERVICE: u32 = 4;
/// Most services at a time, the [`REFUSE`] slot included.
pub const MAX_SERVICES: u32 = 1 << 10;
/// The slot of the sockets that answer with a refusal, for hooks that can't refuse by themselves.
pub const REFUSE: u16 = 0;

/// The single entry of the control map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct Control {
    /// [`ABI`] of the programs and maps.
    pub abi: u32,
    /// The table word at which the generation in force begins; 0 while there is none.
    pub root: u32,
}

/// Says that a [`RuleEntry`] steers to its service.
pub const ACTION_STEER: u8 = 1;
/// Says that a [`RuleEntry`] leaves its ports to the host.
pub const ACTION_EXCEPT: u8 = 2;

/// Key of the rules map.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct RuleKey {
    /// The rule's number, by which it is counted.
    pub rule: u32,
    /// Counts the rule's entries from 0.
    pub part: u32,
}

/// One port range of one rule for one transport.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct RuleEntry {
    /// The prefix in network byte order; IPv4 takes the first four bytes.
    pub prefix: [u8; 16],
    /// 4 or 6.
    pub ip_version: u8,
    /// The prefix length.
    pub prefix_len: u8,
    /// IP protocol number: 6 or 17.
    pub protocol: u8,
    /// [`ACTION_STEER`] or [`ACTION_EXCEPT`].
    pub action: u8,
    /// First port of the range, in host byte order.
    pub first_port: u16,
    /// Last port of the range, in host byte order.
    pub last_port: u16,
    /// The service's slot: its sockets stand at four times this in the sockets map.
    pub service: u32,
}

/// What became of the packets that a rule decided about.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Counters {
    /// Lookups that ended at the service's socket.
    pub steered: u64,
    /// Packets dropped since the service had no live socket.
    pub no_socket: u64,
    /// Packets dropped since the socket could not be assigned, fragments at tc among them.
    pub assign_error: u64,
}

const _: () = {
    assert!(size_of::<Control>() == 8);
    assert!(size_of::<RuleKey>() == 8);
    assert!(size_of::<RuleEntry>() == 28);
    assert!(size_of::<Counters>() == 24);
};
