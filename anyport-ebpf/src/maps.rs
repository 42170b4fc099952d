//! The maps, and what both programs do with them.

use anyport_common::{
    flow::{Address, Flow},
    maps::{
        Control, Counters, MAX_RULE_ENTRIES, MAX_RULES, MAX_SERVICES, RuleEntry, RuleKey, SOCKETS_PER_SERVICE,
        TABLE_WORDS,
    },
    table::{self, Store, Verdict},
};
use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, bpf_sock},
    btf_maps::{Array, HashMap, PerCpuArray, SockMap},
    helpers::bpf_map_lookup_elem,
    macros::btf_map,
};
use core::ptr::{self, NonNull};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;

#[btf_map(name = "anyport_control")]
static CONTROL: Array<Control, 1, MMAPABLE> = Array::new();

#[btf_map(name = "anyport_table")]
static TABLE: Array<u64, { TABLE_WORDS as usize }, MMAPABLE> = Array::new();

/// Not read here: the rule set for a human reader, kept in step with the table by user space.
#[btf_map(name = "anyport_rules")]
static RULES: HashMap<RuleKey, RuleEntry, { MAX_RULE_ENTRIES as usize }, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

#[btf_map(name = "anyport_counts")]
static COUNTS: PerCpuArray<Counters, { MAX_RULES as usize }> = PerCpuArray::new();

#[btf_map(name = "anyport_sockets")]
static SOCKETS: SockMap<{ (MAX_SERVICES * SOCKETS_PER_SERVICE) as usize }> = SockMap::new();

struct Table;

impl Store for Table {
    #[inline(always)]
    fn word(&self, index: u32) -> Option<u64> {
        TABLE.get(index).copied()
    }
}

/// Judges a flow by the generation in force.
#[inline(always)]
pub fn judge(flow: &Flow) -> Verdict {
    root().and_then(|root| table::lookup(&Table, root, flow)).unwrap_or(Verdict::Unmatched)
}

/// Whether a rule of the generation in force has an opinion on any port of an address.
#[inline(always)]
pub fn covers(address: Address) -> bool {
    root().and_then(|root| table::covers(&Table, root, address)).unwrap_or(false)
}

/// The generation in force, if there is one.
#[inline(always)]
fn root() -> Option<u32> {
    // The daemon replaces the root while programs run; it is read once, so that one generation judges.
    let control = CONTROL.get_ptr(0)?;
    // SAFETY: the pointer is to the map's only value and aligned as the map's values are.
    let root = unsafe { ptr::read_volatile(&raw const (*control).root) };
    (root != 0).then_some(root)
}

/// Adds one to a counter of a rule.
#[inline(always)]
pub fn count(rule: u32, counter: impl Fn(&mut Counters) -> &mut u64) {
    if let Some(counters) = COUNTS.get_ptr_mut(rule) {
        // SAFETY: the slot is this CPU's own, and no other reference to it lives in this program.
        *counter(unsafe { &mut *counters }) += 1;
    }
}

/// The socket of a service for this kind of flow, with a reference that the caller must give back.
#[inline(always)]
pub fn socket(service: u16, flow: &Flow) -> Option<NonNull<bpf_sock>> {
    let index = u32::from(service) * SOCKETS_PER_SERVICE + flow.socket_offset();
    // SAFETY: the map's address is what the loader replaces by the map; the key outlives the call.
    let socket =
        unsafe { bpf_map_lookup_elem(ptr::from_ref(&SOCKETS).cast_mut().cast(), ptr::from_ref(&index).cast()) };
    NonNull::new(socket.cast())
}
