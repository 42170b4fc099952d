//! Moving data between a client and its upstream.
//!
//! An idle connection holds no buffer: what is there is read into a buffer of the worker and written at once, and only
//! what the peer does not take is kept. While something is kept nothing more is read, so that a slow reader slows its
//! peer down and memory stays bounded. Large transfers go through a pipe (splice(2)).

use std::{
    fmt, io,
    time::{Duration, Instant},
};

use super::pipe::Pipe;
use crate::service::{
    counts::Traffic,
    descriptors::DescriptorPool,
    event_loop::{Context, Next, Stream},
};

/// A pipe is used for a direction that has moved at least so many bytes ...
const PIPE_AFTER: u64 = 256 << 10;
/// ... and at least so many since it was last woken, or the time before. For less, two calls of splice(2) cost more than
/// the copy that they spare.
const PIPE_RUN: usize = 64 << 10;
/// Bytes that may be missing in the counts while a connection is open.
const UNCOUNTED: u64 = 1 << 20;
/// How often a direction reads before other connections are served.
const READS: u32 = 16;

/// How long a connection may last.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Without a word in either direction.
    pub(super) idle: Duration,
    /// In all.
    pub(super) end: Option<Instant>,
}

/// What became of a connection.
#[derive(Debug)]
pub(in crate::service) struct Outcome {
    /// Bytes of the client that the upstream's socket took.
    pub(in crate::service) to_upstream: u64,
    /// Bytes of the upstream that the client's socket took.
    pub(in crate::service) to_client: u64,
    /// Why it ended.
    pub(in crate::service) end: RelayEnd,
}

/// Why a connection ended.
#[derive(Debug)]
pub(in crate::service) enum RelayEnd {
    /// Both sides have said all they had to say.
    Closed,
    /// Nothing was said for too long.
    Idle,
    /// It lasted too long.
    TooLong,
    /// The client's side broke.
    Client(io::Error),
    /// The upstream's side broke.
    Upstream(io::Error),
}

impl fmt::Display for RelayEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("closed by both sides"),
            Self::Idle => f.write_str("closed as idle"),
            Self::TooLong => f.write_str("closed by its time limit"),
            Self::Client(error) => write!(f, "the client's side broke ({error})"),
            Self::Upstream(error) => write!(f, "the upstream's side broke ({error})"),
        }
    }
}

/// What an upstream gets before anything that its client says from now on.
#[derive(Debug, Default)]
pub(super) struct InitialData {
    pub(super) bytes: Vec<u8>,
    /// How many of them are ours.
    pub(super) header: usize,
    /// Whether the client has said all.
    pub(super) has_ended: bool,
}

/// The two directions of a connection.
#[derive(Debug)]
pub(super) struct Relay {
    up: Direction,
    down: Direction,
    /// Bytes in either direction that the counts of the upstream and of the service have.
    counted: (u64, u64),
    quiet: IdleTimer,
}

impl Relay {
    pub(super) fn new(first: InitialData, limits: Limits) -> Self {
        Self {
            up: Direction::new(first),
            down: Direction::new(InitialData::default()),
            counted: (0, 0),
            quiet: IdleTimer::new(limits),
        }
    }

    /// Moves data in both directions until nothing goes any more; how it has ended if both have ended or something broke.
    pub(super) fn advance(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut Stream,
        upstream: &mut Stream,
        pool: &DescriptorPool,
        traffic: [&Traffic; 2],
    ) -> Result<Next, RelayEnd> {
        let moved = self.advance_both(cx, client, upstream, pool);
        if self.uncounted() > UNCOUNTED || moved.is_err() {
            self.count(traffic);
        }
        moved
    }

    fn advance_both(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut Stream,
        upstream: &mut Stream,
        pool: &DescriptorPool,
    ) -> Result<Next, RelayEnd> {
        let Self { up, down, .. } = self;
        let next = up.advance(cx, client, upstream, down.has_ended(), pool).map_err(|fault| match fault {
            Fault::Source(error) => RelayEnd::Client(error),
            Fault::Sink(error) => RelayEnd::Upstream(error),
        })?;
        let other = down.advance(cx, upstream, client, up.has_ended(), pool).map_err(|fault| match fault {
            Fault::Source(error) => RelayEnd::Upstream(error),
            Fault::Sink(error) => RelayEnd::Client(error),
        })?;
        match (next, other) {
            _ if up.has_ended() && down.has_ended() => Err(RelayEnd::Closed),
            (Next::Wait, Next::Wait) => Ok(Next::Wait),
            _ => Ok(Next::Reschedule),
        }
    }

