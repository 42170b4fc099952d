//! Receiving one datagram with both its ends.

use std::{
    io::{self, IoSliceMut},
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd},
};

use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrStorage, recvmsg, setsockopt, sockopt,
};

use crate::rules::Family;

/// The largest datagram; IPv6 jumbograms are not for us.
pub(crate) const LARGEST: usize = 65_535;

/// The hop limit of a datagram of which the kernel does not tell.
pub(crate) const UNTOLD_HOPS: u8 = u8::MAX;

/// A datagram whose bytes are in the buffer that it was received into.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Datagram {
    pub(crate) length: usize,
    /// None if the datagram is not one to answer: it did not fit, or its destination is a group of hosts. An answer
    /// would not leave from there, and many hosts answering one question make an attack.
    pub(crate) ends: Option<Ends>,
    /// Routers that it could still have passed, if that is to be told: the TTL of IPv4.
    pub(crate) hops: u8,
}

/// Who wrote to what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ends {
    /// Where it came from.
    pub client: SocketAddr,
    /// The address and port that it was sent to.
    pub dialled: SocketAddr,
}

/// Has the kernel tell with each datagram where it was sent to. Takes no privilege.
pub(crate) fn tell_destinations(socket: &impl AsFd, family: Family) -> io::Result<()> {
    match family {
        Family::Ipv4 => {
            setsockopt(socket, sockopt::Ipv4OrigDstAddr, &true)?;
            setsockopt(socket, sockopt::Ipv4PacketInfo, &true)?;
        }
        Family::Ipv6 => setsockopt(socket, sockopt::Ipv6OrigDstAddr, &true)?,
    }
    Ok(())
}

/// Room for what the kernel tells about a datagram.
pub(crate) fn control_buffer() -> Vec<u8> {
    nix::cmsg_space!(libc::sockaddr_in6, libc::in_pktinfo, libc::c_int)
}

/// Takes the next datagram into `buffer`; `WouldBlock` if there is none.
pub(crate) fn receive(socket: &impl AsRawFd, buffer: &mut [u8], control: &mut [u8]) -> io::Result<Datagram> {
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(control), MsgFlags::empty())?;
    let is_whole = !message.flags.contains(MsgFlags::MSG_TRUNC);
    let client = message.address.and_then(|address| match address.as_sockaddr_in() {
        Some(v4) => Some(SocketAddr::from(*v4)),
        None => address.as_sockaddr_in6().map(|v6| SocketAddr::from(*v6)),
    });
    let mut dialled = None;
    // Our own address, as the kernel chooses it: not the original destination if that belongs to many hosts.
    let mut own = None;
    let mut hops = None;
    for control in message.cmsgs()? {
        match control {
            ControlMessageOwned::Ipv4OrigDstAddr(v4) => dialled = Some(SocketAddr::from(SockaddrIn::from(v4))),
            ControlMessageOwned::Ipv6OrigDstAddr(v6) => dialled = Some(SocketAddr::from(SockaddrIn6::from(v6))),
            ControlMessageOwned::Ipv4PacketInfo(info) => own = Some(info.ipi_spec_dst.s_addr.to_ne_bytes().into()),
            ControlMessageOwned::Ipv4Ttl(told) | ControlMessageOwned::Ipv6HopLimit(told) => {
                hops = u8::try_from(told).ok();
            }
            _ => {}
        }
    }
    let is_single = |dialled: IpAddr| own.unwrap_or(dialled) == dialled && !dialled.is_multicast();
    let ends = match (client, dialled) {
        (Some(client), Some(dialled)) if is_whole && is_single(dialled.ip()) => Some(Ends { client, dialled }),
        _ => None,
    };
    Ok(Datagram { length: message.bytes, ends, hops: hops.unwrap_or(UNTOLD_HOPS) })
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, UdpSocket};

    use super::{Ends, control_buffer, receive, tell_destinations};
    use crate::rules::Family;

    #[test]
    fn tells_one_host_from_many() {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        tell_destinations(&socket, Family::Ipv4).unwrap();
        let port = socket.local_addr().unwrap().port();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.set_broadcast(true).unwrap();
        let (mut buffer, mut control) = ([0; 9], control_buffer());
        for (dialled, text, is_answerable) in [
            ([127, 0, 0, 1], "one", true),
            ([127, 9, 9, 9], "one more", true),
            ([127, 255, 255, 255], "many", false),
            ([127, 0, 0, 1], "too much for it", false),
        ] {
            let dialled = SocketAddr::from((dialled, port));
            client.send_to(text.as_bytes(), dialled).unwrap();
            let datagram = receive(&socket, &mut buffer, &mut control).unwrap();
            let client = client.local_addr().unwrap();
            assert_eq!(datagram.length, text.len().min(9));
            assert_eq!(datagram.ends, is_answerable.then_some(Ends { client, dialled }));
        }
    }
}
