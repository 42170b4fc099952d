use std::{
    fs,
    io::ErrorKind,
    os::{
        fd::AsFd as _,
        unix::{
            fs::{FileTypeExt as _, PermissionsExt as _},
            net::UnixStream,
        },
    },
    path::Path,
    sync::Arc,
};

use anyhow::{Context as _, bail};
use axum::{
    Extension, Json, Router,
    body::Bytes,
    extract::{
        ConnectInfo, DefaultBodyLimit, Path as UrlPath, Query, Request, State,
        connect_info::Connected,
        rejection::{BytesRejection, QueryRejection},
    },
    http::{StatusCode, header::CONTENT_TYPE},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{delete, get, post},
    serve::IncomingStream,
};
use futures_util::{FutureExt as _, future::BoxFuture};
use nix::{
    sys::socket::{getsockopt, sockopt::PeerCredentials},
    unistd::{Group, Uid, chown},
};
use serde::de::DeserializeOwned;
use tokio::{
    net::UnixListener,
    sync::{Mutex, watch},
};
use tracing::{info, warn};

use super::{
    Kind, Peer, Problem, Taken, parse,
    peer::GROUP,
    types::{MAX_BODY, MAX_FILE, too_large},
};
use crate::{
    engine::{Engine, Progress},
    keeper::Handover,
    observe::Observer,
    rules::{InvalidText, ServiceName},
};

/// The engine, until the daemon stops.
pub type Shared = Arc<Mutex<Option<Engine>>>;

/// Opens the control socket, for root and the group `anyport`.
///
/// # Errors
/// Another daemon answers there, or the socket can't be made.
pub fn bind(path: &Path) -> anyhow::Result<UnixListener> {
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
    fs::set_permissions(path, fs::Permissions::from_mode(0o660)).with_context(attempt)?;
    if let Ok(Some(group)) = Group::from_name(GROUP) {
        chown(path, None, Some(group.gid)).with_context(attempt)?;
    }
    Ok(listener)
}

/// Answers requests until told to stop.
///
/// # Errors
/// The socket fails.
pub async fn serve(
    listener: UnixListener,
    engine: Shared,
    observer: Arc<Observer>,
    handover: Handover,
    mut stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let how_far = engine.lock().await.as_ref().map(Engine::progress).unwrap_or_default();
    let api = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/live", get(live))
        .route("/v1/prefixes", get(prefixes).post(add_prefixes).delete(remove_prefixes))
        .route("/v1/apply", post(apply).layer(DefaultBodyLimit::max(MAX_FILE)))
        .route("/v1/confirm", post(confirm))
        .route("/v1/reload", post(reload))
        .route("/v1/progress", get(progress))
        .route("/v1/events", get(events))
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
        .layer(middleware::from_fn(permit))
        .with_state(engine)
        .into_make_service_with_connect_info::<Peer>();
    axum::serve(listener, api)
        .with_graceful_shutdown(async move {
            // The sender goes only with the daemon itself.
            stop.wait_for(|stop| *stop).await.ok();
        })
        .await
        .context("serve the control socket")
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self::of(stream.io().as_fd()).unwrap_or_else(|error| {
            warn!("ask the kernel who is at the control socket: {error}");
            Self { pid: 0, uid: Uid::from_raw(u32::MAX), groups: Vec::new() }
        })
    }
}

async fn permit(ConnectInfo(peer): ConnectInfo<Peer>, request: Request, next: Next) -> Response {
    if peer.is_in_control() {
        return next.run(request).await;
    }
    info!("refused user {} at the control socket", peer.uid);
    Problem::new(Kind::NotPermitted, format!("user {} may not control anyportd", peer.uid))
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
type Body = Result<Bytes, BytesRejection>;

/// Asks the engine.
async fn ask<T>(engine: &Shared, question: impl FnOnce(&mut Engine) -> Result<T, Problem>) -> Answer<T> {
    question(engine.lock().await.as_mut().ok_or_else(stopping)?).map(Json)
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
            None => Err(stopping()),
        }
    });
    match task.await {
        Ok(result) => result.map(Json),
        Err(error) => Err(Problem::new(Kind::Failed, format!("carry the command out: {error}"))),
    }
}

pub(crate) fn stopping() -> Problem {
    Problem::new(Kind::Failed, "anyportd is stopping").hint("try again when it runs again")
}

/// Reads a request's body.
fn read<T: DeserializeOwned>(body: Body) -> Result<T, Problem> {
    parse(&bytes(body, MAX_BODY)?)
}

