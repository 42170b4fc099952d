//! Which options every socket of a service gets: those that listen, and those to clients and upstreams.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
    os::fd::AsFd,
    time::Duration,
};

use anyport_common::flow::Transport;
use nix::sys::socket::{setsockopt, sockopt};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, SockFilter, Socket, TcpKeepalive, Type};

use crate::{datagram, hops, human_duration::HumanDuration, privileges, rules::Family, sys};

/// Room for datagrams that wait for a worker, in bytes as the kernel counts them (a small datagram is about 800):
/// one socket stands in for millions, and the usual 208 KiB are gone after 270 datagrams.
const RECEIVE_BUFFER: usize = 4 << 20;
/// As above, for one flow that is forwarded.
const FLOW_BUFFER: usize = 1 << 20;
/// A peer that went away without a word is noticed after this time and nine probes, 75 seconds apart.
const KEEP_ALIVE: Duration = Duration::from_mins(5);
/// Connections with data in their first packet that may wait for their handshake.
const FAST_OPEN_QUEUE: u32 = 1024;

/// Options of the sockets on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct TcpOptions {
    /// Whether small pieces leave at once (`TCP_NODELAY`).
    pub nodelay: bool,
    /// Silence after which the peers' kernels are asked whether they are still there (`SO_KEEPALIVE`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keepalive: Option<HumanDuration>,
    /// Whether clients may send data with their first packet (`TCP_FASTOPEN`).
    pub fast_open: bool,
    /// Bytes of the send buffer; as the kernel sees fit if absent (`SO_SNDBUF`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub send_buffer: Option<NonZeroU32>,
    /// Bytes of the receive buffer; as the kernel sees fit if absent (`SO_RCVBUF`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub receive_buffer: Option<NonZeroU32>,
}

impl Default for TcpOptions {
    fn default() -> Self {
        Self { nodelay: true, keepalive: None, fast_open: false, send_buffer: None, receive_buffer: None }
    }
}

/// A socket, not bound yet, that may have foreign addresses for its own.
pub(super) fn listening(family: Family, transport: Transport) -> io::Result<Socket> {
    let domain = match family {
        Family::Ipv4 => Domain::IPV4,
        Family::Ipv6 => Domain::IPV6,
    };
    let kind = match transport {
        Transport::Tcp => Type::STREAM,
        Transport::Udp => Type::DGRAM,
    };
    let socket = Socket::new(domain, kind.nonblocking(), None)?;
    let _raised = privileges::raise(privileges::NET_ADMIN);
    set_transparent(&socket, family)?;
    if family == Family::Ipv6 {
        socket.set_only_v6(true)?;
    }
    match (transport, family) {
        (Transport::Tcp, _) => {
            // Accepted connections inherit these, which spares two system calls for each.
            socket.set_tcp_nodelay(true)?;
            socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEP_ALIVE))?;
        }
        (Transport::Udp, _) => {
            datagram::tell_destinations(&socket, family)?;
            hops::tell_hop_limits(&socket, family)?;
        }
    }
    if transport == Transport::Udp && setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
        // Not privileged enough to go beyond net.core.rmem_max, such as in a container.
        socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    }
    Ok(socket)
}

/// Lets a socket be bound to, and be found by, addresses that are not the host's.
fn set_transparent(socket: &Socket, family: Family) -> io::Result<()> {
    match family {
        Family::Ipv4 => socket.set_ip_transparent_v4(true),
        Family::Ipv6 => socket.set_ip_transparent_v6(true),
    }
}

/// A socket, not connected yet, to an upstream: from the address `source` if there is one, whosever it is.
pub(super) fn upstream(options: &TcpOptions, to: SocketAddr, source: Option<IpAddr>) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM.nonblocking(), None)?;
    if let Some(source) = source {
        set_transparent(&socket, family_of(source))?;
        // The port is chosen when the destination is known, so that as many connections as ports can go to each.
        setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
        // A server of the host may want the same port of the wildcard address.
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    if options.nodelay {
        socket.set_tcp_nodelay(true)?;
    }
    set_common(&socket, options)?;
    Ok(socket)
}

