//! A registered socket of another process: what identifies it, its owner, and whether that process has ended.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Context as _;
use anyport_common::flow::Transport;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use super::{
    Candidate,
    process::{Process, Watch, holders},
};
use crate::{closing::PassedFd, host::Owner, rules::ServiceName};

/// A socket that was registered, as it is found again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptSocket {
    /// Who receives.
    pub service: ServiceName,
    /// Its places among the service's sockets.
    pub places: Vec<usize>,
    /// The kernel's name for it, which no other socket of the same boot has.
    pub cookie: u64,
    /// Its inode.
    pub inode: u64,
    /// Where it is bound.
    pub local: SocketAddr,
    /// The process that was seen to hold it last.
    #[serde(default)]
    pub pid: u32,
}

/// A socket that was registered, and the process that holds it.
#[derive(Debug)]
pub struct Registered {
    /// Its transport.
    pub transport: Transport,
    /// Where it is bound.
    pub local: SocketAddr,
    /// The kernel's name for it.
    pub cookie: u64,
    /// Its inode, by which processes are found that hold it.
    pub inode: u64,
    /// The process that was seen to hold it last.
    pub owner: Owner,
    /// Tells when that process ends, where the kernel can tell it.
    watch: Option<Watch>,
    /// Until the socket is in the kernel's map.
    given: Mutex<Option<Arc<PassedFd>>>,
}

impl Registered {
    /// A socket at the moment of its registration. `on_exit` is notified when the process ends.
    pub fn new(candidate: Candidate, pid: u32, on_exit: &Arc<Notify>) -> Self {
        let Candidate { descriptor, transport, local, cookie, inode, .. } = candidate;
        let given = Mutex::new(Some(Arc::new(descriptor)));
        let (owner, watch) = (Owner::of(pid), Watch::start(pid, on_exit));
        Self { transport, local, cookie, inode, owner, watch, given }
    }

    /// A socket of which the kernel has what it needs, by what was kept of it.
    pub fn in_kernel(kept: &KeptSocket, transport: Transport, on_exit: &Arc<Notify>) -> Self {
        let KeptSocket { local, cookie, inode, pid, .. } = *kept;
        let (owner, watch) = (Owner::of(pid), Watch::start(pid, on_exit));
        Self { transport, local, cookie, inode, owner, watch, given: Mutex::default() }
    }

    /// The same socket in the hands of another process.
    #[must_use]
    pub fn held_by(&self, pid: u32, on_exit: &Arc<Notify>) -> Self {
        let Self { transport, local, cookie, inode, .. } = *self;
        let (owner, watch) = (Owner::of(pid), Watch::start(pid, on_exit));
        Self { transport, local, cookie, inode, owner, watch, given: Mutex::default() }
    }

    /// Whether the process that was seen to hold it has ended. Others may hold the socket all the same.
    pub fn has_owner_ended(&self) -> bool {
        match &self.watch {
            Some(watch) => watch.has_ended(),
            None => !Path::new("/proc").join(self.owner.pid.to_string()).exists(),
        }
    }

    /// A descriptor of the socket: the one that came with the registration, or one fetched from the process that holds it.
    ///
    /// # Errors
    /// Nobody does, or we may not fetch it.
    pub fn descriptor(&self) -> anyhow::Result<Arc<PassedFd>> {
        if let Some(given) = &*self.given.lock().unwrap_or_else(PoisonError::into_inner) {
            return Ok(Arc::clone(given));
        }
        let attempt = || format!("fetch the socket {} of {} (pid {})", self.local, self.owner.name, self.owner.pid);
        let (pid, descriptor) = holders(self.inode).next().context("no process holds it").with_context(attempt)?;
        let candidate = Process::open(pid).and_then(|it| it.candidate(descriptor)).with_context(attempt)?;
        anyhow::ensure!(candidate.cookie == self.cookie, "{}: it is another socket by now", attempt());
        Ok(Arc::new(candidate.descriptor))
    }

    /// Closes our descriptor, so that the socket ends with its owner.
    pub fn let_go(&self) {
        self.given.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}
