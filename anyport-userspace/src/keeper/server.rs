//! A server, as its keeper sees it.

use std::{
    ffi::OsString,
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
    process::ExitStatus,
    sync::Arc,
};

use nix::{
    sys::{
        signal::{Signal, kill},
        socket::{AddressFamily, SockFlag, SockType, socketpair},
    },
    unistd::Pid,
};
use tokio::{process::Command, sync::mpsc::UnboundedSender, task::spawn_blocking, time::Instant};

use super::{AT_STDIN, Order, Report, VARIABLE};
use crate::scm_rights::{MAX_DESCRIPTORS, Message, put, receive};

/// What has become of a server, or what it said.
#[derive(Debug)]
pub(super) enum News {
    /// It said this, and sent this beside it.
    Said(Report, Option<OwnedFd>),
    /// It ended. Whatever it said came before.
    Ended(ExitStatus),
}

/// A process that serves, or is about to.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) pid: Pid,
    pub(super) started: Instant,
    /// Whether its steering is active.
    pub(super) is_ready: bool,
    /// Why it ends, by its own words.
    pub(super) failure: Option<String>,
    socket: Arc<OwnedFd>,
}

impl Server {
    /// Starts `executable`, which tells its news with its pid.
    pub(super) fn start(
        executable: &Path,
        arguments: &[OsString],
        news: UnboundedSender<(Pid, News)>,
    ) -> io::Result<Self> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let mut process =
            Command::new(executable).arg0("anyportd").args(arguments).env(VARIABLE, AT_STDIN).stdin(theirs).spawn()?;
        let pid =
            process.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw).ok_or(io::ErrorKind::NotFound)?;
        let socket = Arc::new(ours);
        let (listening, said) = (Arc::clone(&socket), news.clone());
        tokio::spawn(async move {
            let listened = spawn_blocking(move || listen(&listening, pid, &said)).await;
            debug_assert!(listened.is_ok(), "listening does not panic");
            if let Ok(status) = process.wait().await {
                // Nobody is left to hear it only when the keeper itself ends.
                news.send((pid, News::Ended(status))).ok();
            }
        });
        Ok(Self { pid, started: Instant::now(), is_ready: false, failure: None, socket })
    }

    /// Tells it something. One that does not listen any more will soon be known to have ended.
    pub(super) fn tell(&self, order: &Order, sockets: &[BorrowedFd<'_>]) {
        let text = serde_json::to_vec(order).unwrap_or_default();
        put(&self.socket, &text, sockets).ok();
    }

    /// Gives it what is kept.
    pub(super) fn give<'a>(&self, kept: impl Iterator<Item = (&'a String, &'a OwnedFd)>) {
        /// Names have 100 bytes at most, so that these fit into a message.
        const AT_ONCE: usize = 100;
        const { assert!(AT_ONCE <= MAX_DESCRIPTORS) };
        let kept: Vec<_> = kept.collect();
        for some in kept.chunks(AT_ONCE) {
            let names = some.iter().map(|(name, _)| (*name).clone()).collect();
            let sockets: Vec<_> = some.iter().map(|(_, socket)| socket.as_fd()).collect();
            self.tell(&Order::Kept(names), &sockets);
        }
    }

    pub(super) fn signal(&self, signal: Signal) {
        // It may have ended already.
        kill(self.pid, signal).ok();
    }
}

/// Passes on what a server says until it closes its end.
fn listen(socket: &OwnedFd, pid: Pid, news: &UnboundedSender<(Pid, News)>) {
    while let Ok(Message { text, mut descriptors, .. }) = receive(socket) {
        if text.is_empty() {
            return;
        }
        // A later version may say what is unknown here.
        let Ok(report) = serde_json::from_slice(&text) else { continue };
        if news.send((pid, News::Said(report, descriptors.pop()))).is_err() {
            return;
        }
    }
}
