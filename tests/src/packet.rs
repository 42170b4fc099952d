//! Packets that no ordinary socket sends: with IPv4 options and chains of IPv6 extension headers.

use std::{
    io::{self, Read as _},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, Socket, Type};

/// `IPPROTO_RAW`: the caller brings the IP header.
const RAW: i32 = 255;
const TCP: u8 = 6;
const UDP: u8 = 17;
const SYN: u8 = 0x02;
const SYN_ACK: u8 = 0x12;
/// The sequence number of every SYN.
const SEQUENCE: u32 = 0x0a0b_0c0d;

/// What stands between the IP header and the transport.
#[derive(Clone, Copy, Debug)]
pub enum Extra {
    /// IPv4 options; padded to full words by the caller.
    Options(&'static [u8]),
    /// IPv6 extension headers by their protocol numbers, each of eight bytes.
    Chain(&'static [u8]),
    /// IPv4 fragments with this many bytes, a multiple of eight.
    Fragments(usize),
}

/// Sends a UDP datagram with `payload`, to be called in the namespace of `from`.
pub fn send_udp(from: SocketAddr, to: SocketAddr, extra: Extra, payload: &[u8]) -> io::Result<()> {
    let length = u16::try_from(8 + payload.len()).expect("a short payload");
    let mut segment = [from.port().to_be_bytes(), to.port().to_be_bytes(), length.to_be_bytes(), [0, 0]].concat();
    segment.extend_from_slice(payload);
    send(from, to, extra, UDP, segment, 6)
}

/// Sends a SYN and waits for the peer's SYN and acknowledgement as long as `patience`, to be called in the namespace of
/// `from`. The kernel there knows of no such connection and resets it.
pub fn shake_hands(from: SocketAddr, to: SocketAddr, extra: Extra, patience: Duration) -> io::Result<()> {
    let inbox = Socket::new(Domain::for_address(from), Type::RAW, Some(Protocol::TCP))?;
    inbox.set_read_timeout(Some(patience))?;
    let mut segment = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    segment.extend_from_slice(&SEQUENCE.to_be_bytes());
    segment.extend_from_slice(&[0, 0, 0, 0, 0x50, SYN, 0xff, 0xff, 0, 0, 0, 0]);
    send(from, to, extra, TCP, segment, 16)?;
    let expected = [to.port().to_be_bytes(), from.port().to_be_bytes()].concat();
    let end = Instant::now() + patience;
    let mut buffer = [0; 2_048];
    while Instant::now() < end {
        let length = (&inbox).read(&mut buffer)?;
        // Raw sockets see the IP header for IPv4 only.
        let header = if from.is_ipv4() { usize::from(buffer[0] & 0x0f) * 4 } else { 0 };
        let segment = &buffer[header..length];
        if segment.starts_with(&expected) && segment[13] == SYN_ACK {
            assert_eq!(segment[8..12], (SEQUENCE + 1).to_be_bytes(), "what the peer acknowledges");
            return Ok(());
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// Sends one packet; `checksum` is where the transport header keeps it.
fn send(
    from: SocketAddr,
    to: SocketAddr,
    extra: Extra,
    transport: u8,
    mut segment: Vec<u8>,
    checksum: usize,
) -> io::Result<()> {
    let sum = !folded(&[pseudo_header(from.ip(), to.ip(), transport, segment.len()), segment.clone()].concat());
    segment[checksum..checksum + 2].copy_from_slice(&sum.to_be_bytes());
    let headers = match (from.ip(), to.ip(), extra) {
        (IpAddr::V4(from), IpAddr::V4(to), Extra::Options(options)) => {
            let words = u8::try_from(5 + options.len() / 4).expect("at most ten words of options");
            // The kernel fills in the total length, the identification and the checksum.
            let mut packet = vec![0x40 | words, 0, 0, 0, 0, 0, 0, 0, 64, transport, 0, 0];
            packet.extend_from_slice(&from.octets());
            packet.extend_from_slice(&to.octets());
            packet.extend_from_slice(options);
            packet
        }
        (IpAddr::V6(from), IpAddr::V6(to), Extra::Chain(chain)) => {
            let headers = extension_headers(chain, transport);
            let length = u16::try_from(headers.len() + segment.len()).expect("a short packet");
            let mut packet = vec![0x60, 0, 0, 0];
            packet.extend_from_slice(&length.to_be_bytes());
            packet.extend_from_slice(&[*chain.first().unwrap_or(&transport), 64]);
            packet.extend_from_slice(&from.octets());
            packet.extend_from_slice(&to.octets());
            packet.extend_from_slice(&headers);
            packet
        }
        (IpAddr::V4(from), IpAddr::V4(to), Extra::Fragments(_)) => {
            // Unlike the identification of a whole packet, that of a fragment is not filled in.
            let mut packet = vec![0x45, 0, 0, 0, 0x12, 0x34, 0, 0, 64, transport, 0, 0];
            packet.extend_from_slice(&from.octets());
            packet.extend_from_slice(&to.octets());
            packet
        }
        mixed => panic!("one IP version is needed throughout: {mixed:?}"),
    };
    let outbox = Socket::new(Domain::for_address(from), Type::RAW, Some(Protocol::from(RAW)))?;
    let size = if let Extra::Fragments(size) = extra { size } else { segment.len() };
    let last = segment.len().div_ceil(size) - 1;
    for (number, part) in segment.chunks(size).enumerate() {
        let mut packet = [headers.as_slice(), part].concat();
        if let Extra::Fragments(size) = extra {
            let more = if number == last { 0 } else { 0x2000 };
            let offset = u16::try_from(number * size / 8).expect("a short packet") | more;
            packet[6..8].copy_from_slice(&offset.to_be_bytes());
        }
        let sent = outbox.send_to(&packet, &SocketAddr::new(to.ip(), 0).into())?;
        assert!(sent > 0, "nothing was sent");
    }
    Ok(())
}

fn extension_headers(chain: &[u8], transport: u8) -> Vec<u8> {
    let mut headers = Vec::new();
    for (position, kind) in chain.iter().enumerate() {
        let next = *chain.get(position + 1).unwrap_or(&transport);
        match kind {
            // A fragment header of a datagram that is whole.
            44 => headers.extend_from_slice(&[next, 0, 0, 0, 1, 2, 3, 4]),
            // Hop-by-hop or destination options: padding of six bytes.
            _ => headers.extend_from_slice(&[next, 0, 1, 4, 0, 0, 0, 0]),
        }
    }
    headers
}

fn pseudo_header(from: IpAddr, to: IpAddr, transport: u8, length: usize) -> Vec<u8> {
    let length = u32::try_from(length).expect("a short segment").to_be_bytes();
    let mut header = Vec::new();
    for address in [from, to] {
        match address {
            IpAddr::V4(address) => header.extend_from_slice(&address.octets()),
            IpAddr::V6(address) => header.extend_from_slice(&address.octets()),
        }
    }
    header.extend_from_slice(&length);
    header.extend_from_slice(&[0, 0, 0, transport]);
    header
}

/// The ones' complement sum of 16-bit words.
fn folded(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).expect("folded to 16 bits")
}
