//! Packets that no ordinary socket sends: with IPv4 options and chains of IPv6 extension headers.

use std::{
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::{AsRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    ifaddrs::getifaddrs,
    sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, sendto, socket},
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{dial::again, netns::Netns};

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

/// Where frames leave.
#[derive(Debug)]
pub struct Wire {
    socket: OwnedFd,
    address: LinkAddr,
    header: Vec<u8>,
}

impl Wire {
    /// From the client of a topology, in whose namespace this is called, to its anyport host.
    pub fn to(host: &Netns) -> Self {
        let link = |name: &str| {
            let mut all = getifaddrs().expect("interfaces").filter(|it| it.interface_name == name);
            all.find_map(|it| it.address?.as_link_addr().copied()).expect("an address of the interface")
        };
        let there = host.enter(|| link("client"));
        let address = link("eth0");
        let header = [there.addr().expect("a MAC"), address.addr().expect("a MAC")].concat();
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::empty(), None).expect("a packet socket");
        Self { socket, address, header }
    }

    /// Sends a packet in a frame with these tags.
    pub fn send(&self, tags: &[u8], packet: &[u8]) {
        let kind: [u8; 2] = if packet.first().is_some_and(|it| it >> 4 == 6) { [0x86, 0xdd] } else { [0x08, 0x00] };
        let frame = [&self.header, tags, &kind, packet].concat();
        // What is too long for the wire is nobody's.
        sendto(self.socket.as_raw_fd(), &frame, &self.address, MsgFlags::empty()).ok();
    }
}

/// Sends a UDP datagram with `payload`, to be called in the namespace of `from`.
pub fn send_udp(from: SocketAddr, to: SocketAddr, extra: Extra, payload: &[u8]) -> io::Result<()> {
    send(from, &udp_packets(from, to, extra, payload), to)
}

/// Sends a SYN and waits for the peer's SYN and acknowledgement as long as `patience`, to be called in the namespace of
/// `from`. The kernel there knows of no such connection and resets it.
pub fn shake_hands(from: SocketAddr, to: SocketAddr, extra: Extra, patience: Duration) -> io::Result<()> {
    let inbox = Socket::new(Domain::for_address(from), Type::RAW, Some(Protocol::TCP))?;
    inbox.set_read_timeout(Some(patience))?;
    send(from, &syn_packets(from, to, extra), to)?;
    let expected = [to.port().to_be_bytes(), from.port().to_be_bytes()].concat();
    let end = Instant::now() + patience;
    let mut buffer = [0; 2_048];
    while Instant::now() < end {
        let length = again(|| (&inbox).read(&mut buffer))?;
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

fn send(from: SocketAddr, packets: &[Vec<u8>], to: SocketAddr) -> io::Result<()> {
    let outbox = Socket::new(Domain::for_address(from), Type::RAW, Some(Protocol::from(RAW)))?;
    for packet in packets {
        let sent = outbox.send_to(packet, &SocketAddr::new(to.ip(), 0).into())?;
        assert!(sent > 0, "nothing was sent");
    }
    Ok(())
}

/// The packets that carry a UDP datagram with `payload`.
pub fn udp_packets(from: SocketAddr, to: SocketAddr, extra: Extra, payload: &[u8]) -> Vec<Vec<u8>> {
    let length = u16::try_from(8 + payload.len()).expect("a short payload");
    let mut segment = [from.port().to_be_bytes(), to.port().to_be_bytes(), length.to_be_bytes(), [0, 0]].concat();
    segment.extend_from_slice(payload);
    packets(from, to, extra, UDP, segment, 6)
}

/// The packet of a SYN.
pub fn syn_packets(from: SocketAddr, to: SocketAddr, extra: Extra) -> Vec<Vec<u8>> {
    let mut segment = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    segment.extend_from_slice(&SEQUENCE.to_be_bytes());
    segment.extend_from_slice(&[0, 0, 0, 0, 0x50, SYN, 0xff, 0xff, 0, 0, 0, 0]);
    packets(from, to, extra, TCP, segment, 16)
}

/// The packets that carry one segment or datagram, with all checksums; `checksum` is where the transport header keeps its own.
fn packets(
    from: SocketAddr,
    to: SocketAddr,
    extra: Extra,
    transport: u8,
    mut segment: Vec<u8>,
    checksum: usize,
) -> Vec<Vec<u8>> {
    let sum = !folded(&[pseudo_header(from.ip(), to.ip(), transport, segment.len()), segment.clone()].concat());
    segment[checksum..checksum + 2].copy_from_slice(&sum.to_be_bytes());
    let headers = match (from.ip(), to.ip(), extra) {
        (IpAddr::V4(from), IpAddr::V4(to), Extra::Options(options)) => ipv4_header(from, to, transport, options),
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
        (IpAddr::V4(from), IpAddr::V4(to), Extra::Fragments(_)) => ipv4_header(from, to, transport, &[]),
        mixed => panic!("one IP version is needed throughout: {mixed:?}"),
    };
    let size = if let Extra::Fragments(size) = extra { size } else { segment.len() };
    let last = segment.len().div_ceil(size) - 1;
    let parts = segment.chunks(size).enumerate().map(|(number, part)| {
        let mut packet = [headers.as_slice(), part].concat();
        if let Extra::Fragments(size) = extra {
            let more = if number == last { 0 } else { 0x2000 };
            let offset = u16::try_from(number * size / 8).expect("a short packet") | more;
            packet[6..8].copy_from_slice(&offset.to_be_bytes());
        }
        complete_ipv4(&mut packet);
        packet
    });
    parts.collect()
}

fn ipv4_header(from: Ipv4Addr, to: Ipv4Addr, transport: u8, options: &[u8]) -> Vec<u8> {
    let words = u8::try_from(5 + options.len() / 4).expect("at most ten words of options");
    // Unlike that of a whole packet, the identification of a fragment is not filled in by the kernel.
    let mut header = vec![0x40 | words, 0, 0, 0, 0x12, 0x34, 0, 0, 64, transport, 0, 0];
    header.extend_from_slice(&from.octets());
    header.extend_from_slice(&to.octets());
    header.extend_from_slice(options);
    header
}

/// Writes length and checksum into the header of an IPv4 packet, as far as there is one.
fn complete_ipv4(packet: &mut [u8]) {
    let Ok(length) = u16::try_from(packet.len()) else { return };
    if packet.first().is_some_and(|first| first >> 4 == 4) && packet.len() >= 20 {
        packet[2..4].copy_from_slice(&length.to_be_bytes());
        sum_ipv4(packet);
    }
}

/// Makes the checksum of an IPv4 header right, whatever else is in it.
pub fn sum_ipv4(packet: &mut [u8]) {
    let end = usize::from(packet[0] & 0x0f) * 4;
    if packet[0] >> 4 == 4 && (20..=packet.len()).contains(&end) {
        packet[10..12].fill(0);
        let sum = !folded(&packet[..end]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
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
