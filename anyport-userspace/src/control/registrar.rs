//! The socket for registering: who may connect is everybody, and who may register is decided for each service.

use std::{
    collections::HashMap,
    fs,
    io::{self, ErrorKind},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::{FileTypeExt as _, PermissionsExt as _},
    },
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, bail};
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind as bind_to, listen, socket_with},
};
use serde_json::{Value, json};
use tokio::{io::unix::AsyncFd, time::sleep};
use tracing::{debug, warn};

use crate::{
    api::{Changed, Peer, Problem, ProblemKind, parse},
    closing::{self, PassedFd},
    engine::Shared,
    register::{Answer, Candidate, Process, Register, Request},
    scm_rights,
    socket_file::SocketFile,
    sys::watch_readable,
};

/// How long a client may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(5);
/// Clients of one user at a time: one user can't keep the others out.
const MAX_CLIENTS: usize = 16;
/// How long to wait where no descriptor is free.
const PAUSE: Duration = Duration::from_millis(100);

/// Opens the socket for registering. No other daemon may be at work with it, which the control socket shows.
///
/// # Errors
/// What the kernel refused.
pub fn bind(path: &Path) -> anyhow::Result<OwnedFd> {
    let attempt = || format!("open the socket for registering {}", path.display());
    match fs::symlink_metadata(path) {
        Ok(file) if file.file_type().is_socket() => fs::remove_file(path).with_context(attempt)?,
        Ok(_) => bail!("{}: there is a file of that name which is not a socket; it is left alone", attempt()),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(attempt),
    }
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).with_context(attempt)?;
    }
    let open = || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        bind_to(&socket, &SocketAddrUnix::new(path)?)?;
        listen(&socket, 128)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
        Ok::<_, io::Error>(socket)
    };
    open().with_context(attempt)
}

/// Answers requests until dropped. What is under way is carried out all the same.
pub async fn serve(listener: OwnedFd, file: Arc<SocketFile>, engine: Shared) {
    let mut listener = match watch(listener) {
        Ok(listener) => listener,
        Err(error) => return warn!("{error:#}"),
    };
    let clients = Clients::default();
    loop {
        while closing::is_full() {
            sleep(PAUSE).await;
        }
        let accepted = tokio::select! {
            accepted = next(&listener) => accepted,
            again = file.put_back(|path| watch(bind(path)?)) => {
                listener = again;
                continue;
            }
        };
        match accepted {
            Ok(client) => {
                let (engine, clients) = (Arc::clone(&engine), clients.clone());
                tokio::spawn(async move {
                    if let Err(error) = converse(client, engine, clients).await {
                        debug!("a client at the socket for registering: {error:#}");
                    }
                });
            }
            Err(error) => {
                warn!("accept at the socket for registering: {error}");
                sleep(PAUSE).await;
            }
        }
    }
}

/// Who is not accepted yet may have passed something already.
fn watch(listener: OwnedFd) -> anyhow::Result<AsyncFd<PassedFd>> {
    watch_readable(PassedFd::new(listener, u32::MAX)).context("watch the socket for registering")
}

async fn next(listener: &AsyncFd<PassedFd>) -> io::Result<OwnedFd> {
    loop {
        let mut ready = listener.readable().await?;
        match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Err(Errno::AGAIN) => ready.clear_ready(),
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            accepted => return Ok(accepted?),
        }
    }
}

/// One request and its answer.
async fn converse(client: OwnedFd, engine: Shared, clients: Clients) -> anyhow::Result<()> {
    let peer = match Peer::of(client.as_fd()) {
        Ok(peer) => peer,
        Err(error) => {
            closing::close(u32::MAX, vec![client]);
            return Err(error).context("ask the kernel who it is");
        }
    };
    let client = watch_readable(PassedFd::new(client, peer.uid.as_raw())).context("watch its connection")?;
    let answer = match clients.admit(peer.uid) {
        Some(_) if closing::is_clogged(peer.uid.as_raw()) => {
            let error = format!("descriptors that user {} passed before take long to close", peer.uid);
            Err(Problem::new(ProblemKind::Stopping, error).hint("try again when they are closed"))
        }
        Some(_admitted) => {
            let request =
                tokio::time::timeout(PATIENCE, receive(&client, &peer)).await.context("it said nothing")??;
            if request.text.is_empty() && request.descriptors.is_empty() {
                return Ok(());
            }
            carry_out(request, &client, peer, engine).await
        }
        None => {
            Err(Problem::new(ProblemKind::Stopping, format!("user {} has {MAX_CLIENTS} requests under way", peer.uid))
                .hint("try again when they are done"))
        }
    };
    scm_rights::put(&client, &serde_json::to_vec(&to_json(answer)?)?, &[]).context("answer it")
}

