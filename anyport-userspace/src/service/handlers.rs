//! What handlers say.

use std::{io::Write as _, net::SocketAddr};

use anyport_common::flow::Transport;

/// A line of text that needs no allocation.
#[derive(Debug)]
pub(super) struct TextLine {
    bytes: [u8; Self::CAPACITY],
    length: usize,
}

impl TextLine {
    /// Room for two IPv6 addresses with ports and the words around them.
    const CAPACITY: usize = 128;

    /// What `hello` says.
    pub(super) fn hello(client: SocketAddr, dialled: SocketAddr, transport: Transport) -> Self {
        let over = match transport {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
        };
        let (client, dialled) = (plain(client), plain(dialled));
        let mut bytes = [0; Self::CAPACITY];
        let mut free = &mut bytes[..];
        writeln!(free, "hello {client}, you reached {dialled} over {over}").expect("the longest line fits");
        let length = Self::CAPACITY - free.len();
        Self { bytes, length }
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// The address as people write it: without scope and flow, and IPv4 as IPv4.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};

    use anyport_common::flow::Transport;

    use super::TextLine;

    fn hello(client: SocketAddr, dialled: SocketAddr) -> String {
        String::from_utf8(TextLine::hello(client, dialled, Transport::Udp).as_bytes().into()).unwrap()
    }

    #[test]
    fn hello_names_both_ends() {
        for (client, dialled, line) in [
            (
                "198.51.100.1:40000",
                "192.0.2.77:31337",
                "hello 198.51.100.1:40000, you reached 192.0.2.77:31337 over udp\n",
            ),
            (
                "[2001:db8::1]:1",
                "[2001:db8::77]:31337",
                "hello [2001:db8::1]:1, you reached [2001:db8::77]:31337 over udp\n",
            ),
            (
                "[::ffff:198.51.100.1]:1",
                "[::ffff:192.0.2.77]:2",
                "hello 198.51.100.1:1, you reached 192.0.2.77:2 over udp\n",
            ),
        ] {
            assert_eq!(hello(client.parse().unwrap(), dialled.parse().unwrap()), line);
        }
        let scoped = SocketAddrV6::new("fe80::1".parse().unwrap(), 5, 7, 3).into();
        assert_eq!(hello(scoped, scoped), "hello [fe80::1]:5, you reached [fe80::1]:5 over udp\n");
    }

    #[test]
    fn the_longest_hello_fits() {
        let longest = SocketAddrV6::new(Ipv6Addr::from_bits(u128::MAX), u16::MAX, u32::MAX, u32::MAX).into();
        assert_eq!(hello(longest, longest).len(), 124);
    }
}
