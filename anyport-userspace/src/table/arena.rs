//! Memory for nodes: blocks of 2^n words in segments that are made as they are needed.
//!
//! What a reader may still see is never written to. Blocks that a change has no more use for wait until every reader
//! that began before the change was published has ended.

use std::{
    collections::{HashMap, HashSet},
    fmt, mem,
    sync::Arc,
    sync::atomic::AtomicU64,
    sync::atomic::Ordering,
};

use anyhow::bail;
use anyport_common::{
    maps::MAX_SEGMENTS,
    table::{SEGMENT_BITS, SEGMENT_WORDS, Slot, Store, Words},
};

use super::Published;
use crate::sys::MappedWords;

/// Orders from 0 to that of a whole segment.
const ORDERS: usize = SEGMENT_BITS as usize + 1;
const WHOLE: u32 = SEGMENT_BITS;
/// Whole segments that are kept at hand though nothing is in them.
const SPARE_SEGMENTS: usize = 1;

/// Where segments come from, and their readers.
pub trait Segments: Send + Sync + fmt::Debug {
    /// Makes the segment of this number, all zeros.
    ///
    /// # Errors
    /// The kernel's, such as a lack of memory.
    fn create(&mut self, number: u32) -> anyhow::Result<Segment>;

    /// Lets readers find the segments that were made.
    ///
    /// # Errors
    /// The kernel's.
    fn connect(&mut self) -> anyhow::Result<()> {
        Ok(())
    }

    /// Has the next [`Self::connect`] include all segments, since others may have taken some away.
    fn forget_connected(&mut self) {}

    /// Releases segments that have no readers any more, though others stay.
    ///
    /// # Errors
    /// The kernel's.
    fn remove(&mut self, _numbers: &[u32]) -> anyhow::Result<()> {
        Ok(())
    }

    /// Waits until all readers have ended that began before.
    fn wait_for_readers(&mut self);
}

/// The words of a segment.
#[derive(Debug)]
pub enum Segment {
    /// Shared with BPF programs.
    Mapped(MappedWords),
    /// This process's own.
    Owned(Box<[AtomicU64]>),
}

impl Segment {
    fn words(&self) -> &[AtomicU64] {
        match self {
            Self::Mapped(words) => words.words(),
            Self::Owned(words) => words,
        }
    }
}

/// Segments in the memory of this process, for back ends without BPF programs.
#[derive(Debug, Default)]
pub struct OwnSegments {
    /// Their readers.
    pub readers: Arc<Published>,
}

impl Segments for OwnSegments {
    fn create(&mut self, _number: u32) -> anyhow::Result<Segment> {
        Ok(Segment::Owned((0..SEGMENT_WORDS).map(|_| AtomicU64::new(0)).collect()))
    }

    fn wait_for_readers(&mut self) {
        self.readers.wait_for_readers();
    }
}

/// The segments as they are at a moment, for readers of this process.
#[derive(Clone, Debug, Default)]
pub struct View(Arc<[Option<Arc<Segment>>]>);

impl Store for View {
    type Segment<'a> = &'a Segment;

    fn segment(&self, number: u32) -> Option<&Segment> {
        self.0.get(number as usize)?.as_deref()
    }
}

impl Words for &Segment {
    fn word(&self, index: u32) -> u64 {
        self.words()[index as usize % SEGMENT_WORDS].load(Ordering::Relaxed)
    }
}

/// 2^`order` words from `offset` on, which is a multiple of that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Block {
    pub(super) offset: u32,
    pub(super) order: u32,
}

/// The blocks in use and those that are free.
#[derive(Debug)]
pub(super) struct Arena {
    source: Box<dyn Segments>,
    segments: Vec<Option<Arc<Segment>>>,
    free: [Vec<u32>; ORDERS],
    /// Taken since the last commit.
    taken: Vec<Block>,
    /// Those of them that were not freed again, by offset, with their order. Empty during a full rebuild.
    fresh: HashMap<u32, u32>,
    /// Freed since the last commit, and still active.
    given_up: Vec<Block>,
    /// Freed by earlier changes; readers may still use them.
    waiting: Vec<Block>,
    /// During a full rebuild: the free blocks between the old ones.
    aside: Option<Aside>,
    /// Words that are neither free nor waiting.
    used: u64,
}

