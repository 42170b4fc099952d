//! One connected socket of a worker, and what is known of its readiness.

use std::{
    io::{self, Read as _},
    mem::MaybeUninit,
    net::{Shutdown, SocketAddr},
    os::fd::{AsFd, BorrowedFd},
    time::Duration,
};

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use socket2::{SockRef, Socket};

use super::slab::Key;
use crate::sys;

/// Which of a connection's sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::service) enum Side {
    /// The client's.
    Client,
    /// The upstream's.
    Upstream,
}

/// By which a connection has its sockets watched.
#[derive(Clone, Copy, Debug)]
pub(in crate::service) struct Watcher<'a> {
    pub(super) epoll: &'a Epoll,
    pub(super) key: Key,
}

/// Reported whether asked for or not.
const FAILED: EpollFlags = EpollFlags::EPOLLERR.union(EpollFlags::EPOLLHUP);

/// A socket that does not block. The kernel tells when it becomes ready (`EPOLLET`), and from then on it counts as ready until
/// it was tried in vain.
#[derive(Debug)]
pub(in crate::service) struct Stream {
    socket: Socket,
    side: Side,
    is_watched: bool,
    /// What the kernel is asked to tell.
    interest: EpollFlags,
    /// What it has told, as far as that still holds; `EPOLLRDHUP` if the peer says no more than what has arrived.
    ready: EpollFlags,
}

impl Stream {
    /// An accepted socket. Whether there is something to read is found out by trying: mostly there is. Room is there nearly
    /// always, and to be told so at once would be for nothing.
    pub(in crate::service) fn accepted(socket: Socket) -> Self {
        let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        let ready = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT;
        Self { socket, side: Side::Client, is_watched: false, interest, ready }
    }

    /// A socket that is not connected yet, and ready for nothing.
    pub(in crate::service) fn unconnected(socket: Socket) -> Self {
        let accepted = Self::accepted(socket);
        let interest = accepted.interest | EpollFlags::EPOLLOUT;
        Self { side: Side::Upstream, interest, ready: EpollFlags::empty(), ..accepted }
    }

    /// Begins to connect. It is writable when it is connected, or broken.
    pub(in crate::service) fn connect(&self, to: SocketAddr) -> io::Result<()> {
        match self.socket.connect(&to.into()) {
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(()),
            result => result,
        }
    }

    /// Has the kernel tell about it from now on; it ends when the socket is closed.
    pub(in crate::service) fn watch(&mut self, watcher: Watcher<'_>) -> io::Result<()> {
        watcher.epoll.add(&self.socket, self.question(watcher))?;
        self.is_watched = true;
        Ok(())
    }

    fn question(&self, watcher: Watcher<'_>) -> EpollEvent {
        EpollEvent::new(self.interest, watcher.key.pack(self.side == Side::Upstream))
    }

    /// Takes note of what the kernel tells.
    pub(in crate::service) fn note(&mut self, flags: EpollFlags) {
        self.ready |= flags;
        if flags.contains(EpollFlags::EPOLLHUP) {
            self.ready |= EpollFlags::EPOLLRDHUP;
        }
        if flags.intersects(EpollFlags::EPOLLRDHUP | FAILED) {
            self.ready |= EpollFlags::EPOLLIN;
        }
        // What has failed says how when it is tried.
        if flags.intersects(FAILED) {
            self.ready |= EpollFlags::EPOLLOUT;
        }
    }

    /// Whether it is known that the peer has ended its words; some of them may still be there to be read.
    pub(in crate::service) fn has_end(&self) -> bool {
        self.ready.contains(EpollFlags::EPOLLRDHUP)
    }

    /// Reads what is there; 0 at the end, None if there is nothing. The buffer must have room.
    pub(in crate::service) fn read(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let length = buffer.len();
        let read = self.read_by(|socket| (&*socket).read(buffer))?;
        // A short read has taken everything (epoll(7)); behind it there is nothing but the end.
        if read.is_some_and(|read| (1..length).contains(&read)) {
            self.ready.set(EpollFlags::EPOLLIN, self.has_end());
        }
        Ok(read)
    }

