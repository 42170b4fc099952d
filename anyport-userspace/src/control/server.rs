//! The server of the control API: its socket, its routes and the permissions of each request.

use std::{
    fs,
    io::{self, ErrorKind},
    mem,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            fs::{FileTypeExt as _, PermissionsExt as _},
            net::{self, UnixStream},
        },
    },
    path::Path,
    pin::pin,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use axum::{
    Extension, Json,
    body::Bytes,
    extract::{
        ConnectInfo, DefaultBodyLimit, FromRequest, Path as UrlPath, Query, Request, State,
        rejection::{BytesRejection, QueryRejection},
    },
    http::{Method, StatusCode, header::CONTENT_TYPE},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream};
use hyper::body::Body as _;
use nix::{
    errno::Errno,
    sys::socket::{Backlog, getsockopt, listen, sockopt::PeerCredentials},
    unistd::{Group, chown},
};
use serde::de::DeserializeOwned;
use tokio::{
    net::UnixListener,
    sync::watch,
    task::spawn_blocking,
    time::{Instant, sleep, timeout},
};
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::{
    Handover,
    audit::{self, Done, Verb},
    budget::{Budget, Leaving},
    clients::{Client, Clients},
    outcomes::{Asked, Outcomes},
    read_limiter::{Pace, ReadLimiter},
    requests,
};
use crate::{
    api::{self, MAX_BODY, MAX_FILE, Peer, Problem, ProblemKind, Readers, TakeOver, Taken, parse, too_large},
    closing,
    engine::{Engine, Listing, Progress, Shared, beside},
    log_limit::LogLimit,
    observe::Observer,
    plain_words::plain,
    privileges::GROUP,
    rules::{InvalidText, ServiceName},
    service::ServiceConfig,
    socket_file::SocketFile,
    sys,
    text::list_of,
};

/// How long the body of a request may take to come.
const BODY_TIME: Duration = Duration::from_secs(30);
/// How long the answer to a reader may take to be read.
const LONGEST_ANSWER: Duration = Duration::from_mins(1);
/// How long a reader's question may wait for a command.
const EXPLAIN_TIME: Duration = Duration::from_secs(2);
/// Clients that wait to be accepted. Others wait longer, in the order in which they came: so one who comes is not behind thousands.
const BACKLOG: i32 = 128;
/// How long to wait where no descriptor is free.
const PAUSE: Duration = Duration::from_millis(100);

/// The control socket, at which clients find the daemon.
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    file: Arc<SocketFile>,
    readers: Option<Readers>,
    /// Whether a service manager made it, which it is left to.
    is_adopted: bool,
}

impl ControlSocket {
    /// Opens it, for root and the group `anyport`; with readers for everybody, since each request is looked at.
    ///
    /// # Errors
    /// Another daemon answers there, or the socket can't be made.
    pub fn bind(path: &Path, readers: Option<&Readers>) -> anyhow::Result<Self> {
        let listener = bind(path, readers)?;
        Ok(Self { listener, file: Arc::new(SocketFile::of(path)), readers: readers.cloned(), is_adopted: false })
    }

    /// Listens at one that a service manager has bound to this path, and which stays when this process ends.
    ///
    /// # Errors
    /// It is bound to another path, or is no such socket.
    pub fn adopt(socket: OwnedFd, path: &Path, readers: Option<&Readers>) -> anyhow::Result<Self> {
        let listener = adopt(socket, path)?;
        Ok(Self { listener, file: Arc::new(SocketFile::of(path)), readers: readers.cloned(), is_adopted: true })
    }

    /// Its file.
    pub fn file(&self) -> Arc<SocketFile> {
        Arc::clone(&self.file)
    }

    /// Whether the file goes when this process ends.
    pub fn is_own(&self) -> bool {
        !self.is_adopted
    }

    /// The next client. Where others have removed the file, it is made again.
    async fn accept(&mut self) -> io::Result<tokio::net::UnixStream> {
        loop {
            let again = self.file.put_back(|path| {
                if self.is_adopted {
                    bail!("its service manager makes it: systemctl restart anyport.socket");
                }
                bind(path, self.readers.as_ref())
            });
            tokio::select! {
                accepted = self.listener.accept() => return accepted.map(|(stream, _)| stream),
                listener = again => self.replace(listener),
            }
        }
    }

