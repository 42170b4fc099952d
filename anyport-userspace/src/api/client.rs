//! The client of the control API: one method a request, over the Unix socket of a daemon.

use std::{
    io::{self, ErrorKind},
    ops::ControlFlow,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method,
    body::{Bytes, Incoming},
    client::conn::http1,
    http,
};
use hyper_util::rt::TokioIo;
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Serialize, de::DeserializeOwned};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::{
    net::UnixStream,
    task::spawn_blocking,
    time::{Instant, sleep, timeout},
};

use super::{
    Problem, ProblemKind,
    types::{FIRST_HEADER, ID_HEADER, MAX_BODY, MAX_FILE, since_boot, too_large},
};

/// Longer than any request takes, tproxy with a busy iptables lock included.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longer than a million rules take, routes included.
const PATIENCE_WITH_FILES: Duration = Duration::from_mins(10);
/// Before what was refused is asked again, such as until a daemon that stops has given up its socket. It is doubled each time.
const PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// How long a lost answer is asked for.
const LOST_TIME: Duration = Duration::from_secs(10);

/// A daemon's control socket, from the other side.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// Nothing is connected before the first request.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Where the daemon is expected.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Asks for something.
    ///
    /// # Errors
    /// The daemon's own, or that none answers.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Problem> {
        self.send(Method::GET, path, Vec::new()).await
    }

    /// Sends a request with a body.
    ///
    /// # Errors
    /// The daemon's own, or that none answers.
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, Problem> {
        self.send(Method::POST, path, to_json(body)?).await
    }

    /// Removes something; the body says what where the path does not.
    ///
    /// # Errors
    /// The daemon's own, or that none answers.
    pub async fn delete<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, Problem> {
        self.send(Method::DELETE, path, to_json(body)?).await
    }

    /// Sends a file of up to 256 MiB, which may take minutes to carry out.
    ///
    /// # Errors
    /// The daemon's own, or that none answers.
    pub async fn post_file<T: DeserializeOwned>(&self, path: &str, file: Vec<u8>) -> Result<T, Problem> {
        if file.len() > MAX_FILE {
            return Err(too_large(format!("the file has {} bytes", file.len()), MAX_FILE));
        }
        self.within(PATIENCE_WITH_FILES, Method::POST, path, file).await
    }

    async fn send<T: DeserializeOwned>(&self, method: Method, path: &str, body: Vec<u8>) -> Result<T, Problem> {
        // The daemon would say so too, but not wait until all of it is written.
        if body.len() > MAX_BODY {
            return Err(too_large(format!("the request has {} bytes", body.len()), MAX_BODY));
        }
        self.within(PATIENCE, method, path, body).await
    }

    async fn within<T: DeserializeOwned>(
        &self,
        patience: Duration,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<T, Problem> {
        match timeout(patience, self.exchange(method, path, body)).await {
            Ok(answer) => answer,
            Err(_) => Err(self.silent(patience)),
        }
    }

    /// Asks until there is a whole answer. What was refused before anything was done is asked again; and so is what was sent and not
    /// answered, by the id of the first time, so that it is not done twice.
    async fn exchange<T: DeserializeOwned>(&self, method: Method, path: &str, body: Vec<u8>) -> Result<T, Problem> {
        let (request, mut pauses, mut lost) = (Request::new(method, path, body), Pauses(PAUSE), None::<Instant>);
        loop {
            let asked = match self.ask_once(&request, lost.is_some()).await {
                Ok(body) => body.collect().await.map_err(|error| Failure::Lost(self.broken(&error))),
                Err(failure) => Err(failure),
            };
            let problem = match asked {
                Ok(body) => return serde_json::from_slice(&body.to_bytes()).map_err(|error| self.broken(&error)),
                Err(Failure::Problem(problem)) => return Err(problem),
                Err(Failure::Refused(problem)) => problem,
                Err(Failure::Lost(problem)) => {
                    lost.get_or_insert_with(Instant::now);
                    problem
                }
            };
            match lost {
                // The daemon has ended, or does not answer.
                Some(since) if since.elapsed() > LOST_TIME => return Err(request.unknown(problem)),
                None if problem.kind != ProblemKind::Stopping => return Err(problem),
                _ => pauses.next().await,
            }
        }
    }

    /// Hears an answer that comes line by line, each of them JSON, until `hear` says that it is enough or the daemon ends.
    ///
    /// # Errors
    /// The daemon's own, that of `hear`, or that no daemon answers.
    pub async fn hear<T: DeserializeOwned>(
        &self,
        path: &str,
        mut hear: impl FnMut(T) -> Result<ControlFlow<()>, Problem>,
    ) -> Result<(), Problem> {
        let asked = timeout(PATIENCE, self.ask(path)).await;
        let mut body = asked.map_err(|_| self.silent(PATIENCE))??;
        let mut rest = Vec::new();
        // A daemon that ends does so in the middle of its answer.
        while let Some(Ok(frame)) = body.frame().await {
            rest.extend_from_slice(frame.data_ref().map_or(&[], |data| data));
            let end = rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            let lines: Vec<u8> = rest.drain(..end).collect();
            for line in lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
                let line = serde_json::from_slice(line).map_err(|error| self.broken(&error))?;
                if hear(line)?.is_break() {
                    return Ok(());
                }
            }
        }
        Err(Problem::new(ProblemKind::NoDaemon, format!("anyportd at {} has ended", self.socket.display()))
            .hint("after a restart or an upgrade, ask the one that followed"))
    }

    /// Asks for something that is answered line by line, and gives the body of a good answer. What was refused before anything was done
    /// is asked again.
    async fn ask(&self, path: &str) -> Result<Incoming, Problem> {
        let (request, mut pauses) = (Request::new(Method::GET, path, Vec::new()), Pauses(PAUSE));
        loop {
            match self.ask_once(&request, false).await {
                Ok(body) => return Ok(body),
                Err(Failure::Refused(problem)) if problem.kind == ProblemKind::Stopping => pauses.next().await,
                Err(Failure::Problem(problem) | Failure::Refused(problem) | Failure::Lost(problem)) => {
                    return Err(problem);
                }
            }
        }
    }

    /// Asks once; again, if an answer was lost before.
    async fn ask_once(&self, request: &Request, is_again: bool) -> Result<Incoming, Failure> {
        let stream = connect(&self.socket).await.map_err(|error| Failure::Refused(self.unreachable(&error)))?;
        let refused = |error: &hyper::Error| Problem { kind: ProblemKind::Stopping, ..self.broken(error) };
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| Failure::Refused(refused(&error)))?;
        tokio::spawn(connection);
        let request = request.to_http(is_again).map_err(|error| Failure::Problem(self.broken(&error)))?;
        let response = match sender.send_request(request).await {
            // It was never sent: the daemon had closed the connection.
            Err(error) if error.is_canceled() => return Err(Failure::Refused(refused(&error))),
            response => response.map_err(|error| Failure::Lost(self.broken(&error)))?,
        };
        let status = response.status();
        if status.is_success() {
            return Ok(response.into_body());
        }
        let kind = ProblemKind::from_http_status(status.as_u16());
        let body = match response.into_body().collect().await {
            Ok(body) => body.to_bytes(),
            // Nothing was done, whatever more there was to say.
            Err(error) if kind == ProblemKind::Stopping => return Err(Failure::Refused(refused(&error))),
            Err(error) => return Err(Failure::Lost(self.broken(&error))),
        };
        let problem = match serde_json::from_slice::<Problem>(&body) {
            Ok(problem) => Problem { kind, ..problem },
            Err(_) => Problem::new(kind, format!("anyportd answered {status}: {}", String::from_utf8_lossy(&body))),
        };
        Err(if kind == ProblemKind::Stopping { Failure::Refused(problem) } else { Failure::Problem(problem) })
    }

    fn broken(&self, error: &dyn std::error::Error) -> Problem {
        Problem::new(ProblemKind::NoDaemon, format!("talk to anyportd at {}: {error}", self.socket.display()))
            .hint("anyportd's log may say more")
    }

    fn silent(&self, patience: Duration) -> Problem {
        Problem::new(
            ProblemKind::NoDaemon,
            format!("no answer from {} for {} s", self.socket.display(), patience.as_secs()),
        )
        .hint("it may still carry the command out; anyportd's log says what it is busy with")
    }

    fn unreachable(&self, error: &io::Error) -> Problem {
        let socket = self.socket.display();
        if error.kind() == ErrorKind::PermissionDenied {
            return Problem::new(ProblemKind::NotPermitted, format!("connect to {socket}: {error}"))
                .hint("become root or a member of the group anyport");
        }
        if error.kind() == ErrorKind::WouldBlock {
            // More clients wait to be accepted than the kernel lets wait.
            return Problem::new(ProblemKind::Stopping, format!("connect to {socket}: {error}"))
                .hint("too many clients wait for anyportd at this moment");
        }
        Problem::new(ProblemKind::NoDaemon, format!("no anyportd answers at {socket}: {error}"))
            .hint("start anyportd, or name its socket with --socket")
    }
}

