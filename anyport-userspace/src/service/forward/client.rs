//! A client that is being connected to an upstream, and connected to it.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyport_common::flow::Transport;
use nix::sys::epoll::EpollFlags;
use smallvec::SmallVec;
use socket2::Socket;

use super::{
    Connected, Finished, Forwarder, Refusal, connect,
    header::{self, LONGEST_READ, LONGEST_WRITTEN, Parsed},
    relay::{InitialData, Limits, Outcome, Relay, RelayEnd},
    upstream::Upstream,
};
use crate::service::{
    counts::Traffic,
    datagram::Ends,
    descriptors::DescriptorPool,
    event_loop::{Context, Event, Next, Side, Stream, reset},
};

/// How long a peer that has to send a PROXY header may take.
const HEADER_TIMEOUT: Duration = Duration::from_secs(3);
/// Most bytes of a client that are kept while its upstream is connected.
const EARLY: usize = 16 << 10;

/// One client. What does not end by the word of both sides is reset on both, so that nobody takes a part for the whole.
#[derive(Debug)]
pub(in crate::service) struct Client {
    ends: Ends,
    stream: Stream,
    upstream: Option<Stream>,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    /// The peer has to tell who dialled what. That is what it has said so far.
    Header(Vec<u8>),
    /// The upstream is being connected.
    Dialling(Dialling),
    Connected(Connected, Relay),
    /// Both sides have ended it; or nothing was done yet.
    Over,
}

/// A client that has no upstream yet.
#[derive(Debug)]
struct Dialling {
    first: InitialData,
    /// Those that were tried in vain, and behind them the one that is being tried.
    tried: SmallVec<[Arc<Upstream>; 2]>,
    /// Why the last one did not do.
    last: io::Error,
}

/// How a client has ended, and the upstream that it had.
type Ended = (Option<Arc<Upstream>>, Result<Outcome, Refusal>);

/// It broke before there was an upstream.
fn broken(error: io::Error) -> Ended {
    (None, Ok(Outcome { to_upstream: 0, to_client: 0, end: RelayEnd::Client(error) }))
}

impl Client {
    pub(in crate::service) fn new(socket: Socket, ends: Ends) -> Self {
        Self { ends, stream: Stream::accepted(socket), upstream: None, phase: Phase::Over }
    }

    /// Goes as far as it can; what became of it if that is its end.
    pub(in crate::service) fn advance(
        &mut self,
        forwarder: &Arc<Forwarder>,
        (pool, traffic): (&DescriptorPool, &Traffic),
        cx: &mut Context<'_>,
        event: Event,
    ) -> Result<Next, Finished> {
        self.try_advance(forwarder, (pool, traffic), cx, event).map_err(|(upstream, end)| {
            if matches!(end, Ok(Outcome { end: RelayEnd::Closed, .. })) {
                self.phase = Phase::Over;
            }
            Finished { ends: self.ends, upstream, end }
        })
    }

    fn try_advance(
        &mut self,
        forwarder: &Arc<Forwarder>,
        (pool, traffic): (&DescriptorPool, &Traffic),
        cx: &mut Context<'_>,
        event: Event,
    ) -> Result<Next, Ended> {
        match (event, &mut self.upstream) {
            (Event::Start, _) => return self.start(forwarder, cx),
            (Event::UpstreamLeft, _) => return self.look_for_upstream(forwarder),
            (Event::Ready(Side::Client, flags), _) => self.stream.note(flags),
            (Event::Ready(Side::Upstream, flags), Some(upstream)) => upstream.note(flags),
            (Event::Ready(..) | Event::Rescheduled | Event::TimerExpired, _) => {}
        }
        match &mut self.phase {
            Phase::Header(_) => self.read_header(forwarder, cx, event),
            Phase::Dialling(_) => self.dial_on(forwarder, (pool, traffic), cx, event),
            Phase::Connected(..) => self.relay((pool, traffic), cx, event),
            Phase::Over => Ok(Next::Close),
        }
    }

    /// Some upstream gets no clients any more. Whether it was this client's, and that matters.
    fn look_for_upstream(&mut self, forwarder: &Arc<Forwarder>) -> Result<Next, Ended> {
        match &self.phase {
            Phase::Connected(connected, relay) if forwarder.closes(&connected.0) => {
                Err((Some(Arc::clone(&connected.0)), Ok(relay.outcome(RelayEnd::UpstreamLeft))))
            }
            _ => Ok(Next::Wait),
        }
    }

