//! The header of the PROXY protocol, by which a proxy tells who dialled what. Versions 1 (a line) and 2 (binary), as
//! `doc/proxy-protocol.txt` of `HAProxy` has them.

use std::{
    fmt,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyport_common::flow::Transport;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::service::datagram::Ends;

/// Bytes of the longest header that is written: a line about two IPv6 addresses.
pub(super) const LONGEST_WRITTEN: usize = LONGEST_LINE;
/// Bytes of the longest header that is read: as many as version 2 has numbers for. A few hundred are usual, and only peers that
/// are trusted to send one may.
pub(super) const LONGEST_READ: usize = FIXED + u16::MAX as usize;

/// Bytes of the longest line of version 1, end of line included.
const LONGEST_LINE: usize = 107;
const LINE_START: &[u8] = b"PROXY ";
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// The signature, version and command, family, and the length of the rest.
const FIXED: usize = 16;

const VERSION_2: u8 = 0x20;
const LOCAL: u8 = 0;
const PROXY: u8 = 1;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;
/// The highest family (`AF_UNIX`) and transport (`DGRAM`) that there is.
const LAST_FAMILY: u8 = 0x30;
const LAST_TRANSPORT: u8 = 0x02;
/// The type of the extension with a checksum of the header (`PP2_TYPE_CRC32C`), whose value has four bytes.
const CHECKSUM: u8 = 0x03;

/// A version of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ProxyVersion {
    /// A line of text.
    V1,
    /// Binary.
    V2,
}

/// What the first bytes of a connection are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// More bytes are needed.
    Incomplete,
    /// A header.
    Header {
        /// Who dialled what. Nothing if the proxy speaks for itself, such as to see whether we are there, or does not know.
        ends: Option<Ends>,
        /// Its bytes; what follows is the client's.
        length: usize,
    },
}

/// Bytes that are no header, and can't become one by more bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no PROXY header: {0}")]
pub struct Malformed(&'static str);

/// Reads a header at the beginning of `bytes`.
///
/// # Errors
/// The bytes are none, whatever follows.
pub fn parse(bytes: &[u8]) -> Result<Parsed, Malformed> {
    if agree(bytes, SIGNATURE) {
        parse_binary(bytes)
    } else if agree(bytes, LINE_START) {
        parse_line(bytes)
    } else {
        Err(Malformed("neither version 1 nor 2"))
    }
}

/// Whether what is there of either agrees.
fn agree(bytes: &[u8], start: &[u8]) -> bool {
    bytes.iter().zip(start).all(|(byte, expected)| byte == expected)
}

fn parse_line(bytes: &[u8]) -> Result<Parsed, Malformed> {
    let start = &bytes[..bytes.len().min(LONGEST_LINE)];
    let Some(end) = start.windows(2).position(|pair| pair == b"\r\n") else {
        return if start.len() < LONGEST_LINE {
            Ok(Parsed::Incomplete)
        } else {
            Err(Malformed("the line is too long"))
        };
    };
    let header = |ends| Ok(Parsed::Header { ends, length: end + 2 });
    let line = str::from_utf8(&start[LINE_START.len()..end]).map_err(|_| Malformed("the line is no text"))?;
    let mut words = line.split(' ');
    let family = words.next();
    if family == Some("UNKNOWN") {
        return header(None);
    }
    let mut word = || words.next().ok_or(Malformed("the line is too short"));
    let (source, destination, source_port, port) = (word()?, word()?, word()?, word()?);
    if words.next().is_some() {
        return Err(Malformed("the line has too many words"));
    }
    let address = |text: &str| match family {
        Some("TCP4") => text.parse::<Ipv4Addr>().map(IpAddr::from).map_err(|_| Malformed("not an IPv4 address")),
        Some("TCP6") => text.parse::<Ipv6Addr>().map(IpAddr::from).map_err(|_| Malformed("not an IPv6 address")),
        _ => Err(Malformed("neither TCP4, TCP6 nor UNKNOWN")),
    };
    header(Some(Ends {
        client: SocketAddr::new(address(source)?, decimal(source_port)?),
        dialled: SocketAddr::new(address(destination)?, decimal(port)?),
    }))
}

/// A port as the protocol wants it: no sign, no leading zeros.
fn decimal(text: &str) -> Result<u16, Malformed> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    text.parse().ok().filter(|_| is_plain).ok_or(Malformed("not a port"))
}

