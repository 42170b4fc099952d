//! How a part of a tree is replaced.

use anyport_common::table::{KeySelector, LINE_KEY_BITS, LINE_WORDS, MAX_SORTED, STEPS, Slot, SlotKind};

use super::{
    arena::{Arena, Block},
    cache_lines::{Lines, line_at},
    tree::{Built, Piece, Shape, block_of, build, children, few, is_node, is_value, sorted},
};

/// Subtrees of up to this many pieces are rebuilt as a whole when something in them changes, which keeps them flat.
const REMADE: usize = 512;

/// The keys from `first` to `last`, and what they shall have from now on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Region<'a> {
    pub(super) first: u64,
    pub(super) last: u64,
    /// The first one begins at `first`.
    pub(super) pieces: &'a [Piece],
}

/// Why a part could not be replaced.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    /// By many changes the tree has become deeper than lookups go: it needs a full rebuild.
    #[error("the tree has become too deep")]
    TooDeep,
    /// There is no more memory.
    #[error(transparent)]
    Memory(#[from] anyhow::Error),
}

/// A tree in which parts are replaced. Nodes are never written to: those between the root and what changes are copied.
#[derive(Debug)]
pub(super) struct Editor<'a> {
    pub(super) arena: &'a mut Arena,
    /// A tree of second halves that goes on in the next generation at another place.
    pub(super) moved: Option<Slot>,
}

