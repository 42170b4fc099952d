//! The daemon: the order in which its parts start and stop.

#[cfg(feature = "fleet")]
pub mod fleet_node;

use std::{ffi::CStr, future::pending, sync::Arc, time::Duration};

use anyhow::Context as _;
use nix::sys::{
    prctl,
    resource::{Resource, getrlimit, setrlimit},
};
use tokio::{
    runtime,
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
    time::{MissedTickBehavior, interval, sleep},
};
use tokio_util::task::AbortOnDropHandle;
use tracing::{error, info, warn};

#[cfg(feature = "fleet")]
use self::fleet_node::Node;
use crate::{
    config::{Config, DaemonConfig},
    control::{self, ControlSocket, Handover, registrar},
    engine::{Engine, Shared, beside},
    keeper::{self, Begin, Command, Commands, Link},
    lock::Lock,
    logging,
    observe::{self, Observer, Servers},
    privileges, register,
    routes::News,
    service::{DescriptorPool, WorkerHandles, Workers},
    socket_file::SocketFile,
    sys,
};

/// How often the engine looks for interfaces and for connections that have ended.
const REFRESH: Duration = Duration::from_secs(1);
/// A command one of whose steps takes longer than this is stuck, and so is this process: another one does better.
const LONGEST_STEP: Duration = Duration::from_mins(10);
/// How long answers may take to leave after everything else is done.
const LAST_ANSWERS: Duration = Duration::from_millis(200);

/// How often it is looked whether the last connection has ended.
const DRAIN_INTERVAL: Duration = Duration::from_millis(100);
/// What tools such as `ps` call the process, whichever way it was started.
const NAME: &CStr = c"anyportd";

/// Runs until SIGTERM or SIGINT, then takes everything out of the kernel; or until another process takes over, and then until the last
/// connection has ended or the time for that is over.
///
/// Connections are served by threads of their own, so that load on them never starves control.
///
/// # Errors
/// What kept the daemon from starting, or what could not be removed at its end.
pub fn run(config: &Config, keeper: &Link) -> anyhow::Result<()> {
    prctl::set_name(NAME).context("name the process")?;
    sys::return_free_memory();
    privileges::for_start(config.steering).context("put the capabilities out of force")?;
    if let Some(lack) = privileges::confine(config.paths(), config.steering)? {
        warn!("{lack}");
    }
    for what in config.unknown().into_iter().chain(config.absent()) {
        warn!("{what}");
    }
    // Confined as this thread is.
    logging::write_aside()?;
    Engine::check(config)?;
    raise_descriptor_limit();
    let begin = keeper.wait_for_begin()?;
    if let Some(crash) = &begin.crash {
        warn!(
            "the process that served before failed ({crash}); connections that it had are lost, new connections have waited"
        );
    }
    let lock = Lock::take(&config.state_dir)?;
    let workers = Workers::start(config.workers)?;
    // While a long command keeps one of them busy, another one answers.
    let control = runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name(keeper::CONTROL_THREADS)
        // Such a thread may start while the thread that starts it has capabilities raised.
        .on_thread_start(|| privileges::for_control().unwrap_or_else(|error| error!("{error}")))
        .enable_all()
        .build()
        .context("start the control threads")?;
    control.block_on(control_loop(config, workers.handles(), lock, keeper, &begin))
}

/// How the daemon ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Exit {
    /// For good.
    Stop,
    /// Another process goes on.
    Leave,
}

/// What tells the daemon to end.
struct ShutdownSignals {
    terminate: Signal,
    interrupt: Signal,
    commands: Commands,
    /// Whether a service manager starts the keeper again, should it end.
    is_restarted: bool,
}

impl ShutdownSignals {
    fn new(keeper: &Link, is_restarted: bool) -> anyhow::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("wait for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("wait for SIGINT")?,
            commands: keeper.commands()?,
            is_restarted,
        })
    }

    async fn wait(&mut self, handover: &Handover) -> Exit {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => info!("SIGTERM: stopping"),
                _ = self.interrupt.recv() => info!("SIGINT: stopping"),
                command = self.commands.next() => match command {
                    Command::Leave => {
                        info!("another process takes over");
                        handover.leaving();
                        return Exit::Leave;
                    }
                    Command::NotReplaced(why) => {
                        warn!("no other process could take over: {why}");
                        handover.not_replaced(why);
                        continue;
                    }
                    Command::Gone if self.is_restarted => {
                        warn!("the process that keeps the sockets has ended, and is started again: leaving the rest to it");
                        return Exit::Leave;
                    }
                    Command::Gone => warn!("the process that keeps the sockets has ended: stopping"),
                },
            }
            return Exit::Stop;
        }
    }
}

