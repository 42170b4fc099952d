//! How many file descriptors clients may make the daemon hold.

use std::sync::Arc;

use anyhow::Context as _;
use nix::sys::resource::{Resource, getrlimit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// File descriptors for connections and reply sockets, one pool for all services of the process: however many
/// clients there are, descriptors are left for control.
#[derive(Clone, Debug)]
pub struct DescriptorPool(Arc<Semaphore>);

/// One descriptor out of the pool, given back when dropped.
#[derive(Debug)]
pub(super) struct Descriptor(#[expect(dead_code, reason = "held for its drop")] OwnedSemaphorePermit);

impl DescriptorPool {
    /// Three quarters of what the process may open by its soft limit now, so raise that before.
    pub fn of_process() -> anyhow::Result<Self> {
        let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).context("read the limit of open files")?;
        let soft = usize::try_from(soft).unwrap_or(usize::MAX);
        Ok(Self::new(soft / 4 * 3))
    }

    /// A pool of this many.
    pub fn new(size: usize) -> Self {
        Self(Arc::new(Semaphore::new(size.min(Semaphore::MAX_PERMITS))))
    }

    /// Takes a descriptor, if there is one.
    pub(super) fn try_take(&self) -> Option<Descriptor> {
        Arc::clone(&self.0).try_acquire_owned().ok().map(Descriptor)
    }

    /// Waits for a descriptor.
    pub(super) async fn take(&self) -> Descriptor {
        let permit = Arc::clone(&self.0).acquire_owned().await;
        Descriptor(permit.expect("the pool is never closed"))
    }
}
