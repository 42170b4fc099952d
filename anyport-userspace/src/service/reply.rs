//! Sockets that answer from the address and port that a client wrote to.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use socket2::Socket;
use tokio::{sync::Notify, time::sleep};

use super::{
    descriptors::{DescriptorPool, Descriptors},
    lock,
    mark::Mark,
    raw, socket_options,
    stats::UdpCounts,
};
use crate::{datagram::Ends, hops::send_with_hops, log_limit::LogLimit};

/// Most sockets in one generation; two are kept.
const GENERATION: usize = 128;
/// An idle reply socket lives between one and two times this. It is short, since the host can't bind a reply
/// socket's port for that long, and a client that comes back later costs some microseconds only.
const REPLY_AGE: Duration = Duration::from_secs(1);

/// What answers for one UDP socket: its reply sockets and counts.
#[derive(Debug)]
pub(super) struct UdpWorker {
    pub(super) counts: Arc<UdpCounts>,
    pub(super) replies: Mutex<ReplySockets>,
    /// Raised when there is a reply socket and was none.
    reply_opened: Arc<Notify>,
}

impl UdpWorker {
    pub(super) fn new(descriptors: DescriptorPool, reply_opened: Arc<Notify>, mark: Option<Mark>) -> Self {
        let counts = Arc::default();
        let replies = Mutex::new(ReplySockets::new(descriptors, Arc::clone(&counts), mark));
        Self { counts, replies, reply_opened }
    }

    /// Answers a client from the original destination, with this hop limit.
    pub(super) fn answer(&self, Ends { client, dialled }: Ends, answer: &[u8], hops: u8) -> io::Result<()> {
        let mut replies = lock(&self.replies);
        if replies.is_empty() {
            self.reply_opened.notify_one();
        }
        replies.send(dialled, client, answer, hops)
    }
}

/// Closes reply sockets that are not in use. Sleeps until `opened` while there are none.
pub(super) async fn age_replies(workers: Vec<Arc<UdpWorker>>, opened: Arc<Notify>) {
    loop {
        opened.notified().await;
        while workers.iter().any(|worker| !lock(&worker.replies).is_empty()) {
            sleep(REPLY_AGE).await;
            for worker in &workers {
                // The lock is free again when the sockets are closed.
                let retired = lock(&worker.replies).age();
                drop(retired);
            }
        }
    }
}

type Generation = HashMap<SocketAddr, Reply>;

/// Reply sockets of one worker, by the address and port that they answer from.
///
/// The least recently used go first, by generations: what is used stands in or moves to the young one; when that is
/// full, or [`ReplySockets::age`] says so, the old one is closed and the young one becomes old.
#[derive(Debug)]
pub(super) struct ReplySockets {
    young: Generation,
    old: Generation,
    descriptors: DescriptorPool,
    counts: Arc<UdpCounts>,
    mark: Option<Mark>,
    log_limit: LogLimit,
}

/// Reply sockets that are closed when this is dropped.
#[derive(Debug)]
#[must_use]
pub(super) struct Retired(#[expect(dead_code, reason = "held for its drop")] [Generation; 2]);

impl ReplySockets {
    pub(super) fn new(descriptors: DescriptorPool, counts: Arc<UdpCounts>, mark: Option<Mark>) -> Self {
        Self {
            young: Generation::new(),
            old: Generation::new(),
            descriptors,
            counts,
            mark,
            log_limit: LogLimit::of_counted(),
        }
    }

    /// Sends an answer from `from` to `to`, with this hop limit.
    pub(super) fn send(&mut self, from: SocketAddr, to: SocketAddr, answer: &[u8], hops: u8) -> io::Result<()> {
        if let Some(reply) = self.young.get(&from) {
            return reply.send(to, answer, hops);
        }
        let reply = match self.old.remove(&from) {
            Some(reply) => reply,
            None => match self.open(from) {
                // Another socket has the port exclusively.
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    return raw::send((from, to), answer, hops, self.mark)
                        .inspect_err(|error| self.complain(from, error));
                }
                opened => opened.inspect_err(|error| self.complain(from, error))?,
            },
        };
        let sent = reply.send(to, answer, hops);
        if reply.descriptor.is_some() {
            if self.young.len() == GENERATION {
                drop(self.age());
            }
            self.young.insert(from, reply);
        }
        sent
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.young.is_empty() && self.old.is_empty()
    }

    /// Retires what was not used since this was last called, or the one time before.
    pub(super) fn age(&mut self) -> Retired {
        let retired = std::mem::replace(&mut self.old, std::mem::take(&mut self.young));
        Retired([retired, Generation::new()])
    }

    /// Retires all.
    pub(super) fn forget(&mut self) -> Retired {
        Retired([std::mem::take(&mut self.young), std::mem::take(&mut self.old)])
    }

    fn open(&self, from: SocketAddr) -> io::Result<Reply> {
        let reply = Reply::open(from, self.descriptors.try_take(1), Arc::clone(&self.counts))?;
        Mark::put_on(self.mark, &reply.socket)?;
        Ok(reply)
    }

    fn complain(&self, from: SocketAddr, error: &io::Error) {
        if let Some(left_out) = self.log_limit.next() {
            tracing::warn!("no answer from {from}: {error}{}{left_out}", advice(error));
        }
    }
}

fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => {
            "; to answer from addresses and ports that are not its own, anyportd needs CAP_NET_RAW: grant it; and a mark takes \
             CAP_NET_ADMIN before Linux 5.17"
        }
        Some(libc::EACCES) => "; to answer from a port below 1024, anyportd needs CAP_NET_BIND_SERVICE: grant it",
        Some(libc::EMFILE | libc::ENFILE) => "; raise the limit of open files",
        _ => "",
    }
}

