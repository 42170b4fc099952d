//! The server of the control API: its socket, its routes and the permissions of each request.

use std::{
    fs,
    io::ErrorKind,
    os::{
        fd::OwnedFd,
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
    Extension, Json, Router,
    body::Bytes,
    extract::{
        ConnectInfo, DefaultBodyLimit, FromRequest, Path as UrlPath, Query, Request, State,
        rejection::{BytesRejection, QueryRejection},
    },
    http::{Method, StatusCode, header::CONTENT_TYPE},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{delete, get, post},
};
use futures_util::{FutureExt as _, future::BoxFuture};
use nix::{
    errno::Errno,
    sys::socket::{getsockopt, sockopt::PeerCredentials},
    unistd::{Group, chown},
};
use serde::de::DeserializeOwned;
use tokio::{
    net::UnixListener,
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::{
    Handover,
    clients::{Client, Clients},
    read_limiter::ReadLimiter,
};
use crate::{
    api::{self, MAX_BODY, MAX_FILE, Peer, Problem, ProblemKind, Readers, TakeOver, Taken, parse, too_large},
    closing,
    engine::{Engine, Progress, Shared},
    log_limit::LogLimit,
    observe::Observer,
    privileges::GROUP,
    rules::{InvalidText, ServiceName},
    sys,
};

/// How long the body of a request may take to come.
const BODY_TIME: Duration = Duration::from_secs(30);
/// How long to wait where no descriptor is free.
const PAUSE: Duration = Duration::from_millis(100);

/// Opens the control socket, for root and the group `anyport`; with readers for everybody, since each request is looked at.
///
/// # Errors
/// Another daemon answers there, or the socket can't be made.
pub fn bind(path: &Path, readers: Option<&Readers>) -> anyhow::Result<UnixListener> {
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
    sys::refuse_descriptors(&listener).with_context(attempt)?;
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

/// Listens at a control socket that a service manager has bound to this path, and which stays when this process ends.
///
/// # Errors
/// It is bound to another path, or is no such socket.
pub fn adopt(socket: OwnedFd, path: &Path) -> anyhow::Result<UnixListener> {
    let attempt = || format!("take the control socket {} from the service manager", path.display());
    let listener = net::UnixListener::from(socket);
    let bound = listener.local_addr().with_context(attempt)?;
    if bound.as_pathname() != Some(path) {
        bail!("{}: it is bound to {bound:?}; make ListenStream= of the socket unit and --socket the same", attempt());
    }
    listener.set_nonblocking(true).with_context(attempt)?;
    sys::refuse_descriptors(&listener).with_context(attempt)?;
    UnixListener::from_std(listener).with_context(attempt)
}

/// The one request that only looks, and yet is not for [`Readers`].
const EVENTS: &str = "/v1/events";

/// Everybody who can connect can cause this line.
static REFUSED: LogLimit = LogLimit::new();

/// Answers requests until told to stop.
///
/// # Errors
/// The socket fails.
pub async fn serve(
    listener: UnixListener,
    engine: Shared,
    observer: Arc<Observer>,
    handover: Handover,
    readers: Option<Readers>,
    stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let access = Access { readers, read_limiter: ReadLimiter::new() };
    let how_far = engine.lock().await.as_ref().map(Engine::progress).unwrap_or_default();
    let api = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/live", get(live))
        .route("/v1/prefixes", get(prefixes).post(add_prefixes).delete(remove_prefixes))
        .route("/v1/apply", post(apply).layer(DefaultBodyLimit::max(MAX_FILE)))
        .route("/v1/confirm", post(confirm))
        .route("/v1/drain", get(drains).post(drain).delete(undrain))
        .route("/v1/reload", post(reload))
        .route("/v1/progress", get(progress))
        .route(EVENTS, get(events))
        .route("/v1/explain", get(explain))
        .route("/v1/takeover", post(take_over))
        .route("/v1/services", get(services).post(add_service))
        .route("/v1/services/{name}", delete(remove_service))
        .fallback(no_such_thing)
        .method_not_allowed_fallback(no_such_thing)
        .layer(DefaultBodyLimit::max(MAX_BODY))
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
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => clients.serve(stream, &api, &stop, &connections),
                Err(error) => {
                    warn!("accept at the control socket: {error}");
                    sleep(PAUSE).await;
                }
            },
            () = &mut stopped => break,
        }
    }
    // Who is not accepted yet may have passed something.
    if let Ok(listener) = listener.into_std() {
        closing::close(u32::MAX, vec![listener.into()]);
    }
    connections.close();
    connections.wait().await;
    Ok(())
}

/// Who may look, and when: a command never waits for many of them.
#[derive(Clone, Debug)]
struct Access {
    readers: Option<Readers>,
    read_limiter: ReadLimiter,
}

async fn permit(
    State(Access { readers, read_limiter }): State<Access>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Extension(client): Extension<Client>,
    request: Request,
    next: Next,
) -> Response {
    let _busy = client.busy();
    if peer.is_in_control() {
        return next.run(request).await;
    }
    // Readers may not see which client connects where, and few can subscribe at a time.
    let is_open = request.method() == Method::GET && request.uri().path() != EVENTS;
    if is_open && readers.is_some_and(|readers| readers.include(&peer)) {
        return read_limiter.take(next.run(request)).await;
    }
    if let Some(left_out) = REFUSED.next() {
        info!("refused user {} at the control socket{left_out}", peer.uid);
    }
    Problem::new(ProblemKind::NotPermitted, format!("user {} may not control anyportd", peer.uid))
        .hint(format!("become root or a member of the group {GROUP}"))
        .into_response()
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.kind.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self)).into_response()
    }
}

type Answer<T> = Result<Json<T>, Problem>;