/// Connects, and waits as long as more clients wait to be accepted than the kernel lets wait: in the order in which they came, where
/// those who try again and again go one before the other.
async fn connect(path: &Path) -> io::Result<UnixStream> {
    let address = SockAddr::unix(path)?;
    let connect = move || -> io::Result<Socket> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.set_write_timeout(Some(PATIENCE))?;
        socket.connect(&address)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    };
    let socket = spawn_blocking(connect).await.map_err(io::Error::other)??;
    UnixStream::from_std(OwnedFd::from(socket).into())
}

/// A request, which may be sent several times.
struct Request {
    method: Method,
    path: String,
    body: Bytes,
    /// By which the daemon knows a command that it has seen before.
    id: Option<String>,
    /// When it was sent first, in milliseconds since the host was started.
    first: u64,
}

/// Why there is no answer.
enum Failure {
    /// This is the answer.
    Problem(Problem),
    /// Nothing was done.
    Refused(Problem),
    /// The request was sent, and may have been carried out.
    Lost(Problem),
}

impl Request {
    fn new(method: Method, path: &str, body: Vec<u8>) -> Self {
        let id = (method != Method::GET).then(new_id).flatten();
        Self { method, path: path.to_owned(), body: body.into(), id, first: since_boot() }
    }

    fn to_http(&self, is_again: bool) -> http::Result<http::Request<Full<Bytes>>> {
        let mut request = http::Request::builder()
            .method(&self.method)
            .uri(&self.path)
            .header("host", "anyport")
            .header("content-type", "application/json");
        if let Some(id) = &self.id {
            request = request.header(ID_HEADER, id);
            if is_again {
                request = request.header(FIRST_HEADER, self.first.to_string());
            }
        }
        request.body(Full::new(self.body.clone()))
    }

