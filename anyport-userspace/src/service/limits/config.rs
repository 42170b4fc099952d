//! Limits as the operator writes them.

use std::{fmt, num::NonZeroU32, str::FromStr, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{as_text::as_text, human_duration::HumanDuration, rules::InvalidText};

/// Limits on connections, and on flows of datagrams, which count as such.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Limits {
    /// How many may be open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<NonZeroU32>,
    /// How many may be open of one source. Without it there is a share, see the module.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_connections_per_source: Option<NonZeroU32>,
    /// How fast a source may open them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accept_rate_per_source: Option<Rate>,
}

/// So many in a period, such as `100/s` or `20/10s`. As many may come at once, and then again as time goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// How many.
    pub count: NonZeroU32,
    /// In this time.
    pub period: HumanDuration,
}

/// Periods that need no number.
const UNITS: [(&str, Duration); 3] =
    [("s", Duration::from_secs(1)), ("m", Duration::from_mins(1)), ("h", Duration::from_hours(1))];

impl FromStr for Rate {
    type Err = InvalidText;

    fn from_str(text: &str) -> Result<Self, InvalidText> {
        let wrong = |why: &str| InvalidText(format!("{text:?} is not a rate such as 100/s, 20/10s or 5/m: {why}"));
        let (count, period) = text.split_once('/').ok_or_else(|| wrong("there is no slash"))?;
        let count =
            count.parse().map_err(|_| wrong("the number before the slash must lie between 1 and 4294967295"))?;
        let unit = UNITS.iter().find(|(unit, _)| *unit == period).map(|(_, period)| Ok(HumanDuration(*period)));
        let period = unit.unwrap_or_else(|| period.parse()).map_err(|InvalidText(why)| wrong(&why))?;
        let rate = Self { count, period };
        if rate.interval().is_zero() {
            return Err(wrong("more than one in a nanosecond is no limit; leave it out"));
        }
        Ok(rate)
    }
}

impl Rate {
    /// The time for one.
    pub(super) fn interval(self) -> Duration {
        self.period.0 / self.count.get()
    }
}

as_text!(Rate, such as "100/s");

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { count, period } = self;
        match UNITS.iter().find(|(_, it)| *it == period.0) {
            Some((unit, _)) => write!(f, "{count}/{unit}"),
            None => write!(f, "{count}/{period}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Rate;
    use crate::as_text::expect_same_json;

    #[test]
    fn rates_are_read_and_written() {
        for (text, written) in
            [("100/s", "100/s"), ("5/1m", "5/m"), ("20/10s", "20/10s"), ("1/h", "1/h"), ("7/500ms", "7/500ms")]
        {
            assert_eq!(text.parse::<Rate>().unwrap().to_string(), written);
        }
        for (text, why) in [
            ("100", "no slash"),
            ("0/s", "before the slash"),
            ("x/s", "before the slash"),
            ("-1/s", "before the slash"),
            ("4294967296/s", "before the slash"),
            ("1/", "is not a time"),
            ("1/0s", "between 10ms and 1year"),
            ("4000000000/s", "no limit"),
        ] {
            let error = text.parse::<Rate>().unwrap_err().to_string();
            assert!(error.contains("is not a rate") && error.contains(why), "{text}: {error}");
        }
        expect_same_json::<Rate>(&["100/s", "20/10s", "5/m"]);
    }
}
