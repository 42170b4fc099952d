//! Samples of all counters.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError, RwLock},
    time::{Duration, Instant},
};

use hyper::body::Bytes;
use nix::unistd::gethostname;
use tokio::{
    runtime::Handle,
    sync::Mutex,
    time::{sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;
use tracing::debug;

use super::{
    history::{self, History},
    ranking::{Counts, Ranked, Ranking},
};
use crate::{
    api::{LiveNode, LivePrefix, LiveService, LiveUpstream, LiveView, Problem, ProblemKind, ServiceCounts},
    engine::{Engine, Observed, ObservedService, Progress, Shared},
    rules::ServiceName,
};

/// For so long the text of a sample is the same for all who ask, so that many who do not read it keep few of them in memory.
const SHARED: Duration = Duration::from_millis(250);
/// A sample is good for so long.
const SHORTEST: Duration = Duration::from_millis(900);
/// And for so many times what it took, so that this part of a CPU is the most that samples take.
const REST: u32 = 20;
/// How long to wait for a command that is under way, before an older sample has to do.
const PATIENCE: Duration = Duration::from_millis(20);
/// And how long where there is none.
const LONGEST: Duration = Duration::from_secs(1);

/// How long control may be silent before it counts as stuck.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// To answer a question.
    pub(super) answer: Duration,
    /// For a step of a command that is under way.
    pub(super) step: Duration,
}

/// How it is without an engine.
const ABSENT: &str = "starting or stopping";

const LIMITS: Limits = Limits { answer: Duration::from_secs(2), step: Duration::from_mins(2) };

/// What all who watch share.
#[derive(Debug)]
pub struct Observer {
    engine: Shared,
    /// Where the threads of control work: what is asked of them passes through them.
    control: Handle,
    state: Mutex<State>,
    history: StdMutex<History>,
    limits: Limits,
    /// How far a long command is, once the engine has started.
    progress: RwLock<Option<Arc<Progress>>>,
    /// Since when control has not answered, and what it was doing then.
    stuck: RwLock<Option<(Instant, (String, u32))>>,
    /// How the keeper has started servers, and how many of them crashed.
    servers: Servers,
}

/// What the keeper has counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Servers {
    /// Servers that have begun, this one included.
    pub started: u64,
    /// Servers that ended by a failure.
    pub crashed: u64,
}

#[derive(Debug, Default)]
struct State {
    latest: Option<Arc<Sample>>,
    counts: Counts,
}

/// What was counted at a moment.
#[derive(Debug)]
pub struct Sample {
    pub(super) observed: Observed,
    pub(super) live: LiveView,
    /// The prefixes with most packets.
    pub(super) busiest: Vec<LivePrefix>,
    /// How many prefixes there are.
    pub(super) prefixes: usize,
    pub(super) servers: Servers,
    taken: Instant,
    /// How long it took.
    pub(super) took: Duration,
    /// What it was as metrics, and when: for all who ask within [`SHARED`].
    text: StdMutex<Option<(Instant, Bytes)>>,
}

impl Sample {
    /// It as metrics, by `make`.
    pub(super) fn text(&self, make: fn(&Self) -> String) -> Bytes {
        let mut text = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, text)) = text.as_ref().filter(|(at, _)| at.elapsed() < SHARED) {
            return text.clone();
        }
        text.insert((Instant::now(), make(self).into())).1.clone()
    }

    /// How old it is.
    pub(super) fn age(&self) -> Duration {
        self.taken.elapsed()
    }

    fn is_fresh(&self) -> bool {
        self.age() < SHORTEST.max(self.took * REST)
    }

    /// For those who watch what happens.
    pub fn live(&self) -> LiveView {
        LiveView { age: (self.age().as_secs_f64() * 1000.0).round() / 1000.0, ..self.live.clone() }
    }
}

impl Observer {
    /// Of this engine, as soon as it is there. Must be called within the runtime of control.
    pub fn new(engine: Shared, servers: Servers) -> Self {
        let (state, progress, stuck) = (Mutex::default(), RwLock::default(), RwLock::default());
        Self {
            engine,
            control: Handle::current(),
            state,
            history: StdMutex::default(),
            limits: LIMITS,
            progress,
            stuck,
            servers,
        }
    }

