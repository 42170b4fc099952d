//! Where rule sets come from.

use std::{error::Error as StdError, fmt};

use super::{
    delta::Delta,
    layout::{Hash, Pointer, Seen},
    report::Report,
};

/// Why a source did not give what was asked for.
#[derive(Debug)]
pub enum Error {
    /// It does not answer, or does not let us in. All is asked again, from [`Source::pointer`] on.
    Away(anyhow::Error),
    /// It answers, and what it has makes no sense.
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
/// The caller sets the limits of time: it may drop each call before it ends.
#[expect(async_fn_in_trait, reason = "an agent stays on its thread, so nothing has to be Send")]
pub trait Source {
    /// The ring's pointer as it is now; nothing if there is none.
    async fn pointer(&mut self) -> Result<Option<Seen<Pointer>>, Error>;

    /// Waits until the pointer is another one than [`Self::pointer`] or this has returned last, without missing the latest
    /// one; nothing if it is gone. Pointers between may be left out.
    async fn changed(&mut self) -> Result<Option<Seen<Pointer>>, Error>;

    /// The text of a set.
    async fn set(&mut self, hash: &Hash) -> Result<String, Error>;

    /// What makes one set out of another; nothing if there is no such thing.
    async fn delta(&mut self, from: &Hash, to: &Hash) -> Result<Option<Delta>, Error>;

    /// Has a report stand at the node's place soon, for as long as the node is there.
    fn report(&mut self, report: &Report);
}
