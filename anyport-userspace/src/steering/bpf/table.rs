//! The lookup table in BPF maps, and the one word that says which generation is active.

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
};

use anyhow::Context as _;
use anyport_common::{
    maps::{ABI, Control, GENERATIONS, Generation, MAX_SERVICES, names},
    table::SEGMENT_WORDS,
};
use aya::maps::Map;

use super::types_of;
use crate::{
    rules::{RuleView, ServiceName, SourceLists},
    steering::{Plan, ServiceSockets},
    sys::{self, MappedWords, wait_for_running_programs},
    table::{Published, Reader, Segment, Segments, Table},
};

/// Words of the control map.
const CONTROL_WORDS: usize = size_of::<Control>() / 8;
/// Which of them says whether packets are batched.
const BATCHED_WORD: usize = 1;
/// Which of them says which subscribers there are.
pub(super) const SUBSCRIBERS_WORD: usize = 2;
/// Where the generations begin among them, and how many words each has.
const FIRST_GENERATION: usize = 3;
const GENERATION_WORDS: usize = size_of::<Generation>() / 8;

/// The counters of so few rules stay in a processor's caches, where counting is cheaper than noting.
const FEW_RULES: usize = 64;
/// From so many slots on everything is compiled in a full rebuild, to forget those of services that are gone.
const MANY_SLOTS: usize = 4 * MAX_SERVICES as usize;

/// The table that the programs read.
#[derive(Debug)]
pub(super) struct BpfTable {
    table: Table,
    control: MappedWords,
    current: usize,
    /// Whether programs note packets before they count them.
    is_batched: bool,
    /// The slots of all services and the clients that they allow, also of those that are gone, since the last full rebuild:
    /// policies that are not used at the moment still have them.
    slots: HashMap<ServiceName, (u16, Arc<SourceLists>)>,
}

impl BpfTable {
    /// `segment` shows the type of a segment.
    pub(super) fn new(table: Map, segment: &Map, control: Map, readers: Arc<Published>) -> anyhow::Result<Self> {
        let Map::Array(control) = control else { anyhow::bail!("the control map is no array") };
        let control = map_control(control.fd())?;
        control.words()[0].store(word(ABI, 0), Ordering::Release);
        let Map::ArrayOfMaps(table) = table else { anyhow::bail!("the map of the table is no array of maps") };
        let outer = table.fd().as_fd().try_clone_to_owned().context("duplicate the descriptor of the table")?;
        let types = types_of(segment).context("look at the type of a segment")?;
        let segments = BpfSegments { outer, types, made: HashMap::new(), apart: Vec::new(), readers };
        Ok(Self {
            table: Table::new(Box::new(segments)),
            control,
            current: 0,
            is_batched: false,
            slots: HashMap::new(),
        })
    }

    /// Activates a plan: made aside first, then switched to by a single store.
    pub(super) fn publish(&mut self, plan: &Plan<'_>) -> anyhow::Result<()> {
        // A service under another slot, or one that allows other clients, changes what every rule for it says.
        let stays = |it: &ServiceSockets| {
            self.slots.get(&it.name).is_none_or(|(slot, sources)| *slot == it.slot && *sources == it.sources)
        };
        // Names that come and go are not remembered for ever.
        let are_slots_kept = self.slots.len() < MANY_SLOTS && plan.services.iter().all(stays);
        let made = self.make(plan.rules, plan, are_slots_kept).and_then(|()| self.table.connect());
        if let Err(error) = made {
            self.table.abort();
            return Err(error);
        }
        self.is_batched = plan.rules.len() > FEW_RULES;
        self.control.words()[BATCHED_WORD].store(self.is_batched.into(), Ordering::SeqCst);
        self.switch_to(self.table.generation(plan.generation));
        self.table.commit();
        if !are_slots_kept || plan.changed.is_none() {
            self.slots.clear();
        }
        self.slots.extend(plan.services.iter().map(|it| (it.name.clone(), (it.slot, Arc::clone(&it.sources)))));
        Ok(())
    }

