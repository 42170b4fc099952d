//! Conversations of the handlers `hello`, `echo` and `discard`.

use std::{
    io,
    mem::MaybeUninit,
    time::{Duration, Instant},
};

use anyport_common::flow::Transport;
use socket2::Socket;

use crate::{
    datagram::Ends,
    service::{
        HandlerKind, ServiceConfig,
        counts::Traffic,
        event_loop::{Context, Event, Next, Stream},
        handlers::TextLine,
    },
};

/// A connection over which nothing was said for this long is closed, at the earliest after half of it.
const IDLE_LIMIT: Duration = Duration::from_mins(5);
/// How long to listen after the last word, so that the client gets it: closing a connection with unread data resets
/// it, and the client's kernel may then throw away what we said.
const LINGER_LIMIT: Duration = Duration::from_secs(1);
/// How much to listen to after the last word, in bytes.
const LINGER_BYTES: u64 = 64 << 10;
/// Most bytes that an echo reads at once, and holds for a connection.
const ECHO_CHUNK: usize = 16 << 10;
/// Most bytes forgotten at once.
const FORGET_CHUNK: usize = 16 << 10;
/// Reads of a connection before others are served.
const READS: usize = 16;
/// Bytes that may be missing in the service's counts while a connection is open.
const UNCOUNTED: u64 = 1 << 20;

/// A conversation with one client.
#[derive(Debug)]
pub(super) struct BuiltinHandler {
    stream: Stream,
    /// What the client has not taken yet.
    kept: Box<[u8]>,
    /// How much of it it has.
    sent: usize,
    /// What it has said, in bytes.
    heard: u64,
    /// What was sent to it, in bytes.
    said: u64,
    /// Of these, what the service's counts have.
    counted: (u64, u64),
    /// Of both, when it was last looked whether anything is said.
    seen: Option<u64>,
    /// How long after its beginning, or the last time, that is.
    interval: Duration,
}

/// What a conversation wants next, or how it has ended.
type Step = Result<Next, io::Result<()>>;

impl BuiltinHandler {
    pub(super) fn new(config: &ServiceConfig, socket: Socket, ends: Ends) -> Self {
        let kept = match config.handler {
            HandlerKind::Hello => TextLine::hello(ends.client, ends.dialled, Transport::Tcp).as_bytes().into(),
            HandlerKind::Discard => config.banner.as_deref().unwrap_or_default().as_bytes().into(),
            // Echo has nothing to say, and the others are served elsewhere.
            HandlerKind::Echo | HandlerKind::Forward | HandlerKind::Registered => Box::default(),
        };
        let interval = if config.handler == HandlerKind::Hello { LINGER_LIMIT } else { IDLE_LIMIT / 2 };
        Self {
            stream: Stream::accepted(socket),
            kept,
            sent: 0,
            heard: 0,
            said: 0,
            counted: (0, 0),
            seen: None,
            interval,
        }
    }

    /// Bytes of the client, and bytes to it.
    pub(super) fn bytes(&self) -> (u64, u64) {
        (self.heard, self.said)
    }

    /// Goes as far as it can.
    pub(super) fn advance(&mut self, kind: HandlerKind, cx: &mut Context<'_>, event: Event, traffic: &Traffic) -> Step {
        let step = self.try_advance(kind, cx, event);
        let (heard, said) = (self.heard - self.counted.0, self.said - self.counted.1);
        if step.is_err() || heard + said > UNCOUNTED {
            traffic.add(heard, said);
            self.counted = self.bytes();
        }
        step
    }

    fn try_advance(&mut self, kind: HandlerKind, cx: &mut Context<'_>, event: Event) -> Step {
        match event {
            Event::Ready(_, flags) => self.stream.note(flags),
            Event::TimerExpired => self.look(kind, cx)?,
            Event::UpstreamLeft => return Ok(Next::Wait),
            Event::Start | Event::Rescheduled => {}
        }
        let next = self.speak(kind, cx)?;
        if matches!(event, Event::Start) {
            // Many have ended by now, and need not be watched.
            self.stream.watch(cx.watcher).map_err(Err)?;
            cx.wake_at(Instant::now() + self.interval);
        }
        Ok(next)
    }

    fn speak(&mut self, kind: HandlerKind, cx: &mut Context<'_>) -> Step {
        for _ in 0..READS {
            if !self.flush(kind, cx).map_err(Err)? {
                return Ok(Next::Wait);
            }
            let heard = match kind {
                HandlerKind::Echo => self.echo(cx),
                _ => self.forget(),
            };
            match heard.map_err(Err)? {
                None => return Ok(Next::Wait),
                Some(0) => return Err(Ok(())),
                Some(length) => self.heard += length as u64,
            }
            if kind == HandlerKind::Hello && self.heard >= LINGER_BYTES {
                return Err(Ok(()));
            }
        }
        Ok(Next::Reschedule)
    }

