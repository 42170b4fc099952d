//! A connection at the control socket. Descriptors that a client passes are taken out of its way, so that neither a read nor a close sleeps.

use std::{
    io,
    os::fd::AsFd as _,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::UnixStream,
};

use crate::closing;

/// A client's connection, which nothing waits for when it is closed.
#[derive(Debug)]
pub(super) struct ClientStream {
    /// Taken only when this is dropped.
    stream: Option<UnixStream>,
    uid: u32,
}

impl ClientStream {
    /// One to a process of this user.
    pub(super) fn new(stream: UnixStream, uid: u32) -> Self {
        Self { stream: Some(stream), uid }
    }

    fn stream(&mut self) -> &mut UnixStream {
        self.stream.as_mut().expect("a connection until it is dropped")
    }
}

impl Drop for ClientStream {
    fn drop(&mut self) {
        // Where the runtime does not let it go, it is closed as any other.
        if let Some(Ok(stream)) = self.stream.take().map(UnixStream::into_std) {
            closing::close(self.uid, vec![stream.into()]);
        }
    }
}

impl AsyncRead for ClientStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let uid = this.uid;
        let stream = this.stream();
        loop {
            ready!(stream.poll_read_ready(cx))?;
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
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(self.get_mut().stream()).poll_write(cx, data)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(self.get_mut().stream()).poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.get_mut().stream()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.get_mut().stream()).poll_shutdown(cx)
    }
}
