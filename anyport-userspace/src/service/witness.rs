//! Which clients wrote to what lately, so that owners of registered UDP sockets answer those alone, and in proportion.
//!
//! What is steered to an owner's socket never passes this process. So there is a raw socket, to which the kernel gives a copy of
//! the headers of each datagram *before* it gives the datagram to a socket (`raw_local_deliver`), whatever back end steers it. It
//! is open from the moment on at which an owner registers a UDP socket. By the time an owner has an answer, its question is there
//! to be read; so what was not read yet is read before an answer is refused.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{Arc, Mutex, OnceLock},
    time::{Duration, Instant},
};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn6, recvmsg};
use tokio::{io::unix::AsyncFd, runtime::Handle, task::yield_now};
use tracing::warn;

use super::{lock, socket_options};
use crate::{
    datagram::{Ends, UNTOLD_HOPS},
    rules::Family,
    sys,
};

/// An answer may be so many times what the client sent, in datagrams and in bytes with IP and UDP headers. A question of DNS has
/// some 70 bytes, and its answer 4096 at most by custom.
const MULTIPLE: u32 = 64;
/// What a client may save up, in datagrams and in bytes.
const MOST: [u32; 2] = [1 << 14, 1 << 24];
/// A client is remembered for one to two times this, from its last datagram on.
const AGE: Duration = Duration::from_mins(1);
/// Most clients in one generation; two are kept.
const GENERATION: usize = 1 << 15;
/// Headers taken before other tasks run.
const BATCH: usize = 256;
const UDP_HEADER: usize = 8;
/// The longest headers of IPv4 and UDP.
const LONGEST: usize = 60 + UDP_HEADER;

/// Whether a datagram is steered to a registered socket.
pub type OwnedGuard = Arc<dyn Fn(Ends) -> bool + Send + Sync>;

/// The clients of all registered sockets.
pub struct Witness {
    /// By family. None until the first owner comes, and where they can't be opened.
    sockets: OnceLock<Vec<Arc<Socket>>>,
    seen: Mutex<Seen>,
    is_owned: OwnedGuard,
}

struct Socket {
    watched: AsyncFd<OwnedFd>,
    family: Family,
}

/// The least recently seen go first, by generations.
#[derive(Debug)]
struct Seen {
    young: HashMap<Ends, Credit>,
    old: HashMap<Ends, Credit>,
    since: Instant,
}

/// What may still be answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Credit {
    datagrams: u32,
    bytes: u32,
    /// The hop limit of the last datagram.
    hops: u8,
}

impl std::fmt::Debug for Witness {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Witness").finish_non_exhaustive()
    }
}

impl Witness {
    /// Sees nothing yet.
    pub fn new(is_owned: OwnedGuard) -> Arc<Self> {
        Arc::new(Self { sockets: OnceLock::new(), seen: Mutex::default(), is_owned })
    }

    /// Looks from now on, unless it does already.
    pub fn open(self: &Arc<Self>, worker: &Handle) {
        let mut opened = false;
        let sockets = self.sockets.get_or_init(|| {
            opened = true;
            [Family::Ipv4, Family::Ipv6].into_iter().filter_map(|family| open(family, worker)).map(Arc::new).collect()
        });
        for socket in sockets.iter().filter(|_| opened) {
            worker.spawn(watch(Arc::clone(self), Arc::clone(socket)));
        }
    }

    /// Whether a client is to have an answer of so many bytes, and with the hop limit of which datagram.
    pub(super) fn spend(&self, ends: Ends, answer: usize) -> Option<u8> {
        let ends = plain(ends);
        let headers = if ends.client.is_ipv4() { 20 } else { 40 } + UDP_HEADER;
        let bytes = u32::try_from(headers + answer).unwrap_or(u32::MAX);
        let known = lock(&self.seen).spend(ends, bytes);
        known.or_else(|| {
            // The question may be there, not read yet.
            for socket in self.sockets.get().into_iter().flatten() {
                while self.read(socket).is_ok() {}
            }
            lock(&self.seen).spend(ends, bytes)
        })
    }

