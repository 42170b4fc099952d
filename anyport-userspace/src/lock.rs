//! One daemon per network namespace, and one with the same state directory. The directory of the pins has a lock of its own.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read as _, Write as _},
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
            net::{SocketAddr, UnixListener},
        },
    },
    path::Path,
    thread,
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg, OFlag},
    sys::{
        signal::kill,
        socket::{UnixCredentials, getsockopt, sockopt::PeerCredentials},
    },
    unistd::{Pid, Uid, User},
};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::{
    closing,
    paths::{RUN_DIRECTORY, make_private},
    privileges::USER,
    sys,
};

/// Held by the daemon of a network namespace: names that begin with a NUL byte are the namespace's own, and go with
/// the process however it ends (unix(7), since Linux 2.2; by namespace since 2.6.29).
const NAME: &str = "anyportd";
const ATTEMPTS: u32 = 40;
/// The same before anything is made.
const ATTEMPTS_OF_KEEPER: u32 = 10;
const PAUSE: Duration = Duration::from_millis(50);
/// In the state directory.
const LOCK_FILE: &str = "lock";
/// Attempts while a server whose keeper was killed ends: it withdraws what is announced, for up to 8 s, and takes steering down.
const ENDING: u32 = 300;

/// What shows that this is the only daemon of its network namespace, for as long as it is held.
#[derive(Debug)]
pub struct Lock {
    /// Locked for as long as it is open.
    state: Option<Flock<File>>,
    held: Held,
    /// Answers those who ask who holds it.
    answering: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Held {
    /// Seen from all mount namespaces, so the first choice.
    Name(UnixListener),
    /// Where another process has the name, as any local user may.
    File(#[expect(dead_code, reason = "locked for as long as it is open")] Flock<File>),
}

impl Lock {
    /// Takes the lock of the thread's network namespace, and that of the state directory.
    ///
    /// # Errors
    /// A daemon has one of them: names its pid, or the directory.
    pub fn take(state_dir: &Path) -> anyhow::Result<Self> {
        let mut lock = Self::take_namespace()?;
        make_private(state_dir).with_context(|| format!("make {}", state_dir.display()))?;
        let locked = lock_directory(state_dir)?;
        let taken = || {
            anyhow!(
                "another anyportd uses the directory {}; give each daemon its own with --state-dir",
                state_dir.display()
            )
        };
        lock.state = Some(locked.ok_or_else(taken)?);
        Ok(lock)
    }

    /// Finds out whether another daemon is at work in this network namespace, before anything is made for one.
    ///
    /// # Errors
    /// There is one: names its pid.
    pub fn expect_free() -> anyhow::Result<()> {
        let at_work =
            || holder_of_lock().filter(is_daemon).map(|it| it.pid()).filter(|it| !is_gone(*it) && !is_orphan(*it));
        for _ in 0..ATTEMPTS_OF_KEEPER {
            if at_work().is_none() {
                return Ok(());
            }
            // Its keeper may have been killed a moment ago.
            thread::sleep(PAUSE);
        }
        at_work().map_or(Ok(()), |pid| Err(already_running(&pid.to_string())))
    }

    fn take_namespace() -> anyhow::Result<Self> {
        let address = SocketAddr::from_abstract_name(NAME).context("name the lock")?;
        for attempt in 0..ENDING {
            match UnixListener::bind_addr(&address) {
                Ok(lock) => {
                    sys::refuse_descriptors(&lock).context("set the lock of this network namespace up")?;
                    return Ok(Self::of(Held::Name(lock)));
                }
                Err(error) if error.kind() == ErrorKind::AddrInUse => {}
                Err(error) => return Err(error).context("take the lock of this network namespace"),
            }
            match holder_of_lock().filter(is_daemon) {
                // A daemon was killed, and is not quite gone; or a tool that it was starting has its descriptors for a moment more.
                Some(holder) if is_gone(holder.pid()) || is_orphan(holder.pid()) => {
                    if attempt == ATTEMPTS {
                        info!(
                            "waiting for the server of the daemon with pid {}, which was killed, to end",
                            holder.pid()
                        );
                    }
                    thread::sleep(PAUSE);
                }
                Some(holder) => return Err(already_running(&holder.pid().to_string())),
                None => {
                    warn!("another user's process holds the socket name @{NAME}; locking a file instead");
                    return lock_file();
                }
            }
        }
        Err(anyhow!("take the lock of this network namespace: children of a daemon that is gone still hold it"))
    }

    fn of(held: Held) -> Self {
        Self { state: None, held, answering: None }
    }

    /// Keeps room in the lock's queue for those who ask who holds it. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The socket can't be watched.
    pub fn answer(&mut self) -> anyhow::Result<()> {
        let Held::Name(name) = &self.held else { return Ok(()) };
        let queue = name.try_clone().and_then(|queue| {
            queue.set_nonblocking(true)?;
            tokio::net::UnixListener::from_std(queue)
        });
        let queue = queue.context("listen at the lock")?;
        self.answering = Some(tokio::spawn(async move {
            loop {
                match queue.accept().await.and_then(|(stream, _)| stream.into_std()) {
                    Ok(stream) => closing::close(u32::MAX, vec![stream.into()]),
                    Err(_) => tokio::time::sleep(PAUSE).await,
                }
            }
        }));
        Ok(())
    }

    /// Gives it back. It is free when this returns.
    pub async fn release(mut self) {
        if let Some(answering) = self.answering.take() {
            answering.abort();
            // It ends in no other way.
            answering.await.ok();
        }
    }
}

/// Whether a process that holds the lock may be a daemon: any user's process can take the name.
fn is_daemon(holder: &UnixCredentials) -> bool {
    let users =
        [Some(0), Some(Uid::effective().as_raw()), User::from_name(USER).ok().flatten().map(|it| it.uid.as_raw())];
    users.contains(&Some(holder.uid()))
}

fn is_gone(pid: i32) -> bool {
    // Processes of other namespaces show as 0.
    pid != 0 && (kill(Pid::from_raw(pid), None) == Err(Errno::ESRCH) || is_ending(pid))
}

/// Whether it is a server whose keeper was killed, which ends by itself.
fn is_orphan(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse::<i32>().ok());
    let name = |pid: i32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    name(pid).starts_with(NAME) && parent.is_some_and(|parent| !name(parent).starts_with(NAME))
}

/// Whether it will run no more, by `proc_pid_stat(5)`: its first thread may be a zombie while others are still about to end.
fn is_ending(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, state)| state.starts_with(['Z', 'X']))
}

