//! Samples as metrics.

use std::fmt;

use super::{
    families::FAMILIES,
    process::Numbers,
    sample::Sample,
    text::{Exposition, MetricType},
};
use crate::{
    api::{LivePrefix, ServiceView},
    engine::ObservedService,
    service::{ConnectionTimes, Distribution, UpstreamView},
};

/// A metric, by all that is known before there are values.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// What kind of number it is.
    pub kind: MetricType,
    /// The names of its labels; a histogram has `le` beside them.
    pub labels: &'static [&'static str],
    /// What it tells.
    pub help: &'static str,
}

/// A value.
#[derive(Clone, Copy, Debug)]
pub(super) enum Number {
    Whole(u64),
    Real(f64),
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole(number) => number.fmt(f),
            Self::Real(number) => number.fmt(f),
        }
    }
}

impl From<usize> for Number {
    fn from(number: usize) -> Self {
        Self::Whole(number as u64)
    }
}

impl From<bool> for Number {
    fn from(is_so: bool) -> Self {
        Self::Whole(is_so.into())
    }
}

/// What values are made of.
#[derive(Debug)]
pub(super) struct Source<'a> {
    pub(super) sample: &'a Sample,
    pub(super) process: Numbers,
}

/// A metric and how its values are found.
#[derive(Debug)]
pub(super) struct Family {
    pub(super) metric: Metric,
    pub(super) values: Values,
}

/// The values of all labels, and a number.
pub(super) type Labelled = (Vec<String>, Number);
/// Counts something of a service.
type OfService = fn(&ObservedService) -> u64;

/// How the values of a metric are found.
#[derive(Clone, Copy, Debug)]
pub(super) enum Values {
    /// One, if it is known.
    One(fn(&Source<'_>) -> Option<Number>),
    /// Whatever there is.
    Some(fn(&Sample) -> Vec<Labelled>),
    /// One for each service.
    Service(OfService),
    /// For each service one of each of these, whose name is the value of the second label.
    ServiceBy(&'static [(&'static str, OfService)]),
    /// A histogram for each service that accepts connections.
    Times(fn(&ConnectionTimes) -> &Distribution),
    /// One for each upstream.
    Upstream(fn(&UpstreamView) -> Option<u64>),
    /// One for each of the prefixes that are reported by name.
    Prefix(fn(&LivePrefix) -> u64),
}

/// All metrics there are.
pub fn all() -> impl Iterator<Item = &'static Metric> {
    FAMILIES.iter().map(|family| &family.metric)
}

/// All metrics as text.
pub(super) fn text(sample: &Sample) -> String {
    let source = Source { sample, process: Numbers::read() };
    let mut text = Exposition::default();
    for family in FAMILIES {
        let Metric { name, kind, help, .. } = family.metric;
        text.begin(name, kind, help);
        family.write(&source, &mut text);
    }
    text.finish()
}

impl Family {
    fn write(&self, source: &Source<'_>, text: &mut Exposition) {
        let Metric { name, labels, .. } = self.metric;
        let sample = source.sample;
        let services = &sample.observed.services;
        let mut put = |values: &[&str], number: Number| {
            debug_assert_eq!(labels.len(), values.len(), "{name}");
            text.sample(name, labels.iter().copied().zip(values.iter().copied()), &number);
        };
        match self.values {
            Values::One(value) => value(source).into_iter().for_each(|number| put(&[], number)),
            Values::Some(values) => {
                for (values, number) in values(sample) {
                    put(&values.iter().map(String::as_str).collect::<Vec<_>>(), number);
                }
            }
            Values::Service(value) => {
                for service in services {
                    put(&[service.view.name.as_str()], Number::Whole(value(service)));
                }
            }
            Values::ServiceBy(values) => {
                for service in services {
                    for (label, value) in values {
                        put(&[service.view.name.as_str(), label], Number::Whole(value(service)));
                    }
                }
            }
            Values::Times(times) => {
                for service in services {
                    write_histogram(name, service.view.name.as_str(), times(&service.times), text);
                }
            }
            Values::Upstream(value) => {
                for ServiceView { name, upstreams, .. } in services.iter().map(|it| &it.view) {
                    for upstream in upstreams {
                        if let Some(number) = value(upstream) {
                            put(&[name.as_str(), &upstream.address], Number::Whole(number));
                        }
                    }
                }
            }
            Values::Prefix(value) => {
                for row in &sample.busiest {
                    let labels = [&row.prefix, row.protocol.as_str(), row.service.as_str()];
                    put(&labels, Number::Whole(value(row)));
                }
            }
        }
    }
}

fn write_histogram(name: &str, service: &str, distribution: &Distribution, text: &mut Exposition) {
    let Distribution { buckets, count, sum } = distribution;
    if buckets.is_empty() {
        return;
    }
    let all = ("+Inf".to_owned(), *count);
    for (le, count) in buckets.iter().map(|(le, count)| (le.to_string(), *count)).chain([all]) {
        text.sample(&format!("{name}_bucket"), [("service", service), ("le", &le)].into_iter(), &count);
    }
    text.sample(&format!("{name}_sum"), [("service", service)].into_iter(), sum);
    text.sample(&format!("{name}_count"), [("service", service)].into_iter(), count);
}

#[cfg(test)]
mod tests {
    use super::{MetricType, all};

    #[test]
    fn names_are_as_prometheus_wants_them() {
        for metric in all() {
            let name = metric.name;
            assert!(name.starts_with("anyport_") || name.starts_with("process_"), "{name}");
            assert!(name.chars().all(|it| it.is_ascii_lowercase() || it == '_'), "{name}");
            assert_eq!(name.ends_with("_total"), metric.kind == MetricType::Counter, "{name}");
            assert!(metric.kind != MetricType::Histogram || name.ends_with("_seconds"), "{name}");
            assert!(
                !metric.help.is_empty() && !metric.help.contains(['\n', '|']) && !metric.help.ends_with('.'),
                "{name}"
            );
            assert!(!metric.labels.contains(&"le"), "{name}");
            assert_eq!(all().filter(|it| it.name == name).count(), 1, "{name}");
        }
    }

    /// The table in the documentation is this list.
    #[test]
    fn every_metric_is_documented() {
        let rows = all().map(|metric| {
            let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
            format!("| `{}` | {} | {} | {} |\n", metric.name, metric.kind.as_str(), labels.join(", "), metric.help)
        });
        let table: String = rows.collect();
        let document = include_str!("../../../docs/metrics.md");
        assert!(document.contains(&table), "docs/metrics.md has to have this table:\n{table}");
    }
}