    /// What to say once it is given up.
    fn unknown(&self, problem: Problem) -> Problem {
        if self.method == Method::GET {
            return problem;
        }
        let error = format!("the answer was lost, and it is not known whether this was done: {}", problem.error);
        Problem { error, ..problem }.hint("anyportctl status, prefixes and services show what is there")
    }
}

/// An id that no other request has. Without random bytes there is none.
fn new_id() -> Option<String> {
    let mut bytes = [0_u8; 16];
    getrandom(bytes.as_mut_slice(), GetRandomFlags::empty()).ok()?;
    Some(format!("{:032x}", u128::from_ne_bytes(bytes)))
}

/// Pauses that become longer.
struct Pauses(Duration);

impl Pauses {
    /// Waits for at least half of a pause, so that those who were refused at the same time do not come back at the same time.
    async fn next(&mut self) {
        let mut byte = [0_u8];
        getrandom(byte.as_mut_slice(), GetRandomFlags::empty()).ok();
        sleep(self.0 / 2 + self.0 * u32::from(byte[0]) / 512).await;
        self.0 = (self.0 * 2).min(LONGEST_PAUSE);
    }
}

fn to_json(body: &impl Serialize) -> Result<Vec<u8>, Problem> {
    serde_json::to_vec(body).map_err(|error| Problem::new(ProblemKind::Failed, format!("write the request: {error}")))
}

#[cfg(test)]
mod tests {
    use axum::{Router, http::StatusCode, routing::post};
    use tokio::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn who_follows_a_daemon_that_stops_is_asked() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let daemon = |answer: &'static str, kind: ProblemKind| {
            std::fs::remove_file(&socket).unwrap_or_default();
            let status = StatusCode::from_u16(kind.http_status()).unwrap();
            let asked = move |body: String| async move {
                assert_eq!(body, "1");
                (status, answer)
            };
            let listener = UnixListener::bind(&socket).unwrap();
            tokio::spawn(async move { axum::serve(listener, Router::new().route("/", post(asked))).await })
        };
        let stopping = daemon(r#"{"error": "it stops", "hint": ""}"#, ProblemKind::Stopping);
        let client = Client::new(socket.clone());
        let answer = tokio::spawn(async move { client.post::<()>("/", &1).await });
        sleep(2 * PAUSE).await;
        assert!(!answer.is_finished());
        stopping.abort();
        let follower = daemon(r#"{"error": "taken", "hint": ""}"#, ProblemKind::Conflict);
        let problem = answer.await.unwrap().unwrap_err();
        assert_eq!((problem.kind, problem.error.as_str()), (ProblemKind::Conflict, "taken"));
        follower.abort();
        let client = Client::new(socket.clone());
        std::fs::remove_file(&socket).unwrap();
        assert_eq!(client.post::<()>("/", &1).await.unwrap_err().kind, ProblemKind::NoDaemon);
    }
}
