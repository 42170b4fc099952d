//! What the programs count, in memory that they share with the daemon.

use std::{
    cell::RefCell,
    collections::{HashMap, HashSet},
    ops::Range,
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU64, Ordering, fence},
    },
};

use anyhow::Context as _;
use anyport_common::maps::{BATCH_ENTRIES, Batch, COUNTER_SETS, Counters, Drops, PORTION_RULES, PORTIONS};
use aya::{maps::Map, util::nr_cpus};

use super::types_of;
use crate::{
    steering::SharedCounters,
    sys::{self, MappedWords},
};

/// What the counters of all CPUs may take, in bytes. Rules beyond have only the set that all CPUs share.
const BUDGET: u64 = 64 << 20;
const BATCH_WORDS: usize = size_of::<Batch>() / 8;
/// The words before the entries.
const BATCH_HEAD: usize = std::mem::offset_of!(Batch, entries) / 8;

/// The counters of the rules.
#[derive(Debug)]
pub(super) struct Counts {
    steered: Portions,
    drops: Portions,
    /// Sets of counters for packets that were handed to a socket.
    sets: u32,
    /// [`Batch`]es, side by side.
    batches: MappedWords,
    /// No rule has had this number or a higher one.
    end: u32,
}

/// The counters, for the back end and for those who only read.
#[derive(Clone, Debug)]
pub(super) struct SharedCounts(Arc<RwLock<Counts>>);

impl From<Counts> for SharedCounts {
    fn from(counts: Counts) -> Self {
        Self(Arc::new(RwLock::new(counts)))
    }
}

impl SharedCounts {
    pub(super) fn read(&self) -> RwLockReadGuard<'_, Counts> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, Counts> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SharedCounters for SharedCounts {
    fn read(&self) -> Box<dyn Fn(u32) -> Counters + '_> {
        let counts = self.read();
        let batched = RefCell::new(counts.batched());
        Box::new(move |number| counts.get(number, &mut batched.borrow_mut()))
    }
}

/// What the batches hold, each as it was at a moment.
#[derive(Debug, Default)]
pub(super) struct Batched(Vec<BatchedByCpu>);

#[derive(Debug, Default)]
struct BatchedByCpu {
    /// How often the batch had been emptied.
    emptied: u32,
    packets: HashMap<u32, u64>,
}

impl BatchedByCpu {
    fn packets_of(&self, number: u32) -> u64 {
        self.packets.get(&number).copied().unwrap_or_default()
    }
}

/// Counters in portions, made as they are needed, within a map of maps.
#[derive(Debug)]
struct Portions {
    outer: OwnedFd,
    types: sys::bpf::Types,
    /// Words of a counter.
    words: usize,
    made: HashMap<u32, (OwnedFd, MappedWords)>,
}

impl Counts {
    /// `counter` and `portion` show the types of a portion of counters and of one of drops.
    pub(super) fn new(steered: Map, counter: &Map, drops: Map, portion: &Map, batches: Map) -> anyhow::Result<Self> {
        let Map::Array(batches) = batches else { anyhow::bail!("the map of batches is no array") };
        let words = (COUNTER_SETS as usize - 1) * BATCH_WORDS;
        let batches = MappedWords::new(batches.fd(), words).context("map the batches into memory")?;
        let [steered_types, drops_types] = [types_of(counter), types_of(portion)];
        let attempt = "look at the types of the counters";
        let cpus = nr_cpus().map_err(|(_, error)| error).context("count the CPUs")?;
        let sets = u32::try_from(cpus).map_or(COUNTER_SETS, |cpus| cpus.saturating_add(1).min(COUNTER_SETS));
        Ok(Self {
            steered: Portions::new(steered, steered_types.context(attempt)?, 1)?,
            drops: Portions::new(drops, drops_types.context(attempt)?, size_of::<Drops>() / 8)?,
            sets,
            batches,
            end: 0,
        })
    }

    /// Makes room for the counters of these rule numbers, which [`Self::reset`] has to begin at zero. Returns the portions that are new.
    pub(super) fn make_room(&mut self, numbers: &[Range<u32>]) -> anyhow::Result<HashSet<u32>> {
        self.end = numbers.iter().map(|range| range.end).fold(self.end, u32::max);
        let portions = |range: &Range<u32>| range.start / PORTION_RULES..range.end.div_ceil(PORTION_RULES);
        let needed: HashSet<u32> = numbers.iter().flat_map(portions).collect();
        let new: HashSet<u32> = needed.into_iter().filter(|portion| !self.drops.made.contains_key(portion)).collect();
        let with_sets: Vec<u32> = new.iter().flat_map(|portion| self.sets_of(*portion)).collect();
        self.steered.make(&with_sets)?;
        self.drops.make(&new.iter().copied().collect::<Vec<_>>())?;
        Ok(new)
    }

