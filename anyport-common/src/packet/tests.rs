//! Frames as they come from the wire, whole, cut off and mangled.

use std::{vec, vec::Vec};

use proptest::prelude::*;

use super::{Packet, from_ethernet, from_ip};
use crate::flow::{Address, Flow, Transport};

const V4_SOURCE: u32 = 0xc000_0201; // 192.0.2.1
const V4_DESTINATION: u32 = 0xc633_6407; // 198.51.100.7
const V6_HIGH: u64 = 0x2001_0db8_0000_0000;

/// The first bytes of a TCP or UDP header from port 1000 to port 443, enough for the parser.
fn transport(flags: u8) -> Vec<u8> {
    let mut header = vec![0; 20];
    header[..4].copy_from_slice(&[0x03, 0xe8, 0x01, 0xbb]);
    header[13] = flags;
    header
}

fn ipv4(protocol: u8, options: &[u8], fragment: u16, payload: &[u8]) -> Vec<u8> {
    let words = 5 + u8::try_from(options.len() / 4).unwrap();
    let length = u16::try_from(20 + options.len() + payload.len()).unwrap();
    let mut packet = vec![0x40 | words, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend(V4_SOURCE.to_be_bytes());
    packet.extend(V4_DESTINATION.to_be_bytes());
    packet.extend(options);
    packet.extend(payload);
    packet
}

fn ipv6(next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
    packet.extend([next, 64]);
    for low in [1u64, 7] {
        packet.extend(V6_HIGH.to_be_bytes());
        packet.extend(low.to_be_bytes());
    }
    packet.extend(payload);
    packet
}

fn ethernet(tags: &[u16], ethertype: u16, packet: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 12];
    for tag in tags {
        frame.extend(tag.to_be_bytes());
        frame.extend([0, 7]);
    }
    frame.extend(ethertype.to_be_bytes());
    frame.extend(packet);
    frame
}

fn expected_v4(transport: Transport, opens_connection: bool) -> Packet {
    Packet {
        flow: Flow { source: Address::v4(V4_SOURCE), address: Address::v4(V4_DESTINATION), transport, port: 443 },
        source_port: 1000,
        opens_connection,
        is_fragmented: false,
        is_unreadable: false,
    }
}

fn expected_v6(transport: Transport) -> Packet {
    Packet {
        flow: Flow { source: Address::v6(V6_HIGH, 1), address: Address::v6(V6_HIGH, 7), transport, port: 443 },
        source_port: 1000,
        opens_connection: false,
        is_fragmented: false,
        is_unreadable: false,
    }
}

#[test]
fn reads_ipv4_with_and_without_options() {
    for options in [&[][..], &[1; 4], &[1; 40]] {
        let packet = ipv4(17, options, 0, &transport(0));
        assert_eq!(from_ip(packet.as_slice()), Some(expected_v4(Transport::Udp, false)));
    }
}

/// Of the packet that `expected` is otherwise, only the addresses.
fn unreadable(expected: Packet, transport: Transport) -> Packet {
    Packet {
        source_port: 0,
        flow: Flow { transport, port: 0, ..expected.flow },
        opens_connection: false,
        is_unreadable: true,
        ..expected
    }
}

#[test]
fn only_a_bare_syn_opens_a_connection() {
    for (flags, opens) in
        [(0x02, true), (0x42, true), (0xc2, true), (0x12, false), (0x06, false), (0x03, false), (0x10, false)]
    {
        let packet = ipv4(6, &[], 0, &transport(flags));
        assert_eq!(from_ip(packet.as_slice()), Some(expected_v4(Transport::Tcp, opens)), "{flags:#x}");
    }
}

#[test]
fn reads_the_first_fragment_only() {
    let more_fragments = 0x2000;
    let dont_fragment = 0x4000;
    for (fragment, is_fragmented) in [
        (0, Some(false)),
        (dont_fragment, Some(false)),
        (more_fragments, Some(true)),
        (1, None),
        (more_fragments | 0xb9, None),
    ] {
        let packet = ipv4(17, &[], fragment, &transport(0));
        assert_eq!(from_ip(packet.as_slice()).map(|it| it.is_fragmented), is_fragmented, "{fragment:#x}");
    }
}

#[test]
fn reads_tagged_frames() {
    let packet = ipv4(17, &[], 0, &transport(0));
    let expected = Some(expected_v4(Transport::Udp, false));
    for tags in [&[][..], &[0x8100], &[0x88a8, 0x8100], &[0x8100, 0x8100]] {
        assert_eq!(from_ethernet(ethernet(tags, 0x0800, &packet).as_slice()), expected, "{tags:x?}");
    }
    assert_eq!(from_ethernet(ethernet(&[0x8100; 3], 0x0800, &packet).as_slice()), None);
    assert_eq!(from_ethernet(ethernet(&[], 0x0806, &packet).as_slice()), None);
    assert_eq!(from_ethernet(ethernet(&[], 0x86dd, &packet).as_slice()), None);
}

