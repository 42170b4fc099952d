//! Nodes: how ranges of keys become a tree of few steps.
//!
//! A tree is given as *pieces*: each begins at its key and lasts until the next one begins. A piece holds a value, which
//! is a verdict, a policy, or the tree for the second half of an address.

use anyport_common::table::{KeySelector, LINE_WORDS, MAX_INDEX_WIDTH, MAX_LINES_WIDTH, MAX_SORTED, Slot, SlotKind};

use super::{
    arena::{Arena, Block},
    cache_lines::{Lines, line_at, lines},
};

/// From this key on, up to the next piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece<K = u64> {
    pub(super) first: K,
    pub(super) slot: Slot,
}

/// Both halves of an address.
pub(super) type Halves = (u64, u64);

/// A tree, and how many nodes lie on its longest path.
#[derive(Clone, Copy, Debug)]
pub(super) struct Built {
    pub(super) slot: Slot,
    pub(super) depth: u32,
}

/// Makes a tree of the addresses that these pieces divide.
pub(super) fn build_addresses(
    arena: &mut Arena,
    pieces: &[Piece<Halves>],
    selector: KeySelector,
) -> anyhow::Result<Built> {
    let (highs, depth) = by_first_half(arena, pieces)?;
    let built = build(arena, &highs, u64::MAX, selector)?;
    Ok(Built { depth: built.depth + depth, ..built })
}

/// Pieces by the first half of the address, where the second half divides one of them further, with its tree as the
/// value. Returns the depth of the deepest of these trees, too.
pub(super) fn by_first_half(arena: &mut Arena, pieces: &[Piece<Halves>]) -> anyhow::Result<(Vec<Piece>, u32)> {
    let mut highs: Vec<Piece> = Vec::with_capacity(pieces.len());
    let mut depth = 0;
    let mut before = Slot::UNMATCHED;
    let mut groups = pieces.chunk_by(|a, b| a.first.0 == b.first.0).peekable();
    while let Some(group) = groups.next() {
        let first = group[0].first.0;
        if let [Piece { first: (_, 0), slot }] = group {
            highs.push(Piece { first, slot: *slot });
            before = *slot;
            continue;
        }
        let outer = Piece { first: 0, slot: before };
        let begins_inside = group[0].first.1 > 0;
        let inner = group.iter().map(|it| Piece { first: it.first.1, slot: it.slot });
        let lows: Vec<_> = begins_inside.then_some(outer).into_iter().chain(inner).collect();
        let built = build(arena, &lows, u64::MAX, KeySelector::Low)?;
        depth = depth.max(built.depth);
        highs.push(Piece { first, slot: built.slot });
        before = lows[lows.len() - 1].slot;
        if let Some(next) = first.checked_add(1)
            && groups.peek().is_none_or(|group| group[0].first.0 != next)
        {
            highs.push(Piece { first: next, slot: before });
        }
    }
    highs.dedup_by(|later, earlier| later.slot == earlier.slot);
    Ok((highs, depth))
}

/// Makes a tree of the keys from that of the first piece to `last`.
pub(super) fn build(arena: &mut Arena, pieces: &[Piece], last: u64, selector: KeySelector) -> anyhow::Result<Built> {
    let count = pieces.len();
    if count == 1 {
        return Ok(Built { slot: pieces[0].slot, depth: 0 });
    }
    let one = Lines { skip: (pieces[0].first ^ last).leading_zeros(), width: 0 };
    if let Some(line) = one.line(pieces) {
        let offset = arena.put(one.order(), line.0)?;
        return Ok(Built { slot: one.slot(offset, selector), depth: 1 });
    }
    if count <= MAX_SORTED {
        return sorted(arena, pieces, 0, selector);
    }
    if let Some(built) = divided(arena, pieces, last, selector)? {
        return Ok(built);
    }
    let end = pieces[count - 1];
    let core = &pieces[1..count - 1];
    if let Some(built) = divided(arena, core, end.first - 1, KeySelector::Same)? {
        let parts = [pieces[0], Piece { first: core[0].first, slot: built.slot }, end];
        return few(arena, &parts, last, built.depth, selector);
    }
    let mut parts = Vec::with_capacity(MAX_SORTED);
    let mut depth = 0;
    let mut rest = pieces;
    while let Some((part, behind)) = rest.split_at_checked(count.div_ceil(MAX_SORTED).min(rest.len()))
        && !part.is_empty()
    {
        let built = build(arena, part, behind.first().map_or(last, |next| next.first - 1), KeySelector::Same)?;
        parts.push(Piece { first: part[0].first, slot: built.slot });
        depth = depth.max(built.depth);
        rest = behind;
    }
    few(arena, &parts, last, depth, selector)
}

