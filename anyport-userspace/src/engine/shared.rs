//! The engine, as those share it who command it and those who look.

use std::{
    ops::{Deref, DerefMut},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use tokio::{
    runtime::Handle,
    sync::{Mutex, MutexGuard, watch},
    task::{block_in_place, spawn_blocking},
    time::timeout,
};
use tracing::error;

use super::{
    Engine,
    snapshot::{Ask, SHARE, Snapshot},
    views::Sums,
};
use crate::api::{Problem, ProblemKind, ServiceView, StatusView};

/// How long those who look wait for a command that is under way, before what was known before it has to do.
const PATIENCE: Duration = Duration::from_millis(20);
/// Sums over so many rules are not computed on the control threads.
const MANY: usize = 2_000;
/// Sums are added up again after this at the latest.
const OLDEST: Duration = Duration::from_secs(5);

/// The engine, until the daemon stops.
pub type Shared = Arc<SharedEngine>;

/// The engine behind a lock, and what it shows beside it.
#[derive(Debug, Default)]
pub struct SharedEngine {
    engine: Mutex<Option<Engine>>,
    shown: RwLock<Option<Arc<Snapshot>>>,
    sums: watch::Sender<Option<Summed>>,
    /// Whether they are being added up.
    is_summing: Arc<AtomicBool>,
}

/// What all rules had counted at a moment.
#[derive(Clone, Debug)]
struct Summed {
    sums: Arc<Sums>,
    at: Instant,
    took: Duration,
}

/// Runs what may keep its thread busy for seconds, while another thread goes on with what this one had to do. Must be called within a
/// task of a runtime with several threads.
pub fn beside<T>(work: impl Future<Output = T>) -> T {
    block_in_place(|| Handle::current().block_on(work))
}

/// Says at the end that nobody adds up any more, also where that panicked.
struct End(Arc<AtomicBool>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.store(false, SeqCst);
    }
}

/// Adds up what all rules have counted, for this and the next questions.
fn add_up(snapshot: &Snapshot, tell: &watch::Sender<Option<Summed>>) -> Arc<Sums> {
    let begun = Instant::now();
    let sums = Arc::new(snapshot.sums());
    tell.send_replace(Some(Summed { sums: Arc::clone(&sums), at: Instant::now(), took: begun.elapsed() }));
    sums
}

impl SharedEngine {
    /// Waits for the engine, in the order of all commands.
    pub async fn lock(&self) -> Held<'_> {
        Held { engine: self.engine.lock().await, shared: self, is_changed: false }
    }

    /// What the engine showed last, at once.
    ///
    /// # Errors
    /// There is no engine.
    pub fn shown(&self) -> Result<Arc<Snapshot>, Problem> {
        self.latest().ok_or_else(Problem::stopping)
    }

    /// What the engine knows now, or what it showed last if it is busy.
    ///
    /// # Errors
    /// There is no engine, or the counters can't be read.
    pub async fn look(&self) -> Result<Arc<Snapshot>, Problem> {
        let Ok(engine) = timeout(PATIENCE, self.engine.lock()).await else { return self.shown() };
        let engine = engine.as_ref().ok_or_else(Problem::stopping)?;
        let snapshot = Arc::new(engine.snapshot(self.latest().as_deref(), Ask::IfOld)?);
        drop(self.show(Some(Arc::clone(&snapshot))));
        Ok(snapshot)
    }

    /// The state of the whole.
    ///
    /// # Errors
    /// As [`Self::look`].
    pub async fn status(&self) -> Result<StatusView, Problem> {
        let snapshot = self.look().await?;
        let sums = self.sums(&snapshot).await?;
        Ok(snapshot.status(&sums))
    }

    /// The services by name.
    ///
    /// # Errors
    /// As [`Self::look`].
    pub async fn services(&self) -> Result<Vec<ServiceView>, Problem> {
        let snapshot = self.look().await?;
        let sums = self.sums(&snapshot).await?;
        Ok(snapshot.services(&sums))
    }

    /// What all rules have counted. Of many rules it is read so rarely that this takes a twentieth of a CPU at most, and who asks does
    /// not wait for it where it is known from before.
    async fn sums(&self, snapshot: &Arc<Snapshot>) -> Result<Arc<Sums>, Problem> {
        if snapshot.rules.len() < MANY {
            return Ok(add_up(snapshot, &self.sums));
        }
        let mut latest = self.sums.subscribe();
        let known = latest.borrow_and_update().clone();
        if let Some(fresh) = known.as_ref().filter(|it| it.at.elapsed() < (it.took * SHARE).min(OLDEST)) {
            return Ok(Arc::clone(&fresh.sums));
        }
        if !self.is_summing.swap(true, SeqCst) {
            let (snapshot, tell, is_summing) = (Arc::clone(snapshot), self.sums.clone(), Arc::clone(&self.is_summing));
            spawn_blocking(move || {
                let _end = End(is_summing);
                add_up(&snapshot, &tell);
            });
        }
        let patience = if known.is_some() { PATIENCE } else { Duration::MAX };
        timeout(patience, latest.changed()).await.ok();
        let summed = latest.borrow().clone().or(known);
        let missing = || Problem::new(ProblemKind::Failed, "add up the counters: it failed");
        summed.map(|it| it.sums).ok_or_else(missing)
    }

    fn latest(&self) -> Option<Arc<Snapshot>> {
        self.shown.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Shows this from now on. Returns what was shown before.
    fn show(&self, snapshot: Option<Arc<Snapshot>>) -> Option<Arc<Snapshot>> {
        std::mem::replace(&mut *self.shown.write().unwrap_or_else(PoisonError::into_inner), snapshot)
    }
}

/// The engine, for as long as this is held. What was changed is shown afterwards.
#[derive(Debug)]
pub struct Held<'a> {
    engine: MutexGuard<'a, Option<Engine>>,
    shared: &'a SharedEngine,
    is_changed: bool,
}

impl Deref for Held<'_> {
    type Target = Option<Engine>;

    fn deref(&self) -> &Option<Engine> {
        &self.engine
    }
}

impl DerefMut for Held<'_> {
    fn deref_mut(&mut self) -> &mut Option<Engine> {
        self.is_changed = true;
        &mut self.engine
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if !self.is_changed {
            return;
        }
        let snapshot = self.engine.as_ref().map(|it| it.snapshot(self.shared.latest().as_deref(), Ask::Never));
        // A subscription that began while services changed may have been made for what was there before.
        if let Some(engine) = self.engine.as_ref() {
            engine.follow_events();
        }
        match snapshot.transpose() {
            Ok(snapshot) => {
                let before = self.shared.show(snapshot.map(Arc::new));
                if before.as_ref().is_some_and(|it| it.rules.len() >= MANY) {
                    // The last copy of many rules may go with it, for which no command is to wait.
                    spawn_blocking(move || drop(before));
                }
            }
            Err(error) => error!("show what has changed: {error:#}"),
        }
    }
}
