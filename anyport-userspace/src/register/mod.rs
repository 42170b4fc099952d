//! Sockets that other processes hand over: what is asked for, how a descriptor gets here and what it must be.
//!
//! We keep no descriptor of them. The kernel's map holds a socket without keeping it open, so when its owner ends or
//! closes it the map forgets it at once, and newcomers are refused rather than left in a queue that nobody serves.

mod client;
pub(crate) mod message;
mod process;
mod server;
mod socket;

use std::{
    fmt,
    net::SocketAddr,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Context as _;
use anyport_common::flow::Transport;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

pub use self::{
    client::send,
    process::{Process, Watch, holders},
    server::{bind, serve},
    socket::{Candidate, Chosen, choose},
};
use crate::{
    host,
    rules::{InvalidText, Protocol, ServiceName},
    service::Family,
};

/// The socket for registering that belongs to a control socket.
pub fn socket_beside(control: &Path) -> PathBuf {
    control.with_extension("register.sock")
}

/// What is asked for at the socket for registering.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Steer to these sockets from now on.
    Register(Register),
    /// Steer to them no more.
    Unregister(Unregister),
}

impl Request {
    /// The service that it is about.
    pub fn service(&self) -> &ServiceName {
        match self {
            Self::Register(Register { service, .. }) | Self::Unregister(Unregister { service, .. }) => service,
        }
    }
}

/// Which sockets to register: those whose descriptors come with the request, or a process's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Register {
    /// Who receives.
    pub service: ServiceName,
    /// The process whose sockets they are, if no descriptors come with the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Its descriptor of the socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fd: Option<i32>,
    /// Where the socket waits, instead of its descriptor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<Listen>,
}

/// Which sockets to give up: all of the service, or fewer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unregister {
    /// Whose they are.
    pub service: ServiceName,
    /// Only those for this transport.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// Only those for packets of this family.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub family: Option<Family>,
}

/// Where a socket waits, as `tcp:127.0.0.1:8080` or `udp:[::]:53`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Listen {
    /// Its transport.
    pub transport: Transport,
    /// Where it is bound.
    pub local: SocketAddr,
}

impl FromStr for Listen {
    type Err = InvalidText;

    fn from_str(text: &str) -> Result<Self, InvalidText> {
        let parsed = text.split_once(':').and_then(|(transport, local)| {
            let transport = match transport {
                "tcp" => Transport::Tcp,
                "udp" => Transport::Udp,
                _ => return None,
            };
            Some(Self { transport, local: local.parse().ok()? })
        });
        parsed.ok_or_else(|| InvalidText(format!("{text:?} is no tcp:ADDR:PORT or udp:ADDR:PORT, such as udp:[::]:53")))
    }
}

impl TryFrom<String> for Listen {
    type Error = InvalidText;

    fn try_from(text: String) -> Result<Self, InvalidText> {
        text.parse()
    }
}

impl From<Listen> for String {
    fn from(listen: Listen) -> Self {
        listen.to_string()
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { transport, local } = self;
        write!(f, "{}:{local}", Protocol::from(*transport))
    }
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
    pub owner: host::Owner,
    /// Tells when that process ends, where the kernel can tell it.
    watch: Option<Watch>,
    /// Until the socket is in the kernel's map.
    given: Mutex<Option<Arc<OwnedFd>>>,
}

impl Registered {
    /// A socket at the moment of its registration. `on_exit` is notified when the process ends.
    pub fn new(candidate: Candidate, pid: u32, on_exit: &Arc<Notify>) -> Self {
        let Candidate { descriptor, transport, local, cookie, inode, .. } = candidate;
        let given = Mutex::new(Some(Arc::new(descriptor)));
        let (owner, watch) = (process::owner(pid), Watch::start(pid, on_exit));
        Self { transport, local, cookie, inode, owner, watch, given }
    }

    /// The same socket in the hands of another process.
    #[must_use]
    pub fn held_by(&self, pid: u32, on_exit: &Arc<Notify>) -> Self {
        let Self { transport, local, cookie, inode, .. } = *self;
        let (owner, watch) = (process::owner(pid), Watch::start(pid, on_exit));
        Self { transport, local, cookie, inode, owner, watch, given: Mutex::default() }
    }

    /// Whether the process that was seen to hold it has ended. Others may hold the socket all the same.
    pub fn has_owner_ended(&self) -> bool {
        match &self.watch {
            Some(watch) => watch.has_ended(),
            None => !Path::new("/proc").join(self.owner.pid.to_string()).exists(),
        }
    }

    /// A descriptor of the socket: the one that came with the registration, or one fetched from whoever holds it.
    ///
    /// # Errors
    /// Nobody does, or we may not fetch it.
    pub fn descriptor(&self) -> anyhow::Result<Arc<OwnedFd>> {
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

#[cfg(test)]
mod tests {
    use super::{Listen, Request};

    #[test]
    fn places_read_back_as_written() {
        for text in ["tcp:127.0.0.1:8080", "udp:[::]:53"] {
            assert_eq!(text.parse::<Listen>().unwrap().to_string(), text);
        }
        for text in ["127.0.0.1:80", "tcp:127.0.0.1", "sctp:127.0.0.1:80", "tcp:host:80", "tcp::::80", ""] {
            assert!(text.parse::<Listen>().unwrap_err().to_string().contains("tcp:ADDR:PORT"), "{text}");
        }
    }

    #[test]
    fn requests_are_checked_key_by_key() {
        for text in [
            r#"{"register":{"service":"web"}}"#,
            r#"{"register":{"service":"web","pid":7,"listen":"tcp:[::1]:80"}}"#,
            r#"{"unregister":{"service":"web","protocol":"tcp","family":"ipv6"}}"#,
        ] {
            let request: Request = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&request).unwrap(), text);
        }
        for text in [
            r#"{"register":{"service":"web","port":80}}"#,
            r#"{"register":{}}"#,
            r#"{"register":{"service":"web\n"}}"#,
            r#"{"unregister":{"service":"web","family":"unix"}}"#,
            r#"{"register":{"service":"a"},"unregister":{"service":"a"}}"#,
            r#"{"steal":{"service":"a"}}"#,
        ] {
            assert!(serde_json::from_str::<Request>(text).is_err(), "{text}");
        }
    }
}
