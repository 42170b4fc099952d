//! Calls of etcd's gRPC API over one channel to all members: with TLS, the token of a user, and a leader that is required.

use std::{
    error::Error as StdError,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::http::uri::PathAndQuery;
use futures_util::{Stream, StreamExt as _, stream};
use prost::Message;
use tokio::sync::mpsc;
use tonic::{
    Code, Request, Response, Status, Streaming,
    client::Grpc,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, ClientTlsConfig, Endpoint},
};
use tonic_prost::ProstCodec;

use super::messages::{
    AuthenticateRequest, AuthenticateResponse, DeleteRangeRequest, DeleteRangeResponse, LeaseGrantRequest,
    LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse, PutRequest, PutResponse, RangeRequest,
    RangeResponse, TxnRequest, TxnResponse, WatchRequest, WatchResponse,
};

/// How long to wait for a connection before another member is tried.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a connection with streams is tried out. etcd refuses clients that do so every 5 seconds or more often, or while
/// nothing is asked (`--grpc-keepalive-min-time`).
const KEEP_ALIVE: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// Reports of 50,000 nodes. The default is 4 MiB.
const LARGEST_ANSWER: usize = 64 << 20;

/// Why a call has no answer.
#[derive(Debug)]
pub(crate) enum Error {
    /// No member can be reached, or a connection can't be prepared.
    Transport(tonic::transport::Error),
    /// A member refused, or the connection broke during the request.
    Status(Box<Status>),
    /// What was asked for has ended or did not come in time.
    Ended(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Transport(error) => error.fmt(f),
            Self::Status(status) => f.write_str(status.message()),
            Self::Ended(what) => f.write_str(what),
        }
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Self::Transport(error) => error.source(),
            Self::Status(status) => status.source(),
            Self::Ended(_) => None,
        }
    }
}

impl From<tonic::transport::Error> for Error {
    fn from(error: tonic::transport::Error) -> Self {
        Self::Transport(error)
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        Self::Status(Box::new(status))
    }
}

/// What a connection takes besides the URLs.
#[derive(Clone, Default)]
pub(crate) struct Options {
    /// Certificates, where the URLs have `https`.
    pub(crate) tls: Option<ClientTlsConfig>,
    /// Name and password of a user.
    pub(crate) user: Option<(String, String)>,
}

/// A channel that spreads calls over the members which answer. Clones share it.
#[derive(Clone)]
pub(crate) struct Client {
    channel: Channel,
    user: Option<Arc<User>>,
}

/// A user with the token that etcd gave for the password. Tokens end: after a while, and when etcd restarts.
struct User {
    login: AuthenticateRequest,
    token: Mutex<Option<MetadataValue<Ascii>>>,
    /// Locked while a token is fetched, so that calls which find it ended at once fetch one and not one each.
    fetching: tokio::sync::Mutex<()>,
}

impl Client {
    /// Prepares a channel, which connects when it is used, and lets the user in if there is one.
    pub(crate) async fn connect(urls: &[String], options: &Options) -> Result<Self, Error> {
        let endpoints = urls.iter().map(|url| endpoint(url, options.tls.as_ref())).collect::<Result<Vec<_>, _>>()?;
        let user = options.user.as_ref().map(|(name, password)| {
            let login = AuthenticateRequest { name: name.clone(), password: password.clone() };
            Arc::new(User { login, token: Mutex::default(), fetching: tokio::sync::Mutex::default() })
        });
        let client = Self { channel: Channel::balance_list(endpoints.into_iter()), user };
        if let Some(user) = &client.user {
            client.fetch_token(user, None).await?;
        }
        Ok(client)
    }

    pub(crate) async fn range(&self, request: RangeRequest) -> Result<RangeResponse, Error> {
        self.unary("/etcdserverpb.KV/Range", request).await
    }

    pub(crate) async fn put(&self, request: PutRequest) -> Result<PutResponse, Error> {
        self.unary("/etcdserverpb.KV/Put", request).await
    }

    pub(crate) async fn delete(&self, request: DeleteRangeRequest) -> Result<DeleteRangeResponse, Error> {
        self.unary("/etcdserverpb.KV/DeleteRange", request).await
    }

    pub(crate) async fn txn(&self, request: TxnRequest) -> Result<TxnResponse, Error> {
        self.unary("/etcdserverpb.KV/Txn", request).await
    }

    pub(crate) async fn grant_lease(&self, request: LeaseGrantRequest) -> Result<LeaseGrantResponse, Error> {
        self.unary("/etcdserverpb.Lease/LeaseGrant", request).await
    }