async fn control_loop(
    config: &Config,
    workers: WorkerHandles,
    mut lock: Lock,
    keeper: &Link,
    begin: &Begin,
) -> anyhow::Result<()> {
    let mut ends = ShutdownSignals::new(keeper, begin.is_restarted)?;
    let engine: Shared = Arc::default();
    let servers = Servers { started: begin.started, crashed: begin.crashed };
    let observer = Arc::new(Observer::new(Arc::clone(&engine), servers));
    let watch_at = |address| observe::Server::start(address, Arc::clone(&observer), begin.is_successor);
    let metrics = config.metrics.map(watch_at).transpose()?;
    let hangup = signal(SignalKind::hangup()).context("wait for SIGHUP")?;
    lock.answer()?;
    let given = keeper.take(keeper::CONTROL).pop();
    let beside = register::socket_beside(&config.socket);
    let socket = match given {
        Some(given) => ControlSocket::adopt(given, &config.socket, config.readers.as_ref())?,
        None => ControlSocket::bind(&config.socket, config.readers.as_ref())?,
    };
    let mut own_files: Vec<_> = socket.is_own().then(|| socket.file()).into_iter().collect();
    let registering = registrar::bind(&beside).inspect_err(|_| remove(&own_files))?;
    let registering_file = Arc::new(SocketFile::of(&beside));
    own_files.push(Arc::clone(&registering_file));
    match Engine::start(config, workers, keeper.clone(), begin).await {
        Ok(mut started) => {
            let files = [socket.file(), Arc::clone(&registering_file)];
            let of_sockets = files.iter().map(|file| file.complaint());
            started.pass_on(of_sockets.chain(metrics.as_ref().map(observe::Server::complaint)).collect());
            *engine.lock().await = Some(started);
        }
        Err(error) => {
            remove(&own_files);
            return Err(error);
        }
    }
    if let Some(engine) = engine.lock().await.as_ref() {
        privileges::for_control().context("give up what only a start needs")?;
        privileges::narrow(engine.back_end())?;
    }
    let (stop, stopped) = watch::channel(false);
    let handover = Handover::new(keeper.clone());
    let shared = Arc::clone(&engine);
    let server = tokio::spawn(control::serve(socket, shared, Arc::clone(&observer), handover.clone(), stopped));
    let registrar = tokio::spawn(registrar::serve(registering, registering_file, Arc::clone(&engine)));
    let watcher = tokio::spawn(keep_looking(Arc::clone(&engine), hangup));
    #[cfg(feature = "fleet")]
    let node = match &config.fleet {
        Some(fleet) => Some(Node::start(fleet, Arc::clone(&engine)).await?),
        None => None,
    };
    keeper.ready();
    let alive = AbortOnDropHandle::new(tokio::spawn(report_alive(keeper.clone(), observer)));
    info!("ready at {}; next: anyportctl add-prefix PREFIX", config.socket.display());

    let end = ends.wait(&handover).await;
    remove(&own_files);
    stop.send_replace(true);
    #[cfg(feature = "fleet")]
    drop(node);
    // A command under way holds the lock, so it is finished first. Later ones find nothing.
    let engine = engine.lock().await.take().context("the engine went away")?;
    // A successor serves them at the same address.
    drop(metrics);
    watcher.abort();
    registrar.abort();
    let &DaemonConfig { keep, drain_timeout, .. } = &engine.config().daemon;
    if end == Exit::Stop {
        engine.withdraw().await;
    }
    if end == Exit::Stop && !keep {
        engine.stop().await.context("remove everything from the kernel")?;
        info!("stopped; nothing is left in the kernel");
        tokio::time::timeout(LAST_ANSWERS, server).await.ok();
        return Ok(());
    }
    let left = engine.leave().await;
    // The last answers are on their way; a client that only sits there is not waited for.
    tokio::time::timeout(LAST_ANSWERS, server).await.ok();
    lock.release().await;
    if end == Exit::Stop {
        info!("stopped; steering stays in the kernel, where the next start takes it over");
        return Ok(());
    }
    drop(alive);
    keeper.left();
    drain(&left, drain_timeout, &mut ends).await;
    Ok(())
}

/// Tells the keeper every second that this process goes on, as long as it does.
async fn report_alive(keeper: Link, observer: Arc<Observer>) {
    let mut timer = interval(REFRESH);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        timer.tick().await;
        match observer.alive_within(LONGEST_STEP).await {
            Ok(_) => keeper.alive(),
            Err(why) => error!("the keeper is not told that this process goes on: {why}"),
        }
    }
}

/// Waits for the end of the connections that this process has.
async fn drain(connections: &DescriptorPool, limit: Duration, ends: &mut ShutdownSignals) {
    let over = async {
        while !connections.is_whole() {
            sleep(DRAIN_INTERVAL).await;
        }
    };
    tokio::select! {
        () = over => info!("the last connection has ended"),
        () = sleep(limit) => info!("connections are closed that went on for {limit:?} after the end (drain-timeout)"),
        _ = ends.terminate.recv() => info!("SIGTERM: closing the connections that are left"),
    }
}

/// Tells the engine to look again when an interface or a route changes or a process ends that registered a socket, and from time
/// to time; and to read the configuration again.
async fn keep_looking(engine: Shared, mut hangup: Signal) {
    let mut timer = interval(REFRESH);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let Some((owner_exits, watch)) = engine.lock().await.as_ref().map(|it| (it.owner_exits(), it.watch())) else {
        return;
    };
    let watch =
        watch.inspect_err(|error| warn!("interfaces and routes are looked at from time to time only: {error:#}")).ok();
    let news = async || match &watch {
        Some(watch) => watch.next().await,
        None => pending().await,
    };
    loop {
        let mut is_hangup = false;
        let news = tokio::select! {
            _ = hangup.recv() => {
                is_hangup = true;
                News::default()
            }
            _ = timer.tick() => News::default(),
            () = owner_exits.notified() => News::default(),
            news = news() => news,
        };
        let mut engine = engine.lock().await;
        let Some(engine) = engine.as_mut() else { return };
        if news.of_routes {
            engine.suspect_routes();
        }
        beside(async {
            if is_hangup {
                engine.reload_on_signal().await;
            }
            engine.refresh().await;
        });
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

fn remove(files: &[Arc<SocketFile>]) {
    for file in files {
        file.remove();
    }
}
