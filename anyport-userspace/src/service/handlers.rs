//! What handlers say and do.

use std::{
    io::{self, Write as _},
    mem::MaybeUninit,
    net::SocketAddr,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use anyport_common::flow::Transport;
use socket2::SockRef;
use tokio::{
    io::{AsyncWriteExt as _, Interest},
    net::TcpStream,
    time::{sleep, timeout},
};

use super::{HandlerKind, ServiceConfig, datagram::Ends};

/// A connection over which nothing was said for this long is closed, at the earliest after half of it.
const IDLE_LIMIT: Duration = Duration::from_mins(5);
/// How long to listen after the last word, so that the client gets it: closing a connection with unread data resets
/// it, and the client's kernel may then throw away what we said.
const LINGER_LIMIT: Duration = Duration::from_secs(1);
/// How much to listen to after the last word, in bytes.
const LINGER_BYTES: usize = 64 << 10;
/// Most bytes that an echo holds for a connection.
const ECHO_CHUNK: usize = 16 << 10;
/// Most bytes forgotten at once.
const FORGET_CHUNK: usize = 16 << 10;

/// What has gone over a connection.
#[derive(Debug)]
pub(super) struct Talk {
    /// Whether there was anything since that was last asked.
    active: AtomicBool,
    from_client: AtomicU64,
    to_client: AtomicU64,
}

impl Default for Talk {
    fn default() -> Self {
        Self { active: AtomicBool::new(true), from_client: AtomicU64::new(0), to_client: AtomicU64::new(0) }
    }
}

impl Talk {
    fn heard(&self, bytes: usize) {
        self.active.store(true, Relaxed);
        self.from_client.fetch_add(bytes as u64, Relaxed);
    }

    fn said(&self, bytes: usize) {
        self.active.store(true, Relaxed);
        self.to_client.fetch_add(bytes as u64, Relaxed);
    }

    /// Bytes of the client, and bytes to it.
    pub(super) fn bytes(&self) -> (u64, u64) {
        (self.from_client.load(Relaxed), self.to_client.load(Relaxed))
    }
}

/// Serves one connection to its end.
pub(super) async fn converse(
    config: &ServiceConfig,
    mut stream: TcpStream,
    Ends { client, dialled }: Ends,
    talk: &Talk,
) -> io::Result<()> {
    match config.handler {
        HandlerKind::Hello => hello(&mut stream, client, dialled, talk).await,
        HandlerKind::Echo => while_active(IDLE_LIMIT, &talk.active, echo(&mut stream, talk)).await,
        HandlerKind::Discard => {
            let banner = config.banner.as_deref().unwrap_or_default();
            while_active(IDLE_LIMIT, &talk.active, discard(&mut stream, banner, talk)).await
        }
        // The one is served elsewhere, the other has no sockets of ours.
        HandlerKind::Forward | HandlerKind::Registered => Ok(()),
    }
}

async fn hello(stream: &mut TcpStream, client: SocketAddr, dialled: SocketAddr, talk: &Talk) -> io::Result<()> {
    let line = Line::hello(client, dialled, Transport::Tcp);
    stream.write_all(line.as_bytes()).await?;
    talk.said(line.as_bytes().len());
    stream.shutdown().await?;
    let linger = async {
        let mut heard = 0;
        while heard < LINGER_BYTES {
            match forget(stream).await? {
                0 => break,
                length => {
                    heard += length;
                    talk.heard(length);
                }
            }
        }
        Ok(())
    };
    timeout(LINGER_LIMIT, linger).await.unwrap_or(Ok(()))
}

async fn echo(stream: &mut TcpStream, talk: &Talk) -> io::Result<()> {
    loop {
        stream.readable().await?;
        // Allocated when there is something to read, so that idle connections hold no buffer.
        let mut chunk = Vec::with_capacity(ECHO_CHUNK);
        match stream.try_read_buf(&mut chunk) {
            Ok(0) => return stream.shutdown().await,
            Ok(length) => {
                talk.heard(length);
                stream.write_all(&chunk).await?;
                talk.said(length);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

async fn discard(stream: &mut TcpStream, banner: &str, talk: &Talk) -> io::Result<()> {
    stream.write_all(banner.as_bytes()).await?;
    talk.said(banner.len());
    loop {
        match forget(stream).await? {
            0 => return stream.shutdown().await,
            length => talk.heard(length),
        }
    }
}

/// Drops what has arrived; how many bytes, 0 at the end of the stream.
async fn forget(stream: &TcpStream) -> io::Result<usize> {
    let drop_some = || {
        // With MSG_TRUNC the kernel drops what TCP has received instead of copying it here.
        let mut nowhere = [MaybeUninit::uninit(); FORGET_CHUNK];
        SockRef::from(stream).recv_with_flags(&mut nowhere, libc::MSG_TRUNC)
    };
    stream.async_io(Interest::READABLE, drop_some).await
}

/// Gives up when `conversation` has not set `active` for `limit`, or half of it. One timer for the whole
/// conversation instead of one for each wait.
async fn while_active(
    limit: Duration,
    active: &AtomicBool,
    conversation: impl Future<Output = io::Result<()>>,
) -> io::Result<()> {
    let idle = async {
        while active.swap(false, Relaxed) {
            sleep(limit / 2).await;
        }
    };
    tokio::select! {
        biased;
        end = conversation => end,
        () = idle => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// A line of text that needs no allocation.
#[derive(Debug)]
pub(super) struct Line {
    bytes: [u8; Self::CAPACITY],
    length: usize,
}

impl Line {
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
    use std::{
        net::{Ipv6Addr, SocketAddr, SocketAddrV6},
        sync::atomic::{AtomicBool, Ordering::Relaxed},
        time::Duration,
    };

    use anyport_common::flow::Transport;
    use tokio::time::{Instant, sleep};

    use super::{Line, while_active};

    fn hello(client: SocketAddr, dialled: SocketAddr) -> String {
        String::from_utf8(Line::hello(client, dialled, Transport::Udp).as_bytes().into()).unwrap()
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

    #[tokio::test]
    async fn an_idle_conversation_ends() {
        const LIMIT: Duration = Duration::from_millis(400);
        let start = Instant::now();
        let active = AtomicBool::new(true);
        let silent = while_active(LIMIT, &active, std::future::pending()).await;
        assert_eq!(silent.unwrap_err().kind(), std::io::ErrorKind::TimedOut);
        assert!(start.elapsed() >= LIMIT / 2);

        let active = AtomicBool::new(true);
        let talkative = async {
            for _ in 0..10 {
                sleep(LIMIT / 4).await;
                active.store(true, Relaxed);
            }
            Ok(())
        };
        while_active(LIMIT, &active, talkative).await.unwrap();
    }
}
