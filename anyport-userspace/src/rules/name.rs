//! The name of a service, and which names are valid.

use std::{fmt, str::FromStr};

use super::InvalidText;
use crate::as_text::as_text;

/// A service's name: a lower-case letter or digit, then up to 62 of those, dots, underscores and hyphens.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceName(String);

impl ServiceName {
    /// The service that rules steer to when they name none.
    pub fn default_service() -> Self {
        Self("default".into())
    }

    /// A name that no service can have. It sorts behind all others, so that of rules that are equally specific one of
    /// another service decides.
    #[cfg(feature = "daemon")]
    pub(crate) fn nobody() -> Self {
        Self("~".into())
    }

    /// Another one, for rules that are drained. Rules that are about to go come behind them.
    #[cfg(feature = "daemon")]
    pub(crate) fn drained() -> Self {
        Self("|".into())
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ServiceName {
    type Err = InvalidText;

    fn from_str(text: &str) -> Result<Self, InvalidText> {
        let is_plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let is_valid = text.len() <= 63
            && text.bytes().next().is_some_and(is_plain)
            && text.bytes().all(|b| is_plain(b) || b"._-".contains(&b));
        if is_valid {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidText(format!(
                "service name {text:?}: use a lower-case letter or digit, then up to 62 of those and . _ -"
            )))
        }
    }
}

as_text!(ServiceName, such as "default");

#[cfg(test)]
mod tests {
    use super::ServiceName;

    #[test]
    fn service_names_have_a_safe_alphabet() {
        for name in ["default", "a", "0-0", "edge.v4_x"] {
            assert!(name.parse::<ServiceName>().is_ok(), "{name}");
        }
        let long = "x".repeat(64);
        for name in ["", "Edge", "-a", ".a", "a b", "a\n", "ä", "a/b", &long] {
            assert!(name.parse::<ServiceName>().is_err(), "{name}");
        }
    }
}
