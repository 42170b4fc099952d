//! The maps, and what the programs do with them.

use anyport_common::{
    event::{DENIED, NO_SOCKET},
    flow::{Address, Flow, Version},
    maps::{
        BATCH_ENTRIES, Batch, COUNTER_SETS, Control, Drops, GENERATIONS, Generation, MAX_SEGMENTS, MAX_SERVICES,
        PORTION_RULES, PORTIONS, PortEntry, RuleEntry, SOCKETS_PER_SERVICE, Totals,
    },
    table::{self, Keys, SEGMENT_WORDS, Slot, Store, Verdict, Words},
};
use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, bpf_sock},
    btf_maps::{Array, ArrayOfMaps, PerCpuArray},
    helpers::bpf_get_smp_processor_id,
    macros::btf_map,
};
use core::{
    intrinsics::{AtomicOrdering, atomic_xadd},
    ptr::{self, NonNull},
};

use crate::sockets::SocketMap;

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;

#[btf_map(name = "anyport_control")]
static CONTROL: Array<Control, 1, MMAPABLE> = Array::new();

/// Each segment is the one value of a map, so that the words of a node are found by a single look-up.
#[repr(transparent)]
struct Segment([u64; SEGMENT_WORDS]);

#[btf_map(name = "anyport_table")]
static TABLE: ArrayOfMaps<Array<Segment, 1, MMAPABLE>, { MAX_SEGMENTS as usize }> = ArrayOfMaps::new();

/// By set of counters, and within a set by portion. The numbers of packets that were handed to a socket stand by
/// themselves, close to each other, since they are what is counted all the time.
#[btf_map(name = "anyport_counts")]
static COUNTS: ArrayOfMaps<Array<u64, { PORTION_RULES as usize }, MMAPABLE>, { (COUNTER_SETS * PORTIONS) as usize }> =
    ArrayOfMaps::new();

#[btf_map(name = "anyport_journal")]
static BATCHES: Array<Batch, { COUNTER_SETS as usize - 1 }, MMAPABLE> = Array::new();

#[btf_map(name = "anyport_drops")]
static DROPS: ArrayOfMaps<Array<Drops, { PORTION_RULES as usize }, MMAPABLE>, { PORTIONS as usize }> =
    ArrayOfMaps::new();

/// Not read here, and replaced by user space with maps as large as they have to be: what they hold is for human readers.
#[btf_map(name = "anyport_rules")]
static RULES: Array<RuleEntry, 1, MMAPABLE> = Array::new();

#[btf_map(name = "anyport_ports")]
static PORTS: Array<PortEntry, 1, MMAPABLE> = Array::new();

/// Not read here either: these show user space the types of what the maps of maps hold.
#[btf_map(name = "anyport_segment")]
static SEGMENT: Array<Segment, 1, MMAPABLE> = Array::new();

#[btf_map(name = "anyport_counter")]
static COUNTER: Array<u64, 1, MMAPABLE> = Array::new();

#[btf_map(name = "anyport_portion")]
static PORTION: Array<Drops, 1, MMAPABLE> = Array::new();

#[btf_map(name = "anyport_totals")]
static TOTALS: PerCpuArray<Totals, 1> = PerCpuArray::new();

#[btf_map(name = "anyport_sockets")]
static SOCKETS: SocketMap<{ (MAX_SERVICES * SOCKETS_PER_SERVICE) as usize }> = SocketMap::new();

struct Table;

impl Store for Table {
    type Segment<'a> = &'a Segment;

    #[inline(always)]
    fn segment(&self, number: u32) -> Option<&Segment> {
        TABLE.get_value(number, &0)
    }

    #[inline(always)]
    fn descend(&self, root: Slot, Keys { key, low, source }: Keys) -> Option<Slot> {
        let slot = Slot(anyport_descend(root.0, key, low, source));
        (slot != NOWHERE).then_some(slot)
    }
}

/// What no slot is.
const NOWHERE: Slot = Slot(u64::MAX);

/// A global function, which the verifier walks once, not at each call (Linux 5.6).
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn anyport_descend(root: u64, key: u64, low: u64, source: u64) -> u64 {
    table::descend(&Table, Slot(root), Keys { key, low, source }).unwrap_or(NOWHERE).0
}

impl Words for &Segment {
    #[inline(always)]
    fn word(&self, index: u32) -> u64 {
        self.0[index as usize % SEGMENT_WORDS]
    }
}

/// What the rules say about a flow.
#[derive(Clone, Copy)]
pub struct Judged {
    pub verdict: Verdict,
    /// The number of the generation that judged.
    pub generation: u64,
}

/// Judges a flow by the current generation, and counts the flows that are not steered.
#[inline(always)]
pub fn judge(flow: &Flow) -> Verdict {
    let verdict = look_up(flow).map_or(Verdict::Unmatched, |judged| judged.verdict);
    match verdict {
        Verdict::Unmatched => count_total(|totals| &mut totals.unmatched),
        Verdict::Host { .. } => count_total(|totals| &mut totals.excepted),
        Verdict::Steer { .. } | Verdict::Deny { .. } => {}
    }
    verdict
}

/// Judges a flow by the current generation.
#[inline(always)]
pub fn look_up(flow: &Flow) -> Option<Judged> {
    let generation = active(CONTROL.get(0)?);
    let verdict = table::lookup(&Table, root(generation, flow.address), flow).unwrap_or(Verdict::Unmatched);
    Some(Judged { verdict, generation: generation.number })
}

/// Which subscribers there are, a bit each.
#[inline(always)]
pub fn subscribers() -> u32 {
    // SAFETY: the reference is valid; user space may change the value at any time.
    CONTROL.get(0).map_or(0, |control| unsafe { ptr::read_volatile(&raw const control.subscribers) as u32 })
}