    fn start(&mut self, forwarder: &Forwarder, cx: &mut Context<'_>) -> Result<Next, Ended> {
        let peer = self.ends.client.ip().to_canonical();
        let next = if forwarder.config.accept_proxy.iter().any(|prefix| prefix.contains(peer)) {
            self.phase = Phase::Header(Vec::new());
            cx.wake_at(Instant::now() + HEADER_TIMEOUT);
            self.read_header(forwarder, cx, Event::Start)
        } else {
            self.dial(forwarder, cx, InitialData::default())
        }?;
        // What was there was read by now.
        self.stream.watch(cx.watcher).map_err(broken)?;
        Ok(next)
    }

    /// Reads who dialled what, by the word of the peer.
    fn read_header(&mut self, forwarder: &Forwarder, cx: &mut Context<'_>, event: Event) -> Result<Next, Ended> {
        let Phase::Header(heard) = &mut self.phase else { return Ok(Next::Close) };
        let refused = |error| (None, Err(Refusal::Header(error)));
        if matches!(event, Event::TimerExpired) {
            return Err(refused(io::ErrorKind::TimedOut.into()));
        }
        loop {
            let most = (LONGEST_READ - heard.len()).min(cx.buffer.len());
            match self.stream.read(&mut cx.buffer[..most]).map_err(refused)? {
                None => return Ok(Next::Wait),
                Some(0) => return Err(refused(io::ErrorKind::UnexpectedEof.into())),
                Some(length) => heard.extend_from_slice(&cx.buffer[..length]),
            }
            match header::parse(heard) {
                Ok(Parsed::Incomplete) => {}
                Ok(Parsed::Header { ends, length }) => {
                    self.ends = ends.unwrap_or(self.ends);
                    let bytes = heard.split_off(length);
                    return self.dial(forwarder, cx, InitialData { bytes, ..InitialData::default() });
                }
                Err(malformed) => return Err(refused(io::Error::new(io::ErrorKind::InvalidData, malformed))),
            }
        }
    }

    /// Connects to an upstream.
    fn dial(&mut self, forwarder: &Forwarder, cx: &mut Context<'_>, first: InitialData) -> Result<Next, Ended> {
        let mut dialling = Dialling { first, tried: SmallVec::new(), last: io::Error::other("none is up") };
        dialling.hear(&mut self.stream, cx).map_err(broken)?;
        self.phase = Phase::Dialling(dialling);
        self.dial_next(forwarder, cx)
    }

    /// Connects to the upstream that the balancing chooses, or else to another one.
    fn dial_next(&mut self, forwarder: &Forwarder, cx: &mut Context<'_>) -> Result<Next, Ended> {
        let Phase::Dialling(dialling) = &mut self.phase else { return Ok(Next::Close) };
        self.upstream = None;
        while dialling.may_try(forwarder) {
            let Some(upstream) = forwarder.choose(Transport::Tcp, self.ends, &dialling.tried) else { break };
            let to = upstream.target(self.ends.dialled.port());
            dialling.tried.push(upstream);
            match dialling.begin(forwarder, cx, to, self.ends) {
                Ok(stream) => {
                    self.upstream = Some(stream);
                    cx.wake_at(Instant::now() + forwarder.config.connect_timeout.0);
                    return Ok(Next::Wait);
                }
                Err(error) => dialling.failed(forwarder, self.ends, error),
            }
        }
        let last = std::mem::replace(&mut dialling.last, io::ErrorKind::Other.into());
        Err((None, Err(Refusal::Upstream(last))))
    }

