//! The lookup: from the original destination to the rule that decides.
//!
//! A generation is a tree of nodes in a flat array of words, made of [`Slot`]s. What it divides into ranges is the
//! space of a 64-bit key: the first half of the address (IPv4 stands in its first 32 bits), then the second half where
//! a prefix is longer than 64 bits, then the port (in its first 16 bits), then the client's address where a rule asks
//! for it. There are three kinds of nodes, and the compiler takes the one that divides the ranges at hand best:
//!
//! - an *index* takes up to 12 bits of the key as the place of the next slot;
//! - *lines* are an index of what takes one cache line each: up to 8 slots, made shorter, and the keys at which all but
//!   the first begin, in the 15 bits of the key behind those of the index;
//! - a *sorted node* has up to 8 slots and keys as they are: two cache lines at most.
//!
//! What a lookup costs is the memory that is not in the processor's caches: one load of it costs more than all
//! instructions together. So prefixes, few or a million, mostly make lines: from the root of a few words, which is always
//! in the caches, one load leads to what holds for an address.
//!
//! Whatever the rules are, each step leaves a fraction of the ranges, so that a lookup ends after few steps. Nodes are
//! never changed once a program can see them: a change copies those on the way to what is new, and a root replaces the
//! other. The program that reads a generation took its root once, so a packet is judged by one generation whole.

use crate::flow::{Address, Flow, Transport};

/// Words of a segment are counted by this many bits.
pub const SEGMENT_BITS: u32 = 16;
/// Words of a segment; a node lies in one segment whole.
pub const SEGMENT_WORDS: usize = 1 << SEGMENT_BITS;
/// Bits of the key that an index takes at most.
pub const MAX_INDEX_WIDTH: u32 = 12;
/// Slots of the largest sorted node.
pub const MAX_SORTED: usize = 8;
/// Bits of the key that the index of lines takes at most.
pub const MAX_LINES_WIDTH: u32 = 11;
/// Words of a line.
pub const LINE_WORDS: u32 = 8;
/// Slots of a line.
pub const LINE_SLOTS: u32 = 8;
/// Bits of the key by which the slots of a line are told apart.
pub const LINE_KEY_BITS: u32 = 15;
/// Bits of a node's offset, in words.
pub const OFFSET_BITS: u32 = 27;
/// Bits of a rule's number.
pub const NUMBER_BITS: u32 = 21;

/// Steps to what holds for an address, and again from there to the verdict, at most. It bounds the loop for the verifier.
pub const STEPS: u32 = 28;

/// Where the nodes of a table are read from.
pub trait Store {
    /// A segment.
    type Segment<'a>: Words
    where
        Self: 'a;

    /// The segment of this number, or nothing if there is none.
    fn segment(&self, number: u32) -> Option<Self::Segment<'_>>;

    /// Goes from node to node until there is none, see [`descend`]. A store may have this done elsewhere.
    #[inline(always)]
    fn descend(&self, root: Slot, keys: Keys) -> Option<Slot> {
        descend(self, root, keys)
    }
}

/// The words of a segment.
pub trait Words {
    /// The word at `index`, of which the last [`SEGMENT_BITS`] bits count.
    fn word(&self, index: u32) -> u64;
}

/// What the rules say about a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No rule matches.
    Unmatched,
    /// A rule leaves it to the host.
    Host {
        /// The deciding rule's number.
        rule: u32,
    },
    /// A rule steers it to a service.
    Steer {
        /// The deciding rule's number.
        rule: u32,
        /// The service's slot.
        service: u16,
    },
    /// A rule steers it to a service that does not take its source.
    Deny {
        /// The deciding rule's number.
        rule: u32,
    },
}

/// What holds for a range of keys: a verdict, the ports that have to be looked at, or a node that divides it further.
/// The number 0 is the verdict that no rule matches.
///
/// ```text
/// bits     0-2      3-4    5-7                8-15   16-31        32-63
/// verdict  VERDICT  -      kind, is relative  -      service      rule's number
///          0-2      3-4    5-6     7-10  11-15  16-42             43-63
/// sorted   SORTED   sel.   order   -     -      offset            -
/// index    INDEX    sel.   shift (5-10)  width  offset            -
/// lines    LINES    sel.   skip (5-10)   width  offset            -
/// ports    PORTS    -      -       -     -      offset            number of the prefix's first rule
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slot(pub u64);

