//! Other processes and their descriptors.

use std::{
    fs,
    io::ErrorKind,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;
use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};
use tokio::sync::Notify;
use tokio_util::task::AbortOnDropHandle;

use super::{Candidate, Listen};
use crate::{
    closing::PassedFd,
    host::{self, Owner},
    problem::{Problem, ProblemKind},
    rules::{Family, Protocol},
    sys,
};

/// A process that stays the same, whatever becomes of its number.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    pidfd: OwnedFd,
}

impl Process {
    /// The process that has this number now.
    ///
    /// # Errors
    /// There is none, or the kernel has no pidfds (they came with Linux 5.3).
    pub fn open(pid: u32) -> Result<Self, Problem> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        match number.ok_or(Errno::SRCH).and_then(|number| pidfd_open(number, PidfdFlags::empty())) {
            Ok(pidfd) => Ok(Self { pid, pidfd }),
            Err(Errno::SRCH | Errno::INVAL) => {
                Err(Problem::new(ProblemKind::NotFound, format!("there is no process with the pid {pid}")))
            }
            Err(error) => Err(Problem::new(ProblemKind::Failed, format!("open the process {pid}: {error}"))),
        }
    }

    /// Whether a user without privileges may speak for it: all of its user ids are that user's, and
    /// it has not changed them (`ptrace_may_access` in kernel/ptrace.c; the owner of the directory is root then).
    pub fn belongs_to(&self, uid: u32) -> bool {
        let status = fs::read_to_string(self.directory().join("status")).unwrap_or_default();
        let mut ids = status.lines().filter_map(|line| line.strip_prefix("Uid:")).flat_map(str::split_whitespace);
        let are_all = ids.clone().count() == 4 && ids.all(|id| id.parse() == Ok(uid));
        are_all && fs::metadata(self.directory()).is_ok_and(|directory| directory.uid() == uid)
    }

    /// Fetches the socket behind one of its descriptors (`pidfd_getfd`, Linux 5.6).
    ///
    /// # Errors
    /// It has no such descriptor, we may not, or it is no socket that can be steered to.
    pub fn candidate(&self, descriptor: i32) -> Result<Candidate, Problem> {
        let attempt = || format!("descriptor {descriptor} of {}", self.name());
        let fetched = pidfd_getfd(self.pidfd.as_fd(), descriptor, PidfdGetfdFlags::empty());
        let fetched = fetched.map_err(|error| match error {
            Errno::BADF => Problem::new(ProblemKind::Invalid, format!("{}: it is not open", attempt())),
            Errno::SRCH => Problem::new(ProblemKind::NotFound, format!("{}: the process has ended", attempt())),
            Errno::PERM => not_permitted(self.pid),
            _ => Problem::new(ProblemKind::Failed, format!("fetch {}: {error}", attempt())),
        })?;
        let fetched = PassedFd::new(fetched, self.owner());
        Candidate::new(fetched).map_err(|unfit| Problem::new(ProblemKind::Invalid, format!("{}: {unfit}", attempt())))
    }

    /// All of its sockets that wait there, the descriptors of one socket once.
    ///
    /// # Errors
    /// There is none: says where it does wait. Or as [`Self::candidate`].
    pub fn listening(&self, listen: &Listen) -> Result<Vec<Candidate>, Problem> {
        self.expect_same_namespace()?;
        let of_transport = host::listeners_of(listen.transport)?;
        let mut found: Vec<Candidate> = Vec::new();
        let mut others: Vec<String> = Vec::new();
        for (descriptor, inode) in self.sockets()? {
            let Some(listener) = of_transport.iter().find(|it| it.inode == inode) else { continue };
            let (wanted, local) = (listen.local, listener.local);
            let may_be_dual = wanted.is_ipv4() && local.ip().is_unspecified() && wanted.ip().is_unspecified();
            if local.port() == wanted.port() && (local.ip() == wanted.ip() || may_be_dual) {
                let candidate = self.candidate(descriptor)?;
                let is_known = found.iter().any(|it| it.cookie == candidate.cookie);
                if !is_known && (local.is_ipv4() == wanted.is_ipv4() || candidate.families.contains(&Family::Ipv4)) {
                    found.push(candidate);
                    continue;
                }
            }
            others.push(format!("{} {local}", Protocol::from(listen.transport)));
        }
        if found.is_empty() {
            others.sort_unstable();
            others.dedup();
            let waits = if others.is_empty() { "nowhere".into() } else { others.join(", ") };
            let transport = Protocol::from(listen.transport);
            return Err(Problem::new(
                ProblemKind::NotFound,
                format!("{} has no socket that waits at {listen}", self.name()),
            )
            .hint(format!("over {transport} it waits at: {waits}")));
        }
        Ok(found)
    }

    fn expect_same_namespace(&self) -> Result<(), Problem> {
        let file = self.directory().join("ns/net");
        let its = match fs::metadata(&file) {
            Err(error) if error.kind() == ErrorKind::PermissionDenied => return Err(not_permitted(self.pid)),
            its => its.with_context(|| format!("look at the network namespace {}", file.display()))?,
        };
        let ours = fs::metadata("/proc/thread-self/ns/net").context("look at our own network namespace")?;
        if (its.dev(), its.ino()) == (ours.dev(), ours.ino()) {
            return Ok(());
        }
        Err(Problem::new(ProblemKind::Invalid, format!("{} is in another network namespace", self.name())).hint(
            "run an anyportd in that namespace, or register a socket that was opened in this one by its descriptor",
        ))
    }

    /// Its descriptors of sockets, each with the inode.
    fn sockets(&self) -> anyhow::Result<Vec<(i32, u64)>> {
        let directory = self.directory().join("fd");
        let all = fs::read_dir(&directory).with_context(|| format!("list {}", directory.display()))?;
        let mut sockets: Vec<_> = all.flatten().filter_map(|entry| socket(&entry)).collect();
        sockets.sort_unstable();
        Ok(sockets)
    }

    /// The user that it runs as, as far as that can be seen.
    fn owner(&self) -> u32 {
        fs::metadata(self.directory()).map_or(u32::MAX, |directory| directory.uid())
    }

    fn name(&self) -> String {
        format!("{} (pid {})", Owner::of(self.pid).name, self.pid)
    }

    fn directory(&self) -> PathBuf {
        Path::new("/proc").join(self.pid.to_string())
    }
}

