//! The daemon: the order in which its parts start and stop.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read as _, Write as _},
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            fs::MetadataExt as _,
            net::{SocketAddr, UnixListener},
        },
    },
    path::Path,
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use futures_util::StreamExt as _;
use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    signal::kill,
    socket::{UnixCredentials, getsockopt, sockopt::PeerCredentials},
};
use nix::unistd::{Pid, Uid};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use socket2::{Domain, SockAddr, Socket, Type};
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
/// How long answers may take to leave after everything else is done.
const LAST_ANSWERS: Duration = Duration::from_millis(200);
/// Held by the daemon of a network namespace: names that begin with a NUL byte are the namespace's own, and go with
/// the process however it ends (unix(7), since Linux 2.2; by namespace since 2.6.29).
const NAMESPACE_LOCK: &str = "anyportd";
const LOCK_DIRECTORY: &str = "/run/anyport";
const LOCK_ATTEMPTS: u32 = 40;
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// Runs until SIGTERM or SIGINT, then takes everything out of the kernel.
///
/// Connections are served on a runtime of their own, so that load on them never starves control.
///
/// # Errors
/// What kept the daemon from starting, or what could not be removed at its end.
pub fn run(config: &Config) -> anyhow::Result<()> {
    let lock = lock_namespace()?;
    raise_descriptor_limit();
    let data = runtime::Builder::new_multi_thread()
        .worker_threads(config.workers.get())
        .thread_name("anyport-data")
        .enable_all()
        .build()
        .context("start the threads that serve connections")?;
    let control = runtime::Builder::new_current_thread().enable_all().build().context("start the control thread")?;
    let result = control.block_on(control_loop(config, data.handle().clone(), lock));
    data.shutdown_background();
    result
}

async fn control_loop(config: &Config, data: runtime::Handle, lock: Lock) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("wait for SIGINT")?;
    if let Lock::Name(name) = &lock {
        answer_at(name.try_clone().context("listen at the lock")?)?;
    }
    let listener = api::bind(&config.socket)?;
    let engine: api::Shared = match Engine::start(config, data).await {
        Ok(engine) => Arc::new(Mutex::new(Some(engine))),
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
    stop.send_replace(true);
    // A command under way holds the lock, so it is finished first. Later ones find nothing.
    let engine = engine.lock().await.take().context("the engine went away")?;
    watcher.abort();
    engine.stop().await.context("remove everything from the kernel")?;
    info!("stopped; nothing is left in the kernel");
    // The last answers are on their way; a client that only sits there is not waited for.
    tokio::time::timeout(LAST_ANSWERS, server).await.ok();
    Ok(())
}

/// Tells the engine to look again when an interface changes, and from time to time.
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
    loop {
        tokio::select! {
            _ = timer.tick() => {}
            _ = changes.next() => {}
        }
        match engine.lock().await.as_mut() {
            Some(engine) => engine.refresh().await,
            None => return,
        }
    }
}

/// What shows that this is the only daemon of its network namespace, for as long as it is held.
enum Lock {
    /// Seen from all mount namespaces, so the first choice.
    Name(UnixListener),
    /// Where somebody else has the name, as any local user may.
    File(#[expect(dead_code, reason = "held for its drop")] Flock<File>),
}

fn lock_namespace() -> anyhow::Result<Lock> {
    let address = SocketAddr::from_abstract_name(NAMESPACE_LOCK).context("name the lock")?;
    let is_daemon = |it: &UnixCredentials| it.uid() == 0 || it.uid() == Uid::effective().as_raw();
    for _ in 0..LOCK_ATTEMPTS {
        match UnixListener::bind_addr(&address) {
            Ok(lock) => return Ok(Lock::Name(lock)),
            Err(error) if error.kind() == ErrorKind::AddrInUse => {}
            Err(error) => return Err(error).context("take the lock of this network namespace"),
        }
        match holder_of_lock().filter(is_daemon) {
            // A daemon was killed while it was starting a tool, which has its descriptors for a moment more.
            Some(holder) if is_gone(holder.pid()) => thread::sleep(LOCK_PAUSE),
            Some(holder) => return Err(already_running(&holder.pid().to_string())),
            None => {
                warn!("another user's process holds the socket name @{NAMESPACE_LOCK}; locking a file instead");
                return lock_file();
            }
        }
    }
    Err(anyhow!("take the lock of this network namespace: children of a daemon that is gone still hold it"))
}

fn is_gone(pid: i32) -> bool {
    // Processes of other namespaces show as 0.
    pid != 0 && kill(Pid::from_raw(pid), None) == Err(Errno::ESRCH)
}

fn lock_file() -> anyhow::Result<Lock> {
    let namespace = fs::metadata("/proc/thread-self/ns/net").context("find the network namespace")?.ino();
    let path = Path::new(LOCK_DIRECTORY).join(format!("netns-{namespace}.lock"));
    let attempt = || format!("take the lock {}", path.display());
    fs::create_dir_all(LOCK_DIRECTORY).with_context(attempt)?;
    let file = File::options().read(true).write(true).create(true).truncate(false).open(&path).with_context(attempt)?;
    let mut lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => lock,
        Err((mut file, Errno::EWOULDBLOCK)) => {
            let mut pid = String::new();
            file.read_to_string(&mut pid).with_context(attempt)?;
            return Err(already_running(pid.trim()));
        }
        Err((_, errno)) => return Err(io::Error::from(errno)).with_context(attempt),
    };
    lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id())).with_context(attempt)?;
    Ok(Lock::File(lock))
}

fn already_running(pid: &str) -> anyhow::Error {
    anyhow!(
        "another anyportd is at work in this network namespace, with pid {pid}; \
         control that one with anyportctl, or stop it first: kill {pid}"
    )
}

/// Who holds the lock, as the kernel says. A daemon answers at once; whoever does not is none.
fn holder_of_lock() -> Option<UnixCredentials> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).ok()?;
    socket.connect(&SockAddr::unix(format!("\0{NAMESPACE_LOCK}")).ok()?).ok()?;
    getsockopt(&socket, PeerCredentials).ok()
}

/// Keeps room in the lock's queue for those who ask who holds it.
fn answer_at(lock: UnixListener) -> anyhow::Result<()> {
    lock.set_nonblocking(true).context("listen at the lock")?;
    let lock = tokio::net::UnixListener::from_std(lock).context("listen at the lock")?;
    tokio::spawn(async move {
        loop {
            if lock.accept().await.is_err() {
                tokio::time::sleep(REFRESH).await;
            }
        }
    });
    Ok(())
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
    if let Err(error) = fs::remove_file(&config.socket) {
        warn!("remove the control socket {}: {error}", config.socket.display());
    }
}