/// What a slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotKind {
    /// The end of the way.
    Verdict,
    /// A node with sorted keys.
    Sorted,
    /// A node that is indexed by bits of the key.
    Index,
    /// Cache lines that are indexed by bits of the key.
    CacheLines,
    /// Two slots, for the ports of TCP and UDP.
    Ports,
}

/// Which key a node goes on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeySelector {
    /// The one of the node before.
    Same = 0,
    /// The second half of the address.
    Low = 1,
    /// The client's address.
    Source = 2,
}

const VERDICT: u64 = 0;
const SORTED: u64 = 1;
const INDEX: u64 = 2;
const PORTS: u64 = 3;
const LINES: u64 = 4;

const UNMATCHED: u64 = 0;
const HOST: u64 = 1;
const STEER: u64 = 2;
const DENY: u64 = 3;

impl Slot {
    /// No rule matches.
    pub const UNMATCHED: Self = Self(0);

    /// A verdict. The number of a rule that `is_relative` counts from the first rule of the prefix.
    pub const fn verdict(verdict: Verdict, is_relative: bool) -> Self {
        let (kind, service, rule) = match verdict {
            Verdict::Unmatched => return Self::UNMATCHED,
            Verdict::Host { rule } => (HOST, 0, rule),
            Verdict::Steer { rule, service } => (STEER, service, rule),
            Verdict::Deny { rule } => (DENY, 0, rule),
        };
        Self(VERDICT | kind << 5 | (is_relative as u64) << 7 | (service as u64) << 16 | (rule as u64) << 32)
    }

    /// A sorted node: 2^`order` slots, `order` from 1 to 3. Its words are the keys, of which the last is unused, and
    /// the slots. Unused places repeat the last slot, under the highest key.
    pub const fn sorted(order: u32, offset: u32, selector: KeySelector) -> Self {
        Self(SORTED | (selector as u64) << 3 | (order as u64) << 5 | (offset as u64) << 16)
    }

    /// An index of 2^`width` slots by the bits of the key above the last `shift`.
    pub const fn index(shift: u32, width: u32, offset: u32, selector: KeySelector) -> Self {
        Self(INDEX | (selector as u64) << 3 | (shift as u64) << 5 | (width as u64) << 11 | (offset as u64) << 16)
    }

    /// 2^`width` lines by the bits of the key behind the first `skip`; both together are 63 at most. See [`CacheLine`].
    pub const fn lines(skip: u32, width: u32, offset: u32, selector: KeySelector) -> Self {
        Self(LINES | (selector as u64) << 3 | (skip as u64) << 5 | (width as u64) << 11 | (offset as u64) << 16)
    }

    /// The ports of a prefix whose first rule has this number.
    pub const fn ports(offset: u32, number: u32) -> Self {
        Self(PORTS | (offset as u64) << 16 | (number as u64) << 43)
    }

    /// What this is; nothing for a word that is damaged.
    #[inline(always)]
    pub const fn kind(self) -> Option<SlotKind> {
        match self.0 & 7 {
            VERDICT => Some(SlotKind::Verdict),
            SORTED => Some(SlotKind::Sorted),
            INDEX => Some(SlotKind::Index),
            PORTS => Some(SlotKind::Ports),
            LINES => Some(SlotKind::CacheLines),
            _ => None,
        }
    }

    /// Which key a node goes on with.
    pub const fn selector(self) -> KeySelector {
        match self.0 >> 3 & 3 {
            1 => KeySelector::Low,
            2 => KeySelector::Source,
            _ => KeySelector::Same,
        }
    }

    /// The node, going on with another key.
    #[must_use]
    pub const fn with_selector(self, selector: KeySelector) -> Self {
        Self(self.0 & !(3 << 3) | (selector as u64) << 3)
    }

    /// The node, or whatever it is, going on with the same key.
    #[must_use]
    pub const fn without_selector(self) -> Self {
        self.with_selector(KeySelector::Same)
    }

    /// Where the words of a node begin.
    #[inline(always)]
    pub const fn offset(self) -> u32 {
        (self.0 >> 16 & ((1 << OFFSET_BITS) - 1)) as u32
    }

    /// The order of a sorted node.
    #[inline(always)]
    pub const fn order(self) -> u32 {
        (self.0 >> 5 & 3) as u32
    }

    /// How far the key of an index is shifted.
    #[inline(always)]
    pub const fn shift(self) -> u32 {
        (self.0 >> 5 & 63) as u32
    }