#[test]
fn walks_ipv6_extension_headers() {
    let expected = Some(expected_v6(Transport::Udp));
    let payload = transport(0);
    let chain = |headers: &[&[u8]]| [headers.concat(), payload.clone()].concat();
    let hop_by_hop_to = |next| [next, 0, 1, 4, 0, 0, 0, 0];
    let long_options = [[17, 2].as_slice(), &[0; 22]].concat();
    let routing = |left| [17, 0, 4, left, 0, 0, 0, 0];
    let fragment = |offset: u8| [17, 0, 0, offset, 0, 0, 0, 0];
    let authentication = [[17, 4].as_slice(), &[0; 22]].concat();
    for (next, payload, is_read) in [
        (17, chain(&[]), true),
        (0, chain(&[&hop_by_hop_to(17)]), true),
        (0, chain(&[&hop_by_hop_to(60), &long_options]), true),
        (60, chain(&[&long_options]), true),
        (43, chain(&[&routing(0)]), true),
        (43, chain(&[&routing(1)]), false),
        (44, chain(&[&fragment(0)]), true),
        (44, chain(&[&fragment(1)]), true),
        (44, chain(&[&fragment(8)]), false),
        (51, chain(&[&authentication]), true),
        (50, chain(&[]), false),
        (59, chain(&[]), false),
        (58, chain(&[]), false),
    ] {
        let packet = ipv6(next, &payload);
        let is_fragmented = next == 44 && payload[3] == 1;
        let expected = expected.filter(|_| is_read).map(|it| Packet { is_fragmented, ..it });
        assert_eq!(from_ip(packet.as_slice()), expected, "next header {next}: {payload:x?}");
        assert_eq!(from_ethernet(ethernet(&[], 0x86dd, &packet).as_slice()), expected);
    }
}

/// The kernel walks chains of any length, so what is behind a long one still has a socket.
#[test]
fn tells_apart_what_it_walks_from_what_the_kernel_walks() {
    let options_to = |next| [next, 0, 1, 4, 0, 0, 0, 0];
    for (headers, is_read) in [(1, true), (8, true), (9, false), (20, false)] {
        let mut payload = [options_to(60)].repeat(headers - 1).concat();
        payload.extend(options_to(17));
        payload.extend(transport(0));
        let expected = expected_v6(Transport::Udp);
        let expected = if is_read { expected } else { unreadable(expected, Transport::Tcp) };
        assert_eq!(from_ip(ipv6(60, &payload).as_slice()), Some(expected), "{headers} headers");
        if is_read {
            payload[headers * 8 - 8] = 58;
            assert_eq!(from_ip(ipv6(60, &payload).as_slice()), None, "ICMPv6 behind {headers} headers");
        }
    }
}

/// The smallest fragment that the kernel puts together again has eight bytes: the ports, but not the flags. Whatever a
/// frame has behind the packet is not believed.
#[test]
fn reads_the_ports_of_the_smallest_fragments() {
    let ack = transport(0x10);
    let expected =
        |is_whole_enough: bool| Packet { is_fragmented: true, ..expected_v4(Transport::Tcp, !is_whole_enough) };
    for (len, is_whole_enough) in [(8, false), (16, true)] {
        let fragment = ipv4(6, &[], 0x2000, &ack[..len]);
        assert_eq!(from_ip(fragment.as_slice()), Some(expected(is_whole_enough)), "{len} bytes");
        let padded = [fragment, ack[len..].to_vec()].concat();
        assert_eq!(from_ip(padded.as_slice()), Some(expected(is_whole_enough)), "{len} bytes and padding");
    }
    let fragment = ipv4(17, &[], 0x2000, &transport(0)[..8]);
    let expected = Packet { is_fragmented: true, ..expected_v4(Transport::Udp, false) };
    assert_eq!(from_ip(fragment.as_slice()), Some(expected));

    // Of IPv6, a fragment may end where the chain goes on, or where the ports would be.
    let first = [60, 0, 0, 1, 0, 0, 0, 0];
    let options = [6, 0, 1, 4, 0, 0, 0, 0];
    let expected = Packet { is_fragmented: true, ..expected_v6(Transport::Tcp) };
    for payload in [first.to_vec(), [first, options].concat()] {
        let fragment = ipv6(44, &payload);
        let nothing = Some(unreadable(expected, Transport::Tcp));
        assert_eq!(from_ip(fragment.as_slice()), nothing, "{payload:x?}");
        let rest = [first, options].concat()[payload.len()..].to_vec();
        let padded = [fragment, rest, ack.clone()].concat();
        assert_eq!(from_ip(padded.as_slice()), nothing, "{payload:x?} and padding");
    }
}

#[test]
fn gives_no_ports_of_what_is_cut_off() {
    for (whole, readable_from, ports_at) in [
        (ipv4(6, &[1; 8], 0, &transport(2)[..14]), 20, 28),
        (ipv6(0, &[&[6, 0, 1, 4, 0, 0, 0, 0], &transport(0)[..14]].concat()), 40, 48),
    ] {
        let complete = from_ip(whole.as_slice()).unwrap();
        for len in 0..whole.len() {
            let read = from_ip(&whole[..len]);
            let expected = if len < readable_from {
                None
            } else if len < ports_at + 4 {
                Some(unreadable(complete, Transport::Tcp))
            } else {
                // The kernel refuses what has no flags. Until it does, that counts as what must not get through.
                Some(Packet { opens_connection: true, ..complete })
            };
            assert_eq!(read, expected, "{len} of {} bytes", whole.len());
        }
    }
}

#[test]
fn gives_nothing_for_nonsense() {
    let mut short_header = ipv4(17, &[], 0, &transport(0));
    short_header[0] = 0x44;
    assert_eq!(from_ip(short_header.as_slice()), None);
    let mut version_five = ipv4(17, &[], 0, &transport(0));
    version_five[0] = 0x55;
    assert_eq!(from_ip(version_five.as_slice()), None);
    for protocol in [0, 1, 2, 47, 132, 136, 255] {
        assert_eq!(from_ip(ipv4(protocol, &[], 0, &transport(0)).as_slice()), None, "{protocol}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]
    #[test]
    fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
        from_ip(bytes.as_slice());
        from_ethernet(bytes.as_slice());
        // Past the first bytes, where random ones rarely get.
        from_ip([&[0x45][..], &bytes].concat().as_slice());
        from_ip([&[0x60, 0, 0, 0, 0, 0, 0, 64][..], &bytes].concat().as_slice());
    }
}
