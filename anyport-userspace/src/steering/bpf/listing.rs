//! The rule set as an operator reads it with `bpftool map dump`: maps that no program reads.

use std::{
    collections::HashMap,
    fs,
    net::IpAddr,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
};

use anyhow::Context as _;
use anyport_common::maps::{ACTION_EXCEPT, ACTION_STEER, PortEntry, RuleEntry, names};
use aya::maps::{Map, MapData};
use bytemuck::{NoUninit, Zeroable};

use super::pins::{NEW, remove_pin};
use crate::{
    rules::{Prefix, Protocol, RuleRef, RuleSpec},
    steering::Plan,
    sys::{self, MappedWords},
};

/// The maps of rules and of ports.
#[derive(Debug)]
pub(super) struct Listing {
    rules: Growing,
    ports: Growing,
    /// Where the ranges of rule specs stand, with the specs themselves, which are known by their place in memory.
    ranges: HashMap<usize, (Arc<RuleSpec>, u32)>,
    next_range: u32,
}

impl Listing {
    /// `rules` and `ports` show the types of the maps that are made here.
    pub(super) fn new(rules: Map, ports: Map) -> anyhow::Result<Self> {
        let rules = Growing::new(names::RULES, rules, size_of::<RuleEntry>())?;
        let ports = Growing::new(names::PORTS, ports, size_of::<PortEntry>())?;
        Ok(Self { rules, ports, ranges: HashMap::new(), next_range: 0 })
    }

    /// Pins the maps that are not, or whose pins another program has removed.
    pub(super) fn pin(&mut self, rules: &Path, ports: &Path) -> anyhow::Result<()> {
        self.rules.pin(rules)?;
        self.ports.pin(ports)
    }

    /// Makes the maps say what the plan says.
    pub(super) fn apply(&mut self, plan: &Plan<'_>) -> anyhow::Result<()> {
        let slots: HashMap<_, _> = plan.services.iter().map(|it| (&it.name, it.slot)).collect();
        let slot_of = |terms: &RuleSpec| slots.get(&terms.service).copied().unwrap_or_default();
        let last = plan.fresh.iter().map(|it| it.end).max().unwrap_or_default();
        let is_new = self.rules.replace_if_less(last)?;
        if is_new || plan.changed.is_none() {
            self.ranges.clear();
            self.next_range = 0;
            if !is_new {
                self.rules.clear();
            }
            self.ports.clear();
            for rule in plan.rules.iter() {
                self.write(rule, slot_of(rule.terms))?;
            }
            return Ok(());
        }
        for number in plan.freed.iter().cloned().flatten() {
            self.rules.put(number, &RuleEntry::zeroed());
        }
        for (prefix, rules) in
            plan.changed.unwrap_or_default().iter().filter_map(|it| Some((it, plan.rules.of_prefix(it)?)))
        {
            for rule in rules.numbered(*prefix) {
                self.write(rule, slot_of(rule.terms))?;
            }
        }
        Ok(())
    }

    fn write(&mut self, rule: RuleRef<'_>, slot: u16) -> anyhow::Result<()> {
        let RuleSpec { protocol, ports, except, source, .. } = &**rule.terms;
        let count = ports.ranges().len() + except.ranges().len();
        let (first_port, last_port) = match (ports.ranges().first(), ports.ranges().last()) {
            (Some((first, _)), Some((_, last))) => (*first, *last),
            _ => (0, 0),
        };
        let entry = RuleEntry {
            prefix: octets(&rule.prefix),
            source: source.as_ref().map(octets).unwrap_or_default(),
            ip_version: if rule.prefix.is_ipv4() { 4 } else { 6 },
            prefix_len: rule.prefix.len(),
            source_len: source.map_or(0, |it| it.len()),
            protocol: match protocol {
                Protocol::Tcp => 6,
                Protocol::Udp => 17,
                Protocol::Both => 0,
            },
            first_port,
            last_port,
            ports_at: if count > 1 { self.ranges_of(rule.terms)? } else { 0 },
            ports: if count > 1 { u32::try_from(count)? } else { 0 },
            service: slot.into(),
            reserved: 0,
        };
        self.rules.put(rule.number, &entry);
        Ok(())
    }

