//! What a descriptor must be to be registered, and which packets its socket is for.

use std::{fmt, fs, io, net::SocketAddr, os::unix::fs::MetadataExt as _};

use anyport_common::{flow::Transport, maps::SOCKETS_PER_SERVICE};
use nix::sys::stat::fstat;
use socket2::{Domain, Protocol as Number, SockRef, Type};

use crate::{
    closing::PassedFd,
    privileges,
    rules::{Family, Protocol},
    sys,
};

/// A descriptor of a socket that can be steered to.
#[derive(Debug)]
pub struct Candidate {
    /// The socket.
    pub descriptor: PassedFd,
    /// Its transport.
    pub transport: Transport,
    /// Where it is bound.
    pub local: SocketAddr,
    /// The kernel's name for it.
    pub cookie: u64,
    /// Its inode.
    pub inode: u64,
    /// Which packets it can take: a dual-stack socket those of both families.
    pub families: &'static [Family],
    /// Whether it shares its address with others of its group (`SO_REUSEPORT`).
    pub shares: bool,
}

/// Why a descriptor can't be registered.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unfit(String);

impl Candidate {
    /// Looks at a descriptor. Before anything is steered to its socket, [`Self::in_our_namespace`] has to be asked, too.
    ///
    /// # Errors
    /// It is not a listening TCP socket or an unconnected UDP socket.
    pub fn new(descriptor: PassedFd) -> Result<Self, Unfit> {
        let socket = SockRef::from(&descriptor);
        let domain = socket.domain().map_err(|error| match error.raw_os_error() {
            Some(libc::ENOTSOCK) => Unfit("it is not a socket".into()),
            _ => because("ask for its domain", &error),
        })?;
        let transport = transport(&socket, domain)?;
        match transport {
            Transport::Tcp if !socket.is_listener().map_err(|error| because("ask whether it listens", &error))? => {
                return Err(Unfit("it does not listen".into()));
            }
            Transport::Tcp => {}
            Transport::Udp => {
                if let Some(peer) = socket.peer_addr().ok().and_then(|peer| peer.as_socket()) {
                    return Err(Unfit(format!("it is connected to {peer}")));
                }
            }
        }
        let read = || {
            let local = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::InvalidData)?;
            let is_dual = domain == Domain::IPV6 && local.ip().is_unspecified() && !socket.only_v6()?;
            Ok::<_, io::Error>((local, is_dual, socket.cookie()?, fstat(&descriptor)?.st_ino, socket.reuse_port()?))
        };
        let (local, is_dual, cookie, inode, shares) = read().map_err(|error| because("ask for its address", &error))?;
        if local.port() == 0 {
            return Err(Unfit("it is not bound to a port".into()));
        }
        // An IPv6 socket at ::ffff:192.0.2.1 is one for IPv4.
        let local = SocketAddr::new(local.ip().to_canonical(), local.port());
        let families: &[Family] = match (local, is_dual) {
            (_, true) => &[Family::Ipv4, Family::Ipv6],
            (SocketAddr::V4(_), false) => &[Family::Ipv4],
            (SocketAddr::V6(_), false) => &[Family::Ipv6],
        };
        Ok(Self { descriptor, transport, local, cookie, inode, families, shares })
    }

    /// The same, if its socket belongs to this thread's network namespace. Takes `CAP_NET_ADMIN`, which the daemon has and its clients
    /// may not have: so all code that registers a socket calls this.
    ///
    /// # Errors
    /// It belongs to another one.
    pub fn in_our_namespace(self) -> Result<Self, Unfit> {
        let attempt = "ask for its network namespace";
        let its = {
            let _raised = privileges::raise(privileges::NET_ADMIN);
            sys::network_namespace(&self.descriptor)
        };
        let its = match its {
            // We have the capability in our own one.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                return Err(Unfit("it belongs to another network namespace than anyportd, of other rights".into()));
            }
            its => its.and_then(|its| fs::File::from(its).metadata()).map_err(|error| because(attempt, &error))?,
        };
        let ours = fs::metadata("/proc/thread-self/ns/net").map_err(|error| because(attempt, &error))?;
        if (its.dev(), its.ino()) == (ours.dev(), ours.ino()) {
            return Ok(self);
        }
        let (its, ours) = (its.ino(), ours.ino());
        Err(Unfit(format!("it belongs to another network namespace (net:[{its}]) than anyportd (net:[{ours}])")))
    }

    /// Whether both are of one group, over which the kernel spreads what is steered to any of them.
    fn is_in_group_of(&self, other: &Self) -> bool {
        self.shares && other.shares && (self.transport, self.local) == (other.transport, other.local)
    }
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} (cookie {})", Protocol::from(self.transport), self.local, self.cookie)
    }
}

