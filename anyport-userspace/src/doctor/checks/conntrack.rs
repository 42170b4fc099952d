//! A full table of tracked connections.

use crate::doctor::{Finding, Host};

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    let count = host.number("net/netfilter/nf_conntrack_count")?;
    let max = host.number("net/netfilter/nf_conntrack_max")?;
    let (Some(count), Some(max)) = (count, max) else { return Ok(Vec::new()) };
    if max == 0 || count * 10 < max * 8 {
        return Ok(Vec::new());
    }
    let finding = format!("{count} of at most {max} connections are tracked");
    let why = "A packet of a new connection is dropped when the table is full, before anything can steer it. anyport itself needs \
               no tracking.";
    let found = if count >= max { Finding::broken(finding, why) } else { Finding::warning(finding, why) };
    let steps = ["iptables", "ip6tables"].into_iter().flat_map(|tool| {
        let is_ipv4 = tool == "iptables";
        let steered = host.steered().iter().filter(move |it| it.prefix.is_ipv4() == is_ipv4).take(3);
        steered.map(move |it| format!("{tool} -t raw -I PREROUTING -d {} -j CT --notrack", it.prefix))
    });
    let found = steps.fold(found, Finding::by_hand);
    Ok(vec![found.by_hand(format!("sysctl -w net.netfilter.nf_conntrack_max={}", max * 4))])
}
