//! What to steer: prefixes, ports, rules and their order. Pure; knows nothing of the kernel.

mod decide;
mod ports;
mod prefix;
mod rule;
mod set;

pub use decide::{Decision, decide};
pub use ports::PortSet;
pub use prefix::Prefix;
pub use rule::{Origin, Protocol, Rule, ServiceName};
pub use set::{Conflict, RuleSet};

/// Text that is not what it should be: says what was read, what is wrong with it and what would be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidText(pub(crate) String);
