//! What to steer: prefixes, ports, rules and their order. Pure; knows nothing of the kernel.

#[cfg(test)]
pub(crate) mod arbitrary;
mod decide;
pub mod file;
pub mod lines;
mod ports;
mod prefix;
mod rule;
mod set;
mod why;

pub use decide::{Decision, decide};
pub use ports::PortSet;
pub use prefix::{Prefix, from_address, to_address};
pub use rule::{Origin, Origins, Protocol, Rule, RuleText, ServiceName, Terms};
pub use set::{Change, Conflict, Draft, Held, Numbered, PrefixRules, RuleSet};
pub use why::{considered, why};

/// Text that is not what it should be: says what was read, what is wrong with it and what would be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidText(pub(crate) String);