    /// Takes a number of datagrams; `WouldBlock` when there are no more.
    fn read(&self, socket: &Socket) -> io::Result<()> {
        let mut seen = lock(&self.seen);
        seen.age();
        for _ in 0..BATCH {
            let Some((ends, bytes, hops)) = receive(socket)? else { continue };
            if (self.is_owned)(ends) {
                seen.note(ends, bytes, hops);
            }
        }
        Ok(())
    }
}

impl Default for Seen {
    fn default() -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), since: Instant::now() }
    }
}

impl Seen {
    fn note(&mut self, ends: Ends, bytes: u32, hops: u8) {
        let before = self.young.get(&ends).copied().or_else(|| self.old.remove(&ends)).unwrap_or_default();
        if self.young.len() >= GENERATION && !self.young.contains_key(&ends) {
            self.turn();
        }
        let credit = Credit {
            datagrams: before.datagrams.saturating_add(MULTIPLE).min(MOST[0]),
            bytes: before.bytes.saturating_add(bytes.saturating_mul(MULTIPLE)).min(MOST[1]),
            hops,
        };
        self.young.insert(ends, credit);
    }

    fn spend(&mut self, ends: Ends, bytes: u32) -> Option<u8> {
        let credit = self.young.get_mut(&ends).or_else(|| self.old.get_mut(&ends))?;
        let (datagrams, bytes) = (credit.datagrams.checked_sub(1)?, credit.bytes.checked_sub(bytes)?);
        *credit = Credit { datagrams, bytes, hops: credit.hops };
        Some(credit.hops)
    }

    fn age(&mut self) {
        if self.since.elapsed() >= AGE {
            self.turn();
        }
    }

    fn turn(&mut self) {
        self.old = std::mem::take(&mut self.young);
        self.since = Instant::now();
    }
}

fn open(family: Family, worker: &Handle) -> Option<Socket> {
    let _context = worker.enter();
    let opened = socket_options::witness(family).and_then(|socket| sys::watch_readable(OwnedFd::from(socket)));
    match opened {
        Ok(watched) => Some(Socket { watched, family }),
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => None,
        Err(error) => {
            warn!(
                "see which clients write to registered sockets over {family}: {error}; their owners' answers are not sent: grant \
                 anyportd CAP_NET_RAW"
            );
            None
        }
    }
}

/// Reads what comes, for ever.
async fn watch(witness: Arc<Witness>, socket: Arc<Socket>) {
    loop {
        let Ok(mut ready) = socket.watched.readable().await else { return };
        if witness.read(&socket).is_err() {
            ready.clear_ready();
        }
        drop(ready);
        // Also where no clients come any more, what is left of them goes when the next one comes.
        yield_now().await;
    }
}

/// Takes the headers of a datagram: both ends, bytes with headers, and the hop limit.
fn receive(socket: &Socket) -> io::Result<Option<(Ends, u32, u8)>> {
    let mut buffer = [0; LONGEST];
    let mut parts = [io::IoSliceMut::new(&mut buffer)];
    let mut control = nix::cmsg_space!(libc::in6_pktinfo, libc::c_int);
    let message = recvmsg::<SockaddrIn6>(
        socket.watched.as_raw_fd(),
        &mut parts,
        (socket.family == Family::Ipv6).then_some(&mut control),
        MsgFlags::MSG_DONTWAIT,
    )?;
    if socket.family == Family::Ipv4 {
        let length = message.bytes;
        return Ok(of_ipv4(&buffer[..length.min(LONGEST)]));
    }
    let (mut dialled, mut hops) = (None, UNTOLD_HOPS);
    for control in message.cmsgs()? {
        match control {
            ControlMessageOwned::Ipv6PacketInfo(info) => dialled = Some(Ipv6Addr::from(info.ipi6_addr.s6_addr)),
            ControlMessageOwned::Ipv6HopLimit(told) => hops = u8::try_from(told).unwrap_or(UNTOLD_HOPS),
            _ => {}
        }
    }
    let client = message.address.map(|it| it.ip());
    let length = message.bytes;
    let ends = client.zip(dialled).zip(udp(&buffer[..length.min(LONGEST)]));
    Ok(ends.map(|((client, dialled), udp)| (udp.ends(client.into(), dialled.into()), 40 + udp.length, hops)))
}

