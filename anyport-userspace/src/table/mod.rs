//! The lookup table: rules compiled into what [`anyport_common::table`] looks up, generation after generation.
//!
//! The programs in the kernel and the daemon itself read the same table by the same code. A small change copies the nodes
//! between the root and what changes and shares the rest with the previous generation; a large one is a full rebuild beside
//! it. Neither touches what is active, so that it stays when something fails.

mod arena;
mod cache_lines;
mod editor;
mod policy;
mod readers;
mod tree;

use std::collections::HashSet;

use anyport_common::{
    flow::{Flow, Version},
    maps::Generation,
    table::{self, KeySelector, STEPS, Slot, Verdict},
};

use self::{
    arena::Arena,
    editor::{Editor, Region, Trouble},
    policy::{Level, Policies, firsts, halves, next},
    tree::{Built, Halves, Piece, build, build_addresses, for_each_policy, is_node},
};
pub use self::{
    arena::{OwnSegments, Segment, Segments, View},
    policy::{Receiver, Receivers},
    readers::Published,
};
use crate::rules::{Prefix, PrefixRules, RuleView};

/// Compiled rules. What is made by [`Self::make`] or [`Self::change`] lasts once it is committed.
#[derive(Debug)]
pub struct Table {
    arena: Arena,
    policies: Policies,
    roots: Roots,
    next: Roots,
    /// How many prefixes were changed one by one since the last full rebuild.
    changes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Roots {
    v4: Slot,
    v6: Slot,
}

impl Roots {
    const NONE: Self = Self { v4: Slot::UNMATCHED, v6: Slot::UNMATCHED };

    fn of(&mut self, is_ipv4: bool) -> &mut Slot {
        if is_ipv4 { &mut self.v4 } else { &mut self.v6 }
    }
}

/// A generation for readers of this process.
#[derive(Clone, Debug, Default)]
pub struct Reader {
    view: View,
    v4: u64,
    v6: u64,
}

impl Reader {
    /// Judges a flow as the programs in the kernel do.
    pub fn lookup(&self, flow: &Flow) -> Verdict {
        let root = match flow.address.version {
            Version::V4 => self.v4,
            Version::V6 => self.v6,
        };
        table::lookup(&self.view, Slot(root), flow).unwrap_or(Verdict::Unmatched)
    }
}

impl Table {
    /// An empty table in these segments.
    pub fn new(segments: Box<dyn Segments>) -> Self {
        Self {
            arena: Arena::new(segments),
            policies: Policies::default(),
            roots: Roots::NONE,
            next: Roots::NONE,
            changes: 0,
        }
    }

    /// Makes a generation of these rules by a full rebuild.
    ///
    /// # Errors
    /// There is not enough memory, or a rule names an unknown service.
    pub fn make(&mut self, rules: RuleView<'_>, services: &Receivers<'_>) -> anyhow::Result<()> {
        self.arena.begin_anew();
        self.policies.begin_anew();
        let mut sorted: [Vec<(Prefix, &PrefixRules)>; 2] = [Vec::new(), Vec::new()];
        for (prefix, rules) in rules.prefixes() {
            sorted[usize::from(!prefix.is_ipv4())].push((*prefix, rules));
        }
        for (prefixes, is_ipv4) in sorted.iter_mut().zip([true, false]) {
            sort(prefixes);
            let mut pieces = vec![Piece { first: (0, 0), slot: Slot::UNMATCHED }];
            self.divide(&mut pieces, prefixes, Vec::new(), services)?;
            let Built { slot, depth } = build_addresses(&mut self.arena, &pieces, KeySelector::Same)?;
            anyhow::ensure!(depth < STEPS, "the prefixes need {depth} steps, more than a lookup takes");
            *self.next.of(is_ipv4) = slot;
        }
        self.changes = 0;
        Ok(())
    }

