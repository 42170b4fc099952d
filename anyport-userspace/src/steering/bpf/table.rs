//! The table map: where generations live, and the one word that says which is in force.

use std::{ops::Range, sync::atomic::Ordering};

use anyhow::{Context as _, bail};
use anyport_common::maps::{ABI, Control, TABLE_WORDS};
use aya::maps::{Array, IterableMap as _, Map, MapData};

use crate::sys::{MappedWords, wait_for_running_programs};

/// Word 0 is never a root: a root of 0 says that there is no generation.
const FIRST: u32 = 1;

#[derive(Debug)]
pub(super) struct Table {
    words: MappedWords,
    control: MappedWords,
    /// The generation in force.
    live: Range<u32>,
    /// Generations that a program which began before they were replaced may still read.
    retired: Vec<Range<u32>>,
}

impl Table {
    pub(super) fn new(table: Map, control: Map) -> anyhow::Result<Self> {
        let map = |map: Map, words, what| {
            let array: Array<MapData, u64> = Array::try_from(map)?;
            MappedWords::new(array.map().fd(), words)
                .with_context(|| format!("map the BPF map of the {what} into memory"))
        };
        Ok(Self {
            words: map(table, TABLE_WORDS as usize, "table")?,
            control: map(control, 1, "table's root")?,
            live: 0..0,
            retired: Vec::new(),
        })
    }

    /// Puts a generation in force: written aside first, then switched to by a single store.
    pub(super) fn publish(&mut self, generation: &[u64]) -> anyhow::Result<()> {
        let region = self.reserve(generation.len())?;
        let words = &self.words.words()[region.start as usize..region.end as usize];
        for (word, value) in words.iter().zip(generation) {
            word.store(*value, Ordering::Relaxed);
        }
        let control = Control { abi: ABI, root: region.start };
        self.control.words()[0].store(bytemuck::cast(control), Ordering::Release);
        self.retired.push(std::mem::replace(&mut self.live, region));
        Ok(())
    }

    /// Finds room that no running program reads. Waits for them only when the table has been gone through once.
    fn reserve(&mut self, len: usize) -> anyhow::Result<Range<u32>> {
        if let Some(region) = self.free_region(len) {
            return Ok(region);
        }
        wait_for_running_programs();
        self.retired.clear();
        match self.free_region(len) {
            Some(region) => Ok(region),
            None => bail!(
                "the rules need {len} words of the lookup table, which has {TABLE_WORDS} for the rules in force \
                 and their successors together; use fewer prefixes or port ranges"
            ),
        }
    }

    fn free_region(&self, len: usize) -> Option<Range<u32>> {
        let len = u32::try_from(len).ok()?;
        let mut used: Vec<&Range<u32>> = self.retired.iter().chain([&self.live]).collect();
        used.sort_by_key(|region| region.start);
        let mut start = FIRST;
        for region in used {
            if region.start.saturating_sub(start) >= len {
                break;
            }
            start = start.max(region.end);
        }
        let end = start.checked_add(len)?;
        (end <= TABLE_WORDS).then_some(start..end)
    }
}
