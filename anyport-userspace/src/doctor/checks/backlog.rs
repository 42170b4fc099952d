//! Queues of connections that wait to be accepted.

use crate::doctor::{Change, Finding, Host, Sysctl};

/// What Linux has had since 5.4; before it was 128.
const USUAL: u64 = 4096;
const LOW: u64 = 1024;

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let full = host.counter("TcpExt", "ListenOverflows")?;
    let so_far = if full == 0 { String::new() } else { format!(" ({full} connections found a queue full so far)") };
    if let Some(most) = host.number("net/core/somaxconn")?.filter(|it| *it < LOW) {
        let why = "No queue of connections that wait to be accepted is longer, and what finds it full is dropped: clients wait a \
                   second or more. Queues have the length that was allowed when they were made, so start anyportd again after that.";
        let name = Sysctl::new("net/core/somaxconn");
        let change = Change::Sysctl { name, value: USUAL.to_string() };
        findings.push(Finding::warning(format!("net.core.somaxconn={most}{so_far}"), why).by_change(change));
    }
    let without_cookies = host.number("net/ipv4/tcp_syncookies")? == Some(0);
    if let Some(most) = host.number("net/ipv4/tcp_max_syn_backlog")?.filter(|it| *it < LOW && without_cookies) {
        let finding = format!("net.ipv4.tcp_max_syn_backlog={most}, and net.ipv4.tcp_syncookies=0");
        let why = "So many handshakes may be under way for a service; without cookies all beyond are dropped, and a small flood \
                   keeps everyone out.";
        let name = Sysctl::new("net/ipv4/tcp_syncookies");
        findings.push(Finding::warning(finding, why).by_change(Change::Sysctl { name, value: "1".into() }));
    }
    Ok(findings)
}
