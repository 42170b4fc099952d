//! Cache-line nodes: one cache line for each part of an aligned block of keys.

use anyport_common::table::{CacheLine, KeySelector, LINE_KEY_BITS, LINE_SLOTS, LINE_WORDS, MAX_LINES_WIDTH, Slot};
use smallvec::SmallVec;

use super::{
    arena::{Arena, Block},
    tree::{Built, Parts, Piece, build},
};

/// How the cache lines of a node divide an aligned block of keys.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lines {
    pub(super) skip: u32,
    pub(super) width: u32,
}

impl Lines {
    /// Cache lines of which only few have so many pieces that they go on elsewhere.
    pub(super) fn of(pieces: &[Piece], last: u64) -> Option<Self> {
        let skip = (pieces[0].first ^ last).leading_zeros();
        let width = Self::width(pieces.len()).min(63 - skip);
        if width > MAX_LINES_WIDTH {
            return None;
        }
        let shape = Self { skip, width };
        let by_line = pieces[1..].chunk_by(|a, b| shape.number_of(a.first) == shape.number_of(b.first));
        let elsewhere = by_line.filter(|line| !shape.fits(line)).map(<[Piece]>::len).sum::<usize>();
        (elsewhere <= pieces.len() / 3).then_some(shape)
    }

    /// How many cache lines there should be for how many pieces: half of each is filled on average, or a bit more.
    pub(super) fn width(pieces: usize) -> u32 {
        (pieces * 2 / 9).next_power_of_two().trailing_zeros()
    }

    /// The cache-line node in a slot.
    pub(super) fn in_slot(slot: Slot) -> Self {
        Self { skip: slot.skip(), width: slot.width() }
    }

    pub(super) fn slot(self, offset: u32, selector: KeySelector) -> Slot {
        Slot::lines(self.skip, self.width, offset, selector)
    }

    /// The order of the block that they take.
    pub(super) fn order(self) -> u32 {
        self.width + LINE_WORDS.trailing_zeros()
    }

    /// The bits of the key that come before those that select the slot within a cache line.
    pub(super) fn before(self) -> u32 {
        self.skip + self.width
    }

    /// The first key of the block around `key`.
    pub(super) fn base(self, key: u64) -> u64 {
        key & !(u64::MAX >> self.skip)
    }

    /// The first and the last key of a cache line.
    pub(super) fn bounds(self, base: u64, number: u64) -> (u64, u64) {
        let span = u64::MAX >> self.before();
        // One cache line alone may take all keys.
        let first = base + number.wrapping_mul(span.wrapping_add(1));
        (first, first + span)
    }

    /// The cache line of a key.
    pub(super) fn number_of(self, key: u64) -> u64 {
        key << self.skip >> 1 >> (63 - self.width)
    }

    /// One of the cache lines as a node by itself.
    pub(super) fn one(self, slot: Slot, number: u64) -> Slot {
        let offset = slot.offset() + u32::try_from(number).unwrap_or_default() * LINE_WORDS;
        Self { skip: self.before(), width: 0 }.slot(offset, KeySelector::Same)
    }

    /// Whether these pieces fit into a cache line, beside what comes before them.
    fn fits(self, pieces: &[Piece]) -> bool {
        pieces.len() < LINE_SLOTS as usize && pieces.iter().all(|it| it.first << self.before() << LINE_KEY_BITS == 0)
    }

    /// The pieces as a cache line, if they fit.
    pub(super) fn line(self, pieces: &[Piece]) -> Option<CacheLine> {
        if !self.fits(pieces.get(1..)?) {
            return None;
        }
        let slots: SmallVec<[Slot; LINE_SLOTS as usize]> = pieces.iter().map(|it| it.slot).collect();
        let keys: SmallVec<[u64; LINE_SLOTS as usize]> =
            pieces[1..].iter().map(|it| it.first << self.before() >> (64 - LINE_KEY_BITS)).collect();
        CacheLine::of(&slots, &keys)
    }

    /// The pieces as a cache line, which leads elsewhere if they don't fit, and the depth of what is there.
    pub(super) fn line_or_node(
        self,
        arena: &mut Arena,
        pieces: &[Piece],
        last: u64,
    ) -> anyhow::Result<(CacheLine, u32)> {
        if let Some(line) = self.line(pieces) {
            return Ok((line, 0));
        }
        let built = build(arena, pieces, last, KeySelector::Same)?;
        let line = CacheLine::of(&[built.slot], &[]);
        Ok((line.ok_or_else(|| anyhow::anyhow!("a line has no room for a node"))?, built.depth))
    }
}

pub(super) fn lines(
    arena: &mut Arena,
    pieces: &[Piece],
    last: u64,
    shape: Lines,
    selector: KeySelector,
) -> anyhow::Result<Built> {
    let base = shape.base(pieces[0].first);
    // Before the nodes below them, so that they lie behind.
    let block = Block { offset: arena.take(shape.order())?, order: shape.order() };
    let mut words = Vec::with_capacity((LINE_WORDS as usize) << shape.width);
    let mut depth = 0;
    let mut parts = Parts::of(pieces);
    for number in 0..1 << shape.width {
        let (first, end) = shape.bounds(base, number);
        let (line, below) = shape.line_or_node(arena, parts.next(first, end), end.min(last))?;
        words.extend(line.0);
        depth = depth.max(below);
    }
    arena.write(block, words);
    Ok(Built { slot: shape.slot(block.offset, selector), depth: depth + 1 })
}

/// Reads a cache line.
pub(super) fn line_at(arena: &Arena, offset: u32) -> CacheLine {
    let mut line = CacheLine([0; LINE_WORDS as usize]);
    for (to, from) in line.0.iter_mut().zip(offset..) {
        *to = arena.word(from);
    }
    line
}
