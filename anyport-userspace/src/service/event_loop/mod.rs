//! The loop in which a worker serves its connections.
//!
//! Each connection is a small state machine that is told what has happened and goes as far as it can. There is no task,
//! no timer and no allocation of its own for any of the waits.

mod slab;
mod stream;
mod timers;

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    time::Instant,
};

use nix::{
    errno::Errno,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
};

pub(super) use self::stream::{Side, Stream, reset};
use self::{
    slab::{Key, Slab},
    stream::Watcher,
    timers::{Expiry, Timers},
};

/// What is taken from the kernel at once.
const BATCH: usize = 256;
/// Bytes of the worker's buffer.
pub(in crate::service) const SCRATCH: usize = 64 << 10;

/// What has happened to a connection.
#[derive(Clone, Copy, Debug)]
pub(in crate::service) enum Event {
    /// It has come.
    Start,
    /// The kernel tells this about one of its sockets.
    Ready(Side, EpollFlags),
    /// It was rescheduled, as it has asked.
    Rescheduled,
    /// The time has come that it has asked for.
    TimerExpired,
    /// Upstreams have left: they are down, or were taken out.
    UpstreamLeft,
}

/// What a connection wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::service) enum Next {
    /// To wait.
    Wait,
    /// To be rescheduled: to go on after other connections.
    Reschedule,
    /// To be closed.
    Close,
}

/// A connection.
pub(in crate::service) trait Machine {
    /// Goes as far as it can.
    fn advance(&mut self, cx: &mut Context<'_>, event: Event) -> Next;
}

/// What a connection works with.
#[derive(Debug)]
pub(in crate::service) struct Context<'a> {
    pub(in crate::service) watcher: Watcher<'a>,
    /// For what is read and written at once.
    pub(in crate::service) buffer: &'a mut [u8],
    timers: &'a mut Timers,
    due: &'a mut Option<Expiry>,
}

impl Context<'_> {
    /// Asks for [`Event::TimerExpired`] at this time, or a little later, and no other.
    pub(in crate::service) fn wake_at(&mut self, at: Instant) {
        self.timers.set(self.watcher.key, self.due, at);
    }
}

/// The connections of a worker.
#[derive(Debug)]
pub(in crate::service) struct EventLoop<M> {
    epoll: Epoll,
    connections: Slab<Entry<M>>,
    timers: Timers,
    /// Those that have asked to be rescheduled.
    turns: Vec<Key>,
    buffer: Box<[u8]>,
}

#[derive(Debug)]
struct Entry<M> {
    machine: M,
    due: Option<Expiry>,
    wants_turn: bool,
}

impl<M: Machine> EventLoop<M> {
    /// A loop without connections.
    ///
    /// # Errors
    /// The kernel's, such as that there is no descriptor left.
    pub(in crate::service) fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            connections: Slab::default(),
            timers: Timers::new(),
            turns: Vec::new(),
            buffer: vec![0; SCRATCH].into(),
        })
    }

    /// Serves a connection from now on.
    pub(in crate::service) fn start(&mut self, machine: M) {
        let key = self.connections.insert(Entry { machine, due: None, wants_turn: false });
        self.advance(key, Event::Start);
    }

    /// Tells connections what has happened, or happens within `timeout`. Whether there may be more at once.
    ///
    /// # Errors
    /// The kernel's.
    pub(in crate::service) fn turn(&mut self, timeout: EpollTimeout) -> io::Result<bool> {
        let mut events = [EpollEvent::empty(); BATCH];
        let count = match self.epoll.wait(&mut events, timeout) {
            Err(Errno::EINTR) => 0,
            count => count?,
        };
        let turns = std::mem::take(&mut self.turns);
        for event in &events[..count] {
            let (key, is_upstream) = Key::unpack(event.data());
            let side = if is_upstream { Side::Upstream } else { Side::Client };
            self.advance(key, Event::Ready(side, event.events()));
        }
        for key in turns {
            if let Some(entry) = self.connections.get_mut(key) {
                entry.wants_turn = false;
                self.advance(key, Event::Rescheduled);
            }
        }
        if self.timers.next().is_some() {
            let now = Instant::now();
            while let Some(key) = self.timers.take_due(now) {
                if let Some(entry) = self.connections.get_mut(key) {
                    entry.due = None;
                    self.advance(key, Event::TimerExpired);
                }
            }
        }
        Ok(count == BATCH || self.wants_turn())
    }

    /// Tells all connections.
    pub(in crate::service) fn tell_all(&mut self, event: Event) {
        let keys: Vec<Key> = self.connections.keys().collect();
        for key in keys {
            self.advance(key, event);
        }
    }

    /// Whether a connection has asked to be rescheduled.
    pub(in crate::service) fn wants_turn(&self) -> bool {
        !self.turns.is_empty()
    }

    /// When there is something to do at the latest.
    pub(in crate::service) fn next_due(&self) -> Option<Instant> {
        self.timers.next()
    }

    fn advance(&mut self, key: Key, event: Event) {
        let Self { epoll, connections, timers, turns, buffer } = self;
        // It may have ended since that happened.
        let Some(Entry { machine, due, wants_turn }) = connections.get_mut(key) else { return };
        let mut cx = Context { watcher: Watcher { epoll, key }, buffer, timers, due };
        match machine.advance(&mut cx, event) {
            Next::Wait => {}
            Next::Reschedule if *wants_turn => {}
            Next::Reschedule => {
                *wants_turn = true;
                turns.push(key);
            }
            Next::Close => {
                let entry = connections.remove(key);
                timers.clear(key, entry.and_then(|entry| entry.due));
            }
        }
    }

    #[cfg(test)]
    pub(in crate::service) fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }
}

