//! The last hour, kept by the daemon so that a page that is opened shows what was before.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use super::sample::counts;
use crate::{api::ServiceCounts, engine::ObservedService, rules::ServiceName};

/// How often there is a point, at most.
pub(super) const PERIOD: Duration = Duration::from_secs(5);
/// After reading counters for a point there is a pause of so many times what it took. Nobody may ever look at the points, so this
/// is less of a CPU than samples may take that a client has asked for.
pub(super) const REST: u32 = 200;
/// An hour of points.
const POINTS: usize = 720;
/// How many services have points of their own.
const SERVICES: usize = 64;

/// A name, and how its values are found.
type Series = (&'static str, fn(&Moment) -> f64);
/// What is kept.
const SERIES: [Series; 11] = [
    ("active", |it| it.active),
    ("steered", |it| it.rates.steered),
    ("no_socket", |it| it.rates.no_socket),
    ("assign_error", |it| it.rates.assign_error),
    ("denied", |it| it.rates.denied),
    ("full_queues", |it| it.rates.full_queues),
    ("accepted", |it| it.rates.accepted),
    ("refused", |it| it.rates.refused),
    ("datagrams", |it| it.rates.datagrams),
    ("bytes_from_clients", |it| it.rates.bytes_from_clients),
    ("bytes_to_clients", |it| it.rates.bytes_to_clients),
];
/// Which of them are told of all services at once.
const OF_SERVICES: &str = "steered";

/// A service at a moment.
struct Moment {
    active: f64,
    rates: ServiceCounts<f64>,
}

/// A point: NaN, which JSON has as null, where a service was not there.
type Row = [f32; SERIES.len()];
const ABSENT: Row = [f32::NAN; SERIES.len()];

/// What was counted at the last point, or before the first one.
#[derive(Debug)]
struct Before {
    at: Instant,
    services: HashMap<ServiceName, ServiceCounts<u64>>,
}

/// Points of the last hour, of all and of each service.
#[derive(Debug, Default)]
pub(super) struct History {
    before: Option<Before>,
    /// When each point was, in seconds since 1970.
    times: VecDeque<f64>,
    totals: VecDeque<Row>,
    /// Each as long as `times`.
    services: BTreeMap<ServiceName, VecDeque<Row>>,
    /// Services without points of their own.
    omitted: usize,
}

/// What of it is asked for.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Query {
    /// Points after this time only.
    since: Option<f64>,
    /// Those of this service rather than of all.
    service: Option<String>,
}

/// What is told of it.
#[derive(Debug, Serialize)]
struct View<'a> {
    period: f64,
    times: Vec<f64>,
    series: BTreeMap<&'static str, Vec<f32>>,
    services: BTreeMap<&'a ServiceName, Vec<f32>>,
    services_omitted: usize,
}

impl History {
    /// Another point out of what was counted at a moment. The first time there are no rates yet.
    pub(super) fn record(&mut self, at: Instant, services: &[ObservedService]) {
        if self.before.as_ref().is_some_and(|before| at <= before.at) {
            return;
        }
        let now = services.iter().map(|it| (it.view.name.clone(), counts(it))).collect();
        if let Some(Before { at: then, services: before }) = self.before.replace(Before { at, services: now }) {
            let seconds = at.duration_since(then).as_secs_f64();
            let row = |it: &ObservedService| {
                let before = before.get(&it.view.name).copied().unwrap_or_default();
                row(it, &before, seconds)
            };
            // Those that have rules come first, since the others get nothing.
            let (used, unused): (Vec<_>, Vec<_>) = services.iter().partition(|it| it.view.rules > 0);
            let rows = used.into_iter().chain(unused).map(|it| (&it.view.name, row(it))).collect();
            let time = SystemTime::now() - at.elapsed();
            self.push(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64(), rows);
        }
    }

    fn push(&mut self, time: f64, rows: Vec<(&ServiceName, Row)>) {
        let sum = rows.iter().fold(Row::default(), |sum, (_, row)| std::array::from_fn(|at| sum[at] + row[at]));
        add(&mut self.totals, sum);
        let rows: HashMap<_, _> = self.make_room(rows).into_iter().collect();
        for name in rows.keys() {
            if !self.services.contains_key(*name) {
                let mut series = VecDeque::with_capacity(POINTS);
                series.resize(self.times.len(), ABSENT);
                self.services.insert((*name).clone(), series);
            }
        }
        for (name, series) in &mut self.services {
            add(series, rows.get(name).copied().unwrap_or(ABSENT));
        }
        add(&mut self.times, (time * 10.0).round() / 10.0);
        // One that has gone stays as long as it has a point.
        self.services.retain(|_, series| series.iter().rev().any(|row| !row[0].is_nan()));
    }