    /// How many bits of the key are behind those of lines.
    #[inline(always)]
    pub const fn skip(self) -> u32 {
        self.shift()
    }

    /// How many bits of the key an index takes.
    #[inline(always)]
    pub const fn width(self) -> u32 {
        (self.0 >> 11 & 31) as u32
    }

    /// The number of the first rule of the prefix whose ports these are.
    #[inline(always)]
    pub const fn first_number(self) -> u32 {
        (self.0 >> 43) as u32
    }

    /// The verdict of a slot that is one. `first_number` is that of the prefix's first rule.
    #[inline(always)]
    pub const fn to_verdict(self, first_number: u32) -> Verdict {
        let is_relative = self.0 >> 7 & 1 != 0;
        let rule = (self.0 >> 32) as u32;
        let rule = if is_relative { rule.wrapping_add(first_number) } else { rule };
        match self.0 >> 5 & 3 {
            HOST => Verdict::Host { rule },
            STEER => Verdict::Steer { rule, service: (self.0 >> 16 & 0xffff) as u16 },
            DENY => Verdict::Deny { rule },
            _ => Verdict::Unmatched,
        }
    }
}

/// A cache line with up to [`LINE_SLOTS`] slots: ports, or what needs no more than [`NODE_BITS`], which are nodes and
/// verdicts by rules with low numbers.
///
/// ```text
/// word   bits 0-15     16-31     32-47     48-63
/// 0      key 1         key 2     key 3     key 4
/// 1      key 5         key 6     key 7     by slot, whether it is none of ports
/// 2      slot 0        slot 1    slot 2    slot 3        bits 32 to 47
/// 3      slot 4        slot 5    slot 6    slot 7
/// 4-7    slots 0 to 7, two a word                        bits 0 to 31
/// ```
///
/// Unused places repeat the last slot, under the highest key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheLine(pub [u64; LINE_WORDS as usize]);

/// Bits of a slot that is a node.
pub const NODE_BITS: u32 = 16 + OFFSET_BITS;
/// The highest key of a line.
const LAST_KEY: u64 = (1 << LINE_KEY_BITS) - 1;
/// A one in each of four 16-bit numbers.
const ONES: u64 = 0x0001_0001_0001_0001;
/// The highest bit of each of them.
const HIGHS: u64 = ONES << LINE_KEY_BITS;
/// The keys of the second word.
const SECOND: u64 = u64::MAX >> 16;

impl CacheLine {
    /// A line of slots, of which all but the first begin at these keys; nothing if they don't fit.
    pub fn of(slots: &[Slot], keys: &[u64]) -> Option<Self> {
        let last = *slots.last()?;
        let fits = |slot: &Slot| matches!(slot.kind(), Some(SlotKind::Ports)) || slot.0 >> NODE_BITS == 0;
        if slots.len() > LINE_SLOTS as usize || !slots.iter().all(fits) {
            return None;
        }
        let mut words = [0; LINE_WORDS as usize];
        for place in 0..LINE_SLOTS as usize {
            let slot = *slots.get(place).unwrap_or(&last);
            let is_ports = matches!(slot.kind(), Some(SlotKind::Ports));
            let short = if is_ports { slot.0 >> 16 } else { slot.0 };
            words[1] |= u64::from(!is_ports) << (48 + place);
            words[2 + place / 4] |= (short >> 32) << (16 * (place % 4));
            words[4 + place / 2] |= (short & 0xffff_ffff) << (32 * (place % 2));
            if place + 1 < LINE_SLOTS as usize {
                let key = *keys.get(place).unwrap_or(&LAST_KEY);
                words[place / 4] |= key << (16 * (place % 4));
            }
        }
        Some(Self(words))
    }

    /// The slots, each with the key at which it begins.
    pub fn slots(&self) -> impl Iterator<Item = (u64, Slot)> + '_ {
        let word = |index: u32| self.0[(index % LINE_WORDS) as usize];
        let key = move |place: u32| word(place / 4) >> (16 * (place % 4)) & LAST_KEY;
        (0..LINE_SLOTS).map(move |place| (place.checked_sub(1).map_or(0, key), in_line(word, place)))
    }
}

