//! How many file descriptors clients may make the daemon hold.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use anyhow::Context as _;
use nix::sys::resource::{Resource, getrlimit};
use tokio::sync::Notify;

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
    /// How many wait for some to become free.
    waiting: AtomicUsize,
    freed: Notify,
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
        let free = AtomicUsize::new(size);
        Self(Arc::new(Shared { size, free, waiting: AtomicUsize::new(0), freed: Notify::new() }))
    }

    /// Whether clients have none of it.
    pub fn is_whole(&self) -> bool {
        self.0.free.load(SeqCst) == self.0.size
    }

    /// Takes so many descriptors, if there are.
    pub(super) fn try_take(&self, count: u32) -> Option<Descriptors> {
        let less = |free: usize| free.checked_sub(count as usize);
        self.0.free.fetch_update(SeqCst, SeqCst, less).ok()?;
        Some(Descriptors { pool: self.clone(), count })
    }

    /// Waits for so many descriptors.
    pub(super) async fn take(&self, count: u32) -> Descriptors {
        let _waiting = Waiting::at(&self.0);
        loop {
            let mut freed = pin!(self.0.freed.notified());
            // From here on nothing that is given back is missed.
            freed.as_mut().enable();
            if let Some(descriptors) = self.try_take(count) {
                return descriptors;
            }
            freed.await;
        }
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        let Shared { free, waiting, freed, .. } = &*self.pool.0;
        free.fetch_add(self.count as usize, SeqCst);
        // Whoever began to wait before this looks sees what was given back; who begins later finds it.
        if waiting.load(SeqCst) > 0 {
            freed.notify_waiters();
        }
    }
}

/// Counted as waiting until this is dropped.
struct Waiting<'a>(&'a Shared);

impl<'a> Waiting<'a> {
    fn at(shared: &'a Shared) -> Self {
        shared.waiting.fetch_add(1, SeqCst);
        Self(shared)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::DescriptorPool;

    #[test]
    fn gives_what_it_has() {
        let pool = DescriptorPool::new(3);
        let two = pool.try_take(2).unwrap();
        assert!(pool.try_take(2).is_none());
        let one = pool.try_take(1).unwrap();
        assert!(pool.try_take(1).is_none());
        drop(two);
        assert!(pool.try_take(3).is_none());
        drop(one);
        assert!(!pool.is_whole());
        assert!(pool.try_take(3).is_some());
        assert!(pool.is_whole());
    }

    #[tokio::test]
    async fn all_who_wait_get_theirs_in_the_end() {
        let pool = DescriptorPool::new(2);
        let held = [pool.try_take(1).unwrap(), pool.try_take(1).unwrap()];
        let waiting: Vec<_> = [2, 1, 2, 1]
            .into_iter()
            .map(|count| {
                let pool = pool.clone();
                tokio::spawn(async move { drop(pool.take(count).await) })
            })
            .collect();
        assert!(timeout(Duration::from_millis(20), pool.take(1)).await.is_err());
        drop(held);
        for task in waiting {
            task.await.unwrap();
        }
        assert!(pool.try_take(2).is_some());
    }
}