fn bytes(body: Body, limit: usize) -> Result<Bytes, Problem> {
    body.map_err(|rejection| {
        let error = format!("read the body of the request: {}", rejection.body_text());
        match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => too_large(error, limit),
            _ => Problem::new(Kind::Invalid, error),
        }
    })
}

async fn no_such_thing(request: Request) -> Problem {
    Problem::new(Kind::NotFound, format!("there is no {} {} in this API", request.method(), request.uri().path()))
        .hint("docs/api.md describes the requests")
}

async fn take_over(ConnectInfo(peer): ConnectInfo<Peer>, Extension(handover): Extension<Handover>) -> Answer<Taken> {
    handover.request(&peer).await.map(Json)
}

async fn status(State(engine): State<Shared>) -> Answer<super::StatusView> {
    ask(&engine, |engine| engine.status()).await
}

async fn live(Extension(observer): Extension<Arc<Observer>>) -> Answer<super::LiveView> {
    observer.sample().await.map(|sample| Json(sample.live()))
}

async fn prefixes(
    State(engine): State<Shared>,
    query: Result<Query<super::ListPrefixes>, QueryRejection>,
) -> Result<Response, Problem> {
    let Query(query) = query.map_err(|rejection| Problem::new(Kind::Invalid, rejection.body_text()))?;
    let Json(json) = ask(&engine, |engine| engine.prefixes(&query)).await?;
    Ok(([(CONTENT_TYPE, "application/json")], json).into_response())
}

async fn explain(
    State(engine): State<Shared>,
    query: Result<Query<super::Explain>, QueryRejection>,
) -> Answer<super::Explanation> {
    let Query(query) = query.map_err(|rejection| Problem::new(Kind::Invalid, rejection.body_text()))?;
    command(engine, move |engine| engine.explain(query).boxed()).await
}

async fn events(
    State(engine): State<Shared>,
    query: Result<Query<super::Listen>, QueryRejection>,
) -> Result<Response, Problem> {
    let Query(query) = query.map_err(|rejection| Problem::new(Kind::Invalid, rejection.body_text()))?;
    super::events::tell(engine, query).await
}

async fn services(State(engine): State<Shared>) -> Answer<Vec<super::ServiceView>> {
    ask(&engine, |engine| engine.services()).await
}

async fn add_prefixes(State(engine): State<Shared>, body: Body) -> Answer<super::Changed> {
    let request = read(body)?;
    command(engine, |engine| engine.add_prefixes(request).boxed()).await
}

async fn remove_prefixes(State(engine): State<Shared>, body: Body) -> Answer<super::Changed> {
    let request = read(body)?;
    command(engine, |engine| engine.remove_prefixes(request).boxed()).await
}

async fn apply(
    State(engine): State<Shared>,
    query: Result<Query<super::Apply>, QueryRejection>,
    body: Body,
) -> Answer<super::Applied> {
    let Query(options) = query.map_err(|rejection| Problem::new(Kind::Invalid, rejection.body_text()))?;
    let text = String::from_utf8(bytes(body, MAX_FILE)?.into())
        .map_err(|error| Problem::new(Kind::Invalid, format!("read the file: {error}")))?;
    command(engine, move |engine| async move { engine.apply(text, &options).await }.boxed()).await
}

async fn reload(
    State(engine): State<Shared>,
    query: Result<Query<super::Reload>, QueryRejection>,
) -> Answer<super::Reloaded> {
    let Query(options) = query.map_err(|rejection| Problem::new(Kind::Invalid, rejection.body_text()))?;
    command(engine, move |engine| async move { engine.reload(&options).await }.boxed()).await
}

async fn confirm(State(engine): State<Shared>) -> Answer<super::Changed> {
    command(engine, |engine| engine.confirm().boxed()).await
}

/// Answered without the engine, which is busy.
async fn progress(Extension(progress): Extension<Arc<Progress>>) -> Json<super::ProgressView> {
    Json(progress.view())
}

async fn add_service(State(engine): State<Shared>, body: Body) -> Answer<super::Changed> {
    let request = read(body)?;
    command(engine, |engine| engine.add_service(request).boxed()).await
}

async fn remove_service(State(engine): State<Shared>, UrlPath(name): UrlPath<String>) -> Answer<super::Changed> {
    let name: ServiceName =
        name.parse().map_err(|error: InvalidText| Problem::new(Kind::Invalid, error.to_string()))?;
    command(engine, |engine| engine.remove_service(name).boxed()).await
}
