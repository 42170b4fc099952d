//! How answers get to the daemon, which sends them from the original destination.

use std::{
    io,
    os::unix::net::UnixDatagram,
    sync::{Arc, Mutex, PoisonError},
};

use super::Registration;
use crate::{
    datagram::Ends,
    register::{self, Answer, Request},
};

/// A connection to the daemon, made when there is the first answer, and again after the daemon was restarted.
#[derive(Debug)]
pub(super) struct Answers {
    registration: Registration,
    connection: Mutex<Option<Arc<UnixDatagram>>>,
}

impl Answers {
    pub(super) fn new(registration: Registration) -> Self {
        Self { registration, connection: Mutex::new(None) }
    }

    pub(super) fn send(&self, ends: Ends, answer: &[u8]) -> io::Result<()> {
        let message = message(ends, answer);
        let known = self.connection.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(connection) = &known {
            match connection.send(&message) {
                Err(error) if is_gone(&error) => {}
                sent => return sent.map(drop),
            }
        }
        self.reconnect(known.as_ref())?.send(&message).map(drop)
    }

    /// A connection other than the one that was found to be gone.
    fn reconnect(&self, gone: Option<&Arc<UnixDatagram>>) -> io::Result<Arc<UnixDatagram>> {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        match &*connection {
            Some(other) if gone.is_none_or(|gone| !Arc::ptr_eq(gone, other)) => Ok(Arc::clone(other)),
            _ => Ok(Arc::clone(connection.insert(Arc::new(self.registration.connect()?)))),
        }
    }

    #[cfg(feature = "tokio")]
    pub(super) fn into_registration(self) -> Registration {
        self.registration
    }
}

impl Registration {
    /// A connection over which the daemon takes answers. Its type is `SOCK_SEQPACKET`, for which std has no name; messages are
    /// sent the same way.
    pub(super) fn connect(&self) -> io::Result<UnixDatagram> {
        let request = Request::Answer(Answer { service: self.service.clone() });
        register::open(&self.path, &request).map(UnixDatagram::from).map_err(io::Error::other)
    }
}

/// What the daemon takes: a line with both ends, and the answer.
pub(super) fn message(ends: Ends, answer: &[u8]) -> Vec<u8> {
    let Ends { client, dialled } = ends;
    let mut message = format!("{dialled} {client}\n").into_bytes();
    message.extend(answer);
    message
}

/// Whether the daemon has ended, or has closed the service.
pub(super) fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected)
}
