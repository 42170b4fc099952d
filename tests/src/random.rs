//! Random choices that can be repeated.

use std::{
    env,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::OnceLock,
    time::{SystemTime, UNIX_EPOCH},
};

/// The seed of this run: `ANYPORT_SEED` of the environment, else the clock's. The program that runs tests prints it.
pub fn seed() -> u64 {
    static SEED: OnceLock<u64> = OnceLock::new();
    *SEED.get_or_init(|| match env::var("ANYPORT_SEED") {
        Ok(seed) => seed.parse().expect("ANYPORT_SEED is a number"),
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970").as_secs(),
    })
}

/// A xorshift generator.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// The generator of this run for the user called `name`; each has its own sequence.
    pub fn new(name: &str) -> Self {
        let mixed = name
            .bytes()
            .fold(seed() ^ 0x9e37_79b9_7f4a_7c15, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
        Self(mixed | 1)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        let limit = u64::try_from(limit).expect("a limit of at most 64 bits");
        usize::try_from((self.next_u64() >> 16) % limit).expect("smaller than the limit")
    }

    /// One of `choices`.
    pub fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len())]
    }

    /// Any port from 1 to 65535.
    pub fn port(&mut self) -> u16 {
        u16::try_from(1 + self.below(65_535)).expect("at most 65535")
    }

    /// Any address of `prefix` (`ADDR/LEN`), neither the first nor the last one.
    pub fn address(&mut self, prefix: &str) -> IpAddr {
        let (base, length) = prefix.split_once('/').expect("ADDR/LEN");
        let length: u32 = length.parse().expect("a prefix length");
        match base.parse().expect("an address") {
            IpAddr::V4(base) => {
                let hosts = (1_u64 << (32 - length)) - 2;
                let host = u32::try_from(1 + self.next_u64() % hosts).expect("an IPv4 host number");
                Ipv4Addr::from_bits(base.to_bits() | host).into()
            }
            IpAddr::V6(base) => {
                let random = (u128::from(self.next_u64()) << 64) | u128::from(self.next_u64());
                let host = if length == 0 { random } else { random & ((1 << (128 - length)) - 1) };
                Ipv6Addr::from_bits(base.to_bits() | host.max(1)).into()
            }
        }
    }

    /// Puts `items` into a random order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}