/// Sets up a listening socket. What it accepts inherits all of it, which spares system calls for each connection.
pub(super) fn set_up_listener(socket: &Socket, options: &TcpOptions) -> io::Result<()> {
    socket.set_tcp_nodelay(options.nodelay)?;
    if options.fast_open {
        sys::set_fast_open(socket, FAST_OPEN_QUEUE)?;
    }
    set_common(socket, options)
}

fn set_common(socket: &Socket, options: &TcpOptions) -> io::Result<()> {
    if let Some(keepalive) = options.keepalive {
        socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(keepalive.0))?;
    }
    if let Some(size) = options.send_buffer {
        socket.set_send_buffer_size(size.get() as usize)?;
    }
    if let Some(size) = options.receive_buffer {
        socket.set_recv_buffer_size(size.get() as usize)?;
    }
    Ok(())
}

/// A socket that sends answers from this address and port, whosever they are.
pub(super) fn reply(from: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(from), Type::DGRAM.nonblocking(), None)?;
    set_transparent(&socket, family_of(from.ip()))?;
    // Several workers answer from one address. Not SO_REUSEPORT: it would make this one of the receivers
    // where another socket with that option is bound to the very address and port.
    socket.set_reuse_address(true)?;
    // It is not meant to receive; one datagram is always kept, which is enough to notice.
    socket.set_recv_buffer_size(0)?;
    socket.bind(&from.into())?;
    Ok(socket)
}

/// As [`reply`], of headers that the caller writes.
pub(super) fn raw(from: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(from), Type::RAW.nonblocking(), Some(Protocol::UDP))?;
    socket.set_recv_buffer_size(0)?;
    set_transparent(&socket, family_of(from.ip()))?;
    Ok(socket)
}

/// A socket that gets the headers of each datagram that is delivered here, and never sends.
pub(super) fn witness(family: Family) -> io::Result<Socket> {
    /// For classic BPF: return a constant, which is how many bytes are kept.
    const RETURN: u16 = 0x06;
    let _raised = privileges::raise(privileges::NET_ADMIN.union(privileges::CapabilitySet::NET_RAW));
    // IPv4 has its header, of 60 bytes at most, before that of UDP; IPv6 has not.
    let (domain, kept) = match family {
        Family::Ipv4 => (Domain::IPV4, 60 + 8),
        Family::Ipv6 => (Domain::IPV6, 8),
    };
    let socket = Socket::new(domain, Type::RAW.nonblocking(), Some(Protocol::UDP))?;
    socket.attach_filter(&[SockFilter::new(RETURN, 0, 0, kept)])?;
    if family == Family::Ipv6 {
        setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
        hops::tell_hop_limits(&socket, family)?;
    }
    setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)
        .or_else(|_| setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER))?;
    Ok(socket)
}

/// A socket for datagrams that is connected to `to`, from the address and port `from` if there is one, whosever it is.
pub(super) fn flow(to: SocketAddr, from: Option<SocketAddr>) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM.nonblocking(), None)?;
    if let Some(from) = from {
        set_transparent(&socket, family_of(from.ip()))?;
        // Other flows have the same address and port at their end.
        socket.set_reuse_address(true)?;
        socket.bind(&from.into())?;
    }
    socket.connect(&to.into())?;
    Ok(socket)
}

/// As [`flow`], from this host's address and a port that other flows may have, too.
pub(super) fn shared_flow(to: SocketAddr, port: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM.nonblocking(), None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&port.into())?;
    socket.connect(&to.into())?;
    Ok(socket)
}

/// For a flow in both directions: datagrams of one size come and go in one piece, and more of them may wait.
pub(super) fn set_up_large_flow(socket: &impl AsFd) -> io::Result<()> {
    setsockopt(socket, sockopt::UdpGroSegment, &true)?;
    // Beyond net.core.rmem_max where that is allowed.
    setsockopt(socket, sockopt::RcvBufForce, &FLOW_BUFFER)
        .or_else(|_| setsockopt(socket, sockopt::RcvBuf, &FLOW_BUFFER))?;
    Ok(())
}

