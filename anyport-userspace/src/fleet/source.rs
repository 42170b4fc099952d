//! Where rule sets come from.

use std::{error::Error as StdError, fmt};

use super::layout::{Hash, Pointer, Report};

/// A pointer as it was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Which change of the source it was: etcd's revision.
    pub revision: i64,
    /// What it says.
    pub pointer: Pointer,
}

/// Why a source did not give what was asked for.
#[derive(Debug)]
pub enum Error {
    /// It does not answer, or not like one. All is asked again, from [`Source::pointer`] on.
    Away(anyhow::Error),
    /// It answers, and what it has makes no sense. To ask again makes none either, before that changes.
    Nonsense(anyhow::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Away(error) | Self::Nonsense(error)) = self;
        write!(f, "{error:#}")
    }
}

impl StdError for Error {}

/// What a node follows: the pointer of one ring, the sets that it leads to, and a place to report to.
///
/// Whoever asks sets the limits of time. A call that is given up leaves the source as it was before.
#[expect(async_fn_in_trait, reason = "an agent stays on its thread, so nothing has to be Send")]
pub trait Source {
    /// The ring's pointer as it is now, by a connection that is made anew where it has to be; nothing if there is none.
    async fn pointer(&mut self) -> Result<Option<Seen>, Error>;

    /// Waits until the pointer is another one than [`Self::pointer`] or this has told last, without missing the latest one;
    /// nothing if it is gone. Pointers between may be left out.
    async fn changed(&mut self) -> Result<Option<Seen>, Error>;

    /// The text of a set, which has this hash.
    async fn set(&mut self, hash: &Hash) -> Result<String, Error>;

    /// Puts a report at the node's place unless it stands there already, and has it stay for a while longer: for at least
    /// 20 seconds. It goes by itself when the node is gone.
    async fn report(&mut self, report: &Report) -> Result<(), Error>;
}
