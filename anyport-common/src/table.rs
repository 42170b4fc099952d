//! The lookup: from what a client dialled to the rule that decides.
//!
//! A generation is one region of 64-bit words in a flat array. It divides the address space of each family into
//! ranges, sorted by their first address, and the port space of each policy into ranges, sorted by their first
//! port; both begin at 0 and leave no gap. So each of the two steps is the same question, "which is the last
//! range that begins at or before this?", answered by a binary search.
//!
//! ```text
//! root + 0   generation number
//! root + 1   IPv4 ranges   (span)       range: first address << 32 | policy
//! root + 2   IPv6 ranges   (span)       range: three words: first address high, low; policy
//! policy + 0 TCP ports     (span)       port range: first port << 48 | service << 32 | rule
//! policy + 1 UDP ports     (span)
//! span       word offset from the root << 32 | number of ranges
//! ```
//!
//! A policy is an offset from the root, 0 for none. The program that reads a generation took its root once, so a
//! packet is judged by one generation whole.

use crate::flow::{Address, Flow, Transport, Version};

/// Words of a generation's header.
pub const HEADER_WORDS: u32 = 3;
/// Words of an IPv6 range.
pub const V6_RANGE_WORDS: u32 = 3;
/// In place of a service: the ports of this range are nobody's.
pub const SERVICE_NONE: u16 = 0xffff;
/// In place of a service: a rule leaves the ports of this range to the host.
pub const SERVICE_HOST: u16 = 0xfffe;

/// Searches of up to 2^19 ranges, which is as many as the table map has words.
const ADDRESS_STEPS: u32 = 20;
/// Searches of up to 2^16 ranges.
const PORT_STEPS: u32 = 17;

/// Where the words of a table are read from.
pub trait Store {
    /// The word at `index`, or nothing outside of the table.
    fn word(&self, index: u32) -> Option<u64>;
}

impl Store for [u64] {
    fn word(&self, index: u32) -> Option<u64> {
        self.get(usize::try_from(index).ok()?).copied()
    }
}

/// What the rules say about a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No rule has an opinion.
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
}

/// An offset and a count in one word.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// Words from the root.
    pub offset: u32,
    /// Number of ranges.
    pub count: u32,
}

impl Span {
    /// As it stands in the table.
    pub const fn to_word(self) -> u64 {
        (self.offset as u64) << 32 | self.count as u64
    }

    #[inline(always)]
    const fn from_word(word: u64) -> Self {
        Self { offset: high_half(word), count: low_half(word) }
    }
}

/// The word of an IPv4 range.
pub const fn v4_range(first: u32, policy: u32) -> u64 {
    (first as u64) << 32 | policy as u64
}

/// The word of a port range.
pub const fn port_range(first: u16, service: u16, rule: u32) -> u64 {
    (first as u64) << 48 | (service as u64) << 32 | rule as u64
}

/// Judges a flow by the generation at `root`. Nothing is returned only for a table that is damaged.
#[inline(always)]
pub fn lookup<S: Store + ?Sized>(store: &S, root: u32, flow: &Flow) -> Option<Verdict> {
    let policy = policy(store, root, flow.address)?;
    if policy == 0 {
        return Some(Verdict::Unmatched);
    }
    let transport = match flow.transport {
        Transport::Tcp => 0,
        Transport::Udp => 1,
    };
    let ports = Span::from_word(store.word(root.wrapping_add(policy).wrapping_add(transport))?);
    let first = root.wrapping_add(ports.offset);
    let range = last_at_or_before(ports.count, PORT_STEPS, |range| {
        Some(store.word(first.wrapping_add(range))? >> 48 <= u64::from(flow.port))
    })?;
    let word = store.word(first.wrapping_add(range))?;
    let rule = low_half(word);
    Some(match third_quarter(word) {
        SERVICE_NONE => Verdict::Unmatched,
        SERVICE_HOST => Verdict::Host { rule },
        service => Verdict::Steer { rule, service },
    })
}

/// Whether a rule of the generation at `root` has an opinion on any port of an address. Nothing is returned only for a
/// table that is damaged.
#[inline(always)]
pub fn covers<S: Store + ?Sized>(store: &S, root: u32, address: Address) -> Option<bool> {
    Some(policy(store, root, address)? != 0)
}

