//! How many connections and flows each source holds.

use std::{
    collections::{HashMap, hash_map::RandomState},
    hash::BuildHasher as _,
    iter,
    net::{IpAddr, Ipv4Addr},
    sync::{LazyLock, Mutex},
    time::Instant,
};

use super::{Rate, Refused};
use crate::{rules::to_address, service::lock};

/// So many parts with a lock each.
const SHARDS: usize = 64;
/// How many sources a part remembers for their rate alone, about.
const IDLE: usize = 1024;

/// Who is taken for one: an IPv4 address, or the /64 of an IPv6 address, out of which a host may choose as it likes. Any local
/// process may choose out of 127.0.0.0/8, so that is one source, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Source {
    V4(u32),
    V6(u64),
}

impl Source {
    /// Of an address, which is canonical.
    pub(super) fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) if address.is_loopback() => Self::V4(Ipv4Addr::LOCALHOST.to_bits()),
            IpAddr::V4(address) => Self::V4(address.to_bits()),
            IpAddr::V6(address) => Self::V6(to_address(address.into()).high),
        }
    }
}

/// Sources with open connections, and those that came lately where their rate is limited. Others are not stored: a source
/// that has none open and may come as it likes is forgotten, and when very many have come lately, the rates of some are reset.
#[derive(Debug)]
pub(super) struct Sources {
    shards: Box<[Mutex<Shard>]>,
    hasher: RandomState,
    pace: Option<Pace>,
}

/// A rate in nanoseconds.
#[derive(Clone, Copy, Debug)]
struct Pace {
    interval: u64,
    /// How far ahead of its time a source may be: what it may do at once, but for one.
    ahead: u64,
}

/// Aligned so that nothing else lies in the cache lines that workers contend for.
#[derive(Debug)]
#[repr(align(64))]
struct Shard {
    entries: HashMap<Source, Entry>,
    /// With so many entries it is looked for those to forget.
    tidy_at: usize,
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    open: usize,
    /// The moment at which it will have had no more than its rate allows: the theoretical arrival time of the generic cell rate
    /// algorithm (ITU-T I.371), which is a token bucket in one number.
    due: u64,
}

/// Nanoseconds on a clock that began with the process.
fn moment() -> u64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    u64::try_from(START.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

impl Sources {
    pub(super) fn new(rate: Option<Rate>) -> Self {
        let pace = rate.map(|rate| {
            let nanoseconds = |span: std::time::Duration| u64::try_from(span.as_nanos()).unwrap_or(u64::MAX);
            let interval = nanoseconds(rate.interval());
            Pace { interval, ahead: nanoseconds(rate.period.0) - interval }
        });
        let shard = || Mutex::new(Shard { entries: HashMap::new(), tidy_at: IDLE });
        Self { shards: iter::repeat_with(shard).take(SHARDS).collect(), hasher: RandomState::new(), pace }
    }

    /// One more of a source, if its rate and `decide` allow it, which is told how many are open.
    pub(super) fn enter<T>(
        &self,
        source: Source,
        decide: impl FnOnce(usize) -> Result<T, Refused>,
    ) -> Result<T, Refused> {
        self.enter_at(self.now(), source, decide)
    }

    /// One less.
    pub(super) fn leave(&self, source: Source) {
        self.leave_at(self.now(), source);
    }

    /// No clock is read where nothing depends on it.
    fn now(&self) -> u64 {
        self.pace.map_or(0, |_| moment())
    }

    fn shard(&self, source: Source) -> &Mutex<Shard> {
        // The last bits choose the place in the table.
        let shard = self.hasher.hash_one(source) >> 32;
        &self.shards[usize::try_from(shard).unwrap_or_default() % SHARDS]
    }

    fn enter_at<T>(
        &self,
        now: u64,
        source: Source,
        decide: impl FnOnce(usize) -> Result<T, Refused>,
    ) -> Result<T, Refused> {
        let mut shard = lock(self.shard(source));
        let known = shard.entries.get(&source).copied();
        let Entry { open, due } = known.unwrap_or_default();
        let mut next = 0;
        if let Some(Pace { interval, ahead }) = self.pace {
            if due > now.saturating_add(ahead) {
                return Err(Refused::Rate);
            }
            next = due.max(now).saturating_add(interval);
        }
        let decided = decide(open)?;
        if known.is_none() && shard.entries.len() >= shard.tidy_at {
            shard.tidy(now);
        }
        shard.entries.insert(source, Entry { open: open + 1, due: next });
        Ok(decided)
    }

    fn leave_at(&self, now: u64, source: Source) {
        let mut shard = lock(self.shard(source));
        let Some(entry) = shard.entries.get_mut(&source) else { return };
        entry.open = entry.open.saturating_sub(1);
        if entry.open == 0 && entry.due <= now {
            shard.entries.remove(&source);
        }
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).entries.len()).sum()
    }
}

