//! The text format of Prometheus, version 0.0.4.

use std::fmt::{Display, Write as _};

/// What kind of number a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricType {
    /// It rises until it is reset.
    Counter,
    /// It rises and falls.
    Gauge,
    /// Counts of what was no larger than each of some bounds.
    Histogram,
}

impl MetricType {
    /// As the format has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// A text in the making.
#[derive(Debug, Default)]
pub(super) struct Exposition(String);

impl Exposition {
    /// Begins a metric; all of its samples have to follow.
    pub(super) fn begin(&mut self, name: &str, kind: MetricType, help: &str) {
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        self.write(format_args!("# HELP {name} {help}\n# TYPE {name} {}\n", kind.as_str()));
    }

    /// A value of the metric that was begun last.
    pub(super) fn sample<'a>(
        &mut self,
        name: &str,
        labels: impl Iterator<Item = (&'a str, &'a str)>,
        value: &dyn Display,
    ) {
        self.0.push_str(name);
        let mut separator = '{';
        for (label, value) in labels {
            self.write(format_args!("{separator}{label}=\"{}\"", escaped(value)));
            separator = ',';
        }
        if separator == ',' {
            self.0.push('}');
        }
        self.write(format_args!(" {value}\n"));
    }

    pub(super) fn finish(self) -> String {
        self.0
    }

    fn write(&mut self, text: std::fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        self.0.write_fmt(text).ok();
    }
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::{Exposition, MetricType};

    #[test]
    fn what_would_break_the_format_is_escaped() {
        let mut text = Exposition::default();
        text.begin("a_total", MetricType::Counter, "counts \\ and\nmore");
        text.sample("a_total", [("one", "x\"y\\z\n"), ("two", "")].into_iter(), &u64::MAX);
        text.sample("a_total", [].into_iter(), &0.25);
        assert_eq!(
            text.finish(),
            "# HELP a_total counts \\\\ and\\nmore\n# TYPE a_total counter\n\
             a_total{one=\"x\\\"y\\\\z\\n\",two=\"\"} 18446744073709551615\na_total 0.25\n"
        );
    }
}
