//! Messages on routes as the kernel reads and writes them, `rtnetlink(7)`: the few kinds that are needed here, and of
//! those what is looked at, since there may be millions of them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bytemuck::{Pod, Zeroable, bytes_of, pod_read_unaligned};
use nix::errno::Errno;

use super::{LOOPBACK_INDEX, ROUTE_PROTOCOL, watch::News};
use crate::rules::Prefix;

/// Messages and attributes begin at multiples of this.
const ALIGNMENT: usize = 4;

/// The longest message to be sent: one that adds an IPv6 route.
pub(super) const LONGEST_REQUEST: usize = 76;

/// `struct nlmsghdr`
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Header {
    length: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
}

/// `struct rtmsg`
#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct RouteHeader {
    pub(super) family: u8,
    pub(super) destination_len: u8,
    pub(super) source_len: u8,
    pub(super) tos: u8,
    pub(super) table: u8,
    pub(super) protocol: u8,
    pub(super) scope: u8,
    pub(super) kind: u8,
    pub(super) flags: u32,
}

/// `struct rtattr`
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct AttributeHeader {
    length: u16,
    kind: u16,
}

/// `struct rtnexthop`
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct NextHop {
    length: u16,
    flags: u8,
    hops: u8,
    interface: i32,
}

/// What can be done with a local route of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Add,
    Remove,
}

/// What the kernel says.
pub(super) enum Message<'a> {
    /// That this went well, or failed.
    Outcome(Result<(), Errno>),
    /// That a list is complete, or why it is not.
    End(Result<(), Errno>),
    Route(RouteHeader, Attributes<'a>),
    Other,
}

/// Writes the request for a change behind those that `buffer` holds. A change that fails is always answered, one that
/// goes well only where `acknowledged`.
pub(super) fn put_change(buffer: &mut Vec<u8>, change: Change, prefix: &Prefix, sequence: u32, acknowledged: bool) {
    let (kind, flags) = match change {
        Change::Add => (libc::RTM_NEWROUTE, libc::NLM_F_CREATE | libc::NLM_F_EXCL),
        Change::Remove => (libc::RTM_DELROUTE, 0),
    };
    let acknowledge = if acknowledged { libc::NLM_F_ACK } else { 0 };
    put_message(buffer, kind, flags | acknowledge, sequence, |buffer| {
        buffer.extend_from_slice(bytes_of(&RouteHeader {
            family: family(prefix.is_ipv4()),
            destination_len: prefix.len(),
            table: libc::RT_TABLE_LOCAL,
            protocol: ROUTE_PROTOCOL,
            scope: libc::RT_SCOPE_HOST,
            kind: libc::RTN_LOCAL,
            ..RouteHeader::default()
        }));
        put_address(buffer, libc::RTA_DST, prefix.address());
        put_attribute(buffer, libc::RTA_OIF, bytes_of(&LOOPBACK_INDEX));
        // The source hint makes local clients use a loopback address rather than one of the prefix itself, so that a
        // rule for the prefix sees what they send and never what they are sent.
        if change == Change::Add {
            let source = if prefix.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
            put_address(buffer, libc::RTA_PREFSRC, source);
        }
    });
}

/// Writes the request for a list of the routes that are like this one.
pub(super) fn put_query(buffer: &mut Vec<u8>, like: &RouteHeader, sequence: u32) {
    put_message(buffer, libc::RTM_GETROUTE, libc::NLM_F_DUMP, sequence, |buffer| {
        buffer.extend_from_slice(bytes_of(like));
    });
}

/// A packet that a route is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lookup {
    pub(super) to: IpAddr,
    pub(super) from: Option<IpAddr>,
    /// The interface of one that arrives; one that the host itself sends if there is none.
    pub(super) by: Option<u32>,
    /// 0 for none.
    pub(super) mark: u32,
}

impl Lookup {
    /// One that the host sends.
    pub(super) fn sent(to: IpAddr) -> Self {
        Self { to, from: None, by: None, mark: 0 }
    }
}