    /// Watches until the stream is dropped.
    pub(crate) async fn watch(&self, request: WatchRequest) -> Result<Streaming<WatchResponse>, Error> {
        let requests = || stream::iter([request.clone()]).chain(stream::pending());
        self.with_token(|token| self.stream("/etcdserverpb.Watch/Watch", requests(), token)).await
    }

    /// A stream that extends a lease: once at its beginning, since etcd begins to answer only then, and at each request that
    /// is sent to the first. The second has an answer to each.
    pub(crate) async fn keep_lease(
        &self,
        first: LeaseKeepAliveRequest,
    ) -> Result<(LeaseKeeper, Streaming<LeaseKeepAliveResponse>), Error> {
        self.with_token(|token| async move {
            let (keeper, requests) = mpsc::channel(1);
            let later =
                stream::unfold(requests, |mut requests| async move { Some((requests.recv().await?, requests)) });
            let requests = stream::iter([first]).chain(later);
            let answers = self.stream("/etcdserverpb.Lease/LeaseKeepAlive", requests, token).await?;
            Ok((keeper, answers))
        })
        .await
    }

    async fn unary<Q, A>(&self, path: &'static str, request: Q) -> Result<A, Error>
    where
        Q: Message + Clone + 'static,
        A: Message + Default + 'static,
    {
        self.with_token(|token| self.call(path, request.clone(), token)).await
    }

    /// Makes a call with the user's token, and once more with a new one if that has ended.
    async fn with_token<T, F: Future<Output = Result<T, Error>>>(
        &self,
        call: impl Fn(Option<MetadataValue<Ascii>>) -> F,
    ) -> Result<T, Error> {
        let Some(user) = &self.user else { return call(None).await };
        let token = user.token();
        match call(token.clone()).await {
            Err(Error::Status(status)) if has_ended(&status) => {
                self.fetch_token(user, token).await?;
                call(user.token()).await
            }
            answer => answer,
        }
    }

    /// Fetches a token unless there is another one than the one that has ended.
    async fn fetch_token(&self, user: &User, ended: Option<MetadataValue<Ascii>>) -> Result<(), Error> {
        let _fetching = user.fetching.lock().await;
        if user.token() != ended {
            return Ok(());
        }
        let answer: AuthenticateResponse =
            self.call("/etcdserverpb.Auth/Authenticate", user.login.clone(), None).await?;
        let token = answer.token.parse().map_err(|_| Error::Ended("etcd gave a token that can't be sent".into()))?;
        *user.token.lock().unwrap_or_else(PoisonError::into_inner) = Some(token);
        Ok(())
    }

    async fn call<Q, A>(&self, path: &'static str, request: Q, token: Option<MetadataValue<Ascii>>) -> Result<A, Error>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let mut grpc = self.grpc().await?;
        let answer = grpc.unary(with_metadata(request, token), at(path), ProstCodec::default()).await;
        Ok(answer.map(Response::into_inner)?)
    }

    async fn stream<Q, A>(
        &self,
        path: &'static str,
        requests: impl Stream<Item = Q> + Send + 'static,
        token: Option<MetadataValue<Ascii>>,
    ) -> Result<Streaming<A>, Error>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let mut grpc = self.grpc().await?;
        let answer = grpc.streaming(with_metadata(requests, token), at(path), ProstCodec::default()).await;
        Ok(answer.map(Response::into_inner)?)
    }

    async fn grpc(&self) -> Result<Grpc<Channel>, Error> {
        let mut grpc = Grpc::new(self.channel.clone()).max_decoding_message_size(LARGEST_ANSWER);
        grpc.ready().await?;
        Ok(grpc)
    }
}

/// To where requests for extending leases go.
pub(crate) type LeaseKeeper = mpsc::Sender<LeaseKeepAliveRequest>;

impl User {
    fn token(&self) -> Option<MetadataValue<Ascii>> {
        self.token.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Whether the token that came with a call is none any more: it has ended, or users or roles have changed since.
fn has_ended(status: &Status) -> bool {
    status.code() == Code::Unauthenticated
        || status.code() == Code::InvalidArgument && status.message().contains("revision of auth store is old")
}

fn endpoint(url: &str, tls: Option<&ClientTlsConfig>) -> Result<Endpoint, Error> {
    let endpoint = Endpoint::from_shared(url.to_owned())?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(false);
    Ok(match tls {
        Some(tls) => endpoint.tls_config(tls.clone())?,
        None => endpoint,
    })
}

fn with_metadata<T>(message: T, token: Option<MetadataValue<Ascii>>) -> Request<T> {
    let mut request = Request::new(message);
    // A member that is parted from the leader says so, and another one is asked.
    request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
    if let Some(token) = token {
        request.metadata_mut().insert("token", token);
    }
    request
}

fn at(path: &'static str) -> PathAndQuery {
    PathAndQuery::from_static(path)
}
