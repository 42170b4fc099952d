//! `anyportctl register` and `unregister`: the sockets of other processes.

use std::{
    env,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    process,
};

use nix::sys::stat::fstat;

use super::{Output, completion};
use crate::{
    api::{Client, Problem, ProblemKind},
    register::{Listen, Process, Register, Request, Unregister, holders, send, socket_beside},
    rules::{Protocol, ServiceName},
    service::Family,
    sys::take_inherited,
};

/// The first descriptor that systemd passes (`sd_listen_fds(3)`).
const LISTEN_FDS_START: i32 = 3;

/// Hands listening TCP sockets or unconnected UDP sockets of another process to a service of the handler registered.
///
/// Without --pid they are those that systemd passes, see `sd_listen_fds(3)`.
#[derive(Debug, clap::Args)]
pub(super) struct Add {
    /// The service that they are for
    #[arg(add = completion::services())]
    service: ServiceName,
    /// The process whose sockets they are
    #[arg(long)]
    pid: Option<u32>,
    /// Its descriptor of the socket
    #[arg(long, value_name = "N", requires = "pid", conflicts_with = "listen")]
    fd: Option<i32>,
    /// Where its socket waits, such as tcp:127.0.0.1:8080 or udp:[::]:53
    #[expect(rustdoc::broken_intra_doc_links, reason = "it is the text of --help, in which brackets are no links")]
    #[arg(long, value_name = "PROTOCOL:ADDR:PORT", requires = "pid")]
    listen: Option<Listen>,
}

impl Add {
    pub(super) fn run(self, client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
        let Self { service, pid, fd, listen } = self;
        if pid.is_some() && fd.is_none() && listen.is_none() {
            return Err(Problem::new(ProblemKind::Invalid, "register: which socket of the process?")
                .hint("name it by --fd N or --listen tcp:ADDR:PORT"));
        }
        let done = format!("service {service} receives at what was registered");
        // Fetching takes the privileges of the calling user: anyportd has none that would do.
        let fetched = match (pid.map(Process::open).transpose()?, fd, listen) {
            (Some(process), Some(fd), _) => vec![process.candidate(fd)?],
            (Some(process), None, Some(listen)) => process.listening(&listen)?,
            _ => Vec::new(),
        };
        let passed = if pid.is_none() { passed()? } else { Vec::new() };
        let fetched = fetched.iter().map(|it| it.descriptor.as_fd());
        let descriptors: Vec<_> = fetched.chain(passed.iter().map(|it| it.as_fd())).collect();
        // Who only passes sockets on will have ended soon.
        let pid = pid.or_else(|| holder(*descriptors.first()?));
        let request = Request::Register(Register { service, pid });
        let answer = send(&socket_beside(client.socket()), &request, &descriptors)?;
        out.print_change(&answer, done)
    }
}

/// Another process that holds a socket, as far as that can be seen.
fn holder(socket: BorrowedFd<'_>) -> Option<u32> {
    let inode = fstat(socket).ok()?.st_ino;
    holders(inode).next().map(|(pid, _)| pid)
}

/// What systemd passed.
fn passed() -> Result<Vec<OwnedFd>, Problem> {
    let invalid = |why: String| {
        Problem::new(ProblemKind::Invalid, format!("register: {why}"))
            .hint("name a socket by --pid and --fd or --listen, or have systemd pass it: see sd_listen_fds(3)")
    };
    let variable = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
    let count = variable("LISTEN_FDS").ok_or_else(|| invalid("no --pid is given, and LISTEN_FDS is not set".into()))?;
    let number = count.parse().ok().filter(|count: &i32| (0..=1024).contains(count));
    let count = number.ok_or_else(|| invalid(format!("LISTEN_FDS is {count:?}, which is no number of descriptors")))?;
    if count == 0 {
        return Err(invalid("LISTEN_FDS is 0: no sockets were passed".into()));
    }
    let meant = variable("LISTEN_PID").unwrap_or_default();
    if meant.parse() != Ok(process::id()) {
        return Err(invalid(format!("LISTEN_PID is {meant:?}, so the sockets were passed to another process")));
    }
    let descriptors = LISTEN_FDS_START..LISTEN_FDS_START + count;
    let open = |it| take_inherited(it).ok_or_else(|| invalid(format!("the descriptor {it} of LISTEN_FDS is not open")));
    descriptors.map(open).collect()
}

/// Gives up sockets that were registered for a service. They stay open, and connections go on.
#[derive(Debug, clap::Args)]
pub(super) struct Remove {
    /// The service that they are for
    #[arg(add = completion::services())]
    service: ServiceName,
    /// Only those for this transport
    #[arg(long)]
    protocol: Option<Protocol>,
    /// Only those for packets of this family
    #[arg(long)]
    family: Option<Family>,
}

impl Remove {
    pub(super) fn run(self, client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
        let Self { service, protocol, family } = self;
        let done = format!("service {service} has given its sockets up");
        let request = Request::Unregister(Unregister { service, protocol, family });
        out.print_change(&send(&socket_beside(client.socket()), &request, &[])?, done)
    }
}
