//! Asking at the socket for registering.

use std::{
    os::fd::{BorrowedFd, OwnedFd},
    path::Path,
    time::Duration,
};

use rustix::{
    io::{Errno, retry_on_intr},
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
        sockopt::{Timeout, set_socket_timeout},
    },
};
use serde_json::Value;

use super::Request;
use crate::{
    problem::{Changed, Problem, ProblemKind},
    scm_rights,
};

/// Longer than any registration takes, tproxy with a busy iptables lock included.
const PATIENCE: Duration = Duration::from_secs(30);
/// Nobody waits longer for an answer to a datagram.
const PATIENCE_OF_ANSWERS: Duration = Duration::from_secs(1);

/// Has the daemon carry out a request, with these descriptors.
///
/// # Errors
/// The daemon's own, or that none answers at `path`.
pub fn send(path: &Path, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<Changed, Problem> {
    ask(path, request, descriptors).map(|(_, changed)| changed)
}

/// Has the daemon take answers over the connection that is returned. Sending over it waits for a second at most.
///
/// # Errors
/// The daemon's own, or that none answers at `path`.
pub fn open(path: &Path, request: &Request) -> Result<OwnedFd, Problem> {
    let (connection, _) = ask(path, request, &[])?;
    set_socket_timeout(&connection, Timeout::Send, Some(PATIENCE_OF_ANSWERS)).map_err(|error| {
        Problem::new(ProblemKind::Failed, format!("limit the time that an answer may take: {error}"))
    })?;
    Ok(connection)
}

fn ask(path: &Path, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<(OwnedFd, Changed), Problem> {
    let text = serde_json::to_vec(request)
        .map_err(|error| Problem::new(ProblemKind::Failed, format!("write the request: {error}")))?;
    let (connection, answer) = exchange(path, &text, descriptors).map_err(|error| match error {
        Errno::ACCESS | Errno::PERM => {
            Problem::new(ProblemKind::NotPermitted, format!("connect to {}: {error}", path.display()))
                .hint("the directory of the socket has to be open to those who register")
        }
        Errno::AGAIN => Problem::new(
            ProblemKind::NoDaemon,
            format!("no answer from {} for {} s", path.display(), PATIENCE.as_secs()),
        )
        .hint("it may still carry the command out; anyportd's log says what it is busy with"),
        Errno::TOOMANYREFS => Problem::new(
            ProblemKind::Invalid,
            format!("{} descriptors; {} are the limit", descriptors.len(), scm_rights::MAX_DESCRIPTORS),
        ),
        _ => Problem::new(ProblemKind::NoDaemon, format!("no anyportd answers at {}: {error}", path.display()))
            .hint("start anyportd, or name its socket with --socket"),
    })?;
    understand(&answer).map(|changed| (connection, changed))
}

fn exchange(path: &Path, text: &[u8], descriptors: &[BorrowedFd<'_>]) -> rustix::io::Result<(OwnedFd, Vec<u8>)> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    for timeout in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(&socket, timeout, Some(PATIENCE))?;
    }
    let address = SocketAddrUnix::new(path)?;
    retry_on_intr(|| connect(&socket, &address))?;
    scm_rights::put(&socket, text, descriptors)?;
    let answer = scm_rights::receive(&socket)?;
    if answer.text.is_empty() { Err(Errno::CONNRESET) } else { Ok((socket, answer.text)) }
}

fn understand(answer: &[u8]) -> Result<Changed, Problem> {
    let understood = || {
        let mut fields: Value = serde_json::from_slice(answer).ok()?;
        let status = fields.as_object_mut()?.remove("status")?.as_u64()?.try_into().ok()?;
        if status == 200 {
            return serde_json::from_value(fields).ok().map(Ok);
        }
        let problem = serde_json::from_value(fields).ok()?;
        Some(Err(Problem { kind: ProblemKind::from_http_status(status), ..problem }))
    };
    understood().unwrap_or_else(|| {
        Err(Problem::new(ProblemKind::Failed, format!("anyportd answered {}", String::from_utf8_lossy(answer))))
    })
}
