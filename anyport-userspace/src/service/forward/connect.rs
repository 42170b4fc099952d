//! Connecting to an upstream.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use super::config::TcpOptions;
use crate::service::{event_loop::Stream, socket_options};

/// Begins to connect to `to`, from the address `source` if there is one. With `has_words` there is something to say, and it takes
/// the place of the last packet of the handshake.
pub(super) fn begin(
    options: &TcpOptions,
    to: SocketAddr,
    source: Option<IpAddr>,
    has_words: bool,
) -> io::Result<Stream> {
    let socket = socket_options::upstream(options, to, source)?;
    let stream = Stream::unconnected(socket);
    if has_words {
        stream.hold_acknowledgement();
    }
    stream.connect(to)?;
    Ok(stream)
}