    /// Where the ranges of this rule spec stand.
    fn ranges_of(&mut self, terms: &Arc<RuleSpec>) -> anyhow::Result<u32> {
        let place = Arc::as_ptr(terms) as usize;
        if let Some((_, at)) = self.ranges.get(&place) {
            return Ok(*at);
        }
        let at = self.next_range;
        let actions = [(ACTION_EXCEPT, &terms.except), (ACTION_STEER, &terms.ports)];
        let entries = actions.into_iter().flat_map(|(action, ports)| {
            ports.ranges().iter().map(move |(first_port, last_port)| PortEntry {
                first_port: *first_port,
                last_port: *last_port,
                action,
                reserved: [0; 3],
            })
        });
        for entry in entries {
            self.ports.grow(self.next_range + 1)?;
            self.ports.put(self.next_range, &entry);
            self.next_range += 1;
        }
        self.ranges.insert(place, (Arc::clone(terms), at));
        Ok(at)
    }

    /// Bytes of both maps.
    pub(super) fn bytes(&self) -> u64 {
        self.rules.bytes() + self.ports.bytes()
    }
}

fn octets(prefix: &Prefix) -> [u8; 16] {
    match prefix.address() {
        IpAddr::V4(address) => {
            let mut octets = [0; 16];
            octets[..4].copy_from_slice(&address.octets());
            octets
        }
        IpAddr::V6(address) => address.octets(),
    }
}

/// An array map that is replaced by a larger one when it is full.
#[derive(Debug)]
struct Growing {
    name: &'static str,
    types: sys::bpf::Types,
    value_size: usize,
    map: OwnedFd,
    words: MappedWords,
    entries: u32,
    is_pinned: bool,
}

impl Growing {
    fn new(name: &'static str, typed: Map, value_size: usize) -> anyhow::Result<Self> {
        const FIRST: u32 = 8;
        let Map::Array(typed) = typed else { anyhow::bail!("the map {name} is no array") };
        let types = sys::bpf::types_of(typed.fd()).with_context(|| format!("look at the type of the map {name}"))?;
        let (map, words) = make(name, value_size, FIRST, &types)?;
        Ok(Self { name, types, value_size, map, words, entries: FIRST, is_pinned: false })
    }

    /// Replaces a map that can't hold this many entries by an empty one. Returns whether that was so.
    fn replace_if_less(&mut self, entries: u32) -> anyhow::Result<bool> {
        if entries <= self.entries {
            return Ok(false);
        }
        // A map of a million entries must not double for one more.
        let entries = entries + (entries / 16).max(8);
        (self.map, self.words) = make(self.name, self.value_size, entries, &self.types)?;
        self.entries = entries;
        self.is_pinned = false;
        Ok(true)
    }

    /// Grows the map to hold this many entries beside those that are there.
    fn grow(&mut self, entries: u32) -> anyhow::Result<()> {
        let before: Vec<u64> = if entries > self.entries {
            self.words.words().iter().map(|word| word.load(Ordering::Relaxed)).collect()
        } else {
            return Ok(());
        };
        self.replace_if_less(entries)?;
        for (to, from) in self.words.words().iter().zip(before) {
            to.store(from, Ordering::Relaxed);
        }
        Ok(())
    }

    fn put(&mut self, at: u32, entry: &impl NoUninit) {
        let stride = self.value_size / 8;
        let words = &self.words.words()[at as usize * stride..][..stride];
        for (to, from) in words.iter().zip(bytemuck::bytes_of(entry).chunks_exact(8)) {
            let from = from.try_into().map_or(0, u64::from_ne_bytes);
            to.store(from, Ordering::Relaxed);
        }
    }

    fn clear(&mut self) {
        self.words.words().iter().for_each(|word| word.store(0, Ordering::Relaxed));
    }

    /// Pins the map, in place of the one that is pinned there.
    fn pin(&mut self, path: &Path) -> anyhow::Result<()> {
        if self.is_pinned && path.exists() {
            return Ok(());
        }
        let attempt = || format!("pin a map as {}", path.display());
        let mut aside = path.as_os_str().to_owned();
        aside.push(NEW);
        let aside = PathBuf::from(aside);
        remove_pin(&aside)?;
        let map = self.map.as_fd().try_clone_to_owned().with_context(attempt)?;
        MapData::from_fd(map).with_context(attempt)?.pin(&aside).with_context(attempt)?;
        fs::rename(&aside, path).with_context(attempt)?;
        self.is_pinned = true;
        Ok(())
    }

    fn bytes(&self) -> u64 {
        u64::from(self.entries) * self.value_size as u64
    }
}

fn make(
    name: &str,
    value_size: usize,
    entries: u32,
    types: &sys::bpf::Types,
) -> anyhow::Result<(OwnedFd, MappedWords)> {
    let attempt = || format!("make the map {name} for {entries} entries");
    let map = sys::bpf::create_array(name, value_size, entries, types).with_context(attempt)?;
    let words = MappedWords::new(&map, entries as usize * value_size / 8).with_context(attempt)?;
    Ok((map, words))
}