impl<M> AsFd for EventLoop<M> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        os::{fd::OwnedFd, unix::net::UnixStream},
        sync::mpsc::{Sender, channel},
        time::{Duration, Instant},
    };

    use nix::sys::epoll::EpollTimeout;
    use socket2::Socket;

    use super::{Context, Event, EventLoop, Machine, Next, Stream};

    /// Tells what happens to it.
    struct Probe {
        name: &'static str,
        stream: Stream,
        answer: Next,
        told: Sender<String>,
    }

    impl Machine for Probe {
        fn advance(&mut self, cx: &mut Context<'_>, event: Event) -> Next {
            let what = match event {
                Event::Start => {
                    self.stream.watch(cx.watcher).unwrap();
                    cx.wake_at(Instant::now() + Duration::from_millis(40));
                    return Next::Wait;
                }
                Event::Ready(..) => "ready",
                Event::UpstreamLeft => "left",
                Event::Rescheduled => "turn",
                Event::TimerExpired => "due",
            };
            self.told.send(format!("{} {what}", self.name)).unwrap();
            self.answer
        }
    }

    fn probe(name: &'static str, answer: Next, told: &Sender<String>) -> (Probe, UnixStream, OwnedFd) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let duplicate = ours.try_clone().unwrap().into();
        let stream = Stream::accepted(Socket::from(OwnedFd::from(ours)));
        (Probe { name, stream, answer, told: told.clone() }, theirs, duplicate)
    }

    #[test]
    fn what_concerns_one_that_is_gone_reaches_nobody() {
        let (told, tales) = channel();
        let mut events = EventLoop::new().unwrap();
        // While there is a duplicate the kernel goes on watching a socket that was closed.
        let (first, mut peer, _duplicate) = probe("first", Next::Close, &told);
        events.start(first);
        peer.write_all(b"x").unwrap();
        assert!(!events.turn(EpollTimeout::from(1000_u16)).unwrap());
        assert!(events.is_empty());
        let (second, _peer, _duplicate) = probe("second", Next::Wait, &told);
        events.start(second);
        peer.write_all(b"x").unwrap();
        events.turn(EpollTimeout::from(1000_u16)).unwrap();
        assert_eq!(tales.try_iter().collect::<Vec<_>>(), ["first ready"]);
        let start = Instant::now();
        while tales.try_recv().map_or(true, |tale| tale != "second due") {
            events.turn(EpollTimeout::from(5_u16)).unwrap();
            assert!(start.elapsed() < Duration::from_secs(5), "its own time comes");
        }
        assert_eq!(events.next_due(), None);
    }

    #[test]
    fn a_turn_is_given_once_however_often_it_is_asked_for() {
        let (told, tales) = channel();
        let mut events = EventLoop::new().unwrap();
        let (greedy, mut peer, _duplicate) = probe("greedy", Next::Reschedule, &told);
        events.start(greedy);
        for _ in 0..3 {
            peer.write_all(b"x").unwrap();
            assert!(events.turn(EpollTimeout::ZERO).unwrap(), "there is more to do");
        }
        let tales: Vec<_> = tales.try_iter().filter(|tale| tale != "greedy due").collect();
        assert_eq!(tales, ["greedy ready", "greedy ready", "greedy turn", "greedy ready", "greedy turn"]);
    }
}