    /// Something has happened while an upstream was being connected.
    fn dial_on(
        &mut self,
        forwarder: &Forwarder,
        (pool, traffic): (&DescriptorPool, &Traffic),
        cx: &mut Context<'_>,
        event: Event,
    ) -> Result<Next, Ended> {
        let (Phase::Dialling(dialling), Some(upstream)) = (&mut self.phase, &self.upstream) else {
            return Ok(Next::Close);
        };
        let error = match event {
            Event::Ready(Side::Upstream, flags) => {
                let is_broken = flags.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP);
                match is_broken.then(|| upstream.error()).flatten() {
                    // It was connected, and its words are for the client.
                    Some(error) if upstream.has_words() => {
                        return self.connected(forwarder, (pool, traffic), cx, Some(error));
                    }
                    Some(error) => error,
                    None if flags.contains(EpollFlags::EPOLLOUT) => {
                        return self.connected(forwarder, (pool, traffic), cx, None);
                    }
                    None => return Ok(Next::Wait),
                }
            }
            Event::TimerExpired => io::Error::new(
                io::ErrorKind::TimedOut,
                format!("no answer within connect-timeout = {}", forwarder.config.connect_timeout),
            ),
            Event::Ready(Side::Client, _) | Event::Start | Event::Rescheduled | Event::UpstreamLeft => {
                if dialling.first.bytes.is_empty() {
                    dialling.hear(&mut self.stream, cx).map_err(broken)?;
                    if !dialling.first.bytes.is_empty() {
                        upstream.hold_acknowledgement();
                    }
                }
                return Ok(Next::Wait);
            }
        };
        dialling.failed(forwarder, self.ends, error);
        self.dial_next(forwarder, cx)
    }

    /// There is a connection to an upstream, which the upstream may have reset since.
    fn connected(
        &mut self,
        forwarder: &Forwarder,
        (pool, traffic): (&DescriptorPool, &Traffic),
        cx: &mut Context<'_>,
        reset: Option<io::Error>,
    ) -> Result<Next, Ended> {
        let Phase::Dialling(Dialling { mut first, mut tried, .. }) = std::mem::replace(&mut self.phase, Phase::Over)
        else {
            return Ok(Next::Close);
        };
        let Some(upstream) = tried.pop() else { return Ok(Next::Close) };
        let config = &forwarder.config;
        if let Some(version) = config.proxy_protocol {
            let mut told = Vec::with_capacity(LONGEST_WRITTEN + first.bytes.len());
            header::write(version, Transport::Tcp, self.ends, &mut told);
            first.header = told.len();
            told.append(&mut first.bytes);
            first.bytes = told;
        }
        let limits =
            Limits { idle: config.idle_timeout.0, end: config.max_duration.map(|longest| Instant::now() + longest.0) };
        let mut relay = Relay::new(first, limits);
        if let Some(error) = reset {
            relay.broke(RelayEnd::Upstream(error));
        }
        cx.wake_at(relay.next_look());
        upstream.succeeded();
        self.phase = Phase::Connected(Connected::to(upstream), relay);
        self.relay((pool, traffic), cx, Event::Rescheduled)
    }

    /// Moves what can be moved.
    fn relay(
        &mut self,
        (pool, traffic): (&DescriptorPool, &Traffic),
        cx: &mut Context<'_>,
        event: Event,
    ) -> Result<Next, Ended> {
        let (Phase::Connected(connected, relay), Some(upstream)) = (&mut self.phase, &mut self.upstream) else {
            return Ok(Next::Close);
        };
        let traffic = [&connected.0.traffic, traffic];
        let next = if matches!(event, Event::TimerExpired) {
            relay.look(cx, &mut self.stream, upstream, pool, traffic)
        } else {
            relay.advance(cx, &mut self.stream, upstream, pool, traffic)
        };
        next.map_err(|end| (Some(Arc::clone(&connected.0)), Ok(relay.outcome(end))))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if !matches!(self.phase, Phase::Over) {
            reset(&self.stream);
            self.upstream.iter().for_each(reset);
        }
    }
}

impl Dialling {
    /// Reads what the client has said by now, so that it leaves with the first packet that can carry it. One that has said
    /// nothing and has reset the connection is an error.
    fn hear(&mut self, client: &mut Stream, cx: &mut Context<'_>) -> io::Result<()> {
        let InitialData { bytes, has_ended, reset, .. } = &mut self.first;
        while !*has_ended && bytes.len() < EARLY {
            match client.read(&mut cx.buffer[..EARLY - bytes.len()]) {
                Ok(None) => break,
                Ok(Some(length)) => {
                    bytes.extend_from_slice(&cx.buffer[..length]);
                    *has_ended = length == 0;
                }
                Err(error) if bytes.is_empty() => return Err(error),
                Err(error) => (*reset, *has_ended) = (Some(error), true),
            }
        }
        Ok(())
    }

    fn begin(&self, forwarder: &Forwarder, cx: &Context<'_>, to: SocketAddr, ends: Ends) -> io::Result<Stream> {
        let config = &forwarder.config;
        let has_words = config.proxy_protocol.is_some() || !self.first.bytes.is_empty();
        let source = config.transparent_source.then(|| ends.client.ip());
        let mut stream = connect::begin(&config.tcp, to, source, has_words)?;
        stream.watch(cx.watcher)?;
        Ok(stream)
    }

    /// Whether to try an upstream, or another one.
    fn may_try(&self, forwarder: &Forwarder) -> bool {
        self.tried.len() <= forwarder.config.retries as usize && !forwarder.keeps_affinity_after(&self.last)
    }

    /// The upstream that is being tried does not do.
    fn failed(&mut self, forwarder: &Forwarder, ends: Ends, error: io::Error) {
        if let Some(upstream) = self.tried.last() {
            if forwarder.config.transparent_source && error.kind() == io::ErrorKind::TimedOut {
                forwarder.returns.doubt(upstream.address, ends.client.ip());
            }
            forwarder.note_failure(upstream, &error);
        }
        self.last = error;
    }
}