    /// Whether the client has taken all that there is for it.
    fn flush(&mut self, kind: HandlerKind, cx: &Context<'_>) -> io::Result<bool> {
        let is_last = kind == HandlerKind::Hello;
        while self.sent < self.kept.len() {
            match self.stream.write(cx.watcher, &self.kept[self.sent..], is_last)? {
                None => return Ok(false),
                Some(length) => {
                    self.sent += length;
                    self.said += length as u64;
                }
            }
        }
        if self.sent > 0 {
            (self.kept, self.sent) = (Box::default(), 0);
            if is_last {
                self.stream.end()?;
            }
        }
        Ok(true)
    }

    /// Hears something, and repeats as much of it as the client takes.
    fn echo(&mut self, cx: &mut Context<'_>) -> io::Result<Option<usize>> {
        let chunk = &mut cx.buffer[..ECHO_CHUNK];
        let Some(length) = self.stream.read(chunk)? else { return Ok(None) };
        let mut said = 0;
        while said < length {
            match self.stream.write(cx.watcher, &chunk[said..length], false)? {
                None => break,
                Some(count) => said += count,
            }
        }
        self.said += said as u64;
        self.kept = chunk[said..length].into();
        Ok(Some(length))
    }

    /// Drops what has arrived.
    fn forget(&mut self) -> io::Result<Option<usize>> {
        // With MSG_TRUNC the kernel drops what TCP has received instead of copying it here.
        let mut nowhere = [MaybeUninit::uninit(); FORGET_CHUNK];
        self.stream.read_by(|socket| socket.recv_with_flags(&mut nowhere, libc::MSG_TRUNC))
    }

    /// Ends it when it has lasted too long, or nothing was said for too long.
    fn look(&mut self, kind: HandlerKind, cx: &mut Context<'_>) -> Result<(), io::Result<()>> {
        if kind == HandlerKind::Hello {
            return Err(Ok(()));
        }
        let seen = Some(self.heard + self.said);
        if self.seen == seen {
            return Err(Err(io::ErrorKind::TimedOut.into()));
        }
        self.seen = seen;
        cx.wake_at(Instant::now() + self.interval);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{self, Read as _, Write as _},
        net::{TcpListener, TcpStream},
        sync::mpsc::{Receiver, Sender, channel},
        thread::{self, sleep},
        time::{Duration, Instant},
    };

    use nix::sys::epoll::EpollTimeout;

    use super::{BuiltinHandler, Context, Ends, Event, HandlerKind, Next, ServiceConfig, Traffic};
    use crate::service::event_loop::{EventLoop, Machine};

    const INTERVAL: Duration = Duration::from_millis(200);

    struct Speaker(BuiltinHandler, Sender<io::Result<()>>);

    impl Machine for Speaker {
        fn advance(&mut self, cx: &mut Context<'_>, event: Event) -> Next {
            let Self(builtin, ended) = self;
            builtin.advance(HandlerKind::Echo, cx, event, &Traffic::default()).unwrap_or_else(|end| {
                ended.send(end).unwrap();
                Next::Close
            })
        }
    }

    /// A client of an echo with a short interval, and how that ends.
    fn echo() -> (TcpStream, Receiver<io::Result<()>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        accepted.set_nonblocking(true).unwrap();
        let ends = Ends { client: client.local_addr().unwrap(), dialled: client.peer_addr().unwrap() };
        let config = ServiceConfig::new("test".parse().unwrap(), HandlerKind::Echo);
        let builtin = BuiltinHandler { interval: INTERVAL, ..BuiltinHandler::new(&config, accepted.into(), ends) };
        let (sender, ended) = channel();
        thread::spawn(move || {
            let mut events = EventLoop::new().unwrap();
            events.start(Speaker(builtin, sender));
            while !events.is_empty() {
                events.turn(EpollTimeout::from(5_u8)).unwrap();
            }
        });
        (client, ended)
    }

    #[test]
    fn silence_ends_a_conversation_and_words_keep_it() {
        let (mut client, ended) = echo();
        let start = Instant::now();
        for _ in 0..10 {
            client.write_all(b"x").unwrap();
            client.read_exact(&mut [0]).unwrap();
            sleep(INTERVAL / 3);
        }
        assert!(ended.try_recv().is_err(), "it lasts");
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        assert!(start.elapsed() >= INTERVAL * 4);
        assert_eq!(ended.recv().unwrap().unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn the_clients_end_ends_it() {
        let (client, ended) = echo();
        drop(client);
        ended.recv().unwrap().unwrap();
    }
}
