//! Nodes: how ranges of keys become a tree of few steps, and how a part of it is replaced.
//!
//! A tree is given as *pieces*: each begins at its key and lasts until the next one begins. A piece holds a value, which
//! is a verdict, a policy, or the tree for the second half of an address.

use anyport_common::table::{Kind, MAX_INDEX_WIDTH, MAX_SORTED, STEPS, Slot, Turn};

use super::arena::{Arena, Block};

/// Subtrees of up to this many pieces are made anew as a whole when something in them changes, which keeps them flat.
const REMADE: usize = 512;

/// From this key on, up to the next piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece<K = u64> {
    pub(super) first: K,
    pub(super) slot: Slot,
}

/// Both halves of an address.
pub(super) type Halves = (u64, u64);

/// A tree, and how many nodes lie on its longest way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Built {
    pub(super) slot: Slot,
    pub(super) depth: u32,
}

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
    /// By many changes the tree has become deeper than lookups go: it has to be made anew.
    #[error("the tree has become too deep")]
    TooDeep,
    /// There is no more memory.
    #[error(transparent)]
    Memory(#[from] anyhow::Error),
}

/// Makes a tree of the addresses that these pieces divide.
pub(super) fn build_addresses(arena: &mut Arena, pieces: &[Piece<Halves>], turn: Turn) -> anyhow::Result<Built> {
    let (highs, depth) = by_first_half(arena, pieces)?;
    let built = build(arena, &highs, u64::MAX, turn)?;
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
        let built = build(arena, &lows, u64::MAX, Turn::Low)?;
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
pub(super) fn build(arena: &mut Arena, pieces: &[Piece], last: u64, turn: Turn) -> anyhow::Result<Built> {
    let count = pieces.len();
    if count == 1 {
        return Ok(Built { slot: pieces[0].slot, depth: 0 });
    }
    if count <= MAX_SORTED {
        return sorted(arena, pieces, 0, turn);
    }
    if let Some(shape) = Shape::of(pieces, last, arena.is_large) {
        return index(arena, pieces, last, shape, turn);
    }
    let end = pieces[count - 1];
    let core = &pieces[1..count - 1];
    if let Some(shape) = Shape::of(core, end.first - 1, arena.is_large) {
        let built = index(arena, core, end.first - 1, shape, Turn::Same)?;
        let parts = [pieces[0], Piece { first: core[0].first, slot: built.slot }, end];
        return sorted(arena, &parts, built.depth, turn);
    }
    let mut parts = Vec::with_capacity(MAX_SORTED);
    let mut depth = 0;
    let mut rest = pieces;
    while let Some((part, behind)) = rest.split_at_checked(count.div_ceil(MAX_SORTED).min(rest.len()))
        && !part.is_empty()
    {
        let built = build(arena, part, behind.first().map_or(last, |next| next.first - 1), Turn::Same)?;
        parts.push(Piece { first: part[0].first, slot: built.slot });
        depth = depth.max(built.depth);
        rest = behind;
    }
    sorted(arena, &parts, depth, turn)
}

fn sorted(arena: &mut Arena, pieces: &[Piece], depth: u32, turn: Turn) -> anyhow::Result<Built> {
    let slots = pieces.len().next_power_of_two().max(2);
    let order = slots.trailing_zeros();
    let fill = || std::iter::repeat_n(pieces[pieces.len() - 1].slot.0, slots - pieces.len());
    let keys = pieces[1..].iter().map(|it| it.first).chain(std::iter::repeat(u64::MAX)).take(slots);
    let words = keys.chain(pieces.iter().map(|it| it.slot.0)).chain(fill());
    let offset = arena.put(order + 1, words)?;
    Ok(Built { slot: Slot::sorted(order, offset, turn), depth: depth + 1 })
}

/// How an index divides an aligned block of keys.
#[derive(Clone, Copy, Debug)]
struct Shape {
    shift: u32,
    width: u32,
}

impl Shape {
    /// An index that has a slot for each piece or, failing that, one that leaves at most an eighth of the pieces to
    /// each of its slots; nothing if it would be too large or leave more.
    fn of(pieces: &[Piece], last: u64, is_large: bool) -> Option<Self> {
        /// What an index without nodes below it may have, in slots for each piece.
        const EXACT: usize = 12;
        /// In a large tree, what is below a slot should lie in one page of memory, and what is above it in the
        /// processor's caches: an index of more pieces has about 2^this of them below each slot.
        const LOG_BELOW: u32 = 4;
        const SMALL: usize = 64;
        let count = pieces.len();
        let bits = u64::BITS - (pieces[0].first ^ last).leading_zeros();
        let aligned = pieces[1..].iter().fold(0, |all, it| all | it.first).trailing_zeros();
        let exact = bits.saturating_sub(aligned);
        if exact <= MAX_INDEX_WIDTH && 1 << exact <= EXACT * count {
            return Some(Self { shift: bits - exact, width: exact });
        }
        let log = count.next_power_of_two().trailing_zeros();
        let width = if is_large && count > SMALL { log - LOG_BELOW } else { log + 1 };
        let width = width.min(MAX_INDEX_WIDTH).min(bits);
        let shape = Self { shift: bits - width, width };
        let by_slot = pieces[1..].chunk_by(|a, b| a.first >> shape.shift == b.first >> shape.shift);
        (by_slot.map(<[Piece]>::len).max()? <= (count / 8).max(3)).then_some(shape)
    }

    /// The first key of the block around `key`.
    fn base(self, key: u64) -> u64 {
        let bits = self.shift + self.width;
        key.checked_shr(bits).map_or(0, |it| it << bits)
    }

    /// The first and the last key of a slot.
    fn bounds(self, base: u64, slot: u64) -> (u64, u64) {
        let first = base + (slot << self.shift);
        (first, first + ((1 << self.shift) - 1))
    }

    fn slot_of(self, base: u64, key: u64) -> u64 {
        (key - base) >> self.shift
    }
}

fn index(arena: &mut Arena, pieces: &[Piece], last: u64, shape: Shape, turn: Turn) -> anyhow::Result<Built> {
    let base = shape.base(pieces[0].first);
    // Before the nodes below it, so that they lie behind it.
    let block = Block { offset: arena.take(shape.width)?, order: shape.width };
    let mut slots = Vec::with_capacity(1 << shape.width);
    let mut current = pieces[0].slot;
    let mut rest = &pieces[1..];
    let mut inside: Vec<Piece> = Vec::new();
    let mut depth = 0;
    for slot in 0..1 << shape.width {
        let (first, end) = shape.bounds(base, slot);
        let here = rest.iter().take_while(|it| it.first <= end).count();
        let (begin_here, behind) = rest.split_at(here);
        rest = behind;
        match begin_here {
            [] => slots.push(current.0),
            [only] if only.first == first => slots.push(only.slot.0),
            _ => {
                inside.clear();
                if begin_here[0].first > first {
                    inside.push(Piece { first, slot: current });
                }
                inside.extend(begin_here);
                let built = build(arena, &inside, end.min(last), Turn::Same)?;
                depth = depth.max(built.depth);
                slots.push(built.slot.0);
            }
        }
        if let Some(piece) = begin_here.last() {
            current = piece.slot;
        }
    }
    arena.write(block, slots);
    Ok(Built { slot: Slot::index(shape.shift, shape.width, block.offset, turn), depth: depth + 1 })
}

/// Whether this ends the way through the tree of one half of an address.
fn is_value(slot: Slot) -> bool {
    matches!(slot.kind(), None | Some(Kind::Verdict | Kind::Ports)) || slot.turn() != Turn::Same
}

/// A tree in which parts are replaced. Nodes are never written to: those on the way to what changes are copied.
#[derive(Debug)]
pub(super) struct Editor<'a> {
    pub(super) arena: &'a mut Arena,
    /// A tree of second halves that goes on in the next generation at another place.
    pub(super) moved: Option<Slot>,
}

