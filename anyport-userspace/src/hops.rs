//! Hop limits (the TTL of IPv4) of what is sent for a datagram: they end what would go round for ever.

use std::{
    io::{self, IoSlice},
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd},
    sync::atomic::{AtomicU8, Ordering::Relaxed},
};

use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg, setsockopt, sockopt};
use socket2::SockRef;

use crate::rules::Family;

/// Most routers that what we send may pass; what Linux uses by default.
const MOST_HOPS: u8 = 64;

/// Has the kernel tell the hop limit of each datagram.
pub(crate) fn tell_hop_limits(socket: &impl AsFd, family: Family) -> io::Result<()> {
    match family {
        Family::Ipv4 => setsockopt(socket, sockopt::Ipv4RecvTtl, &true)?,
        Family::Ipv6 => setsockopt(socket, sockopt::Ipv6RecvHopLimit, &true)?,
    }
    Ok(())
}

/// The hop limit of what is sent for a datagram that came with this one; none if it is used up.
///
/// An answer, and what is forwarded, gets one less than what it is sent for, as behind a router. So what goes round between
/// any number of anyports comes to its end, however it began, and nothing has to be remembered for that.
pub(crate) fn next_hops(received: u8) -> Option<u8> {
    (received > 1).then(|| (received - 1).min(MOST_HOPS))
}

/// Sends a datagram with this hop limit over a socket that is not connected.
pub(crate) fn send_with_hops(socket: &impl AsRawFd, to: SocketAddr, data: &[u8], hops: u8) -> io::Result<()> {
    let hops = libc::c_int::from(hops);
    let control = match to {
        SocketAddr::V4(_) => [ControlMessage::Ipv4Ttl(&hops)],
        SocketAddr::V6(_) => [ControlMessage::Ipv6HopLimit(&hops)],
    };
    let parts = [IoSlice::new(data)];
    sendmsg(socket.as_raw_fd(), &parts, &control, MsgFlags::empty(), Some(&SockaddrStorage::from(to)))?;
    Ok(())
}

/// Has all that a socket sends have this hop limit.
pub(crate) fn set_hops(socket: &impl AsFd, family: Family, hops: u8) -> io::Result<()> {
    let socket = SockRef::from(socket);
    match family {
        Family::Ipv4 => socket.set_ttl_v4(hops.into()),
        Family::Ipv6 => socket.set_unicast_hops_v6(hops.into()),
    }
}

/// The hop limit that a socket was given last, so that it is set only when another one is wanted.
#[derive(Debug, Default)]
pub(crate) struct Hops(AtomicU8);

impl Hops {
    /// Has what the socket sends to `to` from now on have this hop limit.
    pub(crate) fn set(&self, socket: &impl AsFd, to: SocketAddr, hops: u8) -> io::Result<()> {
        if self.0.load(Relaxed) != hops {
            set_hops(socket, if to.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 }, hops)?;
            self.0.store(hops, Relaxed);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::{MOST_HOPS, next_hops, send_with_hops, tell_hop_limits};
    use crate::{
        datagram::{control_buffer, receive, tell_destinations},
        rules::Family,
    };

    /// What two of us say to each other ends.
    #[test]
    fn each_answer_has_one_hop_less() {
        for (received, next) in [(255, 64), (128, 64), (65, 64), (64, 63), (2, 1)] {
            assert_eq!(next_hops(received), Some(next));
        }
        assert_eq!((next_hops(1), next_hops(0)), (None, None));
        for (family, local) in [(Family::Ipv4, "127.0.0.1:0"), (Family::Ipv6, "[::1]:0")] {
            let (one, other) = (UdpSocket::bind(local).unwrap(), UdpSocket::bind(local).unwrap());
            for socket in [&one, &other] {
                tell_destinations(socket, family).unwrap();
                tell_hop_limits(socket, family).unwrap();
            }
            let (mut from, mut to) = (&one, &other);
            let (mut hops, mut count) = (Some(MOST_HOPS), 0);
            while let Some(next) = hops {
                send_with_hops(from, to.local_addr().unwrap(), b"again", next).unwrap();
                hops = next_hops(receive(to, &mut [0; 9], &mut control_buffer()).unwrap().hops);
                (from, to) = (to, from);
                count += 1;
            }
            assert_eq!(count, MOST_HOPS);
        }
    }
}
