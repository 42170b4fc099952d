//! The daemon: the order in which its parts start and stop.

use std::{fs, sync::Arc, time::Duration};

use anyhow::Context as _;
use futures_util::StreamExt as _;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
    sync::{Mutex, watch},
    time::{MissedTickBehavior, interval},
};
use tracing::{info, warn};

use crate::{
    api,
    config::Config,
    engine::Engine,
    lock::Lock,
    register, routes,
    service::{WorkerHandles, Workers},
};

/// How often the engine looks for interfaces and for connections that have ended.
const REFRESH: Duration = Duration::from_secs(1);
/// How long answers may take to leave after everything else is done.
const LAST_ANSWERS: Duration = Duration::from_millis(200);

/// Runs until SIGTERM or SIGINT, then takes everything out of the kernel.
///
/// Connections are served by threads of their own, so that load on them never starves control.
///
/// # Errors
/// What kept the daemon from starting, or what could not be removed at its end.
pub fn run(config: &Config) -> anyhow::Result<()> {
    let lock = Lock::take()?;
    raise_descriptor_limit();
    let workers = Workers::start(config.workers)?;
    // While a long command keeps one of them busy, another one answers.
    let control = runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("anyport-control")
        .enable_all()
        .build()
        .context("start the control threads")?;
    control.block_on(control_loop(config, workers.handles(), lock))
}

async fn control_loop(config: &Config, workers: WorkerHandles, lock: Lock) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("wait for SIGINT")?;
    lock.answer()?;
    let listener = api::bind(&config.socket)?;
    let registering = register::bind(&register::socket_beside(&config.socket)).inspect_err(|_| {
        fs::remove_file(&config.socket).ok();
    })?;
    let engine: api::Shared = match Engine::start(config, workers).await {
        Ok(engine) => Arc::new(Mutex::new(Some(engine))),
        Err(error) => {
            remove_sockets(config);
            return Err(error);
        }
    };
    let (stop, stopped) = watch::channel(false);
    let server = tokio::spawn(api::serve(listener, Arc::clone(&engine), stopped));
    let registrar = tokio::spawn(register::serve(registering, Arc::clone(&engine)));
    let watcher = tokio::spawn(keep_looking(Arc::clone(&engine)));
    info!("ready at {}; next: anyportctl add-prefix PREFIX", config.socket.display());

    tokio::select! {
        _ = terminate.recv() => info!("SIGTERM: stopping"),
        _ = interrupt.recv() => info!("SIGINT: stopping"),
    }
    remove_sockets(config);
    stop.send_replace(true);
    // A command under way holds the lock, so it is finished first. Later ones find nothing.
    let engine = engine.lock().await.take().context("the engine went away")?;
    watcher.abort();
    registrar.abort();
    engine.stop().await.context("remove everything from the kernel")?;
    info!("stopped; nothing is left in the kernel");
    // The last answers are on their way; a client that only sits there is not waited for.
    tokio::time::timeout(LAST_ANSWERS, server).await.ok();
    Ok(())
}

/// Tells the engine to look again when an interface changes or a process ends that registered a socket, and from time to time.
async fn keep_looking(engine: api::Shared) {
    let mut timer = interval(REFRESH);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut changes = match routes::link_changes() {
        Ok(changes) => changes.boxed(),
        Err(error) => {
            warn!("interfaces are looked for once a second only: {error:#}");
            futures_util::stream::pending().boxed()
        }
    };
    let Some(owner_exits) = engine.lock().await.as_ref().map(Engine::owner_exits) else { return };
    loop {
        tokio::select! {
            _ = timer.tick() => {}
            () = owner_exits.notified() => {}
            _ = changes.next() => {}
        }
        match engine.lock().await.as_mut() {
            Some(engine) => engine.refresh().await,
            None => return,
        }
    }
}

/// Each connection takes a descriptor, and the usual soft limit of 1024 is there for programs that use select(2).
fn raise_descriptor_limit() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!("raise the limit of open files to its maximum: {error}");
    }
}

fn remove_sockets(config: &Config) {
    for path in [&config.socket, &register::socket_beside(&config.socket)] {
        if let Err(error) = fs::remove_file(path) {
            warn!("remove the socket {}: {error}", path.display());
        }
    }
}