async fn receive(client: &AsyncFd<PassedFd>, peer: &Peer) -> io::Result<closing::Message> {
    loop {
        let mut ready = client.readable().await?;
        match closing::receive(client, peer.uid.as_raw()) {
            Err(Errno::AGAIN) => ready.clear_ready(),
            Err(Errno::INTR) => {}
            received => return Ok(received?),
        }
    }
}

fn to_json(answer: Result<Changed, Problem>) -> serde_json::Result<Value> {
    let (status, mut fields) = match answer {
        Ok(changed) => (200, serde_json::to_value(changed)?),
        Err(problem) => (problem.kind.http_status(), serde_json::to_value(problem)?),
    };
    fields["status"] = json!(status);
    Ok(fields)
}

async fn carry_out(
    message: closing::Message,
    client: &AsyncFd<PassedFd>,
    peer: Peer,
    engine: Shared,
) -> Result<Changed, Problem> {
    let closing::Message { text, descriptors, is_cut_off } = message;
    if is_cut_off {
        return Err(Problem::new(
            ProblemKind::TooLarge,
            format!(
                "the request is larger than {} bytes or {} descriptors",
                scm_rights::MAX_MESSAGE,
                scm_rights::MAX_DESCRIPTORS
            ),
        ));
    }
    let request: Request = parse(&text)?;
    engine.lock().await.as_ref().ok_or_else(Problem::stopping)?.expect_registrant(request.service(), &peer)?;
    let (register, sockets) = match request {
        Request::Unregister(unregister) => {
            return engine.lock().await.as_mut().ok_or_else(Problem::stopping)?.unregister(&unregister, &peer).await;
        }
        Request::Answer(Answer { service }) => {
            let connection = client.get_ref().try_clone().context("duplicate a descriptor")?;
            return engine.lock().await.as_mut().ok_or_else(Problem::stopping)?.answer_for(&service, &peer, connection);
        }
        Request::Register(register) => {
            // Processes may have very many descriptors.
            let find = move || find(&register, descriptors, &peer).map(|found| (register, found, peer));
            let (register, found, peer) = tokio::task::spawn_blocking(find)
                .await
                .map_err(|error| Problem::new(ProblemKind::Failed, format!("look for the sockets: {error}")))??;
            (register, (found, peer))
        }
    };
    let (candidates, peer) = sockets;
    let pid = register.pid.unwrap_or(peer.pid);
    engine
        .lock()
        .await
        .as_mut()
        .ok_or_else(Problem::stopping)?
        .register(&register.service, candidates, pid, &peer)
        .await
}

/// The sockets that come with a request, of a process that the peer may speak for.
fn find(register: &Register, descriptors: Vec<PassedFd>, peer: &Peer) -> Result<Vec<Candidate>, Problem> {
    if descriptors.is_empty() {
        return Err(Problem::new(ProblemKind::Invalid, "register: the request comes with no descriptors")
            .hint("docs/api.md describes the request"));
    }
    if let Some(pid) = register.pid
        && !peer.is_in_control()
        && !Process::open(pid)?.belongs_to(peer.uid.as_raw())
    {
        let error = format!("user {} may not speak for the process {pid}, which is another user's", peer.uid);
        return Err(Problem::new(ProblemKind::NotPermitted, error)
            .hint("have the process pass its socket itself, or become root"));
    }
    let numbered = (1..).zip(descriptors);
    let candidates = numbered.map(|(number, descriptor): (usize, _)| {
        Candidate::new(descriptor).and_then(Candidate::in_our_namespace).map_err(|unfit| {
            Problem::new(ProblemKind::Invalid, format!("descriptor {number} of those that were passed: {unfit}"))
        })
    });
    candidates.collect()
}

/// How many clients each user has.
#[derive(Clone, Debug, Default)]
struct Clients(Arc<Mutex<HashMap<u32, usize>>>);

/// A client that counts until this is dropped.
struct Admitted(Clients, u32);

impl Clients {
    fn admit(&self, uid: nix::unistd::Uid) -> Option<Admitted> {
        let uid = uid.as_raw();
        let mut clients = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = clients.entry(uid).or_default();
        (*count < MAX_CLIENTS).then(|| {
            *count += 1;
            Admitted(self.clone(), uid)
        })
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let Self(Clients(clients), uid) = self;
        let mut clients = clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = clients.get_mut(uid) {
            *count -= 1;
            if *count == 0 {
                clients.remove(uid);
            }
        }
    }
}
