//! The daemon: the order in which its parts start and stop.

use std::{
    io::ErrorKind,
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use futures_util::StreamExt as _;
use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    socket::{getsockopt, sockopt::PeerCredentials},
};
use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
    sync::{Mutex, watch},
    time::{MissedTickBehavior, interval},
};
use tracing::{info, warn};

use crate::{api, config::Config, engine::Engine, routes};

/// How often the engine looks for interfaces and for connections that have ended.
const REFRESH: Duration = Duration::from_secs(1);
/// Held by the daemon of a network namespace: names that begin with a NUL byte are the namespace's own, and go with
/// the process however it ends (unix(7), since Linux 2.2; by namespace since 2.6.29).
const NAMESPACE_LOCK: &str = "anyportd";

/// Runs until SIGTERM or SIGINT, then takes everything out of the kernel.
///
/// Connections are served on a runtime of their own, so that load on them never starves control.
///
/// # Errors
/// What kept the daemon from starting, or what could not be removed at its end.
pub fn run(config: &Config) -> anyhow::Result<()> {
    let _lock = lock_namespace()?;
    raise_descriptor_limit();
    let data = runtime::Builder::new_multi_thread()
        .worker_threads(config.workers.get())
        .thread_name("anyport-data")
        .enable_all()
        .build()
        .context("start the threads that serve connections")?;
    let control = runtime::Builder::new_current_thread().enable_all().build().context("start the control thread")?;
    let result = control.block_on(control_loop(config, data.handle().clone()));
    data.shutdown_background();
    result
}

async fn control_loop(config: &Config, data: runtime::Handle) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("wait for SIGINT")?;
    let listener = api::bind(&config.socket)?;
    let engine = match Engine::start(config, data).await {
        Ok(engine) => Arc::new(Mutex::new(engine)),
        Err(error) => {
            remove_socket(config);
            return Err(error);
        }
    };
    let (stop, stopped) = watch::channel(false);
    let server = tokio::spawn(api::serve(listener, Arc::clone(&engine), stopped));
    let watcher = tokio::spawn(keep_looking(Arc::clone(&engine)));
    info!("ready at {}; next: anyportctl add-prefix PREFIX", config.socket.display());

    tokio::select! {
        _ = terminate.recv() => info!("SIGTERM: stopping"),
        _ = interrupt.recv() => info!("SIGINT: stopping"),
    }
    remove_socket(config);
    watcher.abort();
    // A request under way is finished first; a client that only sits there is not waited for.
    stop.send_replace(true);
    if tokio::time::timeout(REFRESH, server).await.is_err() {
        warn!("a client still has its connection to the control socket; closing it");
    }
    take_engine(engine).await?.stop().await.context("remove everything from the kernel")?;
    info!("stopped; nothing is left in the kernel");
    Ok(())
}

/// The engine, once no request holds it any more.
async fn take_engine(mut engine: Arc<Mutex<Engine>>) -> anyhow::Result<Engine> {
    for _ in 0..100 {
        match Arc::try_unwrap(engine) {
            Ok(engine) => return Ok(engine.into_inner()),
            Err(shared) => engine = shared,
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    bail!("a request holds the engine for too long; the next start removes what is left in the kernel")
}

/// Tells the engine to look again when an interface changes, and from time to time.
async fn keep_looking(engine: Arc<Mutex<Engine>>) {
    let mut timer = interval(REFRESH);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut changes = match routes::link_changes() {
        Ok(changes) => changes.boxed(),
        Err(error) => {
            warn!("interfaces are looked for once a second only: {error:#}");
            futures_util::stream::pending().boxed()
        }
    };
    loop {
        tokio::select! {
            _ = timer.tick() => {}
            _ = changes.next() => {}
        }
        engine.lock().await.refresh().await;
    }
}

/// Makes sure that this is the only daemon of its network namespace.
fn lock_namespace() -> anyhow::Result<UnixListener> {
    let address = SocketAddr::from_abstract_name(NAMESPACE_LOCK).context("name the lock")?;
    match UnixListener::bind_addr(&address) {
        Ok(lock) => Ok(lock),
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            let pid = UnixStream::connect_addr(&address)
                .and_then(|peer| Ok(getsockopt(&peer, PeerCredentials)?.pid()))
                .map_or_else(|_| "unknown".into(), |pid| pid.to_string());
            bail!(
                "another anyportd is at work in this network namespace, with pid {pid}; \
                 control that one with anyportctl, or stop it first: kill {pid}"
            )
        }
        Err(error) => Err(error).context("take the lock of this network namespace"),
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

fn remove_socket(config: &Config) {
    if let Err(error) = std::fs::remove_file(&config.socket) {
        warn!("remove the control socket {}: {error}", config.socket.display());
    }
}