fn parse_binary(bytes: &[u8]) -> Result<Parsed, Malformed> {
    let Some((fixed, rest)) = bytes.split_first_chunk::<FIXED>() else { return Ok(Parsed::Incomplete) };
    let [.., command, family, high, low] = *fixed;
    if command & 0xf0 != VERSION_2 {
        return Err(Malformed("not version 2 behind the signature of version 2"));
    }
    let length = usize::from(u16::from_be_bytes([high, low]));
    let wants = match (command & 0x0f, family) {
        (LOCAL, _) => 0,
        (PROXY, TCP_OVER_IPV4) => 12,
        (PROXY, TCP_OVER_IPV6) => 36,
        // Whatever the proxy took, this connection is one of TCP: its own ends are the best that is known.
        (PROXY, _) if family & 0xf0 <= LAST_FAMILY && family & 0x0f <= LAST_TRANSPORT => 0,
        (PROXY, _) => return Err(Malformed("a family that there is not")),
        _ => return Err(Malformed("neither LOCAL nor PROXY")),
    };
    if length < wants {
        return Err(Malformed("too short for its addresses"));
    }
    let Some(addresses) = rest.get(..length) else { return Ok(Parsed::Incomplete) };
    let ends = match wants {
        12 => binary_ends::<4>(addresses),
        36 => binary_ends::<16>(addresses),
        _ => None,
    };
    if ends.is_some() {
        check_extensions(&bytes[..FIXED + length], FIXED + wants)?;
    }
    Ok(Parsed::Header { ends, length: FIXED + length })
}

/// Checks that extensions fill what is behind the addresses, and their checksum of the whole header where there is one: each has a
/// type, a length of two bytes, and as many bytes.
fn check_extensions(header: &[u8], mut at: usize) -> Result<(), Malformed> {
    while at < header.len() {
        let [kind, high, low, ..] = header[at..] else { return Err(Malformed("an extension is cut off")) };
        let value = at + 3;
        at = value + usize::from(u16::from_be_bytes([high, low]));
        let Some(content) = header.get(value..at) else {
            return Err(Malformed("an extension is longer than the header"));
        };
        if kind == CHECKSUM {
            let Ok(checksum) = <[u8; 4]>::try_from(content) else { return Err(Malformed("a checksum has four bytes")) };
            if u32::from_be_bytes(checksum) != crc32c([&header[..value], &[0; 4], &header[at..]]) {
                return Err(Malformed("the checksum is wrong"));
            }
        }
    }
    Ok(())
}

/// The CRC-32C (Castagnoli) of these bytes, one bit after the other: headers are short, and few have a checksum.
fn crc32c(parts: [&[u8]; 3]) -> u32 {
    const REVERSED_POLYNOMIAL: u32 = 0x82f6_3b78;
    let of_byte = |sum: u32, byte: &u8| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| (sum >> 1) ^ if sum & 1 == 1 { REVERSED_POLYNOMIAL } else { 0 })
    };
    !parts.into_iter().flatten().fold(!0, of_byte)
}

/// Source, destination, source port, destination port.
fn binary_ends<const N: usize>(bytes: &[u8]) -> Option<Ends>
where
    IpAddr: From<[u8; N]>,
{
    let (source, bytes) = bytes.split_first_chunk::<N>()?;
    let (destination, bytes) = bytes.split_first_chunk::<N>()?;
    let (source_port, bytes) = bytes.split_first_chunk()?;
    let (port, _) = bytes.split_first_chunk()?;
    Some(Ends {
        client: SocketAddr::new((*source).into(), u16::from_be_bytes(*source_port)),
        dialled: SocketAddr::new((*destination).into(), u16::from_be_bytes(*port)),
    })
}

/// Appends the header that tells of `ends`. Version 1 has no words for UDP.
pub fn write(version: ProxyVersion, transport: Transport, ends: Ends, to: &mut Vec<u8>) {
    let Ends { client, dialled } = ends;
    let (source, destination) = match (client.ip(), dialled.ip()) {
        (source @ IpAddr::V4(_), destination @ IpAddr::V4(_)) => (source, destination),
        // Both of one family; a proxy in front may tell of two.
        (source, destination) => (mapped(source).into(), mapped(destination).into()),
    };
    to.reserve(LONGEST_WRITTEN);
    match version {
        ProxyVersion::V1 => {
            let family = if source.is_ipv4() { "TCP4" } else { "TCP6" };
            let (source_port, port) = (client.port(), dialled.port());
            // Writing to memory does not fail.
            write!(to, "PROXY {family} {} {} {source_port} {port}\r\n", Plain(source), Plain(destination)).ok();
        }
        ProxyVersion::V2 => {
            let (family, length) = if source.is_ipv4() { (TCP_OVER_IPV4, 12) } else { (TCP_OVER_IPV6, 36) };
            let family = family + u8::from(transport == Transport::Udp);
            to.extend(SIGNATURE);
            to.extend([VERSION_2 | PROXY, family, 0, length]);
            for address in [source, destination] {
                match address {
                    IpAddr::V4(address) => to.extend(address.octets()),
                    IpAddr::V6(address) => to.extend(address.octets()),
                }
            }
            to.extend(client.port().to_be_bytes());
            to.extend(dialled.port().to_be_bytes());
        }
    }
}

