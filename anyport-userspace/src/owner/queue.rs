//! Waiting at several sockets at once, until they are drained.

use std::{
    io,
    os::fd::AsFd,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    time::Duration,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

/// A socket that was replaced has served everybody when nobody has come for so long. A client whose answer to our side of
/// the handshake got lost is asked for it once more after a second (`TCP_TIMEOUT_INIT`).
pub(super) const QUIET: Duration = Duration::from_secs(2);

/// Sockets that do not block, and how threads wait for them.
#[derive(Debug)]
pub(super) struct Queue<S> {
    sockets: Vec<S>,
    /// Which of them is asked first, so that none waits for another one to be empty.
    turn: AtomicUsize,
    is_draining: AtomicBool,
    /// Readable from the moment of draining on.
    bell: EventFd,
}

impl<S: AsFd> Queue<S> {
    pub(super) fn new(sockets: Vec<S>) -> io::Result<Self> {
        if sockets.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "there are none"));
        }
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { sockets, turn: AtomicUsize::new(0), is_draining: AtomicBool::new(false), bell })
    }

    pub(super) fn sockets(&self) -> &[S] {
        &self.sockets
    }

    #[cfg(feature = "tokio")]
    pub(super) fn into_sockets(self) -> Vec<S> {
        self.sockets
    }

    /// What `attempt` takes from one of them; waits while it would block at all. Nothing once they are drained.
    pub(super) fn take<T>(&self, mut attempt: impl FnMut(&S) -> io::Result<T>) -> io::Result<Option<T>> {
        loop {
            let first = self.turn.fetch_add(1, Relaxed);
            for at in 0..self.sockets.len() {
                match attempt(&self.sockets[first.wrapping_add(at) % self.sockets.len()]) {
                    Err(error) if is_of_one_peer(&error) => {}
                    taken => return taken.map(Some),
                }
            }
            if !self.wait()? {
                return Ok(None);
            }
        }
    }

    /// Has threads that wait go on until nothing has come for [`QUIET`].
    pub(super) fn drain(&self) {
        self.is_draining.store(true, Relaxed);
        // It holds more than anyone could add.
        self.bell.write(1).ok();
    }

    /// Whether there may be something to take, or else all is over.
    fn wait(&self) -> io::Result<bool> {
        let is_draining = self.is_draining.load(Relaxed);
        let mut waited: Vec<_> = self.sockets.iter().map(|it| PollFd::new(it.as_fd(), PollFlags::POLLIN)).collect();
        let patience = if is_draining {
            PollTimeout::try_from(QUIET).map_err(io::Error::other)?
        } else {
            waited.push(PollFd::new(self.bell.as_fd(), PollFlags::POLLIN));
            PollTimeout::NONE
        };
        match poll(&mut waited, patience) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::EINTR) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }
}

/// Whether another attempt may well succeed: nothing is there, or what was there is gone (accept(2)).
pub(super) fn is_of_one_peer(error: &io::Error) -> bool {
    use io::ErrorKind::{
        ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable, Interrupted, NetworkDown,
        NetworkUnreachable, WouldBlock,
    };
    matches!(
        error.kind(),
        WouldBlock
            | Interrupted
            | ConnectionAborted
            | ConnectionRefused
            | ConnectionReset
            | HostUnreachable
            | NetworkDown
            | NetworkUnreachable
    )
}

#[cfg(test)]
mod tests {
    use std::{net::UdpSocket, thread, time::Instant};

    use super::{QUIET, Queue};

    #[test]
    fn what_is_there_is_taken_before_the_end() {
        let sockets = ["127.0.0.1:0", "127.0.0.2:0"].map(|address| UdpSocket::bind(address).unwrap());
        let addresses = sockets.each_ref().map(|socket| socket.local_addr().unwrap());
        for socket in &sockets {
            socket.set_nonblocking(true).unwrap();
        }
        let queue = Queue::new(sockets.into()).unwrap();
        let take = || queue.take(|socket| socket.recv(&mut [0; 9])).unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        for length in 0..4 {
            client.send_to(&[0; 9][..length], addresses[length % 2]).unwrap();
            assert_eq!(take(), Some(length), "from either");
        }
        thread::scope(|scope| {
            let begun = Instant::now();
            let waiting = scope.spawn(take);
            queue.drain();
            client.send_to(b"last", addresses[1]).unwrap();
            assert_eq!(waiting.join().unwrap(), Some(4));
            assert_eq!(take(), None);
            assert!(begun.elapsed() >= QUIET);
        });
        assert!(Queue::<UdpSocket>::new(Vec::new()).is_err());
    }
}
