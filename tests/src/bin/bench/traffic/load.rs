//! What clients do, and how fast it goes.

use std::{
    cell::Cell,
    io,
    mem::MaybeUninit,
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, Interest},
    net::TcpStream,
    runtime::Builder,
    task::LocalSet,
    time::{sleep, timeout},
};

/// Bytes that fit into the kernel's buffers on the way.
const SMALL: usize = 16 << 10;
/// Bytes that a reader takes, and drops, at once.
const CHUNK: usize = 1 << 20;
/// Before anything counts.
pub(crate) const WARM_UP: Duration = Duration::from_millis(200);
/// How long anything that must come may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    /// New connections, each with one request.
    Connections,
    /// Requests over connections that stay.
    Requests,
    /// As many bytes as go through.
    Bulk,
    /// New connections over which nothing is said.
    Accepts,
}

/// How many of what is counted (connections, requests, bytes) there are in a second, with so many clients at a time and so
/// many bytes for a request and for its answer. To be called inside the client's namespace.
pub(crate) fn rate(load: Load, to: SocketAddr, request: usize, clients: usize, time: Duration) -> Result<f64> {
    run(async move {
        let count = Rc::new(Cell::new(0_u64));
        let tasks = LocalSet::new();
        let mut running = Vec::new();
        for _ in 0..clients {
            let count = Rc::clone(&count);
            running.push(tasks.spawn_local(async move {
                match load {
                    Load::Connections => connections(to, request, &count).await,
                    Load::Requests => requests(to, request, &count).await,
                    Load::Bulk => bulk(to, &count).await,
                    Load::Accepts => accepts(to, &count).await,
                }
            }));
        }
        let measured = tasks.run_until(async {
            sleep(WARM_UP).await;
            let (before, begin) = (count.get(), Instant::now());
            sleep(time).await;
            #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
            let counted = (count.get() - before) as f64;
            counted / begin.elapsed().as_secs_f64()
        });
        let rate = measured.await;
        for task in running {
            // A client that has ended has met an error.
            if task.is_finished() {
                tasks.run_until(task).await?.with_context(|| format!("{load:?} at {to}"))?;
            }
        }
        Ok(rate)
    })
}

/// Makes so many connections, each with one request, `clients` at a time.
pub(crate) fn connect_often(to: SocketAddr, request: usize, clients: usize, total: u64) -> Result<()> {
    run(async move {
        let left = Rc::new(Cell::new(total));
        let tasks = LocalSet::new();
        let clients: Vec<_> = std::iter::repeat_with(|| {
            let left = Rc::clone(&left);
            tasks.spawn_local(async move {
                let mut buffer = vec![0; request];
                while let Some(rest) = left.get().checked_sub(1) {
                    left.set(rest);
                    ask(&mut connect(to).await?, &mut buffer).await?;
                }
                anyhow::Ok(())
            })
        })
        .take(clients)
        .collect();
        for client in clients {
            tasks.run_until(client).await??;
        }
        Ok(())
    })
}

/// Times of single requests over one connection, one after the other.
pub(crate) fn latencies(to: SocketAddr, request: usize, count: usize) -> Result<Vec<Duration>> {
    run(async move {
        let mut stream = connect(to).await?;
        let mut buffer = vec![0; request];
        let mut times = Vec::with_capacity(count);
        for _ in 0..count {
            let begin = Instant::now();
            ask(&mut stream, &mut buffer).await?;
            times.push(begin.elapsed());
        }
        Ok(times)
    })
}

/// Connections over which one request has gone, and which are idle now. They are open while the value is held.
pub(crate) fn idle(to: SocketAddr, request: usize, count: usize) -> Result<Vec<std::net::TcpStream>> {
    run(async move {
        let mut buffer = vec![0; request];
        let mut idle = Vec::with_capacity(count);
        for _ in 0..count {
            let mut stream = connect(to).await?;
            ask(&mut stream, &mut buffer).await?;
            idle.push(stream.into_std()?);
        }
        Ok(idle)
    })
}

fn run<T>(what: impl Future<Output = Result<T>>) -> Result<T> {
    Builder::new_current_thread().enable_all().build()?.block_on(what)
}

async fn connect(to: SocketAddr) -> Result<TcpStream> {
    let stream = timeout(PATIENCE, TcpStream::connect(to)).await.with_context(|| format!("connect to {to}"))??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Sends the buffer, and reads as much. Both at a time: an echo does not take everything before it answers.
async fn ask(stream: &mut TcpStream, buffer: &mut [u8]) -> Result<()> {
    let (mut reader, mut writer) = stream.split();
    if buffer.len() <= SMALL {
        writer.write_all(buffer).await?;
        timeout(PATIENCE, reader.read_exact(buffer)).await.context("wait for an answer")??;
        return Ok(());
    }
    let question = vec![0; buffer.len()];
    let (sent, read) = tokio::join!(writer.write_all(&question), timeout(PATIENCE, reader.read_exact(buffer)));
    sent?;
    read.context("wait for an answer")??;
    Ok(())
}

async fn connections(to: SocketAddr, request: usize, count: &Cell<u64>) -> Result<()> {
    let mut buffer = vec![0; request];
    loop {
        let mut stream = connect(to).await?;
        ask(&mut stream, &mut buffer).await?;
        count.set(count.get() + 1);
    }
}

async fn accepts(to: SocketAddr, count: &Cell<u64>) -> Result<()> {
    loop {
        let connected = timeout(PATIENCE, TcpStream::connect(to)).await;
        drop(connected.with_context(|| format!("connect to {to}"))??);
        count.set(count.get() + 1);
    }
}

async fn requests(to: SocketAddr, request: usize, count: &Cell<u64>) -> Result<()> {
    let mut buffer = vec![0; request];
    let mut stream = connect(to).await?;
    loop {
        ask(&mut stream, &mut buffer).await?;
        count.set(count.get() + 1);
    }
}

async fn bulk(to: SocketAddr, count: &Cell<u64>) -> Result<()> {
    let stream = connect(to).await?;
    let mut nowhere = vec![MaybeUninit::uninit(); CHUNK];
    loop {
        // With MSG_TRUNC the kernel drops what TCP has received instead of copying it here.
        let drop_some = || SockRef::from(&stream).recv_with_flags(&mut nowhere, libc::MSG_TRUNC);
        match stream.async_io(Interest::READABLE, drop_some).await? {
            0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            length => count.set(count.get() + length as u64),
        }
    }
}