fn lock_file() -> anyhow::Result<Lock> {
    let namespace = fs::metadata("/proc/thread-self/ns/net").context("find the network namespace")?.ino();
    let path = Path::new(RUN_DIRECTORY).join(format!("netns-{namespace}.lock"));
    let attempt = || format!("take the lock {}", path.display());
    fs::create_dir_all(RUN_DIRECTORY).with_context(attempt)?;
    let file = open_to_lock(&path).with_context(attempt)?;
    let mut lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => lock,
        Err((mut file, Errno::EWOULDBLOCK)) => {
            let mut pid = String::new();
            file.read_to_string(&mut pid).with_context(attempt)?;
            // It may be of a daemon that is gone, where another process holds the lock.
            let is_daemon =
                |pid: &str| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|it| it.starts_with("anyportd"));
            let pid = pid.trim();
            return Err(if is_daemon(pid) {
                already_running(pid)
            } else {
                anyhow!("{}: a process that is no anyportd holds it; fuser {} names it", attempt(), path.display())
            });
        }
        Err((_, errno)) => return Err(io::Error::from(errno)).with_context(attempt),
    };
    lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id())).with_context(attempt)?;
    Ok(Lock::of(Held::File(lock)))
}

/// A file that only root and its owner can open, so that no other user can hold a lock on it: anybody who may read a file can.
fn open_to_lock(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(flags.bits());
    let file = options.open(path)?;
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    if found.mode() & 0o077 != 0 {
        file.set_permissions(fs::Permissions::from_mode(0o600))?;
    }
    Ok(file)
}

/// Locks a directory that no two daemons may share, by a file in it. One that was killed may not be quite gone. Nothing comes back
/// where a daemon has it.
///
/// # Errors
/// The directory can't be read.
pub fn lock_directory(path: &Path) -> anyhow::Result<Option<Flock<File>>> {
    let attempt = || format!("lock the directory {}", path.display());
    let opened = open_to_lock(&path.join(LOCK_FILE)).and_then(|file| {
        let owner = fs::metadata(path)?;
        // The daemon that comes next may run as the directory's owner from its beginning.
        if Uid::effective().is_root() {
            std::os::unix::fs::fchown(&file, Some(owner.uid()), Some(owner.gid()))?;
        }
        Ok(file)
    });
    let mut directory = match opened {
        Ok(file) => file,
        // A disk that is full or can't be written is no reason not to steer.
        Err(error) => {
            warn!("{}: make the file {LOCK_FILE} in it: {error}; locking the directory itself", attempt());
            File::open(path).with_context(attempt)?
        }
    };
    for _ in 0..ATTEMPTS {
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(Some(lock)),
            Err((unlocked, Errno::EWOULDBLOCK)) => directory = unlocked,
            Err((_, errno)) => return Err(io::Error::from(errno)).with_context(attempt),
        }
        thread::sleep(PAUSE);
    }
    Ok(None)
}

fn already_running(pid: &str) -> anyhow::Error {
    anyhow!(
        "another anyportd is at work in this network namespace, with pid {pid}; \
         control that one with anyportctl, or stop it first: kill {pid}"
    )
}

/// Who holds the lock, as the kernel says. A daemon answers at once; a process that does not is none.
fn holder_of_lock() -> Option<UnixCredentials> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).ok()?;
    socket.connect(&SockAddr::unix(format!("\0{NAME}")).ok()?).ok()?;
    getsockopt(&socket, PeerCredentials).ok()
}