/// Makes a node that divides an aligned block of keys into parts of one size; nothing if none of them would do well.
fn divided(arena: &mut Arena, pieces: &[Piece], last: u64, selector: KeySelector) -> anyhow::Result<Option<Built>> {
    if let Some(shape) = Shape::exact(pieces, last) {
        return index(arena, pieces, last, shape, selector).map(Some);
    }
    if let Some(shape) = Lines::of(pieces, last) {
        return lines(arena, pieces, last, shape, selector).map(Some);
    }
    Shape::of(pieces, last).map(|shape| index(arena, pieces, last, shape, selector)).transpose()
}

/// A cache-line node or a sorted node of nodes of this depth, or of what else is no more than fits there.
pub(super) fn few(
    arena: &mut Arena,
    pieces: &[Piece],
    last: u64,
    depth: u32,
    selector: KeySelector,
) -> anyhow::Result<Built> {
    let one = Lines { skip: (pieces[0].first ^ last).leading_zeros(), width: 0 };
    let Some(line) = one.line(pieces) else {
        return sorted(arena, pieces, depth, selector);
    };
    Ok(Built { slot: one.slot(arena.put(one.order(), line.0)?, selector), depth: depth + 1 })
}

pub(super) fn sorted(arena: &mut Arena, pieces: &[Piece], depth: u32, selector: KeySelector) -> anyhow::Result<Built> {
    let slots = pieces.len().next_power_of_two().max(2);
    let order = slots.trailing_zeros();
    let fill = || std::iter::repeat_n(pieces[pieces.len() - 1].slot.0, slots - pieces.len());
    let keys = pieces[1..].iter().map(|it| it.first).chain(std::iter::repeat(u64::MAX)).take(slots);
    let words = keys.chain(pieces.iter().map(|it| it.slot.0)).chain(fill());
    let offset = arena.put(order + 1, words)?;
    Ok(Built { slot: Slot::sorted(order, offset, selector), depth: depth + 1 })
}

/// How an index divides an aligned block of keys.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) shift: u32,
    pub(super) width: u32,
}

impl Shape {
    /// An index that has a slot for each piece, unless it would be too large.
    fn exact(pieces: &[Piece], last: u64) -> Option<Self> {
        /// What it may have, in slots for each piece.
        const EXACT: usize = 6;
        let bits = u64::BITS - (pieces[0].first ^ last).leading_zeros();
        let aligned = pieces[1..].iter().fold(0, |all, it| all | it.first).trailing_zeros();
        let width = bits.saturating_sub(aligned);
        let fits = width <= MAX_INDEX_WIDTH && 1 << width <= EXACT * pieces.len();
        fits.then_some(Self { shift: bits - width, width })
    }

    /// An index that leaves at most an eighth of the pieces to each of its slots; nothing if it would leave more.
    fn of(pieces: &[Piece], last: u64) -> Option<Self> {
        /// An index of more than that many bits is not in the nearest caches as a whole.
        const LARGE: u32 = 8;
        let bits = u64::BITS - (pieces[0].first ^ last).leading_zeros();
        let log = pieces.len().next_power_of_two().trailing_zeros();
        // Where there are many, cache-line nodes go on from here.
        let width = if Lines::width(pieces.len()) > MAX_LINES_WIDTH {
            (Lines::width(pieces.len()) - MAX_LINES_WIDTH).clamp(4, LARGE)
        } else {
            log + 1
        };
        let width = width.min(MAX_INDEX_WIDTH).min(bits);
        let shape = Self { shift: bits - width, width };
        let by_slot = pieces[1..].chunk_by(|a, b| a.first >> shape.shift == b.first >> shape.shift);
        (by_slot.map(<[Piece]>::len).max()? <= (pieces.len() / 8).max(3)).then_some(shape)
    }

    /// The first key of the block around `key`.
    pub(super) fn base(self, key: u64) -> u64 {
        let bits = self.shift + self.width;
        key.checked_shr(bits).map_or(0, |it| it << bits)
    }

