//! Dialling, as clients do: to be called inside the client's namespace.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::host::patience;

/// How long anything that must come may take.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// How long silence must last to count as such.
pub const SILENCE: Duration = Duration::from_millis(400);

/// A question that is long enough for any answer of `hello` not to be an amplification.
pub const QUESTION: &[u8] = &[b'?'; 200];

/// The line by which the `hello` handler answers.
pub fn hello(client: SocketAddr, reached: SocketAddr, protocol: &str) -> String {
    format!("hello {client}, you reached {reached} over {protocol}\n")
}

/// The unspecified address of the family of `like`.
pub fn any(like: IpAddr) -> SocketAddr {
    match like {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

/// A TCP connection to `to`, with time limits on reading and writing.
pub fn tcp(to: SocketAddr) -> io::Result<TcpStream> {
    tcp_within(to, PATIENCE)
}

/// The same, if it comes to be within `limit`.
pub fn tcp_within(to: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    with_limits(TcpStream::connect_timeout(&to, patience(limit))?)
}

/// A TCP connection from the very address and port `from`.
pub fn tcp_from(from: SocketAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&from.into())?;
    socket.connect_timeout(&to.into(), patience(PATIENCE))?;
    with_limits(socket.into())
}

fn with_limits(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_read_timeout(Some(patience(PATIENCE)))?;
    stream.set_write_timeout(Some(patience(PATIENCE)))?;
    Ok(stream)
}

/// Everything that a connection to `to` says until its end.
pub fn tcp_text(to: SocketAddr) -> io::Result<String> {
    read_text(&mut tcp(to)?)
}

/// Everything until the end of `stream`.
pub fn read_text(stream: &mut TcpStream) -> io::Result<String> {
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// Dials `to` by TCP, asserts that the `hello` handler names both ends rightly.
pub fn expect_tcp_hello(to: SocketAddr) {
    let mut stream = tcp(to).unwrap_or_else(|error| panic!("TCP to {to}: {error}"));
    let own = stream.local_addr().expect("an own address");
    let text = read_text(&mut stream).unwrap_or_else(|error| panic!("reading from {to} over TCP: {error}"));
    assert_eq!(text, hello(own, to, "tcp"), "answer of {to}");
}

/// Sends `payload` over `stream`, ends that direction and asserts that exactly this comes back.
pub fn expect_tcp_echo(mut stream: TcpStream, payload: &[u8]) {
    let mut writer = stream.try_clone().expect("a second handle");
    let back = thread::scope(|scope| {
        scope.spawn(move || {
            writer.write_all(payload).expect("sending to echo");
            writer.shutdown(Shutdown::Write).expect("half-close");
        });
        let mut back = Vec::new();
        stream.read_to_end(&mut back).expect("reading from echo");
        back
    });
    assert!(back == payload, "echo of {} bytes came back as {} bytes or changed", payload.len(), back.len());
}

/// Sends `line` over `stream` and asserts that it comes back; the connection stays open.
pub fn expect_tcp_line(stream: &mut TcpStream, line: &str) {
    stream.write_all(line.as_bytes()).expect("sending a line to echo");
    let mut back = vec![0; line.len()];
    stream.read_exact(&mut back).unwrap_or_else(|error| panic!("no echo of {line:?}: {error}"));
    assert_eq!(String::from_utf8_lossy(&back), line, "echo");
}

/// Asserts that nobody accepts a TCP connection to `to`, and says so: by a reset or an ICMP error.
pub fn expect_tcp_refused(to: SocketAddr) {
    match tcp_text(to) {
        Ok(text) => panic!("{to} was expected to refuse, but answered {text:?}"),
        Err(error) => assert!(is_refusal(&error), "{to} was expected to refuse, but: {error}"),
    }
}

/// Whether `error` is a prompt "no" of the network or the peer's host.
pub fn is_refusal(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkUnreachable};
    // EACCES is what Linux makes of "administratively prohibited" and of an unreachable IPv6 port.
    matches!(error.kind(), ConnectionRefused | HostUnreachable | NetworkUnreachable | io::ErrorKind::PermissionDenied)
}

/// Sends `question` to `to` from a connected UDP socket and returns the first answer. As the socket is connected,
/// the kernel hands it nothing but datagrams that come from `to`.
pub fn udp(to: SocketAddr, question: &[u8]) -> io::Result<(SocketAddr, Vec<u8>)> {
    let socket = UdpSocket::bind(any(to.ip()))?;
    socket.connect(to)?;
    let answer = udp_over(&socket, question, PATIENCE)?;
    Ok((socket.local_addr()?, answer))
}

/// Sends `question` over a connected `socket` and returns the first answer within `limit`.
pub fn udp_over(socket: &UdpSocket, question: &[u8], limit: Duration) -> io::Result<Vec<u8>> {
    socket.set_read_timeout(Some(patience(limit)))?;
    socket.send(question)?;
    let mut buffer = vec![0; 65_536];
    let (length, _) = receive(socket, &mut buffer)?;
    buffer.truncate(length);
    Ok(buffer)
}

/// Receives one datagram, and tells its length and source.
pub fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
    again(|| socket.recv_from(buffer))
}

