//! Changes of rules and services: who has made them, and what.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Who has made a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Author {
    /// A process at one of the daemon's sockets, as the kernel said when it connected.
    Process {
        /// Its user.
        uid: u32,
        /// Its number.
        pid: u32,
        /// What it calls itself, with every character seen; nothing if it had ended by then.
        program: Option<String>,
    },
    /// Anything else, in words.
    Other {
        /// Such as `SIGHUP`.
        origin: String,
    },
}

impl Author {
    /// One that is no process.
    pub fn other(origin: impl Into<String>) -> Self {
        Self::Other { origin: origin.into() }
    }
}

impl fmt::Display for Author {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { uid, pid, program: Some(program) } => write!(f, "uid {uid}, pid {pid} ({program})"),
            Self::Process { uid, pid, program: None } => write!(f, "uid {uid}, pid {pid}"),
            Self::Other { origin } => f.write_str(origin),
        }
    }
}

/// A change that was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ChangeView {
    /// When, by RFC 3339, in UTC.
    pub time: String,
    /// What was asked for, such as `add-prefix`.
    pub verb: String,
    /// Who has asked for it.
    pub by: Author,
    /// What has changed, in words.
    pub what: String,
    /// The generation that the kernel holds since.
    pub generation: u64,
}

impl fmt::Display for ChangeView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { time: _, verb, by, what, generation } = self;
        write!(f, "{verb} by {by}: {what} (generation {generation})")
    }
}
