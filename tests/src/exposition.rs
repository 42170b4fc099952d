//! The text format of Prometheus, read back strictly.

use std::collections::BTreeMap;

/// Metrics by name, as they were at a moment.
#[derive(Clone, Debug, Default)]
pub struct Scrape {
    /// The type of each metric.
    types: BTreeMap<String, String>,
    /// The labels that each metric has, but for those that have none.
    labels: BTreeMap<String, Vec<String>>,
    /// Values by `name{label="value",…}`.
    values: BTreeMap<String, f64>,
}

impl Scrape {
    /// Reads a text and panics where it breaks the rules of the format.
    pub fn parse(text: &str) -> Self {
        assert!(text.ends_with('\n'), "the last line has to end");
        let mut scrape = Self::default();
        let mut current = String::new();
        for line in text.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, help) = help.split_once(' ').unwrap_or_else(|| panic!("no help in {line:?}"));
                assert!(!help.is_empty() && !scrape.types.contains_key(name), "{line:?}");
                name.clone_into(&mut current);
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').unwrap_or_else(|| panic!("no type in {line:?}"));
                assert!(name == current && ["counter", "gauge", "histogram"].contains(&kind), "{line:?}");
                scrape.types.insert(name.to_owned(), kind.to_owned());
            } else {
                scrape.add(line, &current);
            }
        }
        scrape.check_histograms();
        scrape
    }

    fn add(&mut self, line: &str, current: &str) {
        let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no value in {line:?}"));
        let name = series.split('{').next().expect("a name");
        let is_histogram = self.types.get(current).is_some_and(|kind| kind == "histogram");
        let base = name.strip_prefix(current);
        let is_part = if is_histogram { matches!(base, Some("_bucket" | "_sum" | "_count")) } else { base == Some("") };
        assert!(is_part && self.types.contains_key(current), "{line:?} stands below {current}");
        let labels = labels(&series[name.len()..]);
        let known = self.labels.entry(name.to_owned()).or_insert_with(|| labels.clone());
        assert_eq!(*known, labels, "{line:?}: other labels than before");
        let value: f64 = value.parse().unwrap_or_else(|_| panic!("no number in {line:?}"));
        let before = self.values.insert(series.to_owned(), value);
        assert!(before.is_none(), "{line:?} is there twice");
    }

    /// Buckets rise, and the last one has all.
    fn check_histograms(&self) {
        for (name, _) in self.types.iter().filter(|(_, kind)| *kind == "histogram") {
            let buckets = format!("{name}_bucket{{");
            let mut by_service: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
            for (series, count) in self.values.iter().filter(|(series, _)| series.starts_with(&buckets)) {
                let (labels, le) = series[buckets.len()..].split_once(",le=\"").expect("a bound");
                let bound = le.trim_end_matches("\"}").parse().expect("a bound");
                by_service.entry(labels).or_default().push((bound, *count));
            }
            for (labels, mut buckets) in by_service {
                buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
                assert!(buckets.is_sorted_by(|a, b| a.1 <= b.1), "{name} of {labels}: {buckets:?}");
                let count = self.get(&format!("{name}_count{{{labels}}}"));
                assert_eq!(buckets.last().map(|it| (it.0, Some(it.1))), Some((f64::INFINITY, count)), "{name}");
                assert!(self.get(&format!("{name}_sum{{{labels}}}")).is_some(), "{name}");
            }
        }
    }

    /// The value of a series, such as `up{job="x"}`.
    pub fn get(&self, series: &str) -> Option<f64> {
        self.values.get(series).copied()
    }

    /// Every series that has to rise for as long as it is there.
    pub fn rising(&self) -> impl Iterator<Item = (&str, f64)> {
        let series = self.values.iter().map(|(series, value)| (series.as_str(), *value));
        series.filter(|(series, _)| {
            let name = series.split('{').next().unwrap_or_default();
            let parts = [name].into_iter().chain(["_bucket", "_sum", "_count"].map(|it| name.trim_end_matches(it)));
            parts.filter_map(|it| self.types.get(it)).any(|kind| kind != "gauge")
        })
    }

    /// The names and types of all metrics.
    pub fn families(&self) -> impl Iterator<Item = (&str, &str)> {
        self.types.iter().map(|(name, kind)| (name.as_str(), kind.as_str()))
    }

    /// The names of all series, parts of histograms included.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.labels.keys().map(String::as_str)
    }

    /// The labels of the series of this name.
    pub fn labels(&self, name: &str) -> &[String] {
        self.labels.get(name).map(Vec::as_slice).unwrap_or_default()
    }

    /// All series with their values.
    pub fn series(&self) -> impl Iterator<Item = (&str, f64)> {
        self.values.iter().map(|(series, value)| (series.as_str(), *value))
    }
}

/// The names in `{name="value",…}`, whose values are well-formed.
fn labels(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    if text.is_empty() {
        return names;
    }
    let mut rest = text.strip_prefix('{').and_then(|it| it.strip_suffix('}')).unwrap_or_else(|| panic!("{text:?}"));
    loop {
        let (name, value) = rest.split_once("=\"").unwrap_or_else(|| panic!("{text:?}"));
        names.push(name.to_owned());
        let mut is_escaped = false;
        let end = value.find(|it| {
            let is_end = it == '"' && !is_escaped;
            assert!(!is_escaped || ['\\', '"', 'n'].contains(&it), "{text:?}");
            is_escaped = it == '\\' && !is_escaped;
            is_end
        });
        rest = &value[end.unwrap_or_else(|| panic!("{text:?}")) + 1..];
        match rest.strip_prefix(',') {
            Some(more) => rest = more,
            None => break,
        }
    }
    assert!(rest.is_empty(), "{text:?}");
    names
}