/// Writes the request for the one route that a packet takes, as it stands in its table.
pub(super) fn put_lookup(buffer: &mut Vec<u8>, lookup: &Lookup, sequence: u32) {
    /// `RTM_F_FIB_MATCH`, Linux 4.13
    const FIB_MATCH: u32 = 0x2000;
    let host = Prefix::host(lookup.to);
    put_message(buffer, libc::RTM_GETROUTE, 0, sequence, |buffer| {
        buffer.extend_from_slice(bytes_of(&RouteHeader {
            family: family(host.is_ipv4()),
            destination_len: host.len(),
            source_len: lookup.from.map_or(0, |_| host.len()),
            flags: FIB_MATCH,
            ..RouteHeader::default()
        }));
        put_address(buffer, libc::RTA_DST, lookup.to);
        if let Some(source) = lookup.from {
            put_address(buffer, libc::RTA_SRC, source);
        }
        if let Some(interface) = lookup.by {
            put_attribute(buffer, libc::RTA_IIF, &interface.to_ne_bytes());
        }
        if lookup.mark != 0 {
            put_attribute(buffer, libc::RTA_MARK, &lookup.mark.to_ne_bytes());
        }
    });
}

/// The kernel's number for the address family.
pub(super) fn family(is_ipv4: bool) -> u8 {
    let family = if is_ipv4 { libc::AF_INET } else { libc::AF_INET6 };
    family.to_le_bytes()[0]
}

fn put_message(buffer: &mut Vec<u8>, kind: u16, flags: i32, sequence: u32, content: impl FnOnce(&mut Vec<u8>)) {
    let start = buffer.len();
    let [flags_low, flags_high, ..] = (flags | libc::NLM_F_REQUEST).to_le_bytes();
    let flags = u16::from_le_bytes([flags_low, flags_high]);
    buffer.extend_from_slice(bytes_of(&Header { length: 0, kind, flags, sequence, port: 0 }));
    content(buffer);
    let length = u32::try_from(buffer.len() - start).expect("messages are short");
    buffer[start..start + size_of::<u32>()].copy_from_slice(bytes_of(&length));
}

fn put_address(buffer: &mut Vec<u8>, kind: u16, address: IpAddr) {
    match address {
        IpAddr::V4(address) => put_attribute(buffer, kind, &address.octets()),
        IpAddr::V6(address) => put_attribute(buffer, kind, &address.octets()),
    }
}

/// The content's length must be a multiple of the alignment.
fn put_attribute(buffer: &mut Vec<u8>, kind: u16, content: &[u8]) {
    let length = u16::try_from(size_of::<AttributeHeader>() + content.len()).expect("attributes are short");
    buffer.extend_from_slice(bytes_of(&AttributeHeader { length, kind }));
    buffer.extend_from_slice(content);
}

/// The messages of a datagram with their sequence numbers. It ends early where one makes no sense.
pub(super) fn messages(datagram: &[u8]) -> impl Iterator<Item = (u32, Message<'_>)> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let (header, mut content) = split::<Header>(&mut rest, |header| header.length as usize)?;
        let message = match i32::from(header.kind) {
            libc::NLMSG_ERROR => Message::Outcome(outcome(&mut content)?),
            libc::NLMSG_DONE => Message::End(outcome(&mut content)?),
            _ if header.kind == libc::RTM_NEWROUTE => Message::Route(pop(&mut content)?, Attributes(content)),
            _ => Message::Other,
        };
        Some((header.sequence, message))
    })
}

/// Notes what the messages of a datagram report that got through [`super::watch`]'s filter.
pub(super) fn news(datagram: &[u8], news: &mut News) {
    let mut rest = datagram;
    while let Some((header, mut content)) = split::<Header>(&mut rest, |header| header.length as usize) {
        if ![libc::RTM_NEWLINK, libc::RTM_DELLINK].contains(&header.kind) {
            news.of_routes = true;
            continue;
        }
        news.of_interfaces = true;
        // `struct ifinfomsg` has the index behind family, padding and type, four bytes in all.
        let index = pop::<u32>(&mut content).and_then(|_| pop::<u32>(&mut content));
        news.of_routes |= index == Some(LOOPBACK_INDEX);
    }
}

