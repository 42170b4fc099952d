//! The client of the control API: one method a request, over the Unix socket of a daemon.

use std::{
    io::ErrorKind,
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Duration,
};

use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request,
    body::{Bytes, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    net::UnixStream,
    time::{sleep, timeout},
};

use super::{
    Problem, ProblemKind,
    types::{MAX_BODY, MAX_FILE, too_large},
};

/// Longer than any request takes, tproxy with a busy iptables lock included.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longer than a million rules take, routes included.
const PATIENCE_WITH_FILES: Duration = Duration::from_mins(10);
/// Until a daemon that stops has given up its socket.
const PAUSE: Duration = Duration::from_millis(20);

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

    async fn exchange<T: DeserializeOwned>(&self, method: Method, path: &str, body: Vec<u8>) -> Result<T, Problem> {
        let body = self.ask(method, path, body).await?;
        let body = body.collect().await.map_err(|error| self.broken(&error))?.to_bytes();
        serde_json::from_slice(&body).map_err(|error| self.broken(&error))
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
        let asked = timeout(PATIENCE, self.ask(Method::GET, path, Vec::new())).await;
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

    /// Asks for something, and gives the body of a good answer. A daemon that stops has not carried anything out, so that the
    /// one that follows is asked the same.
    async fn ask(&self, method: Method, path: &str, body: Vec<u8>) -> Result<Incoming, Problem> {
        let body = Bytes::from(body);
        loop {
            match self.ask_once(&method, path, body.clone()).await {
                Err(problem) if problem.kind == ProblemKind::Stopping => sleep(PAUSE).await,
                answer => return answer,
            }
        }
    }

    async fn ask_once(&self, method: &Method, path: &str, body: Bytes) -> Result<Incoming, Problem> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| self.unreachable(&error))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| self.broken(&e))?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "anyport")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|error| self.broken(&error))?;
        let response = match sender.send_request(request).await {
            // It was never sent: the daemon had closed the connection.
            Err(error) if error.is_canceled() => {
                return Err(Problem { kind: ProblemKind::Stopping, ..self.broken(&error) });
            }
            response => response.map_err(|error| self.broken(&error))?,
        };
        let status = response.status();
        if status.is_success() {
            return Ok(response.into_body());
        }
        let body = response.into_body().collect().await.map_err(|error| self.broken(&error))?.to_bytes();
        let kind = ProblemKind::from_http_status(status.as_u16());
        Err(match serde_json::from_slice::<Problem>(&body) {
            Ok(problem) => Problem { kind, ..problem },
            Err(_) => Problem::new(kind, format!("anyportd answered {status}: {}", String::from_utf8_lossy(&body))),
        })
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

    fn unreachable(&self, error: &std::io::Error) -> Problem {
        let socket = self.socket.display();
        if error.kind() == ErrorKind::PermissionDenied {
            return Problem::new(ProblemKind::NotPermitted, format!("connect to {socket}: {error}"))
                .hint("become root or a member of the group anyport");
        }
        Problem::new(ProblemKind::NoDaemon, format!("no anyportd answers at {socket}: {error}"))
            .hint("start anyportd, or name its socket with --socket")
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