    /// Has these rule numbers begin at zero. Others may read meanwhile.
    pub(super) fn reset(&self, numbers: &[Range<u32>], new: &HashSet<u32>) {
        let mut batched = self.batched();
        // What was just made is zero.
        let is_old = |number: &u32| !new.contains(&(number / PORTION_RULES));
        for number in numbers.iter().cloned().flatten().filter(is_old) {
            for counter in self.each(number).chain(self.drops.counter(number / PORTION_RULES, number)) {
                for word in counter {
                    word.store(0, Ordering::Relaxed);
                }
            }
        }
        let is_fresh = |number: &u32| is_old(number) && numbers.iter().any(|range| range.contains(number));
        let late: HashSet<u32> = batched.0.iter().flat_map(|it| it.packets.keys().copied()).filter(is_fresh).collect();
        for number in late {
            self.begin_batched(number, &mut batched);
        }
    }

    /// Begins at zero for a number of which a batch holds packets, which were another rule's: what they will add to the
    /// counters of their CPU is taken off the shared one.
    fn begin_batched(&self, number: u32, batched: &mut Batched) {
        let Some([shared]) = self.steered.counter(number / PORTION_RULES, number) else { return };
        shared.store(0, Ordering::Relaxed);
        for (cpu, batched) in (0..).zip(&mut batched.0) {
            let others = self.at_rest(cpu, batched, |batched| {
                if let Some([own]) = self.own(cpu, number) {
                    own.store(0, Ordering::Relaxed);
                }
                batched.packets_of(number)
            });
            shared.fetch_sub(others, Ordering::Relaxed);
        }
    }

    /// Where the sets of a portion stand in the map of maps.
    fn sets_of(&self, portion: u32) -> impl Iterator<Item = u32> + use<> {
        let bytes = u64::from(portion + 1) * u64::from(self.sets) * u64::from(PORTION_RULES) * 8;
        (0..if bytes <= BUDGET { self.sets } else { 1 }).map(move |set| set * PORTIONS + portion)
    }

    /// What was counted for a rule, with the packets that are only in a batch, of which `batched` says what is known.
    pub(super) fn get(&self, number: u32, batched: &mut Batched) -> Counters {
        let read = |word: &AtomicU64| word.load(Ordering::Relaxed);
        let portion = number / PORTION_RULES;
        let shared = self.steered.counter(portion, number).map_or(0, |counter| read(&counter[0]));
        let by_cpu = (0..).zip(&mut batched.0).map(|(cpu, batched)| {
            self.at_rest(cpu, batched, |batched| {
                self.own(cpu, number).map_or(0, |counter| read(&counter[0])) + batched.packets_of(number)
            })
        });
        let drops = self.drops.counter(portion, number);
        Counters {
            steered: by_cpu.fold(shared, u64::wrapping_add),
            no_socket: drops.map_or(0, |drops| read(&drops[0])),
            assign_error: drops.map_or(0, |drops| read(&drops[1])),
            denied: drops.map_or(0, |drops| read(&drops[2])),
        }
    }

    /// Rules stay under another number, the old one first: their counters go on.
    pub(super) fn move_all(&self, moved: &[(u32, u32)]) {
        let mut batched = self.batched();
        for (before, now) in moved {
            self.add(*now, self.get(*before, &mut batched));
        }
    }

    /// How many packets of all rules were dropped for want of a socket or by an error.
    pub(super) fn dropped(&self) -> u64 {
        let portions = (0..self.end.div_ceil(PORTION_RULES)).filter_map(|at| Some((at, &self.drops.made.get(&at)?.1)));
        let of_portion = |(at, words): (u32, &MappedWords)| {
            let rules = (self.end - at * PORTION_RULES).min(PORTION_RULES) as usize;
            let drops = words.words().chunks_exact(self.drops.words).take(rules);
            drops.flat_map(|drops| &drops[..2]).map(|word| word.load(Ordering::Relaxed)).sum::<u64>()
        };
        portions.map(of_portion).sum()
    }

    /// What all batches hold.
    pub(super) fn batched(&self) -> Batched {
        Batched((0..self.sets - 1).map(|cpu| self.batched_by(cpu)).collect())
    }

