//! Accepting connections, and serving them.

mod builtin;

use std::{
    cell::RefCell,
    fmt::Display,
    io,
    net::SocketAddr,
    os::fd::AsFd as _,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use anyport_common::flow::Transport;
use nix::sys::epoll::EpollTimeout;
use socket2::Socket;
use tokio::{
    io::unix::AsyncFd,
    sync::Notify,
    task::yield_now,
    time::{sleep, sleep_until},
};

use self::builtin::BuiltinHandler;
use super::{
    ServiceConfig,
    datagram::Ends,
    descriptors::DescriptorPool,
    event_loop::{self, Context, Event, EventLoop, Machine, Next},
    forward::{self, Client, Finished, Forwarder, Outcome, Refusal, RelayEnd},
    histogram::Sampler,
    limits::{Gate, Pass, Refused},
    log::{ConnectionLog, Entry},
    stats::TcpCounts,
};
use crate::{events::EventPublisher, sys};

const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Connections that are accepted before other tasks run.
const ACCEPTS: usize = 64;
/// For a timer that is set again before it expires.
const LONG: Duration = Duration::from_hours(1);

/// What a worker has for the connections of one listening socket.
#[derive(Debug)]
pub(super) struct ListenerContext {
    pub(super) config: Arc<ServiceConfig>,
    pub(super) counts: TcpCounts,
    pub(super) gate: Arc<Gate>,
    pub(super) descriptors: DescriptorPool,
    /// For `forward`.
    pub(super) forwarder: Option<Arc<Forwarder>>,
    pub(super) publisher: Option<EventPublisher>,
    pub(super) log: ConnectionLog,
}

/// A connection that is open until this is dropped.
#[derive(Debug)]
struct Open {
    site: Arc<ListenerContext>,
    /// When it was accepted.
    began: Instant,
    /// Whether it is to be written down.
    is_logged: bool,
    _pass: Pass,
}

impl Drop for Open {
    fn drop(&mut self) {
        let TcpCounts { ended, times, .. } = &self.site.counts;
        ended.raise();
        times.durations.observe(self.began.elapsed(), 1);
    }
}

/// One listening socket at work.
#[derive(Debug)]
pub(super) struct Acceptor {
    pub(super) listener: AsyncFd<Arc<Socket>>,
    pub(super) site: Arc<ListenerContext>,
    sampler: Sampler,
}

impl Acceptor {
    /// Watches a listening socket. To be called where the worker's runtime is the current one.
    pub(super) fn new(listener: Arc<Socket>, site: Arc<ListenerContext>) -> io::Result<Self> {
        Ok(Self { listener: sys::watch_readable(listener)?, site, sampler: Sampler::new() })
    }

    /// Accepts for ever. Connections go on when this is dropped.
    pub(super) async fn run(mut self) {
        if let Some(forwarder) = &self.site.forwarder {
            forwarder.wait_for_names().await;
        }
        let mut pause = Duration::ZERO;
        loop {
            match self.accept_some().await {
                Ok(()) => pause = Duration::ZERO,
                Err(error) => {
                    self.site.counts.accept_errors.raise();
                    pause = pause_after(&error, pause);
                    if pause > Duration::ZERO {
                        let name = &self.site.config.name;
                        tracing::warn!("service {name}: accept: {error}; trying again in {pause:?}");
                        sleep(pause).await;
                    }
                }
            }
        }
    }

    /// Waits for connections, and accepts those that are there.
    async fn accept_some(&mut self) -> io::Result<()> {
        let Self { listener, site, sampler } = self;
        let mut ready = listener.readable().await?;
        for _ in 0..ACCEPTS {
            match ready.try_io(|listener| accept(listener.get_ref())) {
                Ok(accepted) => {
                    let (socket, client) = accepted?;
                    start(site, sampler, socket, client);
                }
                Err(_) => return Ok(()),
            }
        }
        yield_now().await;
        Ok(())
    }
}

/// Serves a connection that was accepted, if it may come in.
fn start(site: &Arc<ListenerContext>, sampler: &mut Sampler, socket: Socket, client: SocketAddr) {
    let TcpCounts { accepted, served, refused, times, .. } = &site.counts;
    accepted.raise();
    let admitted = site.gate.admit(client.ip());
    if let Some(publisher) = site.publisher.as_ref().filter(|it| it.is_heard())
        && let Some(dialled) = dialled(&socket)
    {
        publisher.publish(Transport::Tcp, Ends { client, dialled }, matches!(admitted, Err(Refused::Denied)));
    }
    let pass = match admitted {
        Ok(pass) => pass,
        Err(why) => {
            refused.raise(why);
            return event_loop::reset(&socket);
        }
    };
    let Some(dialled) = dialled(&socket) else { return };
    let began = Instant::now();
    // Nothing was sent to it so far.
    if let Some(weight) = sampler.pick(began)
        && let Ok(waited) = sys::time_since_sent(&socket)
    {
        times.waits.observe(waited, weight);
    }
    served.raise();
    let open = Open { site: Arc::clone(site), began, is_logged: site.log.picks(), _pass: pass };
    Connections::start(Connection::new(open, socket, Ends { client, dialled }));
}

/// The original destination of an accepted socket.
fn dialled(socket: &Socket) -> Option<SocketAddr> {
    socket.local_addr().ok()?.as_socket()
}

fn accept(listener: &Socket) -> io::Result<(Socket, SocketAddr)> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    let (socket, client) = listener.accept4(flags)?;
    Ok((socket, client.as_socket().ok_or(io::ErrorKind::InvalidData)?))
}

