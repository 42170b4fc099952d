//! The routes that make steered prefixes local.

use crate::{
    doctor::{Change, Finding, Host, Steered, host::known},
    routes::{Coverage, LocalTable},
    rules::Prefix,
    text::list_of,
};

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    let LocalTable { local, refused, .. } = known(&host.local)?;
    let mut steered: Vec<&Steered> = host.steered().iter().collect();
    steered.sort_by_key(|it| (!it.prefix.is_ipv4(), it.prefix.bounds()));
    steered.dedup_by_key(|it| it.prefix);
    let (ours, by_others): (Vec<&Steered>, Vec<&Steered>) =
        steered.iter().filter(|it| !local.covers(&it.prefix)).partition(|it| it.route);
    let mut findings = Vec::new();
    if !ours.is_empty() {
        let prefixes: Vec<Prefix> = ours.iter().map(|it| it.prefix).collect();
        let finding = format!("no local route for {}", list_of(&prefixes));
        let why = "Packets to addresses that are not local are forwarded or thrown away before anything can steer them. \
                   Another program has removed the routes of anyport.";
        let blocks: Coverage = prefixes.into_iter().collect();
        let changes = blocks.blocks().map(Change::Route);
        findings.push(changes.fold(Finding::broken(finding, why), Finding::by_change));
    }
    if !by_others.is_empty() {
        let prefixes: Vec<Prefix> = by_others.iter().map(|it| it.prefix).collect();
        let finding = format!("no local route for {}, added with --no-route", list_of(&prefixes));
        let why =
            "The one who routes them has not made them local, so their packets do not get to anything that steers.";
        let steps = prefixes.iter().map(|prefix| Change::Route(*prefix).to_string());
        findings.push(steps.fold(Finding::warning(finding, why), Finding::by_hand));
    }
    let inside = |prefix: &Prefix| steered.iter().any(|it| prefix.is_within(&it.prefix));
    for prefix in refused.iter().filter(|prefix| inside(prefix)) {
        let finding = format!("a route of the table local throws away what is for {prefix}");
        let why = "It is more specific than the route that makes the steered prefix around it local.";
        let step = format!("ip route show table local {prefix}, and ip route del with that line and `table local`");
        findings.push(Finding::broken(finding, why).by_hand(step));
    }
    Ok(findings)
}
