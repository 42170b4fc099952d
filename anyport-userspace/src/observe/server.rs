//! Metrics, health and the page over HTTP, read-only.

use std::{
    convert::Infallible,
    net::{IpAddr, SocketAddr, TcpListener as StdListener},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use anyhow::Context as _;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode, Uri,
    body::{Bytes, Incoming},
    header::{
        ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, HeaderName, HeaderValue, REFERRER_POLICY,
        X_CONTENT_TYPE_OPTIONS,
    },
    http::uri::Authority,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Builder,
    sync::watch,
    time::{sleep, timeout},
};
use tracing::{debug, info, warn};

use super::{
    connections::{Admitted, Connections},
    history, metrics, page,
    sample::{Observer, Sample, host_name},
};
use crate::{api::Problem, complaint::Complaint, privileges, write_timeout::WriteTimeout};

/// Bytes of a request's head; hyper takes no lower limit.
const MAX_HEAD: usize = 8 << 10;
/// How long a client may take to ask.
const ASKING: Duration = Duration::from_secs(5);
/// How long a connection may last. One request is all that is answered on it.
const LONGEST: Duration = Duration::from_secs(15);
/// How long to wait where no descriptor is free, and before another attempt to listen.
const PAUSE: Duration = Duration::from_secs(1);

const UNKNOWN_HOST: &str =
    "this is served at an address of loopback: ask by that address, localhost or this host's name\n";
const TEXT: &str = "text/plain; charset=utf-8";
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";
const JSON: &str = "application/json";
const HTML: &str = "text/html; charset=utf-8";

/// Serves until it is dropped; then nobody listens there any more.
#[derive(Debug)]
pub struct Server {
    /// Closed when the thread is to end.
    stop: Option<watch::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    complaint: Complaint,
}

impl Server {
    /// Serves there, as soon as that is possible: steering matters more. For a successor it is not yet, since the
    /// process that it replaces serves there still.
    ///
    /// # Errors
    /// The kernel refuses a thread.
    pub fn start(address: SocketAddr, observer: Arc<Observer>, is_successor: bool) -> anyhow::Result<Self> {
        let complaint = Complaint::default();
        let listener = match listen(address) {
            Err(error) if is_successor => {
                info!("{error:#}; trying again");
                None
            }
            listener => taken_up(listener, &complaint),
        };
        let (stop, mut stopped) = watch::channel(());
        let complaint_of_thread = complaint.clone();
        let work = move || {
            // Made here: where it is dropped, tokio takes no blocking, as there is in async code.
            let runtime = match Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return warn!("metrics are not served at {address}: start a runtime: {error}"),
            };
            runtime.block_on(async {
                tokio::select! {
                    () = serve(listener, address, &complaint_of_thread, Arc::clone(&observer)) => {}
                    () = observer.keep_history() => {}
                    // An error says that the sender is gone, which is what is waited for.
                    _ = stopped.changed() => {}
                }
            });
        };
        let thread = privileges::start_thread("anyport-metrics", privileges::for_others, work);
        Ok(Self { stop: Some(stop), thread: Some(thread.context("start a thread for metrics")?), complaint })
    }

    /// What keeps it from serving, if something does.
    pub fn complaint(&self) -> Complaint {
        self.complaint.clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop = None;
        // A panic has been printed by then.
        self.thread.take().map(JoinHandle::join);
    }
}

fn listen(address: SocketAddr) -> anyhow::Result<StdListener> {
    // It sets SO_REUSEADDR, so that connections of the previous process do not prevent this.
    let listener = StdListener::bind(address)
        .with_context(|| format!("listen at {address} for metrics; --metrics names another address"))?;
    listener.set_nonblocking(true).context("set up the listening socket for metrics")?;
    info!("metrics at http://{}", listener.local_addr().unwrap_or(address));
    Ok(listener)
}

/// What came of an attempt to listen, which is told once.
fn taken_up(attempt: anyhow::Result<StdListener>, complaint: &Complaint) -> Option<StdListener> {
    match attempt {
        Ok(listener) => {
            complaint.clear();
            Some(listener)
        }
        Err(error) => {
            let what = format!("the metrics are not served, which is tried again each second: {error:#}");
            if complaint.raise(what.clone()) {
                warn!("{what}");
            }
            None
        }
    }
}

async fn serve(mut listener: Option<StdListener>, address: SocketAddr, complaint: &Complaint, observer: Arc<Observer>) {
    let listener = loop {
        match listener.map(TcpListener::from_std) {
            Some(Ok(listener)) => break listener,
            Some(Err(error)) => return warn!("serve metrics: {error}"),
            None => sleep(PAUSE).await,
        }
        listener = taken_up(listen(address), complaint);
    };
    let connections = Connections::default();
    let is_loopback = listener.local_addr().is_ok_and(|it| it.ip().to_canonical().is_loopback());
    loop {
        match listener.accept().await {
            Ok((stream, client)) => {
                let (observer, admitted) = (Arc::clone(&observer), Arc::new(connections.admit()));
                tokio::spawn(async move {
                    let conversation = converse(stream, observer, Arc::clone(&admitted), is_loopback);
                    tokio::select! {
                        ended = timeout(LONGEST, conversation) => match ended {
                            Ok(Ok(())) => {}
                            Ok(Err(error)) => debug!("metrics: {client}: {error}"),
                            Err(_) => debug!("metrics: {client} took longer than {LONGEST:?}"),
                        },
                        () = admitted.closed() => debug!("metrics: {client} made room for another one"),
                    }
                });
            }
            Err(error) => {
                debug!("metrics: accept: {error}");
                sleep(PAUSE).await;
            }
        }
    }
}