fn outcome(content: &mut &[u8]) -> Option<Result<(), Errno>> {
    let code: i32 = pop(content)?;
    Some(if code == 0 { Ok(()) } else { Err(Errno::from_raw(-code)) })
}

/// The destination. The route to everything names none.
pub(super) fn destination(route: &RouteHeader, mut attributes: Attributes<'_>) -> Option<Prefix> {
    let (is_ipv4, width) = if route.family == family(true) { (true, 32) } else { (false, 128) };
    let named = attributes.find(|(kind, _)| *kind == libc::RTA_DST);
    let first = match named {
        None => 0,
        Some((_, content)) => match address(content)? {
            IpAddr::V4(address) => address.to_bits().into(),
            IpAddr::V6(address) => address.to_bits(),
        },
    };
    (route.destination_len <= width).then(|| Prefix::from_bits(is_ipv4, first, route.destination_len))
}

/// Hands over every gateway that the attributes of a route name.
pub(super) fn gateways(attributes: Attributes<'_>, found: &mut impl FnMut(IpAddr)) {
    for (kind, mut content) in attributes {
        match kind {
            libc::RTA_GATEWAY => address(content).into_iter().for_each(&mut *found),
            // `struct rtvia`: an address of the other family behind the number of that family.
            libc::RTA_VIA => content.get(size_of::<u16>()..).and_then(address).into_iter().for_each(&mut *found),
            libc::RTA_MULTIPATH => {
                while let Some((_, of_next_hop)) = split::<NextHop>(&mut content, |it| it.length.into()) {
                    gateways(Attributes(of_next_hop), found);
                }
            }
            _ => {}
        }
    }
}

/// The interface by which packets leave, where the route names one.
pub(super) fn interface(mut attributes: Attributes<'_>) -> Option<u32> {
    let (_, content) = attributes.find(|(kind, _)| *kind == libc::RTA_OIF)?;
    content.try_into().ok().map(u32::from_ne_bytes)
}

fn address(content: &[u8]) -> Option<IpAddr> {
    if let Ok(octets) = <[u8; 4]>::try_from(content) {
        return Some(Ipv4Addr::from(octets).into());
    }
    <[u8; 16]>::try_from(content).ok().map(|octets| Ipv6Addr::from(octets).into())
}

/// The attributes of a message, kind and content.
#[derive(Clone)]
pub(super) struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (header, content) = split::<AttributeHeader>(&mut self.0, |header| header.length.into())?;
        Some((header.kind, content))
    }
}

/// Takes off the first of several things, each of which has a header that knows its length.
fn split<'a, H: Pod>(bytes: &mut &'a [u8], length: impl Fn(&H) -> usize) -> Option<(H, &'a [u8])> {
    let mut rest = *bytes;
    let header: H = pop(&mut rest)?;
    let length = length(&header);
    let content = bytes.get(size_of::<H>()..length)?;
    *bytes = bytes.get(length.next_multiple_of(ALIGNMENT)..).unwrap_or_default();
    Some((header, content))
}

fn pop<T: Pod>(bytes: &mut &[u8]) -> Option<T> {
    let (value, rest) = bytes.split_at_checked(size_of::<T>())?;
    *bytes = rest;
    Some(pod_read_unaligned(value))
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    #[test]
    fn no_request_is_longer() {
        let mut buffer = Vec::new();
        put_change(&mut buffer, Change::Add, &"2001:db8::/32".parse().unwrap(), 7, true);
        assert_eq!(buffer.len(), LONGEST_REQUEST);
    }

    proptest! {
        /// Whatever stands in a datagram, reading it comes to an end.
        #[test]
        fn reads_anything(length in 0..48u16, kind in 0..32u16, content in vec(any::<u8>(), 0..64)) {
            let header = Header { length: length.into(), kind, flags: 0, sequence: 7, port: 0 };
            let datagram = [bytes_of(&header), &content].concat();
            for (_, message) in messages(&datagram) {
                if let Message::Route(route, attributes) = message {
                    let _ = destination(&route, Attributes(attributes.0));
                    gateways(attributes, &mut drop);
                }
            }
            gateways(Attributes(&content), &mut drop);
        }
    }
}