    /// When to look for silence next.
    pub(super) fn next_look(&self) -> Instant {
        self.quiet.next
    }

    /// Looks whether it has been silent for too long, or has lasted too long.
    pub(super) fn look(&mut self, traffic: [&Traffic; 2]) -> Result<(), RelayEnd> {
        let looked = self.quiet.look(self.up.moved + self.down.moved);
        if looked.is_err() {
            self.count(traffic);
        }
        looked
    }

    fn uncounted(&self) -> u64 {
        self.up.moved - self.counted.0 + self.down.moved - self.counted.1
    }

    fn count(&mut self, traffic: [&Traffic; 2]) {
        for traffic in traffic {
            traffic.add(self.up.moved - self.counted.0, self.down.moved - self.counted.1);
        }
        self.counted = (self.up.moved, self.down.moved);
    }

    /// What became of it, if it ends like this.
    pub(super) fn outcome(&self, end: RelayEnd) -> Outcome {
        Outcome { to_upstream: self.up.moved, to_client: self.down.moved, end }
    }
}

/// Reports when nothing has happened for too long, checking twice in that time.
#[derive(Debug)]
struct IdleTimer {
    limits: Limits,
    next: Instant,
    moved: u64,
    looks: u32,
}

impl IdleTimer {
    fn new(limits: Limits) -> Self {
        let mut quiet = Self { limits, next: Instant::now(), moved: 0, looks: 0 };
        quiet.schedule();
        quiet
    }

    fn schedule(&mut self) {
        let look = Instant::now() + self.limits.idle / 2;
        self.next = self.limits.end.map_or(look, |end| look.min(end));
    }

    fn look(&mut self, moved: u64) -> Result<(), RelayEnd> {
        if self.limits.end.is_some_and(|end| end <= Instant::now()) {
            return Err(RelayEnd::TooLong);
        }
        self.looks = if moved == self.moved { self.looks + 1 } else { 0 };
        self.moved = moved;
        // The first check without new data comes at least half the time after the last data, the second one all of it.
        if self.looks >= 2 {
            return Err(RelayEnd::Idle);
        }
        self.schedule();
        Ok(())
    }
}

/// Which socket failed.
enum Fault {
    Source(io::Error),
    Sink(io::Error),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// `kept` is to be sent together with what the source says, if that is there already.
    InitialData,
    Open,
    /// The source has said all.
    Flushing,
    Ended,
}

/// One direction.
#[derive(Debug)]
struct Direction {
    /// What the sink has not taken yet, from `sent` on.
    kept: Vec<u8>,
    sent: usize,
    pipe: Option<Box<Pipe>>,
    stage: Stage,
    /// Bytes of the source so far.
    moved: u64,
    /// Bytes moved when this last had something to move.
    run: usize,
}

impl Direction {
    fn new(InitialData { bytes, header, has_ended }: InitialData) -> Self {
        let stage = match bytes.is_empty() {
            _ if has_ended => Stage::Flushing,
            true => Stage::Open,
            false => Stage::InitialData,
        };
        let moved = (bytes.len() - header) as u64;
        Self { kept: bytes, sent: 0, pipe: None, stage, moved, run: 0 }
    }

    fn has_ended(&self) -> bool {
        self.stage == Stage::Ended
    }

    /// Moves as much as goes now. `is_last` says that the other direction has ended, so that the sockets will be closed
    /// when this one has.
    fn advance(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut Stream,
        to: &mut Stream,
        is_last: bool,
        pool: &DescriptorPool,
    ) -> Result<Next, Fault> {
        let before = self.moved;
        let mut next = Next::Reschedule;
        for _ in 0..READS {
            if self.stage != Stage::InitialData && !self.flush(cx, to).map_err(Fault::Sink)? {
                next = Next::Wait;
                break;
            }
            if self.stage == Stage::Flushing {
                if !is_last {
                    to.end().map_err(Fault::Sink)?;
                }
                self.stage = Stage::Ended;
            }
            if self.stage == Stage::Ended || !self.read(cx, from, to, before, pool)? {
                next = Next::Wait;
                break;
            }
        }
        if let Some(pipe) = self.pipe.take_if(|pipe| pipe.is_empty()) {
            pipe.give_back();
        }
        if self.moved > before {
            self.run = usize::try_from(self.moved - before).unwrap_or(usize::MAX);
        }
        Ok(next)
    }

