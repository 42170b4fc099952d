//! Moving data between a client and its upstream.
//!
//! An idle connection holds no buffer: what is there is read into a buffer of the worker and written at once, and only
//! what the peer does not take is kept. While something is kept nothing more is read, so that a slow reader slows its
//! peer down and memory stays bounded. Large transfers go through a pipe (splice(2)).

use std::{
    cell::RefCell,
    fmt,
    future::poll_fn,
    io,
    net::Shutdown,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    io::{AsyncRead as _, AsyncWrite as _, Interest, ReadBuf},
    net::TcpStream,
    time::{Instant, sleep_until},
};

use super::{pipe::Pipe, upstream::Traffic};
use crate::service::descriptors::DescriptorPool;

/// Bytes of the worker's buffer: what is read at once, and the most that is kept for a peer that takes nothing.
const SCRATCH: usize = 64 << 10;
/// A pipe is used for a direction that has moved at least so many bytes ...
const PIPE_AFTER: u64 = 256 << 10;
/// ... and at least so many since it was last woken, or the time before. For less, two calls of splice(2) cost more than
/// the copy that they spare.
const PIPE_RUN: usize = 64 << 10;
/// Bytes that may be missing in the upstream's counts while a connection is open.
const UNCOUNTED: u64 = 1 << 20;

thread_local! {
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; SCRATCH].into());
}

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
    pub(in crate::service) end: End,
}

/// Why a connection ended.
#[derive(Debug)]
pub(in crate::service) enum End {
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

impl fmt::Display for End {
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

/// Moves data in both directions until both have ended or something breaks. `first` is what the upstream gets before
/// anything that the client says from now on; `header` bytes of it are ours. If one side breaks, the other one is reset,
/// so that nobody takes a part for the whole.
pub(super) async fn relay(
    mut client: TcpStream,
    mut upstream: TcpStream,
    first: Vec<u8>,
    header: usize,
    limits: Limits,
    pool: &DescriptorPool,
    traffic: &Traffic,
) -> Outcome {
    let mut up = Way::new(first, header);
    let mut down = Way::new(Vec::new(), 0);
    let mut counted = (0, 0);
    let mut quiet = Quiet::new(limits);
    let mut timer = pin!(sleep_until(quiet.next));
    let end = poll_fn(|cx| {
        if let Poll::Ready(end) = poll_both(cx, &mut client, &mut upstream, (&mut up, &mut down), pool) {
            return Poll::Ready(end);
        }
        let moved = (up.moved, down.moved);
        if moved.0 - counted.0 + moved.1 - counted.1 > UNCOUNTED {
            traffic.add(moved.0 - counted.0, moved.1 - counted.1);
            counted = moved;
        }
        while timer.as_mut().poll(cx).is_ready() {
            if let Some(end) = quiet.look(moved.0 + moved.1) {
                return Poll::Ready(end);
            }
            timer.as_mut().reset(quiet.next);
        }
        Poll::Pending
    })
    .await;
    traffic.add(up.moved - counted.0, down.moved - counted.1);
    if matches!(end, End::Client(_) | End::Upstream(_)) {
        reset(&client);
        reset(&upstream);
    }
    Outcome { to_upstream: up.moved, to_client: down.moved, end }
}

/// Has the kernel reset the connection when it is closed.
pub(super) fn reset(stream: &TcpStream) {
    // It fails on a connection that is gone already.
    SockRef::from(stream).set_linger(Some(Duration::ZERO)).ok();
}

fn poll_both(
    cx: &mut Context<'_>,
    client: &mut TcpStream,
    upstream: &mut TcpStream,
    (up, down): (&mut Way, &mut Way),
    pool: &DescriptorPool,
) -> Poll<End> {
    match up.poll(cx, client, upstream, down.has_ended(), pool) {
        Err(Fault::Source(error)) => return Poll::Ready(End::Client(error)),
        Err(Fault::Sink(error)) => return Poll::Ready(End::Upstream(error)),
        Ok(()) => {}
    }
    match down.poll(cx, upstream, client, up.has_ended(), pool) {
        Err(Fault::Source(error)) => return Poll::Ready(End::Upstream(error)),
        Err(Fault::Sink(error)) => return Poll::Ready(End::Client(error)),
        Ok(()) => {}
    }
    if up.has_ended() && down.has_ended() { Poll::Ready(End::Closed) } else { Poll::Pending }
}

/// Tells when nothing has happened for too long, looking twice in that time.
struct Quiet {
    limits: Limits,
    next: Instant,
    moved: u64,
    looks: u32,
}

impl Quiet {
    fn new(limits: Limits) -> Self {
        let mut quiet = Self { limits, next: Instant::now(), moved: 0, looks: 0 };
        quiet.schedule();
        quiet
    }