impl Shard {
    /// Forgets sources without open connections: those that may come as they like, and all of them if most are left.
    fn tidy(&mut self, now: u64) {
        self.entries.retain(|_, entry| entry.open > 0 || entry.due > now);
        if self.entries.values().filter(|entry| entry.open == 0).count() > IDLE / 2 {
            self.entries.retain(|_, entry| entry.open > 0);
        }
        self.tidy_at = self.entries.len() + IDLE / 2;
    }
}

#[cfg(test)]
mod tests {
    use super::{IDLE, Refused, SHARDS, Source, Sources};

    const SECOND: u64 = 1_000_000_000;

    fn sources(rate: &str) -> Sources {
        Sources::new(Some(rate.parse().unwrap()))
    }

    /// How many of so many that come at one moment are let in, and go at once.
    fn let_in(sources: &Sources, now: u64, source: u32, attempts: usize) -> usize {
        let attempt = |_: &usize| {
            let entered = sources.enter_at(now, Source::V4(source), |_| Ok(()));
            assert!(matches!(entered, Ok(()) | Err(Refused::Rate)));
            if entered.is_ok() {
                sources.leave_at(now, Source::V4(source));
            }
            entered.is_ok()
        };
        (0..attempts).filter(attempt).count()
    }

    #[test]
    fn a_rate_allows_a_burst_and_then_its_measure() {
        let sources = sources("10/s");
        let start = 5 * SECOND;
        assert_eq!(let_in(&sources, start, 1, 100), 10);
        assert_eq!(let_in(&sources, start + SECOND / 10, 1, 100), 1);
        // Who is refused is none the worse for it.
        let tries = (11..=20).map(|hundredth| let_in(&sources, start + hundredth * SECOND / 100, 1, 5));
        assert_eq!(tries.sum::<usize>(), 1);
        assert_eq!(let_in(&sources, start + 100 * SECOND, 1, 100), 10);
        assert_eq!(let_in(&sources, start, 2, 100), 10, "others have their own measure");
    }

    #[test]
    fn who_may_come_as_he_likes_is_forgotten() {
        let sources = sources("10/s");
        assert_eq!(let_in(&sources, 0, 1, 5), 5);
        assert_eq!(sources.len(), 1, "the rate is remembered");
        sources.enter_at(SECOND, Source::V4(1), |_| Ok(())).unwrap();
        sources.leave_at(2 * SECOND, Source::V4(1));
        assert_eq!(sources.len(), 0);
        let unlimited = Sources::new(None);
        assert_eq!(unlimited.enter(Source::V6(1), Ok), Ok(0));
        assert_eq!(unlimited.enter(Source::V6(1), Ok), Ok(1));
        unlimited.leave(Source::V6(1));
        assert_eq!(unlimited.len(), 1);
        unlimited.leave(Source::V6(1));
        assert_eq!(unlimited.len(), 0);
    }

    #[test]
    fn any_number_of_sources_take_bounded_memory() {
        let sources = sources("1/h");
        sources.enter_at(0, Source::V6(7), |_| Ok(())).unwrap();
        for source in 0..1_000_000 {
            assert_eq!(let_in(&sources, u64::from(source), source, 1), 1);
        }
        assert!(sources.len() <= SHARDS * (IDLE + 1), "{}", sources.len());
        let held = sources.enter_at(2_000 * 3_600 * SECOND, Source::V6(7), Ok).unwrap();
        assert_eq!(held, 1, "what is open is never forgotten");
    }

    #[test]
    fn who_is_refused_leaves_no_trace() {
        let sources = sources("10/s");
        let refused = sources.enter_at(0, Source::V4(1), |_| Err::<(), _>(Refused::Source));
        assert_eq!((refused, sources.len()), (Err(Refused::Source), 0));
    }

    #[test]
    fn a_source_is_an_address_or_all_that_a_host_may_choose_of() {
        let of = |address: &str| Source::of(address.parse().unwrap());
        assert_ne!(of("198.51.100.1"), of("198.51.100.2"));
        assert_eq!(of("127.0.0.1"), of("127.255.0.7"));
        assert_eq!(of("2001:db8:0:1::1"), of("2001:db8:0:1:ffff::2"));
        assert_ne!(of("2001:db8:0:1::1"), of("2001:db8:0:2::1"));
    }
}