    /// The rows of services that have, or get, points of their own. Those that have gone make room for others.
    fn make_room<'a>(&mut self, rows: Vec<(&'a ServiceName, Row)>) -> Vec<(&'a ServiceName, Row)> {
        let (mut kept, others): (Vec<_>, Vec<_>) =
            rows.into_iter().partition(|(name, _)| self.services.contains_key(*name));
        let taken = others.len().min(SERVICES - kept.len());
        self.omitted = others.len() - taken;
        let mut surplus = (self.services.len() + taken).saturating_sub(SERVICES);
        self.services.retain(|name, _| {
            let goes = surplus > 0 && !kept.iter().any(|(kept, _)| *kept == name);
            surplus -= usize::from(goes);
            !goes
        });
        kept.extend(others.into_iter().take(taken));
        kept
    }

    /// It as JSON; nothing where there are no points of the service that is asked for.
    pub(super) fn json(&self, query: &Query) -> Option<serde_json::Result<String>> {
        let rows = match &query.service {
            Some(name) => self.services.iter().find(|(it, _)| it.as_str() == name)?.1,
            None => &self.totals,
        };
        let first = query.since.map_or(0, |since| self.times.partition_point(|time| *time <= since));
        let values = |rows: &VecDeque<Row>, at: usize| rows.iter().skip(first).map(|row| row[at]).collect();
        let all = (0..SERIES.len()).map(|at| (SERIES[at].0, values(rows, at)));
        let at = SERIES.iter().position(|(name, _)| *name == OF_SERVICES)?;
        let services = self.services.iter().filter(|_| query.service.is_none());
        Some(serde_json::to_string(&View {
            period: PERIOD.as_secs_f64(),
            times: self.times.iter().skip(first).copied().collect(),
            series: all.collect(),
            services: services.map(|(name, rows)| (name, values(rows, at))).collect(),
            services_omitted: self.omitted,
        }))
    }
}

fn row(service: &ObservedService, before: &ServiceCounts<u64>, seconds: f64) -> Row {
    #[expect(clippy::cast_precision_loss, reason = "there are never 2^53 connections")]
    let active = service.view.stats.active as f64;
    let moment = Moment { active, rates: counts(service).rates_since(before, seconds) };
    #[expect(clippy::cast_possible_truncation, reason = "seven digits are more than a chart shows")]
    SERIES.map(|(_, value)| ((value(&moment) * 100.0).round() / 100.0) as f32)
}

/// At the end; the first one goes where there are enough.
fn add<T>(points: &mut VecDeque<T>, point: T) {
    if points.capacity() < POINTS {
        points.reserve_exact(POINTS - points.len());
    }
    if points.len() == POINTS {
        points.pop_front();
    }
    points.push_back(point);
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::{History, POINTS, Query, Row, SERVICES};
    use crate::rules::ServiceName;

    fn row(steered: u16) -> Row {
        let mut row = Row::default();
        row[1] = steered.into();
        row
    }

    fn name(number: usize) -> ServiceName {
        format!("s{number}").parse().unwrap()
    }

    fn push(history: &mut History, time: u32, services: impl IntoIterator<Item = (usize, u16)>) {
        let names: Vec<_> = services.into_iter().map(|(number, steered)| (name(number), row(steered))).collect();
        history.push(time.into(), names.iter().map(|(name, row)| (name, *row)).collect());
    }

    fn json(history: &History, query: &str) -> Option<Value> {
        let query: Query = serde_urlencoded::from_str(query).unwrap();
        history.json(&query).map(|json| serde_json::from_str(&json.unwrap()).unwrap())
    }

    #[test]
    fn it_tells_of_all_and_of_each_service() {
        let mut history = History::default();
        push(&mut history, 5, [(1, 10)]);
        push(&mut history, 10, [(1, 20), (2, 7)]);
        push(&mut history, 15, [(2, 8)]);
        let all = json(&history, "").unwrap();
        assert_eq!(all["times"], serde_json::json!([5.0, 10.0, 15.0]));
        assert_eq!(all["series"]["steered"], serde_json::json!([10.0, 27.0, 8.0]));
        assert_eq!(all["services"]["s1"], serde_json::json!([10.0, 20.0, null]));
        assert_eq!(all["services"]["s2"], serde_json::json!([null, 7.0, 8.0]));
        let one = json(&history, "service=s2&since=5").unwrap();
        assert_eq!(one["times"], serde_json::json!([10.0, 15.0]));
        assert_eq!(one["series"]["steered"], serde_json::json!([7.0, 8.0]));
        assert_eq!(one["services"], serde_json::json!({}));
        assert!(json(&history, "service=s3").is_none());
    }

    /// What the documentation says of its memory.
    #[test]
    fn it_has_a_bound() {
        let mut history = History::default();
        for time in 0..2 * u32::try_from(POINTS).unwrap() {
            push(&mut history, time, (0..SERVICES + 3).map(|number| (number, 1)));
        }
        let all = json(&history, "").unwrap();
        assert_eq!((history.services.len(), all["services_omitted"].as_u64()), (SERVICES, Some(3)));
        assert_eq!(all["series"]["steered"][POINTS - 1], 67.0, "all are in the sum");
        let rows = history.services.values().chain([&history.totals]).map(std::collections::VecDeque::capacity);
        let bytes = rows.sum::<usize>() * size_of::<Row>() + history.times.capacity() * size_of::<f64>();
        let document = include_str!("../../../docs/metrics.md");
        assert!(document.contains(&format!("{bytes} bytes")), "docs/metrics.md has to say: {bytes} bytes");
        // One that has gone makes room, and others go with their last point.
        push(&mut history, 10_000, [(70, 5)]);
        assert!(history.services.len() == SERVICES && history.services.contains_key(&name(70)));
        for time in 0..u32::try_from(POINTS).unwrap() {
            push(&mut history, 20_000 + time, [(70, 5)]);
        }
        assert_eq!(history.services.keys().collect::<Vec<_>>(), [&name(70)]);
    }
}