    fn schedule(&mut self) {
        let look = Instant::now() + self.limits.idle / 2;
        self.next = self.limits.end.map_or(look, |end| look.min(end));
    }

    fn look(&mut self, moved: u64) -> Option<End> {
        if self.limits.end.is_some_and(|end| end <= Instant::now()) {
            return Some(End::TooLong);
        }
        self.looks = if moved == self.moved { self.looks + 1 } else { 0 };
        self.moved = moved;
        // The first quiet look comes half the time after the last word at least, the second one all of it.
        if self.looks >= 2 {
            return Some(End::Idle);
        }
        self.schedule();
        None
    }
}

/// Which socket failed.
enum Fault {
    Source(io::Error),
    Sink(io::Error),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// `kept` is to be sent together with what the source says, if that is there already.
    First,
    Open,
    /// The source has said all.
    Flushing,
    Ended,
}

/// One direction.
struct Way {
    /// What the sink has not taken yet, from `sent` on.
    kept: Vec<u8>,
    sent: usize,
    pipe: Option<Pipe>,
    stage: Stage,
    /// Bytes of the source so far.
    moved: u64,
    /// Bytes moved when this was last woken and had something to move.
    run: usize,
}

impl Way {
    fn new(first: Vec<u8>, header: usize) -> Self {
        let stage = if first.is_empty() { Stage::Open } else { Stage::First };
        let moved = (first.len() - header) as u64;
        Self { kept: first, sent: 0, pipe: None, stage, moved, run: 0 }
    }

    fn has_ended(&self) -> bool {
        self.stage == Stage::Ended
    }

    /// Moves as much as goes now. `is_last` says that the other direction has ended, so that the sockets will be closed
    /// when this one has.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut TcpStream,
        to: &mut TcpStream,
        is_last: bool,
        pool: &DescriptorPool,
    ) -> Result<(), Fault> {
        let before = self.moved;
        while self.stage != Stage::Ended {
            if self.stage != Stage::First && self.poll_flush(cx, to)?.is_pending() {
                break;
            }
            if self.stage == Stage::Flushing {
                if !is_last {
                    end(to)?;
                }
                self.stage = Stage::Ended;
                break;
            }
            let run = usize::try_from(self.moved - before).unwrap_or(usize::MAX);
            let is_bulk = self.moved >= PIPE_AFTER && (self.run >= PIPE_RUN || run >= PIPE_RUN);
            if self.pipe.is_none() && is_bulk && self.stage == Stage::Open {
                self.pipe = Pipe::take(pool);
            }
            let progress = match &mut self.pipe {
                Some(pipe) => poll_fill(cx, from, pipe).map_err(Fault::Source)?.map(|read| self.account(read)),
                None => self.poll_copy(cx, from, to)?,
            };
            if progress.is_pending() {
                break;
            }
        }
        if let Some(pipe) = self.pipe.take_if(|pipe| pipe.is_empty()) {
            pipe.give_back();
        }
        if self.moved > before {
            self.run = usize::try_from(self.moved - before).unwrap_or(usize::MAX);
        }
        Ok(())
    }

    fn account(&mut self, read: usize) {
        self.moved += read as u64;
        self.stage = if read == 0 { Stage::Flushing } else { Stage::Open };
    }

    /// Ready when nothing is kept any more.
    fn poll_flush(&mut self, cx: &mut Context<'_>, to: &mut TcpStream) -> Result<Poll<()>, Fault> {
        while self.sent < self.kept.len() {
            match Pin::new(&mut *to).poll_write(cx, &self.kept[self.sent..]) {
                Poll::Pending => return Ok(Poll::Pending),
                Poll::Ready(written) => self.sent += written.map_err(Fault::Sink)?,
            }
        }
        if self.sent > 0 {
            (self.kept, self.sent) = (Vec::new(), 0);
        }
        while let Some(pipe) = self.pipe.as_mut().filter(|pipe| !pipe.is_empty()) {
            if poll_drain(cx, pipe, to).map_err(Fault::Sink)?.is_pending() {
                return Ok(Poll::Pending);
            }
        }
        Ok(Poll::Ready(()))
    }

