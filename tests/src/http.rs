//! Requests to the daemon's API without its client, byte by byte.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use crate::host::patience;

/// Sends one request with `body` and returns the status code and the body of the answer.
pub fn request(socket: &Path, method: &str, target: &str, body: &[u8]) -> (u16, String) {
    let Answer { status, body, .. } = exchange(socket, &bytes(method, target, body));
    (status, body)
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// Its status code.
    pub status: u16,
    /// The lines before its body.
    pub head: String,
    /// Its body.
    pub body: String,
}

/// Sends one request as it is.
pub fn exchange(socket: &Path, request: &[u8]) -> Answer {
    let answer = raw(socket, request);
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.unwrap_or_else(|| panic!("no HTTP answer to {}, but {answer:?}", request.escape_ascii()));
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    Answer { status, head: head.to_owned(), body: body.to_owned() }
}

/// One request with `body`, as it is sent.
pub fn bytes(method: &str, target: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "{method} {target} HTTP/1.1\r\nHost: anyport\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n",
        body.len(),
    );
    [head.as_bytes(), body].concat()
}

/// Sends `bytes` and returns all that comes back.
pub fn raw(socket: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).expect("a connection to the control socket");
    stream.set_read_timeout(Some(patience(Duration::from_secs(10)))).expect("a time limit");
    // The daemon may have answered and closed before it read everything.
    drop(stream.write_all(bytes));
    let mut answer = Vec::new();
    drop(stream.read_to_end(&mut answer));
    String::from_utf8_lossy(&answer).into_owned()
}