/// Taking a descriptor out of a process is as much as debugging it (`ptrace(2)`, access mode checking).
fn not_permitted(pid: u32) -> Problem {
    let error =
        format!("fetch a socket of the process {pid}: you may not, since it is another user's or has more rights");
    Problem::new(ProblemKind::NotPermitted, error).hint("become root, or have the process pass its socket itself")
}

/// The processes beside this one that hold a socket, each with a descriptor of it.
pub fn holders(inode: u64) -> impl Iterator<Item = (u32, i32)> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|process| process.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != std::process::id()).filter_map(move |pid| {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let mut sockets = descriptors.filter_map(|entry| socket(&entry));
        Some((pid, sockets.find(|(_, it)| *it == inode)?.0))
    })
}

fn socket(descriptor: &fs::DirEntry) -> Option<(i32, u64)> {
    Some((descriptor.file_name().to_str()?.parse().ok()?, host::socket_inode(&descriptor.path())?))
}

/// Waits for the end of a process, and stops to when dropped.
#[derive(Debug)]
pub struct Watch(AbortOnDropHandle<()>);

impl Watch {
    /// Notifies `on_exit` when the process has ended, its descriptors closed (`do_exit` in kernel/exit.c). Nothing if it has
    /// ended already.
    pub(super) fn start(pid: u32, on_exit: &Arc<Notify>) -> Option<Self> {
        let process = Process::open(pid).ok()?;
        let pidfd = sys::watch_readable(process.pidfd).ok()?;
        let on_exit = Arc::clone(on_exit);
        Some(Self(AbortOnDropHandle::new(tokio::spawn(async move {
            if pidfd.readable().await.is_ok() {
                on_exit.notify_one();
            }
        }))))
    }

    pub(super) fn has_ended(&self) -> bool {
        self.0.is_finished()
    }
}
