//! Closes descriptors that other processes passed, on threads for which nothing waits.
//!
//! The last close of a descriptor sleeps in the kernel for as long as another process chose: that of a TCP socket with
//! `SO_LINGER` and unsent data (`inet_release`), of a file of a FUSE file system (`fuse_flush`), of a terminal whose
//! output is stopped (`tty_wait_until_sent`). So does a close of a Unix socket in whose queue such descriptors are, and
//! a read that discards them (`__scm_destroy`; kernel sources of Linux 6.18). So what a peer may have passed is received
//! whole, and closed here, and so are connections of peers.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::{privileges, scm_rights};

/// Threads that close what one user passed.
const THREADS_PER_USER: usize = 2;
/// Threads in all.
const MAX_THREADS: usize = 32;
/// Batches that one user may have waiting before [`is_clogged`] holds.
const BATCHES_PER_USER: usize = 16;
/// Batches that wait before [`is_full`] holds.
const MAX_WAITING: usize = 256;
/// How long a thread without work stays.
const IDLE: Duration = Duration::from_secs(10);

static CLOSER: Closer = Closer { state: Mutex::new(State::new()), work: Condvar::new() };

/// A descriptor that a process of the user `sender` passed, or one of a connection of such a process.
#[derive(Debug)]
pub struct PassedFd {
    /// Taken only when this is dropped.
    descriptor: Option<OwnedFd>,
    sender: u32,
}

impl PassedFd {
    /// `sender` is the user whose descriptors wait for each other.
    pub fn new(descriptor: impl Into<OwnedFd>, sender: u32) -> Self {
        Self { descriptor: Some(descriptor.into()), sender }
    }

    /// The descriptor, if it is known to be one of our own after all.
    pub fn into_own(mut self) -> OwnedFd {
        self.descriptor.take().expect("a descriptor until it is dropped")
    }

    /// The user who passed it.
    pub fn sender(&self) -> u32 {
        self.sender
    }

    /// A second descriptor of the same file.
    ///
    /// # Errors
    /// The limit of open files is reached.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self::new(self.as_fd().try_clone_to_owned()?, self.sender))
    }
}

impl AsFd for PassedFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // It is there until the drop, after which nothing borrows.
        self.descriptor.as_ref().map(AsFd::as_fd).expect("a descriptor until it is dropped")
    }
}

impl AsRawFd for PassedFd {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl Drop for PassedFd {
    fn drop(&mut self) {
        close(self.sender, self.descriptor.take().into_iter().collect());
    }
}

/// A message with the descriptors that came beside it.
#[derive(Debug)]
pub struct Message {
    /// Its text; empty if the other side has closed the connection.
    pub text: Vec<u8>,
    /// What was passed.
    pub descriptors: Vec<PassedFd>,
    /// Whether there was more than fits.
    pub is_cut_off: bool,
}

/// Takes a message from a socket, whose peer is a process of the user `sender`.
///
/// # Errors
/// The kernel's, such as `EAGAIN` where there is none yet.
pub fn receive(socket: impl AsFd, sender: u32) -> rustix::io::Result<Message> {
    let scm_rights::Message { text, descriptors, is_cut_off } = scm_rights::receive(socket)?;
    let descriptors = descriptors.into_iter().map(|it| PassedFd::new(it, sender)).collect();
    Ok(Message { text, descriptors, is_cut_off })
}

/// Reads from a socket over which nothing is to be passed: how many bytes came. What was passed all the same is closed.
///
/// # Errors
/// As [`receive`].
pub fn receive_into(socket: impl AsFd, buffer: &mut [u8], sender: u32) -> rustix::io::Result<usize> {
    let (length, descriptors, _) = scm_rights::receive_into(socket, buffer)?;
    close(sender, descriptors);
    Ok(length)
}

/// Closes descriptors that belong together, without waiting for it.
pub fn close(sender: u32, descriptors: Vec<OwnedFd>) {
    if !descriptors.is_empty() {
        CLOSER.close(Batch { sender, descriptors });
    }
}

/// Whether so much that this user passed still waits to be closed that no more is taken from the user.
pub fn is_clogged(sender: u32) -> bool {
    CLOSER.state().is_clogged(sender)
}

/// Whether so much waits to be closed that no connections are to be taken for the moment from which more could come.
pub fn is_full() -> bool {
    CLOSER.state().waiting.len() >= MAX_WAITING
}

struct Batch {
    sender: u32,
    descriptors: Vec<OwnedFd>,
}

struct Closer {
    state: Mutex<State>,
    work: Condvar,
}

struct State {
    waiting: VecDeque<Batch>,
    /// Threads at work for each user.
    at_work: BTreeMap<u32, usize>,
    threads: usize,
    idle: usize,
}

impl State {
    const fn new() -> Self {
        Self { waiting: VecDeque::new(), at_work: BTreeMap::new(), threads: 0, idle: 0 }
    }

