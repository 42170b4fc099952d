//! How times are distributed, counted by one task and read by others.

use std::{
    ops::AddAssign,
    time::{Duration, Instant},
};

use super::counts::Count;

/// How many bounds each histogram has.
const BOUNDS: usize = 11;

type Bounds = [Duration; BOUNDS];

const fn bounds(millis: [u64; BOUNDS]) -> Bounds {
    let mut bounds = [Duration::ZERO; BOUNDS];
    let mut at = 0;
    while at < BOUNDS {
        bounds[at] = Duration::from_millis(millis[at]);
        at += 1;
    }
    bounds
}

/// For how long connections last: from a greeting to three hours.
const DURATIONS: Bounds = bounds([1, 5, 25, 100, 500, 2_500, 10_000, 60_000, 300_000, 1_800_000, 10_800_000]);
/// For how long connections wait. The kernel measures that in jiffies, of 1 to 10 ms.
const WAITS: Bounds = bounds([1, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 10_000]);

/// Times of connections of one listening socket.
#[derive(Debug)]
pub(super) struct Histogram {
    bounds: &'static Bounds,
    /// How many times were no longer than the bound, but longer than the previous bound.
    counts: [Count; BOUNDS],
    /// How many were longer than all bounds.
    longer: Count,
    /// In microseconds.
    sum: Count,
}

impl Histogram {
    fn new(bounds: &'static Bounds) -> Self {
        Self { bounds, counts: Default::default(), longer: Count::default(), sum: Count::default() }
    }

    /// Counts a time that stands for so many.
    pub(super) fn observe(&self, time: Duration, weight: u32) {
        let at = self.bounds.partition_point(|bound| *bound < time);
        self.counts.get(at).unwrap_or(&self.longer).add(weight.into());
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.sum.add(micros.saturating_mul(weight.into()));
    }
}

/// The histograms of one listening socket.
#[derive(Debug)]
pub(super) struct Times {
    /// From accepting to closing.
    pub(super) durations: Histogram,
    /// From the end of the handshake to accepting.
    pub(super) waits: Histogram,
}

impl Default for Times {
    fn default() -> Self {
        Self { durations: Histogram::new(&DURATIONS), waits: Histogram::new(&WAITS) }
    }
}

/// What a histogram has counted, over all sockets of a service.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Distribution {
    /// Each bound in seconds, and how many times were no longer.
    pub buckets: Vec<(f64, u64)>,
    /// How many there were.
    pub count: u64,
    /// Their sum in seconds.
    pub sum: f64,
}

impl Distribution {
    pub(super) fn of(histograms: &[&Histogram]) -> Self {
        let Some(first) = histograms.first() else { return Self::default() };
        let mut count = 0;
        let buckets = first.bounds.iter().enumerate().map(|(at, bound)| {
            count += histograms.iter().map(|it| it.counts[at].get()).sum::<u64>();
            (bound.as_secs_f64(), count)
        });
        let buckets = buckets.collect();
        count += histograms.iter().map(|it| it.longer.get()).sum::<u64>();
        let micros = histograms.iter().map(|it| it.sum.get()).fold(0, u64::saturating_add);
        Self { buckets, count, sum: Duration::from_micros(micros).as_secs_f64() }
    }
}

impl AddAssign<&Self> for Distribution {
    fn add_assign(&mut self, Self { buckets, count, sum }: &Self) {
        if self.buckets.is_empty() {
            self.buckets.clone_from(buckets);
        } else {
            self.buckets.iter_mut().zip(buckets).for_each(|((_, here), (_, more))| *here += more);
        }
        self.count += count;
        self.sum += sum;
    }
}

/// The times that connections of a service took.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ConnectionTimes {
    /// From accepting to closing.
    pub durations: Distribution,
    /// From the end of the handshake to accepting, by samples.
    pub waits: Distribution,
}

impl AddAssign<&Self> for ConnectionTimes {
    fn add_assign(&mut self, Self { durations, waits }: &Self) {
        self.durations += durations;
        self.waits += waits;
    }
}

/// Samples come no faster than twice this many in a second.
const SAMPLES: u32 = 100;
/// A sample never stands for more.
const FEWEST: u32 = 1024;

/// Chooses the connections of a listening socket about which the kernel is asked, which takes a system call: all of them where few
/// come, and one of `every` where many do. Which ones depends on their number and not on the time, since the first one of those that
/// are accepted together has always waited longest.
#[derive(Debug)]
pub(super) struct Sampler {
    every: u32,
    /// Connections since the last sample.
    passed: u32,
    last: Instant,
}

impl Sampler {
    pub(super) fn new() -> Self {
        Self { every: 1, passed: 0, last: Instant::now() }
    }

    /// How many connections the one that has come stands for, if it is to be asked about.
    pub(super) fn pick(&mut self, now: Instant) -> Option<u32> {
        const INTERVAL: Duration = Duration::from_millis(1000 / SAMPLES as u64);
        const LONGEST: Duration = Duration::from_secs(1);
        self.passed += 1;
        let interval = now.saturating_duration_since(self.last);
        if self.passed < self.every && interval < LONGEST {
            return None;
        }
        if interval < INTERVAL / 2 {
            self.every = (self.every * 2).min(FEWEST);
        } else if interval > INTERVAL {
            self.every = (self.every / 2).max(1);
        }
        self.last = now;
        Some(std::mem::take(&mut self.passed))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Distribution, FEWEST, Sampler, Times};

    #[test]
    fn times_fall_between_their_bounds() {
        let [one, other] = [Times::default(), Times::default()].map(|it| it.waits);
        for (millis, weight) in [(0, 1), (1, 2), (2, 4), (10_000, 8)] {
            one.observe(Duration::from_millis(millis), weight);
        }
        other.observe(Duration::from_hours(1), 16);
        let Distribution { buckets, count, sum } = Distribution::of(&[&one, &other]);
        assert_eq!(buckets[..2], [(0.001, 3), (0.005, 7)]);
        assert_eq!((buckets[10], count), ((10.0, 15), 31));
        assert!((sum - (0.002 + 0.008 + 80.0 + 57600.0)).abs() < 1e-6, "{sum}");
        assert_eq!(Distribution::of(&[]), Distribution::default());
    }

    #[test]
    fn samples_stand_for_all_and_come_no_faster_than_they_may() {
        let mut sampler = Sampler::new();
        let mut now = sampler.last;
        let mut run = |connections: u32, gap: Duration| {
            let (mut samples, mut weight) = (0_u32, 0_u32);
            for _ in 0..connections {
                now += gap;
                if let Some(stands_for) = sampler.pick(now) {
                    samples += 1;
                    weight += stands_for;
                }
            }
            (samples, weight, sampler.passed)
        };
        assert_eq!(run(100, Duration::from_millis(20)), (100, 100, 0), "each of the few");
        let (samples, weight, left) = run(1_000_000, Duration::from_micros(10));
        assert_eq!(weight + left, 1_000_000);
        assert!((500..2_200).contains(&samples), "{samples} in ten seconds");
        let (samples, ..) = run(60, Duration::from_secs(1));
        assert_eq!(samples, 60, "after a flood, too");
        assert!(run(100_000_000 / FEWEST, Duration::ZERO).0 < 200, "however many come at once");
    }
}
