//! Sets of prefixes, as large as they are wanted.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
};

use crate::random::Random;
use anyport::rules::Prefix;

/// Where prefixes of a family are taken from: what is free for documentation, and local where that is too narrow.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    /// Its family.
    pub is_ipv4: bool,
    /// The prefix around all.
    around: (u128, u8),
}

impl Space {
    /// 127.0.0.0/8, which every namespace has for its own.
    pub const V4: Self = Self { is_ipv4: true, around: (127 << 24, 8) };
    /// `2001:db8::/32`.
    pub const V6: Self = Self { is_ipv4: false, around: (0x2001_0db8 << 96, 32) };

    /// 240.0.0.0/4, where nobody is: for rules without traffic.
    pub const RESERVED: Self = Self { is_ipv4: true, around: (240 << 24, 4) };

    /// The length of the prefix around all.
    pub fn shortest(self) -> u8 {
        self.around.1
    }

    /// How people call the family.
    pub fn name(self) -> &'static str {
        if self.is_ipv4 { "IPv4" } else { "IPv6" }
    }

    /// The lengths of [`Self::mixed`].
    pub fn lengths(self) -> RangeInclusive<u8> {
        if self.is_ipv4 { 20..=32 } else { 40..=64 }
    }

    /// As many different prefixes, of all lengths alike as far as there are so many of them, in random order.
    pub fn mixed(self, count: usize, random: &mut Random) -> Vec<Prefix> {
        let lengths = self.lengths();
        distinct(count, || {
            let len = *lengths.start() + u8::try_from(random.below(lengths.len())).expect("a prefix length");
            self.random(len, random)
        })
    }

    /// As many different addresses as prefixes of their own, in random order.
    pub fn hosts(self, count: usize, random: &mut Random) -> Vec<Prefix> {
        let len = if self.is_ipv4 { 32 } else { 128 };
        distinct(count, || self.random(len, random))
    }

    /// A prefix of this length.
    fn random(self, len: u8, random: &mut Random) -> Prefix {
        let (first, around) = self.around;
        let bits: u8 = if self.is_ipv4 { 32 } else { 128 };
        Prefix::from_bits(self.is_ipv4, first | wide(random) & ones(bits - around), len)
    }
}

fn distinct(count: usize, mut next: impl FnMut() -> Prefix) -> Vec<Prefix> {
    let mut seen = HashSet::with_capacity(count);
    let mut prefixes = Vec::with_capacity(count);
    while prefixes.len() < count {
        let prefix = next();
        if seen.insert(prefix) {
            prefixes.push(prefix);
        }
    }
    prefixes
}

/// Any address of a prefix.
pub fn address(prefix: &Prefix, random: &mut Random) -> IpAddr {
    let (first, last) = prefix.bounds();
    let address = first | wide(random) & (first ^ last);
    if prefix.is_ipv4() {
        Ipv4Addr::from_bits(u32::try_from(address).expect("32 bits")).into()
    } else {
        Ipv6Addr::from_bits(address).into()
    }
}

fn wide(random: &mut Random) -> u128 {
    u128::from(random.next_u64()) << 64 | u128::from(random.next_u64())
}

fn ones(bits: u8) -> u128 {
    1_u128.checked_shl(bits.into()).map_or(u128::MAX, |it| it - 1)
}
