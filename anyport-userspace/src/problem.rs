//! How a request ends: with a problem, or with a change.

use serde::{Deserialize, Serialize};

/// Why a request was not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProblemKind {
    /// The request makes no sense. Status 400, exit status 2.
    Invalid,
    /// The caller may not do this. Status 403, exit status 4.
    NotPermitted,
    /// What the request names is not there. Status 404, exit status 1.
    NotFound,
    /// The path is there, and does not take this method. Status 405, exit status 2.
    WrongMethod,
    /// The request contradicts what is there. Status 409, exit status 1.
    Conflict,
    /// The request is larger than requests may be. Status 413, exit status 2.
    TooLarge,
    /// It would do harm; the hint names the flag that overrides. Status 428, exit status 5.
    Unsafe,
    /// It is well enough to answer, and something does not work as it should. Exit status 6; never sent.
    Degraded,
    /// It was tried and did not work. Status 500, exit status 1.
    Failed,
    /// The daemon stops, and nothing was tried. Status 503, after which the client asks the next server.
    Stopping,
    /// No daemon answers. Exit status 3; never sent.
    NoDaemon,
}

impl ProblemKind {
    const SENT: [Self; 9] = [
        Self::Invalid,
        Self::NotPermitted,
        Self::NotFound,
        Self::WrongMethod,
        Self::Conflict,
        Self::TooLarge,
        Self::Unsafe,
        Self::Failed,
        Self::Stopping,
    ];

    /// The HTTP status that stands for it.
    pub fn http_status(self) -> u16 {
        match self {
            Self::Invalid => 400,
            Self::NotPermitted => 403,
            Self::NotFound => 404,
            Self::WrongMethod => 405,
            Self::Conflict => 409,
            Self::TooLarge => 413,
            Self::Unsafe => 428,
            Self::Failed | Self::NoDaemon | Self::Degraded => 500,
            Self::Stopping => 503,
        }
    }

    /// What a status stands for.
    pub fn from_http_status(status: u16) -> Self {
        Self::SENT.into_iter().find(|kind| kind.http_status() == status).unwrap_or(Self::Failed)
    }

    /// The exit status of `anyportctl`.
    pub fn exit_status(self) -> u8 {
        match self {
            Self::NotFound | Self::Conflict | Self::Failed => 1,
            Self::Invalid | Self::WrongMethod | Self::TooLarge => 2,
            Self::Stopping | Self::NoDaemon => 3,
            Self::NotPermitted => 4,
            Self::Unsafe => 5,
            Self::Degraded => 6,
        }
    }
}

/// An error as the API sends it and as `anyportctl --json` prints it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[cfg_attr(feature = "daemon", derive(schemars::JsonSchema))]
#[error("{error}")]
pub struct Problem {
    /// Decides about the status codes.
    #[serde(skip, default = "failed")]
    pub kind: ProblemKind,
    /// What was attempted and why it did not work.
    pub error: String,
    /// What to do next; left out where it is empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub hint: String,
}

fn failed() -> ProblemKind {
    ProblemKind::Failed
}

impl Problem {
    /// A problem without a hint.
    pub fn new(kind: ProblemKind, error: impl Into<String>) -> Self {
        Self { kind, error: error.into(), hint: String::new() }
    }

    /// The daemon ends, and a later one may carry the request out.
    #[cfg(feature = "daemon")]
    pub(crate) fn stopping() -> Self {
        Self::new(ProblemKind::Stopping, "anyportd is stopping").hint("try again when it runs again")
    }

    /// Adds what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }
}

#[cfg(feature = "daemon")]
impl From<anyhow::Error> for Problem {
    fn from(error: anyhow::Error) -> Self {
        Self::new(ProblemKind::Failed, format!("{error:#}"))
    }
}

/// Answer to a change.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "daemon", derive(schemars::JsonSchema))]
pub struct Changed {
    /// The generation that the kernel holds now.
    pub generation: u64,
    /// How many rules or services were added or removed; 0 if all was so already.
    pub changed: usize,
    /// What the caller should know although it worked.
    pub notes: Vec<String>,
}
