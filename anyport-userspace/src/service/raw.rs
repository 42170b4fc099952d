//! Answers from a port that another socket of the host has for itself.
//!
//! A resolver on 0.0.0.0:53 keeps everybody else from binding port 53 of any address, unless it allows sharing. What is
//! steered is still ours to answer, so the UDP header is written here and sent through a raw socket, which asks for no
//! port (needs `CAP_NET_RAW`). The kernel adds the IP header, and fragments where it must.

use std::{io, net::SocketAddr};

use super::{mark::Mark, socket_options};
use crate::{hops::set_hops, rules::Family};

const UDP: u8 = 17;
const HEADER: usize = 8;

/// Sends one datagram with this hop limit. The socket is not kept: while it is open, it gets a copy of each datagram of the host.
pub(super) fn send((from, to): (SocketAddr, SocketAddr), data: &[u8], hops: u8, mark: Option<Mark>) -> io::Result<()> {
    let socket = socket_options::raw(from)?;
    Mark::put_on(mark, &socket)?;
    set_hops(&socket, if to.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 }, hops)?;
    // Where there is a port, raw sockets want 0.
    let address_of = |end: SocketAddr| SocketAddr::new(end.ip(), 0).into();
    socket.bind(&address_of(from))?;
    socket.send_to(&datagram(from, to, data)?, &address_of(to)).map(drop)
}

fn datagram(from: SocketAddr, to: SocketAddr, data: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(HEADER + data.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut datagram = Vec::with_capacity(HEADER + data.len());
    for field in [from.port(), to.port(), length, 0] {
        datagram.extend(field.to_be_bytes());
    }
    datagram.extend(data);
    let checksum = checksum(from, to, &datagram);
    datagram[6..HEADER].copy_from_slice(&checksum.to_be_bytes());
    Ok(datagram)
}

/// RFC 768, and RFC 8200 section 8.1: over the addresses, the protocol, the length, and the datagram.
fn checksum(from: SocketAddr, to: SocketAddr, datagram: &[u8]) -> u16 {
    let words = |bytes: &[u8]| -> u64 {
        bytes.chunks(2).map(|pair| u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u64::from(*low))).sum()
    };
    let address = |end: SocketAddr| match end {
        SocketAddr::V4(end) => words(&end.ip().octets()),
        SocketAddr::V6(end) => words(&end.ip().octets()),
    };
    let mut sum = address(from) + address(to) + u64::from(UDP) + datagram.len() as u64 + words(datagram);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    match !u16::try_from(sum).unwrap_or(u16::MAX) {
        // 0 would say that there is no checksum.
        0 => u16::MAX,
        checksum => checksum,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{SocketAddr, UdpSocket},
        time::Duration,
    };

    use super::send;

    #[test]
    fn sends_from_a_port_that_is_taken() {
        for (owner, from, client) in [("0.0.0.0:0", "127.0.0.9", "127.0.0.1:0"), ("[::]:0", "::1", "[::1]:0")] {
            let owner = UdpSocket::bind(owner).unwrap();
            let from = SocketAddr::new(from.parse().unwrap(), owner.local_addr().unwrap().port());
            assert!(UdpSocket::bind(from).is_err(), "the port is taken");
            let client = UdpSocket::bind(client).unwrap();
            client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            // Odd and even lengths, all zeros and all ones, and what has to be fragmented even on loopback.
            for data in [&b"odd"[..], b"even", &[], &[0; 64], &[0xff; 64], vec![7; 65_000].as_slice()] {
                send((from, client.local_addr().unwrap()), data, 64, None).unwrap();
                let mut buffer = vec![0; 65_535];
                let (length, seen) = client.recv_from(&mut buffer).unwrap();
                assert_eq!((&buffer[..length], seen), (data, from));
            }
        }
    }
}