/// One accepted connection. The kinds differ in size, and each takes no more than its own. It counts as open until its
/// sockets are closed, so that comes last.
#[derive(Debug)]
enum Connection {
    BuiltinHandler(Box<(BuiltinHandler, Ends, Open)>),
    Forwarded(Box<(Client, Open)>),
}

impl Connection {
    fn new(open: Open, socket: Socket, ends: Ends) -> Self {
        if open.site.forwarder.is_some() {
            return Self::Forwarded(Box::new((Client::new(socket, ends), open)));
        }
        let builtin = BuiltinHandler::new(&open.site.config, socket, ends);
        Self::BuiltinHandler(Box::new((builtin, ends, open)))
    }
}

impl Machine for Connection {
    fn advance(&mut self, cx: &mut Context<'_>, event: Event) -> Next {
        match self {
            Self::BuiltinHandler(it) => {
                let (builtin, ends, open) = &mut **it;
                let ListenerContext { config, counts, .. } = &*open.site;
                builtin.advance(config.handler, cx, event, &counts.traffic).unwrap_or_else(|end| {
                    talk_ended(open, *ends, builtin, &end);
                    Next::Close
                })
            }
            Self::Forwarded(it) => {
                let (client, open) = &mut **it;
                let ListenerContext { forwarder, descriptors, counts, .. } = &*open.site;
                let Some(forwarder) = forwarder else { return Next::Close };
                client.advance(forwarder, (descriptors, &counts.traffic), cx, event).unwrap_or_else(|served| {
                    forwarding_ended(open, &served);
                    Next::Close
                })
            }
        }
    }
}

fn talk_ended(open: &Open, ends: Ends, builtin: &BuiltinHandler, end: &io::Result<()>) {
    let ListenerContext { config, log, .. } = &*open.site;
    if let Err(error) = end {
        tracing::debug!("service {}: {} to {}: {error}", config.name, ends.client, ends.dialled);
    }
    if open.is_logged {
        let reason: &dyn Display = match end {
            Ok(()) => &"closed by both sides",
            Err(error) if error.kind() == io::ErrorKind::TimedOut => &"closed as idle",
            Err(error) => error,
        };
        let (from_client, to_client) = builtin.bytes();
        let began = open.began;
        log.write(&Entry { began, transport: Transport::Tcp, ends, upstream: None, from_client, to_client, reason });
    }
}

fn forwarding_ended(open: &Open, Finished { ends, upstream, end }: &Finished) {
    let ListenerContext { config, counts, log, .. } = &*open.site;
    match end {
        Err(Refusal::Header(_)) => counts.bad_headers.raise(),
        Err(Refusal::Upstream(_)) => counts.unforwarded.raise(),
        Ok(_) => {}
    }
    let (from_client, to_client, reason): (_, _, &dyn Display) = match end {
        Ok(outcome) => (outcome.to_upstream, outcome.to_client, &outcome.end),
        Err(refusal) => (0, 0, refusal),
    };
    if !matches!(end, Ok(Outcome { end: RelayEnd::Closed, .. })) {
        tracing::debug!("service {}: {} to {}: {reason}", config.name, ends.client, ends.dialled);
    }
    if open.is_logged {
        let upstream = upstream.as_ref().map(|upstream| upstream as &dyn Display);
        let ends = *ends;
        let began = open.began;
        log.write(&Entry { began, transport: Transport::Tcp, ends, upstream, from_client, to_client, reason });
    }
}

/// The connections of a worker, served by a task of its runtime: the loop's own descriptor becomes readable when there are
/// events for one of the connections.
#[derive(Debug)]
pub(super) struct Connections {
    events: EventLoop<Connection>,
    /// When the task wakes by itself.
    alarm: Instant,
    /// Raised when it has to do so sooner.
    sooner: Arc<Notify>,
}

thread_local! {
    static CONNECTIONS: RefCell<Option<Connections>> = const { RefCell::new(None) };
}

impl Connections {
    /// None yet.
    ///
    /// # Errors
    /// The kernel refuses a descriptor.
    pub(super) fn new() -> anyhow::Result<Self> {
        let events = EventLoop::new().context("open an epoll descriptor")?;
        Ok(Self { events, alarm: Instant::now() + LONG, sooner: Arc::default() })
    }

    /// Serves a connection on this thread, which must be a worker.
    fn start(connection: Connection) {
        CONNECTIONS.with_borrow_mut(|connections| {
            let Some(Self { events, alarm, sooner }) = connections else { return };
            events.start(connection);
            if events.wants_turn() || events.next_due().is_some_and(|due| due < *alarm) {
                sooner.notify_one();
            }
        });
    }

