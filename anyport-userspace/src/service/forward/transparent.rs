//! Whether what upstreams answer to a client's address comes back here.
//!
//! With `transparent-source` an upstream answers to the client's own address. Its packets have to be routed to this
//! host, and on this host to itself. What is missing here can be seen, and is reported once a connection got no answer.

use std::{net::IpAddr, sync::Mutex};

use crate::{routes, service::lock};

/// A doubt about the way back, and what came of it.
#[derive(Debug, Default)]
pub(super) struct Returns(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// An upstream that did not answer a client.
    doubted: Option<(IpAddr, IpAddr)>,
    complaint: Option<String>,
}

impl Returns {
    /// Has it looked into why this upstream did not answer this client.
    pub(super) fn doubt(&self, upstream: IpAddr, client: IpAddr) {
        lock(&self.0).doubted = Some((upstream, client));
    }

    /// Looks into a doubt, again and again as long as it is justified.
    pub(super) async fn look(&self, service: &str) {
        let Some((upstream, client)) = lock(&self.0).doubted else { return };
        let complaint = match routes::way_back(upstream, client).await {
            Ok(Some(device)) => Some(advice(upstream, client, &device)),
            Ok(None) => None,
            Err(error) => Some(format!("look up the way back from {upstream} to {client}: {error:#}")),
        };
        let mut state = lock(&self.0);
        if let Some(complaint) = &complaint
            && state.complaint.is_none()
        {
            tracing::warn!("service {service}: {complaint}");
        }
        if complaint.is_none() {
            state.doubted = None;
        }
        state.complaint = complaint;
    }

    /// What is wrong with it.
    pub(super) fn complaint(&self) -> Option<String> {
        lock(&self.0).complaint.clone()
    }
}

fn advice(upstream: IpAddr, client: IpAddr, device: &str) -> String {
    let (v6, all) = if client.is_ipv4() { ("", "0.0.0.0/0") } else { ("-6 ", "::/0") };
    format!(
        "transparent-source: the upstream {upstream} answers to {client}, and this host would send that on instead of \
         taking it; run: ip {v6}rule add from {upstream} iif {device} lookup 165; \
         ip {v6}route add local {all} dev lo table 165"
    )
}