#[derive(Debug)]
struct Aside {
    free: [Vec<u32>; ORDERS],
    /// The segments with old blocks.
    segments: HashSet<u32>,
    used: u64,
}

impl Arena {
    pub(super) fn new(source: Box<dyn Segments>) -> Self {
        Self {
            source,
            segments: Vec::new(),
            free: Default::default(),
            taken: Vec::new(),
            fresh: HashMap::new(),
            given_up: Vec::new(),
            waiting: Vec::new(),
            aside: None,
            used: 0,
        }
    }

    /// The segments for a reader.
    pub(super) fn view(&self) -> View {
        View(self.segments.clone().into())
    }

    /// Bytes in use, and bytes of all segments.
    pub(super) fn bytes(&self) -> (u64, u64) {
        (self.used * 8, self.segments.iter().flatten().count() as u64 * SEGMENT_WORDS as u64 * 8)
    }

    pub(super) fn word(&self, offset: u32) -> u64 {
        self.at(offset, 1)[0].load(Ordering::Relaxed)
    }

    /// Reads the slots from `offset` on.
    pub(super) fn slots(&self, offset: u32, count: u32) -> Vec<Slot> {
        self.at(offset, count).iter().map(|word| Slot(word.load(Ordering::Relaxed))).collect()
    }

    /// Takes a block and writes words to its beginning. What follows in the block is not defined.
    pub(super) fn put(&mut self, order: u32, words: impl IntoIterator<Item = u64>) -> anyhow::Result<u32> {
        let offset = self.take(order)?;
        self.write(Block { offset, order }, words);
        Ok(offset)
    }

    /// Writes words to the beginning of a block that was taken.
    pub(super) fn write(&mut self, Block { offset, order }: Block, words: impl IntoIterator<Item = u64>) {
        for (at, word) in self.at(offset, 1 << order).iter().zip(words) {
            at.store(word, Ordering::Relaxed);
        }
    }

    fn at(&self, offset: u32, count: u32) -> &[AtomicU64] {
        let segment = self.segments[(offset >> SEGMENT_BITS) as usize].as_ref();
        let first = offset as usize % SEGMENT_WORDS;
        &segment.expect("a block lies in a segment that is there").words()[first..first + count as usize]
    }

    /// Takes a block, of which the words are not defined. Blocks that are taken one after the other mostly lie side by
    /// side.
    pub(super) fn take(&mut self, order: u32) -> anyhow::Result<u32> {
        let offset = match self.take_free(order) {
            Some(offset) => offset,
            None => self.take_more(order)?,
        };
        self.taken.push(Block { offset, order });
        if self.aside.is_none() {
            self.fresh.insert(offset, order);
        }
        self.used += 1 << order;
        Ok(offset)
    }

    /// The smallest free block that is large enough is split until it fits.
    fn take_free(&mut self, order: u32) -> Option<u32> {
        let found = (order..=WHOLE).find(|order| !self.free[*order as usize].is_empty())?;
        let offset = self.free[found as usize].pop()?;
        for half in (order..found).rev() {
            self.free[half as usize].push(offset + (1 << half));
        }
        Some(offset)
    }

    fn take_more(&mut self, order: u32) -> anyhow::Result<u32> {
        let words = |blocks: &[Block]| blocks.iter().map(|it| 1_u64 << it.order).sum::<u64>();
        // Waiting takes milliseconds, so it must be worth it.
        if self.aside.is_none() && words(&self.waiting) * 4 >= self.used.max(SEGMENT_WORDS as u64) {
            self.reclaim();
            if let Some(offset) = self.take_free(order) {
                return Ok(offset);
            }
        }
        self.merge_free();
        if let Some(offset) = self.take_free(order) {
            return Ok(offset);
        }
        let number = self.segments.iter().position(Option::is_none).unwrap_or(self.segments.len());
        let number = u32::try_from(number)?;
        if number >= MAX_SEGMENTS {
            bail!(
                "the rules need more than the {} MiB that the lookup table may have; use fewer rules or shorter \
                 lists of ports",
                (u64::from(MAX_SEGMENTS) * SEGMENT_WORDS as u64 * 8) >> 20
            );
        }
        let segment = Some(Arc::new(self.source.create(number)?));
        match self.segments.get_mut(number as usize) {
            Some(place) => *place = segment,
            None => self.segments.push(segment),
        }
        self.free[WHOLE as usize].push(number << SEGMENT_BITS);
        self.take_free(order).ok_or_else(|| anyhow::anyhow!("a new segment of the lookup table has no room"))
    }

