//! Which users may use the control API, and which may only read, by the credentials of the Unix socket's peer.

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    os::fd::BorrowedFd,
    str::FromStr,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use nix::{
    sys::socket::{getsockopt, sockopt::PeerCredentials},
    unistd::{Group, Uid},
};

use crate::{as_text::as_text, events::Author, privileges::GROUP, sys::peer_groups, text::remark};

/// Who is at the other end, as the kernel says.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The process.
    pub pid: u32,
    /// Its user.
    pub uid: Uid,
    /// Its groups.
    pub groups: Vec<u32>,
}

impl Peer {
    /// The process that connected to this Unix socket.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn of(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let credentials = getsockopt(&socket, PeerCredentials)?;
        let mut groups = peer_groups(socket)?;
        groups.push(credentials.gid());
        let pid = credentials.pid().try_into().map_err(io::Error::other)?;
        Ok(Self { pid, uid: Uid::from_raw(credentials.uid()), groups })
    }

    /// It, as the author of a change. What it calls itself is asked of the kernel now.
    pub fn author(&self) -> Author {
        let Self { pid, uid, .. } = self;
        let comm = fs::read(format!("/proc/{pid}/comm")).ok();
        let program = comm.map(|comm| remark(String::from_utf8_lossy(&comm).trim_end_matches('\n')));
        Author::Process { uid: uid.as_raw(), pid: *pid, program }
    }

    /// Whether it may use the whole API.
    pub fn is_in_control(&self) -> bool {
        self.uid.is_root() || self.uid == Uid::effective() || is_member(self, GROUP)
    }
}

/// Who may look at everything and change nothing, beside those who are in control.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readers {
    /// All that can connect to the socket.
    All,
    /// The members of a group.
    Group(String),
}

impl Readers {
    /// Whether a peer is one of them.
    pub fn include(&self, peer: &Peer) -> bool {
        match self {
            Self::All => true,
            Self::Group(name) => is_member(peer, name),
        }
    }
}

impl FromStr for Readers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_safe = |it: char| it.is_ascii_alphanumeric() || "_-.".contains(it);
        match text {
            "all" => Ok(Self::All),
            name if name.starts_with(is_safe) && !name.starts_with('-') && name.chars().all(is_safe) => {
                Ok(Self::Group(name.to_owned()))
            }
            _ => Err(format!("{text:?} is no name of a group, nor all")),
        }
    }
}

as_text!(Readers);

impl fmt::Display for Readers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Group(name) => f.write_str(name),
        }
    }
}

fn is_member(peer: &Peer, name: &str) -> bool {
    group(name).is_some_and(|gid| peer.groups.contains(&gid))
}

/// The number of a group, as it was a second ago at most. Clients can ask as often as they like, and each look reads files, or asks a
/// service of the network.
fn group(name: &str) -> Option<u32> {
    const LOOKS: Duration = Duration::from_secs(1);
    static KNOWN: Mutex<BTreeMap<String, (Instant, Option<u32>)>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((at, gid)) = known.get(name)
        && at.elapsed() < LOOKS
    {
        return *gid;
    }
    let gid = Group::from_name(name).ok().flatten().map(|group| group.gid.as_raw());
    known.insert(name.to_owned(), (Instant::now(), gid));
    gid
}
