//! Sets of ports, as rules write them.

use std::{fmt, str::FromStr};

use super::InvalidText;
use crate::as_text::as_text;

/// A set of ports from 1 to 65535, stored as sorted ranges that neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortSet(Vec<(u16, u16)>);

impl PortSet {
    /// Every port, 1 to 65535.
    pub fn all() -> Self {
        Self(vec![(1, u16::MAX)])
    }

    /// The ranges, ascending, first and last port of each.
    pub fn ranges(&self) -> &[(u16, u16)] {
        &self.0
    }

    /// Whether there is no port in the set.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many ports there are.
    pub fn count(&self) -> u32 {
        self.0.iter().map(|(first, last)| u32::from(last - first) + 1).sum()
    }

    /// Whether the port is in the set.
    pub fn contains(&self, port: u16) -> bool {
        let after = self.0.partition_point(|(first, _)| *first <= port);
        after > 0 && port <= self.0[after - 1].1
    }

    /// Whether every port of this set is in the other.
    pub fn is_subset(&self, other: &Self) -> bool {
        self.0.iter().all(|(first, last)| {
            let after = other.0.partition_point(|(begin, _)| begin <= first);
            after > 0 && *last <= other.0[after - 1].1
        })
    }

    /// The ports in either set.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        Self::from_ranges(self.0.iter().chain(&other.0).copied().collect())
    }

    fn from_ranges(mut ranges: Vec<(u16, u16)>) -> Self {
        ranges.sort_unstable();
        let mut merged: Vec<(u16, u16)> = Vec::with_capacity(ranges.len());
        for (first, last) in ranges {
            match merged.last_mut() {
                Some(previous) if u32::from(first) <= u32::from(previous.1) + 1 => {
                    previous.1 = previous.1.max(last);
                }
                _ => merged.push((first, last)),
            }
        }
        Self(merged)
    }
}

impl fmt::Display for PortSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (first, last)) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            if first == last {
                write!(f, "{comma}{first}")?;
            } else {
                write!(f, "{comma}{first}-{last}")?;
            }
        }
        Ok(())
    }
}

impl FromStr for PortSet {
    type Err = InvalidText;

    /// Reads single ports, lists and ranges: `80,443,8000-8999`. An empty text is the empty set.
    fn from_str(text: &str) -> Result<Self, InvalidText> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        let invalid = |why: String| InvalidText(format!("ports {text:?}: {why}"));
        let port = |number: &str| match number.parse::<u16>() {
            Ok(port) if port > 0 && number.bytes().all(|b| b.is_ascii_digit()) => Ok(port),
            _ => Err(invalid(format!("{number:?} is not a port from 1 to 65535; write ports like 80,443,8000-8999"))),
        };
        let mut ranges = Vec::new();
        for part in text.split(',') {
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (port(first)?, port(last)?),
                None => (port(part)?, port(part)?),
            };
            if first > last {
                return Err(invalid(format!("the range {part} ends before it begins; did you mean {last}-{first}?")));
            }
            ranges.push((first, last));
        }
        Ok(Self::from_ranges(ranges))
    }
}

as_text!(PortSet, such as "80,443,8000-8999");

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::PortSet;

    #[test]
    fn merges_and_shows() {
        for (text, shown, count) in [
            ("", "", 0),
            ("80", "80", 1),
            ("1-65535", "1-65535", 65_535),
            ("443,80,80", "80,443", 2),
            ("1-9,10,11-20", "1-20", 20),
            ("65535,65534", "65534-65535", 2),
            ("5-9,1-7", "1-9", 9),
        ] {
            let ports: PortSet = text.parse().unwrap();
            assert_eq!((ports.to_string().as_str(), ports.count()), (shown, count));
        }
    }

    #[test]
    fn refuses_and_says_why() {
        for (text, why) in [
            ("0", "\"0\" is not a port"),
            ("65536", "\"65536\" is not a port"),
            ("111443", "not a port"),
            ("-1", "\"\" is not a port"),
            ("80,", "\"\" is not a port"),
            ("all", "\"all\" is not a port"),
            ("90-80", "did you mean 80-90?"),
            ("+80", "\"+80\" is not a port"),
            ("80 ", "\"80 \" is not a port"),
        ] {
            let error = text.parse::<PortSet>().unwrap_err().to_string();
            assert!(error.contains(why), "{text:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn holds_exactly_what_was_put_in(ranges in prop::collection::vec((1..=300u16, 1..=20u16), 0..8)) {
            let text: Vec<String> = ranges.iter().map(|(first, len)| format!("{first}-{}", first + len)).collect();
            let ports: PortSet = text.join(",").parse().unwrap();
            for port in 0..=400 {
                let expected = ranges.iter().any(|(first, len)| (*first..=first + len).contains(&port));
                prop_assert_eq!(ports.contains(port), expected);
            }
            let some: PortSet = text.iter().take(2).cloned().collect::<Vec<_>>().join(",").parse().unwrap();
            prop_assert!(some.is_subset(&ports) && PortSet::default().is_subset(&some));
            prop_assert_eq!(ports.is_subset(&some), (0..=400).all(|port| some.contains(port) || !ports.contains(port)));
            prop_assert_eq!(ports.to_string().parse::<PortSet>().unwrap(), ports);
        }
    }
}
