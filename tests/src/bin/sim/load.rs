//! What a fleet costs etcd and the nodes.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Context as _, Result};
use anyport_tests::{etcd::Etcd, holdings::cpu_time, netns::Netns};
use nix::unistd::Pid;

/// What was used so far, or between two moments.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    /// Processor time of etcd's members, together.
    pub(crate) etcd: Duration,
    /// Processor time of this process: of all nodes.
    pub(crate) nodes: Duration,
    /// Bytes that etcd's members have sent to clients, and received from them.
    pub(crate) sent: f64,
    pub(crate) received: f64,
    /// Messages of clients to etcd.
    pub(crate) messages: f64,
    /// How often members have waited for their disks.
    pub(crate) syncs: f64,
}

impl Load {
    /// Up to now.
    pub(crate) fn now(namespace: &Netns, etcd: &Etcd) -> Result<Self> {
        let mut load = Self {
            etcd: Duration::ZERO,
            nodes: cpu_time(Pid::this())?,
            sent: 0.0,
            received: 0.0,
            messages: 0.0,
            syncs: 0.0,
        };
        for member in 0..etcd.size() {
            load.etcd += cpu_time(etcd.process(member))?;
            let text = namespace.enter(|| metrics(&etcd.url(member)))?;
            let sum = |name: &str| -> f64 {
                let lines = text
                    .lines()
                    .filter_map(|line| line.strip_prefix(name)?.strip_prefix(['{', ' '])?.rsplit(' ').next());
                lines.filter_map(|value| value.parse::<f64>().ok()).sum()
            };
            load.sent += sum("etcd_network_client_grpc_sent_bytes_total");
            load.received += sum("etcd_network_client_grpc_received_bytes_total");
            load.messages += sum("grpc_server_msg_received_total");
            load.syncs += sum("etcd_disk_wal_fsync_duration_seconds_count");
        }
        Ok(load)
    }

    /// Between then and now.
    pub(crate) fn since(&self, before: &Self) -> Self {
        Self {
            etcd: self.etcd.saturating_sub(before.etcd),
            nodes: self.nodes.saturating_sub(before.nodes),
            sent: self.sent - before.sent,
            received: self.received - before.received,
            messages: self.messages - before.messages,
            syncs: self.syncs - before.syncs,
        }
    }
}

fn metrics(url: &str) -> Result<String> {
    let address = url.strip_prefix("http://").context("etcd without TLS")?;
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}