    fn make(&mut self, rules: RuleView<'_>, plan: &Plan<'_>, are_slots_kept: bool) -> anyhow::Result<()> {
        let receivers: HashMap<_, _> = plan.services.iter().map(|it| (&it.name, it.receiver())).collect();
        let find = |name: &_| receivers.get(name).copied().with_context(|| format!("the plan has no service {name}"));
        match plan.changed {
            Some(prefixes) if are_slots_kept => self.table.change(rules, prefixes, &find),
            _ => self.table.make(rules, &find),
        }
    }

    fn switch_to(&mut self, generation: Generation) {
        let next = (self.current + 1) % GENERATIONS;
        // A program that began when the other half of the places was written may still read one of this half.
        if next.is_multiple_of(GENERATIONS / 2) {
            wait_for_running_programs();
        }
        let at = FIRST_GENERATION + next * GENERATION_WORDS;
        let words = &self.control.words()[at..at + GENERATION_WORDS];
        for (to, from) in words.iter().zip([generation.number, generation.v4, generation.v6]) {
            to.store(from, Ordering::Relaxed);
        }
        self.control.words()[0].store(word(ABI, u32::try_from(next).unwrap_or_default()), Ordering::Release);
        self.current = next;
    }

    pub(super) fn reader(&self) -> Reader {
        self.table.reader()
    }

    /// Has the next plan put all segments into the map.
    pub(super) fn forget_lost(&mut self) {
        self.table.forget_connected();
    }

    pub(super) fn trim(&mut self) -> anyhow::Result<()> {
        self.table.trim()
    }

    /// Bytes of the segments.
    pub(super) fn bytes(&self) -> u64 {
        self.table.bytes().1
    }
}

/// The words of the control map.
pub(super) fn map_control(control: impl AsFd) -> anyhow::Result<MappedWords> {
    MappedWords::new(control, CONTROL_WORDS).context("map the control map into memory")
}

/// Two neighbours in a map, as one word.
fn word(first: u32, second: u32) -> u64 {
    bytemuck::cast([first, second])
}

/// Segments as maps within the map of the table.
#[derive(Debug)]
struct BpfSegments {
    outer: OwnedFd,
    types: sys::bpf::Types,
    made: HashMap<u32, OwnedFd>,
    /// Those that are not in the map yet.
    apart: Vec<u32>,
    readers: Arc<Published>,
}

impl Segments for BpfSegments {
    fn create(&mut self, number: u32) -> anyhow::Result<Segment> {
        let context = "make a segment of the lookup table";
        let map = sys::bpf::create_array(names::SEGMENT, SEGMENT_WORDS * 8, 1, &self.types).context(context)?;
        let words = MappedWords::new(&map, SEGMENT_WORDS).context(context)?;
        self.made.insert(number, map);
        self.apart.push(number);
        Ok(Segment::Mapped(words))
    }

    fn connect(&mut self) -> anyhow::Result<()> {
        let apart: Vec<_> = self.apart.iter().map(|number| (*number, &self.made[number])).collect();
        sys::bpf::set_inner(&self.outer, &apart).context("put segments into the lookup table")?;
        self.apart.clear();
        Ok(())
    }

    fn forget_connected(&mut self) {
        self.apart = self.made.keys().copied().collect();
    }

    /// What takes their places is one that stays, since the kernel waits for programs at each that is taken out.
    fn remove(&mut self, numbers: &[u32]) -> anyhow::Result<()> {
        let Some(other) = self.made.keys().find(|number| !numbers.contains(number)).copied() else {
            return Ok(());
        };
        let others: Vec<_> = numbers.iter().map(|number| (*number, &self.made[&other])).collect();
        sys::bpf::set_inner(&self.outer, &others).context("take segments out of the lookup table")?;
        self.made.retain(|number, _| !numbers.contains(number));
        Ok(())
    }

    fn wait_for_readers(&mut self) {
        wait_for_running_programs();
        self.readers.wait_for_readers();
    }
}
