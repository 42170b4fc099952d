//! How many file descriptors clients may make the daemon hold.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
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
    size: AtomicUsize,
    used: AtomicUsize,
}

/// What is left for control, of a limit that is large enough: connections to the control socket, a message of 253 descriptors, files
/// that are read and written, tools that are started.
const RESERVE: usize = 384;

/// Descriptors out of the pool, given back when dropped.
#[derive(Debug)]
pub(super) struct Descriptors {
    pool: DescriptorPool,
    count: u32,
}

impl DescriptorPool {
    /// What the process may open by its soft limit now, so raise that before; less what it has open for itself, and a reserve.
    ///
    /// # Errors
    /// The kernel does not say what the limit is, or what is open.
    pub fn of_process() -> anyhow::Result<Self> {
        let pool = Self::new(0);
        pool.measure()?;
        Ok(pool)
    }

    /// A pool of this many.
    pub fn new(size: usize) -> Self {
        Self(Arc::new(Shared { size: AtomicUsize::new(size), used: AtomicUsize::new(0) }))
    }

    /// Measures again what the process needs for itself, which services have come or gone since the last time. Takes as long as it takes to list
    /// what is open.
    ///
    /// # Errors
    /// As [`Self::of_process`].
    pub fn measure(&self) -> anyhow::Result<()> {
        let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).context("read the limit of open files")?;
        let used = self.0.used.load(Relaxed);
        let open = fs::read_dir("/proc/self/fd").context("list the open files in /proc/self/fd")?.count();
        let size = budget(usize::try_from(soft).unwrap_or(usize::MAX), open.saturating_sub(used));
        self.0.size.store(size, Relaxed);
        Ok(())
    }

    /// How many there are in all.
    pub fn size(&self) -> usize {
        self.0.size.load(Relaxed)
    }

    /// How many there are to be had.
    pub fn free(&self) -> usize {
        self.size().saturating_sub(self.0.used.load(Relaxed))
    }

    /// Whether clients have none of it.
    pub fn is_whole(&self) -> bool {
        self.0.used.load(Relaxed) == 0
    }

    /// Takes so many descriptors, if there are.
    pub(super) fn try_take(&self, count: u32) -> Option<Descriptors> {
        let size = self.size();
        let more = |used: usize| used.checked_add(count as usize).filter(|used| *used <= size);
        self.0.used.fetch_update(Relaxed, Relaxed, more).ok()?;
        Some(Descriptors { pool: self.clone(), count })
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        self.pool.0.used.fetch_sub(self.count as usize, Relaxed);
    }
}

/// What clients may have of a limit, if the process needs so many for itself.
fn budget(limit: usize, own: usize) -> usize {
    limit.saturating_sub(own).saturating_sub(RESERVE.min(limit / 4))
}

#[cfg(test)]
mod tests {
    use super::{DescriptorPool, RESERVE, budget};

    #[test]
    fn clients_have_what_is_left() {
        assert_eq!(budget(1_048_576, 1_000), 1_047_576 - RESERVE);
        assert_eq!(budget(1024, 300), 1024 - 300 - 256);
        assert_eq!(budget(1024, 1000), 0);
        assert_eq!(budget(usize::MAX, 0), usize::MAX - RESERVE);
    }

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
