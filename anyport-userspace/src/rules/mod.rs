//! What to steer: prefixes, ports, rules and their order. Pure; knows nothing of the kernel.

#[cfg(feature = "daemon")]
mod decide;
#[cfg(feature = "daemon")]
pub mod lines;
mod name;
#[cfg(feature = "daemon")]
mod overlay;
#[cfg(feature = "daemon")]
mod ports;
#[cfg(feature = "daemon")]
mod precedence;
#[cfg(feature = "daemon")]
mod prefix;
mod protocol;
#[cfg(feature = "daemon")]
mod rule;
#[cfg(feature = "daemon")]
mod set;
#[cfg(feature = "daemon")]
mod shared_map;
#[cfg(feature = "daemon")]
mod sources;
#[cfg(feature = "daemon")]
pub mod special;
#[cfg(test)]
#[cfg(feature = "daemon")]
pub(crate) mod tests {
    pub(crate) mod arbitrary;
    pub(crate) mod fixtures;
}
#[cfg(feature = "daemon")]
mod text;
#[cfg(feature = "daemon")]
mod why;

#[cfg(feature = "daemon")]
pub use self::{
    decide::{Decision, decide},
    overlay::{Overlay, RuleView},
    ports::PortSet,
    prefix::{Prefix, from_address, to_address},
    rule::{Origin, Origins, Rule, RuleSpec},
    set::{Change, Conflict, Draft, PrefixRules, RuleEntry, RuleRef, RuleSet},
    sources::SourceLists,
    text::RuleText,
    why::{considered, why},
};
#[cfg(feature = "daemon")]
pub(crate) use self::{rule::are_most_gone, text::with_terms};
pub use name::ServiceName;
pub use protocol::{Family, Protocol};

/// Text that is not what it should be: says what was read, what is wrong with it and what would be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidText(pub(crate) String);