#[inline(always)]
fn policy<S: Store + ?Sized>(store: &S, root: u32, address: Address) -> Option<u32> {
    match address.version {
        Version::V4 => {
            let ranges = Span::from_word(store.word(root.wrapping_add(1))?);
            let first = root.wrapping_add(ranges.offset);
            let range = last_at_or_before(ranges.count, ADDRESS_STEPS, |range| {
                Some(store.word(first.wrapping_add(range))? >> 32 <= address.low)
            })?;
            Some(low_half(store.word(first.wrapping_add(range))?))
        }
        Version::V6 => {
            let ranges = Span::from_word(store.word(root.wrapping_add(2))?);
            let first = root.wrapping_add(ranges.offset);
            let at = |range: u32| first.wrapping_add(range.wrapping_mul(V6_RANGE_WORDS));
            let range = last_at_or_before(ranges.count, ADDRESS_STEPS, |range| {
                let first_high = store.word(at(range))?;
                Some(if first_high == address.high {
                    store.word(at(range).wrapping_add(1))? <= address.low
                } else {
                    first_high < address.high
                })
            })?;
            Some(low_half(store.word(at(range).wrapping_add(2))?))
        }
    }
}

/// Finds the last of `count` sorted ranges for which `begins_by` holds, given that it holds for the first.
/// `steps` bounds the loop for the verifier.
#[inline(always)]
fn last_at_or_before(count: u32, steps: u32, begins_by: impl Fn(u32) -> Option<bool>) -> Option<u32> {
    let mut range = 0;
    let mut left = count;
    for _ in 0..steps {
        if left <= 1 {
            break;
        }
        let half = left / 2;
        if begins_by(range + half)? {
            range += half;
            left -= half;
        } else {
            left = half;
        }
    }
    Some(range)
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "these 16 bits are what is asked for")]
const fn third_quarter(word: u64) -> u16 {
    (word >> 32) as u16
}

#[inline(always)]
const fn high_half(word: u64) -> u32 {
    (word >> 32) as u32
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

    use super::{SERVICE_HOST, SERVICE_NONE, Span, Verdict, covers, lookup, port_range, v4_range};
    use crate::flow::{Address, Flow, Transport};

    /// A table with nothing but 192.0.2.0/24, TCP, ports 80 to 90 steered and 85 left to the host, at word 5.
    fn table() -> Vec<u64> {
        let root = [
            1,
            Span { offset: 3, count: 3 }.to_word(),
            Span { offset: 13, count: 1 }.to_word(),
            v4_range(0, 0),
            v4_range(0xc000_0200, 6),
            v4_range(0xc000_0300, 0),
            Span { offset: 8, count: 5 }.to_word(),
            Span { offset: 8, count: 1 }.to_word(),
            port_range(0, SERVICE_NONE, 0),
            port_range(80, 3, 9),
            port_range(85, SERVICE_HOST, 9),
            port_range(86, 3, 9),
            port_range(91, SERVICE_NONE, 0),
            0,
            0,
            0,
        ];
        [0; 5].into_iter().chain(root).collect()
    }

    fn judge(words: &[u64], address: Address, transport: Transport, port: u16) -> Option<Verdict> {
        lookup(words, 5, &Flow { address, transport, port })
    }

    #[test]
    fn finds_ranges_and_their_edges() {
        let table = table();
        let steer = Verdict::Steer { rule: 9, service: 3 };
        let host = Verdict::Host { rule: 9 };
        for (address, port, expected) in [
            (0xc000_01ff, 80, Verdict::Unmatched),
            (0xc000_0200, 80, steer),
            (0xc000_02ff, 80, steer),
            (0xc000_0300, 80, Verdict::Unmatched),
            (0xc000_0207, 0, Verdict::Unmatched),
            (0xc000_0207, 79, Verdict::Unmatched),
            (0xc000_0207, 84, steer),
            (0xc000_0207, 85, host),
            (0xc000_0207, 90, steer),
            (0xc000_0207, 91, Verdict::Unmatched),
            (0xc000_0207, 65_535, Verdict::Unmatched),
        ] {
            let verdict = judge(&table, Address::v4(address), Transport::Tcp, port);
            assert_eq!(verdict, Some(expected), "{address:x}:{port}");
            let is_covered = (0xc000_0200..0xc000_0300).contains(&address);
            assert_eq!(covers(table.as_slice(), 5, Address::v4(address)), Some(is_covered), "{address:x}");
        }
        let udp = judge(&table, Address::v4(0xc000_0200), Transport::Udp, 80);
        assert_eq!(udp, Some(Verdict::Unmatched));
        let v6 = judge(&table, Address::v6(u64::MAX, u64::MAX), Transport::Tcp, 80);
        assert_eq!(v6, Some(Verdict::Unmatched));
    }

    proptest! {
        /// A table that is damaged gives some verdict or none, but it is read within bounds and comes to an end.
        #[test]
        fn survives_damage(
            words in prop::collection::vec(any::<u64>(), 0..40),
            root in any::<u32>(),
            address in any::<u32>(),
            high in any::<u64>(),
            port in any::<u16>(),
        ) {
            for root in [0, root] {
                for address in [Address::v4(address), Address::v6(high, 0)] {
                    lookup(words.as_slice(), root, &Flow { address, transport: Transport::Udp, port });
                }
            }
        }
    }
}