/// Whether a rule of the active generation matches any port of an address.
#[inline(always)]
pub fn covers(address: Address) -> bool {
    CONTROL.get(0).and_then(|control| table::covers(&Table, root(active(control), address), address)).unwrap_or(false)
}

/// The active generation.
#[inline(always)]
fn active(control: &Control) -> &Generation {
    // The daemon replaces the number while programs run; it is read once, so that one generation judges.
    // SAFETY: the reference is valid.
    let current = unsafe { ptr::read_volatile(&raw const control.current) };
    &control.generations[current as usize % GENERATIONS]
}

#[inline(always)]
fn root(generation: &Generation, address: Address) -> Slot {
    Slot(match address.version {
        Version::V4 => generation.v4,
        Version::V6 => generation.v6,
    })
}

#[inline(always)]
fn count_total(counter: impl Fn(&mut Totals) -> &mut u64) {
    if let Some(totals) = TOTALS.get_ptr_mut(0) {
        // SAFETY: the value is this CPU's own, and no other reference to it lives in this program.
        *counter(unsafe { &mut *totals }) += 1;
    }
}

/// Counts a packet that was handed to a socket, at once or in the batch of this CPU.
#[inline(always)]
pub fn count_steered(rule: u32) {
    // SAFETY: the helper only reads which CPU this is.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let is_batched = CONTROL.get(0).is_some_and(|control| {
        // SAFETY: the reference is valid; user space may change the value at any time.
        unsafe { ptr::read_volatile(&raw const control.is_batched) != 0 }
    });
    if !is_batched {
        count_of(cpu, rule);
    } else if BATCHES.get_ptr_mut(cpu).is_none_or(|batch| !add_to_batch(batch, cpu, rule)) {
        count_shared(rule);
    }
}

/// Adds a packet to the batch of this CPU, unless another program was interrupted while it did so. A full batch is
/// emptied.
#[inline(always)]
fn add_to_batch(batch: *mut Batch, cpu: u32, rule: u32) -> bool {
    // SAFETY: the batch is valid and aligned, and only programs on this CPU write to it; one that interrupts another
    // ends before that goes on. Volatile, so that all is done in this order.
    unsafe {
        if ptr::read_volatile(&raw const (*batch).is_busy) != 0 {
            return false;
        }
        ptr::write_volatile(&raw mut (*batch).is_busy, 1);
        let state = ptr::read_volatile(&raw const (*batch).state);
        let length = state as u32 as usize;
        if length < BATCH_ENTRIES {
            ptr::write_volatile(&raw mut (*batch).entries[length], rule);
        }
        ptr::write_volatile(&raw mut (*batch).state, state + 1);
        if length + 1 >= BATCH_ENTRIES {
            anyport_empty(cpu);
            ptr::write_volatile(&raw mut (*batch).state, ((state >> 32) + 1) << 32);
        }
        ptr::write_volatile(&raw mut (*batch).is_busy, 0);
    }
    true
}

/// Counts what a full batch holds. None of the counters depends on another, so that a processor waits for the memory of
/// many of them at once. A global function, as [`anyport_descend`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn anyport_empty(cpu: u32) -> u32 {
    if let Some(batch) = BATCHES.get_ptr_mut(cpu) {
        for place in 0..BATCH_ENTRIES {
            // SAFETY: the batch is valid and aligned, and only programs on this CPU write to it.
            count_of(cpu, unsafe { ptr::read_volatile(&raw const (*batch).entries[place]) });
        }
    }
    0
}

/// Counts a packet among those of this CPU.
#[inline(always)]
fn count_of(cpu: u32, rule: u32) {
    let (portion, place) = place_of(rule);
    if let Some(own) = COUNTS.get_value_ptr_mut((cpu + 1) * PORTIONS + portion, &place) {
        // SAFETY: the value is valid and aligned, and only programs on this CPU write to it.
        unsafe { *own += 1 };
    } else {
        // There are very many rules or CPUs.
        count_shared(rule);
    }
}

/// Counts a packet where programs on all CPUs may.
#[inline(always)]
fn count_shared(rule: u32) {
    let (portion, place) = place_of(rule);
    if let Some(shared) = COUNTS.get_value_ptr_mut(portion, &place) {
        // SAFETY: the value is valid and aligned.
        unsafe { add_one(shared) };
    }
}

/// Counts a packet that a rule could not hand to a socket, by the outcome of its event.
#[inline(always)]
pub fn count_drop(rule: u32, outcome: u8) {
    let (portion, place) = place_of(rule);
    if let Some(drops) = DROPS.get_value_ptr_mut(portion, &place) {
        // SAFETY: the value is valid and aligned, and so are its fields.
        unsafe {
            add_one(match outcome {
                NO_SOCKET => &raw mut (*drops).no_socket,
                DENIED => &raw mut (*drops).denied,
                _ => &raw mut (*drops).assign_error,
            });
        }
    }
}

/// The portion of the counters that has a rule, and its place there.
#[inline(always)]
const fn place_of(rule: u32) -> (u32, u32) {
    (rule / PORTION_RULES % PORTIONS, rule % PORTION_RULES)
}

/// Programs on other CPUs and the daemon change the value by atomic operations, too. The target has no compare-and-swap,
/// without which the standard library offers no atomic addition.
///
/// # Safety
/// The counter is valid and aligned.
#[inline(always)]
pub unsafe fn add_one(counter: *mut u64) {
    // SAFETY: as the caller says.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, 1) };
}

/// The socket of a service for this kind of flow, with a reference that the caller must give back.
#[inline(always)]
pub fn socket(service: u16, flow: &Flow) -> Option<NonNull<bpf_sock>> {
    SOCKETS.get(u32::from(service) * SOCKETS_PER_SERVICE + flow.socket_offset())
}
