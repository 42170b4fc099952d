//! Of moving data.

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
use crate::{
    service::event_loop::{Event, EventLoop, Machine, Side, reset},
    sys,
};

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
            Event::TimerExpired => relay.look(cx, client, upstream, pool, [traffic, &Traffic::default()]),
            Event::UpstreamLeft => Ok(Next::Wait),
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
        if matches!(event, Event::Start) {
            cx.wake_at(relay.next_look());
        }
        next.unwrap_or_else(|end| {
            if !matches!(end, RelayEnd::Closed) {
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
    let first = InitialData { bytes: first.to_vec(), header: first.len(), ..InitialData::default() };
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

/// All that comes, and whether a reset ends it.
async fn heard(stream: &mut TcpStream) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    let end = stream.read_to_end(&mut bytes).await;
    let is_reset = end.is_err_and(|error| {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        true
    });
    (bytes, is_reset)
}

/// Until the relay's host has all of it: what a kernel has not sent when it resets a connection is lost there already.
async fn until_taken(stream: &TcpStream) {
    while sys::unacknowledged(stream).unwrap() > 0 {
        sleep(Duration::from_millis(1)).await;
    }
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

/// By copying and through pipes, to a peer that reads at once and to one that reads later.
#[tokio::test]
async fn what_was_said_before_a_reset_arrives() {
    for (length, descriptors) in [(1, 0), (1_000, 0), (300_000, 0), (LARGE / 8, 100), (LARGE / 8, 0)] {
        for (is_swapped, pause) in [(false, 0), (true, 0), (false, 100), (true, 100)] {
            let Line { client, upstream, relay } = line(b"", LONG, DescriptorPool::new(descriptors)).await;
            let (mut one, mut other) = if is_swapped { (upstream, client) } else { (client, upstream) };
            let hearing = tokio::spawn(async move {
                sleep(Duration::from_millis(pause)).await;
                heard(&mut other).await
            });
            one.write_all(&pattern(length)).await.unwrap();
            until_taken(&one).await;
            reset(&one);
            drop(one);
            let (bytes, is_reset) = hearing.await.unwrap();
            assert!(bytes == pattern(length) && is_reset, "{} of {length} bytes, reset: {is_reset}", bytes.len());
            let outcome = relay.await.unwrap();
            assert_eq!(outcome.to_upstream + outcome.to_client, length as u64);
            assert!(matches!(outcome.end, RelayEnd::Client(_)) != is_swapped, "{outcome:?}");
        }
    }
}

/// The other side goes on talking to the one that answers and is gone.
#[tokio::test]
async fn an_answer_arrives_though_its_side_is_gone() {
    for is_swapped in [false, true] {
        for _ in 0..10 {
            let Line { client, upstream, relay } = line(b"", LONG, DescriptorPool::new(100)).await;
            let (one, mut other) = if is_swapped { (upstream, client) } else { (client, upstream) };
            let (mut reader, mut writer) = one.into_split();
            let writing = tokio::spawn(async move { while writer.write_all(&[0; 10_000]).await.is_ok() {} });
            other.read_exact(&mut [0; 5_000]).await.unwrap();
            other.write_all(&pattern(5_000)).await.unwrap();
            until_taken(&other).await;
            // With words unread, which makes the kernel reset the connection.
            drop(other);
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).await.ok();
            assert!(bytes == pattern(5_000), "{} bytes", bytes.len());
            writing.await.unwrap();
            assert!(matches!(relay.await.unwrap().end, RelayEnd::Upstream(_)) != is_swapped);
        }
    }
}

#[tokio::test]
async fn a_reset_behind_an_end_is_passed_on() {
    for is_swapped in [false, true] {
        let Line { client, upstream, relay } = line(b"", LONG, DescriptorPool::new(0)).await;
        let (mut one, mut other) = if is_swapped { (upstream, client) } else { (client, upstream) };
        one.write_all(b"words").await.unwrap();
        one.shutdown().await.unwrap();
        assert_eq!(heard(&mut other).await, (b"words".to_vec(), false));
        reset(&one);
        drop(one);
        assert!(matches!(relay.await.unwrap().end, RelayEnd::Client(_)) != is_swapped);
        assert!(other.take_error().unwrap().is_some());
    }
}

/// Nobody waits for ever for one that takes nothing.
#[tokio::test]
async fn the_last_words_have_their_time() {
    let limits = Limits { idle: Duration::from_millis(400), end: None };
    let Line { mut client, upstream, relay } = line(b"", limits, DescriptorPool::new(0)).await;
    let mut sent = 0;
    let full = async {
        while sent < LARGE {
            sent += client.write(&[0; 10_000]).await.unwrap();
        }
    };
    timeout(Duration::from_millis(200), full).await.ok();
    reset(&client);
    drop(client);
    let outcome = timeout(Duration::from_secs(5), relay).await.unwrap().unwrap();
    assert!(outcome.to_upstream > 0 && !matches!(outcome.end, RelayEnd::Closed), "{outcome:?}");
    drop(upstream);
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
    assert_eq!(heard(&mut upstream).await, (b"xxxxxxxx".to_vec(), true));
    assert!(last_word.elapsed() >= IDLE * 9 / 10);
    assert!(matches!(relay.await.unwrap().end, RelayEnd::Idle));
    assert_eq!(heard(&mut client).await, (Vec::new(), true));
}

#[tokio::test]
async fn a_connection_has_its_time() {
    let limits = Limits { idle: Duration::from_mins(1), end: Some(Instant::now() + Duration::from_millis(100)) };
    let Line { mut client, upstream: _upstream, relay } = line(b"", limits, DescriptorPool::new(0)).await;
    assert_eq!(heard(&mut client).await, (Vec::new(), true));
    assert!(matches!(relay.await.unwrap().end, RelayEnd::TooLong));
}