    /// Makes a generation of these rules, which differ from the active ones in these prefixes only.
    ///
    /// # Errors
    /// There is not enough memory, or a rule names an unknown service.
    pub fn change(&mut self, rules: RuleView<'_>, prefixes: &[Prefix], services: &Receivers<'_>) -> anyhow::Result<()> {
        // Rules for many prefixes are compiled faster together. And what was changed as many times over may have lost
        // its good shape.
        const FEW: usize = 4096;
        let share = rules.len() / 64 + 16;
        if prefixes.len() > share || self.changes + prefixes.len() > FEW + rules.len() {
            return self.make(rules, services);
        }
        self.changes += prefixes.len();
        let mut outermost: Vec<Prefix> = Vec::new();
        // Shorter prefixes come last in order of precedence.
        for prefix in prefixes.iter().rev() {
            if !outermost.iter().any(|it| prefix.is_within(it)) {
                outermost.push(*prefix);
            }
        }
        for prefix in outermost {
            match self.renew(rules, prefix, services) {
                Ok(()) => {}
                Err(Trouble::TooDeep) => {
                    self.abort();
                    return self.make(rules, services);
                }
                Err(Trouble::Memory(error)) => return Err(error),
            }
        }
        Ok(())
    }

    /// Lets readers find what was made.
    ///
    /// # Errors
    /// The kernel's.
    pub fn connect(&mut self) -> anyhow::Result<()> {
        self.arena.connect()
    }

    /// Has the next [`Self::connect`] include all that was made.
    pub fn forget_connected(&mut self) {
        self.arena.forget_connected();
    }

    /// What was made is active.
    pub fn commit(&mut self) {
        self.roots = self.next;
        self.arena.commit();
        self.policies.commit();
        if self.policies.has_much_to_forget() {
            let mut in_use = HashSet::new();
            for root in [self.roots.v4, self.roots.v6] {
                for_each_policy(&self.arena, root, &mut |policy| {
                    in_use.insert(policy.offset());
                });
            }
            self.policies.forget_all_but(&mut self.arena, &in_use);
            self.arena.commit();
        }
    }

    /// What was made is not needed.
    pub fn abort(&mut self) {
        self.next = self.roots;
        self.arena.abort();
        self.policies.abort();
    }

    /// Releases memory that is no longer used.
    ///
    /// # Errors
    /// The kernel's.
    pub fn trim(&mut self) -> anyhow::Result<()> {
        self.arena.trim()
    }

    /// What was made last, as the programs read it.
    pub fn generation(&self, number: u64) -> Generation {
        Generation { number, v4: self.next.v4.0, v6: self.next.v6.0 }
    }

    /// What was made last, for readers of this process.
    pub fn reader(&self) -> Reader {
        Reader { view: self.arena.view(), v4: self.next.v4.0, v6: self.next.v6.0 }
    }

    /// Bytes of the nodes in use, and bytes of the segments they lie in.
    pub fn bytes(&self) -> (u64, u64) {
        self.arena.bytes()
    }

    /// Compiles what is inside of a prefix, and puts it in the place of what was there.
    fn renew(&mut self, rules: RuleView<'_>, prefix: Prefix, services: &Receivers<'_>) -> Result<(), Trouble> {
        let mut around = Vec::new();
        let mut outside: Vec<_> = rules.around(prefix).filter(|(it, _)| *it != prefix).collect();
        outside.reverse();
        for (outer, rules) in outside {
            around.push(self.policies.level(&mut self.arena, &around, (&outer, rules), services)?);
        }
        let mut inside: Vec<_> = rules.within(prefix).collect();
        sort(&mut inside);
        let (first, last) = halves(&prefix);
        let mut pieces = vec![Piece { first, slot: around.last().map_or(Slot::UNMATCHED, |it| it.slot) }];
        self.divide(&mut pieces, &inside, around, services)?;
        // What begins behind the prefix is there already.
        pieces.retain(|it| it.first <= last);
        let root = *self.next.of(prefix.is_ipv4());
        let changed = self.replace(root, (first, last), &pieces)?;
        *self.next.of(prefix.is_ipv4()) = changed;
        Ok(())
    }