    fn is_clogged(&self, sender: u32) -> bool {
        self.of(sender) >= BATCHES_PER_USER
    }

    /// Batches of a user that wait or are being closed.
    fn of(&self, sender: u32) -> usize {
        let waiting = self.waiting.iter().filter(|it| it.sender == sender).count();
        waiting + self.at_work.get(&sender).copied().unwrap_or_default()
    }

    /// The next batch whose user does not have all threads of a user at work already.
    fn next(&mut self) -> Option<Batch> {
        let is_next = |it: &Batch| self.at_work.get(&it.sender).is_none_or(|count| *count < THREADS_PER_USER);
        let batch = self.waiting.iter().position(is_next).and_then(|at| self.waiting.remove(at))?;
        *self.at_work.entry(batch.sender).or_default() += 1;
        Some(batch)
    }

    fn done(&mut self, sender: u32) {
        if let Some(count) = self.at_work.get_mut(&sender) {
            *count -= 1;
            if *count == 0 {
                self.at_work.remove(&sender);
            }
        }
    }
}

impl fmt::Debug for Closer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Closer").finish_non_exhaustive()
    }
}

impl Closer {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&'static self, batch: Batch) {
        let mut state = self.state();
        let sender = batch.sender;
        state.waiting.push_back(batch);
        // A user's own threads go on with what more there is of that user.
        let is_for_another = state.of(sender) <= THREADS_PER_USER && state.waiting.len() > state.idle;
        if state.threads == 0 || is_for_another && state.threads < MAX_THREADS {
            // Where the kernel refuses a thread, one that is there does it, or the next close tries again.
            let started = privileges::start_thread("anyport-close", privileges::for_others, || self.work());
            state.threads += usize::from(started.is_ok());
        }
        self.work.notify_one();
    }

    /// What a thread does until there has been nothing to do for a while.
    fn work(&self) {
        let mut state = self.state();
        let mut has_waited = false;
        loop {
            if let Some(Batch { sender, descriptors }) = state.next() {
                drop(state);
                drop(descriptors);
                state = self.state();
                state.done(sender);
                has_waited = false;
            } else if has_waited {
                state.threads -= 1;
                return;
            } else {
                state.idle += 1;
                let (woken, waited) = self.work.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
                state = woken;
                state.idle -= 1;
                has_waited = waited.timed_out();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{ErrorKind, Read as _, Write as _},
        net::{TcpListener, TcpStream},
        os::{fd::OwnedFd, unix::net::UnixStream},
        time::{Duration, Instant},
    };

    use socket2::SockRef;

    use super::{BATCHES_PER_USER, PassedFd, close, is_clogged};

    /// A socket whose last close lasts that long: its peer reads nothing.
    fn slow_to_close(listener: &TcpListener, linger: Duration) -> (OwnedFd, TcpStream) {
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        SockRef::from(&client).set_linger(Some(linger)).unwrap();
        client.set_nonblocking(true).unwrap();
        while client.write(&[0; 4096]).is_ok() {}
        (client.into(), server)
    }

    #[test]
    fn slow_closes_keep_nobody_else_waiting() {
        const LINGER: Duration = Duration::from_secs(3);
        let (slow, quick) = (4_000_000_001, 4_000_000_002);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let began = Instant::now();
        let mut peers = Vec::new();
        for _ in 0..BATCHES_PER_USER {
            assert!(!is_clogged(slow));
            let (socket, peer) = slow_to_close(&listener, LINGER);
            peers.push(peer);
            drop(PassedFd::new(socket, slow));
        }
        assert!(is_clogged(slow) && !is_clogged(quick));
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        close(quick, vec![ours.into()]);
        theirs.set_read_timeout(Some(LINGER)).unwrap();
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0, "another user's is closed at once");
        assert!(began.elapsed() < LINGER, "{:?}", began.elapsed());
        // With their peers gone nothing lingers.
        drop(peers);
        let end = Instant::now() + 4 * LINGER;
        while is_clogged(slow) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(!is_clogged(slow));
    }

    #[test]
    fn a_clone_stands_for_the_same_file() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let passed = PassedFd::new(ours, 4_000_000_003);
        let clone = passed.try_clone().unwrap();
        drop(passed);
        theirs.set_nonblocking(true).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(theirs.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
        drop(clone);
    }
}
