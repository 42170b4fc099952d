//! Connecting to an upstream.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Socket, TcpKeepalive, Type};

use super::config::TcpOptions;
use crate::{
    service::{Family, event_loop::Stream, sockets::set_transparent},
    sys,
};

/// Connections with data in their first packet that may wait for their handshake.
const FAST_OPEN_QUEUE: u32 = 1024;

/// Begins to connect to `to`, from the address `source` if there is one. With `has_words` there is something to say, and it takes
/// the place of the last packet of the handshake.
pub(super) fn begin(
    options: &TcpOptions,
    to: SocketAddr,
    source: Option<IpAddr>,
    has_words: bool,
) -> io::Result<Stream> {
    let socket = prepare(options, to, source)?;
    let stream = Stream::unconnected(socket);
    if has_words {
        stream.hold_acknowledgement();
    }
    stream.connect(to)?;
    Ok(stream)
}

fn prepare(options: &TcpOptions, to: SocketAddr, source: Option<IpAddr>) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM.nonblocking(), None)?;
    if let Some(source) = source {
        set_transparent(&socket, if source.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 })?;
        // The port is chosen when the destination is known, so that as many connections as ports can go to each.
        setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    if options.nodelay {
        socket.set_tcp_nodelay(true)?;
    }
    set_common(&socket, options)?;
    Ok(socket)
}

/// Sets up a listening socket. What it accepts inherits all of it, which spares system calls for each connection.
pub(in crate::service) fn set_up_listener(socket: &Socket, options: &TcpOptions) -> io::Result<()> {
    socket.set_tcp_nodelay(options.nodelay)?;
    if options.fast_open {
        sys::set_fast_open(socket, FAST_OPEN_QUEUE)?;
    }
    set_common(socket, options)
}

fn set_common(socket: &Socket, options: &TcpOptions) -> io::Result<()> {
    if let Some(keepalive) = options.keepalive {
        socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(keepalive.0))?;
    }
    if let Some(size) = options.send_buffer {
        socket.set_send_buffer_size(size.get() as usize)?;
    }
    if let Some(size) = options.receive_buffer {
        socket.set_recv_buffer_size(size.get() as usize)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, time::Duration};

    use socket2::{Domain, Socket, Type};

    use super::{prepare, set_up_listener};
    use crate::{human_duration::HumanDuration, service::forward::config::TcpOptions};

    const OPTIONS: TcpOptions = TcpOptions {
        nodelay: false,
        keepalive: Some(HumanDuration(Duration::from_secs(33))),
        fast_open: true,
        send_buffer: Some(std::num::NonZeroU32::new(70_000).unwrap()),
        receive_buffer: Some(std::num::NonZeroU32::new(80_000).unwrap()),
    };

    #[test]
    fn sockets_have_the_options() {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        listener.set_tcp_nodelay(true).unwrap();
        set_up_listener(&listener, &OPTIONS).unwrap();
        let socket = prepare(&OPTIONS, "127.0.0.1:1".parse().unwrap(), None).unwrap();
        for socket in [listener, socket] {
            assert!(!socket.tcp_nodelay().unwrap());
            assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(33));
            // The kernel doubles what it is told.
            assert_eq!((socket.send_buffer_size().unwrap(), socket.recv_buffer_size().unwrap()), (140_000, 160_000));
        }
        let socket = prepare(&TcpOptions::default(), "127.0.0.1:1".parse().unwrap(), None).unwrap();
        assert!(socket.tcp_nodelay().unwrap() && !socket.keepalive().unwrap());
    }

    #[test]
    fn the_source_is_the_clients() {
        for (to, source) in [("127.0.0.1:1", "198.51.100.7"), ("[::1]:1", "2001:db8::7")] {
            let to: SocketAddr = to.parse().unwrap();
            let socket = prepare(&TcpOptions::default(), to, Some(source.parse().unwrap())).unwrap();
            let local = socket.local_addr().unwrap().as_socket().unwrap();
            assert_eq!((local.ip(), local.port()), (source.parse().unwrap(), 0));
        }
    }
}