impl Editor<'_> {
    /// Replaces what a region has in the tree for all keys.
    pub(super) fn replace_in(&mut self, root: Slot, region: Region<'_>, turn: Turn) -> Result<Slot, Trouble> {
        self.replace(root.without_turn(), (0, u64::MAX), region, turn, 0)
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
        turn: Turn,
        above: u32,
    ) -> Result<Slot, Trouble> {
        if region.first <= first && last <= region.last {
            self.discard(slot);
            let built = build(self.arena, &clip(&region, first, last), last, turn)?;
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
            return fitting(build(self.arena, &pieces, last, turn)?, above);
        }
        match slot.kind() {
            Some(Kind::Index) => self.replace_in_index(slot, (first, last), region, turn, above),
            _ => self.replace_in_sorted(slot, (first, last), region, turn, above),
        }
    }

    fn replace_in_index(
        &mut self,
        slot: Slot,
        (first, last): (u64, u64),
        region: Region<'_>,
        turn: Turn,
        above: u32,
    ) -> Result<Slot, Trouble> {
        let shape = Shape { shift: slot.shift(), width: slot.width() };
        let base = shape.base(first);
        let mut slots = self.arena.slots(slot.offset(), 1 << shape.width);
        let touched = shape.slot_of(base, region.first.max(first))..=shape.slot_of(base, region.last.min(last));
        for (number, child) in (0..).zip(&mut slots).filter(|(number, _)| touched.contains(number)) {
            let (begin, end) = shape.bounds(base, number);
            *child = self.replace(*child, (begin.max(first), end.min(last)), region, Turn::Same, above + 1)?;
        }
        self.arena.give_up(block_of(slot));
        let offset = self.arena.put(shape.width, slots.iter().map(|it| it.0))?;
        Ok(Slot::index(shape.shift, shape.width, offset, turn))
    }

    fn replace_in_sorted(
        &mut self,
        slot: Slot,
        (first, last): (u64, u64),
        region: Region<'_>,
        turn: Turn,
        above: u32,
    ) -> Result<Slot, Trouble> {
        let parts = self.parts(slot, (first, last));
        self.arena.give_up(block_of(slot));
        let mut pieces = Vec::with_capacity(parts.len() + region.pieces.len() + 1);
        for (part, end) in with_ends(&parts, last) {
            let is_inside = region.first <= part.first && end <= region.last;
            let is_apart = end < region.first || region.last < part.first;
            if is_inside || is_apart || is_value(part.slot) {
                self.cut(part, end, &region, &mut pieces);
            } else {
                let child = self.replace(part.slot, (part.first, end), region, Turn::Same, above + 1)?;
                pieces.push(Piece { first: part.first, slot: child });
            }
        }
        pieces.dedup_by(|later, earlier| is_value(later.slot) && later.slot == earlier.slot);
        self.join(&pieces, turn, above)
    }

    /// A node of nodes that stay as they are.
    fn join(&mut self, pieces: &[Piece], turn: Turn, above: u32) -> Result<Slot, Trouble> {
        if pieces.len() == 1 {
            return Ok(with_turn(pieces[0].slot, turn));
        }
        let mut parts = pieces.to_vec();
        let mut levels = 1;
        while parts.len() > MAX_SORTED {
            let groups = parts.chunks(MAX_SORTED).map(|group| {
                let slot = sorted(self.arena, group, 0, Turn::Same)?.slot;
                Ok(Piece { first: group[0].first, slot })
            });
            parts = groups.collect::<anyhow::Result<_>>()?;
            levels += 1;
        }
        let built = sorted(self.arena, &parts, levels - 1, turn)?;
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
        if let Some(Kind::Index) = slot.kind() {
            let shape = Shape { shift: slot.shift(), width: slot.width() };
            let base = shape.base(first);
            let slots = (0..).zip(self.arena.slots(slot.offset(), 1 << shape.width));
            let parts = slots.filter_map(|(number, slot)| {
                let (begin, end) = shape.bounds(base, number);
                (first <= end && begin <= last).then_some(Piece { first: begin.max(first), slot })
            });
            return parts.collect();
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

    /// Collects the values of a subtree. Gives up where there are too many.
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

    /// Gives up all nodes of a subtree, those of second halves too.
    pub(super) fn discard(&mut self, slot: Slot) {
        if self.moved == Some(slot) {
            return;
        }
        self.discard_below(slot.without_turn(), &Self::discard);
    }

    /// Gives up the nodes of a subtree, but not its values.
    fn discard_nodes(&mut self, slot: Slot) {
        if !is_value(slot) {
            self.discard_below(slot, &Self::discard_nodes);
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

/// Calls `see` with every policy of a tree.
pub(super) fn for_each_policy(arena: &Arena, slot: Slot, see: &mut impl FnMut(Slot)) {
    if let Some(Kind::Ports) = slot.kind() {
        see(slot);
    }
    for child in children(arena, slot).unwrap_or_default() {
        for_each_policy(arena, child, see);
    }
}

/// The slots of a node, neighbours that are the same once; nothing for what is no node.
fn children(arena: &Arena, slot: Slot) -> Option<Vec<Slot>> {
    let (offset, count) = match slot.kind()? {
        Kind::Index => (slot.offset(), 1 << slot.width()),
        Kind::Sorted => (slot.offset() + (1 << slot.order()), 1 << slot.order()),
        Kind::Verdict | Kind::Ports => return None,
    };
    let mut slots = arena.slots(offset, count);
    // Unused places repeat the last slot, and an index repeats what is larger than a place.
    slots.dedup();
    Some(slots)
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

fn with_turn(slot: Slot, turn: Turn) -> Slot {
    if matches!(slot.kind(), Some(Kind::Index | Kind::Sorted)) { slot.with_turn(turn) } else { slot }
}

fn block_of(node: Slot) -> Block {
    let order = if let Some(Kind::Index) = node.kind() { node.width() } else { node.order() + 1 };
    Block { offset: node.offset(), order }
}