    fn replace(&mut self, listener: UnixListener) {
        close(mem::replace(&mut self.listener, listener));
    }
}

/// Who is not accepted yet may have passed something.
fn close(listener: UnixListener) {
    if let Ok(listener) = listener.into_std() {
        closing::close(u32::MAX, vec![listener.into()]);
    }
}

fn bind(path: &Path, readers: Option<&Readers>) -> anyhow::Result<UnixListener> {
    let attempt = || format!("open the control socket {}", path.display());
    match UnixStream::connect(path) {
        Ok(peer) => {
            let pid = getsockopt(&peer, PeerCredentials).map_or(0, |it| it.pid());
            bail!("{}: another anyportd answers there, with pid {pid}; give each its own with --socket", attempt());
        }
        // A daemon that was killed leaves its socket behind. Any other file gives the same error.
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            if !fs::symlink_metadata(path).with_context(attempt)?.file_type().is_socket() {
                bail!("{}: there is a file of that name which is not a socket; it is left alone", attempt());
            }
            fs::remove_file(path).with_context(attempt)?;
        }
        Err(_) => {}
    }
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).with_context(attempt)?;
    }
    let listener = UnixListener::bind(path).with_context(attempt)?;
    prepare(&listener).with_context(attempt)?;
    let mode = if readers.is_some() { 0o666 } else { 0o660 };
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).with_context(attempt)?;
    if let Ok(Some(group)) = Group::from_name(GROUP) {
        match chown(path, None, Some(group.gid)) {
            Err(Errno::EPERM) => {
                warn!("only root gets to the control socket: anyportd runs as no member of the group {GROUP}");
            }
            given => given.with_context(attempt)?,
        }
    }
    Ok(listener)
}

fn prepare(listener: &impl AsFd) -> anyhow::Result<()> {
    sys::refuse_descriptors(listener)?;
    listen(listener, Backlog::new(BACKLOG)?)?;
    Ok(())
}

fn adopt(socket: OwnedFd, path: &Path) -> anyhow::Result<UnixListener> {
    let attempt = || format!("take the control socket {} from the service manager", path.display());
    let listener = net::UnixListener::from(socket);
    let bound = listener.local_addr().with_context(attempt)?;
    if bound.as_pathname() != Some(path) {
        bail!("{}: it is bound to {bound:?}; make ListenStream= of the socket unit and --socket the same", attempt());
    }
    listener.set_nonblocking(true).with_context(attempt)?;
    prepare(&listener).with_context(attempt)?;
    UnixListener::from_std(listener).with_context(attempt)
}

/// The one request that only looks, and yet is not for [`Readers`].
pub(super) const EVENTS: &str = "/v1/events";
/// The one request of readers that asks the engine itself, and waits for it.
pub(super) const EXPLAIN: &str = "/v1/explain";

/// Everybody who can connect can cause this line.
static REFUSED: LogLimit = LogLimit::new();

/// Answers requests until told to stop.
///
/// # Errors
/// The socket fails.
pub async fn serve(
    mut socket: ControlSocket,
    engine: Shared,
    observer: Arc<Observer>,
    handover: Handover,
    stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let access = Access {
        readers: socket.readers.clone(),
        read_limiter: ReadLimiter::new(),
        explain_limiter: ReadLimiter::new(),
        budget: Budget::default(),
    };
    let how_far = engine.lock().await.as_ref().map(Engine::progress).unwrap_or_default();
    let api = requests::router()
        .fallback(no_such_thing)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(Extension(Outcomes::new()))
        .layer(Extension(how_far))
        .layer(Extension(handover))
        .layer(Extension(observer))
        .layer(middleware::from_fn_with_state(access, permit))
        .with_state(engine);
    let connections = TaskTracker::new();
    let clients = Clients::default();
    let mut told = stop.clone();
    // The sender goes only with the daemon itself.
    let mut stopped = pin!(async { drop(told.wait_for(|stop| *stop).await) });
    loop {
        tokio::select! {
            accepted = socket.accept() => match accepted {
                Ok(stream) => clients.serve(stream, &api, &stop, &connections),
                Err(error) => {
                    warn!("accept at the control socket: {error}");
                    sleep(PAUSE).await;
                }
            },
            () = &mut stopped => break,
        }
    }
    close(socket.listener);
    connections.close();
    connections.wait().await;
    Ok(())
}