    fn batched_by(&self, cpu: u32) -> BatchedByCpu {
        let (length, emptied) = self.state(cpu);
        let mut packets = HashMap::new();
        for number in self.batch(cpu)[BATCH_HEAD..].iter().flat_map(halves).take(length) {
            *packets.entry(number).or_default() += 1;
        }
        BatchedByCpu { emptied, packets }
    }

    /// Has `act` look at a rule's counter of a CPU and at what its batch holds, again if the batch was emptied into the
    /// counters in the meantime: then `batched` was out of date. Where processors let others see stores in another order,
    /// as arm64 does, what is read in the very moment of emptying may be off by that batch, until it is read again.
    fn at_rest<T>(&self, cpu: u32, batched: &mut BatchedByCpu, act: impl Fn(&BatchedByCpu) -> T) -> T {
        loop {
            let result = act(batched);
            fence(Ordering::SeqCst);
            let (length, emptied) = self.state(cpu);
            // A full one is being emptied, which takes some microseconds.
            if length < BATCH_ENTRIES && emptied == batched.emptied {
                return result;
            }
            *batched = self.batched_by(cpu);
        }
    }

    /// How many entries the batch of a CPU has, and how often it has been emptied.
    fn state(&self, cpu: u32) -> (usize, u32) {
        let [length, emptied] = halves(&self.batch(cpu)[0]);
        (length as usize, emptied)
    }

    fn batch(&self, cpu: u32) -> &[AtomicU64] {
        &self.batches.words()[cpu as usize * BATCH_WORDS..][..BATCH_WORDS]
    }

    /// Adds to what was counted for a rule, where anybody may write.
    pub(super) fn add(&self, number: u32, counted: Counters) {
        let Counters { steered, no_socket, assign_error, denied } = counted;
        let portion = number / PORTION_RULES;
        let shared = self.steered.counter(portion, number).into_iter().flatten();
        let drops = self.drops.counter(portion, number).into_iter().flatten();
        for (counter, more) in shared.chain(drops).zip([steered, no_socket, assign_error, denied]) {
            counter.fetch_add(more, Ordering::Relaxed);
        }
    }

    /// The counter of a rule for packets that a CPU handed to a socket.
    fn own(&self, cpu: u32, number: u32) -> Option<&[AtomicU64]> {
        self.steered.counter((cpu + 1) * PORTIONS + number / PORTION_RULES, number)
    }

    /// How many packets of a rule were handed to a socket, by set.
    fn each(&self, number: u32) -> impl Iterator<Item = &[AtomicU64]> {
        let portion = number / PORTION_RULES;
        (0..self.sets).filter_map(move |set| self.steered.counter(set * PORTIONS + portion, number))
    }

    /// Bytes of all counters.
    pub(super) fn bytes(&self) -> u64 {
        self.steered.bytes() + self.drops.bytes()
    }
}

/// The two numbers of a word, in the order in which they are in memory.
fn halves(word: &AtomicU64) -> [u32; 2] {
    bytemuck::cast(word.load(Ordering::Acquire))
}

impl Portions {
    fn new(outer: Map, types: sys::bpf::Types, words: usize) -> anyhow::Result<Self> {
        let Map::ArrayOfMaps(outer) = outer else { anyhow::bail!("the map of counters is no array of maps") };
        let outer = outer.fd().as_fd().try_clone_to_owned().context("duplicate the descriptor of the counters")?;
        Ok(Self { outer, types, words, made: HashMap::new() })
    }

    fn make(&mut self, places: &[u32]) -> anyhow::Result<()> {
        let attempt = "make a map for counters";
        for place in places {
            let map = sys::bpf::create_array("anyport_portion", self.words * 8, PORTION_RULES, &self.types)
                .context(attempt)?;
            let words = MappedWords::new(&map, PORTION_RULES as usize * self.words).context(attempt)?;
            self.made.insert(*place, (map, words));
        }
        let made: Vec<_> = places.iter().map(|place| (*place, &self.made[place].0)).collect();
        sys::bpf::set_inner(&self.outer, &made).context("put counters into the BPF map")
    }

    /// The words of a rule's counter in the portion at this place.
    fn counter(&self, place: u32, number: u32) -> Option<&[AtomicU64]> {
        let at = (number % PORTION_RULES) as usize * self.words;
        Some(&self.made.get(&place)?.1.words()[at..at + self.words])
    }

    fn bytes(&self) -> u64 {
        (self.made.len() * PORTION_RULES as usize * self.words * 8) as u64
    }
}
