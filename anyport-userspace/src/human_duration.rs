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
        let span = parse(text)?;
        if span < SHORTEST || span > LONGEST {
            return Err(wrong(text, &"it must lie between 10ms and 1year"));
        }
        Ok(Self(span))
    }
}

/// Reads a time of any length.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn parse(text: &str) -> Result<Duration, InvalidText> {
    humantime::parse_duration(text).map_err(|error| wrong(text, &error))
}

fn wrong(text: &str, why: &dyn fmt::Display) -> InvalidText {
    InvalidText(format!("{text:?} is not a time such as 3s, 500ms or 5m: {why}"))
}

as_text!(HumanDuration, such as "30s");

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