    /// A block that is no part of the next generation. Its words stay as they are if it is part of one before; else it
    /// is free at once, so that many changes together take no more than one does.
    pub(super) fn give_up(&mut self, block: Block) {
        let Block { offset, order } = block;
        if self.fresh.remove(&offset).is_none() {
            self.given_up.push(block);
            return;
        }
        self.free[order as usize].push(offset);
        self.used -= 1 << order;
    }

    /// A block with these words that nobody has seen yet: this one, if it is part of no generation before, or a copy in the
    /// place of it.
    pub(super) fn own(&mut self, block: Block) -> anyhow::Result<u32> {
        if self.fresh.contains_key(&block.offset) {
            return Ok(block.offset);
        }
        let words: Vec<_> = self.slots(block.offset, 1 << block.order);
        self.give_up(block);
        self.put(block.order, words.into_iter().map(|it| it.0))
    }

    /// How many blocks were taken since the last commit.
    pub(super) fn mark(&self) -> usize {
        self.taken.len()
    }

    /// The blocks that were taken since a mark.
    pub(super) fn taken_since(&self, mark: usize) -> Vec<Block> {
        self.taken[mark..].to_vec()
    }

    /// From here on nothing of what is there is used: a whole generation is made beside it.
    pub(super) fn begin_anew(&mut self) {
        // Only whole segments that are free are of use now, so that those of the generation before last must be free.
        if self.waiting.iter().map(|it| 1_u64 << it.order).sum::<u64>() >= SEGMENT_WORDS as u64 {
            self.reclaim();
        }
        self.merge_free();
        let whole = mem::take(&mut self.free[WHOLE as usize]);
        let is_whole = |number: &u32| whole.contains(&(number << SEGMENT_BITS));
        let numbers = (0..).zip(&self.segments).filter(|(_, it)| it.is_some()).map(|(number, _)| number);
        let segments = numbers.filter(|number| !is_whole(number)).collect();
        let free = mem::take(&mut self.free);
        self.free[WHOLE as usize] = whole;
        self.aside = Some(Aside { free, segments, used: mem::take(&mut self.used) });
    }

    /// What was made since the last commit has been published.
    pub(super) fn commit(&mut self) {
        self.taken.clear();
        self.fresh.clear();
        if let Some(Aside { segments, .. }) = self.aside.take() {
            // Whatever waited or was freed lies in these.
            self.given_up.clear();
            self.waiting =
                segments.into_iter().map(|number| Block { offset: number << SEGMENT_BITS, order: WHOLE }).collect();
        } else {
            self.used -= self.given_up.iter().map(|it| 1 << it.order).sum::<u64>();
            self.waiting.append(&mut self.given_up);
        }
    }

    /// What was made since the last commit is not needed.
    pub(super) fn abort(&mut self) {
        self.given_up.clear();
        let anew = self.aside.is_some().then(|| self.taken.iter().map(|it| (it.offset, it.order)));
        for (offset, order) in anew.into_iter().flatten().chain(self.fresh.drain()) {
            self.free[order as usize].push(offset);
            self.used -= 1 << order;
        }
        self.taken.clear();
        if let Some(Aside { free, used, .. }) = self.aside.take() {
            for (free, aside) in self.free.iter_mut().zip(free) {
                free.extend(aside);
            }
            self.used = used;
        }
    }

    /// Frees what waits, once it has no readers.
    fn reclaim(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        self.source.wait_for_readers();
        for Block { offset, order } in self.waiting.drain(..) {
            self.free[order as usize].push(offset);
        }
    }

    /// Lets readers find what was made.
    pub(super) fn connect(&mut self) -> anyhow::Result<()> {
        self.source.connect()
    }

    /// See [`Segments::forget_connected`].
    pub(super) fn forget_connected(&mut self) {
        self.source.forget_connected();
    }

    /// Releases memory that is no longer used.
    pub(super) fn trim(&mut self) -> anyhow::Result<()> {
        let is_much = |arena: &Self| {
            let (used, all) = arena.bytes();
            all > 2 * used + 2 * SEGMENT_WORDS as u64 * 8
        };
        if !is_much(self) {
            return Ok(());
        }
        self.reclaim();
        self.merge_free();
        let whole = &mut self.free[WHOLE as usize];
        // A segment of several that are all free stays, too.
        let kept = SPARE_SEGMENTS.min(whole.len());
        let numbers: Vec<u32> = whole.drain(kept..).map(|offset| offset >> SEGMENT_BITS).collect();
        self.source.remove(&numbers)?;
        for number in numbers {
            self.segments[number as usize] = None;
        }
        Ok(())
    }

