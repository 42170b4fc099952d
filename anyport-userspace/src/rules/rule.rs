//! A rule: its prefix, what it does with which ports, and where it came from.

use std::{fmt, net::IpAddr, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{InvalidText, PortSet, Prefix, Protocol, ServiceName, special::expect_steerable};

/// Where a rule or a service came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "daemon", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// The configuration file.
    Config,
    /// The set that the fleet's ring has, see the section `[fleet]` of the configuration.
    Fleet,
    /// `anyportctl apply`.
    Applied,
    /// `anyportctl add-prefix` or `add-service`.
    #[default]
    Added,
    /// The daemon itself, which leaves an address of the host to the host, see the setting `own-addresses`.
    Host,
}

impl Origin {
    /// The origin as text.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::Fleet => "fleet",
            Self::Applied => "applied",
            Self::Added => "added",
            Self::Host => "host",
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The origins of a rule: it stays for as long as one of them holds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origins(u8);

impl Origins {
    const fn bit(origin: Origin) -> u8 {
        1 << origin as u8
    }

    /// Whether this is one of them.
    pub fn contains(self, origin: Origin) -> bool {
        self.0 & Self::bit(origin) != 0
    }

    /// With this one too.
    #[must_use]
    pub fn with(self, origin: Origin) -> Self {
        Self(self.0 | Self::bit(origin))
    }

    /// Without this one.
    #[must_use]
    pub fn without(self, origin: Origin) -> Self {
        Self(self.0 & !Self::bit(origin))
    }

    /// These and those.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether none is left.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The one that is shown: configuration before fleet before `apply` before what was added by hand.
    pub fn first(self) -> Origin {
        let all = [Origin::Config, Origin::Fleet, Origin::Applied, Origin::Added, Origin::Host];
        all.into_iter().find(|it| self.contains(*it)).unwrap_or_default()
    }
}

impl From<Origin> for Origins {
    fn from(origin: Origin) -> Self {
        Self(Self::bit(origin))
    }
}

/// What a rule says of a prefix. Many rules say the same, so they share it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RuleSpec {
    /// The transports.
    pub protocol: Protocol,
    /// The destination ports that are steered.
    pub ports: PortSet,
    /// The destination ports that are left to the host, also where `ports` has them.
    pub except: PortSet,
    /// The clients that the rule is about; all of them if there is none.
    pub source: Option<Prefix>,
    /// Which service receives what is steered.
    pub service: ServiceName,
    /// Whether anyport makes the prefix local.
    pub route: bool,
}

impl Default for RuleSpec {
    fn default() -> Self {
        Self {
            protocol: Protocol::default(),
            ports: PortSet::all(),
            except: PortSet::default(),
            source: None,
            service: ServiceName::default_service(),
            route: Self::default_route(),
        }
    }
}

/// Whether fewer than half of so many rules would be left, as after an empty file: more likely a mistake than not.
pub(crate) fn are_most_gone(before: usize, after: usize) -> bool {
    after * 2 < before
}

/// What a rule does with a port that it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target<'a> {
    Host,
    Service(&'a ServiceName),
}

impl RuleSpec {
    /// Whether anyport makes prefixes local where nothing is said of it.
    pub(crate) fn default_route() -> bool {
        true
    }

    /// The ports that the rule matches: those it steers and those it leaves to the host.
    pub fn matched_ports(&self) -> PortSet {
        self.ports.union(&self.except)
    }

    /// Checks what the types leave open.
    ///
    /// # Errors
    /// There is no port to steer, all of them are excepted, no packet can come for the prefix, or prefix and source are of different families.
    pub fn validate(&self, prefix: &Prefix) -> Result<(), InvalidText> {
        expect_steerable(prefix)?;
        if self.ports.is_empty() {
            return Err(InvalidText(format!(
                "{prefix}: there are no ports to steer; leave ports away for all of them"
            )));
        }
        if self.ports.is_subset(&self.except) {
            return Err(InvalidText(format!(
                "{prefix}: nothing would be steered, since except={} has all of the ports {}; leave one out of it",
                self.except, self.ports
            )));
        }
        match &self.source {
            Some(source) if source.is_ipv4() != prefix.is_ipv4() => Err(InvalidText(format!(
                "{prefix}: no client from {source} can come there; prefix and source must be of the same IP version"
            ))),
            _ => Ok(()),
        }
    }

    /// What leaves an address to the host.
    pub fn left_to_host() -> Self {
        Self { protocol: Protocol::Both, except: PortSet::all(), route: false, ..Self::default() }
    }

    /// Whether the rule steers this port, rather than to leave it to the host or to say nothing of it; nothing for the latter.
    pub fn steers(&self, port: u16) -> Option<bool> {
        self.target(port).map(|target| matches!(target, Target::Service(_)))
    }

    /// Whether the rule matches clients at this address.
    pub fn is_about(&self, source: IpAddr) -> bool {
        self.source.is_none_or(|it| it.contains(source))
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
}

impl fmt::Display for RuleSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ports {}", self.protocol, self.ports)?;
        if !self.except.is_empty() {
            write!(f, " except {}", self.except)?;
        }
        if let Some(source) = &self.source {
            write!(f, " from {source}")?;
        }
        write!(f, " -> {}", self.service)
    }
}

/// Steer the ports of a prefix to a service, and leave the excepted ones to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The destination addresses.
    pub prefix: Prefix,
    /// What becomes of them.
    pub terms: Arc<RuleSpec>,
    /// Where the rule comes from.
    pub origins: Origins,
}

impl Rule {
    /// Whether the two say the same of the same packets, whatever their origins are.
    pub fn says_the_same_as(&self, other: &Self) -> bool {
        self.prefix == other.prefix && self.terms == other.terms
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.prefix, self.terms)
    }
}