/// Who may look, and how much and how fast: a command never waits for them.
#[derive(Clone, Debug)]
struct Access {
    readers: Option<Readers>,
    read_limiter: ReadLimiter,
    /// For requests that wait for the engine, so that others do not wait with them.
    explain_limiter: ReadLimiter,
    budget: Budget,
}

async fn permit(
    State(Access { readers, read_limiter, explain_limiter, budget }): State<Access>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Extension(client): Extension<Client>,
    mut request: Request,
    next: Next,
) -> Response {
    let Some(mut busy) = client.busy() else {
        let problem = Problem::new(ProblemKind::Stopping, "too many requests of this user are under way");
        return problem.hint("nothing was done; try again when they are done").into_response();
    };
    let mut taken = None;
    let pace = if peer.is_in_control() {
        Pace(None)
    } else {
        // Readers may not see which client connects where, and few can subscribe at a time.
        let is_open = request.method() == Method::GET && request.uri().path() != EVENTS;
        if !is_open || !readers.is_some_and(|readers| readers.include(&peer)) {
            if let Some(left_out) = REFUSED.next() {
                info!("refused user {} at the control socket{left_out}", peer.uid);
            }
            return Problem::new(ProblemKind::NotPermitted, format!("user {} may not control anyportd", peer.uid))
                .hint(format!("become root or a member of the group {GROUP}"))
                .into_response();
        }
        match budget.begin(peer.uid) {
            Ok(begun) => taken = Some(begun),
            Err(problem) => return problem.into_response(),
        }
        Pace(Some(if request.uri().path() == EXPLAIN { explain_limiter } else { read_limiter }))
    };
    request.extensions_mut().insert(pace);
    let answer = next.run(request).await;
    if let Some(mut taken) = taken {
        let whole = answer.body().size_hint().exact().and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or_default();
        if let Err(problem) = taken.add(whole) {
            return problem.into_response();
        }
        busy.keep(taken);
    }
    answer.map(|body| axum::body::Body::new(Leaving::new(body, busy)))
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.kind.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self)).into_response()
    }
}

type Answer<T> = Result<Json<T>, Problem>;

/// The body of a request, if it came in time.
pub(super) struct Body(Result<Bytes, BytesRejection>);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let read = timeout(BODY_TIME, Bytes::from_request(request, state)).await;
        let late = |_| {
            let error = format!("read the body of the request: it was not there after {} s", BODY_TIME.as_secs());
            Problem::new(ProblemKind::Invalid, error)
        };
        read.map(Self).map_err(late)
    }
}

/// Has the engine carry out a command, to its end even if the client goes away, and record it.
async fn command<T: Done + serde::Serialize + Send + 'static>(
    engine: Shared,
    asked: Asked,
    verb: Verb,
    command: impl for<'a> FnOnce(&'a mut Engine) -> BoxFuture<'a, Result<T, Problem>> + Send + 'static,
) -> Result<Response, Problem> {
    let author = asked.author();
    let carried_out = async move {
        let mut engine = engine.lock().await;
        let engine = engine.as_mut().ok_or_else(Problem::stopping)?;
        let answer = beside(command(engine));
        engine.progress().end();
        let answer = answer?;
        if let Some(what) = verb.what(&answer) {
            engine.record(author, verb.name, what);
        }
        Ok(answer)
    };
    asked.once(carried_out).await
}

/// Reads a request's body.
fn read<T: DeserializeOwned>(body: Body) -> Result<T, Problem> {
    parse(&bytes(body, MAX_BODY)?)
}

fn bytes(body: Body, limit: usize) -> Result<Bytes, Problem> {
    body.0.map_err(|rejection| {
        let error = format!("read the body of the request: {}", rejection.body_text());
        match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => too_large(error, limit),
            _ => Problem::new(ProblemKind::Invalid, error),
        }
    })
}

async fn no_such_thing(request: Request) -> Problem {
    Problem::new(
        ProblemKind::NotFound,
        format!("there is no {} {} in this API", request.method(), request.uri().path()),
    )
    .hint("docs/api.md describes the requests")
}

