//! Many nodes in this process: the engine and the agent of the daemon, a state directory for each in memory, and a kernel that is
//! none.

use std::{
    collections::BTreeMap,
    fs,
    num::NonZeroUsize,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use anyport::{
    api::Problem,
    config::{self, Config},
    daemon::fleet_node::agent,
    engine::Engine,
    fleet::{Condition, LineEdits, agent::Target, layout::Hash},
    service::{WorkerHandles, Workers},
    store::{FleetState, Store},
};
use anyport_tests::{etcd::Etcd, host::wait_for, netns::Netns, prerequisites::scratch};
use clap::Parser as _;
use tokio::{
    runtime::Builder,
    task::{LocalSet, spawn_local},
};

/// The ring of all nodes.
pub(crate) const RING: &str = "main";
/// How long it may take until many nodes have what they are to have.
const PATIENCE: Duration = Duration::from_mins(5);

/// Nodes, for as long as this process lives.
#[derive(Debug)]
pub(crate) struct Nodes {
    count: usize,
    namespace: Netns,
    /// Of etcd's members, as TOML has them.
    urls: String,
    directory: tempfile::TempDir,
    workers: Workers,
    applied: Applied,
}

/// When a set became active at nodes, by its sequence.
#[derive(Clone, Debug, Default)]
pub(crate) struct Applied(Arc<Mutex<BTreeMap<u64, Vec<Instant>>>>);

impl Applied {
    fn note(&self, sequence: u64) {
        let now = Instant::now();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(sequence).or_default().push(now);
    }

    fn of(&self, sequence: u64) -> Vec<Instant> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&sequence).cloned().unwrap_or_default()
    }
}

impl Nodes {
    /// None so far, which are to reach etcd from this namespace.
    pub(crate) fn new(namespace: &Netns, etcd: &Etcd) -> Result<Self> {
        Ok(Self {
            count: 0,
            namespace: namespace.clone(),
            urls: etcd.urls().split(',').map(|url| format!("{url:?}")).collect::<Vec<_>>().join(", "),
            directory: scratch(),
            workers: Workers::start(NonZeroUsize::MIN)?,
            applied: Applied::default(),
        })
    }

    /// Has so many nodes in all. They come at once, on as many threads as there are processors.
    pub(crate) fn grow_to(&mut self, count: usize) -> Result<()> {
        let threads = thread::available_parallelism()?.get();
        let fresh: Vec<usize> = (self.count..count).collect();
        for part in fresh.chunks(fresh.len().div_ceil(threads).max(1)) {
            let configs = part.iter().map(|number| self.config(*number)).collect::<Result<Vec<_>>>()?;
            let (namespace, workers, applied) = (self.namespace.clone(), self.workers.handles(), self.applied.clone());
            let thread = thread::Builder::new().name("nodes".into());
            thread.spawn(move || namespace.enter(|| run(configs, &workers, &applied)))?;
        }
        self.count = count;
        Ok(())
    }

    fn config(&self, number: usize) -> Result<Config> {
        let file = self.directory.path().join(format!("n{number}.toml"));
        fs::write(&file, format!("[fleet]\netcd = [{}]\nring = \"{RING}\"\nnode = \"n{number}\"\n", self.urls))?;
        let state = self.directory.path().join(format!("n{number}"));
        let options = config::Options::parse_from([Path::new("anyportd"), Path::new("--state-dir"), &state]);
        Config::new(options.settings, Some(&file))
    }

    /// Waits until the set of a sequence is active at all nodes. When it became active, in order.
    pub(crate) fn wait_for(&self, sequence: u64) -> Vec<Instant> {
        let mut times = wait_for("nodes that have the set", PATIENCE, || {
            let times = self.applied.of(sequence);
            if times.len() == self.count { Ok(times) } else { Err(format!("{} of {}", times.len(), self.count)) }
        });
        times.sort();
        times
    }
}

fn run(configs: Vec<Config>, workers: &WorkerHandles, applied: &Applied) {
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime for nodes");
    LocalSet::new().block_on(&runtime, async {
        let nodes: Vec<_> = configs
            .into_iter()
            .map(|config| {
                let (workers, applied) = (workers.clone(), applied.clone());
                spawn_local(async move {
                    if let Err(error) = Box::pin(live(&config, workers, applied)).await {
                        panic!("a node: {error:#}");
                    }
                })
            })
            .collect();
        for node in nodes {
            node.await.expect("a node goes on");
        }
    });
}

async fn live(config: &Config, workers: WorkerHandles, applied: Applied) -> Result<()> {
    let kept = Store::open(&config.state_dir)?;
    let engine = Engine::simulated(config, kept, crate::kernel::kernel(), workers).await?;
    let (board, state) = (engine.fleet_board().context("no fleet")?, engine.fleet_state().clone());
    let fleet = config.fleet.as_ref().context("no fleet")?;
    match Box::pin(agent(fleet, Node { engine, applied }, board, state)?.run()).await {}
}

/// What an agent has do what etcd says.
#[derive(Debug)]
struct Node {
    engine: Engine,
    applied: Applied,
}

impl Target for Node {
    async fn take(&mut self, text: Arc<str>, edits: Option<LineEdits>, state: &FleetState) -> Result<(), Problem> {
        self.engine.take_set(text, edits, state.clone()).await?;
        self.applied.note(state.sequence);
        Ok(())
    }

    async fn note(&mut self, state: &FleetState) -> Result<()> {
        self.engine.note_fleet(state.clone())
    }

    async fn compare(&mut self, set: &Hash) -> Result<(), String> {
        self.engine.compare_set(|text| set.expect(text).map_err(|found| format!("another set, {found}")))
    }

    async fn condition(&mut self) -> Condition {
        self.engine.condition()
    }
}