/// One request and its answer.
async fn converse(
    stream: TcpStream,
    observer: Arc<Observer>,
    admitted: Arc<Admitted>,
    is_loopback: bool,
) -> hyper::Result<()> {
    let answer = service_fn(move |request: Request<Incoming>| {
        admitted.asks();
        let observer = Arc::clone(&observer);
        async move {
            if is_loopback && !is_known(request.headers().get(HOST)) {
                return Ok::<_, Infallible>(plain(StatusCode::MISDIRECTED_REQUEST, UNKNOWN_HOST.into()));
            }
            Ok(answer(request.method(), request.uri(), &observer).await)
        }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(ASKING)
        .max_buf_size(MAX_HEAD)
        .keep_alive(false)
        .serve_connection(TokioIo::new(WriteTimeout::new(stream)), answer)
        .await
}

/// Whether a request's `Host` can be that of an address of loopback. A page of another site, which a browser on this host shows, could
/// have its name lead here (DNS rebinding) and read what is served.
fn is_known(host: Option<&HeaderValue>) -> bool {
    let Some(host) = host else { return true };
    let Some(authority) = host.to_str().ok().and_then(|host| host.parse::<Authority>().ok()) else { return false };
    let name = authority.host().trim_end_matches('.');
    let address = name.trim_start_matches('[').trim_end_matches(']');
    let is_local = |name: &str| name.eq_ignore_ascii_case("localhost") || is_name_of_host(name);
    address.parse::<IpAddr>().is_ok() || is_local(name)
}

fn is_name_of_host(name: &str) -> bool {
    let own = host_name();
    !own.is_empty() && name.eq_ignore_ascii_case(&own)
}

type Answer = Response<Full<Bytes>>;

async fn answer(method: &Method, target: &Uri, observer: &Arc<Observer>) -> Answer {
    if !matches!(*method, Method::GET | Method::HEAD) {
        let refusal = plain(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n".into());
        return with(refusal, ALLOW, "GET, HEAD");
    }
    let sampled = async |make: fn(&Sample) -> Answer| match observer.sample_by_control().await {
        Ok(sample) => make(&sample),
        Err(problem) => unavailable(&problem),
    };
    match target.path() {
        "/" => page(),
        "/metrics" => sampled(|sample| of(StatusCode::OK, METRICS, sample.text(metrics::text))).await,
        "/live.json" => sampled(live).await,
        "/history.json" => past(target.query().unwrap_or_default(), observer),
        "/healthz" => match observer.alive().await {
            Ok(how) => plain(StatusCode::OK, format!("{how}\n")),
            Err(why) => plain(StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
        },
        "/readyz" => sampled(readiness).await,
        _ => plain(
            StatusCode::NOT_FOUND,
            "there is /, /live.json, /history.json, /metrics, /healthz and /readyz\n".into(),
        ),
    }
}

fn live(sample: &Sample) -> Answer {
    json(serde_json::to_string(&sample.live()))
}

fn past(query: &str, observer: &Observer) -> Answer {
    let query: history::Query = match serde_urlencoded::from_str(query) {
        Ok(query) => query,
        Err(error) => return plain(StatusCode::BAD_REQUEST, format!("read the query: {error}; docs/api.md has it\n")),
    };
    let told = observer.history().json(&query);
    told.map_or_else(|| plain(StatusCode::NOT_FOUND, "nothing is kept of this service\n".into()), json)
}

fn json(text: serde_json::Result<String>) -> Answer {
    match text {
        Ok(json) => of(StatusCode::OK, JSON, json),
        Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("write the answer as JSON: {error}\n")),
    }
}

fn readiness(sample: &Sample) -> Answer {
    match &sample.observed.unready {
        Some(why) => plain(StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
        None => plain(StatusCode::OK, "ready\n".into()),
    }
}

fn page() -> Answer {
    match page::fresh() {
        Ok((text, policy)) => with(of(StatusCode::OK, HTML, text), CONTENT_SECURITY_POLICY, &policy),
        Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("get random bytes: {error}\n")),
    }
}

fn unavailable(problem: &Problem) -> Answer {
    plain(StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", problem.error))
}

fn plain(status: StatusCode, text: String) -> Answer {
    of(status, TEXT, text)
}

fn of(status: StatusCode, kind: &str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    let headers = [
        (CONTENT_TYPE, kind),
        (CACHE_CONTROL, "no-store"),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
    ];
    headers.into_iter().fold(answer, |answer, (name, value)| with(answer, name, value))
}

fn with(mut answer: Answer, name: HeaderName, value: &str) -> Answer {
    // All of these are ASCII.
    if let Ok(value) = HeaderValue::from_str(value) {
        answer.headers_mut().insert(name, value);
    }
    answer
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::is_known;

    #[test]
    fn names_of_other_sites_are_not_answered() {
        for (host, expected) in [
            ("127.0.0.1:9464", true),
            ("[::1]:9464", true),
            ("[::1]", true),
            ("LocalHost:9464", true),
            ("localhost.", true),
            ("site.example:9464", false),
            ("127.0.0.1.site.example", false),
            ("localhost.site.example", false),
            ("", false),
        ] {
            assert_eq!(is_known(Some(&HeaderValue::from_static(host))), expected, "{host}");
        }
        // No browser leaves it out.
        assert!(is_known(None));
    }
}
