//! Durations in settings, as people write them.

use std::{fmt, str::FromStr, time::Duration};

use crate::{as_text::as_text, rules::InvalidText};

const SHORTEST: Duration = Duration::from_millis(10);
const LONGEST: Duration = Duration::from_hours(366 * 24);

/// A time in a setting, such as `3s` or `5m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HumanDuration(pub Duration);

impl HumanDuration {
    /// So many seconds.
    pub const fn seconds(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }
}

impl FromStr for HumanDuration {
    type Err = InvalidText;

    fn from_str(text: &str) -> Result<Self, InvalidText> {
        let wrong = |why: String| InvalidText(format!("{text:?} is not a time such as 3s, 500ms or 5m: {why}"));
        let span = humantime::parse_duration(text).map_err(|error| wrong(error.to_string()))?;
        if span < SHORTEST || span > LONGEST {
            return Err(wrong("it must lie between 10ms and 1year".into()));
        }
        Ok(Self(span))
    }
}

as_text!(HumanDuration);

impl From<HumanDuration> for Duration {
    fn from(duration: HumanDuration) -> Self {
        duration.0
    }
}

impl fmt::Display for HumanDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without blanks, so that it is one word of a command line.
        f.write_str(&humantime::format_duration(self.0).to_string().replace(' ', ""))
    }
}