/// A socket to answer from one address and port.
///
/// It must stay unconnected: a connected socket comes before steering and would take the client's next datagrams.
/// An unconnected one comes after steering on all back ends. It can get a datagram only where nothing steers:
/// between the end of a rule and [`ReplySockets::forget`], at an interface that `tc` does not watch, or as
/// fragments, which `tc` can't assign. Such a datagram would have been refused; here it is counted, at the latest
/// when the socket is closed.
#[derive(Debug)]
struct Reply {
    socket: Socket,
    counts: Arc<UdpCounts>,
    /// None for a socket that must not be kept, as the pool is empty.
    descriptor: Option<Descriptors>,
}

impl Reply {
    fn open(from: SocketAddr, descriptor: Option<Descriptors>, counts: Arc<UdpCounts>) -> io::Result<Self> {
        let socket = socket_options::reply(from)?;
        Ok(Self { socket, counts, descriptor })
    }

    fn send(&self, to: SocketAddr, answer: &[u8], hops: u8) -> io::Result<()> {
        send_with_hops(&self.socket, to, answer, hops)
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        while self.socket.recv(&mut []).is_ok() {
            self.counts.strayed.raise();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashSet,
        net::{SocketAddr, UdpSocket},
        sync::Arc,
        time::Duration,
    };

    use super::{DescriptorPool, GENERATION, ReplySockets, UdpCounts};

    fn replies(descriptors: usize) -> (ReplySockets, Arc<UdpCounts>) {
        let counts = Arc::new(UdpCounts::default());
        (ReplySockets::new(DescriptorPool::new(descriptors), Arc::clone(&counts), None), counts)
    }

    fn client(address: &str) -> (UdpSocket, SocketAddr) {
        let client = UdpSocket::bind(address).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let address = client.local_addr().unwrap();
        (client, address)
    }

    fn next(client: &UdpSocket) -> (String, SocketAddr) {
        let mut buffer = [0; 64];
        let (length, from) = client.recv_from(&mut buffer).unwrap();
        (String::from_utf8_lossy(&buffer[..length]).into(), from)
    }

    #[test]
    fn answers_leave_from_any_address_and_port() {
        for (local, from) in [
            ("127.0.0.1:0", "203.0.113.77:31337"),
            ("127.0.0.1:0", "127.9.9.9:1"),
            ("127.0.0.1:0", "203.0.113.255:65535"),
            ("[::1]:0", "[2001:db8::77]:31337"),
            ("[::1]:0", "[2001:db8::]:1"),
        ] {
            let (client, to) = client(local);
            let from = from.parse().unwrap();
            // Two workers may answer from one address at a time.
            let (mut one, mut other) = (replies(9).0, replies(9).0);
            one.send(from, to, b"one", 64).unwrap();
            other.send(from, to, b"other", 64).unwrap();
            one.send(from, to, b"again", 64).unwrap();
            for text in ["one", "other", "again"] {
                assert_eq!(next(&client), (text.into(), from));
            }
        }
    }

    #[test]
    fn there_are_never_more_than_two_generations() {
        let (client, to) = client("127.0.0.1:0");
        let (mut replies, _) = replies(10_000);
        let favourite: SocketAddr = "127.9.9.9:9".parse().unwrap();
        let mut cookies = HashSet::new();
        for port in 20_000..21_000 {
            replies.send(favourite, to, b"", 64).unwrap();
            replies.send(SocketAddr::new(favourite.ip(), port), to, b"", 64).unwrap();
            for _ in 0..2 {
                next(&client);
            }
            assert!(replies.young.len() + replies.old.len() <= 2 * GENERATION);
            let reply = replies.young.get(&favourite).or(replies.old.get(&favourite)).unwrap();
            cookies.insert(reply.socket.cookie().unwrap());
        }
        assert_eq!(cookies.len(), 1, "what is in use stays open");
        drop(replies.age());
        assert!(!replies.is_empty());
        drop(replies.age());
        assert!(replies.is_empty());
    }

    #[test]
    fn answers_are_sent_even_when_no_socket_can_be_kept() {
        let (client, to) = client("127.0.0.1:0");
        let (mut replies, _) = replies(1);
        for port in [1001, 1002, 1003] {
            let from = SocketAddr::from(([127, 9, 9, 8], port));
            replies.send(from, to, b"hi", 64).unwrap();
            assert_eq!(next(&client).1, from);
        }
        assert_eq!((replies.young.len(), replies.old.len()), (1, 0));
    }

    #[test]
    fn forgetting_frees_the_port_and_counts_what_strayed() {
        let (client, to) = client("127.0.0.1:0");
        let (mut replies, counts) = replies(9);
        let from = "127.9.9.7:7777".parse().unwrap();
        replies.send(from, to, b"hi", 64).unwrap();
        client.send_to(b"nobody steers this", from).unwrap();
        assert!(UdpSocket::bind(from).is_err());
        drop(replies.forget());
        assert_eq!(counts.strayed.get(), 1);
        UdpSocket::bind(from).unwrap();
    }

    #[test]
    fn a_taken_port_is_no_obstacle() {
        let (client_socket, to) = client("127.0.0.1:0");
        let (_owner, taken) = client("0.0.0.0:0");
        let (mut replies, _) = replies(9);
        let from = SocketAddr::from(([127, 9, 9, 6], taken.port()));
        replies.send(from, to, b"hi", 64).unwrap();
        assert!(replies.is_empty(), "no socket can be kept for that port");
        assert_eq!(next(&client_socket), ("hi".into(), from));
    }
}