    /// As [`Self::sample`], taken by the threads of control: reading counters takes capabilities that others do not have.
    ///
    /// # Errors
    /// As there.
    pub async fn sample_by_control(self: &Arc<Self>) -> Result<Arc<Sample>, Problem> {
        let this = Arc::clone(self);
        // Nobody takes a sample for a client that is gone.
        let sampled = AbortOnDropHandle::new(self.control.spawn(async move { this.sample().await })).await;
        sampled.unwrap_or_else(|error| Err(Problem::new(ProblemKind::Failed, format!("take a sample: {error}"))))
    }

    /// The latest sample, or a new one if that is too old.
    ///
    /// # Errors
    /// There is no engine, or the counters can't be read.
    pub async fn sample(&self) -> Result<Arc<Sample>, Problem> {
        let mut state = self.state.lock().await;
        if let Some(latest) = state.latest.as_ref().filter(|it| it.is_fresh()) {
            return Ok(Arc::clone(latest));
        }
        let patience = if state.latest.is_some() { PATIENCE } else { LONGEST };
        let Ok(engine) = timeout(patience, self.engine.lock()).await else {
            let busy = || Problem::new(ProblemKind::Failed, "anyportd is busy with a command").hint("try again");
            return state.latest.clone().ok_or_else(busy);
        };
        let engine =
            engine.as_ref().ok_or_else(|| Problem::new(ProblemKind::Stopping, format!("anyportd is {ABSENT}")))?;
        let begun = Instant::now();
        let State { latest, counts } = &mut *state;
        let window = latest.as_ref().map(|latest| begun.duration_since(latest.taken).as_secs_f64());
        let mut ranking = Ranking::new(counts);
        let observed = engine.observe(|rule| ranking.see(rule))?;
        let ranked = ranking.finish(window);
        let prefixes = ranked.rows();
        let Ranked { busiest, fastest, counts: counted } = ranked;
        let live = view(&observed, latest.as_deref(), window, fastest, prefixes);
        let (servers, took) = (self.servers, begun.elapsed());
        let sample = Arc::new(Sample {
            observed,
            live,
            busiest,
            prefixes,
            servers,
            taken: begun,
            took,
            text: StdMutex::default(),
        });
        *state = State { latest: Some(Arc::clone(&sample)), counts: counted };
        Ok(sample)
    }

    /// Adds to the history for as long as this is polled.
    pub(super) async fn keep_history(self: &Arc<Self>) {
        let mut pause = history::PERIOD;
        loop {
            sleep(pause).await;
            let this = Arc::clone(self);
            let took = AbortOnDropHandle::new(self.control.spawn(async move { this.record().await })).await;
            pause = history::PERIOD.max(took.unwrap_or_default() * history::REST);
        }
    }

    /// Adds a point to the history, and says how long reading the counters took, where no client has just had them read. There is
    /// none while a command is under way.
    async fn record(&self) -> Duration {
        if let Some(latest) = self.state.lock().await.latest.as_ref().filter(|it| it.age() < history::PERIOD / 2) {
            self.history().record(latest.taken, &latest.observed.services);
            return Duration::ZERO;
        }
        let Ok(engine) = timeout(PATIENCE, self.engine.lock()).await else { return Duration::ZERO };
        let Some(engine) = engine.as_ref() else { return Duration::ZERO };
        let begun = Instant::now();
        match engine.observe(|_| {}) {
            Ok(observed) => self.history().record(begun, &observed.services),
            Err(problem) => debug!("add to the history: {problem}"),
        }
        begun.elapsed()
    }

    /// What was counted in the last hour.
    pub(super) fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether control is alive: what it does if it is, what is wrong if not. One that is busy with a command is alive as long as the
    /// command goes on.
    ///
    /// # Errors
    /// The threads of control do not run, or a command does not go on.
    pub(super) async fn alive(&self) -> Result<String, String> {
        self.alive_within(self.limits.step).await
    }