/// The slot at a place of a line.
#[inline(always)]
fn in_line(word: impl Fn(u32) -> u64, place: u32) -> Slot {
    let high = word(2 + place / 4) >> (16 * (place % 4)) & 0xffff;
    let low = word(4 + place / 2) >> (32 * (place % 2)) & 0xffff_ffff;
    let short = (high << 32) | low;
    let is_ports = word(1) >> (48 + place) & 1 == 0;
    Slot(if is_ports { short << 16 | PORTS } else { short & ((1 << NODE_BITS) - 1) })
}

/// The place of a key in a line: how many of the line's keys are no higher.
#[inline(always)]
fn place_in_line(word: impl Fn(u32) -> u64, key: u64) -> u32 {
    // Each key subtracted from this one leaves the highest bit of its 16 where it is no higher.
    let key = (key * ONES) | HIGHS;
    let count = |keys: u64| ((key.wrapping_sub(keys) & HIGHS) >> LINE_KEY_BITS).wrapping_mul(ONES) >> 48;
    // The second word has no fourth key, so that 0 stands there, which is never higher.
    low_half(count(word(0)) + count(word(1) & SECOND)).wrapping_sub(1) % LINE_SLOTS
}

const _: () = assert!(UNMATCHED == 0 && VERDICT == 0, "a word of zeros says that no rule matches");

/// A port as a key.
#[inline(always)]
pub const fn port_key(port: u16) -> u64 {
    (port as u64) << 48
}

/// Judges a flow by the generation whose slot for the flow's IP version is `root`. Nothing is returned only for a
/// table that is damaged.
#[inline(always)]
pub fn lookup<S: Store + ?Sized>(store: &S, root: Slot, flow: &Flow) -> Option<Verdict> {
    // No rule matches port 0.
    if flow.port == 0 {
        return Some(Verdict::Unmatched);
    }
    let policy = policy(store, root, flow.address)?;
    if let Some(SlotKind::Verdict) = policy.kind() {
        return Some(policy.to_verdict(0));
    }
    let transport = match flow.transport {
        Transport::Tcp => 0,
        Transport::Udp => 1,
    };
    let at = policy.offset();
    let ports = Slot(store.segment(at >> SEGMENT_BITS)?.word(at.wrapping_add(transport)));
    // The same for all ports, as most policies say.
    if let Some(SlotKind::Verdict) = ports.kind() {
        return Some(ports.to_verdict(policy.first_number()));
    }
    let keys = Keys { key: port_key(flow.port), low: flow.source.low, source: flow.source.high };
    let verdict = store.descend(ports, keys)?;
    Some(verdict.to_verdict(policy.first_number()))
}

/// Whether a rule of a generation matches any port of an address. Nothing is returned only for a table that
/// is damaged.
#[inline(always)]
pub fn covers<S: Store + ?Sized>(store: &S, root: Slot, address: Address) -> Option<bool> {
    Some(policy(store, root, address)? != Slot::UNMATCHED)
}

/// What holds for an address.
#[inline(always)]
fn policy<S: Store + ?Sized>(store: &S, root: Slot, Address { high, low, .. }: Address) -> Option<Slot> {
    store.descend(root, Keys { key: high, low, source: 0 })
}

/// What the nodes on a way ask for.
#[derive(Clone, Copy, Debug)]
pub struct Keys {
    /// Of the first node.
    pub key: u64,
    /// At [`KeySelector::Low`].
    pub low: u64,
    /// At [`KeySelector::Source`].
    pub source: u64,
}

/// Goes from node to node until there is none. Nothing is returned only for a table that is damaged.
///
/// There is as little branching as can be: what the verifier has to walk grows with it, and a processor can't guess
/// where random keys lead.
#[inline(always)]
pub fn descend<S: Store + ?Sized>(store: &S, root: Slot, Keys { mut key, low, source }: Keys) -> Option<Slot> {
    let mut slot = root;
    for _ in 0..STEPS {
        let kind = slot.kind()?;
        if let SlotKind::Verdict | SlotKind::Ports = kind {
            return Some(slot);
        }
        let (is_low, is_source) = (slot.0 >> 3 & 1, slot.0 >> 4 & 1);
        key ^= (key ^ low) & is_low.wrapping_neg();
        key ^= (key ^ source) & is_source.wrapping_neg();
        let at = slot.offset();
        let segment = store.segment(at >> SEGMENT_BITS)?;
        let word = |index: u32| segment.word(at.wrapping_add(index));
        if let SlotKind::CacheLines = kind {
            let (skip, width) = (slot.skip(), slot.width());
            // In two steps, since no shift is of 64 bits.
            let line = low_half(key.wrapping_shl(skip) >> 1 >> (63 - width)).wrapping_mul(LINE_WORDS);
            let word = |index: u32| word(line.wrapping_add(index));
            let rest = key.wrapping_shl(skip + width) >> (64 - LINE_KEY_BITS);
            slot = in_line(word, place_in_line(word, rest));
            continue;
        }
        let place = if let SlotKind::Index = kind {
            let mask = (1_u32 << slot.width()).wrapping_sub(1);
            low_half(key >> slot.shift()) & mask
        } else {
            // A binary search in three steps; those that a smaller node has no need of add 0.
            let slots = 1_u32 << slot.order();
            let mut half = slots >> 1;
            let mut place = 0_u32;
            for _ in 0..3 {
                let begins = word(place.wrapping_add(half).wrapping_sub(1));
                place += half & is_at_most(begins, key).wrapping_neg();
                half >>= 1;
            }
            slots + place
        };
        slot = Slot(word(place));
    }
    None
}