fn because(attempt: &str, error: &io::Error) -> Unfit {
    Unfit(format!("{attempt}: {error}"))
}

fn transport(socket: &SockRef<'_>, domain: Domain) -> Result<Transport, Unfit> {
    if domain == Domain::UNIX {
        return Err(Unfit("it is a Unix socket".into()));
    }
    if domain != Domain::IPV4 && domain != Domain::IPV6 {
        return Err(Unfit("it is neither an IPv4 nor an IPv6 socket".into()));
    }
    let read = || Ok::<_, io::Error>((socket.r#type()?, socket.protocol()?));
    match read().map_err(|error| because("ask for its protocol", &error))? {
        (Type::STREAM, Some(Number::TCP)) => Ok(Transport::Tcp),
        (Type::DGRAM, Some(Number::UDP)) => Ok(Transport::Udp),
        // The kernel's map of sockets takes none (`sock_map_update_elem_sys`, Linux 6.18).
        (_, Some(Number::MPTCP)) => Err(Unfit(
            "it is a socket of Multipath TCP, to which BPF can't steer; have its program open one of TCP (with Go: \
             GODEBUG=multipathtcp=0)"
                .into(),
        )),
        _ => Err(Unfit("it is neither a TCP nor a UDP socket".into())),
    }
}

/// The sockets for each transport and family, in the order of [`anyport_common::flow::Flow::socket_offset`], by their
/// places among the candidates.
pub type Chosen = [Option<usize>; SOCKETS_PER_SERVICE as usize];

/// Chooses a socket for each transport and family, one of each group.
///
/// # Errors
/// Two distinct sockets would take the same packets: names both.
pub fn choose(candidates: &[Candidate]) -> Result<Chosen, Unfit> {
    let mut chosen = Chosen::default();
    for (at, candidate) in candidates.iter().enumerate() {
        for family in candidate.families {
            let place = &mut chosen[offset(*family, candidate.transport)];
            match place.map(|first| &candidates[first]) {
                None => *place = Some(at),
                Some(first) if first.cookie == candidate.cookie || first.is_in_group_of(candidate) => {}
                Some(first) => {
                    return Err(Unfit(format!(
                        "two distinct sockets would take the same packets over {family}: {first} and {candidate}"
                    )));
                }
            }
        }
    }
    Ok(chosen)
}

/// The place of a socket among a service's, as [`anyport_common::flow::Flow::socket_offset`] counts.
pub(super) fn offset(family: Family, transport: Transport) -> usize {
    let family = match family {
        Family::Ipv4 => 0,
        Family::Ipv6 => 2,
    };
    let transport = match transport {
        Transport::Tcp => 0,
        Transport::Udp => 1,
    };
    family + transport
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
        os::{
            fd::OwnedFd,
            unix::net::{UnixDatagram, UnixListener, UnixStream},
        },
        thread,
    };

    use nix::sched::{CloneFlags, unshare};
    use socket2::{Domain, Protocol, Socket, Type};

    use super::{Candidate, choose};
    use crate::{closing::PassedFd, rules::Family};

    fn refused(descriptor: impl Into<OwnedFd>, why: &str) {
        let error = Candidate::new(PassedFd::new(descriptor, 0)).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }

    fn bound(kind: Type, address: &str, adapt: impl FnOnce(&Socket)) -> Socket {
        let address: SocketAddr = address.parse().unwrap();
        let socket = Socket::new(Domain::for_address(address), kind, None).unwrap();
        adapt(&socket);
        socket.bind(&address.into()).unwrap();
        if kind == Type::STREAM {
            socket.listen(1).unwrap();
        }
        socket
    }

    fn candidate(socket: impl Into<OwnedFd>) -> Candidate {
        Candidate::new(PassedFd::new(socket, 0)).unwrap()
    }

    #[test]
    fn takes_sockets_that_wait_for_strangers() {
        const BOTH: &[Family] = &[Family::Ipv4, Family::Ipv6];
        for kind in [Type::STREAM, Type::DGRAM] {
            for (address, only_v6, families) in [
                ("127.0.0.1:0", false, &BOTH[..1]),
                ("0.0.0.0:0", false, &BOTH[..1]),
                ("[::1]:0", false, &BOTH[1..]),
                ("[::]:0", true, &BOTH[1..]),
                ("[::]:0", false, BOTH),
                ("[::ffff:127.0.0.1]:0", false, &BOTH[..1]),
            ] {
                let socket = bound(kind, address, |socket| {
                    if address.starts_with('[') {
                        socket.set_only_v6(only_v6).unwrap();
                    }
                });
                let cookie = socket.cookie().unwrap();
                let candidate = candidate(socket);
                assert_eq!((candidate.families, candidate.cookie), (families, cookie), "{address}");
                assert!(!candidate.local.to_string().contains("ffff") && candidate.local.port() > 0);
            }
        }
    }

    #[test]
    fn refuses_everything_else() {
        refused(File::open("/dev/null").unwrap(), "not a socket");
        refused(UnixStream::pair().unwrap().0, "a Unix socket");
        refused(UnixDatagram::unbound().unwrap(), "a Unix socket");
        let directory = tempfile::tempdir().unwrap();
        refused(UnixListener::bind(directory.path().join("socket")).unwrap(), "a Unix socket");
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            refused(TcpStream::connect(listener.local_addr().unwrap()).unwrap(), "does not listen");
            let (one, other) = (UdpSocket::bind(address).unwrap(), UdpSocket::bind(address).unwrap());
            one.connect(other.local_addr().unwrap()).unwrap();
            refused(one, "connected to");
        }
        refused(Socket::new(Domain::IPV4, Type::STREAM, None).unwrap(), "does not listen");
        refused(Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap(), "not bound");
        if let Ok(multipath) = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)) {
            refused(multipath, "Multipath TCP");
        }
        let abroad = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            UdpSocket::bind("0.0.0.0:0").unwrap()
        });
        let abroad = candidate(abroad.join().unwrap()).in_our_namespace().unwrap_err().to_string();
        assert!(abroad.contains("another network namespace (net:["), "{abroad}");
    }

    /// Also where the thread is not the process' first one.
    #[test]
    fn sockets_of_our_namespace_are_known_by_it() {
        for domain in [Domain::IPV4, Domain::IPV6] {
            let address = if domain == Domain::IPV4 { "127.0.0.1:0" } else { "[::1]:0" };
            candidate(bound(Type::STREAM, address, |_| ())).in_our_namespace().unwrap();
        }
        let elsewhere = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            candidate(UdpSocket::bind("0.0.0.0:4242").unwrap()).in_our_namespace().unwrap();
        });
        elsewhere.join().unwrap();
    }

    #[test]
    fn one_of_a_group_stands_for_it_and_two_groups_are_refused() {
        let share = |socket: &Socket| socket.set_reuse_port(true).unwrap();
        let first = candidate(bound(Type::STREAM, "127.0.0.1:0", share));
        let again = Candidate::new(first.descriptor.try_clone().unwrap()).unwrap();
        let address = first.local.to_string();
        let second = candidate(bound(Type::STREAM, &address, share));
        let udp = candidate(bound(Type::DGRAM, &address, share));
        let dual = candidate(bound(Type::STREAM, "[::]:0", share));
        let mut all = vec![first, again, second, udp];
        assert_eq!(choose(&all).unwrap(), [Some(0), Some(3), None, None]);
        all.push(dual);
        let error = choose(&all).unwrap_err().to_string();
        assert!(error.contains(&address) && error.contains("[::]:") && error.contains("two distinct"), "{error}");
        all.drain(..3);
        assert_eq!(choose(&all).unwrap(), [Some(1), Some(0), Some(1), None]);
    }
}