    /// Reads once; whether there was anything. `before` is what was moved when it was woken.
    fn read(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut Stream,
        to: &mut Stream,
        before: u64,
        pool: &DescriptorPool,
    ) -> Result<bool, Fault> {
        let run = usize::try_from(self.moved - before).unwrap_or(usize::MAX);
        let is_bulk = self.moved >= PIPE_AFTER && (self.run >= PIPE_RUN || run >= PIPE_RUN);
        if self.pipe.is_none() && is_bulk && self.stage == Stage::Open {
            self.pipe = Pipe::take(pool);
        }
        let Some(pipe) = &mut self.pipe else { return self.copy(cx, from, to) };
        let filled = from.read_by(|from| pipe.fill(from)).map_err(Fault::Source)?;
        if let Some(read) = filled {
            self.account(read);
        }
        Ok(filled.is_some())
    }

    fn account(&mut self, read: usize) {
        self.moved += read as u64;
        self.stage = if read == 0 { Stage::Flushing } else { Stage::Open };
    }

    /// Whether nothing is kept any more.
    fn flush(&mut self, cx: &Context<'_>, to: &mut Stream) -> io::Result<bool> {
        while self.sent < self.kept.len() {
            match to.write(cx.watcher, &self.kept[self.sent..], self.stage == Stage::Flushing)? {
                None => return Ok(false),
                Some(written) => self.sent += written,
            }
        }
        if self.sent > 0 {
            (self.kept, self.sent) = (Vec::new(), 0);
        }
        while let Some(pipe) = self.pipe.as_mut().filter(|pipe| !pipe.is_empty()) {
            if to.write_by(cx.watcher, |to| pipe.drain(to))?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads into the worker's buffer, behind what goes first, and writes what the sink takes; keeps the rest. Whether
    /// there was anything.
    fn copy(&mut self, cx: &mut Context<'_>, from: &mut Stream, to: &mut Stream) -> Result<bool, Fault> {
        let first = self.kept.len();
        cx.buffer[..first].copy_from_slice(&self.kept);
        let mut length = first;
        while let Some(read) = from.read(&mut cx.buffer[length..]).map_err(Fault::Source)? {
            length += read;
            self.account(read);
            // The end that is known leaves with the last words.
            if read == 0 || length == cx.buffer.len() || !from.has_end() {
                break;
            }
        }
        if self.stage == Stage::InitialData {
            self.stage = Stage::Open;
        } else if length == first && self.stage == Stage::Open {
            return Ok(false);
        }
        let words = &cx.buffer[..length];
        let mut written = 0;
        while written < words.len() {
            match to.write(cx.watcher, &words[written..], self.stage == Stage::Flushing).map_err(Fault::Sink)? {
                None => break,
                Some(count) => written += count,
            }
        }
        self.kept = words[written..].to_vec();
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::SocketAddr,
        time::{Duration, Instant},
    };

    use nix::sys::epoll::EpollTimeout;
    use socket2::{SockRef, Socket};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
        sync::oneshot,
        task::{JoinHandle, spawn_blocking},
        time::{sleep, timeout},
    };

    use super::{Context, DescriptorPool, InitialData, Limits, Next, Outcome, Relay, RelayEnd, Stream, Traffic};
    use crate::service::event_loop::{Event, EventLoop, Machine, Side, reset};

    const LONG: Limits = Limits { idle: Duration::from_mins(1), end: None };
    const LARGE: usize = 32 << 20;

    /// A client, an upstream, and what runs between them.
    struct Line {
        client: TcpStream,
        upstream: TcpStream,
        relay: JoinHandle<Outcome>,
    }

    /// The connection that is in between, and who wants to know its end.
    struct Middle {
        client: Stream,
        upstream: Stream,
        relay: Relay,
        pool: DescriptorPool,
        traffic: Traffic,
        outcome: Option<oneshot::Sender<Outcome>>,
    }

    impl Machine for Middle {
        fn advance(&mut self, cx: &mut Context<'_>, event: Event) -> Next {
            let Self { client, upstream, relay, pool, traffic, outcome } = self;
            let next = match event {
                Event::TimerExpired => relay.look([traffic, &Traffic::default()]).map(|()| Next::Wait),
                Event::Ready(side, flags) => {
                    let stream = if side == Side::Client { &mut *client } else { &mut *upstream };
                    stream.note(flags);
                    relay.advance(cx, client, upstream, pool, [traffic, &Traffic::default()])
                }
                Event::Start => {
                    client.watch(cx.watcher).unwrap();
                    upstream.watch(cx.watcher).unwrap();
                    relay.advance(cx, client, upstream, pool, [traffic, &Traffic::default()])
                }
                Event::Rescheduled => relay.advance(cx, client, upstream, pool, [traffic, &Traffic::default()]),
            };
            if matches!(event, Event::Start | Event::TimerExpired) {
                cx.wake_at(relay.next_look());
            }
            next.unwrap_or_else(|end| {
                if matches!(end, RelayEnd::Client(_) | RelayEnd::Upstream(_)) {
                    reset(client);
                    reset(upstream);
                }
                outcome.take().unwrap().send(relay.outcome(end)).unwrap();
                Next::Close
            })
        }
    }

    fn stream(stream: TcpStream, wrap: fn(Socket) -> Stream) -> Stream {
        wrap(stream.into_std().unwrap().into())
    }

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let (there, here) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        let (there, here) = (there.unwrap(), here.unwrap().0);
        for stream in [&there, &here] {
            // The kernel itself may hold as much as the tests send, by net.ipv4.tcp_rmem.
            SockRef::from(stream).set_recv_buffer_size(256 << 10).unwrap();
        }
        (there, here)
    }