    fn replace(
        &mut self,
        root: Slot,
        (first, last): (Halves, Halves),
        pieces: &[Piece<Halves>],
    ) -> Result<Slot, Trouble> {
        if first.1 == 0 && last.1 == u64::MAX {
            let firsts = firsts(&mut self.arena, pieces)?;
            let region = Region { first: first.0, last: last.0, pieces: &firsts };
            return Editor { arena: &mut self.arena, moved: None }.replace_in(root, region, KeySelector::Same);
        }
        // All of it has one first half: what changes is the tree of second halves.
        let mut editor = Editor { arena: &mut self.arena, moved: None };
        let before = editor.value(root, first.0);
        let seconds: Vec<_> = pieces.iter().map(|it| Piece { first: it.first.1, slot: it.slot }).collect();
        let region = Region { first: first.1, last: last.1, pieces: &seconds };
        let changed = if is_node(before) {
            editor.moved = Some(before);
            editor.replace_in(before, region, KeySelector::Low)?
        } else {
            let outer = |first| Piece { first, slot: before };
            let begin = (first.1 > 0).then(|| outer(0));
            let end = last.1.checked_add(1).map(outer);
            let mut all: Vec<_> = begin.into_iter().chain(seconds).chain(end).collect();
            all.dedup_by(|later, earlier| later.slot == earlier.slot);
            build(editor.arena, &all, u64::MAX, KeySelector::Low)?.slot
        };
        let region = Region { first: first.0, last: first.0, pieces: &[Piece { first: first.0, slot: changed }] };
        editor.replace_in(root, region, KeySelector::Same)
    }

    /// Appends pieces for prefixes that are sorted by their first address, the longer ones last.
    fn divide<'a>(
        &mut self,
        pieces: &mut Vec<Piece<Halves>>,
        prefixes: &[(Prefix, &'a PrefixRules)],
        around: Vec<Level<'a>>,
        services: &Receivers<'_>,
    ) -> anyhow::Result<()> {
        // The levels around have no end here.
        let mut ends: Vec<Halves> = vec![(u64::MAX, u64::MAX); around.len()];
        let mut levels = around;
        let outside = levels.len();
        let close =
            |levels: &mut Vec<Level<'_>>, ends: &mut Vec<Halves>, pieces: &mut Vec<_>, until: Option<Halves>| {
                while levels.len() > outside && until.is_none_or(|first| ends[ends.len() - 1] < first) {
                    levels.pop();
                    if let Some(first) = ends.pop().and_then(next) {
                        begin(pieces, first, levels.last().map_or(Slot::UNMATCHED, |it| it.slot));
                    }
                }
            };
        for (prefix, rules) in prefixes {
            let (first, last) = halves(prefix);
            close(&mut levels, &mut ends, pieces, Some(first));
            let level = self.policies.level(&mut self.arena, &levels, (prefix, rules), services)?;
            begin(pieces, first, level.slot);
            levels.push(level);
            ends.push(last);
        }
        close(&mut levels, &mut ends, pieces, None);
        pieces.dedup_by(|later, earlier| later.slot == earlier.slot);
        Ok(())
    }
}

/// Begins a piece, in place of one that would begin at the same address.
fn begin(pieces: &mut Vec<Piece<Halves>>, first: Halves, slot: Slot) {
    pieces.pop_if(|piece| piece.first == first);
    pieces.push(Piece { first, slot });
}

/// Sorts by the first address; where two prefixes begin together, the one around comes first.
fn sort(prefixes: &mut [(Prefix, &PrefixRules)]) {
    // In order of precedence there is one sorted run for each length, which a stable sort makes use of.
    prefixes.sort_by_key(|(prefix, _)| (prefix.first().high, prefix.first().low, prefix.len()));
}

#[cfg(test)]
mod documented;
#[cfg(test)]
mod tests;