    /// Makes large free blocks out of small ones that lie side by side.
    fn merge_free(&mut self) {
        for order in 0..WHOLE {
            let mut blocks = mem::take(&mut self.free[order as usize]);
            blocks.sort_unstable();
            let mut kept = Vec::with_capacity(blocks.len());
            let mut blocks = blocks.into_iter().peekable();
            while let Some(offset) = blocks.next() {
                let is_lower = offset >> order & 1 == 0;
                if is_lower && blocks.next_if_eq(&(offset + (1 << order))).is_some() {
                    self.free[order as usize + 1].push(offset);
                } else {
                    kept.push(offset);
                }
            }
            self.free[order as usize] = kept;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Arena, Block, OwnSegments};

    /// Whatever was freed comes back, but never what is in use.
    #[test]
    fn blocks_come_back_after_the_commit() {
        let mut arena = Arena::new(Box::new(OwnSegments::default()));
        let mut live = Vec::new();
        for round in 0..2_000_u32 {
            let order = round * 7 % 13;
            let offset = arena.put(order, (0..1 << order).map(|it| u64::from(it ^ round))).unwrap();
            live.push((Block { offset, order }, round));
            if round % 3 == 0 {
                let (gone, _) = live.swap_remove(round as usize % live.len());
                arena.give_up(gone);
            }
            if live.len() > 40 {
                for (block, _) in live.drain(..30) {
                    arena.give_up(block);
                }
            }
            arena.commit();
            for (Block { offset, order }, round) in &live {
                assert!((0..1 << order).all(|it| arena.word(offset + it) == u64::from(it ^ round)));
            }
        }
        for (block, _) in live.drain(..) {
            arena.give_up(block);
        }
        arena.commit();
        arena.trim().unwrap();
        assert_eq!(arena.bytes(), (0, 1 << 19));
    }

    /// Full rebuilds alternate between the same segments.
    #[test]
    fn whole_generations_come_back() {
        let mut arena = Arena::new(Box::new(OwnSegments::default()));
        for round in 0..50 {
            arena.begin_anew();
            let offset = arena.put(3, [round]).unwrap();
            arena.commit();
            assert_eq!(arena.word(offset), round);
        }
        assert!(arena.bytes().1 <= 3 << 19, "{} bytes", arena.bytes().1);
    }

    /// What one change takes and frees is free at once, and its words are another's.
    #[test]
    fn a_change_uses_its_room_again() {
        let mut arena = Arena::new(Box::new(OwnSegments::default()));
        let kept = arena.put(14, [7]).unwrap();
        arena.commit();
        for is_kept in [false, true] {
            let mut block = Block { offset: kept, order: 14 };
            for round in 0..1_000 {
                let offset = arena.put(14, [round]).unwrap();
                arena.give_up(block);
                block = Block { offset, order: 14 };
            }
            assert_eq!((arena.bytes(), arena.word(kept)), ((2 << 17, 1 << 19), 7));
            if is_kept {
                arena.commit();
            } else {
                arena.abort();
            }
            assert_eq!((arena.bytes().0, arena.word(block.offset)), (1 << 17, 999));
        }
    }

    #[test]
    fn what_is_aborted_leaves_no_trace() {
        let mut arena = Arena::new(Box::new(OwnSegments::default()));
        let kept = arena.put(3, [7; 8]).unwrap();
        arena.commit();
        for anew in [false, true] {
            if anew {
                arena.begin_anew();
            }
            for order in 0..10 {
                arena.put(order, [1]).unwrap();
            }
            arena.give_up(Block { offset: kept, order: 3 });
            arena.abort();
            assert_eq!((arena.bytes().0, arena.word(kept)), (64, 7));
        }
        arena.begin_anew();
        let other = arena.put(3, [8; 8]).unwrap();
        assert_eq!((arena.word(kept), arena.word(other)), (7, 8));
        arena.commit();
        arena.trim().unwrap();
        assert_eq!((arena.bytes().0, arena.word(other)), (64, 8));
    }
}