    async fn line(first: &'static [u8], limits: Limits, pool: DescriptorPool) -> Line {
        let ((client, inner_client), (upstream, inner_upstream)) = (pair().await, pair().await);
        let first = InitialData { bytes: first.to_vec(), header: first.len(), has_ended: false };
        let (sender, receiver) = oneshot::channel();
        let middle = Middle {
            client: stream(inner_client, Stream::accepted),
            upstream: stream(inner_upstream, Stream::unconnected),
            relay: Relay::new(first, limits),
            pool,
            traffic: Traffic::default(),
            outcome: Some(sender),
        };
        let relay = tokio::spawn(async move {
            spawn_blocking(move || serve(middle)).await.unwrap();
            receiver.await.unwrap()
        });
        Line { client, upstream, relay }
    }

    /// Serves it to its end.
    fn serve(middle: Middle) {
        let mut events = EventLoop::new().unwrap();
        events.start(middle);
        while !events.is_empty() {
            let timeout = if events.wants_turn() { EpollTimeout::ZERO } else { EpollTimeout::from(5_u8) };
            events.turn(timeout).unwrap();
        }
    }

    /// Bytes in which each place can be told from others nearby.
    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at ^ (at >> 8) ^ (at >> 16)).to_le_bytes()[0]).collect()
    }

    async fn rest(stream: &mut TcpStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await.unwrap();
        bytes
    }

    #[tokio::test]
    async fn each_side_may_end_first() {
        for is_swapped in [false, true] {
            let Line { client, upstream, relay } = line(b"", LONG, DescriptorPool::new(0)).await;
            let (mut one, mut other) = if is_swapped { (upstream, client) } else { (client, upstream) };
            one.write_all(b"question").await.unwrap();
            one.shutdown().await.unwrap();
            assert_eq!(rest(&mut other).await, b"question");
            for _ in 0..3 {
                other.write_all(b"answer").await.unwrap();
                sleep(Duration::from_millis(5)).await;
            }
            other.shutdown().await.unwrap();
            assert_eq!(rest(&mut one).await, b"answeransweranswer");
            let outcome = relay.await.unwrap();
            assert!(matches!(outcome.end, RelayEnd::Closed), "{outcome:?}");
            let expected = if is_swapped { (18, 8) } else { (8, 18) };
            assert_eq!((outcome.to_upstream, outcome.to_client), expected);
        }
    }

    #[tokio::test]
    async fn the_first_words_come_first() {
        let Line { mut client, mut upstream, relay } = line(b"header ", LONG, DescriptorPool::new(0)).await;
        let mut header = [0; 7];
        upstream.read_exact(&mut header).await.unwrap();
        assert_eq!(&header, b"header ");
        client.write_all(b"words").await.unwrap();
        client.shutdown().await.unwrap();
        assert_eq!(rest(&mut upstream).await, b"words");
        drop(upstream);
        assert_eq!(rest(&mut client).await, b"");
        assert_eq!(relay.await.unwrap().to_upstream, 5, "the header is not counted");
    }

    /// Both directions at once, with and without pipes.
    #[tokio::test]
    async fn large_transfers_arrive_as_they_were() {
        let sent = pattern(LARGE);
        for descriptors in [100, 0] {
            let Line { client, upstream, relay } = line(b"", LONG, DescriptorPool::new(descriptors)).await;
            let talk = async |stream: TcpStream| {
                let (mut reader, mut writer) = stream.into_split();
                let sent = sent.clone();
                let writing = tokio::spawn(async move {
                    writer.write_all(&sent).await.unwrap();
                    writer.shutdown().await.unwrap();
                });
                let mut received = Vec::new();
                reader.read_to_end(&mut received).await.unwrap();
                writing.await.unwrap();
                received
            };
            let (to_client, to_upstream) = tokio::join!(talk(client), talk(upstream));
            assert!(to_client == sent && to_upstream == sent);
            let outcome = relay.await.unwrap();
            assert_eq!((outcome.to_upstream, outcome.to_client), (LARGE as u64, LARGE as u64));
        }
    }

    #[tokio::test]
    async fn a_slow_reader_slows_its_peer_down() {
        for descriptors in [100, 0] {
            let Line { mut client, mut upstream, relay } = line(b"", LONG, DescriptorPool::new(descriptors)).await;
            let sent = pattern(LARGE);
            let mut taken = 0;
            let full = async {
                while taken < LARGE {
                    taken += client.write(&sent[taken..]).await.unwrap();
                }
            };
            timeout(Duration::from_secs(1), full).await.ok();
            assert!(taken < LARGE, "all of it was taken though nobody reads");
            let received = tokio::spawn(async move { rest(&mut upstream).await });
            client.write_all(&sent[taken..]).await.unwrap();
            client.shutdown().await.unwrap();
            assert!(received.await.unwrap() == sent);
            assert!(matches!(relay.await.unwrap().end, RelayEnd::Closed));
        }
    }

    #[tokio::test]
    async fn what_breaks_on_one_side_is_reset_on_the_other() {
        for is_swapped in [false, true] {
            let Line { client, upstream, relay } = line(b"", LONG, DescriptorPool::new(100)).await;
            let (one, mut other) = if is_swapped { (upstream, client) } else { (client, upstream) };
            reset(&one);
            drop(one);
            let error = other.read_u8().await.unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
            match relay.await.unwrap().end {
                RelayEnd::Client(_) => assert!(!is_swapped),
                RelayEnd::Upstream(_) => assert!(is_swapped),
                end => panic!("{end}"),
            }
        }
    }

    #[tokio::test]
    async fn silence_ends_a_connection_and_words_keep_it() {
        const IDLE: Duration = Duration::from_millis(400);
        let limits = Limits { idle: IDLE, end: None };
        let Line { mut client, mut upstream, relay } = line(b"", limits, DescriptorPool::new(0)).await;
        for _ in 0..8 {
            sleep(IDLE / 4).await;
            client.write_all(b"x").await.unwrap();
        }
        let last_word = Instant::now();
        assert_eq!(rest(&mut upstream).await, b"xxxxxxxx");
        assert!(last_word.elapsed() >= IDLE * 9 / 10);
        assert!(matches!(relay.await.unwrap().end, RelayEnd::Idle));
        assert_eq!(rest(&mut client).await, b"");
    }

    #[tokio::test]
    async fn a_connection_has_its_time() {
        let limits = Limits { idle: Duration::from_mins(1), end: Some(Instant::now() + Duration::from_millis(100)) };
        let Line { mut client, relay, .. } = line(b"", limits, DescriptorPool::new(0)).await;
        assert_eq!(rest(&mut client).await, b"");
        assert!(matches!(relay.await.unwrap().end, RelayEnd::TooLong));
    }
}