    /// Reads into the worker's buffer, behind what goes first, and writes what the sink takes; keeps the rest. Pending if
    /// the source has nothing to say.
    fn poll_copy(&mut self, cx: &mut Context<'_>, from: &mut TcpStream, to: &mut TcpStream) -> Result<Poll<()>, Fault> {
        BUFFER.with_borrow_mut(|buffer| {
            let mut buffer = ReadBuf::new(buffer);
            buffer.put_slice(&self.kept);
            let first = self.kept.len();
            match Pin::new(from).poll_read(cx, &mut buffer) {
                Poll::Pending if first == 0 => return Ok(Poll::Pending),
                Poll::Pending => self.stage = Stage::Open,
                Poll::Ready(read) => {
                    read.map_err(Fault::Source)?;
                    self.account(buffer.filled().len() - first);
                }
            }
            let words = buffer.filled();
            let mut written = 0;
            while written < words.len() {
                match Pin::new(&mut *to).poll_write(cx, &words[written..]) {
                    Poll::Pending => break,
                    Poll::Ready(count) => written += count.map_err(Fault::Sink)?,
                }
            }
            self.kept = words[written..].to_vec();
            Ok(Poll::Ready(()))
        })
    }
}

fn poll_fill(cx: &mut Context<'_>, from: &TcpStream, pipe: &mut Pipe) -> io::Result<Poll<usize>> {
    poll_io(|| {
        ready!(from.poll_read_ready(cx))?;
        Poll::Ready(from.try_io(Interest::READABLE, || pipe.fill(from)))
    })
}

fn poll_drain(cx: &mut Context<'_>, pipe: &mut Pipe, to: &TcpStream) -> io::Result<Poll<usize>> {
    poll_io(|| {
        ready!(to.poll_write_ready(cx))?;
        Poll::Ready(to.try_io(Interest::WRITABLE, || pipe.drain(to)))
    })
}

/// Tries again until it is pending by the runtime's word, which then wakes the task.
fn poll_io(mut attempt: impl FnMut() -> Poll<io::Result<usize>>) -> io::Result<Poll<usize>> {
    loop {
        match attempt() {
            Poll::Pending => return Ok(Poll::Pending),
            Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
            Poll::Ready(done) => return done.map(Poll::Ready),
        }
    }
}

/// Tells the sink that no more comes.
fn end(to: &TcpStream) -> Result<(), Fault> {
    match SockRef::from(to).shutdown(Shutdown::Write) {
        // The peer has reset the connection; whoever reads from it learns that.
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        result => result.map_err(Fault::Sink),
    }
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, time::Duration};

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
        task::JoinHandle,
        time::{Instant, sleep, timeout},
    };

    use super::{DescriptorPool, End, Limits, Outcome, SockRef, Traffic, relay, reset};

    const LONG: Limits = Limits { idle: Duration::from_mins(1), end: None };
    const LARGE: usize = 32 << 20;

    /// A client, an upstream, and what runs between them.
    struct Line {
        client: TcpStream,
        upstream: TcpStream,
        relay: JoinHandle<Outcome>,
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
        let relay = tokio::spawn(async move {
            relay(inner_client, inner_upstream, first.to_vec(), first.len(), limits, &pool, &Traffic::default()).await
        });
        Line { client, upstream, relay }
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
            assert!(matches!(outcome.end, End::Closed), "{outcome:?}");
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
            assert!(matches!(relay.await.unwrap().end, End::Closed));
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
                End::Client(_) => assert!(!is_swapped),
                End::Upstream(_) => assert!(is_swapped),
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
        assert!(matches!(relay.await.unwrap().end, End::Idle));
        assert_eq!(rest(&mut client).await, b"");
    }

    #[tokio::test]
    async fn a_connection_has_its_time() {
        let limits = Limits { idle: Duration::from_mins(1), end: Some(Instant::now() + Duration::from_millis(100)) };
        let Line { mut client, relay, .. } = line(b"", limits, DescriptorPool::new(0)).await;
        assert_eq!(rest(&mut client).await, b"");
        assert!(matches!(relay.await.unwrap().end, End::TooLong));
    }
}
