//! The answer to a command that changes the rules or services.

use serde::{Deserialize, Serialize};

/// Answer to a change.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Changed {
    /// The generation that the kernel holds now.
    pub generation: u64,
    /// How many rules or services were added or removed; 0 if all was so already.
    pub changed: usize,
    /// What the caller should know although it worked.
    pub notes: Vec<String>,
}
