//! What the daemon itself finds wrong, or what it left behind when it was killed.

use crate::{
    api::advice,
    doctor::{Finding, Host, host::known},
    routes::ROUTE_PROTOCOL,
    text::list_of,
};

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    let Ok(daemon) = &host.daemon else { return left_behind(host) };
    let degraded = daemon.status.degraded.iter().map(|what| {
        let (action, document) = advice(what);
        Finding::broken(what, "The daemon says so itself; `anyportctl status` lists it as degraded.")
            .by_hand(format!("{action}; {document} has more"))
    });
    Ok(degraded.collect())
}

/// Its routes stay when all of its processes are killed, and so does what steers.
fn left_behind(host: &Host) -> anyhow::Result<Vec<Finding>> {
    let prefixes = known(&host.leftovers)?;
    if prefixes.is_empty() {
        return Ok(Vec::new());
    }
    let finding = format!("no daemon answers, and {} of anyport is still steered here", list_of(prefixes));
    let why = "anyportd was killed, stopped with `keep`, or does not answer at this socket. What comes for these prefixes \
               reaches no service: nothing accepts it.";
    let remove = |ip: &str| format!("or give it up: {ip} route flush table local proto {ROUTE_PROTOCOL}");
    let mut finding = Finding::broken(finding, why)
        .by_hand("start anyportd with the same options: it takes over what is there, and removes what is too much");
    for (ip, is_ipv4) in [("ip", true), ("ip -6", false)] {
        if prefixes.iter().any(|prefix| prefix.is_ipv4() == is_ipv4) {
            finding = finding.by_hand(remove(ip));
        }
    }
    Ok(vec![finding])
}
