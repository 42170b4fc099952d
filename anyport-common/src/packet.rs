//! Reading a packet as far as steering needs: addresses, ports and the flags of TCP.
//!
//! Nothing is trusted and nothing is assumed to be there. What is of no concern here gives nothing and is left to
//! the host: a later fragment, another transport than TCP and UDP, a header that the kernel refuses as well. A packet
//! whose ports are out of reach, but not out of the kernel's, is told apart from that: see [`Packet::is_unreadable`].

use crate::flow::{Address, Flow, Transport};

/// Length of an Ethernet header without tags.
pub const ETHERNET_LEN: u32 = 14;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_QINQ: u16 = 0x88a8;
/// 802.1ad puts one tag around another; more are not in use.
const MAX_VLAN_TAGS: u32 = 2;

const IPV4_MORE_FRAGMENTS: u16 = 0x2000;
const IPV4_FRAGMENT_OFFSET: u16 = 0x1fff;
const IPV6_MORE_FRAGMENTS: u16 = 0x0001;
const IPV6_FRAGMENT_OFFSET: u16 = 0xfff8;

/// RFC 8200 expects each extension header once, and destination options twice. The kernel walks on.
const MAX_EXTENSION_HEADERS: u32 = 8;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

const TCP_FIN: u8 = 0x01;
const TCP_SYN: u8 = 0x02;
const TCP_RST: u8 = 0x04;
const TCP_ACK: u8 = 0x10;

/// Where the bytes of a packet are read from.
pub trait Bytes {
    /// `N` bytes from `offset`, or nothing if the packet ends before.
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
}

impl Bytes for [u8] {
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let offset = usize::try_from(offset).ok()?;
        self.get(offset..)?.first_chunk().copied()
    }
}

/// What steering needs to know of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// The source and the original destination.
    pub flow: Flow,
    /// The sender's port in host byte order.
    pub source_port: u16,
    /// Whether this asks for a new TCP connection: SYN without ACK, RST and FIN, as the kernel's own
    /// TPROXY asks (`nf_tproxy_handle_time_wait4`). So may a fragment that ends before the flags.
    pub opens_connection: bool,
    /// Whether this is the first of several fragments.
    pub is_fragmented: bool,
    /// Whether only the addresses could be read, though the kernel may come to deliver the packet: it walks longer
    /// chains of extension headers, and the ports may follow in a later fragment. The ports are 0 then and the
    /// transport means nothing.
    ///
    /// A flag and not an enum, for the reason that [`Address`] gives.
    pub is_unreadable: bool,
}

/// Reads a packet that begins with an Ethernet header, which may carry VLAN tags.
#[inline(always)]
pub fn from_ethernet<B: Bytes + ?Sized>(packet: &B) -> Option<Packet> {
    let mut offset = ETHERNET_LEN;
    let mut ethertype = u16::from_be_bytes(packet.bytes(offset - 2)?);
    for _ in 0..MAX_VLAN_TAGS {
        if ethertype != ETHERTYPE_VLAN && ethertype != ETHERTYPE_QINQ {
            break;
        }
        ethertype = u16::from_be_bytes(packet.bytes(offset + 2)?);
        offset += 4;
    }
    match ethertype {
        ETHERTYPE_IPV4 => from_ipv4(packet, offset),
        ETHERTYPE_IPV6 => from_ipv6(packet, offset),
        _ => None,
    }
}

/// Reads a packet that begins with its IP header.
#[inline(always)]
pub fn from_ip<B: Bytes + ?Sized>(packet: &B) -> Option<Packet> {
    let [first] = packet.bytes(0)?;
    match first >> 4 {
        4 => from_ipv4(packet, 0),
        6 => from_ipv6(packet, 0),
        _ => None,
    }
}

#[inline(always)]
fn from_ipv4<B: Bytes + ?Sized>(packet: &B, offset: u32) -> Option<Packet> {
    let header: [u8; 20] = packet.bytes(offset)?;
    let header_len = u32::from(header[0] & 0x0f) * 4;
    if header[0] >> 4 != 4 || header_len < 20 {
        return None;
    }
    let fragment = u16::from_be_bytes([header[6], header[7]]);
    if fragment & IPV4_FRAGMENT_OFFSET != 0 {
        return None;
    }
    let transport = Transport::from_number(header[9])?;
    let address =
        |at: usize| Address::v4(u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]));
    let end = offset + u32::from(u16::from_be_bytes([header[2], header[3]]));
    let is_fragmented = fragment & IPV4_MORE_FRAGMENTS != 0;
    Some(with_ports(
        packet,
        offset + header_len,
        end,
        only_addresses(address(12), address(16), transport, is_fragmented),
    ))
}

