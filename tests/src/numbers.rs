//! Reckoning with measurements.

use std::time::Duration;

/// The sample below which `part` hundredths lie. Sorts the samples, of which there has to be one.
pub fn percentile(samples: &mut [Duration], part: usize) -> Duration {
    samples.sort();
    samples[(samples.len() * part / 100).min(samples.len() - 1)]
}

/// The middle one of the values.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A count as a number to reckon with, up to that of 32 bits.
pub fn count(number: usize) -> f64 {
    f64::from(u32::try_from(number).unwrap_or(u32::MAX))
}
