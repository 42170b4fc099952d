//! The threads that serve connections.

use std::{fmt, num::NonZeroUsize, pin::pin, sync::Arc, thread::JoinHandle, time::Duration};

use anyhow::Context as _;
use tokio::{
    runtime::{Builder, Handle},
    sync::watch,
    time::interval,
};

use super::tcp::Connections;
use crate::privileges;

/// A timer that expires before all others has the runtime wake itself, by two system calls. Each connection's timer would
/// do so if this timer did not always expire before it.
const TICK: Duration = Duration::from_secs(1);

/// Threads with a runtime of their own each. What a worker accepts it serves itself: no connection is handed from thread
/// to thread, and no task is woken by another thread than its own. They end when this is dropped, and so do the
/// connections.
#[derive(Debug)]
pub struct Workers {
    handles: Arc<[Handle]>,
    /// Closed when the threads are to end.
    stop: Option<watch::Sender<()>>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts this many.
    ///
    /// # Errors
    /// The kernel refuses a thread, or a descriptor for its runtime.
    pub fn start(count: NonZeroUsize) -> anyhow::Result<Self> {
        let (stop, stopped) = watch::channel(());
        let mut workers = Self { handles: Arc::new([]), stop: Some(stop), threads: Vec::new() };
        let mut handles = Vec::new();
        for number in 0..count.get() {
            let runtime =
                Builder::new_current_thread().enable_all().build().context("start a runtime for connections")?;
            handles.push(runtime.handle().clone());
            let connections = Connections::new()?;
            let stopped = stopped.clone();
            let serve = move || runtime.block_on(work(connections, stopped));
            let thread = privileges::start_thread(format!("anyport-data-{number}"), privileges::for_data, serve);
            workers.threads.push(thread.context("start a thread that serves connections")?);
        }
        workers.handles = handles.into();
        Ok(workers)
    }

    /// By which tasks get to them.
    pub fn handles(&self) -> WorkerHandles {
        WorkerHandles(Arc::clone(&self.handles))
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop = None;
        for thread in self.threads.drain(..) {
            // A panic has been printed by then.
            thread.join().ok();
        }
    }
}

/// What the thread of a worker does beside the tasks that others spawn there.
async fn work(connections: Connections, mut stopped: watch::Receiver<()>) {
    let mut serving = pin!(connections.serve());
    let mut tick = interval(TICK);
    let mut departures = 0;
    loop {
        tokio::select! {
            end = &mut serving => {
                tracing::error!("connections can't be served any more: {end:?}");
                break;
            }
            _ = tick.tick() => Connections::tell_of_departures(&mut departures),
            // An error says that the sender is gone, which is what is waited for.
            _ = stopped.changed() => break,
        }
    }
}

/// The runtimes of all workers, at least one.
#[derive(Clone)]
pub struct WorkerHandles(Arc<[Handle]>);

impl WorkerHandles {
    /// How many there are.
    pub fn count(&self) -> NonZeroUsize {
        NonZeroUsize::new(self.0.len()).unwrap_or(NonZeroUsize::MIN)
    }

    /// Each of them, always in the same order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Handle> + Clone {
        self.0.iter()
    }

    /// One for what is not about a single socket.
    pub(crate) fn first(&self) -> &Handle {
        &self.0[0]
    }
}

impl fmt::Debug for WorkerHandles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WorkerHandles").field(&self.count()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, num::NonZeroUsize, thread};

    use tokio::sync::mpsc;

    use super::Workers;

    #[test]
    fn each_worker_is_a_thread_and_keeps_its_tasks() {
        let workers = Workers::start(NonZeroUsize::new(3).unwrap()).unwrap();
        let (sender, mut receiver) = mpsc::unbounded_channel();
        for handle in workers.handles().iter() {
            let sender = sender.clone();
            handle.spawn(async move {
                let here = thread::current().id();
                let there = tokio::spawn(async { thread::current().id() }).await.unwrap();
                assert_eq!(here, there);
                sender.send(here).unwrap();
            });
        }
        drop(sender);
        let mut threads = HashSet::new();
        while let Some(thread) = receiver.blocking_recv() {
            threads.insert(thread);
        }
        assert_eq!(threads.len(), 3);
    }

    #[test]
    fn tasks_end_with_their_worker() {
        let workers = Workers::start(NonZeroUsize::MIN).unwrap();
        let (sender, mut receiver) = mpsc::unbounded_channel::<()>();
        workers.handles().first().spawn(async move {
            let _sender = sender;
            std::future::pending::<()>().await;
        });
        drop(workers);
        assert_eq!(receiver.blocking_recv(), None);
    }
}