async fn wrong_method(request: Request) -> Problem {
    let (method, path) = (request.method(), request.uri().path());
    Problem::new(ProblemKind::WrongMethod, format!("{path} does not take the method {method}"))
        .hint("the header Allow of this answer names those that it takes; docs/api.md describes the requests")
}

pub(super) async fn take_over(
    ConnectInfo(peer): ConnectInfo<Peer>,
    Extension(handover): Extension<Handover>,
    asked: Asked,
    body: Body,
) -> Result<Response, Problem> {
    let TakeOver { executable } = read(body)?;
    info!("{} is to take over, asked for by {}", executable.display(), peer.author());
    asked.once::<Taken, _>(async move { handover.request(&peer, &executable).await }).await
}

pub(super) async fn status(State(engine): State<Shared>, Extension(pace): Extension<Pace>) -> Answer<api::StatusView> {
    pace.take(engine.status()).await.map(Json)
}

pub(super) async fn live(
    Extension(observer): Extension<Arc<Observer>>,
    Extension(pace): Extension<Pace>,
) -> Answer<api::LiveView> {
    pace.take(observer.sample()).await.map(|sample| Json(sample.live()))
}

pub(super) async fn prefixes(
    State(engine): State<Shared>,
    Extension(pace): Extension<Pace>,
    query: Result<Query<api::ListPrefixes>, QueryRejection>,
) -> Result<Response, Problem> {
    let Query(query) = query.map_err(|rejection| wrong_query(&rejection))?;
    let kind = [(CONTENT_TYPE, "application/json")];
    let begin = async {
        let mut listing = Listing::new(engine.look().await?, query);
        let first = listing.piece()?.unwrap_or_default();
        Ok::<_, Problem>((listing, first))
    };
    let (listing, first) = pace.take(begin).await?;
    if listing.is_over() {
        return Ok((kind, first).into_response());
    }
    let begun = Instant::now();
    let rest = stream::try_unfold((listing, pace), move |(mut listing, pace)| async move {
        if pace.0.is_some() && begun.elapsed() > LONGEST_ANSWER {
            return Err(Problem::new(ProblemKind::Failed, "the list of rules was read too slowly"));
        }
        let piece = pace.take(async { listing.piece() }).await?;
        Ok(piece.map(|piece| (piece, (listing, pace))))
    });
    let pieces = stream::once(async { Ok::<_, Problem>(first) }).chain(rest);
    Ok((kind, axum::body::Body::from_stream(pieces)).into_response())
}

/// What is wrong with the part of an address that follows its question mark.
fn wrong_query(rejection: &QueryRejection) -> Problem {
    Problem::new(ProblemKind::Invalid, plain(&rejection.body_text())).hint("docs/api.md describes the requests")
}

pub(super) async fn explain(
    State(engine): State<Shared>,
    Extension(pace): Extension<Pace>,
    query: Result<Query<api::Explain>, QueryRejection>,
) -> Answer<api::Explanation> {
    let Query(query) = query.map_err(|rejection| wrong_query(&rejection))?;
    let patience = if pace.0.is_some() { EXPLAIN_TIME } else { Duration::MAX };
    // Dropped with the connection of the client, and so is its place in the row.
    let explain = async {
        let busy = |_| Problem::new(ProblemKind::Failed, "anyportd is busy with a command").hint("try again");
        let engine = timeout(patience, engine.lock()).await.map_err(busy)?;
        engine.as_ref().ok_or_else(Problem::stopping)?.explain(query).await
    };
    pace.take(explain).await.map(Json)
}

pub(super) async fn events(
    State(engine): State<Shared>,
    query: Result<Query<api::Listen>, QueryRejection>,
) -> Result<Response, Problem> {
    let Query(query) = query.map_err(|rejection| wrong_query(&rejection))?;
    super::event_stream::stream(engine, query)
}

pub(super) async fn services(
    State(engine): State<Shared>,
    Extension(pace): Extension<Pace>,
) -> Answer<Vec<api::ServiceView>> {
    pace.take(engine.services()).await.map(Json)
}

pub(super) async fn add_prefixes(State(engine): State<Shared>, asked: Asked, body: Body) -> Result<Response, Problem> {
    let request = read(body)?;
    let verb = Verb::new("add-prefix", audit::rules(&request));
    command(engine, asked, verb, |engine| engine.add_prefixes(request).boxed()).await
}

