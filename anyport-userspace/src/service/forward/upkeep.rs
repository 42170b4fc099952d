//! What is done beside the connections: health checks, and names that are resolved again.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    sync::Arc,
    time::Duration,
};

use futures_util::future::{join, join_all};
use tokio::{
    net::{TcpStream, lookup_host},
    time::{MissedTickBehavior, interval, timeout},
};

use super::{
    Forwarder,
    config::HealthCheck,
    lineage::note_departure,
    upstream::{Upstream, UpstreamState},
};
use crate::service::{event_loop::reset, lock};

/// How often it is looked whether a client's connections lack a way back.
const RETURNS_INTERVAL: Duration = Duration::from_secs(1);

/// Keeps what is known of upstreams up to date, for ever. Not on a worker, so that no connection waits for it.
pub(in crate::service) async fn keep_up(forwarder: Arc<Forwarder>) {
    join(join(check_health(&forwarder), resolve_names(&forwarder)), look_for_returns(&forwarder)).await;
}

async fn look_for_returns(forwarder: &Forwarder) {
    if !forwarder.config.transparent_source {
        return;
    }
    let mut timer = interval(RETURNS_INTERVAL);
    loop {
        timer.tick().await;
        forwarder.returns.look(&forwarder.name).await;
    }
}

async fn check_health(forwarder: &Forwarder) {
    let Some(check) = &forwarder.config.health_check else { return };
    let mut timer = interval(check.interval.0);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        timer.tick().await;
        let upstreams = forwarder.upstreams.load_full();
        join_all(upstreams.iter().map(|upstream| check_one(&forwarder.name, upstream, check))).await;
    }
}

async fn check_one(service: &str, upstream: &Upstream, check: &HealthCheck) {
    let outcome = try_out(upstream, check).await.map_err(|error| format!("health check: {error}"));
    let why = outcome.as_ref().err().cloned().unwrap_or_default();
    let changed = upstream.checked(outcome, check);
    if changed.is_some() {
        // To leave one that is down takes another one that is not, so each matters.
        note_departure();
    }
    match changed {
        Some(UpstreamState::Down) => tracing::warn!("service {service}: the upstream {upstream} is down: {why}"),
        Some(_) => tracing::info!("service {service}: the upstream {upstream} is up again"),
        None => {}
    }
}

async fn try_out(upstream: &Upstream, check: &HealthCheck) -> io::Result<()> {
    // There is a port: settings without one are refused.
    let to = SocketAddr::new(upstream.address, check.port.or(upstream.port).map_or(0, NonZeroU16::get));
    match timeout(check.timeout.0, TcpStream::connect(to)).await {
        Ok(stream) => {
            // Nothing of it lingers on either side.
            reset(&stream?);
            Ok(())
        }
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {}", check.timeout))),
    }
}

/// Each name by itself, so that one that does not resolve holds back no other.
async fn resolve_names(forwarder: &Forwarder) {
    let names: Vec<String> = lock(&forwarder.names).iter().cloned().collect();
    join_all(names.iter().map(|name| resolve_name(forwarder, name))).await;
}

async fn resolve_name(forwarder: &Forwarder, name: &str) {
    let mut timer = interval(forwarder.config.resolve_interval.0);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        timer.tick().await;
        let answer = resolve(name).await;
        take_answer(forwarder, name, answer);
        forwarder.note_resolved();
    }
}

fn take_answer(forwarder: &Forwarder, name: &str, answer: Result<Vec<IpAddr>, String>) {
    if let Err(why) = &answer {
        tracing::warn!("service {}: resolve the name {name}: {why}", forwarder.name);
    }
    let mut names = lock(&forwarder.names);
    if names.answered(name, answer) {
        let upstreams = names.upstreams(&forwarder.config.upstreams, &forwarder.upstreams.load());
        let shown: Vec<String> = upstreams.iter().map(ToString::to_string).collect();
        tracing::info!("service {}: the upstreams are {}", forwarder.name, shown.join(", "));
        forwarder.upstreams.store(Arc::new(upstreams));
        note_departure();
    }
}

/// All addresses of a name.
async fn resolve(name: &str) -> Result<Vec<IpAddr>, String> {
    // The port is none of the resolver's business, but the call wants one.
    let found = lookup_host((name, 0)).await.map_err(|error| error.to_string())?;
    let addresses: Vec<IpAddr> = found.map(|address| address.ip().to_canonical()).collect();
    if addresses.is_empty() { Err("it has no addresses".to_owned()) } else { Ok(addresses) }
}
