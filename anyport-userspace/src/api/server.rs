use std::{
    fs,
    io::ErrorKind,
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::Path,
    sync::Arc,
};

use anyhow::{Context as _, bail};
use axum::{
    Json, Router,
    body::Bytes,
    extract::{ConnectInfo, DefaultBodyLimit, Path as UrlPath, Request, State, connect_info::Connected},
    http::StatusCode,
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{delete, get},
    serve::IncomingStream,
};
use nix::{
    sys::socket::{getsockopt, sockopt::PeerCredentials},
    unistd::{Group, Uid, chown},
};
use serde::Serialize;
use tokio::{
    net::UnixListener,
    sync::{Mutex, watch},
};
use tracing::{info, warn};

use super::{Kind, Problem, parse};
use crate::{engine::Engine, sys::peer_groups};

/// Members of this group may use the API, as root may.
const GROUP: &str = "anyport";
/// Requests are a few lines of JSON.
const MAX_BODY: usize = 1 << 20;

type Shared = Arc<Mutex<Engine>>;

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
        // A daemon that was killed leaves its socket behind.
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
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
pub async fn serve(listener: UnixListener, engine: Shared, mut stop: watch::Receiver<bool>) -> anyhow::Result<()> {
    let api = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/prefixes", get(prefixes).post(add_prefixes).delete(remove_prefixes))
        .route("/v1/services", get(services).post(add_service))
        .route("/v1/services/{name}", delete(remove_service))
        .fallback(no_such_thing)
        .method_not_allowed_fallback(no_such_thing)
        .layer(DefaultBodyLimit::max(MAX_BODY))
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

/// Who is at the other end, as the kernel says.
#[derive(Clone, Debug)]
struct Peer {
    uid: Uid,
    groups: Vec<u32>,
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        let peer = stream.io().peer_cred();
        match peer.and_then(|peer| Ok((peer, peer_groups(stream.io())?))) {
            Ok((peer, mut groups)) => {
                groups.push(peer.gid());
                Self { uid: Uid::from_raw(peer.uid()), groups }
            }
            Err(error) => {
                warn!("ask the kernel who is at the control socket: {error}");
                Self { uid: Uid::from_raw(u32::MAX), groups: Vec::new() }
            }
        }
    }
}

impl Peer {
    fn is_permitted(&self) -> bool {
        let is_member = |group: Group| self.groups.contains(&group.gid.as_raw());
        self.uid.is_root()
            || self.uid == Uid::effective()
            || Group::from_name(GROUP).ok().flatten().is_some_and(is_member)
    }
}

async fn permit(ConnectInfo(peer): ConnectInfo<Peer>, request: Request, next: Next) -> Response {
    if peer.is_permitted() {
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

fn answer<T: Serialize>(result: Result<T, Problem>) -> Answer<T> {
    result.map(Json)
}

async fn no_such_thing(request: Request) -> Problem {
    Problem::new(Kind::NotFound, format!("there is no {} {} in this API", request.method(), request.uri().path()))
        .hint("docs/api.md describes the requests")
}

async fn status(State(engine): State<Shared>) -> Answer<super::StatusView> {
    answer(engine.lock().await.status())
}

async fn prefixes(State(engine): State<Shared>) -> Answer<Vec<super::PrefixView>> {
    answer(engine.lock().await.prefixes())
}

async fn services(State(engine): State<Shared>) -> Json<Vec<super::ServiceView>> {
    Json(engine.lock().await.services())
}

async fn add_prefixes(State(engine): State<Shared>, body: Bytes) -> Answer<super::Changed> {
    let request = parse(&body)?;
    answer(engine.lock().await.add_prefixes(request).await)
}

async fn remove_prefixes(State(engine): State<Shared>, body: Bytes) -> Answer<super::Changed> {
    let request = parse(&body)?;
    answer(engine.lock().await.remove_prefixes(&request).await)
}

async fn add_service(State(engine): State<Shared>, body: Bytes) -> Answer<super::Changed> {
    let request = parse(&body)?;
    answer(engine.lock().await.add_service(request).await)
}

async fn remove_service(State(engine): State<Shared>, UrlPath(name): UrlPath<String>) -> Answer<super::Changed> {
    let name =
        name.parse().map_err(|error: crate::rules::InvalidText| Problem::new(Kind::Invalid, error.to_string()))?;
    answer(engine.lock().await.remove_service(&name).await)
}
