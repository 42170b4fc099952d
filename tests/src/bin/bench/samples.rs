//! What is measured of proxies side by side, and how they compare.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use anyport_tests::numbers::median;

use super::{micros, proxies::Proxy, traffic::CpuTime};

/// What was measured under one load, a value for each round.
#[derive(Debug, Default)]
pub(crate) struct Samples {
    /// Units in a second.
    pub(crate) rates: Vec<f64>,
    /// Microseconds of the proxy's threads for a unit.
    pub(crate) own: Vec<f64>,
    /// Microseconds of all processors for a unit, whatever for: clients, upstream and the kernel's work for packets included.
    pub(crate) system: Vec<f64>,
}

/// A proxy, and what was measured under each load.
#[derive(Debug)]
pub(crate) struct Subject<const LOADS: usize> {
    pub(crate) proxy: Proxy,
    pub(crate) samples: [Samples; LOADS],
}

impl<const LOADS: usize> Subject<LOADS> {
    pub(crate) fn new(proxy: Proxy) -> Self {
        Self { proxy, samples: std::array::from_fn(|_| Samples::default()) }
    }

    /// The median of what `which` picks, for each load.
    pub(crate) fn medians(&self, which: impl Fn(&Samples) -> &Vec<f64>) -> [f64; LOADS] {
        self.samples.each_ref().map(|samples| median(which(samples).iter().copied()))
    }

    /// For each load: the median of the rounds' ratios of units in a second to those of `other`, and of the system's time.
    pub(crate) fn ratios(&self, other: &Self) -> [[f64; 2]; LOADS] {
        let ratio = |own: &[f64], other: &[f64]| median(own.iter().zip(other).map(|(own, other)| own / other));
        std::array::from_fn(|load| {
            let (own, other) = (&self.samples[load], &other.samples[load]);
            [ratio(&own.rates, &other.rates), ratio(&own.system, &other.system)]
        })
    }
}

/// Processor time from now on.
#[derive(Debug)]
pub(crate) struct Meter {
    own: CpuTime,
    begin: Instant,
    idle: Idle,
}

impl Meter {
    /// Of a process, if there is one, and of the machine.
    pub(crate) fn start(process: Option<u32>) -> Result<Self> {
        Ok(Self { own: CpuTime::of(process)?, begin: Instant::now(), idle: Idle::now()? })
    }

    /// Adds what was used for so many units, of which there were `rate` in a second.
    pub(crate) fn stop(&self, samples: &mut Samples, rate: f64, units: f64) -> Result<()> {
        let (own, idle) = (self.own.used()?, Idle::now()?);
        let whole = self.begin.elapsed() * idle.processors;
        samples.rates.push(rate);
        samples.own.push(own / units);
        samples.system.push(micros(whole.saturating_sub(idle.time.saturating_sub(self.idle.time))) / units);
        Ok(())
    }
}

/// What the processors have not worked so far. The kernel measures that, where it takes samples of what they do else.
#[derive(Debug)]
struct Idle {
    processors: u32,
    time: Duration,
}

impl Idle {
    fn now() -> Result<Self> {
        /// Of a line of `/proc/stat` (`proc_stat(5)`): idle, waiting for disks, and taken by the hypervisor.
        const FIELDS: [usize; 3] = [4, 5, 8];
        /// In a second (`USER_HZ`).
        const TICKS: f64 = 100.0;
        let stat = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
        let all = stat.lines().next().context("/proc/stat is empty")?;
        let fields: Vec<&str> = all.split_whitespace().collect();
        let ticks: Option<f64> = FIELDS.iter().map(|at| fields.get(*at)?.parse::<f64>().ok()).sum();
        let time = Duration::from_secs_f64(ticks.with_context(|| format!("understand {all:?}"))? / TICKS);
        let processors = stat.lines().skip(1).take_while(|line| line.starts_with("cpu")).count();
        Ok(Self { processors: u32::try_from(processors)?, time })
    }
}