pub(super) async fn remove_prefixes(
    State(engine): State<Shared>,
    asked: Asked,
    body: Body,
) -> Result<Response, Problem> {
    let request: api::RemovePrefixes = read(body)?;
    let verb = Verb::new("remove-prefix", list_of(&request.prefixes));
    command(engine, asked, verb, |engine| engine.remove_prefixes(request).boxed()).await
}

pub(super) async fn apply(
    State(engine): State<Shared>,
    asked: Asked,
    query: Result<Query<api::Apply>, QueryRejection>,
    body: Body,
) -> Result<Response, Problem> {
    let Query(options) = query.map_err(|rejection| wrong_query(&rejection))?;
    let text = String::from_utf8(bytes(body, MAX_FILE)?.into())
        .map_err(|error| Problem::new(ProblemKind::Invalid, format!("read the file: {error}")))?;
    // What changes nothing need not be remembered, and its answer may be long.
    let asked = if options.dry_run { asked.without_id() } else { asked };
    let verb = Verb::new("apply", "");
    command(engine, asked, verb, move |engine| async move { engine.apply(text, &options).await }.boxed()).await
}

pub(super) async fn reload(
    State(engine): State<Shared>,
    asked: Asked,
    query: Result<Query<api::Reload>, QueryRejection>,
) -> Result<Response, Problem> {
    let Query(options) = query.map_err(|rejection| wrong_query(&rejection))?;
    let asked = if options.dry_run { asked.without_id() } else { asked };
    let verb = Verb::new("reload", "");
    command(engine, asked, verb, move |engine| async move { engine.reload(&options).await }.boxed()).await
}

pub(super) async fn confirm(State(engine): State<Shared>, asked: Asked) -> Result<Response, Problem> {
    command(engine, asked, Verb::new("confirm", "what was applied"), |engine| engine.confirm().boxed()).await
}

pub(super) async fn drains(
    State(engine): State<Shared>,
    Extension(pace): Extension<Pace>,
) -> Answer<Vec<api::DrainView>> {
    let drains = async {
        let snapshot = engine.look().await?;
        // There may be hundreds of thousands of connections.
        let counted = spawn_blocking(move || snapshot.drains()).await;
        counted.unwrap_or_else(|error| Err(Problem::new(ProblemKind::Failed, format!("count connections: {error}"))))
    };
    pace.take(drains).await.map(Json)
}

pub(super) async fn drain(State(engine): State<Shared>, asked: Asked, body: Body) -> Result<Response, Problem> {
    let request: api::DrainRequest = read(body)?;
    let verb = Verb::new("drain", audit::scope(request.service.as_ref(), &request.prefixes));
    command(engine, asked, verb, |engine| engine.drain(request).boxed()).await
}

pub(super) async fn undrain(State(engine): State<Shared>, asked: Asked, body: Body) -> Result<Response, Problem> {
    let request: api::Undrain = read(body)?;
    let verb = Verb::new("undrain", audit::scope(request.service.as_ref(), &request.prefixes));
    command(engine, asked, verb, |engine| engine.undrain(request).boxed()).await
}

/// Answered without the engine, which is busy.
pub(super) async fn progress(Extension(progress): Extension<Arc<Progress>>) -> Json<api::ProgressView> {
    Json(progress.view())
}

pub(super) async fn add_service(State(engine): State<Shared>, asked: Asked, body: Body) -> Result<Response, Problem> {
    let request: ServiceConfig = read(body)?;
    let verb = Verb::new("add-service", format!("{} with the handler {}", request.name, request.handler));
    command(engine, asked, verb, |engine| engine.add_service(request).boxed()).await
}

pub(super) async fn remove_service(
    State(engine): State<Shared>,
    asked: Asked,
    UrlPath(name): UrlPath<String>,
) -> Result<Response, Problem> {
    let name: ServiceName =
        name.parse().map_err(|error: InvalidText| Problem::new(ProblemKind::Invalid, error.to_string()))?;
    let verb = Verb::new("remove-service", name.as_str());
    command(engine, asked, verb, |engine| engine.remove_service(name).boxed()).await
}
