//! A connection at the control socket. Descriptors that a client passes are taken out of its way, so that neither a read nor a close sleeps.

use std::{
    io::{self, IoSlice},
    os::fd::AsFd as _,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use rustix::net::{Shutdown, shutdown};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::UnixStream,
};

use super::clients::Unsent;
use crate::closing;

/// A client's connection, which nothing waits for when the last of its clones closes it.
#[derive(Clone, Debug)]
pub(super) struct ClientStream {
    socket: Arc<Socket>,
    unsent: Arc<Unsent>,
}

#[derive(Debug)]
struct Socket {
    /// Taken only when this is dropped.
    stream: Option<UnixStream>,
    uid: u32,
}

impl ClientStream {
    /// One to a process of this user. `unsent` is told whenever everything that was to leave has left.
    pub(super) fn new(stream: UnixStream, uid: u32, unsent: Arc<Unsent>) -> Self {
        Self { socket: Arc::new(Socket { stream: Some(stream), uid }), unsent }
    }

    /// Writes what fits at once.
    ///
    /// # Errors
    /// The peer is gone, or reads nothing.
    pub(super) fn try_write(&self, data: &[u8]) -> io::Result<usize> {
        self.socket.stream().try_write(data)
    }
}

impl Socket {
    fn stream(&self) -> &UnixStream {
        self.stream.as_ref().expect("a connection until it is dropped")
    }

    fn poll_write(
        &self,
        context: &mut Context<'_>,
        write: impl Fn(&UnixStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.stream().poll_write_ready(context))?;
            match write(self.stream()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Where the runtime does not let it go, it is closed as any other.
        if let Some(Ok(stream)) = self.stream.take().map(UnixStream::into_std) {
            closing::close(self.uid, vec![stream.into()]);
        }
    }
}

impl AsyncRead for ClientStream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Socket { uid, .. } = *self.socket;
        let stream = self.socket.stream();
        loop {
            ready!(stream.poll_read_ready(context))?;
            let free = buffer.initialize_unfilled();
            let received = stream.try_io(Interest::READABLE, || Ok(closing::receive_into(stream.as_fd(), free, uid)?));
            match received {
                Ok(length) => {
                    buffer.advance(length);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.socket.poll_write(context, |stream| stream.try_write(data))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.socket.poll_write(context, |stream| stream.try_write_vectored(data))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// hyper asks for this once it has written all that it had.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.unsent.have_left();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(shutdown(self.socket.stream(), Shutdown::Write).map_err(Into::into))
    }
}