    /// Tells the connections of this thread when upstreams have left since `seen`, which counts them.
    pub(super) fn tell_of_departures(seen: &mut u64) {
        let departures = forward::departures();
        if *seen != departures {
            *seen = departures;
            CONNECTIONS.with_borrow_mut(|connections| {
                if let Some(Self { events, .. }) = connections {
                    events.tell_all(Event::UpstreamLeft);
                }
            });
        }
    }

    /// Serves the connections that this thread starts, for ever.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) async fn serve(self) -> io::Result<()> {
        let descriptor = sys::watch_readable(self.events.as_fd().try_clone_to_owned()?)?;
        let sooner = Arc::clone(&self.sooner);
        let timer = sleep_until(self.alarm.into());
        let mut timer = std::pin::pin!(timer);
        let _closer = Closer::of(self);
        loop {
            let (goes_on, alarm) = CONNECTIONS.with_borrow_mut(|connections| {
                let Some(Self { events, alarm, .. }) = connections else { return Ok((false, None)) };
                let goes_on = events.turn(EpollTimeout::ZERO)?;
                let now = Instant::now();
                let due = events.next_due().unwrap_or(now + LONG);
                // A later expiry needs no new alarm before this one has gone off.
                let is_new = due < *alarm || *alarm <= now;
                if is_new {
                    *alarm = due;
                }
                io::Result::Ok((goes_on, is_new.then_some(due)))
            })?;
            if let Some(alarm) = alarm {
                timer.as_mut().reset(alarm.into());
            }
            if goes_on {
                yield_now().await;
                continue;
            }
            tokio::select! {
                biased;
                // What becomes ready from here on is reported again.
                ready = descriptor.readable() => ready?.clear_ready(),
                () = sooner.notified() => {}
                () = &mut timer => {}
            }
        }
    }
}

/// Closes the thread's connections when it is dropped.
struct Closer;

impl Closer {
    fn of(connections: Connections) -> Self {
        CONNECTIONS.set(Some(connections));
        Self
    }
}

impl Drop for Closer {
    fn drop(&mut self) {
        drop(CONNECTIONS.take());
    }
}

/// How long to wait before accepting again, given how long the last pause was. Zero if the error is of the one
/// connection only.
fn pause_after(error: &io::Error, last: Duration) -> Duration {
    match error.raw_os_error() {
        // accept(2): errors that are pending on the new connection are reported by accept.
        Some(
            libc::ECONNABORTED
            | libc::EINTR
            | libc::EPERM
            | libc::EPROTO
            | libc::ENOPROTOOPT
            | libc::EOPNOTSUPP
            | libc::ENETDOWN
            | libc::ENETUNREACH
            | libc::EHOSTDOWN
            | libc::EHOSTUNREACH
            | libc::ENONET
            | libc::ETIMEDOUT,
        ) => Duration::ZERO,
        // No descriptors, no memory, or something unheard of: it may last, and must not keep a CPU busy.
        _ => (last * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{self, Write as _},
        net::{TcpListener, TcpStream},
        thread::sleep,
        time::{Duration, Instant},
    };

    use super::{BuiltinHandler, Client, Ends, Open, pause_after};
    use crate::sys;

    #[test]
    fn backs_off_while_resources_lack() {
        for number in [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM, libc::EINVAL] {
            let error = io::Error::from_raw_os_error(number);
            let mut pause = Duration::ZERO;
            let pauses: Vec<u128> = std::iter::repeat_with(|| {
                pause = pause_after(&error, pause);
                pause.as_millis()
            })
            .take(9)
            .collect();
            assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        }
    }

    #[test]
    fn one_bad_connection_holds_up_no_other() {
        for number in [libc::ECONNABORTED, libc::EPERM, libc::EHOSTUNREACH] {
            let error = io::Error::from_raw_os_error(number);
            assert_eq!(pause_after(&error, Duration::from_secs(1)), Duration::ZERO);
        }
    }

    #[test]
    fn the_kernel_knows_how_long_a_connection_has_waited() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let before = Instant::now();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        sleep(Duration::from_millis(200));
        // What the client says in the meantime makes no difference.
        client.write_all(b"x").unwrap();
        sleep(Duration::from_millis(100));
        let (accepted, _) = listener.accept().unwrap();
        let waited = sys::time_since_sent(&accepted).unwrap();
        // A jiffy has 10 ms at most.
        let range = Duration::from_millis(290)..=before.elapsed() + Duration::from_millis(10);
        assert!(range.contains(&waited), "{waited:?} is not in {range:?}");
    }

    #[test]
    fn a_connection_takes_little_memory() {
        let sizes = (size_of::<(Client, Open)>(), size_of::<(BuiltinHandler, Ends, Open)>());
        assert!(sizes.0 <= 512 && sizes.1 <= 256, "{sizes:?} bytes for each connection");
    }
}