/// The UDP header.
struct Udp {
    ports: [u16; 2],
    length: u32,
}

impl Udp {
    fn ends(&self, client: IpAddr, dialled: IpAddr) -> Ends {
        Ends { client: (client, self.ports[0]).into(), dialled: (dialled, self.ports[1]).into() }
    }
}

fn udp(header: &[u8]) -> Option<Udp> {
    let field = |at: usize| Some(u16::from_be_bytes(header.get(at..at + 2)?.try_into().ok()?));
    Some(Udp { ports: [field(0)?, field(2)?], length: field(4)?.into() })
}

fn of_ipv4(packet: &[u8]) -> Option<(Ends, u32, u8)> {
    let header = usize::from(packet.first()? & 0xf) * 4;
    let address = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?).into());
    let udp = udp(packet.get(header..)?)?;
    Some((udp.ends(address(12)?, address(16)?), u32::try_from(header).ok()? + udp.length, *packet.get(8)?))
}

/// Without scope and flow of IPv6.
fn plain(Ends { client, dialled }: Ends) -> Ends {
    let plain = |end: SocketAddr| SocketAddr::new(end.ip(), end.port());
    Ends { client: plain(client), dialled: plain(dialled) }
}

#[cfg(test)]
mod tests {
    use super::{AGE, Ends, GENERATION, MOST, MULTIPLE, Seen};

    fn ends(port: u16) -> Ends {
        Ends { client: ([198, 51, 100, 1], port).into(), dialled: ([192, 0, 2, 1], 53).into() }
    }

    #[test]
    fn answers_are_a_multiple_of_what_was_asked() {
        let mut seen = Seen::default();
        assert_eq!(seen.spend(ends(1), 28), None);
        seen.note(ends(1), 100, 50);
        assert_eq!(seen.spend(ends(2), 28), None, "another port of the client");
        assert_eq!((0..1000).filter(|_| seen.spend(ends(1), 28).is_some()).count(), MULTIPLE as usize);
        seen.note(ends(1), 100, 40);
        assert_eq!(seen.spend(ends(1), 100 * (MULTIPLE + 100)), None);
        assert_eq!(seen.spend(ends(1), 100 * MULTIPLE), Some(40));
        assert_eq!(seen.spend(ends(1), 100 * MULTIPLE), None, "what is left of both questions is less");
        (0..1 << 20).for_each(|_| seen.note(ends(1), 65_535, 40));
        let (datagrams, bytes) = (seen.young[&ends(1)].datagrams, seen.young[&ends(1)].bytes);
        assert_eq!([datagrams, bytes], MOST);
    }

    #[test]
    fn clients_are_forgotten() {
        let mut seen = Seen::default();
        for number in 0..3 * GENERATION {
            let [high, low] = [number >> 16, number & 0xffff].map(|it| u16::try_from(it).unwrap());
            let client = ([198, 51, 100, u8::try_from(high).unwrap()], low).into();
            seen.note(Ends { client, ..ends(1) }, 100, 64);
            assert!(seen.spend(Ends { client, ..ends(1) }, 100).is_some());
            assert!(seen.young.len() + seen.old.len() <= 2 * GENERATION);
        }
        seen.note(ends(1), 100, 64);
        for _ in 0..2 {
            assert!(seen.spend(ends(1), 100).is_some());
            seen.since = seen.since.checked_sub(AGE).unwrap();
            seen.age();
        }
        assert_eq!(seen.spend(ends(1), 100), None);
    }
}