/// What the peer says first by itself; it may stay silent after that.
pub fn first_words(stream: &mut TcpStream) -> io::Result<String> {
    let mut buffer = [0; 256];
    let length = again(|| stream.read(&mut buffer))?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

/// Receives. Where there is a time limit the kernel does not begin again by itself after the process was stopped for a while
/// (signal(7)), as happens to virtual machines and containers.
pub fn again<T>(mut receive: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match receive() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            received => break received,
        }
    }
}

/// Asks `to` by UDP, asserts that the `hello` handler names both ends rightly.
pub fn expect_udp_hello(to: SocketAddr) {
    let (own, answer) = udp(to, QUESTION).unwrap_or_else(|error| panic!("UDP to {to}: {error}"));
    assert_eq!(String::from_utf8_lossy(&answer), hello(own, to, "udp"), "answer of {to}");
}

/// Asserts that exactly `payload` comes back from `to`.
pub fn expect_udp_echo(to: SocketAddr, payload: &[u8]) {
    let (_, answer) = udp(to, payload).unwrap_or_else(|error| panic!("UDP to {to}: {error}"));
    assert!(answer == payload, "echo of {} bytes came back as {} bytes or changed", payload.len(), answer.len());
}

/// Asks `to` by UDP and asserts that it answers `text`.
pub fn expect_udp_text(to: SocketAddr, text: &str) {
    let (_, answer) = udp(to, QUESTION).unwrap_or_else(|error| panic!("UDP to {to}: {error}"));
    assert_eq!(String::from_utf8_lossy(&answer), text, "answer of {to}");
}

/// Asserts that `to` answers no datagram. Says whether there was an ICMP error rather than silence.
pub fn expect_udp_unanswered(to: SocketAddr) -> bool {
    let socket = UdpSocket::bind(any(to.ip())).expect("a UDP socket");
    match socket.connect(to).and_then(|()| udp_over(&socket, QUESTION, SILENCE)) {
        Ok(answer) => panic!("{to} was expected to be silent, but answered {:?}", String::from_utf8_lossy(&answer)),
        Err(error) => is_refusal(&error),
    }
}

/// An ordinary server on `address` that says `text` to each TCP connection and closes. Ends with the process.
pub fn tcp_server(address: SocketAddr, text: &'static str) -> SocketAddr {
    let listener = TcpListener::bind(address).unwrap_or_else(|error| panic!("listening on {address}: {error}"));
    let bound = listener.local_addr().expect("an own address");
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            // A client that is gone already is no failure of the server.
            drop(stream.write_all(text.as_bytes()));
        }
    });
    bound
}

/// Answers each datagram to `socket` with `text`. Ends with the process.
pub fn udp_server(socket: UdpSocket, text: &'static str) {
    thread::spawn(move || {
        let mut buffer = [0; 2_048];
        while let Ok((_, client)) = socket.recv_from(&mut buffer) {
            drop(socket.send_to(text.as_bytes(), client));
        }
    });
}

/// A UDP socket bound to `address`, beside others that agree to that (`SO_REUSEADDR`).
pub fn shared_udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&SockAddr::from(address))?;
    Ok(socket.into())
}

/// A UDP socket that may claim any address as its own, bound to `address`.
pub fn transparent_udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    match address {
        SocketAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
        SocketAddr::V6(_) => socket.set_ip_transparent_v6(true)?,
    }
    socket.set_reuse_address(true)?;
    socket.bind(&SockAddr::from(address))?;
    Ok(socket.into())
}
