//! Whether what steers is still where the daemon has put it.

use anyhow::Context as _;

use crate::{
    back_end::BackEnd,
    doctor::{Daemon, Finding, Host, firewall::Tool, host::known},
};

const WHY: &str = "Another program has detached it, and nothing is steered there: clients are refused or reach the host's own sockets.";

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    let Ok(daemon) = &host.daemon else { return Ok(Vec::new()) };
    let missing: Vec<String> = match daemon.status.backend {
        BackEnd::SkLookup if known(&host.sk_lookup)?.iter().any(|name| name == super::sk_lookup_programs::OURS) => {
            Vec::new()
        }
        BackEnd::SkLookup => vec!["the sk_lookup program is not attached to this network namespace".into()],
        BackEnd::Tc => tc(host, daemon)?,
        BackEnd::Tproxy => tproxy(host)?,
    };
    let step = format!("stop anyportd (pid {}) and start it again", daemon.status.pid);
    Ok(missing.into_iter().map(|finding| Finding::broken(finding, WHY).by_hand(&step)).collect())
}

fn tc(host: &Host, daemon: &Daemon) -> anyhow::Result<Vec<String>> {
    let attached = known(&host.tcx)?;
    let is_ours = |name: &String| super::tc_order::OURS.contains(&name.as_str());
    let lost = daemon
        .status
        .interfaces
        .iter()
        .filter(|interface| attached.get(*interface).is_some_and(|programs| !programs.iter().any(is_ours)));
    Ok(lost.map(|interface| format!("the tc program is not attached to {interface}")).collect())
}

/// There are chains of a family only while it has rules.
fn tproxy(host: &Host) -> anyhow::Result<Vec<String>> {
    let firewall = known(&host.firewall)?;
    // The daemon says so where there can be no such chain, and does without.
    let daemon = host.daemon.as_ref().ok();
    let has_refusals = daemon.is_none_or(|it| !it.status.degraded.iter().any(|it| it.contains("does not refuse it")));
    let mut missing = Vec::new();
    for (tool, name, is_ipv4) in [(Tool::Iptables, "iptables", true), (Tool::Ip6tables, "ip6tables", false)] {
        if host.steered().iter().all(|it| it.prefix.is_ipv4() != is_ipv4) {
            continue;
        }
        for (table, hook, condition, chain) in [
            ("mangle", "PREROUTING", "", "ANYPORT"),
            ("filter", "INPUT", "-m mark --mark 0x1000/0x1000 ", "ANYPORT-REFUSE"),
        ] {
            if table == "filter" && !has_refusals {
                continue;
            }
            let jumps = firewall.has(tool, table, hook, &format!("-A {hook} {condition}-j {chain}"));
            if !jumps.with_context(|| format!("{name}-save is not in PATH"))? {
                missing.push(format!("the chain {hook} of {name} -t {table} does not jump to {chain}"));
            }
        }
    }
    Ok(missing)
}
