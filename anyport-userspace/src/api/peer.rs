use std::{io, os::fd::BorrowedFd};

use nix::{
    sys::socket::{getsockopt, sockopt::PeerCredentials},
    unistd::{Group, Uid},
};

use crate::sys::peer_groups;

/// Members of this group may use the API, as root may.
pub(super) const GROUP: &str = "anyport";

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
    /// Whoever connected to this Unix socket.
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

    /// Whether it may use the whole API.
    pub fn is_in_control(&self) -> bool {
        let is_member = |group: Group| self.groups.contains(&group.gid.as_raw());
        self.uid.is_root()
            || self.uid == Uid::effective()
            || Group::from_name(GROUP).ok().flatten().is_some_and(is_member)
    }
}