/// The body of a request, if it came in time.
struct Body(Result<Bytes, BytesRejection>);

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

/// Asks the engine.
async fn ask<T>(engine: &Shared, question: impl FnOnce(&mut Engine) -> Result<T, Problem>) -> Answer<T> {
    question(engine.lock().await.as_mut().ok_or_else(Problem::stopping)?).map(Json)
}

/// Has the engine carry out a command, to its end even if the client goes away: the connection's own task would be
/// dropped in the middle of it.
async fn command<T: Send + 'static>(
    engine: Shared,
    command: impl for<'a> FnOnce(&'a mut Engine) -> BoxFuture<'a, Result<T, Problem>> + Send + 'static,
) -> Answer<T> {
    let task = tokio::spawn(async move {
        match engine.lock().await.as_mut() {
            Some(engine) => command(engine).await,
            None => Err(Problem::stopping()),
        }
    });
    match task.await {
        Ok(result) => result.map(Json),
        Err(error) => Err(Problem::new(ProblemKind::Failed, format!("carry the command out: {error}"))),
    }
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

async fn take_over(
    ConnectInfo(peer): ConnectInfo<Peer>,
    Extension(handover): Extension<Handover>,
    body: Body,
) -> Answer<Taken> {
    let TakeOver { executable } = read(body)?;
    handover.request(&peer, &executable).await.map(Json)
}

async fn status(State(engine): State<Shared>) -> Answer<api::StatusView> {
    ask(&engine, |engine| engine.status()).await
}

async fn live(Extension(observer): Extension<Arc<Observer>>) -> Answer<api::LiveView> {
    observer.sample().await.map(|sample| Json(sample.live()))
}

async fn prefixes(
    State(engine): State<Shared>,
    query: Result<Query<api::ListPrefixes>, QueryRejection>,
) -> Result<Response, Problem> {
    let Query(query) = query.map_err(|rejection| Problem::new(ProblemKind::Invalid, rejection.body_text()))?;
    let Json(json) = ask(&engine, |engine| engine.prefixes(&query)).await?;
    Ok(([(CONTENT_TYPE, "application/json")], json).into_response())
}

async fn explain(
    State(engine): State<Shared>,
    query: Result<Query<api::Explain>, QueryRejection>,
) -> Answer<api::Explanation> {
    let Query(query) = query.map_err(|rejection| Problem::new(ProblemKind::Invalid, rejection.body_text()))?;
    command(engine, move |engine| engine.explain(query).boxed()).await
}

async fn events(
    State(engine): State<Shared>,
    query: Result<Query<api::Listen>, QueryRejection>,
) -> Result<Response, Problem> {
    let Query(query) = query.map_err(|rejection| Problem::new(ProblemKind::Invalid, rejection.body_text()))?;
    super::event_stream::stream(engine, query).await
}

async fn services(State(engine): State<Shared>) -> Answer<Vec<api::ServiceView>> {
    ask(&engine, |engine| engine.services()).await
}

async fn add_prefixes(State(engine): State<Shared>, body: Body) -> Answer<api::Changed> {
    let request = read(body)?;
    command(engine, |engine| engine.add_prefixes(request).boxed()).await
}

async fn remove_prefixes(State(engine): State<Shared>, body: Body) -> Answer<api::Changed> {
    let request = read(body)?;
    command(engine, |engine| engine.remove_prefixes(request).boxed()).await
}

async fn apply(
    State(engine): State<Shared>,
    query: Result<Query<api::Apply>, QueryRejection>,
    body: Body,
) -> Answer<api::Applied> {
    let Query(options) = query.map_err(|rejection| Problem::new(ProblemKind::Invalid, rejection.body_text()))?;
    let text = String::from_utf8(bytes(body, MAX_FILE)?.into())
        .map_err(|error| Problem::new(ProblemKind::Invalid, format!("read the file: {error}")))?;
    command(engine, move |engine| async move { engine.apply(text, &options).await }.boxed()).await
}

async fn reload(
    State(engine): State<Shared>,
    query: Result<Query<api::Reload>, QueryRejection>,
) -> Answer<api::Reloaded> {
    let Query(options) = query.map_err(|rejection| Problem::new(ProblemKind::Invalid, rejection.body_text()))?;
    command(engine, move |engine| async move { engine.reload(&options).await }.boxed()).await
}

async fn confirm(State(engine): State<Shared>) -> Answer<api::Changed> {
    command(engine, |engine| engine.confirm().boxed()).await
}

async fn drains(State(engine): State<Shared>) -> Answer<Vec<api::DrainView>> {
    ask(&engine, |engine| engine.drains()).await
}

async fn drain(State(engine): State<Shared>, body: Body) -> Answer<Vec<api::DrainView>> {
    let request = read(body)?;
    command(engine, |engine| engine.drain(request).boxed()).await
}

async fn undrain(State(engine): State<Shared>, body: Body) -> Answer<api::Changed> {
    let request = read(body)?;
    command(engine, |engine| engine.undrain(request).boxed()).await
}

/// Answered without the engine, which is busy.
async fn progress(Extension(progress): Extension<Arc<Progress>>) -> Json<api::ProgressView> {
    Json(progress.view())
}

async fn add_service(State(engine): State<Shared>, body: Body) -> Answer<api::Changed> {
    let request = read(body)?;
    command(engine, |engine| engine.add_service(request).boxed()).await
}

async fn remove_service(State(engine): State<Shared>, UrlPath(name): UrlPath<String>) -> Answer<api::Changed> {
    let name: ServiceName =
        name.parse().map_err(|error: InvalidText| Problem::new(ProblemKind::Invalid, error.to_string()))?;
    command(engine, |engine| engine.remove_service(name).boxed()).await
}