    /// The first and the last key of a slot.
    pub(super) fn bounds(self, base: u64, slot: u64) -> (u64, u64) {
        let first = base + (slot << self.shift);
        (first, first + ((1 << self.shift) - 1))
    }

    pub(super) fn slot_of(self, base: u64, key: u64) -> u64 {
        (key - base) >> self.shift
    }
}

fn index(arena: &mut Arena, pieces: &[Piece], last: u64, shape: Shape, selector: KeySelector) -> anyhow::Result<Built> {
    let base = shape.base(pieces[0].first);
    // Before the nodes below it, so that they lie behind it.
    let block = Block { offset: arena.take(shape.width)?, order: shape.width };
    let mut slots = Vec::with_capacity(1 << shape.width);
    let mut parts = Parts::of(pieces);
    let mut depth = 0;
    for slot in 0..1 << shape.width {
        let (first, end) = shape.bounds(base, slot);
        let built = build(arena, parts.next(first, end), end.min(last), KeySelector::Same)?;
        depth = depth.max(built.depth);
        slots.push(built.slot.0);
    }
    arena.write(block, slots);
    Ok(Built { slot: Slot::index(shape.shift, shape.width, block.offset, selector), depth: depth + 1 })
}

/// Gives the pieces of one part after the other.
pub(super) struct Parts<'a> {
    current: Slot,
    rest: &'a [Piece],
    part: Vec<Piece>,
}

impl<'a> Parts<'a> {
    pub(super) fn of(pieces: &'a [Piece]) -> Self {
        Self { current: pieces[0].slot, rest: &pieces[1..], part: Vec::new() }
    }

    /// The pieces of the part from `first` to `end`, which follows the previous part.
    pub(super) fn next(&mut self, first: u64, end: u64) -> &[Piece] {
        let here = self.rest.iter().take_while(|it| it.first <= end).count();
        let (begin_here, behind) = self.rest.split_at(here);
        self.rest = behind;
        self.part.clear();
        if begin_here.first().is_none_or(|it| it.first > first) {
            self.part.push(Piece { first, slot: self.current });
        }
        self.part.extend(begin_here);
        self.current = self.part[self.part.len() - 1].slot;
        &self.part
    }
}

/// Whether this ends the path through the tree of one half of an address.
pub(super) fn is_value(slot: Slot) -> bool {
    !is_node(slot) || slot.selector() != KeySelector::Same
}

/// Calls `see` with every policy of a tree.
pub(super) fn for_each_policy(arena: &Arena, slot: Slot, see: &mut impl FnMut(Slot)) {
    if let Some(SlotKind::Ports) = slot.kind() {
        see(slot);
    }
    for child in children(arena, slot).unwrap_or_default() {
        for_each_policy(arena, child, see);
    }
}

/// The slots of a node, neighbours that are the same once; nothing for what is no node.
pub(super) fn children(arena: &Arena, slot: Slot) -> Option<Vec<Slot>> {
    let (offset, count) = match slot.kind()? {
        SlotKind::Index => (slot.offset(), 1 << slot.width()),
        SlotKind::Sorted => (slot.offset() + (1 << slot.order()), 1 << slot.order()),
        SlotKind::CacheLines => {
            let offsets = (slot.offset()..).step_by(LINE_WORDS as usize).take(1 << slot.width());
            let lines = offsets.map(|offset| line_at(arena, offset));
            let mut slots: Vec<_> = lines.flat_map(|line| line.slots().map(|(_, it)| it).collect::<Vec<_>>()).collect();
            slots.dedup();
            return Some(slots);
        }
        SlotKind::Verdict | SlotKind::Ports => return None,
    };
    let mut slots = arena.slots(offset, count);
    // Unused places repeat the last slot, and an index repeats what is larger than a place.
    slots.dedup();
    Some(slots)
}

/// Whether this is a node, and not the end of a path.
pub(super) fn is_node(slot: Slot) -> bool {
    matches!(slot.kind(), Some(SlotKind::Index | SlotKind::CacheLines | SlotKind::Sorted))
}

pub(super) fn block_of(node: Slot) -> Block {
    let order = match node.kind() {
        Some(SlotKind::Index) => node.width(),
        Some(SlotKind::CacheLines) => Lines::in_slot(node).order(),
        _ => node.order() + 1,
    };
    Block { offset: node.offset(), order }
}
