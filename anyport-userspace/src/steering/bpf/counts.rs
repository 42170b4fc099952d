//! What the programs count, in memory that they share with the daemon.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    os::fd::{AsFd as _, OwnedFd},
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::Context as _;
use anyport_common::maps::{COUNTER_SETS, Counters, Drops, PORTION_RULES, PORTIONS};
use aya::{maps::Map, util::nr_cpus};

use crate::sys::{self, MappedWords};

/// What the counters of all CPUs may take, in bytes. Rules beyond have only the set that all CPUs share.
const BUDGET: u64 = 64 << 20;

/// The counters of the rules.
#[derive(Debug)]
pub(super) struct Counts {
    steered: Portions,
    drops: Portions,
    /// Sets of counters for packets that were handed to a socket.
    sets: u32,
}

/// Counters in portions, made as they are needed, within a map of maps.
#[derive(Debug)]
struct Portions {
    outer: OwnedFd,
    types: Option<sys::bpf::Types>,
    /// Words of a counter.
    words: usize,
    made: HashMap<u32, (OwnedFd, MappedWords)>,
}

impl Counts {
    /// `portion` shows the type of a portion of drops.
    pub(super) fn new(steered: Map, drops: Map, portion: Map) -> anyhow::Result<Self> {
        let Map::Array(portion) = portion else { anyhow::bail!("the map of a portion is no array") };
        let types = sys::bpf::types_of(portion.fd()).context("look at the type of the counters")?;
        let cpus = nr_cpus().map_err(|(_, error)| error).context("count the CPUs")?;
        let sets = u32::try_from(cpus).map_or(COUNTER_SETS, |cpus| cpus.saturating_add(1).min(COUNTER_SETS));
        Ok(Self {
            steered: Portions::new(steered, None, 1)?,
            drops: Portions::new(drops, types, size_of::<Drops>() / 8)?,
            sets,
        })
    }

    /// Makes counters for these rule numbers, all of them zero.
    pub(super) fn begin(&mut self, numbers: &[Range<u32>]) -> anyhow::Result<()> {
        let portions = |range: &Range<u32>| range.start / PORTION_RULES..range.end.div_ceil(PORTION_RULES);
        let needed: HashSet<u32> = numbers.iter().flat_map(portions).collect();
        let new: HashSet<u32> = needed.into_iter().filter(|portion| !self.drops.made.contains_key(portion)).collect();
        let with_sets: Vec<u32> = new.iter().flat_map(|portion| self.sets_of(*portion)).collect();
        self.steered.make(&with_sets)?;
        self.drops.make(&new.iter().copied().collect::<Vec<_>>())?;
        // What was just made is zero.
        for number in numbers.iter().cloned().flatten().filter(|it| !new.contains(&(it / PORTION_RULES))) {
            for counter in self.each(number).chain(self.drops.counter(number / PORTION_RULES, number)) {
                for word in counter {
                    word.store(0, Ordering::Relaxed);
                }
            }
        }
        Ok(())
    }

    /// Where the sets of a portion stand in the map of maps.
    fn sets_of(&self, portion: u32) -> impl Iterator<Item = u32> + use<> {
        let bytes = u64::from(portion + 1) * u64::from(self.sets) * u64::from(PORTION_RULES) * 8;
        (0..if bytes <= BUDGET { self.sets } else { 1 }).map(move |set| set * PORTIONS + portion)
    }

    /// What was counted for a rule.
    pub(super) fn get(&self, number: u32) -> Counters {
        let read = |word: &AtomicU64| word.load(Ordering::Relaxed);
        let drops = self.drops.counter(number / PORTION_RULES, number);
        Counters {
            steered: self.each(number).map(|counter| read(&counter[0])).sum(),
            no_socket: drops.map_or(0, |drops| read(&drops[0])),
            assign_error: drops.map_or(0, |drops| read(&drops[1])),
        }
    }

    /// Adds to what was counted for a rule, where anybody may write.
    pub(super) fn add(&self, number: u32, counted: Counters) {
        let Counters { steered, no_socket, assign_error } = counted;
        let portion = number / PORTION_RULES;
        let shared = self.steered.counter(portion, number).into_iter().flatten();
        let drops = self.drops.counter(portion, number).into_iter().flatten();
        for (counter, more) in shared.chain(drops).zip([steered, no_socket, assign_error]) {
            counter.fetch_add(more, Ordering::Relaxed);
        }
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

impl Portions {
    fn new(outer: Map, types: Option<sys::bpf::Types>, words: usize) -> anyhow::Result<Self> {
        let Map::ArrayOfMaps(outer) = outer else { anyhow::bail!("the map of counters is no array of maps") };
        let outer = outer.fd().as_fd().try_clone_to_owned().context("duplicate the descriptor of the counters")?;
        Ok(Self { outer, types, words, made: HashMap::new() })
    }

    fn make(&mut self, places: &[u32]) -> anyhow::Result<()> {
        let attempt = "make a map for counters";
        for place in places {
            let types = self.types.as_ref();
            let map =
                sys::bpf::create_array("anyport_portion", self.words * 8, PORTION_RULES, types).context(attempt)?;
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
