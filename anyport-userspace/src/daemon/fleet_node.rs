//! A daemon as a node of a fleet: a thread that communicates with etcd, and may do nothing else.

use std::{future::pending, sync::Arc, thread::JoinHandle, time::Duration};

use anyhow::Context as _;
use tokio::{
    runtime::{Builder, Handle},
    sync::watch,
    task::block_in_place,
};
use tracing::error;

use crate::{
    api::{Problem, ProblemKind},
    config::Fleet,
    engine::{Shared, beside},
    fleet::{
        Condition, FleetBoard, LineEdits,
        agent::{Agent, Identity, Target},
        delta::Delta,
        etcd::Etcd,
        layout::{Hash, Name, Pointer, Seen},
        report::Report,
        settings::ConnectionSettings,
        signing::NodeKey,
        source::{Error, Source},
        watch::EtcdSource,
    },
    privileges,
    store::FleetState,
};

/// How long each request to etcd is tried before etcd counts as away.
const PATIENCE: Duration = Duration::from_secs(5);

/// Belongs to its fleet until this is dropped.
#[derive(Debug)]
pub struct Node {
    /// Closed when the thread is to end.
    stop: Option<watch::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Node {
    /// Begins to follow the ring. Changes are carried out by the caller's runtime, in the daemon's order of commands.
    ///
    /// # Errors
    /// No thread can be started; or the engine is gone, or not of this fleet.
    pub async fn start(fleet: &Fleet, engine: Shared) -> anyhow::Result<Self> {
        let begun = engine.lock().await.as_ref().and_then(|it| Some((it.fleet_board()?, it.fleet_state().clone())));
        let (board, state) = begun.context("join the fleet: there is no engine")?;
        let agent = agent(fleet, Daemon { control: Handle::current(), engine }, board, state)?;
        let (stop, mut stopped) = watch::channel(());
        let work = move || {
            // Made here: where it is dropped, tokio takes no blocking, as there is in async code.
            let runtime = match Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return error!("stay out of the fleet: start a runtime: {error}"),
            };
            runtime.block_on(async {
                tokio::select! {
                    never = agent.run() => match never {},
                    // An error says that the sender is gone, which is what is waited for.
                    _ = stopped.changed() => {}
                }
            });
            // A name may be looked up at this moment, which nobody has to wait for.
            runtime.shutdown_background();
        };
        let thread = privileges::start_thread("anyport-fleet", privileges::for_others, work);
        Ok(Self { stop: Some(stop), thread: Some(thread.context("start a thread for the fleet")?) })
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop = None;
        // A panic has been printed by then.
        self.thread.take().map(JoinHandle::join);
    }
}

/// Who follows the ring that is configured, for a target that stands where `state` says.
///
/// # Errors
/// There is no key for its reports, since the kernel gives no randomness.
pub fn agent<T: Target>(
    fleet: &Fleet,
    target: T,
    board: Arc<FleetBoard>,
    state: FleetState,
) -> anyhow::Result<Agent<impl Source + use<T>, T>> {
    let Fleet { connection, ring, node, public_keys, .. } = fleet.clone();
    let key = match state.key.as_deref().and_then(NodeKey::kept) {
        Some(key) => key,
        None => NodeKey::random().context("make a key for the reports of this node")?,
    };
    let key = Arc::new(key);
    let (told, of_node) = (Arc::clone(&board), Arc::clone(&key));
    let source = Connection { settings: connection, ring: ring.clone(), key: of_node, board: told, source: None };
    Ok(Agent::new(Identity { ring, node, keys: public_keys, key }, source, target, board, state))
}

/// The engine, asked by threads that have the capabilities which that takes. What it has begun it does to its end. When the daemon
/// ends there is no answer any more: the agent is stopped, too.
#[derive(Debug)]
struct Daemon {
    control: Handle,
    engine: Shared,
}

impl Target for Daemon {
    async fn take(&mut self, text: Arc<str>, edits: Option<LineEdits>, state: &FleetState) -> Result<(), Problem> {
        let (engine, state) = (Arc::clone(&self.engine), state.clone());
        let taken = self.control.spawn(async move {
            match engine.lock().await.as_mut() {
                Some(engine) => beside(engine.take_set(text, edits, state)).map(drop),
                None => pending().await,
            }
        });
        taken.await.unwrap_or_else(|error| Err(Problem::new(ProblemKind::Failed, format!("take a set: {error}"))))
    }

    async fn note(&mut self, state: &FleetState) -> anyhow::Result<()> {
        match self.engine.lock().await.as_mut() {
            Some(engine) => engine.note_fleet(state.clone()),
            None => pending().await,
        }
    }

    async fn compare(&mut self, set: &Hash) -> Result<(), String> {
        let (engine, set) = (Arc::clone(&self.engine), *set);
        let is_right = move |text: &str| {
            set.expect(text).map_err(|found| format!("what is kept as the set {set} is another one, {found}"))
        };
        let compared = self.control.spawn(async move {
            match engine.lock().await.as_mut() {
                Some(engine) => block_in_place(|| engine.compare_set(is_right)),
                None => pending().await,
            }
        });
        compared.await.unwrap_or_else(|error| Err(format!("compare it: {error}")))
    }

    async fn condition(&mut self) -> Condition {
        match self.engine.lock().await.as_ref() {
            Some(engine) => engine.condition(),
            None => pending().await,
        }
    }
}

/// etcd, connected to at the first request, and again after it was away; so certificates and passwords may be renewed meanwhile.
#[derive(Debug)]
struct Connection {
    settings: ConnectionSettings,
    ring: Name,
    key: Arc<NodeKey>,
    /// Told how reporting goes.
    board: Arc<FleetBoard>,
    source: Option<EtcdSource>,
}

impl Connection {
    async fn source(&mut self) -> Result<&mut EtcdSource, Error> {
        let source = if let Some(source) = self.source.take() {
            source
        } else {
            let endpoints = self.settings.read().map_err(away)?;
            let etcd = Etcd::connect(&endpoints, PATIENCE).await.map_err(away)?;
            EtcdSource::new(etcd, self.ring.clone(), Arc::clone(&self.key), Arc::clone(&self.board))
        };
        Ok(self.source.insert(source))
    }

    /// Forgets a connection that does not answer.
    fn judge<T>(&mut self, answer: Result<T, Problem>) -> Result<T, Error> {
        answer.map_err(|problem| match problem.kind {
            ProblemKind::NoDaemon | ProblemKind::NotPermitted => {
                self.source = None;
                away(problem)
            }
            _ => Error::Nonsense(problem.into()),
        })
    }
}

fn away(problem: Problem) -> Error {
    Error::Away(problem.into())
}

impl Source for Connection {
    async fn pointer(&mut self) -> Result<Option<Seen<Pointer>>, Error> {
        let answer = self.source().await?.pointer().await;
        self.judge(answer)
    }

    async fn changed(&mut self) -> Result<Option<Seen<Pointer>>, Error> {
        let answer = self.source().await?.changed().await;
        self.judge(answer)
    }

    async fn set(&mut self, hash: &Hash) -> Result<String, Error> {
        let answer = self.source().await?.set(hash).await;
        self.judge(answer)
    }

    async fn delta(&mut self, from: &Hash, to: &Hash) -> Result<Option<Delta>, Error> {
        let answer = self.source().await?.delta(from, to).await;
        self.judge(answer)
    }

    fn report(&mut self, report: &Report) {
        if let Some(source) = &mut self.source {
            source.report(report.clone());
        }
    }
}
