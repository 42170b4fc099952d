use std::{cmp::Reverse, fmt, net::IpAddr, str::FromStr};

use anyport_common::flow::Transport;
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

use super::{InvalidText, PortSet, Prefix};

/// The transports that a rule speaks of.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP only.
    #[default]
    Tcp,
    /// UDP only.
    Udp,
    /// TCP and UDP.
    Both,
}

impl Protocol {
    /// The transports that this covers.
    pub fn transports(self) -> &'static [Transport] {
        match self {
            Self::Tcp => &[Transport::Tcp],
            Self::Udp => &[Transport::Udp],
            Self::Both => &Transport::ALL,
        }
    }

    /// Whether the two have a transport in common.
    pub fn overlaps(self, other: Self) -> bool {
        self == other || self == Self::Both || other == Self::Both
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Both => "both",
        })
    }
}

/// A service's name: a lower-case letter or digit, then up to 62 of those, dots, underscores and hyphens.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct ServiceName(String);

impl ServiceName {
    /// The service that rules steer to when they name none.
    pub fn default_service() -> Self {
        Self("default".into())
    }

    /// A name that no service can have. It sorts behind all others, so that of rules that are equally specific one of
    /// another service decides.
    pub(crate) fn nobody() -> Self {
        Self("~".into())
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

impl<'de> Deserialize<'de> for ServiceName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

/// Where a rule or a service came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// The configuration file.
    Config,
    /// `anyportctl add-prefix` or `add-service`.
    #[default]
    Added,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Config => "config",
            Self::Added => "added",
        })
    }
}

/// Steer the ports of a prefix to a service, and leave the excepted ones to the host.
///
/// This is also what stands under `[[rule]]` in the configuration, and in the state file.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// The destination addresses.
    pub prefix: Prefix,
    /// The transports.
    #[serde(default)]
    pub protocol: Protocol,
    /// The destination ports that are steered.
    #[serde(default = "PortSet::all")]
    pub ports: PortSet,
    /// The destination ports that are left to the host, also where `ports` has them.
    #[serde(default)]
    pub except: PortSet,
    /// Who receives what is steered.
    #[serde(default = "ServiceName::default_service")]
    pub service: ServiceName,
    /// Whether anyport makes the prefix local.
    #[serde(default = "yes")]
    pub route: bool,
    /// Where the rule came from.
    #[serde(skip)]
    pub origin: Origin,
}

fn yes() -> bool {
    true
}

/// What a rule does with a port that it has an opinion on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target<'a> {
    Host,
    Service(&'a ServiceName),
}

impl Rule {
    /// The ports that this rule has an opinion on: those it steers and those it leaves to the host.
    pub fn opinion(&self) -> PortSet {
        self.ports.union(&self.except)
    }

    /// Checks what the types leave open.
    ///
    /// # Errors
    /// There is no port to steer.
    pub fn validate(&self) -> Result<(), InvalidText> {
        if self.ports.is_empty() {
            return Err(InvalidText(format!(
                "{}: there are no ports to steer; leave ports away for all of them",
                self.prefix
            )));
        }
        Ok(())
    }

    /// Whether the two say the same of the same packets, wherever they came from.
    pub fn says_the_same_as(&self, other: &Self) -> bool {
        self.precedence() == other.precedence()
    }

    pub(super) fn target(&self, port: u16) -> Option<Target<'_>> {
        if self.except.contains(port) {
            Some(Target::Host)
        } else if self.ports.contains(port) {
            Some(Target::Service(&self.service))
        } else {
            None
        }
    }

    /// Sorts rules so that of those with an opinion on a packet the first one decides: longer prefixes first, and
    /// within a prefix those with fewer ports. What follows only makes the order total, so that it never depends
    /// on who came first.
    pub fn precedence(&self) -> impl Ord + use<'_> {
        let address = match self.prefix.address() {
            IpAddr::V4(address) => (4, u128::from(address.to_bits())),
            IpAddr::V6(address) => (6, address.to_bits()),
        };
        (
            address.0,
            Reverse(self.prefix.len()),
            address.1,
            self.opinion().count(),
            self.protocol,
            &self.ports,
            &self.except,
            &self.service,
        )
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ports {}", self.prefix, self.protocol, self.ports)?;
        if !self.except.is_empty() {
            write!(f, " except {}", self.except)?;
        }
        write!(f, " -> {}", self.service)
    }
}

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