    /// As `alive`, where a step of a command may take so long.
    ///
    /// # Errors
    /// As there.
    pub async fn alive_within(&self, step: Duration) -> Result<String, String> {
        let Limits { answer, .. } = self.limits;
        if !matches!(timeout(answer, self.control.spawn(async {})).await, Ok(Ok(()))) {
            return Err(format!("the threads of control have not run for {answer:.0?}"));
        }
        if let Ok(engine) = timeout(answer, self.engine.lock()).await {
            *self.stuck.write().unwrap_or_else(PoisonError::into_inner) = None;
            let progress = engine.as_ref().map(Engine::progress);
            let is_there = progress.is_some();
            *self.progress.write().unwrap_or_else(PoisonError::into_inner) = progress;
            return Ok(if is_there { "ok" } else { ABSENT }.to_owned());
        }
        let progress = self.progress.read().unwrap_or_else(PoisonError::into_inner).as_ref().map(|it| it.view());
        let (doing, at) = progress.map_or_else(|| ("a command".to_owned(), 0), |it| (it.doing, it.step));
        let mut stuck = self.stuck.write().unwrap_or_else(PoisonError::into_inner);
        let now = (doing.clone(), at);
        let since = match &*stuck {
            Some((since, before)) if *before == now => *since,
            _ => stuck.insert((Instant::now(), now)).0,
        };
        let busy = format!("control has been busy for {:.0?} with: {doing}", since.elapsed() + answer);
        if since.elapsed() < step { Ok(busy) } else { Err(busy) }
    }
}

fn view(
    observed: &Observed,
    before: Option<&Sample>,
    window: Option<f64>,
    prefixes: Vec<LivePrefix>,
    all: usize,
) -> LiveView {
    let Observed { status, services, unready, .. } = observed;
    let before: HashMap<&ServiceName, ServiceCounts<u64>> =
        before.iter().flat_map(|it| &it.observed.services).map(|it| (&it.view.name, counts(it))).collect();
    LiveView {
        version: status.version.clone(),
        pid: status.pid,
        backend: status.backend,
        generation: status.generation,
        rules: status.rules,
        unready: unready.clone(),
        degraded: status.degraded.clone(),
        age: 0.0,
        window,
        services: services.iter().map(|it| service(it, before.get(&it.view.name), window)).collect(),
        prefixes_omitted: all - prefixes.len(),
        prefixes,
        node: LiveNode::new(host_name(), status),
    }
}

/// Nothing where it is not text.
pub(super) fn host_name() -> String {
    gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default()
}

fn service(observed: &ObservedService, before: Option<&ServiceCounts<u64>>, window: Option<f64>) -> LiveService {
    let view = &observed.view;
    let upstreams = view.upstreams.iter().map(|it| LiveUpstream {
        address: it.address.clone(),
        state: it.state,
        why: it.why.clone(),
        active: it.active,
        connections: it.connections,
        failures: it.failures,
    });
    let counts = counts(observed);
    LiveService {
        name: view.name.clone(),
        handler: view.handler,
        rules: view.rules,
        sockets: view.sockets.len(),
        active: view.stats.active,
        // One that was not there before began at zero.
        rates: window.map(|seconds| counts.rates_since(before.unwrap_or(&ServiceCounts::default()), seconds)),
        counts,
        upstreams: upstreams.collect(),
    }
}

pub(super) fn counts(ObservedService { view, counters, denied, .. }: &ObservedService) -> ServiceCounts<u64> {
    let stats = &view.stats;
    ServiceCounts {
        steered: view.steered,
        dropped: counters.no_socket + counters.assign_error + counters.denied,
        no_socket: counters.no_socket,
        assign_error: counters.assign_error,
        denied: counters.denied,
        full_queues: stats.listen_drops + stats.receive_drops,
        accepted: stats.accepted,
        refused: stats.refused() + denied,
        datagrams: stats.datagrams,
        bytes_from_clients: stats.bytes_from_clients,
        bytes_to_clients: stats.bytes_to_clients,
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use tokio::runtime::Builder;

    use super::{ABSENT, Limits, Observer, Servers, Shared};

    #[test]
    fn control_that_does_not_answer_is_busy_first_and_stuck_later() {
        let limits = Limits { answer: Duration::from_millis(10), step: Duration::from_millis(300) };
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let engine = Shared::default();
            let observer = Observer { limits, ..Observer::new(Arc::clone(&engine), Servers::default()) };
            assert_eq!(observer.alive().await.unwrap(), ABSENT);
            assert!(observer.sample().await.unwrap_err().error.contains("stopping"));
            let guard = engine.lock().await;
            assert!(observer.alive().await.unwrap().contains("busy"));
            tokio::time::sleep(limits.step).await;
            assert!(observer.alive().await.unwrap_err().contains("busy"));
            assert!(observer.sample().await.unwrap_err().error.contains("busy"));
            drop(guard);
            observer.alive().await.unwrap();
            let _guard = engine.lock().await;
            assert!(observer.alive().await.unwrap().contains("busy"), "it counts from then on");
        });
    }
}