#[inline(always)]
fn from_ipv6<B: Bytes + ?Sized>(packet: &B, offset: u32) -> Option<Packet> {
    let [version, _, _, _, length_high, length_low, mut next, _] = packet.bytes(offset)?;
    if version >> 4 != 6 {
        return None;
    }
    let half = |at: u32| Some(u64::from_be_bytes(packet.bytes(offset + at)?));
    let source = Address::v6(half(8)?, half(16)?);
    let destination = Address::v6(half(24)?, half(32)?);
    let mut offset = offset + 40;
    let end = offset + u32::from(u16::from_be_bytes([length_high, length_low]));
    let mut is_fragmented = false;
    for _ in 0..MAX_EXTENSION_HEADERS {
        if Transport::from_number(next).is_some() {
            break;
        }
        if !is_extension_header(next) {
            return None;
        }
        let Some([following, length, third, fourth]) = packet.bytes(offset) else {
            break;
        };
        let length = u32::from(length);
        offset += match next {
            // With segments left, the destination in the header is not the final one.
            ROUTING if fourth != 0 => return None,
            FRAGMENT => {
                let fragment = u16::from_be_bytes([third, fourth]);
                if fragment & IPV6_FRAGMENT_OFFSET != 0 {
                    return None;
                }
                is_fragmented |= fragment & IPV6_MORE_FRAGMENTS != 0;
                8
            }
            AUTHENTICATION => (length + 2) * 4,
            _ => (length + 1) * 8,
        };
        next = following;
    }
    match Transport::from_number(next) {
        Some(transport) => {
            Some(with_ports(packet, offset, end, only_addresses(source, destination, transport, is_fragmented)))
        }
        None if is_extension_header(next) => Some(only_addresses(source, destination, Transport::Tcp, is_fragmented)),
        None => None,
    }
}

/// Whether something follows behind this IPv6 header; every other protocol ends the chain.
#[inline(always)]
const fn is_extension_header(number: u8) -> bool {
    matches!(number, HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION_OPTIONS)
}

/// What is known of a packet before its ports are.
#[inline(always)]
fn only_addresses(source: Address, destination: Address, transport: Transport, is_fragmented: bool) -> Packet {
    Packet {
        flow: Flow { source, address: destination, transport, port: 0 },
        source_port: 0,
        opens_connection: false,
        is_fragmented,
        is_unreadable: true,
    }
}

/// Adds what the transport header at `offset` says. By its IP header the packet ends at `end`; what stands behind that
/// in a frame is no part of it, and may be there to mislead.
#[inline(always)]
fn with_ports<B: Bytes + ?Sized>(packet: &B, offset: u32, end: u32, known: Packet) -> Packet {
    // Only a fragment comes to life with less than a header. Of other packets the length is not asked, as it is 0 where
    // the kernel has merged them into one of more than 64 KiB.
    let is_there = |len: u32| !known.is_fragmented || offset + len <= end;
    let (ports, opens_connection) = match known.flow.transport {
        Transport::Tcp => match packet.bytes::<14>(offset) {
            Some(header) => {
                let flags = header[13] & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN);
                (Some([header[0], header[1], header[2], header[3]]), flags == TCP_SYN || !is_there(14))
            }
            None => (packet.bytes(offset), true),
        },
        Transport::Udp => (packet.bytes(offset), false),
    };
    let Some([source_high, source_low, port_high, port_low]) = ports.filter(|_| is_there(4)) else {
        return known;
    };
    Packet {
        source_port: u16::from_be_bytes([source_high, source_low]),
        flow: Flow { port: u16::from_be_bytes([port_high, port_low]), ..known.flow },
        opens_connection,
        is_unreadable: false,
        ..known
    }
}

#[cfg(test)]
mod tests;