    /// Reads in another way.
    pub(in crate::service) fn read_by<T>(
        &mut self,
        attempt: impl FnMut(&Socket) -> io::Result<T>,
    ) -> io::Result<Option<T>> {
        if !self.ready.contains(EpollFlags::EPOLLIN) {
            return Ok(None);
        }
        let read = try_io(&self.socket, attempt)?;
        self.ready.set(EpollFlags::EPOLLIN, read.is_some());
        Ok(read)
    }

    /// Writes what goes; None if nothing does, and then the kernel tells when something will. With `is_last` it may wait for
    /// the end of the stream, which is to follow at once, so that both leave in one packet.
    pub(in crate::service) fn write(
        &mut self,
        watcher: Watcher<'_>,
        bytes: &[u8],
        is_last: bool,
    ) -> io::Result<Option<usize>> {
        let flags = libc::MSG_NOSIGNAL | if is_last { libc::MSG_MORE } else { 0 };
        self.write_by(watcher, |socket| socket.send_with_flags(bytes, flags))
    }

    /// Writes in another way.
    pub(in crate::service) fn write_by<T>(
        &mut self,
        watcher: Watcher<'_>,
        attempt: impl FnMut(&Socket) -> io::Result<T>,
    ) -> io::Result<Option<T>> {
        if !self.ready.contains(EpollFlags::EPOLLOUT) {
            return Ok(None);
        }
        let written = try_io(&self.socket, attempt)?;
        self.ready.set(EpollFlags::EPOLLOUT, written.is_some());
        if written.is_none() && !self.interest.contains(EpollFlags::EPOLLOUT) {
            self.interest |= EpollFlags::EPOLLOUT;
            if self.is_watched {
                watcher.epoll.modify(&self.socket, &mut self.question(watcher))?;
            }
        }
        Ok(written)
    }

    /// Tells the peer that no more comes.
    pub(in crate::service) fn end(&self) -> io::Result<()> {
        match self.socket.shutdown(Shutdown::Write) {
            // The peer has reset the connection; the next read reports that.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            result => result,
        }
    }

    /// Why the connection has failed, if the kernel has told so and no call has.
    pub(in crate::service) fn take_failure(&mut self) -> Option<io::Error> {
        let is_told = self.ready.contains(EpollFlags::EPOLLERR);
        self.ready.remove(EpollFlags::EPOLLERR);
        if is_told { self.error() } else { None }
    }

    /// Bytes that were written and that the peer's kernel has not acknowledged.
    pub(in crate::service) fn under_way(&self) -> usize {
        // Of a socket that the kernel does not tell of, nothing can be waited for.
        sys::unacknowledged(&self.socket).unwrap_or(0)
    }

    /// Whether the peer has said something that is still to be read, which a connection that it has reset since keeps.
    pub(in crate::service) fn has_words(&self) -> bool {
        self.socket.peek(&mut [MaybeUninit::uninit()]).is_ok_and(|length| length > 0)
    }

    /// Why it is broken, if it is.
    pub(in crate::service) fn error(&self) -> Option<io::Error> {
        self.socket.take_error().unwrap_or_else(Some)
    }

    /// Has the kernel send what acknowledges the peer's words together with ours, which must follow soon.
    pub(in crate::service) fn hold_acknowledgement(&self) {
        // It is a packet less, and not needed.
        self.socket.set_tcp_quickack(false).ok();
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Has the kernel reset the connection when it is closed.
pub(in crate::service) fn reset(socket: &impl AsFd) {
    // It fails on a connection that is gone already.
    SockRef::from(socket).set_linger(Some(Duration::ZERO)).ok();
}

fn try_io<T>(socket: &Socket, mut attempt: impl FnMut(&Socket) -> io::Result<T>) -> io::Result<Option<T>> {
    loop {
        match attempt(socket) {
            Ok(done) => return Ok(Some(done)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