fn mapped(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

/// An address without a dotted part: the protocol's text shows IPv6 in hexadecimal only, and some readers insist.
struct Plain(IpAddr);

impl fmt::Display for Plain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            IpAddr::V6(address) if address.to_ipv4_mapped().is_some() => {
                let [.., high, low] = address.segments();
                write!(f, "::ffff:{high:x}:{low:x}")
            }
            address => write!(f, "{address}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use anyport_common::flow::Transport;
    use proptest::prelude::*;

    use super::{
        Ends, LONGEST_READ, LONGEST_WRITTEN, Malformed, Parsed, ProxyVersion, SIGNATURE, crc32c, parse, write,
    };

    fn ends(client: &str, dialled: &str) -> Ends {
        Ends { client: client.parse().unwrap(), dialled: dialled.parse().unwrap() }
    }

    fn written(version: ProxyVersion, ends: Ends) -> Vec<u8> {
        let mut bytes = Vec::new();
        write(version, Transport::Tcp, ends, &mut bytes);
        bytes
    }

    fn binary(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
        [&SIGNATURE[..], &[command, family], &length, rest].concat()
    }

    #[test]
    fn writes_what_the_protocol_says() {
        let v4 = ends("198.51.100.1:40000", "192.0.2.77:443");
        assert_eq!(written(ProxyVersion::V1, v4), b"PROXY TCP4 198.51.100.1 192.0.2.77 40000 443\r\n");
        let rest = [198, 51, 100, 1, 192, 0, 2, 77, 0x9c, 0x40, 0x01, 0xbb];
        assert_eq!(written(ProxyVersion::V2, v4), binary(0x21, 0x11, &rest));
        let v6 = ends("[2001:db8::1]:1", "[2001:db8::2]:65535");
        assert_eq!(written(ProxyVersion::V1, v6), b"PROXY TCP6 2001:db8::1 2001:db8::2 1 65535\r\n");
        assert_eq!(written(ProxyVersion::V2, v6).len(), 52);
        let mixed = ends("198.51.100.1:1", "[2001:db8::2]:2");
        assert_eq!(written(ProxyVersion::V1, mixed), b"PROXY TCP6 ::ffff:c633:6401 2001:db8::2 1 2\r\n");
    }

    #[test]
    fn lines() {
        let v4 = Some(ends("198.51.100.1:40000", "192.0.2.77:443"));
        for (line, expected) in [
            ("PROXY TCP4 198.51.100.1 192.0.2.77 40000 443\r\n", Ok(v4)),
            ("PROXY UNKNOWN\r\n", Ok(None)),
            ("PROXY UNKNOWN whatever it is\r\n", Ok(None)),
            ("PROXY TCP4 198.51.100.1 192.0.2.77 40000\r\n", Err("too short")),
            ("PROXY TCP4 198.51.100.1 192.0.2.77 40000 443 1\r\n", Err("too many words")),
            ("PROXY TCP4 198.51.100.1 192.0.2.77 40000 65536\r\n", Err("not a port")),
            ("PROXY TCP4 198.51.100.1 192.0.2.77 40000 +443\r\n", Err("not a port")),
            ("PROXY TCP4 198.51.100.1 192.0.2.77 40000 0443\r\n", Err("not a port")),
            ("PROXY TCP4 198.51.100.1 192.0.2.777 40000 443\r\n", Err("not an IPv4")),
            ("PROXY TCP6 198.51.100.1 192.0.2.77 40000 443\r\n", Err("not an IPv6")),
            ("PROXY TCP5 198.51.100.1 192.0.2.77 40000 443\r\n", Err("neither TCP4")),
            ("PROXY  TCP4 198.51.100.1 192.0.2.77 40000 443\r\n", Err("too many words")),
            ("PROXI TCP4 198.51.100.1 192.0.2.77 40000 443\r\n", Err("neither version")),
            ("GET / HTTP/1.1\r\n", Err("neither version")),
            ("PROXY \u{7f}\r\n", Err("too short")),
        ] {
            match (parse(line.as_bytes()), expected) {
                (Ok(parsed), Ok(ends)) => assert_eq!(parsed, Parsed::Header { ends, length: line.len() }, "{line:?}"),
                (Err(Malformed(why)), Err(expected)) => assert!(why.contains(expected), "{line:?}: {why}"),
                (parsed, expected) => panic!("{line:?}: {parsed:?} instead of {expected:?}"),
            }
        }
        let endless = [b"PROXY UNKNOWN ".as_slice(), &[b'x'; 200]].concat();
        assert_eq!(parse(&endless[..106]), Ok(Parsed::Incomplete));
        assert_eq!(parse(&endless[..107]), Err(Malformed("the line is too long")));
    }

    #[test]
    fn binary_headers() {
        let v4 = ends("198.51.100.1:40000", "192.0.2.77:443");
        let plain = written(ProxyVersion::V2, v4);
        let addresses = &plain[16..];
        let extended = |checksum: [u8; 4]| [addresses, &[0x03, 0, 4], &checksum, &[0xea, 0, 0]].concat();
        let checksum = crc32c([&binary(0x21, 0x11, &extended([0; 4])), &[], &[]]).to_be_bytes();
        let extension =
            |length: u16, bytes: usize| [addresses, &[0xee], &length.to_be_bytes(), &vec![7; bytes]].concat();
        for (bytes, expected) in [
            (plain.clone(), Ok(Some(v4))),
            (binary(0x21, 0x11, &extended(checksum)), Ok(Some(v4))),
            (binary(0x21, 0x11, &extended(checksum.map(|byte| byte ^ 1))), Err("checksum is wrong")),
            (binary(0x21, 0x11, &[addresses, &[0x03, 0, 2, 1, 2]].concat()), Err("four bytes")),
            (binary(0x21, 0x11, &extension(5_000, 5_000)), Ok(Some(v4))),
            (binary(0x21, 0x11, &extension(5, 4)), Err("longer than the header")),
            (binary(0x21, 0x11, &[addresses, &[0xee, 0]].concat()), Err("cut off")),
            (binary(0x20, 0x11, addresses), Ok(None)),
            (binary(0x20, 0x00, &[]), Ok(None)),
            (binary(0x21, 0x00, &extended([0; 4])), Ok(None)),
            (binary(0x21, 0x31, &[0; 216]), Ok(None)),
            (binary(0x21, 0x32, &[0; 216]), Ok(None)),
            (binary(0x21, 0x12, addresses), Ok(None)),
            (binary(0x21, 0x22, &[0; 36]), Ok(None)),
            (binary(0x21, 0x41, addresses), Err("a family that there is not")),
            (binary(0x21, 0x13, addresses), Err("a family that there is not")),
            (binary(0x21, 0x11, &addresses[1..]), Err("too short")),
            (binary(0x21, 0x21, addresses), Err("too short")),
            (binary(0x22, 0x11, addresses), Err("neither LOCAL")),
            (binary(0x11, 0x11, addresses), Err("not version 2")),
        ] {
            match (parse(&bytes), expected) {
                (Ok(parsed), Ok(ends)) => assert_eq!(parsed, Parsed::Header { ends, length: bytes.len() }),
                (Err(Malformed(why)), Err(expected)) => assert!(why.contains(expected), "{bytes:?}: {why}"),
                (parsed, expected) => panic!("{bytes:?}: {parsed:?} instead of {expected:?}"),
            }
        }
        assert_eq!(parse(&binary(0x21, 0x00, &vec![1; LONGEST_READ - 16])).map(drop), Ok(()));
        // The check value of this CRC.
        assert_eq!(crc32c([b"1234", b"56789", b""]), 0xe306_9283);
    }

    fn address() -> impl Strategy<Value = SocketAddr> {
        prop_oneof![
            any::<([u8; 4], u16)>().prop_map(SocketAddr::from),
            any::<([u16; 8], u16)>().prop_map(SocketAddr::from),
        ]
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(client in address(), dialled in address(), tail: Vec<u8>) {
            let canonical = |end: SocketAddr| SocketAddr::new(end.ip().to_canonical(), end.port());
            for version in [ProxyVersion::V1, ProxyVersion::V2] {
                let header = written(version, Ends { client, dialled });
                prop_assert!(header.len() <= LONGEST_WRITTEN);
                for length in 0..header.len() {
                    prop_assert_eq!(parse(&header[..length]), Ok(Parsed::Incomplete));
                }
                let Parsed::Header { ends: Some(ends), length } = parse(&[&header[..], &tail].concat()).unwrap()
                    else { panic!("no ends") };
                prop_assert_eq!(length, header.len());
                prop_assert_eq!(canonical(ends.client), canonical(client));
                prop_assert_eq!(canonical(ends.dialled), canonical(dialled));
            }
        }

        #[test]
        fn any_bytes_are_judged(is_binary: bool, mut bytes: Vec<u8>) {
            if is_binary {
                bytes.splice(0..0, *SIGNATURE);
            } else {
                bytes.splice(0..0, *b"PROXY TCP4 ");
            }
            match parse(&bytes) {
                Ok(Parsed::Header { length, .. }) => prop_assert!(length <= bytes.len()),
                Ok(Parsed::Incomplete) => prop_assert!(bytes.len() < LONGEST_READ),
                Err(_) => {}
            }
        }
    }
}