impl Editor<'_> {
    /// Replaces what a region has in the tree for all keys.
    pub(super) fn replace_in(
        &mut self,
        root: Slot,
        region: Region<'_>,
        selector: KeySelector,
    ) -> Result<Slot, Trouble> {
        self.replace(root.without_selector(), (0, u64::MAX), region, selector, 0)
    }

    /// The value of a key.
    pub(super) fn value(&self, root: Slot, key: u64) -> Slot {
        let (mut slot, mut bounds) = (root, (0, u64::MAX));
        while !is_value(slot) {
            let parts = self.parts(slot, bounds);
            let at = parts.partition_point(|it| it.first <= key) - 1;
            let last = parts.get(at + 1).map_or(bounds.1, |next| next.first - 1);
            (slot, bounds) = (parts[at].slot, (parts[at].first, last));
        }
        slot
    }

    fn replace(
        &mut self,
        slot: Slot,
        (first, last): (u64, u64),
        region: Region<'_>,
        selector: KeySelector,
        above: u32,
    ) -> Result<Slot, Trouble> {
        if region.first <= first && last <= region.last {
            self.discard(slot);
            let built = build(self.arena, &clip(&region, first, last), last, selector)?;
            return fitting(built, above);
        }
        let mut values = Vec::new();
        if self.collect(slot, (first, last), &mut values) {
            self.discard_nodes(slot);
            let mut pieces = Vec::with_capacity(values.len() + region.pieces.len() + 1);
            for (value, end) in with_ends(&values, last) {
                self.cut(value, end, &region, &mut pieces);
            }
            pieces.dedup_by(|later, earlier| later.slot == earlier.slot);
            return fitting(build(self.arena, &pieces, last, selector)?, above);
        }
        match slot.kind() {
            Some(SlotKind::Index) => self.replace_in_index(slot, (first, last), region, selector, above),
            Some(SlotKind::CacheLines) => self.replace_in_lines(slot, (first, last), region, selector, above),
            _ => self.replace_in_sorted(slot, (first, last), region, selector, above),
        }
    }

    fn replace_in_index(
        &mut self,
        slot: Slot,
        (first, last): (u64, u64),
        region: Region<'_>,
        selector: KeySelector,
        above: u32,
    ) -> Result<Slot, Trouble> {
        let shape = Shape { shift: slot.shift(), width: slot.width() };
        let base = shape.base(first);
        let mut slots = self.arena.slots(slot.offset(), 1 << shape.width);
        let touched = shape.slot_of(base, region.first.max(first))..=shape.slot_of(base, region.last.min(last));
        for (number, child) in (0..).zip(&mut slots).filter(|(number, _)| touched.contains(number)) {
            let (begin, end) = shape.bounds(base, number);
            *child = self.replace(*child, (begin.max(first), end.min(last)), region, KeySelector::Same, above + 1)?;
        }
        self.arena.give_up(block_of(slot));
        let offset = self.arena.put(shape.width, slots.iter().map(|it| it.0))?;
        Ok(Slot::index(shape.shift, shape.width, offset, selector))
    }

    fn replace_in_lines(
        &mut self,
        slot: Slot,
        (first, last): (u64, u64),
        region: Region<'_>,
        selector: KeySelector,
        above: u32,
    ) -> Result<Slot, Trouble> {
        let shape = Lines::in_slot(slot);
        let base = shape.base(first);
        let touched = shape.number_of(region.first.max(first))..=shape.number_of(region.last.min(last));
        let mut changed = Vec::new();
        for number in touched {
            let (begin, end) = shape.bounds(base, number);
            let (begin, end) = (begin.max(first), end.min(last));
            let pieces = self.replace_in_line(shape.one(slot, number), (begin, end), region, above + 1)?;
            let (line, depth) = shape.line_or_node(self.arena, &pieces, end)?;
            fitting(Built { slot, depth }, above + 1)?;
            changed.push((shape.one(slot, number).offset() - slot.offset(), line));
        }
        let offset = self.arena.own(block_of(slot))?;
        for (at, line) in changed {
            self.arena.write(Block { offset: offset + at, order: LINE_WORDS.trailing_zeros() }, line.0);
        }
        Ok(shape.slot(offset, selector))
    }

    /// What a cache line holds from now on.
    fn replace_in_line(
        &mut self,
        line: Slot,
        (first, last): (u64, u64),
        region: Region<'_>,
        above: u32,
    ) -> Result<Vec<Piece>, Trouble> {
        let mut parts = Vec::new();
        if self.collect(line, (first, last), &mut parts) {
            self.discard_nodes_below(line);
        } else {
            parts = self.parts(line, (first, last));
        }
        self.replace_in_parts(&parts, last, region, above)
    }

    fn replace_in_sorted(
        &mut self,
        slot: Slot,
        (first, last): (u64, u64),
        region: Region<'_>,
        selector: KeySelector,
        above: u32,
    ) -> Result<Slot, Trouble> {
        let parts = self.parts(slot, (first, last));
        self.arena.give_up(block_of(slot));
        let pieces = self.replace_in_parts(&parts, last, region, above)?;
        self.join(&pieces, last, selector, above)
    }

    /// Replaces what a region has in the parts of a node.
    fn replace_in_parts(
        &mut self,
        parts: &[Piece],
        last: u64,
        region: Region<'_>,
        above: u32,
    ) -> Result<Vec<Piece>, Trouble> {
        let mut pieces = Vec::with_capacity(parts.len() + region.pieces.len() + 1);
        for (part, end) in with_ends(parts, last) {
            let is_inside = region.first <= part.first && end <= region.last;
            let is_apart = end < region.first || region.last < part.first;
            if is_inside || is_apart || is_value(part.slot) {
                self.cut(part, end, &region, &mut pieces);
            } else {
                let child = self.replace(part.slot, (part.first, end), region, KeySelector::Same, above + 1)?;
                pieces.push(Piece { first: part.first, slot: child });
            }
        }
        pieces.dedup_by(|later, earlier| is_value(later.slot) && later.slot == earlier.slot);
        Ok(pieces)
    }

    /// A node of nodes that stay as they are.
    fn join(&mut self, pieces: &[Piece], last: u64, selector: KeySelector, above: u32) -> Result<Slot, Trouble> {
        if pieces.len() == 1 {
            return Ok(with_selector(pieces[0].slot, selector));
        }
        let mut parts = pieces.to_vec();
        let mut levels = 1;
        while parts.len() > MAX_SORTED {
            let mut groups = Vec::with_capacity(parts.len().div_ceil(MAX_SORTED));
            for group in parts.chunks(MAX_SORTED) {
                let slot = sorted(self.arena, group, 0, KeySelector::Same)?.slot;
                groups.push(Piece { first: group[0].first, slot });
            }
            parts = groups;
            levels += 1;
        }
        let built = few(self.arena, &parts, last, levels - 1, selector)?;
        fitting(built, above)
    }

    /// What remains of a part that ends at `end`, with the region's pieces in the place of what it takes.
    fn cut(&mut self, part: Piece, end: u64, region: &Region<'_>, pieces: &mut Vec<Piece>) {
        if end < region.first || region.last < part.first {
            pieces.push(part);
            return;
        }
        if part.first < region.first {
            pieces.push(part);
        }
        pieces.extend(clip(region, part.first, end));
        if region.last < end {
            pieces.push(Piece { first: region.last + 1, ..part });
        } else if region.first <= part.first {
            self.discard(part.slot);
        }
    }

    /// The parts of a node, each with its first key.
    fn parts(&self, slot: Slot, (first, last): (u64, u64)) -> Vec<Piece> {
        if let Some(SlotKind::Index) = slot.kind() {
            let shape = Shape { shift: slot.shift(), width: slot.width() };
            let base = shape.base(first);
            let slots = (0..).zip(self.arena.slots(slot.offset(), 1 << shape.width));
            let parts = slots.filter_map(|(number, slot)| {
                let (begin, end) = shape.bounds(base, number);
                (first <= end && begin <= last).then_some(Piece { first: begin.max(first), slot })
            });
            return parts.collect();
        }
        if let Some(SlotKind::CacheLines) = slot.kind() {
            return self.parts_of_lines(slot, (first, last));
        }
        let count = 1 << slot.order();
        let keys = (0..count - 1).map(|key| self.arena.word(slot.offset() + key));
        let slots = self.arena.slots(slot.offset() + count, count);
        let firsts = std::iter::once(first).chain(keys);
        let mut parts: Vec<_> = firsts.zip(slots).map(|(first, slot)| Piece { first, slot }).collect();
        // Unused places repeat the last slot under the highest key, which is no beginning unless it is the last key.
        parts.dedup_by(|later, earlier| later.first > last || later.slot == earlier.slot);
        parts
    }

    /// The parts of a cache-line node: its cache lines or, where there is only one, its slots.
    fn parts_of_lines(&self, slot: Slot, (first, last): (u64, u64)) -> Vec<Piece> {
        let shape = Lines::in_slot(slot);
        let base = shape.base(first);
        if shape.width > 0 {
            let numbers = shape.number_of(first)..=shape.number_of(last);
            let begin = |number| shape.bounds(base, number).0.max(first);
            return numbers.map(|number| Piece { first: begin(number), slot: shape.one(slot, number) }).collect();
        }
        let key = |short: u64| (base + (short << (64 - LINE_KEY_BITS) >> shape.before())).max(first);
        let line = line_at(self.arena, slot.offset());
        let mut parts: Vec<_> = line.slots().map(|(short, slot)| Piece { first: key(short), slot }).collect();
        // Unused places repeat the last slot.
        parts.dedup_by(|later, earlier| later.slot == earlier.slot);
        parts
    }

    /// Collects the values of a subtree. Stops where there are too many.
    fn collect(&self, slot: Slot, (first, last): (u64, u64), values: &mut Vec<Piece>) -> bool {
        if is_value(slot) {
            if values.last().is_none_or(|before| before.slot != slot) {
                values.push(Piece { first, slot });
            }
            return values.len() <= REMADE;
        }
        let parts = self.parts(slot, (first, last));
        with_ends(&parts, last).all(|(part, end)| self.collect(part.slot, (part.first, end), values))
    }

    /// Frees all nodes of a subtree, those of second halves too.
    pub(super) fn discard(&mut self, slot: Slot) {
        if self.moved == Some(slot) {
            return;
        }
        self.discard_below(slot.without_selector(), &Self::discard);
    }

    /// Frees the nodes of a subtree, but not its values.
    fn discard_nodes(&mut self, slot: Slot) {
        if !is_value(slot) {
            self.discard_below(slot, &Self::discard_nodes);
        }
    }

    /// Frees all nodes below a node, but neither the node itself nor values.
    fn discard_nodes_below(&mut self, slot: Slot) {
        for child in children(self.arena, slot).unwrap_or_default() {
            self.discard_nodes(child);
        }
    }

    fn discard_below(&mut self, slot: Slot, discard: &dyn Fn(&mut Self, Slot)) {
        let Some(children) = children(self.arena, slot) else { return };
        self.arena.give_up(block_of(slot));
        for child in children {
            discard(self, child);
        }
    }
}

/// Parts, each with the last key before the next one or, for the last of them, before the end.
fn with_ends(parts: &[Piece], last: u64) -> impl Iterator<Item = (Piece, u64)> {
    let ends = parts.iter().skip(1).map(|next| next.first - 1).chain([last]);
    parts.iter().copied().zip(ends)
}

/// Refuses what would be too deep below the nodes above it. The tree of second halves comes on top of that of first
/// halves, so each may take half of the steps.
fn fitting(built: Built, above: u32) -> Result<Slot, Trouble> {
    if above + built.depth > STEPS / 2 - 1 { Err(Trouble::TooDeep) } else { Ok(built.slot) }
}

/// What a region has between two keys.
fn clip(region: &Region<'_>, first: u64, last: u64) -> Vec<Piece> {
    let (first, last) = (first.max(region.first), last.min(region.last));
    let from = region.pieces.partition_point(|it| it.first <= first) - 1;
    let to = region.pieces.partition_point(|it| it.first <= last);
    let mut pieces = region.pieces[from..to].to_vec();
    pieces[0].first = first;
    pieces
}

fn with_selector(slot: Slot, selector: KeySelector) -> Slot {
    if is_node(slot) { slot.with_selector(selector) } else { slot }
}
