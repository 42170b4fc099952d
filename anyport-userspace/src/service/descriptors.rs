//! How many file descriptors clients may make the daemon hold.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use anyhow::Context as _;
use nix::sys::resource::{Resource, getrlimit};

/// File descriptors for connections and reply sockets, one pool for all services of the process: however many
/// clients there are, descriptors are left for control.
///
/// No lock: workers that have descriptors to spare meet at one number only.
#[derive(Clone, Debug)]
pub struct DescriptorPool(Arc<Shared>);

/// Aligned so that nothing else lies in the cache lines that the workers contend for.
#[derive(Debug)]
#[repr(align(128))]
struct Shared {
    size: usize,
    free: AtomicUsize,
}

/// Descriptors out of the pool, given back when dropped.
#[derive(Debug)]
pub(super) struct Descriptors {
    pool: DescriptorPool,
    count: u32,
}

impl DescriptorPool {
    /// Three quarters of what the process may open by its soft limit now, so raise that before.
    pub fn of_process() -> anyhow::Result<Self> {
        let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).context("read the limit of open files")?;
        let soft = usize::try_from(soft).unwrap_or(usize::MAX);
        Ok(Self::new(soft / 4 * 3))
    }

    /// A pool of this many.
    pub fn new(size: usize) -> Self {
        Self(Arc::new(Shared { size, free: AtomicUsize::new(size) }))
    }

    /// How many there are in all.
    pub fn size(&self) -> usize {
        self.0.size
    }

    /// How many there are to be had.
    pub fn free(&self) -> usize {
        self.0.free.load(Relaxed)
    }

    /// Whether clients have none of it.
    pub fn is_whole(&self) -> bool {
        self.free() == self.0.size
    }

    /// Takes so many descriptors, if there are.
    pub(super) fn try_take(&self, count: u32) -> Option<Descriptors> {
        let less = |free: usize| free.checked_sub(count as usize);
        self.0.free.fetch_update(Relaxed, Relaxed, less).ok()?;
        Some(Descriptors { pool: self.clone(), count })
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        self.pool.0.free.fetch_add(self.count as usize, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::DescriptorPool;

    #[test]
    fn gives_what_it_has() {
        let pool = DescriptorPool::new(3);
        let two = pool.try_take(2).unwrap();
        assert!(pool.try_take(2).is_none());
        let one = pool.try_take(1).unwrap();
        assert!(pool.try_take(1).is_none());
        drop(two);
        assert!(pool.try_take(3).is_none() && !pool.is_whole());
        drop(one);
        assert!(pool.is_whole());
        assert!(pool.try_take(3).is_some());
    }
}
