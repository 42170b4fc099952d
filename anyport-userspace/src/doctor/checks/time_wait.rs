//! Connections that are over and keep their addresses for a minute.

use crate::doctor::{Change, Finding, Host, Sysctl};

/// What one takes is some 250 bytes.
const PLENTY: u64 = 262_144;

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    let Some(most) = host.number("net/ipv4/tcp_max_tw_buckets")? else { return Ok(Vec::new()) };
    let sockets = host.read("thread-self/net/sockstat")?;
    let tcp = sockets.lines().find_map(|line| line.strip_prefix("TCP:")).unwrap_or_default();
    let mut words = tcp.split_ascii_whitespace().skip_while(|word| *word != "tw").skip(1);
    let waiting: u64 = words.next().and_then(|it| it.parse().ok()).unwrap_or_default();
    if waiting * 10 < most * 9 {
        return Ok(Vec::new());
    }
    let over = host.counter("TcpExt", "TCPTimeWaitOverflow")?;
    let finding = format!("{waiting} connections are in TIME_WAIT, of at most {most}; {over} had no room so far");
    let why = "Those that find no room are forgotten at once: late packets of theirs are answered by a reset, or meet a new connection \
               of the same addresses and ports.";
    let name = Sysctl::new("net/ipv4/tcp_max_tw_buckets");
    let change = Change::Sysctl { name, value: PLENTY.max(most.saturating_mul(4)).to_string() };
    Ok(vec![Finding::warning(finding, why).by_change(change)])
}
