//! The server behind the proxies.

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    thread,
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmmsg};
use socket2::{Domain, SockRef, Socket, Type};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

/// Returns what it gets.
pub(crate) const ECHO: u16 = 9_000;
/// Sends for as long as the peer reads.
pub(crate) const SOURCE: u16 = 9_001;
/// Added to a port whose peers begin with a PROXY header.
pub(crate) const WITH_HEADER: u16 = 100;

/// Bytes that an echo takes at once.
const CHUNK: usize = 4 << 10;
/// Bytes that a source hands to the kernel at once.
const MUCH: usize = 256 << 10;

/// Serves at this address until the process ends, with one thread, and another one for datagrams.
pub(crate) fn serve(address: IpAddr) -> Result<()> {
    let datagrams = UdpSocket::bind((address, ECHO)).context("bind a UDP socket")?;
    SockRef::from(&datagrams).set_recv_buffer_size(4 << 20)?;
    thread::spawn(move || echo_datagrams(&datagrams));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        for port in [ECHO, SOURCE] {
            for has_header in [false, true] {
                let port = if has_header { port + WITH_HEADER } else { port };
                let listener = listen(SocketAddr::new(address, port)).with_context(|| format!("listen at {port}"))?;
                tokio::spawn(accept(listener, port, has_header));
            }
        }
        std::future::pending().await
    })
}

/// Returns datagrams to their senders, many with one system call.
fn echo_datagrams(socket: &UdpSocket) -> Result<()> {
    /// Datagrams at a time.
    const MANY: usize = 64;
    /// More than any of them has.
    const ROOM: usize = 2048;
    let mut memory = vec![[0; ROOM]; MANY];
    let mut received = MultiHeaders::<SockaddrStorage>::preallocate(MANY, None);
    let mut sent = MultiHeaders::<SockaddrStorage>::preallocate(MANY, None);
    loop {
        let from: Vec<(usize, Option<SockaddrStorage>)> = {
            let mut parts: Vec<_> = memory.iter_mut().map(|part| [IoSliceMut::new(part)]).collect();
            let flags = MsgFlags::MSG_WAITFORONE;
            let headers = recvmmsg(socket.as_raw_fd(), &mut received, parts.iter_mut(), flags, None)?;
            headers.map(|it| (it.bytes, it.address)).collect()
        };
        let parts: Vec<_> =
            memory.iter().zip(&from).map(|(part, (length, _))| [IoSlice::new(&part[..*length])]).collect();
        let addresses: Vec<_> = from.iter().map(|(_, address)| *address).collect();
        // Who is gone by now gets none.
        sendmmsg(socket.as_raw_fd(), &mut sent, &parts, addresses, [], MsgFlags::empty()).map(drop).ok();
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    // What is accepted has this, too.
    socket.set_tcp_nodelay(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(4_096)?;
    TcpListener::from_std(socket.into())
}

async fn accept(listener: TcpListener, port: u16, has_header: bool) {
    // A connection that was reset before it was accepted is none of our business.
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let end = if port % WITH_HEADER == ECHO % WITH_HEADER {
                echo(stream, has_header).await
            } else {
                source(stream, has_header).await
            };
            // Clients of a source leave in the middle of it.
            drop(end);
        });
    }
}

async fn echo(mut stream: TcpStream, has_header: bool) -> Result<()> {
    if has_header {
        skip_header(&mut stream).await?;
    }
    loop {
        stream.readable().await?;
        let mut chunk = [0; CHUNK];
        match stream.try_read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(length) => stream.write_all(&chunk[..length]).await?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
}

async fn source(mut stream: TcpStream, has_header: bool) -> Result<()> {
    if has_header {
        skip_header(&mut stream).await?;
    }
    let much = vec![0; MUCH];
    loop {
        stream.write_all(&much).await?;
    }
}

/// Reads a PROXY header of either version, byte for byte as it is never more than the header.
async fn skip_header(stream: &mut TcpStream) -> Result<()> {
    let mut start = [0; 16];
    stream.read_exact(&mut start).await?;
    if start.starts_with(b"\r\n\r\n\0\r\nQUIT\n") {
        let mut rest = vec![0; usize::from(u16::from_be_bytes([start[14], start[15]]))];
        stream.read_exact(&mut rest).await?;
        return Ok(());
    }
    ensure!(start.starts_with(b"PROXY "), "{start:?} is no PROXY header");
    while stream.read_u8().await? != b'\n' {}
    Ok(())
}