fn family_of(address: IpAddr) -> Family {
    if address.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 }
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, time::Duration};

    use anyport_common::flow::Transport;
    use nix::sys::socket::{getsockopt, sockopt};

    use socket2::{Domain, Socket, Type};

    use super::{TcpOptions, flow, listening, raw, reply, set_up_large_flow, set_up_listener, upstream};
    use crate::{human_duration::HumanDuration, rules::Family};

    const OPTIONS: TcpOptions = TcpOptions {
        nodelay: false,
        keepalive: Some(HumanDuration(Duration::from_secs(33))),
        fast_open: true,
        send_buffer: Some(std::num::NonZeroU32::new(70_000).unwrap()),
        receive_buffer: Some(std::num::NonZeroU32::new(80_000).unwrap()),
    };

    #[test]
    fn sockets_have_the_options() {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        listener.set_tcp_nodelay(true).unwrap();
        set_up_listener(&listener, &OPTIONS).unwrap();
        let socket = upstream(&OPTIONS, "127.0.0.1:1".parse().unwrap(), None).unwrap();
        for socket in [listener, socket] {
            assert!(!socket.tcp_nodelay().unwrap());
            assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(33));
            // The kernel doubles what it is told.
            assert_eq!((socket.send_buffer_size().unwrap(), socket.recv_buffer_size().unwrap()), (140_000, 160_000));
        }
        let socket = upstream(&TcpOptions::default(), "127.0.0.1:1".parse().unwrap(), None).unwrap();
        assert!(socket.tcp_nodelay().unwrap() && !socket.keepalive().unwrap());
    }

    #[test]
    fn the_source_is_the_clients() {
        for (to, source) in [("127.0.0.1:1", "198.51.100.7"), ("[::1]:1", "2001:db8::7")] {
            let to: SocketAddr = to.parse().unwrap();
            let socket = upstream(&TcpOptions::default(), to, Some(source.parse().unwrap())).unwrap();
            let local = socket.local_addr().unwrap().as_socket().unwrap();
            assert_eq!((local.ip(), local.port()), (source.parse().unwrap(), 0));
        }
    }

    #[test]
    fn listening_sockets_are_transparent_and_hand_their_options_down() {
        for family in [Family::Ipv4, Family::Ipv6] {
            for transport in [Transport::Tcp, Transport::Udp] {
                let socket = listening(family, transport).unwrap();
                assert!(is_transparent(&socket, family) && socket.nonblocking().unwrap());
                match transport {
                    Transport::Tcp => {
                        assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
                        assert_eq!(socket.tcp_keepalive_time().unwrap(), super::KEEP_ALIVE);
                    }
                    Transport::Udp => assert_eq!(socket.recv_buffer_size().unwrap(), 2 * super::RECEIVE_BUFFER),
                }
                if family == Family::Ipv6 {
                    assert!(socket.only_v6().unwrap());
                }
            }
        }
    }

    #[test]
    fn sockets_of_datagrams_have_the_address_of_the_client_s_destination() {
        for (from, to) in [("198.51.100.7:53", "127.0.0.1:9"), ("[2001:db8::7]:53", "[::1]:9")] {
            let [from, to]: [SocketAddr; 2] = [from, to].map(|it| it.parse().unwrap());
            let family = super::family_of(from.ip());
            let answering = reply(from).unwrap();
            let flow = flow(to, Some(from)).unwrap();
            set_up_large_flow(&flow).unwrap();
            for socket in [&answering, &flow] {
                assert_eq!(socket.local_addr().unwrap().as_socket(), Some(from));
                assert!(is_transparent(socket, family) && socket.reuse_address().unwrap());
                assert!(!socket.reuse_port().unwrap() && socket.nonblocking().unwrap());
            }
            assert_eq!(flow.peer_addr().unwrap().as_socket(), Some(to));
            assert!(getsockopt(&flow, sockopt::UdpGroSegment).unwrap());
            assert!(is_transparent(&raw(from).unwrap(), family));
        }
    }

    fn is_transparent(socket: &Socket, family: Family) -> bool {
        match family {
            Family::Ipv4 => socket.ip_transparent_v4().unwrap(),
            Family::Ipv6 => socket.ip_transparent_v6().unwrap(),
        }
    }
}