/// 1 if `a <= b`, else 0, without a branch: the carry out of `b - a`.
#[inline(always)]
const fn is_at_most(a: u64, b: u64) -> u32 {
    let borrow = (!b & a) | (!(b ^ a) & b.wrapping_sub(a));
    (borrow >> 63) as u32 ^ 1
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
const fn low_half(word: u64) -> u32 {
    word as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::vec::Vec;

    use super::{
        CacheLine, KeySelector, Keys, LINE_WORDS, SEGMENT_WORDS, Slot, Store, Verdict, Words, covers, descend, lookup,
        port_key,
    };
    use crate::flow::{Address, Flow, Transport};

    /// Segments one after the other.
    struct Segments(Vec<u64>);

    impl Store for Segments {
        type Segment<'a> = &'a [u64];

        fn segment(&self, number: u32) -> Option<&[u64]> {
            self.0.chunks(SEGMENT_WORDS).nth(number as usize)
        }
    }

    impl Words for &[u64] {
        fn word(&self, index: u32) -> u64 {
            self.get(index as usize % SEGMENT_WORDS).copied().unwrap_or_default()
        }
    }

    const STEER: Verdict = Verdict::Steer { rule: 9, service: 3 };
    const HOST: Verdict = Verdict::Host { rule: 9 };

    /// Nothing but 192.0.2.0/24, TCP, ports 80 to 90 steered and 85 left to the host, by rule 9, and only for clients
    /// below 198.51.100.0.
    fn table() -> (Segments, Slot) {
        let steer = Slot::verdict(Verdict::Steer { rule: 2, service: 3 }, true).0;
        let host = Slot::verdict(HOST, false).0;
        let words = [
            // 0: addresses
            &[0xc000_0200 << 32, 0xc000_0300 << 32, u64::MAX, 0, 0, Slot::ports(8, 7).0, 0, 0][..],
            // 8: ports of TCP, from 64 to 127, and of UDP
            &[Slot::index(64 - 10, 3, 16, KeySelector::Same).0, 0, 0, 0, 0, 0, 0, 0],
            // 16: ports by the bits above the last 6, of which 1 is 64 to 127
            &[0, Slot::sorted(3, 24, KeySelector::Same).0, 0, 0, 0, 0, 0, 0],
            // 24: ports from 64 on
            &[80, 85, 86, 91].map(port_key),
            &[u64::MAX; 4],
            &[0, Slot::sorted(1, 40, KeySelector::Source).0, host, steer, 0, 0, 0, 0],
            // 40: clients
            &[0xc633_6400 << 32, 0, steer, 0],
        ];
        (Segments(words.concat()), Slot::sorted(2, 0, KeySelector::Same))
    }

    fn flow(source: u32, address: u32, transport: Transport, port: u16) -> Flow {
        Flow { source: Address::v4(source), address: Address::v4(address), transport, port }
    }

    #[test]
    fn finds_ranges_and_their_edges() {
        let (table, root) = table();
        for (source, address, port, expected) in [
            (0, 0xc000_01ff, 80, Verdict::Unmatched),
            (0, 0xc000_0200, 80, STEER),
            (0, 0xc000_02ff, 80, STEER),
            (0, 0xc000_0300, 80, Verdict::Unmatched),
            (0, 0xc000_0207, 0, Verdict::Unmatched),
            (0, 0xc000_0207, 79, Verdict::Unmatched),
            (0, 0xc000_0207, 84, STEER),
            (0xc633_6400, 0xc000_0207, 84, Verdict::Unmatched),
            (0xc633_63ff, 0xc000_0207, 84, STEER),
            (0xc633_6400, 0xc000_0207, 86, STEER),
            (0, 0xc000_0207, 85, HOST),
            (0, 0xc000_0207, 90, STEER),
            (0, 0xc000_0207, 91, Verdict::Unmatched),
            (0, 0xc000_0207, 65_535, Verdict::Unmatched),
        ] {
            let verdict = lookup(&table, root, &flow(source, address, Transport::Tcp, port));
            assert_eq!(verdict, Some(expected), "{address:x}:{port}");
            let is_covered = (0xc000_0200..0xc000_0300).contains(&address);
            assert_eq!(covers(&table, root, Address::v4(address)), Some(is_covered), "{address:x}");
        }
        let udp = lookup(&table, root, &flow(0, 0xc000_0200, Transport::Udp, 80));
        assert_eq!(udp, Some(Verdict::Unmatched));
    }

    /// A slot of a line: ports, a node, or nothing.
    fn slot() -> impl Strategy<Value = Slot> {
        prop_oneof![
            (0..1_u32 << 27, 0..1_u32 << 21).prop_map(|(offset, number)| Slot::ports(offset, number)),
            Just(Slot::UNMATCHED),
        ]
    }

    #[test]
    fn a_line_has_room_for_nodes_but_not_for_every_verdict() {
        let last = (1 << 27) - 1;
        for node in [
            Slot::lines(63, 11, last, KeySelector::Source),
            Slot::index(63, 12, last, KeySelector::Low),
            Slot::sorted(3, last, KeySelector::Same),
            Slot::ports(last, (1 << 21) - 1),
            Slot::verdict(Verdict::Steer { rule: (1 << 11) - 1, service: u16::MAX }, true),
        ] {
            let line = CacheLine::of(&[Slot::UNMATCHED, node], &[5]).unwrap();
            let expected = [(0, Slot::UNMATCHED), (5, node)].into_iter().chain([(0x7fff, node); 6]);
            assert_eq!(line.slots().collect::<Vec<_>>(), expected.collect::<Vec<_>>());
        }
        assert_eq!(CacheLine::of(&[Slot::verdict(Verdict::Host { rule: 1 << 11 }, false)], &[]), None);
        assert_eq!(CacheLine::of(&[Slot::UNMATCHED; 9], &[1, 2, 3, 4, 5, 6, 7, 8]), None);
        assert_eq!(CacheLine::of(&[], &[]), None);
    }

    proptest! {
        /// Lines give the slot of the range that a key is in, wherever they stand in the key.
        #[test]
        fn lines_divide_keys(
            lines in prop::collection::vec(prop::collection::btree_map(1..0x8000_u64, slot(), 0..8), 4),
            outer in slot(),
            skip in 0..=61_u32,
            key in any::<u64>(),
        ) {
            let mut words = std::vec![0; LINE_WORDS as usize];
            for line in &lines {
                let slots: Vec<_> = std::iter::once(outer).chain(line.values().copied()).collect();
                words.extend(CacheLine::of(&slots, &line.keys().copied().collect::<Vec<_>>()).unwrap().0);
            }
            let root = Slot::lines(skip, 2, LINE_WORDS, KeySelector::Same);
            let number = key << skip >> 62;
            let rest = key << skip << 2 >> 49;
            let expected = lines[usize::try_from(number).unwrap()].range(..=rest).next_back().map_or(outer, |it| *it.1);
            let found = descend(&Segments(words), root, Keys { key, low: 0, source: 0 });
            prop_assert_eq!(found, Some(expected));
        }

        /// A table that is damaged gives some verdict or none, but it is read within bounds and comes to an end.
        #[test]
        fn survives_damage(
            words in prop::collection::vec(any::<u64>(), 0..40),
            root in any::<u64>(),
            kind in prop::option::of(0..5_u64),
            high in any::<u64>(),
            port in any::<u16>(),
        ) {
            // A root of any kind, and near the words that there are.
            let root = kind.map_or(root, |kind| root & 0xff_ffff & !7 | kind);
            let (source, address) = (Address::v6(!high, 0), Address::v6(high, 0));
            lookup(&Segments(words), Slot(root), &Flow { source, address, transport: Transport::Udp, port });
        }
    }
}
